"""group_norm_silu against float64: 4-D, channels_last, bf16 and large means first, where others have gone wrong."""

import oracles
import pytest
import torch
from oracles import DTYPES, LAYOUTS, compare, random_tensor

from dmd2_fast import group_norm_silu

SHAPES = (((3, 12, 7, 3), 3), ((5, 6, 1, 1), 2), ((1, 16, 4, 4), 8), ((2, 10, 5, 9), 1))


def inputs_of(shape, dtype, layout="contiguous", mean=0.0):
    x = random_tensor(shape, dtype, 0, layout)
    x = (x + mean) if mean else x
    return [x, random_tensor(shape[1:2], dtype, 1) + 1, random_tensor(shape[1:2], dtype, 2)]


def check(inputs, num_groups, expanded_grad=False):
    compare(
        lambda *tensors: group_norm_silu(*tensors, num_groups),
        lambda *tensors: oracles.group_norm_silu(*tensors, num_groups),
        inputs,
        expanded_grad=expanded_grad,
    )


def cut_into_tiles(monkeypatch):
    """Triton's way with large groups, for all, with tiles so small that several make up a group."""
    from dmd2_fast.kernels import _norm_tiles, norm

    monkeypatch.setattr(norm, "_LARGEST_GROUP", 0)
    monkeypatch.setattr(norm, "_LARGEST_GROUP_CHANNELS_LAST", 0)
    monkeypatch.setattr(_norm_tiles, "_CONTIGUOUS", (2, 128))
    monkeypatch.setattr(_norm_tiles, "_CHANNELS_LAST", (4, 64))
    monkeypatch.setattr(_norm_tiles, "_PARTS", 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("shape", "num_groups"), SHAPES)
def test_values_and_gradients(backend, shape, num_groups, layout, dtype):
    inputs = inputs_of(shape, dtype, layout)
    check(inputs, num_groups)
    if dtype == torch.bfloat16:
        check(inputs, num_groups, expanded_grad=True)
    assert group_norm_silu(*inputs, num_groups).stride() == torch.empty_like(inputs[0]).stride()


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(("shape", "num_groups"), [((2, 6, 19, 13), 2), ((1, 16, 8, 16), 4)])
def test_groups_cut_into_tiles(backend, monkeypatch, shape, num_groups, layout, dtype):
    cut_into_tiles(monkeypatch)
    check(inputs_of(shape, dtype, layout), num_groups)


@pytest.mark.parametrize("shape", [(3, 12), (3, 12, 5), (2, 12, 3, 2, 4)])
def test_other_ranks(backend, shape):
    check(inputs_of(shape, torch.float32), 4)


@pytest.mark.parametrize("mean", [1e2, 1e4])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_large_mean(backend, layout, mean):
    """E[x^2] - E[x]^2 keeps no digit of the variance at a mean of 1e4 in f32."""
    inputs = inputs_of((2, 12, 5, 5), torch.float32, layout, mean)
    ours = group_norm_silu(*inputs, 3)
    exact = oracles.group_norm_silu(*[t.double() for t in inputs], 3)
    assert (ours.double() - exact).abs().max() < 1e-6 * mean  # a rounding of the mean, and no more


def test_f32_parameters_beside_bf16_images(backend):
    x, weight, bias = inputs_of((2, 12, 5, 5), torch.bfloat16)
    given = [t.requires_grad_() for t in (x, weight.float(), bias.float())]
    y = group_norm_silu(*given, 3)
    grads = torch.autograd.grad(y.float().square().sum(), given)
    assert y.dtype == torch.bfloat16
    assert [g.dtype for g in grads] == [torch.bfloat16, torch.float32, torch.float32]
    exact = [t.detach().double().requires_grad_() for t in given]
    expected = oracles.group_norm_silu(*exact, 3)
    exact_grads = torch.autograd.grad(expected, exact, 2 * y.detach().double())
    for ours, wanted in zip(grads, exact_grads, strict=True):
        assert (ours.double() - wanted).abs().max() < 2**-8 * wanted.abs().max()
    assert (grads[1].double() - exact_grads[1]).abs().max() < 1e-5 * exact_grads[1].abs().max()


def test_channels_last_gives_the_same_values(backend):
    x, weight, bias = inputs_of((2, 12, 5, 5), torch.float32)
    y = group_norm_silu(x.to(memory_format=torch.channels_last), weight, bias, 3)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(y, group_norm_silu(x, weight, bias, 3), atol=1e-6)


def test_gradcheck():
    inputs = [t.requires_grad_() for t in inputs_of((2, 4, 3, 2), torch.float64)]
    assert torch.autograd.gradcheck(lambda *tensors: group_norm_silu(*tensors, 2), inputs)


def test_eps_is_inside_the_root(backend):
    x = torch.tensor([[1.0, -1.0]])
    z = x / (1 + 3.0) ** 0.5
    assert torch.allclose(group_norm_silu(x, torch.ones(2), torch.zeros(2), 1, 3.0), z * torch.sigmoid(z))


@pytest.mark.parametrize("shape", [(0, 12, 5, 5), (2, 12, 0, 5)])
def test_empty(backend, shape):
    inputs = [t.requires_grad_() for t in inputs_of(shape, torch.float32)]
    y = group_norm_silu(*inputs, 3)
    y.sum().backward()
    assert y.shape == shape
    assert all(t.grad.shape == t.shape and not t.grad.any() for t in inputs)


def test_non_finite_values_surface_in_their_group_alone(backend):
    x, weight, bias = inputs_of((2, 12, 5, 5), torch.float32)
    x[0, 5, 2, 2] = torch.nan
    finite = group_norm_silu(x, weight, bias, 3).isfinite().flatten(2).all(2)
    assert finite.tolist() == [[True] * 4 + [False] * 4 + [True] * 4, [True] * 12]


def test_a_second_derivative_is_refused():
    inputs = [t.requires_grad_() for t in inputs_of((2, 4, 3, 2), torch.float32)]
    (grad,) = torch.autograd.grad(group_norm_silu(*inputs, 2).square().sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="group_norm_silu_backward is not differentiable"):
        grad.square().sum().backward()


X, W = torch.zeros(2, 6, 3, 3), torch.ones(6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: group_norm_silu(X, W, W, 4), "num_groups: got 4, expected a divisor of the 6 channels"),
        (lambda: group_norm_silu(X, W, W, 0), "num_groups: got 0"),
        (lambda: group_norm_silu(X, W[:3], W, 2), r"weight: got shape \(3,\), expected \(6,\)"),
        (lambda: group_norm_silu(X, W, W[None], 2), "bias: got shape"),
        (lambda: group_norm_silu(X[0, 0, 0], W, W, 2), "x: got shape"),
        (lambda: group_norm_silu(X, W.double(), W, 2), "weight: got torch.float64"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
