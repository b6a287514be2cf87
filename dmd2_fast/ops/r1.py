"""The approximate R1 penalty (Self-Forcing, arXiv 2506.08009; APT, arXiv 2501.08316, divides not): an estimate of
E|grad D(x_t)|^2 from one perturbed evaluation.

    r1_perturb   [x_t, x_t + std n], n ~ N(0, I): the batch and its perturbed copy, for one forward pass of 2N samples
    r1_penalty   mean(((D(x_t + std n) - D(x_t)) / std)^2), which tends to E|grad D|^2 as std -> 0

Shapes: x_t (N, *), std a float or (N,) f32, logits (N, *). Arithmetic is f32 (f64 for f64), rounded once at the store;
the penalty is f32 (f64 for f64). Errors: ValueError by argument.
"""

from typing import Any

import torch
from torch import Tensor

from dmd2_fast.dispatch import define
from dmd2_fast.ops._common import (
    check_batch,
    check_ids_at,
    check_like,
    check_vector,
    draw,
    noise_arguments,
    per_sample,
    store,
    working_dtype,
)
from dmd2_fast.random import NoiseKey

# --- r1_perturb -------------------------------------------------------------------------------------------------------


def _doubled(x: Tensor) -> Tensor:
    """An empty contiguous (2N, *) tensor."""
    return x.new_empty((2 * x.shape[0], *x.shape[1:]))


def r1_perturb_out_reference(
    x_t: Tensor,
    std: Tensor,
    noise: Tensor | None,
    seed: int,
    step: int,
    stream: int,
    sample_ids: Tensor | None,
    out: Tensor,
) -> None:
    """Writes the batch and its perturbed copy into out (2N, *)."""
    drawn = draw(x_t, noise, seed, step, stream, sample_ids)
    assert drawn is not None
    # The perturbed half first: x_t may lie in the other one.
    out[x_t.shape[0] :] = x_t.to(working_dtype(x_t)) + per_sample(std, x_t) * drawn
    out[: x_t.shape[0]] = x_t


def r1_perturb_reference(
    x_t: Tensor, std: Tensor, noise: Tensor | None, seed: int, step: int, stream: int, sample_ids: Tensor | None
) -> Tensor:
    """The batch and its perturbed copy, (2N, *)."""
    out = _doubled(x_t)
    r1_perturb_out_reference(x_t, std, noise, seed, step, stream, sample_ids, out)
    return out


def r1_perturb_backward_reference(grad: Tensor) -> Tensor:
    """The sum of the two halves."""
    working, num_samples = working_dtype(grad), grad.shape[0] // 2
    first, second = grad[:num_samples], grad[num_samples:]
    return store(first.to(working) + second.to(working), first)


def _setup_perturb(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.set_materialize_grads(False)


def _perturb_backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
    return None if grad is None else _r1_perturb_backward(grad), *[None] * 6


_SCHEMA = "Tensor x_t, Tensor std, Tensor? noise, SymInt seed, SymInt step, SymInt stream, Tensor? sample_ids"
_r1_perturb_backward = define(
    "r1_perturb_backward",
    "(Tensor grad) -> Tensor",
    reference=r1_perturb_backward_reference,
    fake=lambda grad: torch.empty_like(grad[: grad.shape[0] // 2]),
)
_r1_perturb = define(
    "r1_perturb",
    f"({_SCHEMA}) -> Tensor",
    reference=r1_perturb_reference,
    fake=lambda x_t, *_: _doubled(x_t),
    setup_context=_setup_perturb,
    backward=_perturb_backward,
    check=check_ids_at(6),
)
_r1_perturb_out = define(
    "r1_perturb_out",
    f"({_SCHEMA}, Tensor(a!) out) -> ()",
    reference=r1_perturb_out_reference,
    fake=lambda *_: None,
    check=check_ids_at(6),
)


def _std_vector(std: float | Tensor, first: Tensor) -> Tensor:
    """std as (N,): a float for all samples, or a tensor with one value each."""
    if isinstance(std, Tensor):
        check_vector("std", std, first)
        return std
    if not isinstance(std, (int, float)) or isinstance(std, bool):
        raise ValueError(f"std: got {type(std).__name__}, expected a float or a float32 tensor ({first.shape[0]},)")
    if not 0.0 < std < float("inf"):
        raise ValueError(f"std: got {std}, expected a positive number")
    return torch.full((first.shape[0],), float(std), dtype=working_dtype(first), device=first.device)


def r1_perturb(
    x_t: Tensor,
    std: float | Tensor,
    noise: Tensor | None = None,
    *,
    key: NoiseKey | None = None,
    sample_ids: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """The batch, then the batch + std n: (2N, *) in x_t's dtype; differentiable in x_t.

    x_t: (N, *), already noised. std: a float, or (N,) f32 for one value a sample. Either noise, of x_t's shape, or key
    with sample_ids (N,) int64. The result is contiguous. out: a (2N, *) tensor of x_t's dtype to write into and return,
    of any strides, whose first half may be x_t itself; not while gradients of x_t are recorded. Raises ValueError
    naming the argument.
    """
    check_batch("x_t", x_t)
    vector = _std_vector(std, x_t)
    arguments = noise_arguments(noise, key, sample_ids, "x_t", x_t, required=True)
    if out is None:
        return _r1_perturb(x_t, vector, *arguments)
    expected = (2 * x_t.shape[0], *x_t.shape[1:])
    if not isinstance(out, Tensor):
        raise ValueError(f"out: got {type(out).__name__}, expected a tensor {expected}")
    if (tuple(out.shape), out.dtype, out.device) != (expected, x_t.dtype, x_t.device):
        got = f"{out.dtype} {tuple(out.shape)} on {out.device}"
        raise ValueError(f"out: got {got}, expected {x_t.dtype} {expected} on {x_t.device}")
    if torch.is_grad_enabled() and (x_t.requires_grad or out.requires_grad):
        raise ValueError("out: cannot be written while gradients are recorded: leave it out, or use torch.no_grad()")
    _r1_perturb_out(x_t, vector, *arguments, out)
    return out


# --- r1_penalty -------------------------------------------------------------------------------------------------------


def _slope(logits: Tensor, perturbed_logits: Tensor, std: Tensor) -> Tensor:
    """(D(x_t + std n) - D(x_t)) / std, in the working dtype."""
    working = working_dtype(logits)
    return (perturbed_logits.to(working) - logits.to(working)) / per_sample(std, logits)


def r1_penalty_reference(logits: Tensor, perturbed_logits: Tensor, std: Tensor) -> Tensor:
    """The penalty, ()."""
    return _slope(logits, perturbed_logits, std).square().mean()


def r1_penalty_backward_reference(
    grad: Tensor, logits: Tensor, perturbed_logits: Tensor, std: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients in logits and perturbed_logits: opposite, 2 slope / (std numel) apart from the sign."""
    factor = grad * (2.0 / max(logits.numel(), 1))
    result = _slope(logits, perturbed_logits, std) / per_sample(std, logits) * factor
    return store(-result, logits), store(result, perturbed_logits)


_r1_penalty_backward = define(
    "r1_penalty_backward",
    "(Tensor grad, Tensor logits, Tensor perturbed_logits, Tensor std) -> (Tensor, Tensor)",
    reference=r1_penalty_backward_reference,
    fake=lambda grad, logits, perturbed_logits, std: (torch.empty_like(logits), torch.empty_like(perturbed_logits)),
)
_r1_penalty = define(
    "r1_penalty",
    "(Tensor logits, Tensor perturbed_logits, Tensor std) -> Tensor",
    reference=r1_penalty_reference,
    fake=lambda logits, perturbed_logits, std: logits.new_empty((), dtype=working_dtype(logits)),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
    backward=lambda ctx, grad: (*_r1_penalty_backward(grad, *ctx.saved_tensors), None),
)


def r1_penalty(logits: Tensor, perturbed_logits: Tensor, std: float | Tensor) -> Tensor:
    """mean(((perturbed_logits - logits) / std)^2), an f32 scalar (f64 for f64); differentiable in both.

    logits, perturbed_logits: (N, *), the discriminator on the two halves of r1_perturb's result, over one or more
    heads. std: what r1_perturb had, a float or (N,) f32. Raises ValueError naming the argument.
    """
    check_batch("logits", logits)
    check_like("perturbed_logits", perturbed_logits, "logits", logits)
    return _r1_penalty(logits, perturbed_logits, _std_vector(std, logits))
