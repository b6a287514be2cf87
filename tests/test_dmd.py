"""dmd_loss against the gradient it is defined by."""

import oracles
import pytest
import torch
from oracles import DTYPES, LAYOUTS, PREDICTION_TYPES, SHAPES, coefficients, compare, random_tensor

from dmd2_fast import dmd_loss


def make(shape, dtype, layout="contiguous"):
    """x, x_t, fake, teacher, unconditional teacher; the two networks nearly agree, as in training."""
    x, x_t, fake, other, uncond = (random_tensor(shape, dtype, seed, layout) for seed in range(5))
    return x, x_t, fake, (fake + 0.1 * other).to(dtype), (fake - 0.2 * uncond).to(dtype)


def weights(num_samples):
    return torch.linspace(0.5, 2.0, num_samples)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_value_and_gradient(backend, shape, layout, dtype, prediction_type):
    alpha, sigma = coefficients(shape[0])
    x, *fixed = make(shape, dtype, layout)
    weight = weights(shape[0])
    settings = {"alpha": alpha, "sigma": sigma, "prediction_type": prediction_type}
    compare(
        lambda x, *others: dmd_loss(x, *others, guidance_scale=3.5, sample_weight=weight, **settings),
        lambda x, *others: oracles.dmd_loss(x, *others, weight, alpha, sigma, prediction_type, 3.5, 1e-6),
        [x],
        fixed,
        grad_roundings=2,
    )
    compare(
        lambda x, *others: dmd_loss(x, *others, **settings),
        lambda x, *others: oracles.dmd_loss(x, *others, None, None, alpha, sigma, prediction_type, 1.0, 1e-6),
        [x],
        fixed[:3],
        grad_roundings=2,
    )


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_gradient_is_exactly_g_over_numel(prediction_type):
    shape = (4, 3, 5, 5)
    alpha, sigma = coefficients(4, dtype=torch.float64)
    x, x_t, fake, teacher, uncond = make(shape, torch.float64)
    x.requires_grad_()
    h = weights(4).double()
    loss = dmd_loss(
        x, x_t, fake, teacher, uncond, alpha=alpha, sigma=sigma, prediction_type=prediction_type, guidance_scale=2.0,
        sample_weight=h, eps=0.25,
    )  # fmt: skip
    (3.0 * loss).backward()
    # Derived from the definition: x0 of each prediction, the guided teacher, the normaliser of each sample.
    guided = uncond + 2.0 * (teacher - uncond)
    for n in range(4):
        one = slice(n, n + 1)
        fake_x0 = oracles.predict_x0(x_t[one], fake[one], alpha[one], sigma[one], prediction_type)
        teacher_x0 = oracles.predict_x0(x_t[one], guided[one], alpha[one], sigma[one], prediction_type)
        g = h[n] * (fake_x0 - teacher_x0) / ((x[one].detach() - teacher_x0).abs().mean() + 0.25)
        assert torch.allclose(x.grad[one], 3.0 * g / x.numel(), rtol=1e-10, atol=1e-16)
    g = x.grad / 3.0 * x.numel()
    assert torch.allclose(loss, 0.5 * (g**2).mean(), rtol=1e-10)


def test_gradient_goes_to_x_alone(backend):
    tensors = [t.requires_grad_() for t in make((2, 3, 4, 4), torch.float32)]
    alpha, sigma = (c.requires_grad_() for c in coefficients(2))
    weight = weights(2).requires_grad_()
    loss = dmd_loss(
        *tensors, alpha=alpha, sigma=sigma, prediction_type="epsilon", guidance_scale=2.0, sample_weight=weight
    )
    loss.backward()
    assert tensors[0].grad is not None
    assert all(t.grad is None for t in (*tensors[1:], alpha, sigma, weight))


def test_small_differences_survive_in_bf16(backend):
    """F - T of 1 %: taken between two x0 rounded to bf16 it would be off by about half."""
    alpha, sigma = coefficients(2)
    x, x_t, fake, _, _ = make((2, 4, 16, 16), torch.bfloat16)
    teacher = (fake.float() * 1.01).bfloat16()
    x.requires_grad_()
    loss = dmd_loss(x, x_t, fake, teacher, alpha=alpha, sigma=sigma, prediction_type="v_prediction")
    (grad,) = torch.autograd.grad(loss, x)
    exact = oracles.dmd_gradient(
        *(t.detach().double() for t in (x, x_t, fake, teacher)), None, None, alpha, sigma, "v_prediction", 1.0, 1e-6
    )
    exact = exact / x.numel()
    assert ((grad.double() - exact).norm() / exact.norm()) < 2**-8


def test_no_guidance_is_guidance_of_one(backend):
    alpha, sigma = coefficients(2)
    x, x_t, fake, teacher, uncond = make((2, 3, 4, 4), torch.float32)
    settings = {"alpha": alpha, "sigma": sigma, "prediction_type": "sample"}
    assert torch.allclose(
        dmd_loss(x, x_t, fake, teacher, uncond, guidance_scale=1.0, **settings),
        dmd_loss(x, x_t, fake, teacher, **settings),
        rtol=1e-5,
    )


def test_value_stays_finite_when_the_teacher_agrees_with_x(backend):
    x = torch.zeros(2, 3, requires_grad=True)
    settings = {"alpha": torch.ones(2), "sigma": torch.ones(2), "prediction_type": "sample"}
    dmd_loss(x, x.detach(), x.detach(), x.detach(), **settings).backward()
    assert x.grad.abs().max() == 0.0


def test_non_finite_values_surface(backend):
    alpha, sigma = coefficients(2)
    x, x_t, fake, teacher, _ = make((2, 3, 4, 4), torch.float32)
    fake[1, 0, 0, 0] = torch.inf
    x.requires_grad_()
    loss = dmd_loss(x, x_t, fake, teacher, alpha=alpha, sigma=sigma, prediction_type="epsilon")
    loss.backward()
    assert not loss.isfinite()
    assert x.grad[0].isfinite().all()
    assert not x.grad[1].isfinite().all()


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (3,)])
def test_empty_batches_and_bare_vectors(backend, shape):
    alpha, sigma = coefficients(shape[0])
    x = torch.ones(shape, requires_grad=True)
    y = torch.zeros(shape)
    loss = dmd_loss(x, y, y, y + 1, alpha=alpha, sigma=sigma, prediction_type="flow")
    loss.backward()
    assert loss.shape == ()
    assert loss.isnan() == (shape[0] == 0)
    assert x.grad.shape == shape


X, A = torch.zeros(3, 2, 2), torch.ones(3)
SETTINGS = {"alpha": A, "sigma": A, "prediction_type": "flow"}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: dmd_loss(X, X[:2], X, X, **SETTINGS), "x_t: got shape"),
        (lambda: dmd_loss(X, X, X[0], X, **SETTINGS), "fake_prediction: got shape"),
        (lambda: dmd_loss(X, X, X, X.int(), **SETTINGS), "teacher_prediction: got torch.int32"),
        (lambda: dmd_loss(X, X, X, X, X[:, :1], **SETTINGS), "teacher_uncond_prediction: got shape"),
        (lambda: dmd_loss(X, X, X, X, guidance_scale=2.0, **SETTINGS), "guidance_scale: got 2.0 without"),
        (lambda: dmd_loss(X, X, X, X, **{**SETTINGS, "alpha": A[:1]}), "alpha: got shape"),
        (lambda: dmd_loss(X, X, X, X, **{**SETTINGS, "prediction_type": "v"}), "prediction_type: got 'v'"),
        (lambda: dmd_loss(X, X, X, X, sample_weight=A.bfloat16(), **SETTINGS), "sample_weight: got torch.bfloat16"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
