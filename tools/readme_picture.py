"""docs/images/digits.png, after `make train`: `python tools/readme_picture.py runs/digits docs/images/digits.png`.

From left to right, classes 0 to 9 in the columns: the run's generator, its teacher by 18 Heun steps, held-out digits.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from dmd2_fast.data import read_all
from dmd2_fast.evaluation import sample_teacher
from dmd2_fast.export import cycling_labels, load_generator, num_classes
from dmd2_fast.networks import load_denoiser
from dmd2_fast.runs import load_run_config

ROWS, SCALE, LINE, GAP, TITLE = 5, 4, 2, 22, 24
TEACHER_EVALUATIONS = 35


def held_out(folder: str, classes: int) -> Tensor:
    """The first ROWS test images of each class, in the order of `cycling_labels`: (ROWS * classes, C, H, W)."""
    images, labels = read_all(folder, "test")
    rows = torch.stack([torch.nonzero(labels == i).flatten()[:ROWS] for i in range(classes)], dim=1)
    return images[rows.flatten()]


def panel(images: Tensor, classes: int) -> Image.Image:
    """Gray images (N, 1, H, W) in [-1, 1] as a grid of `classes` columns, enlarged with hard edges, a line apart."""
    tiles = ((images.squeeze(1).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    tiles = tiles.repeat_interleave(SCALE, 1).repeat_interleave(SCALE, 2)
    tiles = torch.nn.functional.pad(tiles, (0, LINE, 0, LINE), value=255)
    return Image.fromarray(torch.cat([torch.cat(list(row), 1) for row in tiles.split(classes)]).numpy())


def main(run: Path, out: Path) -> None:
    config = load_run_config(run)
    generator = load_generator(run / "generator.safetensors")
    teacher = load_denoiser(config.model).eval().requires_grad_(False)
    classes, steps = num_classes(teacher), len(generator.steps)
    labels = cycling_labels(ROWS * classes, classes)
    panels = {
        f"generator, {steps} evaluation{'s' if steps > 1 else ''}": generator.sample(labels, seed=0),
        f"teacher, {TEACHER_EVALUATIONS} evaluations": sample_teacher(teacher, labels, TEACHER_EVALUATIONS, heun=True),
        "handwritten, held out": held_out(config.data.path, classes),
    }
    pictures = {title: panel(images, classes) for title, images in panels.items()}
    width, height = next(iter(pictures.values())).size
    canvas = Image.new("L", (len(pictures) * (width + GAP) - GAP, height + TITLE), 255)
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(16)
    for i, (title, picture) in enumerate(pictures.items()):
        draw.text((i * (width + GAP), 0), title, fill=0, font=font)
        canvas.paste(picture, (i * (width + GAP), TITLE))
    canvas.save(out, optimize=True)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("expected two arguments: the folder of a finished run of the digits, and the PNG to write")
    main(Path(sys.argv[1]), Path(sys.argv[2]))
