"""How good generated images are: Frechet distance, k-nearest-neighbour precision and recall, class accuracy.

All in float64 and all against the held-out TEST split. Features are those of a small classifier (classifier.py).
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from dmd2_fast.classifier import Classifier, load_or_train

NEIGHBOURS = 3
CHUNK_ROWS = 512  # rows of a distance matrix computed at once


def _centred(features: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Mean (D,) and R (min(N, D), D) with R^T R the unbiased covariance, both f64."""
    if features.dim() != 2 or features.shape[0] < 2:
        raise ValueError(f"{name}: got shape {tuple(features.shape)}, expected (N, D) with at least two rows")
    values = features.detach().to("cpu", torch.float64)
    if not bool(torch.isfinite(values).all()):
        raise ValueError(f"{name}: holds values that are not finite; the images they come from probably do too")
    mean = values.mean(0)
    factor = torch.linalg.qr((values - mean) / math.sqrt(len(values) - 1), mode="r").R
    return mean, factor


def frechet_distance(features_a: Tensor, features_b: Tensor) -> float:
    """Squared Frechet distance of the Gaussians fitted to two sets of features, (N, D) and (M, D), N and M >= 2.

    |mu_a - mu_b|^2 + tr(A + B - 2 (A B)^(1/2)) with unbiased covariances A, B (Heusel et al. 2017, arXiv 1706.08500).
    With A = R_a^T R_a and B = R_b^T R_b, tr (A B)^(1/2) is the sum of the singular values of R_a R_b^T. So no root of a
    matrix is taken, which fails or turns complex where covariances are singular: dead features, fewer samples than
    dimensions, collapsed generators. Raises ValueError for other shapes and for values that are not finite.
    """
    mean_a, factor_a = _centred(features_a, "features_a")
    mean_b, factor_b = _centred(features_b, "features_b")
    if mean_a.shape != mean_b.shape:
        raise ValueError(f"features_b: got {mean_b.shape[0]} columns, expected {mean_a.shape[0]} as in features_a")
    cross = torch.linalg.svdvals(factor_a @ factor_b.T).sum()
    distance = (mean_a - mean_b).square().sum() + factor_a.square().sum() + factor_b.square().sum() - 2 * cross
    return max(0.0, distance.item())


def _distances(a: Tensor, b: Tensor) -> Tensor:
    # Differences, not |a|^2 + |b|^2 - 2ab: a point's distance to itself has to be exactly 0.
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def _radii(points: Tensor, k: int) -> Tensor:
    """(N,): distance from each point to its k-th nearest other point."""
    chunks = [_distances(rows, points).kthvalue(k + 1, dim=1).values for rows in points.split(CHUNK_ROWS)]
    return torch.cat(chunks)


def _covered(points: Tensor, centres: Tensor, radii: Tensor) -> float:
    """Fraction of `points` within the radius of at least one centre."""
    inside = [(_distances(rows, centres) <= radii).any(1) for rows in points.split(CHUNK_ROWS)]
    return torch.cat(inside).double().mean().item()


def precision_recall(real_features: Tensor, fake_features: Tensor, k: int = NEIGHBOURS) -> tuple[float, float]:
    """(precision, recall) of Kynkaanniemi et al. 2019 (arXiv 1904.06991), from features (N, D) and (M, D).

    Precision: the fraction of fakes within some real sample's distance to its k-th nearest real neighbour; recall: the
    same with real and fake exchanged. ValueError unless each set has more than k rows.
    """
    for name, features in (("real_features", real_features), ("fake_features", fake_features)):
        if features.dim() != 2 or features.shape[0] <= k:
            raise ValueError(f"{name}: got shape {tuple(features.shape)}, expected (N, D) with more than k = {k} rows")
    real = real_features.detach().to("cpu", torch.float64)
    fake = fake_features.detach().to("cpu", torch.float64)
    return _covered(fake, real, _radii(real, k)), _covered(real, fake, _radii(fake, k))


def nearest_distance(images: Tensor, references: Tensor) -> float:
    """Mean over `images` (N, ...) of the L2 distance, in pixel values of [-1, 1], to the nearest of `references`."""
    points = images.detach().flatten(1).to("cpu", torch.float64)
    others = references.detach().flatten(1).to("cpu", torch.float64)
    return torch.cat([_distances(rows, others).amin(1) for rows in points.split(CHUNK_ROWS)]).mean().item()


class Reference:
    """What generated images are compared with: the two splits, the classifier and its features of the test split.

    Images are (N, C, H, W) f32 in [-1, 1], labels (N,) int64. The classifier sees the training split only; it is kept
    in `cache_folder` and trained again when that is empty, damaged, or made from other data.
    """

    def __init__(
        self,
        train_images: Tensor,
        train_labels: Tensor,
        test_images: Tensor,
        test_labels: Tensor,
        cache_folder: str | Path,
    ) -> None:
        self.classifier: Classifier = load_or_train(train_images, train_labels, cache_folder)
        self._train_images = train_images
        self._test_images = test_images
        self._test_features, predicted = self.classifier.features_and_classes(test_images)
        self.test_accuracy = (predicted == test_labels).double().mean().item()
        self.floor = self.evaluate(train_images, train_labels)
        # Training images are at distance 0 from themselves; what a sample should resemble are images never seen.
        self.floor["nearest_training"] = nearest_distance(test_images, train_images)

    def evaluate(self, images: Tensor, labels: Tensor) -> dict[str, float]:
        """Scores of generated images (N, C, H, W), clamped to [-1, 1] as they are when shown, and the labels asked for.

        fd: Frechet distance in the classifier's features.  fd_pixels: the same in pixel values.
        accuracy: fraction the classifier assigns to the class asked for.  precision, recall: k-NN, k = 3.
        nearest_training: mean distance in pixels to the nearest training image.
        """
        images = images.detach().to("cpu", torch.float32).clamp(-1.0, 1.0)
        if images.shape[1:] != self._test_images.shape[1:]:
            raise ValueError(f"images: got {tuple(images.shape)}, expected (N, *{tuple(self._test_images.shape[1:])})")
        features, predicted = self.classifier.features_and_classes(images)
        precision, recall = precision_recall(self._test_features, features)
        return {
            "fd": frechet_distance(features, self._test_features),
            "fd_pixels": frechet_distance(images.flatten(1), self._test_images.flatten(1)),
            "accuracy": (predicted == labels.to("cpu")).double().mean().item(),
            "precision": precision,
            "recall": recall,
            "nearest_training": nearest_distance(images, self._train_images),
        }
