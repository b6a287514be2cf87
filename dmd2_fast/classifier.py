"""The small classifier whose features the metrics compare: trained on the training split, kept as safetensors.

Two convolutions, a hidden layer of 64 (the features: its outputs after ReLU) and the class scores; a few seconds of one
core on the digits. Training images are moved by up to half a pixel and get noise: on the digits that lifts the test
accuracy from .975 to .99.

Scale: a Frechet distance has the unit of the squared features, which no loss determines (label smoothing alone changes
it sixfold). Features are multiplied by one number such that two training images differ, in the mean square, by 1 in
each feature: a total variance of D / 2. Distances of differently trained classifiers are then alike: the floor of the
digits (training against test split) is .23 to .26 over six seeds.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

logger = logging.getLogger(__name__)

NUM_FEATURES = 64
CHUNK_ROWS = 512
METADATA = "dmd2_fast.classifier"


@dataclass(frozen=True)
class ClassifierSettings:
    """How the classifier is trained. Part of the cache's key: other settings train another one."""

    seed: int = 0
    epochs: int = 15
    batch_size: int = 64
    learning_rate: float = 2e-3
    """Peak of a one-cycle schedule."""
    weight_decay: float = 1e-2
    noise: float = 0.2
    """Standard deviation of the noise added to training images."""
    shift: float = 0.5
    """Largest shift of training images in pixels, uniform, each axis on its own."""
    version: int = 1
    """Raised with every change of the architecture or of the training below."""


class Classifier(nn.Module):
    """Class scores and features of (N, C, H, W) f32 images of at least 4 x 4 pixels."""

    feature_scale: Tensor

    def __init__(self, num_channels: int, num_classes: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(num_channels, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.AdaptiveMaxPool2d(4),
            nn.Flatten(),
            nn.Linear(32 * 16, NUM_FEATURES),
            nn.ReLU(),
        )
        self.head = nn.Linear(NUM_FEATURES, num_classes)
        self.register_buffer("feature_scale", torch.ones(()))

    def forward(self, images: Tensor) -> Tensor:
        """Class scores (N, num_classes)."""
        return self.head(self.body(images))

    @torch.no_grad()
    def features_and_classes(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Scaled features (N, 64) f32 and the classes found (N,) int64, on the CPU."""
        features, classes = [], []
        for chunk in images.detach().to("cpu", torch.float32).split(CHUNK_ROWS):
            hidden = self.body(chunk)
            classes.append(self.head(hidden).argmax(1))
            features.append(hidden * self.feature_scale)
        return torch.cat(features), torch.cat(classes)


def load_or_train(
    images: Tensor, labels: Tensor, cache_folder: str | Path, settings: ClassifierSettings | None = None
) -> Classifier:
    """The classifier of these training images (N, C, H, W) f32 and labels (N,) int64.

    Read from `cache_folder` where it is there, whole, and of the same data and settings; else trained and put there.
    """
    settings = settings or ClassifierSettings()
    images = images.detach().to("cpu", torch.float32).contiguous()
    labels = labels.detach().to("cpu", torch.int64).contiguous()
    key = _key(images, labels, settings)
    path = Path(cache_folder) / f"classifier-{key[:16]}.safetensors"
    with _reproducible(settings.seed):
        model = Classifier(images.shape[1], int(labels.max()) + 1)
        if not _load(model, path, key):
            _train(model, images, labels, settings)
            try:
                _save(model, path, key)
            except (OSError, SafetensorError) as error:  # data folders are often read-only
                logger.warning("%s cannot be written (%s): the classifier is trained again next time", path, error)
    return model.eval().requires_grad_(False)


# --- cache -----------------------------------------------------------------------------------------------------------


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tuple(tensors[name].shape)} {tensors[name].dtype}\n".encode())
        digest.update(tensors[name].contiguous().numpy().tobytes())
    return digest.hexdigest()


def _key(images: Tensor, labels: Tensor, settings: ClassifierSettings) -> str:
    data = _digest({"images": images, "labels": labels})
    return hashlib.sha256(json.dumps([data, asdict(settings)]).encode()).hexdigest()


def _load(model: Classifier, path: Path, key: str) -> bool:
    """Whether `path` held the classifier of `key`, unharmed, and `model` has it now."""
    if not path.is_file():
        return False
    try:
        with safe_open(path, "pt") as file:
            written = (file.metadata() or {}).get(METADATA)
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        if written != f"{key} {_digest(state)}":
            raise ValueError("its contents are not those that were written")
        model.load_state_dict(state)
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        logger.warning("%s cannot be used (%s): training the classifier again", path, error)
        return False
    return True


def _save(model: Classifier, path: Path, key: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        save_file(state, partial, metadata={METADATA: f"{key} {_digest(state)}"})
        os.replace(partial, path)
    finally:
        with suppress(FileNotFoundError):
            partial.unlink()


# --- training --------------------------------------------------------------------------------------------------------


@contextmanager
def _reproducible(seed: int) -> Iterator[None]:
    """One thread and its own random state: the bits depend on neither of the caller's."""
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)


def _shifted(images: Tensor, largest: float) -> Tensor:
    """Each image moved by its own uniform shift of up to `largest` pixels, bilinear, the border repeated."""
    num_images, _, height, width = images.shape
    shift = (2 * torch.rand(num_images, 2) - 1) * largest
    transform = torch.eye(2, 3).repeat(num_images, 1, 1)
    transform[:, :, 2] = shift * torch.tensor([2 / width, 2 / height])  # affine_grid's images are 2 wide and 2 high
    grid = functional.affine_grid(transform, list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, padding_mode="border", align_corners=False)


def _train(model: Classifier, images: Tensor, labels: Tensor, settings: ClassifierSettings) -> None:
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True
    )
    num_steps = settings.epochs * math.ceil(len(images) / settings.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.learning_rate, num_steps)
    for _ in range(settings.epochs):
        for chosen in torch.randperm(len(images)).split(settings.batch_size):
            batch = _shifted(images[chosen], settings.shift)
            batch = batch + settings.noise * torch.randn_like(batch)
            loss = functional.cross_entropy(model(batch), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    features, classes = model.features_and_classes(images)
    total_variance = features.double().var(0).sum().item()
    if total_variance > 0:
        model.feature_scale.fill_(math.sqrt(NUM_FEATURES / (2 * total_variance)))
    accuracy = (classes == labels).double().mean().item()
    logger.info("classifier for the metrics: trained, %.2f %% of the training images right", 100 * accuracy)
