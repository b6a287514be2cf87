"""What the operator tests compare with: textbook formulas in plain PyTorch, in whatever dtype they are given.

In float64 they are the truth, with autograd's gradients; in the tested dtype their error is the yardstick: an operator
may be off by at most twice as much (plus one rounding). Written from the papers, not from the operators.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = ("contiguous", "channels_last", "batch_last", "strided", "expanded")
SHAPES = ((3, 5, 7, 3), (1, 1, 1, 1), (2, 3, 8, 8))
PREDICTION_TYPES = ("epsilon", "sample", "v_prediction", "flow")


def random_tensor(shape: Sequence[int], dtype: torch.dtype, seed: int, layout: str = "contiguous") -> Tensor:
    """Standard normals in one of LAYOUTS, for shapes (N, C, H, W)."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(tuple(shape), generator=generator, dtype=torch.float64, device="cpu")
    values = values.to(torch.get_default_device(), dtype)
    if layout == "channels_last":
        return values.to(memory_format=torch.channels_last)
    if layout == "batch_last":
        return values.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)
    if layout == "strided":
        padded = torch.full((*shape[:-1], 2 * shape[-1] + 1), torch.nan, dtype=dtype)
        padded[..., 1::2] = values
        return padded[..., 1::2]
    if layout == "expanded":
        return values[:, :1].expand(*shape)
    return values


def coefficients(num_samples: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """alpha in [.3, 1.3) and sigma in [.2, 1.2), (N,), in no relation to each other."""
    generator = torch.Generator().manual_seed(1000 + seed)
    draws = torch.rand(2, num_samples, generator=generator, dtype=torch.float64, device="cpu")
    draws = draws.to(torch.get_default_device())
    return (draws[0] + 0.3).to(dtype), (draws[1] + 0.2).to(dtype)


def column(values: Tensor, like: Tensor) -> Tensor:
    """(N,) against (N, ...), in the dtype of the latter."""
    return values.to(like.dtype).view(-1, *[1] * (like.dim() - 1))


def assert_twice(ours: Tensor, plain: Tensor, exact: Tensor, what: str = "", num_roundings: int = 1) -> None:
    """Our error against float64 is at most twice PyTorch's own in the same dtype, plus one rounding of the largest.

    PyTorch's own counts as half a spacing where it is less: a single number can come out better than that by luck.

    In bf16 and f16, PyTorch's error is large (coefficients and intermediate results are rounded too), so the promise of
    one rounding at the store is asserted beside it (of two, where what is kept for the backward pass is rounded).
    """
    assert ours.shape == exact.shape, f"{what}: shape {tuple(ours.shape)}, expected {tuple(exact.shape)}"
    if exact.numel() == 0:
        return
    assert exact.isfinite().all(), f"{what}: the oracle is not finite"
    error = (ours.double() - exact).abs().max().item()
    spacing = torch.finfo(ours.dtype).eps * exact.abs().max().item()
    yardstick = max((plain.double() - exact).abs().max().item(), spacing / 2)
    floor = spacing + torch.finfo(ours.dtype).tiny
    limit = 2 * yardstick + floor
    assert error <= limit, f"{what}: error {error:.3g}, plain PyTorch {yardstick:.3g}, limit {limit:.3g}"
    if ours.dtype in (torch.bfloat16, torch.float16):
        # Rounded once: half a spacing, and what f32 arithmetic leaves.
        half = (0.5 * torch.finfo(ours.dtype).eps + 2e-5) * exact.abs().max().item() + 2.0**-25
        assert error <= num_roundings * half, f"{what}: error {error:.3g}, one rounding {half:.3g}: rounded too often"


def assert_rounded(ours: Tensor, exact: Tensor, slack: Tensor | float) -> None:
    """Every element of ours is the exact one, off by at most slack and then rounded once to its dtype."""
    info = torch.finfo(ours.dtype)
    limit = slack + 0.5 * info.eps * (exact.abs() + slack) + 0.5 * info.eps * info.smallest_normal
    excess = (ours.double() - exact).abs() - limit
    assert excess.max() <= 0, f"{int((excess > 0).sum())} elements, by up to {excess.max():.3g}"


def compare(
    ours: Callable[..., Tensor | tuple[Tensor, ...]],
    plain: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Sequence[Tensor],
    fixed: Sequence[Tensor] = (),
    expanded_grad: bool = False,
    grad_roundings: int = 1,
) -> None:
    """Values and gradients in `inputs` of ours(*inputs, *fixed) by the twice-PyTorch rule against plain(...).

    Both see the same rounded inputs; `fixed` tensors are not differentiated. Gradients flow back from a random
    weighting of the outputs, or, with expanded_grad, from a stride-0 one.
    """
    runs = []
    for function, dtype in ((ours, None), (plain, None), (plain, torch.float64)):
        given = [t.detach().to(dtype or t.dtype).requires_grad_() for t in inputs]
        if dtype is None:  # .to() with the same dtype keeps the strides: the layouts under test
            assert all(a.stride() == b.stride() for a, b in zip(given, inputs, strict=True))
        outputs = function(*given, *[t.to(dtype or t.dtype) for t in fixed])
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        weights = []
        for i, out in enumerate(outputs):
            weight = random_tensor(out.shape, torch.float32, 77 + i).to(torch.bfloat16)
            if expanded_grad:
                weight = weight.flatten()[:1].reshape([1] * out.dim()).expand(out.shape) if out.numel() else weight
            weights.append(weight.to(out.dtype))
        grads = torch.autograd.grad(outputs, given, weights, allow_unused=True)
        runs.append((outputs, grads))
    (ours_out, ours_grads), (plain_out, plain_grads), (exact_out, exact_grads) = runs
    for i, (o, p, e) in enumerate(zip(ours_out, plain_out, exact_out, strict=True)):
        assert_twice(o.detach(), p.detach(), e.detach(), f"output {i}")
    for i, (o, p, e, x) in enumerate(zip(ours_grads, plain_grads, exact_grads, inputs, strict=True)):
        if e is None or (o is None and not e.any()):
            assert o is None or not o.any(), f"gradient {i}: expected none"
            continue
        assert o is not None, f"gradient {i} is missing"
        assert o.dtype == x.dtype
        assert_twice(o, torch.zeros_like(e) if p is None else p, e, f"gradient {i}", grad_roundings)


# --- formulas ---------------------------------------------------------------------------------------------------------


def add_noise(x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    return column(alpha, x0) * x0 + column(sigma, x0) * noise.to(x0.dtype)


def prediction_of(x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor, prediction_type: str) -> Tensor:
    """What a perfect network would say."""
    a, s = column(alpha, x0), column(sigma, x0)
    return {"epsilon": noise, "sample": x0, "v_prediction": a * noise - s * x0, "flow": noise - x0}[prediction_type]


def predict_x0(x_t: Tensor, prediction: Tensor, alpha: Tensor, sigma: Tensor, prediction_type: str) -> Tensor:
    """x0 by solving the two linear equations x_t = alpha x0 + sigma eps, p = u eps + w x0 for x0 (Cramer's rule)."""
    a, s = column(alpha, x_t), column(sigma, x_t)
    one, zero = torch.ones_like(a), torch.zeros_like(a)
    u, w = {"epsilon": (one, zero), "sample": (zero, one), "v_prediction": (a, -s), "flow": (one, -one)}[
        prediction_type
    ]
    return (x_t * u - s * prediction) / (a * u - s * w)


def dmd_gradient(x, x_t, fake, teacher, uncond, weight, alpha, sigma, prediction_type, guidance, eps) -> Tensor:
    """The DMD gradient, from DMD2's statement of it: (p_real - p_fake) / mean|p_real|, p = x - x0(prediction)."""
    guided = teacher if uncond is None else guidance * teacher + (1 - guidance) * uncond
    real = x - predict_x0(x_t, guided, alpha, sigma, prediction_type)
    fake = x - predict_x0(x_t, fake, alpha, sigma, prediction_type)
    grad = torch.stack([(r - f) / (r.abs().mean() + eps) for r, f in zip(real, fake, strict=True)])
    return grad if weight is None else grad * column(weight, x)


def dmd_loss(x, *others) -> Tensor:
    """0.5 mse(x, stopgrad(x - grad)): the original's way of having that gradient."""
    grad = dmd_gradient(x.detach(), *others)
    return 0.5 * F.mse_loss(x, (x - grad).detach())


def denoising_loss(prediction, x0, noise, weight, alpha, sigma, prediction_type: str) -> Tensor:
    error = prediction - prediction_of(x0, noise, alpha, sigma, prediction_type)
    return (error**2 if weight is None else column(weight, error) * error**2).mean()


def gan_generator_loss(logits: Tensor) -> Tensor:
    """-log of the discriminator's probability that fakes are real."""
    return -F.logsigmoid(logits).mean()


def gan_discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    return -F.logsigmoid(real).mean() - F.logsigmoid(-fake).mean()


def gan_head_loss(features, norm_weight, norm_bias, proj_weight, proj_bias, num_groups: int, sign: int):
    logits = F.linear(F.silu(F.group_norm(features, num_groups, norm_weight, norm_bias)), proj_weight, proj_bias)
    return -F.logsigmoid(-sign * logits).mean(), logits


def r1_perturb(x_t: Tensor, noise: Tensor, std: Tensor) -> Tensor:
    return torch.cat([x_t, x_t + column(std, x_t) * noise.to(x_t.dtype)])


def r1_penalty(logits: Tensor, perturbed: Tensor, std: Tensor) -> Tensor:
    return (((perturbed - logits) / column(std, logits)) ** 2).mean()


def group_norm_silu(x: Tensor, weight: Tensor, bias: Tensor, num_groups: int) -> Tensor:
    return F.silu(F.group_norm(x, num_groups, weight, bias))
