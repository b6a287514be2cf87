"""The keyed noise: Philox's published vectors, the definition in scalar Python, and what a key promises."""

import numpy as np
import philox_oracle
import pytest
import torch

from dmd2_fast import NoiseKey, dispatch, philox_normal, philox_uniform
from dmd2_fast.random import Stream, _uniform_of, philox_rounds, philox_words

KEYS = (NoiseKey(0), NoiseKey(10, 7, Stream.DMD_NOISE), NoiseKey(2**64 - 3, 2**32 - 1, 2**32 - 2))
IDS = [0, 1, 2, 63, 2**31, 2**32 - 1]


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # kat_vectors of Random123 1.14, philox4x32 10
        ([0] * 4, [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_published_vectors(counter, key, expected):
    even = torch.tensor([counter[0], counter[2]]).view(2, 1, 1)
    odd = torch.tensor([counter[1], counter[3]]).view(2, 1, 1)
    even, odd = philox_rounds(even, odd, key[0] | key[1] << 32)
    words = [even[0], odd[0] & 0xFFFFFFFF, even[1], odd[1] & 0xFFFFFFFF]
    assert [int(word) for word in words] == expected


@pytest.mark.parametrize("key", KEYS)
def test_words_follow_the_counter_layout(key):
    words = philox_words(torch.tensor(IDS), 11, key)
    expected = [philox_oracle.words(i, 11, key.seed, key.step, key.stream).tolist() for i in IDS]
    assert words.tolist() == expected


@pytest.mark.skipif(bool(dispatch.missing("cpp")), reason="the C++ extension is not built")
@pytest.mark.parametrize("key", KEYS)
def test_words_agree_with_the_extension(key):
    seed = key.seed if key.seed < 2**63 else key.seed - 2**64
    ours = philox_words(torch.tensor(IDS), 11, key)
    assert torch.equal(ours, torch.ops.dmd2_fast_cpp.philox_words(torch.tensor(IDS), 11, seed, key.step, key.stream))


def test_uniform_rounds_once_like_the_fused_multiply_add():
    powers = 2 ** np.arange(33, dtype=np.int64)
    generator = np.random.default_rng(0)
    near = np.concatenate([powers + d for d in range(-3, 4)])
    # Values halfway between two floats decide how ties and double rounding come out.
    halfway = (generator.integers(2**23, 2**24, 50_000) * 2 + 1) << generator.integers(0, 8, 50_000)
    words = np.concatenate([near, halfway, halfway + 1, halfway - 1, generator.integers(0, 2**32, 200_000)])
    words = words[(words >= 0) & (words < 2**32)]
    # f32(w) 2^-32 + 2^-33 spans at most 34 bits, so float64 holds it exactly and the conversion is the one rounding.
    exact = words.astype(np.float32).astype(np.float64) * 2.0**-32 + 2.0**-33
    assert all(
        (e - 2.0**-33) * 2.0**32 == w for e, w in zip(exact, words.astype(np.float32).astype(float), strict=True)
    )
    ours = _uniform_of(torch.from_numpy(words))
    assert np.array_equal(ours.numpy(), exact.astype(np.float32))
    assert ours.min() == 2.0**-33
    assert ours.max() == 1.0


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 7, 64, 129])
def test_normals_against_scalar_definition(backend, key, count):
    ids = torch.tensor(IDS)
    ours = {dtype: philox_normal(ids, (count,), key, dtype).double() for dtype in (torch.float32, torch.float64)}
    for row, sample in enumerate(IDS):
        exact, radius = philox_oracle.normals(sample, count, key.seed, key.step, key.stream)
        error = np.abs(ours[torch.float32][row].cpu().numpy() - exact)
        # Triton's fast functions, which the interpreter has not, are allowed more where the radius is small.
        assert (error <= np.where(radius >= 0.1, 4e-6, 7e-4 if backend == "triton" else 3e-5)).all()
        assert np.abs(ours[torch.float64][row].cpu().numpy() - exact).max() < 1e-14


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_the_rounded_f32(backend, dtype):
    ids = torch.arange(9)
    assert torch.equal(philox_normal(ids, (3, 5), KEYS[1], dtype), philox_normal(ids, (3, 5), KEYS[1]).to(dtype))


def test_uniforms_are_u_of_the_words(backend):
    ids = torch.tensor(IDS)
    words = philox_words(ids, 6, KEYS[1]).cpu().numpy().astype(np.float32).astype(np.float64)
    expected = (words * 2.0**-32 + 2.0**-33).astype(np.float32).reshape(len(IDS), 2, 3)
    ours = philox_uniform(ids, (2, 3), KEYS[1])
    assert ours.dtype == torch.float32
    assert np.array_equal(ours.cpu().numpy(), expected)


def test_moments_and_independence():
    ids = torch.arange(4000)
    a = philox_normal(ids, (100,), NoiseKey(1, 2, 3), torch.float64)
    assert abs(a.mean()) < 5 / 400_000**0.5
    assert abs(a.var() - 1) < 5 * (2 / 400_000) ** 0.5
    assert abs((a**4).mean() - 3) < 5 * (96 / 400_000) ** 0.5
    others = [NoiseKey(2, 2, 3), NoiseKey(1, 3, 3), NoiseKey(1, 2, 4), NoiseKey(1 + 2**32, 2, 3)]
    partners = [philox_normal(ids, (100,), key, torch.float64) for key in others]
    partners += [a.roll(1, 0), a.roll(1, 1), a.roll(2, 1)]
    for b in partners:
        assert abs((a * b).mean()) < 5 / 400_000**0.5
    u = philox_uniform(ids, (100,), NoiseKey(1, 2, 3)).double()
    assert abs(u.mean() - 0.5) < 5 / (12 * 400_000) ** 0.5


def test_a_sample_depends_on_its_id_alone(backend):
    key = NoiseKey(3, 1, Stream.R1)
    whole = philox_normal(torch.arange(12), (1, 5, 3), key)
    ranks = [philox_normal(torch.arange(12)[i::4], (1, 5, 3), key) for i in range(4)]
    for i, part in enumerate(ranks):
        assert torch.equal(part, whole[i::4])
    assert torch.equal(philox_normal(torch.tensor([7, 7, 0]), (1, 5, 3), key), whole[[7, 7, 0]])
    assert torch.equal(philox_normal(torch.arange(12), (6,), key), whole.flatten(1)[:, :6])
    assert torch.equal(philox_normal(torch.arange(12), (1, 5, 3), key), whole)


@pytest.mark.parametrize(("num_samples", "shape"), [(0, (3,)), (2, (0, 3)), (0, (0,)), (5, ()), (1, (1, 1))])
def test_sizes_of_nothing_and_one(backend, num_samples, shape):
    ids = torch.arange(num_samples)
    assert philox_normal(ids, shape, NoiseKey(0)).shape == (num_samples, *shape)
    assert philox_uniform(ids, shape, NoiseKey(0)).shape == (num_samples, *shape)


def test_strided_ids(backend):
    ids = torch.arange(20)[::3]
    assert torch.equal(philox_normal(ids, (5,), NoiseKey(1)), philox_normal(ids.contiguous(), (5,), NoiseKey(1)))


def test_key_fields():
    key = NoiseKey(5).at(3).fork(Stream.ROLLOUT_STEP + 2)
    assert (key.seed, key.step, key.stream) == (5, 3, 18)
    assert key == NoiseKey(5, 3, 18)
    assert hash(key) == hash(NoiseKey(5, 3, 18))
    with pytest.raises(AttributeError):
        key.seed = 1


def test_stream_table():
    expected = {
        "DATA_ORDER": 0, "AUGMENTATION": 1, "DMD_TIME": 2, "DMD_NOISE": 3, "DENOISING_TIME": 4, "DENOISING_NOISE": 5,
        "GAN_FAKE_TIME": 6, "GAN_FAKE_NOISE": 7, "GAN_REAL_TIME": 8, "GAN_REAL_NOISE": 9, "R1": 10, "ROLLOUT_INDEX": 11,
        "GENERATOR_INPUT": 12, "PAIR_ORDER": 13, "INPUT_SOURCE": 14, "INPUT_NOISE": 15, "ROLLOUT_STEP": 16, "USER": 64,
    }  # fmt: skip
    assert {stream.name: stream.value for stream in Stream} == expected


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NoiseKey(-1), r"seed: got -1.*2\^64"),
        (lambda: NoiseKey(2**64), r"seed.*2\^64"),
        (lambda: NoiseKey(0, step=2**32), r"step.*2\^32"),
        (lambda: NoiseKey(0).fork(-2), r"stream: got -2"),
        (lambda: NoiseKey(1.5), r"seed: got 1.5"),
        (lambda: philox_normal(torch.arange(3.0), (2,), NoiseKey(0)), r"sample_ids: got torch.float32.*torch.int64"),
        (lambda: philox_normal(torch.zeros(2, 2, dtype=torch.int64), (2,), NoiseKey(0)), r"sample_ids.*\(2, 2\)"),
        (lambda: philox_normal(torch.tensor([0, -1]), (2,), NoiseKey(0)), r"sample_ids: got values from -1 to 0"),
        (lambda: philox_uniform(torch.tensor([2**32]), (2,), NoiseKey(0)), r"sample_ids.*2\^32"),
        (lambda: philox_normal(torch.arange(3), (2,), 5), r"key: got int"),
        (lambda: philox_normal(torch.arange(3), (2,), NoiseKey(0), torch.int32), r"dtype: got torch.int32"),
        (lambda: philox_normal(torch.arange(3), (-2,), NoiseKey(0)), r"sample_shape"),
        (lambda: philox_normal([0, 1], (2,), NoiseKey(0)), r"sample_ids: got list"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
