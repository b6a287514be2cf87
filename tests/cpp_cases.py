"""Every operator of the C++ extension, in a process of its own whose DMD2_FAST_ISA names the instruction set.

`python cpp_cases.py FILE` compares all values and gradients with float64 by the twice-PyTorch rule, asserts the same
bits for one thread and for two, writes what it computed to FILE, and prints the instruction set's number.
"""

import sys

import oracles
import torch
from oracles import DTYPES, PREDICTION_TYPES, column, compare, random_tensor

import dmd2_fast as ours
from dmd2_fast.dispatch import missing

SHAPES = ((3, 12, 7, 3), (2, 6, 1, 1), (2, 24, 33, 31))
"""Less than a vector, no whole number of them, one position alone, and several tiles of 4,096 for two threads."""
KEY = ours.NoiseKey(2**63 + 5, 3, 4)


def image_cases(shape, dtype, layout):
    """(name, our function, oracle, differentiable inputs, fixed inputs)"""
    num_samples, num_channels = shape[:2]
    x, y, z, noise = (random_tensor(shape, dtype, seed, layout) for seed in range(4))
    alpha, sigma = oracles.coefficients(num_samples)
    following = oracles.coefficients(num_samples, seed=1)
    weight, bias = random_tensor((num_channels,), dtype, 5) + 1, random_tensor((num_channels,), dtype, 6)
    yield (
        "add_noise",
        lambda x, n: ours.add_noise(x, alpha, sigma, n),
        lambda x, n: oracles.add_noise(x, n, alpha, sigma),
        [x],
        [noise],
    )
    for kind in PREDICTION_TYPES:
        settings = {"alpha": alpha, "sigma": sigma, "prediction_type": kind}
        yield (
            f"predict_x0 {kind}",
            lambda x, p, s=settings: ours.predict_x0(x, p, **s),
            lambda x, p, s=settings: oracles.predict_x0(x, p, **s),
            [x, y],
            [],
        )
        yield (
            f"renoise {kind}",
            lambda x, p, n, k=kind: ours.renoise(x, p, alpha, sigma, *following, n, prediction_type=k),
            lambda x, p, n, k=kind: oracles.add_noise(oracles.predict_x0(x, p, alpha, sigma, k), n, *following),
            [x, y],
            [noise],
        )
        yield (
            f"dmd_loss {kind}",
            lambda *t, s=settings: ours.dmd_loss(*t, guidance_scale=3.5, **s),
            lambda *t, k=kind: oracles.dmd_loss(*t, None, alpha, sigma, k, 3.5, 1e-6),
            [x],
            [y, z, noise, y],
        )
        yield (
            f"denoising_loss {kind}",
            lambda p, x, n, s=settings: ours.denoising_loss(p, x, noise=n, **s),
            (lambda p, x, n, k=kind: oracles.denoising_loss(p, x, n, None, alpha, sigma, k)),
            [x],
            [y, noise],
        )
    yield (
        "r1_perturb",
        lambda x, n: ours.r1_perturb(x, sigma, n),
        lambda x, n: oracles.r1_perturb(x, n, sigma),
        [x],
        [noise],
    )
    groups = num_channels // 3
    yield (
        "group_norm_silu",
        lambda *t: ours.group_norm_silu(*t, groups),
        lambda *t: oracles.group_norm_silu(*t, groups),
        [x, weight, bias],
        [],
    )


def logit_cases(num_samples, num_channels, dtype):
    """As image_cases."""
    sigma = oracles.coefficients(num_samples)[1]
    real, fake = (random_tensor((num_samples, 5), dtype, seed) * 3 for seed in range(2))
    yield "gan_generator_loss", ours.gan_generator_loss, oracles.gan_generator_loss, [fake], []
    yield "gan_discriminator_loss", ours.gan_discriminator_loss, oracles.gan_discriminator_loss, [real, fake], []
    yield (
        "r1_penalty",
        lambda a, b: ours.r1_penalty(a, b, sigma),
        lambda a, b: oracles.r1_penalty(a, b, sigma),
        [
            real,
            fake,
        ],
        [],
    )
    shapes = ((num_samples, num_channels), (num_channels,), (num_channels,), (1, num_channels), (1,))
    head = [random_tensor(s, dtype, i) + (i == 1) for i, s in enumerate(shapes)]
    groups = num_channels // 5
    for sign in (1, -1):
        yield (
            f"gan_head_loss {sign}",
            lambda *t, s=sign: ours.gan_head_loss(*t, groups, sign=s),
            (lambda *t, s=sign: oracles.gan_head_loss(*t, groups, s)),
            head,
            [],
        )


def cases():
    for dtype in DTYPES:
        for shape in SHAPES:
            for layout in ("contiguous", "channels_last"):
                yield from image_cases(shape, dtype, layout)
        for num_samples, num_channels in ((3, 10), (1, 40), (70, 640)):
            yield from logit_cases(num_samples, num_channels, dtype)


def values(function, inputs, fixed):
    """Outputs and gradients of one call."""
    given = [t.detach().requires_grad_() for t in inputs]
    outputs = function(*given, *fixed)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    weights = [random_tensor(o.shape, torch.float32, 9).to(o.dtype) for o in outputs]
    return [o.detach() for o in outputs] + list(torch.autograd.grad(outputs, given, weights, allow_unused=True))


def draws():
    """Keyed noise, and what is made with it: against the noise in float64."""
    ids = torch.tensor([0, 7, 2**32 - 1])
    exact = ours.philox_normal(ids, (5, 1001), KEY, torch.float64)
    normal, uniform = ours.philox_normal(ids, (5, 1001), KEY, torch.float32), ours.philox_uniform(ids, (9,), KEY)
    assert (normal.double() - exact).abs().max() < 3e-5
    x, std = random_tensor((3, 5, 1001), torch.float32, 0), torch.linspace(0.1, 1.0, 3)
    keyed = ours.r1_perturb(x, std, key=KEY, sample_ids=ids)[3:]
    assert (keyed.double() - (x.double() + column(std, exact) * exact)).abs().max() < 4e-5
    x_t, drawn = ours.add_noise(x, std, std, key=KEY, sample_ids=ids, return_noise=True)
    assert torch.equal(drawn, normal)
    assert (x_t.double() - column(std, exact) * (x.double() + exact)).abs().max() < 4e-5
    settings = {"prediction_type": "v_prediction", "key": KEY, "sample_ids": ids}
    loss = ours.denoising_loss(x, x, std, std, **settings)
    mean = (x.double() - column(std, exact) * (exact - x.double())).square().mean()
    assert abs(loss.double() - mean) < 1e-5 * mean
    return [normal, uniform, keyed, x_t, loss]


def main(path):
    assert not missing("cpp")
    results = {}
    with ours.use_backend("cpp"):
        for name, function, oracle, inputs, fixed in cases():
            label = f"{name} {inputs[0].dtype} {tuple(inputs[0].shape)} {len(results)}"
            try:
                compare(function, oracle, inputs, fixed, grad_roundings=2 if "dmd_loss" in name else 1)
            except AssertionError as error:
                raise AssertionError(f"{label}: {error}") from error
            torch.set_num_threads(1)
            results[label] = values(function, inputs, fixed)
            torch.set_num_threads(2)
            pairs = zip(results[label], values(function, inputs, fixed), strict=True)
            assert all(torch.equal(a, b) for a, b in pairs if a is not None), f"{label}: two threads, other bits"
        results["draws"] = draws()
    torch.save(results, path)
    print(torch.ops.dmd2_fast_cpp.instruction_set())


if __name__ == "__main__":
    main(sys.argv[1])
