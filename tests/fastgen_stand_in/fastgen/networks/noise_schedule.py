"""The schedules: alpha(t) and sigma(t) in float64, and what follows from x_t = alpha x0 + sigma eps."""

import torch


class BaseNoiseSchedule(torch.nn.Module):
    clamp_min = 1e-6

    def alpha(self, t):
        raise NotImplementedError

    def sigma(self, t):
        raise NotImplementedError

    def column(self, values, x):
        return values.reshape(*values.shape, *[1] * (x.ndim - values.ndim))

    def forward_process(self, x: torch.Tensor, eps: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return (self.column(self.alpha(t), x) * x + self.column(self.sigma(t), x) * eps).to(x.dtype)

    def x0_to_eps(self, xt: torch.Tensor, x0: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        sigma = self.column(self.sigma(t), xt).clamp(min=self.clamp_min)
        return ((xt - self.column(self.alpha(t), xt) * x0) / sigma).to(xt.dtype)

    def eps_to_x0(self, xt: torch.Tensor, eps: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        alpha = self.column(self.alpha(t), xt).clamp(min=self.clamp_min)
        return ((xt - self.column(self.sigma(t), xt) * eps) / alpha).to(xt.dtype)


class EDMNoiseSchedule(BaseNoiseSchedule):
    def alpha(self, t):
        return torch.ones((), dtype=t.dtype)

    def sigma(self, t):
        return t


class SDNoiseSchedule(BaseNoiseSchedule):
    def __init__(self):
        super().__init__()
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
        self.register_buffer("alphas_cumprod", torch.cumprod(1 - betas, 0))

    def alpha(self, t):
        return self.alphas_cumprod[(t * 999).round().long()].sqrt()

    def sigma(self, t):
        return (1 - self.alphas_cumprod[(t * 999).round().long()]).sqrt()


class RFNoiseSchedule(BaseNoiseSchedule):
    def alpha(self, t):
        return 1 - t

    def sigma(self, t):
        return t

    def forward_process(self, x: torch.Tensor, eps: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return super().forward_process(x, eps, t)


def get_noise_schedule(name):
    return {"edm": EDMNoiseSchedule, "sd": SDNoiseSchedule, "rf": RFNoiseSchedule}[name]()
