"""denoising_loss against float64."""

import oracles
import philox_oracle
import pytest
import torch
from oracles import DTYPES, LAYOUTS, PREDICTION_TYPES, SHAPES, assert_rounded, coefficients, compare, random_tensor

from dmd2_fast import NoiseKey, add_noise, denoising_loss

KEY = NoiseKey(3, 2, 5)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_value_and_gradient(backend, shape, layout, dtype, prediction_type):
    alpha, sigma = coefficients(shape[0])
    weight = torch.linspace(0.5, 2.0, shape[0])
    prediction, x0, noise = (random_tensor(shape, dtype, seed, layout) for seed in range(3))
    for h in (None, weight):
        compare(
            lambda p, x0, noise, h=h: denoising_loss(
                p, x0, alpha, sigma, noise, prediction_type=prediction_type, sample_weight=h
            ),
            lambda p, x0, noise, h=h: oracles.denoising_loss(p, x0, noise, h, alpha, sigma, prediction_type),
            [prediction],
            [x0, noise],
        )


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_key_draws_the_noise_that_add_noise_used(backend, prediction_type):
    alpha, sigma = coefficients(3)
    x0, ids = random_tensor((3, 2, 5, 5), torch.bfloat16, 1), torch.tensor([5, 2, 9])
    prediction = random_tensor((3, 2, 5, 5), torch.bfloat16, 2).requires_grad_()
    small = 7e-4 if backend == "triton" else 3e-5
    noise, tolerance = philox_oracle.noise(ids.tolist(), (2, 5, 5), (KEY.seed, KEY.step, KEY.stream), small)
    x_t = add_noise(x0, alpha, sigma, key=KEY, sample_ids=ids)
    assert_rounded(x_t, oracles.add_noise(x0.double(), noise, alpha, sigma), 1.2 * tolerance + 1e-5)
    loss = denoising_loss(prediction, x0, alpha, sigma, prediction_type=prediction_type, key=KEY, sample_ids=ids)
    wide = prediction.detach().double().requires_grad_()
    exact = oracles.denoising_loss(wide, x0.double(), noise, None, alpha, sigma, prediction_type)
    assert_rounded(loss.detach(), exact.detach(), 1e-5 * exact.detach())
    (grad,), (exact_grad,) = torch.autograd.grad(loss, prediction), torch.autograd.grad(exact, wide)
    assert_rounded(grad, exact_grad, (1.3 * tolerance + 1e-6) * 2 / x0.numel())


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_a_perfect_prediction_costs_nothing(prediction_type):
    alpha, sigma = coefficients(3, dtype=torch.float64)
    x0, noise = (random_tensor((3, 2, 4, 4), torch.float64, seed) for seed in range(2))
    prediction = oracles.prediction_of(x0, noise, alpha, sigma, prediction_type)
    assert denoising_loss(prediction, x0, alpha, sigma, noise, prediction_type=prediction_type) < 1e-30


def test_sample_needs_no_noise(backend):
    alpha, sigma = coefficients(2)
    p, x0 = (random_tensor((2, 1, 8, 8), torch.float32, seed) for seed in range(2))
    loss = denoising_loss(p, x0, alpha, sigma, prediction_type="sample")
    assert torch.allclose(loss, ((p - x0) ** 2).mean())


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_gradcheck(prediction_type):
    alpha, sigma = coefficients(3, dtype=torch.float64)
    p, x0 = (random_tensor((3, 2, 2, 2), torch.float64, seed) for seed in range(2))
    settings = {"prediction_type": prediction_type, "key": KEY, "sample_ids": torch.arange(3), "sample_weight": sigma}
    assert torch.autograd.gradcheck(lambda p: denoising_loss(p, x0, alpha, sigma, **settings), (p.requires_grad_(),))


def test_gradient_goes_to_the_prediction_alone(backend):
    tensors = [random_tensor((2, 1, 4, 4), torch.float32, seed).requires_grad_() for seed in range(3)]
    alpha, sigma = (c.requires_grad_() for c in coefficients(2))
    denoising_loss(tensors[0], tensors[1], alpha, sigma, tensors[2], prediction_type="v_prediction").backward()
    assert tensors[0].grad is not None
    assert all(t.grad is None for t in (*tensors[1:], alpha, sigma))


def test_f16_gradients_of_a_large_mean_do_not_underflow_with_loss_scaling(backend):
    """2 residual / numel is 3e-7 here, a subnormal with two digits in f16: the scale must enter before the rounding."""
    shape = (16, 4, 128, 8)
    p, x0 = (random_tensor(shape, torch.float16, seed) * 0.01 for seed in range(2))
    one = torch.ones(16)
    p.requires_grad_()
    loss = denoising_loss(p, x0, one, one, prediction_type="sample")
    (grad,) = torch.autograd.grad(loss * 2.0**14, p)
    exact = 2.0**14 * 2.0 * (p.detach().double() - x0.double()) / p.numel()
    assert ((grad.double() - exact).norm() / exact.norm()) < 2**-11


def test_non_finite_values_surface(backend):
    alpha, sigma = coefficients(2)
    p, x0, noise = (random_tensor((2, 1, 2, 2), torch.float32, seed) for seed in range(3))
    noise[0, 0, 0, 0] = torch.nan
    assert denoising_loss(p, x0, alpha, sigma, noise, prediction_type="epsilon").isnan()


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (3,)])
def test_empty_batches_and_bare_vectors(backend, shape):
    alpha, sigma = coefficients(shape[0])
    p, x0 = torch.ones(shape, requires_grad=True), torch.zeros(shape)
    settings = {"prediction_type": "flow", "key": KEY, "sample_ids": torch.arange(shape[0])}
    loss = denoising_loss(p, x0, alpha, sigma, **settings)
    loss.backward()
    assert loss.isnan() == (shape[0] == 0)
    assert p.grad.shape == shape


X, A, IDS = torch.zeros(3, 2, 2), torch.ones(3), torch.arange(3)
FLOW = {"prediction_type": "flow"}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: denoising_loss(X, X, A, A, **FLOW), "noise and key: got neither"),
        (lambda: denoising_loss(X, X, A, A, X, key=KEY, sample_ids=IDS, **FLOW), "noise and key: got both"),
        (lambda: denoising_loss(X, X, A, A, key=KEY, sample_ids=IDS + 2**32, **FLOW), "sample_ids: got values from"),
        (lambda: denoising_loss(X, X[:1], A, A, X, **FLOW), "x0: got shape"),
        (lambda: denoising_loss(X, X, A, A, X, prediction_type="x0"), "prediction_type: got 'x0'"),
        (lambda: denoising_loss(X, X, A, A, X, sample_weight=A[:2], **FLOW), "sample_weight: got shape"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
