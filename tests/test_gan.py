"""The adversarial losses and the head's tail against float64."""

import math

import oracles
import pytest
import torch
from oracles import DTYPES, compare, random_tensor

from dmd2_fast import gan_discriminator_loss, gan_generator_loss, gan_head_loss

HEAD_SHAPES = ((3, 12, 3), (1, 8, 2), (5, 16, 8), (2, 30, 5))
"""(N, C, num_groups)"""


def logits_like(shape, dtype, seed, layout="contiguous"):
    if layout == "strided":
        return (random_tensor((*shape, 3), dtype, seed) * 3)[..., 1]
    if layout == "expanded":
        return (random_tensor((1, *shape[1:]), dtype, seed) * 3).expand(shape)
    return random_tensor(shape, dtype, seed) * 3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "strided", "expanded"])
@pytest.mark.parametrize("shape", [(5, 1), (7, 3), (1, 1), (64,)])
def test_losses_of_logits(backend, shape, layout, dtype):
    real, fake = (logits_like(shape, dtype, seed, layout) for seed in range(2))
    compare(gan_generator_loss, oracles.gan_generator_loss, [fake])
    compare(gan_discriminator_loss, oracles.gan_discriminator_loss, [real, fake])
    assert gan_generator_loss(fake).dtype == gan_discriminator_loss(real, fake).dtype == torch.float32


def test_real_and_fake_may_differ_in_number(backend):
    real, fake = random_tensor((3, 2), torch.float32, 0), random_tensor((8, 1), torch.float32, 1)
    compare(gan_discriminator_loss, oracles.gan_discriminator_loss, [real, fake])


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
def test_losses_of_more_programs_than_are_added_up_at_a_time(backend, monkeypatch):
    from dmd2_fast.kernels import gan

    monkeypatch.setattr(gan, "_LOGITS", 1)
    for _ in range(2):  # the second finds the counter as the first left it
        compare(gan_generator_loss, oracles.gan_generator_loss, [random_tensor((260,), torch.float32, 0)])


def test_values_at_zero_and_far_out(backend):
    zero = torch.zeros(4, 1)
    assert abs(gan_generator_loss(zero) - math.log(2)) < 1e-7
    assert abs(gan_discriminator_loss(zero, zero) - 2 * math.log(2)) < 1e-7
    far = torch.tensor([[-200.0], [200.0]], requires_grad=True)
    loss = gan_generator_loss(far)
    loss.backward()
    assert loss == 100.0
    assert far.grad.tolist() == [[-0.5], [0.0]]


def head_inputs(shape, dtype, parameter_dtype=None, seed=0):
    num_samples, num_channels, _ = shape
    parameters = parameter_dtype or dtype
    return [
        random_tensor((num_samples, num_channels), dtype, seed) * 2 + 0.5,
        random_tensor((num_channels,), parameters, seed + 1) + 1,
        random_tensor((num_channels,), parameters, seed + 2),
        random_tensor((1, num_channels), parameters, seed + 3),
        random_tensor((1,), parameters, seed + 4),
    ]


def draws_of_head_inputs(shape, dtype, num_draws=6):
    """Several draws, each tensor (draws, ...): in f32, how far off a lone scalar comes out is a matter of luck."""
    draws = [head_inputs(shape, dtype, seed=10 * i) for i in range(num_draws if dtype == torch.float32 else 1)]
    return [torch.stack(tensors) for tensors in zip(*draws, strict=True)]


def on_each(function):
    """The function on each draw, its outputs stacked."""
    return lambda *draws: tuple(map(torch.stack, zip(*map(function, *draws), strict=True)))


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "strided"])
@pytest.mark.parametrize("shape", HEAD_SHAPES)
def test_head(backend, shape, layout, dtype, sign):
    inputs = draws_of_head_inputs(shape, dtype)
    if layout == "strided":
        inputs = [torch.stack([torch.full_like(t, torch.nan), t], -1)[..., 1] for t in inputs]
    compare(
        on_each(lambda *tensors: gan_head_loss(*tensors, shape[2], sign=sign)),
        on_each(lambda *tensors: oracles.gan_head_loss(*tensors, shape[2], sign)),
        inputs,
        expanded_grad=layout == "strided",
    )


def test_head_gradients_of_one_output_alone(backend):
    for pick in (0, 1):
        compare(
            on_each(lambda *tensors, pick=pick: gan_head_loss(*tensors, 3, sign=-1)[pick : pick + 1]),
            on_each(lambda *tensors, pick=pick: oracles.gan_head_loss(*tensors, 3, -1)[pick : pick + 1]),
            draws_of_head_inputs((3, 12, 3), torch.float32),
        )


def test_head_with_f32_parameters_beside_bf16_features(backend):
    inputs = head_inputs((3, 12, 3), torch.bfloat16, torch.float32)
    given = [t.clone().requires_grad_() for t in inputs]
    loss, logits = gan_head_loss(*given, 3, sign=1)
    grads = torch.autograd.grad(loss + logits.float().sum(), given)
    exact = [t.double().requires_grad_() for t in inputs]
    exact_loss, exact_logits = oracles.gan_head_loss(*exact, 3, 1)
    exact_grads = torch.autograd.grad(exact_loss + exact_logits.sum(), exact)
    assert logits.dtype == torch.bfloat16
    assert torch.allclose(loss.double(), exact_loss, rtol=1e-6)  # from unrounded logits
    for ours, expected, given_tensor in zip(grads, exact_grads, inputs, strict=True):
        assert ours.dtype == given_tensor.dtype
        tolerance = 1e-5 if ours.dtype == torch.float32 else 2**-8
        assert (ours.double() - expected).abs().max() <= tolerance * expected.abs().max()


def test_head_takes_the_projection_of_a_linear_and_of_a_convolution(backend):
    features, weight, bias, projection, offset = head_inputs((3, 12, 3), torch.float32)
    expected = gan_head_loss(features, weight, bias, projection, offset, 3, sign=1)
    for shape in ((12,), (1, 12, 1, 1)):
        shaped = projection.reshape(shape).requires_grad_()
        loss, logits = gan_head_loss(features, weight, bias, shaped, offset, 3, sign=1)
        assert torch.equal(loss, expected[0])
        assert torch.equal(logits, expected[1])
        assert torch.autograd.grad(loss, shaped)[0].shape == shape


def test_head_keeps_f32_under_autocast(backend):
    """No matrix product inside, which autocast (and TF32 on a GPU) would round."""
    arguments = [random_tensor(shape, torch.float32, i) for i, shape in enumerate([(64, 8), (8,), (8,), (8,), (1,)])]
    expected = gan_head_loss(*arguments, 2, sign=1)
    with torch.autocast("cpu", torch.bfloat16):
        got = gan_head_loss(*arguments, 2, sign=1)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_head_loss_is_the_loss_of_its_logits(backend):
    inputs = head_inputs((6, 12, 3), torch.float32)
    loss, logits = gan_head_loss(*inputs, 3, sign=-1)
    assert logits.shape == (6, 1)
    assert torch.allclose(loss, gan_generator_loss(logits))


def test_gradcheck():
    check = torch.autograd.gradcheck
    real, fake = (random_tensor(shape, torch.float64, 1).requires_grad_() for shape in ((5, 2), (3, 1)))
    assert check(gan_generator_loss, (fake,))
    assert check(gan_discriminator_loss, (real, fake))
    inputs = [t.requires_grad_() for t in head_inputs((3, 8, 2), torch.float64)]
    for sign in (1, -1):
        assert check(lambda *tensors, sign=sign: gan_head_loss(*tensors, 2, sign=sign), inputs)


def test_empty_batches(backend):
    logits = torch.zeros(0, 1, requires_grad=True)
    loss = gan_generator_loss(logits) + gan_discriminator_loss(logits, logits)
    loss.backward()
    assert loss.isnan()
    assert logits.grad.shape == (0, 1)
    inputs = [t.requires_grad_() for t in head_inputs((0, 12, 3), torch.float32)]
    loss, logits = gan_head_loss(*inputs, 3, sign=1)
    loss.backward()
    assert logits.shape == (0, 1)
    assert all(not t.grad.any() for t in inputs)


def test_non_finite_values_surface(backend):
    assert gan_generator_loss(torch.tensor([1.0, torch.nan])).isnan()
    inputs = head_inputs((3, 12, 3), torch.float32)
    inputs[0][1, 4] = torch.inf
    loss, logits = gan_head_loss(*inputs, 3, sign=1)
    assert loss.isnan()
    assert logits.isfinite().flatten().tolist() == [True, False, True]


GOOD = head_inputs((3, 12, 3), torch.float32)


def replaced(index, tensor):
    return [*GOOD[:index], tensor, *GOOD[index + 1 :]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gan_generator_loss(torch.zeros(3, dtype=torch.int64)), "logits: got torch.int64"),
        (lambda: gan_generator_loss(0.5), "logits: got float"),
        (lambda: gan_discriminator_loss(torch.zeros(3), torch.zeros(3).double()), "fake_logits: got torch.float64"),
        (lambda: gan_head_loss(*GOOD, 3, sign=0), "sign: got 0, expected 1 or -1"),
        (lambda: gan_head_loss(*GOOD, 5, sign=1), "num_groups: got 5, expected a divisor of the 12"),
        (lambda: gan_head_loss(*replaced(0, torch.zeros(3, 12, 1)), 3, sign=1), r"features: got shape \(3, 12, 1\)"),
        (lambda: gan_head_loss(*replaced(1, torch.zeros(3)), 3, sign=1), r"norm_weight: got shape \(3,\)"),
        (lambda: gan_head_loss(*replaced(2, torch.zeros(3)), 3, sign=1), "norm_bias: got shape"),
        (lambda: gan_head_loss(*replaced(3, torch.zeros(12, 1)), 3, sign=1), r"proj_weight: got shape \(12, 1\)"),
        (lambda: gan_head_loss(*replaced(4, torch.zeros(())), 3, sign=1), r"proj_bias: got shape \(\)"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
