"""FastGen's losses and schedule methods on our operators, and apply(), which swaps them into an installed FastGen.

| FastGen's name | what it is | operator |
| --- | --- | --- |
| denoising_score_matching_loss | mse of net_pred to x0, eps, alpha eps - sigma x0 or eps - x0 | denoising_loss |
| variational_score_distillation_loss | mse(gen, gen - (fake - teacher) w) / 2 | dmd_loss |
| gan_loss_generator, gan_loss_discriminator | means of softplus | gan_generator_loss, gan_discriminator_loss |
| forward_process, eps_to_x0, x0_to_eps | x_t = alpha x0 + sigma eps, solved for each | add_noise, predict_x0 |

The first four are functions of fastgen.methods.common_loss, the others methods of the classes in
fastgen.networks.noise_schedule, whose own alpha(t) and sigma(t) they use. Signatures and error types are FastGen's,
errors over shapes are PyTorch's own. Arithmetic is in f32 (f64 where a tensor is f64) and rounded once. Where operators
do not fit, the formula runs in plain PyTorch with the same arithmetic: times of a video's frames, gradients in the
noise, forward-mode differentiation and torch.func. Second derivatives through the operators are refused (RuntimeError).
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..errors import UserError
from ..ops._common import working_dtype
from ..ops.denoising import denoising_loss
from ..ops.dmd import dmd_loss
from ..ops.gan import gan_discriminator_loss, gan_generator_loss
from ..ops.noise import add_noise, predict_x0
from ._patching import Patches, Report, import_all

LOSSES = (
    "denoising_score_matching_loss",
    "variational_score_distillation_loss",
    "gan_loss_generator",
    "gan_loss_discriminator",
)
METHODS = ("forward_process", "eps_to_x0", "x0_to_eps")
IMPORTERS = ("dmd2", "f_distill", "ladd", "causvid", "self_forcing")
"""Modules of fastgen.methods.distribution_matching that import the losses by name."""

NEEDED = {
    "x0": ("x0",),
    "eps": ("eps",),
    "v": ("x0", "eps", "noise_scheduler", "t"),
    "flow": ("x0", "eps"),
}
"""What denoising_score_matching_loss needs besides net_pred, by pred_type."""


# --- losses -----------------------------------------------------------------------------------------------------------


def denoising_score_matching_loss(
    pred_type: str,
    net_pred: Tensor,
    x0: Tensor | None = None,
    eps: Tensor | None = None,
    noise_scheduler: Any = None,
    t: Tensor | None = None,
) -> Tensor:
    """mean((net_pred - target)^2), target x0 ("x0"), eps ("eps"), alpha eps - sigma x0 ("v") or eps - x0 ("flow").

    net_pred, x0, eps: (N, *). noise_scheduler, t: for "v", a schedule and its times, (N,) or for each frame. The
    gradient goes to net_pred alone. The loss has the dtype of F.mse_loss, that which the tensors promote to (f32 under
    autocast); the schedule's f64 coefficients do not widen it. AssertionError for what is missing, NotImplementedError
    for another pred_type.
    """
    if pred_type not in NEEDED:
        raise NotImplementedError(f"pred_type: got {pred_type!r}, expected one of {', '.join(NEEDED)}")
    given: dict[str, Any] = {"x0": x0, "eps": eps, "noise_scheduler": noise_scheduler, "t": t}
    for name in NEEDED[pred_type]:
        assert given[name] is not None, f"{name}: got None, expected it with pred_type {pred_type!r}"
    images = [given[name].detach() for name in NEEDED[pred_type] if name in ("x0", "eps")]
    dtype = _loss_dtype(net_pred, *images, autocast_devices=("cpu", "cuda"))
    net_pred, *images = _alike(net_pred, *images)
    if pred_type == "v":
        return _velocity_loss(noise_scheduler, t, net_pred, *images).to(dtype)
    ones = _ones(net_pred)
    if pred_type == "flow":
        return denoising_loss(net_pred, images[0], ones, ones, images[1], prediction_type="flow").to(dtype)
    return denoising_loss(net_pred, images[0], ones, ones, prediction_type="sample").to(dtype)


def _velocity_loss(schedule: Any, t: Any, net_pred: Tensor, x0: Tensor, eps: Tensor) -> Tensor:
    alpha, sigma = _coefficients(schedule, t, net_pred)
    folded = _folded(alpha, sigma, net_pred, x0, eps)
    if folded is None:
        ones = _ones(net_pred)
        return denoising_loss(net_pred, alpha * eps - sigma * x0, ones, ones, prediction_type="sample")
    alpha, sigma, net_pred, x0, eps = folded
    return denoising_loss(net_pred, x0, alpha, sigma, eps, prediction_type="v_prediction")


def variational_score_distillation_loss(
    gen_data: Tensor, teacher_x0: Tensor, fake_score_x0: Tensor, additional_scale: Tensor | None = None
) -> Tensor:
    """mse(gen, stopgrad(gen - (fake - teacher) w)) / 2 with w = additional_scale / (mean|gen - teacher| + 1e-6).

    gen_data, teacher_x0, fake_score_x0: (N, *); the mean is over a sample. additional_scale: N values, or one, of any
    shape: f-distill's h. The gradient goes to gen_data alone, without the cancellation of the target. The loss has the
    dtype that the three tensors promote to (f32 under autocast), whatever that of additional_scale.
    """
    tensors = (gen_data, teacher_x0.detach(), fake_score_x0.detach())
    dtype = _loss_dtype(*tensors, autocast_devices=("cpu", "cuda"))
    gen, teacher, fake = _alike(*tensors)
    ones, weight = _ones(gen), None
    if additional_scale is not None:
        weight = additional_scale.detach().to(ones.dtype).reshape(-1).expand_as(ones)
    x_t = gen.detach()  # "sample" has no use for it
    loss = dmd_loss(gen, x_t, fake, teacher, alpha=ones, sigma=ones, prediction_type="sample", sample_weight=weight)
    return loss.to(dtype)


def gan_loss_generator(fake_logits: Tensor) -> Tensor:
    """mean softplus(-fake_logits), logits (N, M), in their dtype (f32 under autocast on CUDA); d/dlogits.

    AssertionError unless the logits are 2-D.
    """
    _check_logits("fake_logits", fake_logits)
    return gan_generator_loss(fake_logits).to(_loss_dtype(fake_logits, autocast_devices=("cuda",)))


def gan_loss_discriminator(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """mean softplus(fake_logits) + mean softplus(-real_logits), logits (N, M) each; d/d both.

    In the dtype that the two promote to (f32 under autocast on CUDA). AssertionError unless both are 2-D.
    """
    _check_logits("real_logits", real_logits)
    _check_logits("fake_logits", fake_logits)
    dtype = _loss_dtype(real_logits, fake_logits, autocast_devices=("cuda",))
    return gan_discriminator_loss(*_widened(real_logits, fake_logits)).to(dtype)


def _check_logits(name: str, logits: Tensor) -> None:
    assert logits.ndim == 2, f"{name}: got shape {tuple(logits.shape)}, expected two dimensions (N, M)"


def _loss_dtype(*tensors: Tensor, autocast_devices: tuple[str, ...]) -> torch.dtype:
    """The dtype PyTorch's own loss would have: autocast widens mse_loss everywhere, softplus on CUDA alone."""
    dtype = functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
    device = tensors[0].device.type
    widens = device in autocast_devices and torch.is_autocast_enabled(device)
    return torch.promote_types(dtype, torch.float32) if widens else dtype


def _widened(*tensors: Tensor) -> tuple[Tensor, ...]:
    """All in f64 where one is: operators take f64 for all or for none, and any mixture of the others."""
    if any(tensor.dtype == torch.float64 for tensor in tensors):
        return tuple(tensor.double() for tensor in tensors)
    return tensors


def _alike(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Also broadcast to one shape, by PyTorch's rules and with its errors."""
    if any(tensor.shape != tensors[0].shape for tensor in tensors):
        tensors = torch.broadcast_tensors(*tensors)
    return _widened(*tensors)


def _ones(like: Tensor) -> Tensor:
    """(N,): coefficients for formulas that have none."""
    return torch.ones(like.shape[0], dtype=working_dtype(like), device=like.device)


# --- schedules --------------------------------------------------------------------------------------------------------


def forward_process(self: Any, x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """x_t = alpha(t) x + sigma(t) eps, in x's dtype; d/dx and d/deps. A method of schedules.

    x, eps: (N, *). t: (N,), one time for all, one for each index of more leading dimensions, (N, T) for the frames of a
    video (N, C, T, H, W), or any shape that broadcasts after as many dimensions of size 1 as x has more.
    """
    images = _widened(x, eps)
    alpha, sigma = _coefficients(self, t, images[0])
    needs_eps_grad = eps.requires_grad and torch.is_grad_enabled()  # add_noise has none in the noise
    if needs_eps_grad or (folded := _folded(alpha, sigma, *images)) is None:
        x_t = alpha * images[0] + sigma * images[1]
    else:
        alpha, sigma, x_folded, eps_folded = folded
        x_t_folded: Tensor = add_noise(x_folded, alpha, sigma, eps_folded)
        x_t = x_t_folded.reshape(x.shape)
    return x_t.to(x.dtype)


def eps_to_x0(self: Any, xt: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """x0 = (xt - sigma(t) eps) / alpha(t), in xt's dtype; d/dxt and d/deps. A method of schedules.

    Shapes as in forward_process. alpha is held at the schedule's clamp_min, where it has one: pure noise has alpha 0.
    """
    images = _widened(xt, eps)
    alpha, sigma = _coefficients(self, t, images[0])
    return _quotient(images, factor=sigma, divisor=_clamped(self, alpha)).to(xt.dtype)


def x0_to_eps(self: Any, xt: Tensor, x0: Tensor, t: Tensor) -> Tensor:
    """eps = (xt - alpha(t) x0) / sigma(t), in xt's dtype; d/dxt and d/dx0. A method of schedules.

    Shapes as in forward_process. sigma is held at the schedule's clamp_min, where it has one: data has sigma 0.
    """
    images = _widened(xt, x0)
    alpha, sigma = _coefficients(self, t, images[0])
    return _quotient(images, factor=alpha, divisor=_clamped(self, sigma)).to(xt.dtype)


def _quotient(images: tuple[Tensor, ...], factor: Tensor, divisor: Tensor) -> Tensor:
    """(xt - factor other) / divisor of the two images: predict_x0 with `other` in the noise's place."""
    xt, other = images
    folded = _folded(divisor, factor, xt, other)
    if folded is None:
        return (xt - factor * other) / divisor
    divisor, factor, xt_folded, other_folded = folded
    return predict_x0(xt_folded, other_folded, divisor, factor, prediction_type="epsilon").reshape(xt.shape)


def _clamped(schedule: Any, divisor: Tensor) -> Tensor:
    smallest = getattr(schedule, "clamp_min", None)
    return divisor if smallest is None else divisor.clamp(min=smallest)


def _coefficients(schedule: Any, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """alpha(t) and sigma(t) in the working dtype, with as many dimensions as `like`: those of t, then ones."""
    alpha, sigma = torch.broadcast_tensors(schedule.alpha(t), schedule.sigma(t))
    shape = tuple(alpha.shape)
    if like.ndim == 5 and shape != like.shape[:2] and shape == (like.shape[0], like.shape[2]):
        shape = (shape[0], 1, shape[1])  # one time for each frame of (N, C, T, H, W)
    shape += (1,) * (like.ndim - len(shape))
    working = working_dtype(like)
    return alpha.to(working).reshape(shape), sigma.to(working).reshape(shape)


def _folded(alpha: Tensor, sigma: Tensor, *images: Tensor) -> tuple[Tensor, ...] | None:
    """What operators take: coefficients (M,), images (M, *), M the product of the leading dimensions that have times.

    None where times are not those of leading dimensions, images differ in shape, or operators have no derivative.
    """
    first = images[0]
    if first.ndim == 0 or any(image.shape != first.shape for image in images) or _is_transformed():
        return None
    if alpha.numel() == 1:
        alpha, sigma = (c.reshape(1).expand(len(first)) for c in (alpha, sigma))
    num_folded = max([1, *(i + 1 for i, size in enumerate(alpha.shape) if size > 1)])
    if alpha.shape[:num_folded] != first.shape[:num_folded]:
        return None
    return alpha.flatten(), sigma.flatten(), *(image.flatten(0, num_folded - 1) for image in images)


def _is_transformed() -> bool:
    """Whether dual numbers or torch.func are at work: operators would have tangents of 0, or refuse to run."""
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


# --- swapping ---------------------------------------------------------------------------------------------------------


class FastGenNotFoundError(UserError, ImportError):
    """No FastGen that could be imported, or another project of that name."""


_APPLIED: dict[str, Patches] = {}


def apply(package: str = "fastgen") -> Report:
    """Swap the losses and schedule methods above into an installed FastGen; what was swapped, and what left and why.

    Losses are swapped in every module of the package that holds them, under whatever name, and methods in every class
    of fastgen.networks.noise_schedule that defines them itself. What has another signature is left alone, and so are
    modules that do not import here. Modules outside the package keep what they have imported. A second call swaps what
    has come since. FastGenNotFoundError (a UserError and ImportError) where there is no FastGen.
    """
    try:
        losses = importlib.import_module(f"{package}.methods.common_loss")
        schedules = importlib.import_module(f"{package}.networks.noise_schedule")
    except ImportError as error:
        raise FastGenNotFoundError(
            f"{package} cannot be used: {error}. Expected NVIDIA's FastGen and what it requires: "
            "pip install git+https://github.com/NVlabs/FastGen (`fastgen` on PyPI is another project)"
        ) from error
    left = import_all(f"{package}.methods.distribution_matching.{name}" for name in IMPORTERS)
    patches = _APPLIED.setdefault(package, Patches(package))
    # Ours are looked up now, not at import: somebody may have wrapped them.
    for name in LOSSES:
        patches.add_function(losses, name, globals()[name])
    for name in METHODS:
        patches.add_methods(schedules, name, globals()[name])
    return patches.apply(left)


def undo(package: str = "fastgen") -> None:
    """Put the originals back wherever ours are, in modules imported since apply() too. Without apply(), nothing."""
    if package in _APPLIED:
        _APPLIED.pop(package).undo()


@contextmanager
def applied(package: str = "fastgen") -> Iterator[Report]:
    """`with applied() as report:` - apply() for a block; where it already held before, it holds after it too."""
    held = package in _APPLIED
    try:
        yield apply(package)
    finally:
        if not held:
            undo(package)
