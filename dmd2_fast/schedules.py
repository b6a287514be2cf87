"""Noise schedules: what alpha and sigma are at a time, and which times are drawn.

`x_t = alpha(t) x0 + sigma(t) eps`. A time `t` is in the schedule's native unit, the one people write into a config:
DDPM an integer timestep 0..999, Karras (EDM) the noise level sigma itself, rectified flow a number in [0, 1].

| schedule | alpha | sigma | source |
| --- | --- | --- | --- |
| DDPM | sqrt(abar_t) | sqrt(1 - abar_t) | Ho et al. 2020; Stable Diffusion's scaled-linear betas .00085-.012 |
| Karras | 1 | t | Karras et al. 2022 (EDM), eq. 5: 1000 levels, rho 7, .002-80 |
| rectified flow | 1 - t | t | Liu et al. 2022 |

`log_ratio(t)` is ln(sigma / alpha), by which the schedules compare, and `time_at` its inverse: `TimeSampling` draws in
it, and so means the same for each of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

NUM_TIMESTEPS = 1000
LAST_WITH_SIGNAL = 0.98
"""Of a flow's times, for x0 from epsilon: where the paper's range of times ends, and unit noise is 2 % too strong."""


@lru_cache(maxsize=8)
def _ddpm_table(beta_start: float, beta_end: float, device: torch.device) -> Tensor:
    betas = torch.linspace(beta_start**0.5, beta_end**0.5, NUM_TIMESTEPS, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, 0).to(device)


@lru_cache(maxsize=8)
def _ddpm_log_ratios(beta_start: float, beta_end: float, device: torch.device) -> Tensor:
    abar = _ddpm_table(beta_start, beta_end, device)
    return (torch.log1p(-abar) - abar.log()) / 2


@lru_cache(maxsize=8)
def _ddpm_midpoints(beta_start: float, beta_end: float, device: torch.device) -> Tensor:
    ratios = _ddpm_log_ratios(beta_start, beta_end, device)
    return (ratios[:-1] + ratios[1:]) / 2


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

    def log_ratio(self, t: Tensor) -> Tensor:
        """ln(sigma / alpha), (N,) f64, at times t (N,); infinite where one of them is 0."""
        raise NotImplementedError

    def time_at(self, log_ratio: Tensor) -> Tensor:
        """The times (N,) of these ln(sigma / alpha) (N,) f64, or the nearest that the schedule has."""
        raise NotImplementedError

    def steps(self, values: tuple[float, ...], device: torch.device | str = "cpu") -> Tensor:
        """A generator's step list as times (K,); `ValueError` when one of them lies outside the schedule."""
        raise NotImplementedError

    def sampling_times(self, num_steps: int, prediction_type: str | None = None) -> Tensor:
        """Times (num_steps,) at which a teacher's ODE sampler evaluates the network, from most noise to least.

        A network that predicts epsilon has no x0 where alpha is 0: rectified flow then starts at `LAST_WITH_SIGNAL`.
        """
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

    def log_ratio(self, t: Tensor) -> Tensor:
        return _ddpm_log_ratios(self.beta_start, self.beta_end, t.device)[t.long()]

    def time_at(self, log_ratio: Tensor) -> Tensor:
        return torch.bucketize(log_ratio, _ddpm_midpoints(self.beta_start, self.beta_end, log_ratio.device))

    def steps(self, values: tuple[float, ...], device: torch.device | str = "cpu") -> Tensor:
        for value in values:
            if value != int(value) or not 0 <= value < NUM_TIMESTEPS:
                raise ValueError(f"steps: {value} is no DDPM timestep; expected integers 0..{NUM_TIMESTEPS - 1}")
        return torch.tensor([int(v) for v in values], dtype=torch.int64, device=device)

    def sampling_times(self, num_steps: int, prediction_type: str | None = None) -> Tensor:
        """The timesteps nearest to EDM's spacing of sigma / alpha."""
        ratios = _ddpm_log_ratios(self.beta_start, self.beta_end, torch.device("cpu")).exp()
        return self.time_at(_rho_spaced(float(ratios[-1]), float(ratios[0]), num_steps, 7.0).log())


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

    def log_ratio(self, t: Tensor) -> Tensor:
        return t.double().log()

    def time_at(self, log_ratio: Tensor) -> Tensor:
        return log_ratio.exp().clamp(self.sigma_min, self.sigma_max).float()

    def steps(self, values: tuple[float, ...], device: torch.device | str = "cpu") -> Tensor:
        for value in values:
            if not 0 < value <= self.sigma_max:
                raise ValueError(f"steps: {value} is no noise level; expected sigmas in (0, {self.sigma_max}]")
        return torch.tensor(values, dtype=torch.float32, device=device)

    def sampling_times(self, num_steps: int, prediction_type: str | None = None) -> Tensor:
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

    def log_ratio(self, t: Tensor) -> Tensor:
        return torch.logit(t.double())

    def time_at(self, log_ratio: Tensor) -> Tensor:
        return log_ratio.sigmoid().float()

    def steps(self, values: tuple[float, ...], device: torch.device | str = "cpu") -> Tensor:
        for value in values:
            if not 0 < value <= 1:
                raise ValueError(f"steps: {value} is no flow time; expected numbers in (0, 1]")
        return torch.tensor(values, dtype=torch.float32, device=device)

    def sampling_times(self, num_steps: int, prediction_type: str | None = None) -> Tensor:
        start = LAST_WITH_SIGNAL if prediction_type == "epsilon" else 1
        return torch.linspace(start, 0, num_steps + 1)[:-1]


@dataclass(frozen=True)
class TimeSampling:
    """Which times are drawn; the fields are config_schema.TimeSamplingConfig's. With r = sigma / alpha:

    | kind | draws | source |
    | --- | --- | --- |
    | uniform | uniform over the t_range of the schedule's own time | Yin et al. 2024 |
    | log_normal | ln r ~ N(mean, std^2), truncated to the ratios of the t_range's ends | Karras et al. 2022, table 1 |
    | shifted | uniform over the t_range, then r times `shift` | Esser et al. 2024 (arXiv 2403.03206), section 5.3.2 |

    For rectified flow log_normal is the logit-normal of Esser et al., section 3.1, and shifted is their eq. 23,
    t -> s t / (1 + (s - 1) t): the t_range is that of the time before the shift. DDPM takes the timestep of the
    nearest ln r; beyond its first or last one it takes that, and Karras its least or largest sigma.
    """

    kind: str = "uniform"
    mean: float = -1.2
    std: float = 1.2
    shift: float = 3.0

    def draw(self, schedule: Schedule, u: Tensor, t_range: tuple[float, float] = (0.0, 1.0)) -> Tensor:
        """Map uniform numbers u (N,) in (0, 1] to times (N,), increasing with u; one number a sample.

        `ValueError` for a log-normal so far from the t_range that no probability is left in it.
        """
        if self.kind == "uniform":
            return schedule.time(u, t_range)
        if self.kind == "shifted":
            return schedule.time_at(schedule.log_ratio(schedule.time(u, t_range)) + math.log(self.shift))
        ends = schedule.time(torch.tensor([0.0, 1.0], device="cpu"), t_range)  # on the host: no device is waited for
        low, high = ((schedule.log_ratio(ends) - self.mean) / self.std).tolist()
        try:
            normal = _truncated_normal(u, low, high)
        except ValueError as error:
            raise ValueError(
                f"time_sampling: N({self.mean}, {self.std}^2) has no probability for ln(sigma / alpha) within the "
                f"t_range {list(t_range)}: expected a mean nearer to it, or a larger std"
            ) from error
        return schedule.time_at(self.mean + self.std * normal)


LEAST_UNIFORM = 2.0**-33
"""Of random.philox_uniform; its largest is 1, which stands for 1 - 2^-33 where the normal would be infinite."""


def _truncated_normal(u: Tensor, low: float, high: float) -> Tensor:
    """Inverse distribution function at u (N,) of N(0, 1) between low and high, which may be infinite: (N,) f64."""
    if low + high > 0:  # probabilities next to 1 have no digits left to tell them apart
        return -_truncated_normal(1 - u.double(), -high, -low)
    below, up_to = (math.erfc(-bound / math.sqrt(2)) / 2 for bound in (low, high))
    if up_to <= below:
        raise ValueError(f"no probability between {low} and {high} standard deviations")
    inside = u.double().clamp(LEAST_UNIFORM, 1 - LEAST_UNIFORM)
    return torch.special.ndtri(below + inside * (up_to - below)).clamp(low, high)


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
