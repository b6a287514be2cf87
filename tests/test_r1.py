"""r1_perturb on every backend there is, and r1_penalty, against float64."""

import oracles
import philox_oracle
import pytest
import torch
from oracles import DTYPES, LAYOUTS, SHAPES, assert_rounded, compare, random_tensor

from dmd2_fast import NoiseKey, r1_penalty, r1_perturb

KEY = NoiseKey(3, 2, 10)


def stds(num_samples):
    return torch.linspace(0.05, 0.3, num_samples)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_perturb(backend, shape, layout, dtype):
    std = stds(shape[0])
    x_t, noise = (random_tensor(shape, dtype, seed, layout) for seed in range(2))
    compare(
        lambda x_t, noise: r1_perturb(x_t, std, noise),
        lambda x_t, noise: oracles.r1_perturb(x_t, noise, std),
        [x_t],
        [noise],
    )
    out = r1_perturb(x_t, std, noise)
    assert out.is_contiguous()
    assert torch.equal(out[: shape[0]], x_t)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_perturb_with_a_key(backend, shape, dtype):
    std, ids = stds(shape[0]), torch.arange(shape[0]) * 5 + 2**31
    x_t = random_tensor(shape, dtype, 0)
    # Keyed noise enters unrounded, whatever the dtype of x_t.
    small = 7e-4 if backend == "triton" else 3e-5
    noise, tolerance = philox_oracle.noise(ids.tolist(), shape[1:], (KEY.seed, KEY.step, KEY.stream), small)
    exact = oracles.r1_perturb(x_t.double(), noise, std)
    ours = r1_perturb(x_t, std, key=KEY, sample_ids=ids)
    assert ours.dtype == dtype
    slack = 0.3 * torch.cat([0 * tolerance, tolerance]) + 2.0**-22 * exact.abs()
    assert_rounded(ours, exact, slack)
    one = r1_perturb(x_t, 0.1, key=KEY, sample_ids=ids)
    assert torch.equal(one, r1_perturb(x_t, torch.full((shape[0],), 0.1), key=KEY, sample_ids=ids))


def test_perturbation_of_a_sample_is_independent_of_the_batch(backend):
    x_t, ids = random_tensor((6, 1, 5, 3), torch.float32, 0), torch.arange(6)
    whole = r1_perturb(x_t, 0.1, key=KEY, sample_ids=ids)
    for part in (slice(0, 2), slice(1, None, 2)):
        ours = r1_perturb(x_t[part], 0.1, key=KEY, sample_ids=ids[part])
        assert torch.equal(ours, torch.cat([whole[:6][part], whole[6:][part]]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_out(backend, dtype):
    x_t, noise = (random_tensor((3, 2, 5, 3), dtype, seed) for seed in range(2))
    expected = r1_perturb(x_t, 0.2, noise)
    strided = torch.empty(6, 2, 5, 6, dtype=dtype)[..., ::2]
    assert r1_perturb(x_t, 0.2, noise, out=strided) is strided
    tolerance = 0 if backend == "reference" else torch.finfo(dtype).eps * 8
    assert torch.allclose(strided, expected, rtol=0, atol=tolerance)
    buffer = torch.zeros(6, 2, 5, 3, dtype=dtype)
    buffer[:3] = x_t
    r1_perturb(buffer[:3], 0.2, noise, out=buffer)
    assert torch.equal(buffer, strided)


def test_perturb_gradient_is_the_sum_of_the_halves(backend):
    x_t = random_tensor((3, 2, 4, 4), torch.bfloat16, 0).requires_grad_()
    weight = random_tensor((4, 2, 4, 6), torch.bfloat16, 1).permute(3, 1, 0, 2)
    (grad,) = torch.autograd.grad(r1_perturb(x_t, 0.1, key=KEY, sample_ids=torch.arange(3)), x_t, weight)
    assert torch.equal(grad, (weight[:3].double() + weight[3:].double()).bfloat16())


def test_empty_batch(backend):
    x_t = torch.zeros(0, 3, 4, 4, requires_grad=True)
    out = r1_perturb(x_t, 0.1, key=KEY, sample_ids=torch.arange(0))
    out.sum().backward()
    assert out.shape == x_t.grad.shape == (0, 3, 4, 4)
    assert r1_penalty(x_t, x_t, 0.1).isnan()


def test_non_finite_values_surface(backend):
    x_t = torch.tensor([[torch.nan, 1.0], [torch.inf, 1.0]])
    out = r1_perturb(x_t, 0.1, torch.zeros(2, 2))
    assert out.isfinite().tolist() == [[False, True]] * 4


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 1), (7, 5), (1,), (64, 1)])
def test_penalty(backend, shape, dtype):
    logits = random_tensor(shape, dtype, 0)
    perturbed = (logits + 0.1 * random_tensor(shape, dtype, 1)).to(dtype)
    std = stds(shape[0])
    for expanded in (False, True):
        if expanded and len(shape) > 1:
            logits, perturbed = logits[:, :1].expand(*shape), perturbed.t().contiguous().t()
        compare(lambda a, b: r1_penalty(a, b, std), lambda a, b: oracles.r1_penalty(a, b, std), [logits, perturbed])
    assert torch.equal(r1_penalty(logits, perturbed, 0.1), r1_penalty(logits, perturbed, torch.full(shape[:1], 0.1)))
    assert r1_penalty(logits, perturbed, 0.1).dtype == torch.float32


def test_penalty_tends_to_the_exact_one():
    """E over the noise of ((D(x + s n) - D(x)) / s)^2 -> |grad D|^2, for a curved D in two dimensions."""
    num_draws = 20_000
    point = torch.tensor([0.3, -0.7], dtype=torch.float64, requires_grad=True)

    def score(x):
        return (torch.sin(2 * x[..., 0]) + x[..., 0] * x[..., 1] ** 2)[..., None]

    (grad,) = torch.autograd.grad(score(point), point)
    exact = (grad**2).sum()
    x_t = point.detach().expand(num_draws, 2)
    errors = []
    for std in (1.0, 0.001):
        logits = score(r1_perturb(x_t, std, key=KEY, sample_ids=torch.arange(num_draws)))
        errors.append(abs(r1_penalty(*logits.chunk(2), std) / exact - 1))
    assert errors[1] < 5 * (2 / num_draws) ** 0.5  # (grad . n)^2 has relative variance 2
    assert errors[0] > 10 * errors[1]


def test_gradcheck():
    x_t = random_tensor((3, 2, 2), torch.float64, 0).requires_grad_()
    logits, perturbed = (random_tensor((3, 2), torch.float64, seed).requires_grad_() for seed in (1, 2))
    check = torch.autograd.gradcheck
    assert check(lambda x: r1_perturb(x, stds(3), key=KEY, sample_ids=torch.arange(3)), (x_t,))
    assert check(lambda a, b: r1_penalty(a, b, stds(3).double()), (logits, perturbed))


X, IDS = torch.zeros(3, 2), torch.arange(3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: r1_perturb(X, 0.1), "noise and key: got neither"),
        (lambda: r1_perturb(X, 0.1, X, key=KEY, sample_ids=IDS), "noise and key: got both"),
        (lambda: r1_perturb(X, 0.1, key=KEY, sample_ids=IDS - 2), "sample_ids: got values from -2"),
        (lambda: r1_perturb(X, 0.0, X), "std: got 0.0, expected a positive number"),
        (lambda: r1_perturb(X, float("nan"), X), "std: got nan"),
        (lambda: r1_perturb(X, "0.1", X), "std: got str"),
        (lambda: r1_perturb(X, torch.ones(2), X), r"std: got shape \(2,\), expected \(3,\)"),
        (lambda: r1_perturb(X, 0.1, X, out=torch.zeros(3, 2)), r"out: got .*\(3, 2\).*expected .*\(6, 2\)"),
        (lambda: r1_perturb(X, 0.1, X, out=torch.zeros(6, 2).half()), "out: got torch.float16"),
        (lambda: r1_perturb(X, 0.1, X, out=[]), "out: got list"),
        (lambda: r1_perturb(X.clone().requires_grad_(), 0.1, X, out=torch.zeros(6, 2)), "out: cannot be written"),
        (lambda: r1_penalty(X, X[:2], 0.1), "perturbed_logits: got shape"),
        (lambda: r1_penalty(X, X, -0.1), "std: got -0.1"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
