"""add_noise, predict_x0 and renoise against float64."""

import itertools

import oracles
import philox_oracle
import pytest
import torch
from oracles import (
    DTYPES,
    LAYOUTS,
    PREDICTION_TYPES,
    SHAPES,
    assert_rounded,
    coefficients,
    column,
    compare,
    random_tensor,
)

from dmd2_fast import NoiseKey, add_noise, predict_x0, renoise

KEY = NoiseKey(3, 2, 5)
F32 = 2.0**-23


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_add_noise(backend, shape, layout, dtype):
    alpha, sigma = coefficients(shape[0])
    x0, noise = random_tensor(shape, dtype, 1, layout), random_tensor(shape, dtype, 2, layout)
    for expanded_grad in (False, True):
        compare(
            lambda x0, noise: add_noise(x0, alpha, sigma, noise),
            lambda x0, noise: oracles.add_noise(x0, noise, alpha, sigma),
            [x0],
            [noise],
            expanded_grad,
        )
    assert add_noise(x0, alpha, sigma, noise).stride() == torch.empty_like(x0).stride()


def keyed(backend, ids, shape):
    """Noise of KEY and the error allowed it, f64."""
    return philox_oracle.noise(
        ids.tolist(), shape, (KEY.seed, KEY.step, KEY.stream), 7e-4 if backend == "triton" else 3e-5
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_add_noise_with_a_key_uses_unrounded_noise(backend, layout, dtype):
    alpha, sigma = coefficients(3)
    x0, ids = random_tensor((3, 5, 7, 3), dtype, 1, layout), torch.tensor([4, 0, 9])
    noise, tolerance = keyed(backend, ids, (5, 7, 3))
    exact = oracles.add_noise(x0.double(), noise, alpha, sigma)
    x_t = add_noise(x0, alpha, sigma, key=KEY, sample_ids=ids)
    slack = column(sigma, exact) * tolerance + 4 * F32 * (x0.double().abs() + noise.abs())
    assert_rounded(x_t, exact, slack)
    assert x_t.stride() == torch.empty_like(x0).stride()
    again, returned = add_noise(x0, alpha, sigma, key=KEY, sample_ids=ids, return_noise=True)
    assert torch.equal(again, x_t)
    assert_rounded(returned, noise, tolerance)
    assert returned.stride() == x_t.stride()
    assert returned.dtype == x_t.dtype == dtype


def test_add_noise_gives_back_the_noise_it_was_given(backend):
    x0, noise = random_tensor((2, 3, 4, 4), torch.bfloat16, 1), random_tensor((2, 3, 4, 4), torch.float32, 2)
    alpha, sigma = coefficients(2)
    x_t, returned = add_noise(x0, alpha, sigma, noise, return_noise=True)
    assert_rounded(x_t, oracles.add_noise(x0.double(), noise, alpha, sigma), 1e-5)
    assert torch.equal(returned, noise.bfloat16())


def test_noise_is_the_same_however_the_batch_is_split(backend):
    x0, ids = random_tensor((6, 1, 8, 8), torch.float32, 1), torch.arange(6) + 100
    alpha, sigma = coefficients(6)
    whole = add_noise(x0, alpha, sigma, key=KEY, sample_ids=ids)
    for part in (slice(0, 2), slice(2, 6), slice(1, None, 2)):
        assert torch.equal(whole[part], add_noise(x0[part], alpha[part], sigma[part], key=KEY, sample_ids=ids[part]))


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_predict_x0(backend, shape, layout, dtype, prediction_type):
    alpha, sigma = coefficients(shape[0])
    compare(
        lambda x_t, p: predict_x0(x_t, p, alpha, sigma, prediction_type=prediction_type),
        lambda x_t, p: oracles.predict_x0(x_t, p, alpha, sigma, prediction_type),
        [random_tensor(shape, dtype, 1, layout), random_tensor(shape, dtype, 2, layout)],
    )


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_predict_x0_inverts_add_noise(prediction_type):
    x0, noise = (random_tensor((4, 3, 5, 5), torch.float64, i) for i in (1, 2))
    alpha, sigma = coefficients(4, dtype=torch.float64)
    x_t = add_noise(x0, alpha, sigma, noise)
    prediction = oracles.prediction_of(x0, noise, alpha, sigma, prediction_type)
    assert torch.allclose(predict_x0(x_t, prediction, alpha, sigma, prediction_type=prediction_type), x0, atol=1e-12)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_renoise(backend, layout, dtype, prediction_type):
    shape = (3, 5, 7, 3)
    coefficient = (*coefficients(3), *coefficients(3, seed=1))
    x_t, p, noise = (random_tensor(shape, dtype, i, layout) for i in (1, 2, 3))
    compare(
        lambda x_t, p, noise: renoise(x_t, p, *coefficient, noise, prediction_type=prediction_type),
        lambda x_t, p, noise: oracles.add_noise(
            oracles.predict_x0(x_t, p, *coefficient[:2], prediction_type), noise, *coefficient[2:]
        ),
        [x_t, p],
        [noise],
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_renoise_with_a_key_and_at_the_last_step(backend, dtype):
    alpha, sigma = coefficients(3)
    next_alpha, next_sigma = coefficients(3, seed=1)
    x_t, p = (random_tensor((3, 5, 7, 3), dtype, i) for i in (1, 2))
    ids = torch.arange(3)
    ours = renoise(x_t, p, alpha, sigma, next_alpha, next_sigma, prediction_type="flow", key=KEY, sample_ids=ids)
    noise, tolerance = keyed(backend, ids, (5, 7, 3))
    x0 = oracles.predict_x0(x_t.double(), p.double(), alpha, sigma, "flow")
    exact = oracles.add_noise(x0, noise, next_alpha, next_sigma)
    terms = (x_t.double().abs() + p.double().abs()) / column(alpha + sigma, exact) + noise.abs()
    assert_rounded(ours, exact, column(next_sigma, exact) * tolerance + 8 * F32 * terms)
    zero, one = torch.zeros(3), torch.ones(3)
    last = renoise(x_t, p, alpha, sigma, one, zero, prediction_type="flow")
    assert torch.equal(last, predict_x0(x_t, p, alpha, sigma, prediction_type="flow"))


@pytest.mark.parametrize(("first", "second"), list(itertools.permutations(DTYPES, 2)))
@pytest.mark.parametrize(("layout", "other"), [("contiguous", "channels_last"), ("channels_last", "strided")])
def test_mixed_dtypes_and_layouts(backend, first, second, layout, other):
    """The output and each gradient have their own tensor's dtype and are rounded once, whatever the other's."""
    alpha, sigma = coefficients(3)
    shape = (3, 5, 7, 3)
    x, y = random_tensor(shape, first, 1, layout).requires_grad_(), random_tensor(shape, second, 2, other)
    noised = add_noise(x, alpha, sigma, y)
    x_wide, y_wide = x.detach().double(), y.double().requires_grad_()
    assert_rounded(noised.detach(), oracles.add_noise(x_wide, y_wide.detach(), alpha, sigma), 1e-5)
    y.requires_grad_()
    x_wide.requires_grad_()
    x0 = predict_x0(x, y, alpha, sigma, prediction_type="v_prediction")
    exact = oracles.predict_x0(x_wide, y_wide, alpha, sigma, "v_prediction")
    assert_rounded(x0.detach(), exact.detach(), 1e-5)
    assert x0.stride() == noised.stride() == torch.empty_like(x).stride()
    weight = random_tensor(shape, first, 3, other)
    for ours, wide, like in zip(
        torch.autograd.grad(x0, (x, y), weight),
        torch.autograd.grad(exact, (x_wide, y_wide), weight.double()),
        (x, y),
        strict=True,
    ):
        assert ours.dtype == like.dtype
        assert_rounded(ours, wide, 1e-5)


def test_gradcheck():
    alpha, sigma = coefficients(3, dtype=torch.float64)
    others = coefficients(3, seed=1, dtype=torch.float64)
    x, p = (random_tensor((3, 2, 2, 1), torch.float64, i).requires_grad_() for i in (1, 2))
    ids = torch.arange(3)
    check = torch.autograd.gradcheck
    assert check(lambda x: add_noise(x, alpha, sigma, key=KEY, sample_ids=ids), (x,))
    assert check(lambda x: add_noise(x, alpha, sigma, key=KEY, sample_ids=ids, return_noise=True)[0], (x,))
    for kind in PREDICTION_TYPES:
        assert check(lambda x, p, k=kind: predict_x0(x, p, alpha, sigma, prediction_type=k), (x, p))
        assert check(
            lambda x, p, k=kind: renoise(x, p, alpha, sigma, *others, prediction_type=k, key=KEY, sample_ids=ids),
            (x, p),
        )


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0), (4,)])
def test_empty_batches_and_bare_vectors(backend, shape):
    x = torch.ones(shape, requires_grad=True)
    alpha, sigma = coefficients(shape[0])
    ids = torch.arange(shape[0])
    x_t = add_noise(x, alpha, sigma, key=KEY, sample_ids=ids)
    x0 = predict_x0(x_t, x, alpha, sigma, prediction_type="epsilon")
    out = renoise(x_t, x, alpha, sigma, alpha, sigma, prediction_type="flow", key=KEY, sample_ids=ids)
    (x0.sum() + out.sum()).backward()
    assert x_t.shape == x0.shape == out.shape == x.grad.shape == shape


def test_non_finite_values_surface(backend):
    x = torch.tensor([[torch.nan, 1.0], [torch.inf, 1.0]])
    one = torch.ones(2)
    assert add_noise(x, one, one, torch.zeros(2, 2)).isfinite().tolist() == [[False, True], [False, True]]
    zero = torch.zeros(2)
    assert not predict_x0(torch.ones(2, 2), x, zero, one, prediction_type="epsilon").isfinite().any()


X, A, IDS = torch.zeros(3, 2, 2), torch.ones(3), torch.arange(3)
FLOW = {"prediction_type": "flow"}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: add_noise(X, A, A, X, key=KEY, sample_ids=IDS), "noise and key: got both"),
        (lambda: add_noise(X, A, A), "noise and key: got neither"),
        (lambda: add_noise(X, A, A, key=KEY), "sample_ids: got None"),
        (lambda: add_noise(X, A, A, key=KEY, sample_ids=IDS[:2]), "sample_ids: got 2 ids, expected .* 3 samples"),
        (lambda: add_noise(X, A, A, key=KEY, sample_ids=IDS - 1), "sample_ids: got values from -1"),
        (lambda: add_noise(X, A, A, key=KEY, sample_ids=IDS.int()), "sample_ids: got torch.int32"),
        (lambda: add_noise(X, A, A, key=7, sample_ids=IDS), "key: got int"),
        (lambda: add_noise(X, A, A, X[:2]), r"noise: got shape \(2, 2, 2\), expected .*\(3, 2, 2\)"),
        (lambda: add_noise(X.int(), A, A, X), "x0: got torch.int32"),
        (lambda: add_noise(torch.tensor(1.0), A, A, X), "x0: got a 0-d tensor"),
        (lambda: add_noise(X, A[:2], A, X), r"alpha: got shape \(2,\), expected \(3,\)"),
        (lambda: add_noise(X, A, A.double(), X), "sigma: got torch.float64"),
        (lambda: add_noise(X, A, 1.0, X), "sigma: got float"),
        (lambda: add_noise(X, A, A, X.double()), "noise: got torch.float64 beside torch.float32"),
        (lambda: add_noise(X, A, A, X.to("meta")), "noise: got a tensor on meta, expected cpu"),
        (lambda: predict_x0(X, X, A, A, prediction_type="eps"), "prediction_type: got 'eps', expected one of epsilon"),
        (lambda: predict_x0(X, X[:1], A, A, **FLOW), "prediction: got shape"),
        (lambda: renoise(X, X, A, A, A, A, **FLOW), "next_sigma: got values other than 0"),
        (lambda: renoise(X, X, A, A, A[:1], A, X, **FLOW), "next_alpha: got shape"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
