"""Noise schedules: what alpha and sigma are at a time, and which times are drawn.

`x_t = alpha(t) x0 + sigma(t) eps`. A time `t` is in the schedule's native unit, the one people write into a config:
DDPM an integer timestep 0..999, Karras (EDM) the noise level sigma itself, rectified flow a number in [0, 1].

| schedule | alpha | sigma | source |
| --- | --- | --- | --- |
| DDPM | sqrt(abar_t) | sqrt(1 - abar_t) | Ho et al. 2020; Stable Diffusion's scaled-linear betas .00085-.012 |
| Karras | 1 | t | Karras et al. 2022 (EDM), eq. 5: 1000 levels, rho 7, .002-80 |
| rectified flow | 1 - t | t | Liu et al. 2022 |
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

NUM_TIMESTEPS = 1000


@lru_cache(maxsize=8)
def _ddpm_table(beta_start: float, beta_end: float, device: torch.device) -> Tensor:
    betas = torch.linspace(beta_start**0.5, beta_end**0.5, NUM_TIMESTEPS, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, 0).to(device)


def _rho_spaced(high: float, low: float, num: int, rho: float) -> Tensor:
    """`num` noise levels from high to low, f64 (Karras et al. 2022, eq. 5); one alone is the high one."""
    ramp = torch.linspace(0, 1, num, dtype=torch.float64) if num > 1 else torch.zeros(1, dtype=torch.float64)
    return (high ** (1 / rho) + ramp * (low ** (1 / rho) - high ** (1 / rho))) ** rho


@lru_cache(maxsize=8)
def _karras_table(sigma_min: float, sigma_max: float, rho: float, device: torch.device) -> Tensor:
    return _rho_spaced(sigma_min, sigma_max, NUM_TIMESTEPS, rho).float().to(device)


def _index(u: Tensor, t_range: tuple[float, float]) -> Tensor:
    """Uniform entry of the table between two fractions of it: u (N,) in (0, 1] -> (N,) int64 in [low, high)."""
    low = min(round(t_range[0] * NUM_TIMESTEPS), NUM_TIMESTEPS - 1)
    high = max(round(t_range[1] * NUM_TIMESTEPS), low + 1)
    return (low + (u * (high - low)).long()).clamp_(max=high - 1)


class Schedule:
    """A noise schedule. `kind` is its name in configs; `init_sigma` scales the pure noise a sampler starts from."""

    kind: str
    sigma_data: float | None = None

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma, both (N,) f32, at times t (N,)."""
        raise NotImplementedError

    def time(self, u: Tensor, t_range: tuple[float, float] = (0.0, 1.0)) -> Tensor:
        """Map uniform numbers u (N,) in (0, 1] to times (N,), uniform over the given fractions of the schedule."""
        raise NotImplementedError

    def steps(self, values: tuple[float, ...], device: torch.device | str = "cpu") -> Tensor:
        """A generator's step list as times (K,); `ValueError` when one of them lies outside the schedule."""
        raise NotImplementedError

    def sampling_times(self, num_steps: int) -> Tensor:
        """Times (num_steps,) at which a teacher's ODE sampler evaluates the network, from most noise to least."""
        raise NotImplementedError

    def init_sigma(self, t: Tensor) -> Tensor:
        """Standard deviation of the generator's first input at t: DDPM and flow start from unit noise."""
        return torch.ones_like(t, dtype=torch.float32)

    def loss_weight(self, t: Tensor, prediction_type: str) -> Tensor:
        """Weight (N,) f32 of the denoising loss at t: 1, for Karras' x0 ("sample") EDM's sigma^-2 + sigma_data^-2."""
        return torch.ones_like(t, dtype=torch.float32)

    def to_dict(self) -> dict:
        return {"kind": self.kind, **self.__dict__}


@dataclass(frozen=True)
class DDPMSchedule(Schedule):
    """Discrete DDPM timesteps 0..999 with Stable Diffusion's scaled-linear betas."""

    beta_start: float = 0.00085
    beta_end: float = 0.012
    kind = "ddpm"

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        abar = _ddpm_table(self.beta_start, self.beta_end, t.device)[t.long()]
        return abar.sqrt().float(), (1 - abar).sqrt().float()

    def time(self, u: Tensor, t_range: tuple[float, float] = (0.0, 1.0)) -> Tensor:
        return _index(u, t_range)

    def steps(self, values: tuple[float, ...], device: torch.device | str = "cpu") -> Tensor:
        for value in values:
            if value != int(value) or not 0 <= value < NUM_TIMESTEPS:
                raise ValueError(f"steps: {value} is no DDPM timestep; expected integers 0..{NUM_TIMESTEPS - 1}")
        return torch.tensor([int(v) for v in values], dtype=torch.int64, device=device)

    def sampling_times(self, num_steps: int) -> Tensor:
        """The timesteps nearest to EDM's spacing of sigma / alpha."""
        abar = _ddpm_table(self.beta_start, self.beta_end, torch.device("cpu"))
        ratios = ((1 - abar) / abar).sqrt()
        wanted = _rho_spaced(float(ratios[-1]), float(ratios[0]), num_steps, 7.0)
        return (ratios.log() - wanted.log()[:, None]).abs().argmin(1)


@dataclass(frozen=True)
class KarrasSchedule(Schedule):
    """EDM's schedule: t is sigma; random times are entries of the 1000-level Karras table."""

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    sigma_data: float = 0.5
    kind = "karras"

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(t, dtype=torch.float32), t.float()

    def time(self, u: Tensor, t_range: tuple[float, float] = (0.0, 1.0)) -> Tensor:
        return _karras_table(self.sigma_min, self.sigma_max, self.rho, u.device)[_index(u, t_range)]

    def steps(self, values: tuple[float, ...], device: torch.device | str = "cpu") -> Tensor:
        for value in values:
            if not 0 < value <= self.sigma_max:
                raise ValueError(f"steps: {value} is no noise level; expected sigmas in (0, {self.sigma_max}]")
        return torch.tensor(values, dtype=torch.float32, device=device)

    def sampling_times(self, num_steps: int) -> Tensor:
        return _rho_spaced(self.sigma_max, self.sigma_min, num_steps, self.rho).float()

    def init_sigma(self, t: Tensor) -> Tensor:
        return t.float()

    def loss_weight(self, t: Tensor, prediction_type: str) -> Tensor:
        if prediction_type != "sample":
            return super().loss_weight(t, prediction_type)
        return t.float() ** -2 + self.sigma_data**-2


@dataclass(frozen=True)
class RectifiedFlowSchedule(Schedule):
    """Straight lines from data (t = 0) to noise (t = 1)."""

    kind = "rectified_flow"

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return 1 - t.float(), t.float()

    def time(self, u: Tensor, t_range: tuple[float, float] = (0.0, 1.0)) -> Tensor:
        low, high = t_range
        return low + u * (high - low)

    def steps(self, values: tuple[float, ...], device: torch.device | str = "cpu") -> Tensor:
        for value in values:
            if not 0 < value <= 1:
                raise ValueError(f"steps: {value} is no flow time; expected numbers in (0, 1]")
        return torch.tensor(values, dtype=torch.float32, device=device)

    def sampling_times(self, num_steps: int) -> Tensor:
        return torch.linspace(1, 0, num_steps + 1)[:-1]


@dataclass(frozen=True)
class TimeSampling:
    """Which times are drawn; the fields are config_schema.TimeSamplingConfig's."""

    kind: str = "uniform"
    mean: float = -1.2
    std: float = 1.2
    shift: float = 3.0

    def draw(self, schedule: Schedule, u: Tensor, t_range: tuple[float, float] = (0.0, 1.0)) -> Tensor:
        """Map uniform numbers u (N,) in (0, 1] to times (N,) within the given fractions of the schedule."""
        return schedule.time(u, t_range)


SCHEDULES: dict[str, type[Schedule]] = {cls.kind: cls for cls in (DDPMSchedule, KarrasSchedule, RectifiedFlowSchedule)}


def make_schedule(kind: str, **options) -> Schedule:
    """The schedule of that name; `options` are its dataclass fields. `ValueError` for an unknown name or field."""
    if kind not in SCHEDULES:
        raise ValueError(f"schedule {kind!r} is unknown; expected one of {sorted(SCHEDULES)}")
    for name, value in options.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e6:
            raise ValueError(f"schedule {kind!r}: {name} is {value!r}; expected a number above 0")
    try:
        return SCHEDULES[kind](**options)
    except TypeError as error:
        raise ValueError(f"schedule {kind!r}: {error}") from None
