"""The metrics against closed forms, scipy's matrix root and brute force, and what they say about known failures."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor
from torch.nn import functional

from dmd2_fast import classifier as classifier_module
from dmd2_fast.classifier import ClassifierSettings, load_or_train
from dmd2_fast.data import prepare_digits, read_all
from dmd2_fast.metrics import Reference, frechet_distance, nearest_distance, precision_recall

Split = tuple[Tensor, Tensor]


def exact_sample(num_samples: int, mean: np.ndarray, covariance: np.ndarray, seed: int = 0) -> Tensor:
    """(N, D) f64 points whose sample mean and unbiased covariance are exactly these."""
    noise = np.random.default_rng(seed).standard_normal((num_samples, len(mean)))
    noise -= noise.mean(0)
    white = noise @ np.linalg.inv(np.linalg.cholesky(np.cov(noise.T))).T
    values, vectors = np.linalg.eigh(covariance)
    return torch.from_numpy(white @ (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T + mean)


def scipy_frechet(a: np.ndarray, b: np.ndarray) -> float:
    """As it is usually written: the root of the product of the covariances."""
    cov_a, cov_b = np.cov(a.T), np.cov(b.T)
    root = scipy.linalg.sqrtm(cov_a @ cov_b).real
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a + cov_b - 2 * root))


# --- Frechet distance ------------------------------------------------------------------------------------------------


def test_frechet_distance_of_axis_aligned_gaussians() -> None:
    """Closed form: |mu_a - mu_b|^2 + sum (s_a - s_b)^2."""
    mean_a, mean_b = np.array([1.0, -2.0, 0.5]), np.array([0.0, 3.0, 0.5])
    std_a, std_b = np.array([1.0, 2.0, 0.1]), np.array([3.0, 0.5, 0.1])
    a = exact_sample(50, mean_a, np.diag(std_a**2), seed=1)
    b = exact_sample(80, mean_b, np.diag(std_b**2), seed=2)
    expected = 1 + 25 + 0 + 4 + 2.25 + 0
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-12)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-12)
    assert frechet_distance(3 * a + 7, 3 * b + 7) == pytest.approx(9 * expected, rel=1e-12)


def test_frechet_distance_in_one_dimension() -> None:
    a, b = torch.tensor([[0.0], [2.0]]), torch.tensor([[1.0], [1.0], [4.0]])  # variances 2 and 3, means 1 and 2
    assert frechet_distance(a, b) == pytest.approx(1 + (math.sqrt(2) - math.sqrt(3)) ** 2, rel=1e-12)


@pytest.mark.parametrize(("num_features", "num_a", "num_b"), [(2, 9, 300), (64, 400, 90), (64, 1437, 360)])
def test_frechet_distance_equals_scipys_matrix_root(num_features: int, num_a: int, num_b: int) -> None:
    rng = np.random.default_rng(num_a)
    a = rng.standard_normal((num_a, num_features)) @ rng.standard_normal((num_features, num_features)) + 1
    b = rng.standard_normal((num_b, num_features)) @ rng.standard_normal((num_features, num_features))
    measured = frechet_distance(torch.from_numpy(a), torch.from_numpy(b))
    assert measured == pytest.approx(scipy_frechet(a, b), rel=1e-9)


def test_frechet_distance_of_singular_covariances() -> None:
    """Projections on planes in 40 dimensions: tr (AB)^(1/2) is the sum of the cosines between the planes."""
    rng = np.random.default_rng(0)
    plane_a, _ = np.linalg.qr(rng.standard_normal((40, 3)))
    plane_b, _ = np.linalg.qr(rng.standard_normal((40, 5)))
    a = torch.from_numpy(np.asarray(exact_sample(30, np.zeros(3), np.eye(3), seed=1)) @ plane_a.T)
    b = torch.from_numpy(np.asarray(exact_sample(60, np.zeros(5), np.eye(5), seed=2)) @ plane_b.T)
    cosines = np.cos(scipy.linalg.subspace_angles(plane_a, plane_b)).sum()
    assert frechet_distance(a, b) == pytest.approx(3 + 5 - 2 * cosines, rel=1e-12)


def test_frechet_distance_of_fewer_samples_than_dimensions_and_dead_features() -> None:
    features = torch.randn(20, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    features[:, 10:30] = 0
    assert frechet_distance(features, features.flip(0)) == pytest.approx(0, abs=1e-12)
    assert frechet_distance(features, features + 2) == pytest.approx(4 * 64, rel=1e-12)
    collapsed = features[:1].expand(50, -1)
    expected = (features.mean(0) - features[0]).square().sum() + features.var(0).sum()
    assert frechet_distance(features, collapsed) == pytest.approx(expected.item(), rel=1e-12)


def test_frechet_distance_does_not_lose_digits_at_a_large_mean() -> None:
    """f32 features are taken to f64 first; their covariance at mean 1e3 would otherwise keep three digits."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(500, 8, generator=generator) + 1000, 1.5 * torch.randn(500, 8, generator=generator) + 1000
    assert frechet_distance(a, b) == pytest.approx(scipy_frechet(a.double().numpy(), b.double().numpy()), rel=1e-9)


def test_frechet_distance_refuses_what_has_no_covariance() -> None:
    good = torch.randn(5, 3)
    for bad, message in (
        (good[:1], "features_b.*at least two rows"),
        (good[0], "features_b.*at least two rows"),
        (good[:, :2], "features_b: got 2 columns, expected 3"),
        (good.clone().fill_(math.nan), "features_b.*not finite"),
        (good.clone().index_fill_(0, torch.tensor([1]), math.inf), "features_b.*not finite"),
    ):
        with pytest.raises(ValueError, match=message):
            frechet_distance(good, bad)


# --- nearest neighbours ----------------------------------------------------------------------------------------------


def brute_force_coverage(points: np.ndarray, centres: np.ndarray, k: int) -> float:
    covered = 0
    for point in points:
        for index, centre in enumerate(centres):
            others = np.delete(centres, index, axis=0)
            radius = np.sort(np.sqrt(((others - centre) ** 2).sum(1)))[k - 1]
            if np.sqrt(((point - centre) ** 2).sum()) <= radius:
                covered += 1
                break
    return covered / len(points)


@pytest.mark.parametrize(("k", "num_real", "num_fake"), [(1, 40, 30), (3, 60, 25), (2, 25, 70)])
def test_precision_and_recall_equal_brute_force(k: int, num_real: int, num_fake: int) -> None:
    rng = np.random.default_rng(k + num_real)
    real = rng.standard_normal((num_real, 4)).astype(np.float32)
    fake = (0.6 * rng.standard_normal((num_fake, 4)) + 0.5).astype(np.float32)
    precision, recall = precision_recall(torch.from_numpy(real), torch.from_numpy(fake), k)
    assert precision == pytest.approx(brute_force_coverage(fake.astype(float), real.astype(float), k), abs=1e-12)
    assert recall == pytest.approx(brute_force_coverage(real.astype(float), fake.astype(float), k), abs=1e-12)
    assert 0 < precision < 1
    assert 0 < recall < 1


def test_precision_and_recall_by_hand() -> None:
    """k = 1 on a line. Reals 0, 1, 10 have radii 1, 1, 9; fakes 2, 2.5, -6 have radii .5, .5, 8."""
    real, fake = torch.tensor([[0.0], [1.0], [10.0]]), torch.tensor([[2.0], [2.5], [-6.0]])
    # Fakes: 2 is 1 from the real 1, and 2.5 is 7.5 from 10: covered; -6 is 6 from 0: not.
    # Reals: 0 and 1 are within 8 of -6; 10 is within nothing.
    assert precision_recall(real, fake, k=1) == (pytest.approx(2 / 3), pytest.approx(2 / 3))


def test_collapse_shows_in_recall_and_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(200, 8, generator=generator)
    copies = real[:5].repeat(40, 1)
    precision, recall = precision_recall(real, copies)
    assert precision == 1
    assert recall == 5 / 200  # each has copies of itself as neighbours: a radius of exactly 0
    monkeypatch.setattr("dmd2_fast.metrics.CHUNK_ROWS", 7)
    assert precision_recall(real, copies) == (precision, recall)
    with pytest.raises(ValueError, match=r"fake_features.*more than k = 3"):
        precision_recall(real, copies[:3])


def test_nearest_distance_equals_brute_force() -> None:
    generator = torch.Generator().manual_seed(0)
    images, references = torch.randn(9, 1, 4, 4, generator=generator), torch.randn(7, 1, 4, 4, generator=generator)
    expected = np.mean([min(float((a - b).double().norm()) for b in references) for a in images])
    assert nearest_distance(images, references) == pytest.approx(expected, rel=1e-6)
    assert nearest_distance(references[:3], references) == 0


# --- the classifier and the reference --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def splits(tmp_path_factory: pytest.TempPathFactory) -> tuple[Split, Split]:
    folder = tmp_path_factory.mktemp("data") / "digits"
    prepare_digits(folder, progress=False)
    return read_all(folder, "train"), read_all(folder, "test")


@pytest.fixture(scope="module")
def reference(splits: tuple[Split, Split], tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return Reference(*splits[0], *splits[1], tmp_path_factory.mktemp("cache"))


QUICK = ClassifierSettings(epochs=1)


def state_of(model: torch.nn.Module) -> list[Tensor]:
    return [value.clone() for value in model.state_dict().values()]


def assert_equal_bits(a: torch.nn.Module, b: torch.nn.Module) -> None:
    assert all(torch.equal(left, right) for left, right in zip(state_of(a), state_of(b), strict=True))


def test_the_classifier_is_good(reference: Reference) -> None:
    assert reference.test_accuracy >= 0.97
    assert not any(parameter.requires_grad for parameter in reference.classifier.parameters())


def test_the_classifier_depends_on_data_and_settings_alone(splits: tuple[Split, Split], tmp_path: Path) -> None:
    (images, labels), _ = splits
    first = load_or_train(images, labels, tmp_path / "a", QUICK)
    torch.manual_seed(123)
    torch.set_num_threads(2)
    try:
        expected = torch.get_rng_state()
        with torch.no_grad():
            second = load_or_train(images, labels, tmp_path / "b", QUICK)
        assert torch.equal(torch.get_rng_state(), expected)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert_equal_bits(first, second)
    other = load_or_train(images, labels, tmp_path / "a", ClassifierSettings(epochs=1, seed=1))
    fewer = load_or_train(images[:-1], labels[:-1], tmp_path / "a", QUICK)
    relabelled = load_or_train(images, labels.flip(0), tmp_path / "a", QUICK)
    for model in (other, fewer, relabelled):
        assert not torch.equal(model.head.weight, first.head.weight)
    assert len(list((tmp_path / "a").iterdir())) == 4


def test_the_cache_is_used_and_a_damaged_one_is_made_again(
    splits: tuple[Split, Split], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (images, labels), _ = splits
    trained = load_or_train(images, labels, tmp_path, QUICK)
    (path,) = tmp_path.iterdir()
    content = path.read_bytes()
    calls = []
    train = classifier_module._train
    monkeypatch.setattr(classifier_module, "_train", lambda *arguments: (calls.append(1), train(*arguments)))
    assert_equal_bits(load_or_train(images, labels, tmp_path, QUICK), trained)
    assert calls == []
    flipped = bytearray(content)
    flipped[-100] ^= 1
    damaged = (b"", content[:1000], bytes(flipped), b"\xff" * 64, content.replace(b"head.bias", b"head.bios"))
    for count, wrong in enumerate(damaged, 1):
        path.write_bytes(wrong)
        assert_equal_bits(load_or_train(images, labels, tmp_path, QUICK), trained)
        assert len(calls) == count
        assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]


def test_features_have_the_stated_scale(splits: tuple[Split, Split], reference: Reference) -> None:
    features, _ = reference.classifier.features_and_classes(splits[0][0])
    assert features.shape == (1437, 64)
    assert float(features.min()) >= 0  # behind a ReLU
    pairs = torch.pdist(features.double()).square().mean() / 64
    assert pairs.item() == pytest.approx(1, rel=1e-4)


@pytest.mark.filterwarnings("ignore:Matrix is singular")  # scipy's, of pixels that are always black
def test_floor_and_scores_equal_their_definitions(splits: tuple[Split, Split], reference: Reference) -> None:
    (train, train_labels), (test, _) = splits
    model = reference.classifier
    train_features, train_classes = model.features_and_classes(train)
    test_features, _ = model.features_and_classes(test)
    precision, recall = precision_recall(test_features, train_features)
    pixels = [images.flatten(1).double().numpy() for images in (train, test)]
    assert reference.floor == {
        "fd": pytest.approx(scipy_frechet(train_features.double().numpy(), test_features.double().numpy()), abs=1e-4),
        "fd_pixels": pytest.approx(scipy_frechet(*pixels), abs=1e-4),
        "accuracy": pytest.approx((train_classes == train_labels).double().mean().item()),
        "precision": precision,
        "recall": recall,
        "nearest_training": pytest.approx(float(torch.cdist(test.flatten(1), train.flatten(1)).amin(1).mean()), 1e-5),
    }
    assert reference.evaluate(train, train_labels)["nearest_training"] == 0
    assert reference.evaluate(test, splits[1][1])["fd"] == pytest.approx(0, abs=1e-6)


def failures(train: Tensor, labels: Tensor) -> dict[str, Split]:
    """Sets of 2,000 images as failed generators would make them."""
    generator = torch.Generator().manual_seed(1)
    chosen = torch.randint(0, len(train), (2000,), generator=generator)
    images, asked = train[chosen], labels[chosen]
    means = torch.stack([train[labels == digit].mean(0) for digit in range(10)])
    kernel = torch.tensor([0.2, 0.6, 0.2])
    blurred = functional.conv2d(
        functional.pad(images, (1, 1, 1, 1), mode="replicate"), (kernel[:, None] * kernel)[None, None]
    )
    few = torch.cat([train[labels == digit][:15] for digit in range(10)])
    same_class = torch.stack([
        train[labels == digit][torch.randint(0, int((labels == digit).sum()), (1,), generator=generator)[0]]
        for digit in asked.tolist()
    ])  # fmt: skip
    return {
        "real": (images, asked),
        "blurred": (blurred, asked),
        "class means": (means[asked] + 0.05 * torch.randn(images.shape, generator=generator), asked),
        "15 images a class": (few.repeat(14, 1, 1, 1)[:2000], torch.arange(10).repeat_interleave(15).repeat(14)[:2000]),
        "mixes within a class": ((images + same_class) / 2, asked),
        "noisy": (images + 0.5 * torch.randn(images.shape, generator=generator), asked),
    }


def test_known_failures_show(splits: tuple[Split, Split], reference: Reference) -> None:
    """The failure to watch is lost diversity; accuracy does not see it."""
    scores = {name: reference.evaluate(*sample) for name, sample in failures(*splits[0]).items()}
    real = scores.pop("real")
    assert real["fd"] < 1.25 * reference.floor["fd"]
    for name, score in scores.items():
        assert score["accuracy"] > 0.8, name
        assert score["fd"] > 1.4 * reference.floor["fd"], name
        assert score["fd_pixels"] > 1.5 * real["fd_pixels"], name
    for name, factor in (("blurred", 4), ("class means", 4), ("mixes within a class", 2)):
        assert scores[name]["fd"] > factor * reference.floor["fd"], name
        assert scores[name]["fd_pixels"] > factor * real["fd_pixels"], name
    for name in ("blurred", "class means", "15 images a class"):
        assert scores[name]["recall"] < 0.1, name
    assert scores["class means"]["precision"] > 0.8  # looks perfect without recall and Frechet distance
    order = [scores[name]["nearest_training"] for name in ("15 images a class", "mixes within a class", "noisy")]
    assert order[0] == 0
    assert all(low < high for low, high in itertools.pairwise(order))


def test_evaluate_sees_the_label_asked_for_and_the_image_as_shown(
    splits: tuple[Split, Split], reference: Reference
) -> None:
    images, labels = splits[1]
    right = reference.evaluate(images, labels)
    wrong = reference.evaluate(images, (labels + 1) % 10)
    assert right["accuracy"] == pytest.approx(reference.test_accuracy)
    assert wrong["accuracy"] <= 1 - right["accuracy"]
    assert {name: right[name] for name in right if name != "accuracy"} == {
        name: wrong[name] for name in wrong if name != "accuracy"
    }
    outside = torch.where(images == -1, -5.0, images)
    assert reference.evaluate(outside, labels) == right


def test_evaluate_refuses_other_shapes_and_values_that_are_not_finite(
    splits: tuple[Split, Split], reference: Reference
) -> None:
    images, labels = splits[1]
    with pytest.raises(ValueError, match=r"images: got \(360, 1, 7, 8\)"):
        reference.evaluate(images[:, :, 1:], labels)
    broken = images.clone()
    broken[3, 0, 2, 2] = math.nan
    with pytest.raises(ValueError, match="not finite"):
        reference.evaluate(broken, labels)
