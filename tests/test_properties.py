"""Every operator on shapes, strides and dtypes that hypothesis thinks of, against the float64 oracles.

How exact a result can be depends on the case: the smallest samples may cancel to nothing. So the yardstick is the
oracle's own answer to inputs that are off by two f32 roundings each: a result must lie within a few times that, and one
rounding to its dtype. Examples are derandomised: the same on every run.
"""

from collections.abc import Callable, Sequence
from typing import Any

import oracles
import philox_oracle
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from oracles import DTYPES, PREDICTION_TYPES, assert_rounded, coefficients, column, random_tensor
from torch import Tensor

import dmd2_fast
from dmd2_fast import NoiseKey

Draw = Callable[..., Any]
F32 = 2.0**-23
NUM_PERTURBED = 3


@st.composite
def shapes(draw: Draw, min_size: int = 0) -> tuple[int, ...]:
    """(N, *), up to five dimensions, some of them 1, now and then one of them 0."""
    return tuple(draw(st.lists(st.integers(min_size, 5), min_size=1, max_size=4)))


@st.composite
def tensors(draw: Draw, shape: Sequence[int], dtypes: Sequence[torch.dtype] = DTYPES) -> Tensor:
    """Standard normals whose dimensions lie in memory in any order, dense, with gaps, or with one of them expanded."""
    values = random_tensor(shape, torch.float64, draw(st.integers(0, 99))).to(draw(st.sampled_from(dtypes)))
    kind = draw(st.sampled_from(["dense", "gaps", "expanded"]))
    order = draw(st.permutations(range(len(shape))))
    permuted = values.permute(order).contiguous()
    if kind == "gaps":
        last = permuted.shape[-1]
        padded = torch.full((*permuted.shape[:-1], 2 * last + 1), torch.nan, dtype=values.dtype)
        padded[..., 1::2] = permuted
        permuted = padded[..., 1::2]
    elif kind == "expanded":
        permuted = permuted[..., :1].expand(permuted.shape)
    return permuted.permute([order.index(i) for i in range(len(shape))])


def perturbed(values: Tensor, seed: int) -> Tensor:
    """Each value off by two f32 roundings, up or down."""
    return values * (1 + F32 * random_tensor(values.shape, torch.float64, seed).sign())


def run(function: Callable[..., Any], inputs: Sequence[Tensor], fixed: Sequence[Tensor]) -> tuple[list, list]:
    """Outputs, and gradients of a random weighting of them (zeros where there is none)."""
    given = [t.detach().requires_grad_() for t in inputs]
    outputs = function(*given, *fixed)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    weights = [random_tensor(out.shape, torch.bfloat16, 70 + i).to(out.dtype) for i, out in enumerate(outputs)]
    grads = torch.autograd.grad(outputs, given, weights, allow_unused=True)
    return [out.detach() for out in outputs], [
        torch.zeros_like(t) if g is None else g for g, t in zip(grads, given, strict=True)
    ]


def check(
    ours: Callable[..., Any],
    plain: Callable[..., Any],
    inputs: Sequence[Tensor],
    fixed: Sequence[Tensor] = (),
    output_slack: Tensor | float = 0.0,
    grad_slack: float = 0.0,
    num_roundings: int = 1,
) -> None:
    """Outputs and gradients in `inputs` of ours(*inputs, *fixed) against plain of the same in f64.

    The slacks are what a result may be off besides: by the noise's tolerance, or what a kept tensor's rounding gives.
    """
    results = run(ours, inputs, fixed)
    for grad, x in zip(results[1], inputs, strict=True):
        assert (grad.shape, grad.dtype) == (x.shape, x.dtype)
    if inputs[0].numel() == 0:
        assert all(out.isnan() if out.dim() == 0 else out.numel() == 0 for out in results[0])
        return
    wide = [[t.double() for t in group] for group in (inputs, fixed)]
    exact = run(plain, *wide)
    others = [
        run(plain, *[[perturbed(t, 10 * i + j) for j, t in enumerate(group)] for group in wide])
        for i in range(NUM_PERTURBED)
    ]
    for part, slack in ((0, output_slack), (1, grad_slack)):
        for i, (result, value) in enumerate(zip(results[part], exact[part], strict=True)):
            assert result.shape == value.shape
            spread = max((other[part][i] - value).abs().max() for other in others)
            again = (num_roundings - 1) * part * torch.finfo(result.dtype).eps * value.abs()
            assert_rounded(result, value, slack + again + 8 * spread + F32 * value.abs())


def keyed(draw: Draw, shape: Sequence[int]) -> tuple[dict[str, Any], Tensor, Tensor]:
    """(key and sample_ids, the noise they stand for, the error that is allowed it)."""
    key = NoiseKey(draw(st.integers(0, 2**64 - 1)), draw(st.integers(0, 2**32 - 1)), draw(st.integers(0, 2**32 - 1)))
    ids = draw(st.lists(st.integers(0, 2**32 - 1), min_size=shape[0], max_size=shape[0]))
    empty = torch.zeros(tuple(shape), dtype=torch.float64)
    noise = tolerance = empty
    if empty.numel():
        noise, tolerance = philox_oracle.noise(ids, shape[1:], (key.seed, key.step, key.stream), 7e-4)
    return {"key": key, "sample_ids": torch.tensor(ids, dtype=torch.int64)}, noise, tolerance


def draw_noise(draw: Draw, shape: Sequence[int]) -> tuple[dict[str, Any], Tensor, Tensor]:
    """As keyed, or noise as a tensor, which needs no tolerance."""
    if draw(st.booleans()):
        return keyed(draw, shape)
    noise = draw(tensors(shape))
    return {"noise": noise}, noise, torch.zeros(tuple(shape), dtype=torch.float64)


# --- one function an operator -----------------------------------------------------------------------------------------


def philox(draw: Draw) -> None:
    shape = draw(shapes(1))
    source, noise, tolerance = keyed(draw, shape)
    dtype = draw(st.sampled_from(DTYPES))
    assert_rounded(dmd2_fast.philox_normal(source["sample_ids"], shape[1:], source["key"], dtype), noise, tolerance)


def add_noise(draw: Draw) -> None:
    shape = draw(shapes())
    alpha, sigma = coefficients(shape[0], draw(st.integers(0, 9)))
    x0 = draw(tensors(shape))
    source, noise, tolerance = draw_noise(draw, shape)
    x_t = dmd2_fast.add_noise(x0, alpha, sigma, **source)
    assert (x_t.stride(), x_t.dtype) == (torch.empty_like(x0).stride(), x0.dtype)
    check(
        lambda x0, _, alpha, sigma: dmd2_fast.add_noise(x0, alpha, sigma, **source),
        oracles.add_noise,
        [x0],
        [noise, alpha, sigma],
        output_slack=column(sigma, x0.double()) * tolerance,
    )


def predict_x0(draw: Draw) -> None:
    shape = draw(shapes())
    kind = draw(st.sampled_from(PREDICTION_TYPES))
    x_t, prediction = draw(tensors(shape)), draw(tensors(shape))
    both = coefficients(shape[0], draw(st.integers(0, 9)))
    x0 = dmd2_fast.predict_x0(x_t, prediction, *both, prediction_type=kind)
    assert (x0.stride(), x0.dtype) == (torch.empty_like(x_t).stride(), x_t.dtype)
    check(
        lambda *t: dmd2_fast.predict_x0(*t, prediction_type=kind),
        lambda *t: oracles.predict_x0(*t, kind),
        [x_t, prediction],
        both,
    )


def renoise(draw: Draw) -> None:
    shape = draw(shapes())
    kind = draw(st.sampled_from(PREDICTION_TYPES))
    four = (*coefficients(shape[0], draw(st.integers(0, 9))), *coefficients(shape[0], draw(st.integers(10, 19))))
    source, noise, tolerance = draw_noise(draw, shape)
    check(
        lambda x_t, p, _, *four: dmd2_fast.renoise(x_t, p, *four, **source, prediction_type=kind),
        lambda x_t, p, noise, a, s, *following: oracles.add_noise(
            oracles.predict_x0(x_t, p, a, s, kind), noise, *following
        ),
        [draw(tensors(shape)), draw(tensors(shape))],
        [noise, *four],
        output_slack=column(four[3], noise.double()) * tolerance,
    )


def dmd_loss(draw: Draw) -> None:
    shape = draw(shapes())
    kind = draw(st.sampled_from(PREDICTION_TYPES))
    coefficient = (*coefficients(shape[0], draw(st.integers(0, 9))), torch.linspace(0.5, 2.0, shape[0]))
    guidance = draw(st.sampled_from([1.0, 3.5]))
    images = [draw(tensors(shape)) for _ in range(4 if guidance == 1.0 else 5)]

    def ours(*t: Tensor) -> Tensor:
        *images, alpha, sigma, weight = t
        settings = {"prediction_type": kind, "guidance_scale": guidance, "eps": 0.01}
        return dmd2_fast.dmd_loss(*images, alpha=alpha, sigma=sigma, sample_weight=weight, **settings)

    def plain(*t: Tensor) -> Tensor:
        *images, alpha, sigma, weight = t
        uncond = images[4] if guidance != 1.0 else None
        return oracles.dmd_loss(*images[:4], uncond, weight, alpha, sigma, kind, guidance, 0.01)

    # The kept difference may be a subnormal, whose rounding is an absolute error; this bounds what it is scaled by.
    scale = 2.0 / 0.01 / max(images[0].numel(), 1)
    check(
        ours,
        plain,
        images[:1],
        [*images[1:], *coefficient],
        grad_slack=scale * 2.0**-25 if images[0].dtype == torch.float16 else 0.0,
        num_roundings=2,
    )


def denoising_loss(draw: Draw) -> None:
    shape = draw(shapes())
    kind = draw(st.sampled_from(PREDICTION_TYPES))
    coefficient = (*coefficients(shape[0], draw(st.integers(0, 9))), torch.linspace(0.5, 2.0, shape[0]))
    source, noise, each = draw_noise(draw, shape)
    tolerance = each.max() if each.numel() else 0.0
    # A residual is at most about 10 here, a weight 2, alpha 1.3.
    check(
        lambda p, x0, _, alpha, sigma, weight: dmd2_fast.denoising_loss(
            p, x0, alpha, sigma, **source, prediction_type=kind, sample_weight=weight
        ),
        lambda p, x0, noise, alpha, sigma, weight: oracles.denoising_loss(p, x0, noise, weight, alpha, sigma, kind),
        [draw(tensors(shape))],
        [draw(tensors(shape)), noise, *coefficient],
        output_slack=2 * 10 * 2 * 1.3 * tolerance,
        grad_slack=float(2 * 2 * 1.3 * tolerance / max(noise.numel(), 1)),
    )


def r1_perturb(draw: Draw) -> None:
    shape = draw(shapes())
    std = torch.linspace(0.1, 1.0, shape[0])
    source, noise, tolerance = draw_noise(draw, shape)
    x_t = draw(tensors(shape))
    out = dmd2_fast.r1_perturb(x_t, std, **source)
    assert out.is_contiguous()
    assert torch.equal(out[: shape[0]], x_t)
    check(
        lambda x_t, _, std: dmd2_fast.r1_perturb(x_t, std, **source),
        oracles.r1_perturb,
        [x_t],
        [noise, std],
        output_slack=torch.cat([tolerance, tolerance]),
    )


def r1_penalty(draw: Draw) -> None:
    shape = draw(shapes())
    std = torch.linspace(0.1, 1.0, shape[0])
    check(dmd2_fast.r1_penalty, oracles.r1_penalty, [draw(tensors(shape)), draw(tensors(shape))], [std])


def gan_losses(draw: Draw) -> None:
    real, fake = draw(tensors(draw(shapes(1)))), draw(tensors(draw(shapes(1))))
    check(dmd2_fast.gan_generator_loss, oracles.gan_generator_loss, [fake])
    check(dmd2_fast.gan_discriminator_loss, oracles.gan_discriminator_loss, [real, fake])


def norm_slack(x: Tensor, weight: Tensor, num_groups: int) -> float:
    """What a GroupNorm's gradient is the small difference of, 1e-6 of it: with two values a group it is almost 0."""
    groups = x.double().reshape(x.shape[0], num_groups, -1)
    rstd = (groups.var(2, correction=0) + 1e-5).rsqrt().max()
    return 1e-6 * float(rstd * weight.double().abs().max()) * 4


def gan_head_loss(draw: Draw) -> None:
    num_groups = draw(st.integers(1, 3))
    num_samples, num_channels = draw(st.integers(1, 4)), num_groups * draw(st.integers(2, 6))
    sign = draw(st.sampled_from([1, -1]))
    features, *parameters = [
        draw(tensors(shape))
        for shape in (
            (num_samples, num_channels),
            (num_channels,),
            (num_channels,),
            (1, num_channels),
            (1,),
        )
    ]
    check(
        lambda *t: dmd2_fast.gan_head_loss(*t, num_groups, sign=sign),
        lambda *t: oracles.gan_head_loss(*t, num_groups, sign),
        [features, *parameters],
        grad_slack=norm_slack(features, parameters[0], num_groups) * float(parameters[2].abs().max()),
    )


def group_norm_silu(draw: Draw) -> None:
    num_groups = draw(st.integers(1, 3))
    shape = (draw(st.integers(1, 3)), num_groups * draw(st.integers(2, 4)), *draw(shapes(1))[1:])
    x, weight, bias = (draw(tensors(s)) for s in (shape, shape[1:2], shape[1:2]))
    y = dmd2_fast.group_norm_silu(x, weight, bias, num_groups)
    assert (y.stride(), y.dtype) == (torch.empty_like(x).stride(), x.dtype)
    check(
        lambda *t: dmd2_fast.group_norm_silu(*t, num_groups),
        lambda *t: oracles.group_norm_silu(*t, num_groups),
        [x, weight, bias],
        grad_slack=norm_slack(x, weight, num_groups),
    )


OPERATORS = [
    philox, add_noise, predict_x0, renoise, dmd_loss, denoising_loss, r1_perturb, r1_penalty, gan_losses,
    gan_head_loss, group_norm_silu,
]  # fmt: skip


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.__name__)
@settings(
    max_examples=15,
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],  # shrinking takes minutes: examples are small as they come
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_operator(backend, operator, data):
    operator(data.draw)
