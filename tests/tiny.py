"""Small networks, data and configs that the tests of the algorithm share."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from dmd2_fast.data.batch import Batch
from dmd2_fast.data.images import encode_png
from dmd2_fast.data.shards import write_shard
from dmd2_fast.denoiser import Denoiser
from dmd2_fast.distillation import Algorithm, FakeScore, Networks
from dmd2_fast.heads import GANHeads
from dmd2_fast.networks.unet2d import UNet2D
from dmd2_fast.schedules import make_schedule

NETWORK = {
    "sample_size": 4,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [16, 16],
    "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D"],
    "num_class_embeds": 11,
    "norm_num_groups": 4,
    "add_attention": False,
}
SHAPE = (1, 8, 8)
ROOT = Path(__file__).resolve().parent.parent


def tiny_denoiser(seed: int = 0, schedule: str = "karras", prediction_type: str = "sample") -> Denoiser:
    """A class-conditional UNet for 1 x 8 x 8 images with random weights, and an output layer that is not near zero."""
    torch.manual_seed(seed)
    edm = schedule == "karras" and prediction_type == "sample"
    denoiser = Denoiser(
        UNet2D.from_config(NETWORK, patch_size=2), make_schedule(schedule), prediction_type, "edm" if edm else "none"
    )
    return denoiser.eval()


def tiny_networks(algorithm: Algorithm, schedule: str = "karras", prediction_type: str = "sample") -> Networks:
    """Generator, fake score with its head and frozen teacher, all different, as plain modules."""
    generator, fake, teacher = (tiny_denoiser(seed, schedule, prediction_type) for seed in (1, 2, 3))
    torch.manual_seed(4)
    heads = GANHeads(tuple(map(teacher.network.feature_shape, algorithm.levels))) if algorithm.adversarial else None
    return Networks(
        generator,
        FakeScore(fake if algorithm.keeps_fake_score else None, heads, algorithm.own_levels),
        teacher.requires_grad_(False),
        teacher.schedule,
        prediction_type,
        teacher.unconditional,
    )


def random_batch(num: int = 4, seed: int = 0, first_id: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return Batch(
        x0=torch.rand(num, *SHAPE, generator=generator) * 2 - 1,
        condition={"class_labels": torch.randint(0, 10, (num,), generator=generator)},
        sample_ids=torch.arange(first_id, first_id + num),
    )


def split_batch(batch: Batch, parts: int) -> list[Batch]:
    """The batch in equal parts, each sample keeping its id."""
    return [
        Batch(x0, {"class_labels": labels}, ids)
        for x0, labels, ids in zip(
            batch.x0.chunk(parts),
            batch.condition["class_labels"].chunk(parts),
            batch.sample_ids.chunk(parts),
            strict=True,
        )
    ]


def tiny_config(folder: Path, **section) -> dict:
    """ds_digits.json with the tiny network, 8 samples a step and everything under `folder`; merged with `section`."""
    config = json.loads((ROOT / "ds_digits.json").read_text())
    config["train_batch_size"] = 8
    ours = config["dmd2_fast"]
    ours["model"]["path"] = str(folder / "teacher")
    ours["data"]["path"] = str(folder / "data")
    ours["teacher"]["training"].update(network=dict(NETWORK), iterations=3, batch_size=8, sigma_data=0.75)
    ours["run"].update(
        folder=str(folder / "run"), iterations=6, log_interval=1, checkpoint_interval=1000, sample_interval=0,
        num_samples=40, progress=False,
    )  # fmt: skip
    for lr_scheduler in (ours["generator"]["lr_scheduler"], ours["fake_score"]["lr_scheduler"]):
        lr_scheduler["params"]["warmup_iterations"] = 2
    for name, values in section.items():
        _merge(ours.setdefault(name, {}), values) if isinstance(values, dict) else ours.update({name: values})
    return config


def _merge(into: dict, values: dict) -> None:
    for key, value in values.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


def write_split(folder: Path, split: str, num: int, *, side: int = 8, classes: int = 10, broken: bool = False) -> None:
    """A shard of `num` noise images, labelled in turn; `broken`: the last image is cut short."""

    def members() -> Iterator[tuple[str, bytes]]:
        for i in range(num):
            pixels = np.random.RandomState(i).randint(0, 256, (side, side), dtype=np.uint8)
            png = encode_png(pixels)
            yield f"{i:06d}.png", png[:-20] if broken and i == num - 1 else png
            yield f"{i:06d}.cls", str(i % classes).encode()

    folder.mkdir(exist_ok=True)
    write_shard(folder / f"{split}-000000.tar", members())


def on_one_core(command: list[str]) -> list[str]:
    """The command, kept to one core: two threads on busy cores wait for each other more than they work.

    Without subprocess's preexec_fn, which has all the memory of the tests' process forked.
    """
    code = (
        "import os, sys; os.sched_setaffinity(0, {max(os.sched_getaffinity(0))}); os.execvp(sys.argv[1], sys.argv[1:])"
    )
    return [sys.executable, "-c", code, *command]
