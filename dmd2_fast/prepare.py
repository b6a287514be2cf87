"""`dmd2-fast prepare`: images with captions, or prompts alone, to shards of latents and text embeddings.

Shard number s holds the inputs s * S ... s * S + S - 1 that can be used (S = samples per shard) and depends on nothing
else, so that a finished shard is kept and an unfinished one made again. `.prepare/` holds the settings and a record of
each finished shard until dataset.json, the last file, is there.
"""

from __future__ import annotations

import json
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from .config import Config
from .data.inputs import Input, Square, digest, list_images, list_prompts, read_square
from .data.latents import DESCRIPTION, LATENTS, UNCONDITIONAL
from .data.shards import write_shard
from .errors import DataError, UserError
from .locks import acquire
from .networks.source import PIPELINE_KINDS, open_source
from .pipeline import LatentCodec, TextEncoders, latent_shape, time_ids
from .runs import LOCK_FILE, differences, read_json, replacing, write_atomic, write_json

LEFT_OUT = "left_out.jsonl"
PROGRESS = ".prepare"
SETTINGS = "settings.json"
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
IMAGE_BATCH, PROMPT_BATCH = 4, 64
THREADS = 4

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Options:
    """How to prepare, beside what the configuration says."""

    resolution: int | None = None
    """Side of the square images in pixels; None: the model's own."""
    batch_size: int | None = None
    """Images or prompts encoded together; None: 4 images, 64 prompts. Another one changes values in the last bits."""
    samples_per_shard: int = 1000
    """Inputs of one tar file."""
    dtype: str = "float16"
    """What latents and embeddings are stored in; they are computed in f32."""
    size_condition: str = "target"
    """SDXL's time_ids: "target" (the size that samples are made in, no crop) or "image" (each image's own)."""
    device: str | None = None
    """Where the encoders run; None: the GPU where there is one."""
    progress: bool = True
    """Whether bars are shown."""


def prepare(
    config: Config,
    *,
    images: str | Path | None = None,
    prompts: str | Path | None = None,
    options: Options | None = None,
) -> tuple[int, int]:
    """Write `data.path` from a folder of images with captions, or from a file of prompts; go on where one was stopped.

    Returns (samples, inputs left out); those are listed with their reasons in left_out.jsonl. Raises UserError where
    the inputs, the model or the folder cannot be used, OSError where files cannot be written.
    """
    options = options or Options()
    _check(config, options)
    source = prompts if images is None else images
    assert source is not None
    resolution, shape = _resolution(config, options)
    inputs = list_prompts(source) if images is None else list_images(source, progress=options.progress)
    settings = {
        "model": config.model.path,
        "kind": config.model.kind,
        "inputs": {"from": "prompts" if images is None else "images", "number": len(inputs), "sha256": digest(inputs)},
        "resolution": resolution,
        "samples_per_shard": options.samples_per_shard,
        "dtype": options.dtype,
        "size_condition": options.size_condition if config.model.kind == "sdxl" and images is not None else "target",
    }
    folder = Path(config.data.path)
    existed = folder.exists()
    try:
        with acquire(folder / LOCK_FILE, str(folder)):
            if not _is_finished(folder, settings):
                _Job(config, options, folder, inputs, settings, resolution, shape).run()
            shutil.rmtree(folder / PROGRESS, ignore_errors=True)
    finally:
        if not existed:
            with suppress(OSError):
                folder.rmdir()  # where nothing came of it
    description = read_json(folder / DESCRIPTION)
    return description["num_samples"], description["num_left_out"]


def _check(config: Config, options: Options) -> None:
    if config.model.kind not in PIPELINE_KINDS or config.data.kind != "latents":
        raise UserError(
            f'model.kind is "{config.model.kind}" and data.kind "{config.data.kind}": images and prompts are prepared '
            'for "sd15" or "sdxl", with data.kind "latents"; `prepare --digits` makes a "unet2d" its labelled digits.'
        )
    if Path(config.data.path).exists() and not Path(config.data.path).is_dir():
        raise DataError(
            f"data.path: {config.data.path} is a file, expected a folder for the data. Choose another path."
        )
    if options.dtype not in DTYPES:
        raise UserError(f"--dtype is {options.dtype!r}, expected one of {', '.join(DTYPES)}")


def _resolution(config: Config, options: Options) -> tuple[int, tuple[int, int, int]]:
    """Side of the images, and (C, h, w) of their latents. UserError where they do not fit the model."""
    network = open_source(config.model).settings["network"]
    side = network.get("sample_size") or network["config"]["sample_size"]
    probe = 1 << 12
    factor = probe // latent_shape(config.model.path, probe)[1]
    resolution = options.resolution or side * factor
    if resolution != side * factor:
        raise UserError(
            f"--resolution is {resolution}, but the model takes latents of {side} x {side}, images of {side * factor}: "
            f"leave it out, or add --set model.sample_size={max(1, resolution // factor)} here and in training."
        )
    return resolution, latent_shape(config.model.path, resolution)


def _is_finished(folder: Path, settings: dict[str, Any]) -> bool:
    """Whether these data are there; DataError where the folder holds other ones, or something else."""
    if (folder / DESCRIPTION).exists():
        _check_same(folder, read_json(folder / DESCRIPTION).get("prepared", {}), settings)
        return True
    if (folder / PROGRESS / SETTINGS).exists():
        _check_same(folder, read_json(folder / PROGRESS / SETTINGS), settings)
    elif any(entry.name not in (LOCK_FILE, PROGRESS) for entry in folder.iterdir()):
        raise DataError(
            f"data.path: {folder} is not empty and holds nothing that `dmd2-fast prepare` began for latents: choose "
            "another data.path, or clear it."
        )
    return False


def _check_same(folder: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    different = [f"  {key}: {before} -> {after}" for key, before, after in differences(old, new)]
    if different:
        raise DataError(
            f"data.path: {folder} holds data prepared from other inputs or with other settings:\n"
            + "\n".join(different)
            + "\nGive the old ones to go on, or choose another data.path (or remove this folder)."
        )


@dataclass
class _Job:
    """Everything of one call between the checks and dataset.json."""

    config: Config
    options: Options
    folder: Path
    inputs: list[Input]
    settings: dict[str, Any]
    resolution: int
    shape: tuple[int, int, int]

    def run(self) -> None:
        self.encoders, self.codec = self._load()  # before anything is written
        (self.folder / PROGRESS).mkdir(exist_ok=True)
        write_json(self.folder / PROGRESS / SETTINGS, self.settings)
        for leftover in [*self.folder.glob(".*.partial"), *self.folder.glob(".*.tmp")]:
            leftover.unlink(missing_ok=True)
        size = self.options.samples_per_shard
        parts = [(first, self.inputs[first : first + size]) for first in range(0, len(self.inputs), size)]
        self._write_unconditional()
        with (
            ThreadPoolExecutor(THREADS, thread_name_prefix="dmd2_fast-prepare") as self.executor,
            tqdm(total=len(self.inputs), desc="prepare", unit="sample", disable=not self.options.progress) as self.bar,
        ):
            records = [self._shard(number, *part) for number, part in enumerate(parts)]
        self._finish(records)

    def _load(self) -> tuple[TextEncoders, LatentCodec | None]:
        path, kind = self.config.model.path, self.config.model.kind
        try:
            self.device = torch.device(self.options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
            torch.empty(0, device=self.device)
        except Exception as error:  # whatever a backend that is not there raises
            raise UserError(f"--device {self.options.device}: {str(error).splitlines()[0]}") from None
        codec = LatentCodec.load(path, self.device) if self.settings["inputs"]["from"] == "images" else None
        return TextEncoders.load(path, kind, self.device), codec

    def _write_unconditional(self) -> None:
        import safetensors.torch

        with replacing(self.folder / UNCONDITIONAL) as path:
            empty = {name: value[0].cpu().contiguous() for name, value in self.encoders.unconditional().items()}
            safetensors.torch.save_file(empty, path)

    def _shard(self, number: int, first: int, inputs: list[Input]) -> dict[str, Any]:
        """The record of a shard, which is written unless it is there: samples, bytes and what was left out."""
        path = self.folder / f"train-{number:06d}.tar"
        record_path = self.folder / PROGRESS / f"{number:06d}.json"
        record = read_json(record_path)
        if record and record["num_bytes"] == (path.stat().st_size if path.exists() else 0):
            self.bar.update(len(inputs))
            return record
        left_out: list[dict[str, str]] = []
        keys: list[int] = []
        write_shard(path, self._members(first, inputs, keys, left_out))
        if not keys:
            path.unlink()
        record = {
            "num_samples": len(keys),
            "num_bytes": path.stat().st_size if keys else 0,
            "left_out": sorted(left_out, key=lambda item: item["name"]),
        }
        write_json(record_path, record)
        return record

    def _members(
        self, first: int, inputs: list[Input], keys: list[int], left_out: list[dict[str, str]]
    ) -> Iterator[tuple[str, bytes]]:
        """(name, content) of the shard's members; appends to `keys` and `left_out` what became of each input."""

        def leave_out(item: Input, problem: str) -> None:
            left_out.append({"name": item.name, "problem": problem})
            self.bar.update()

        import safetensors.torch

        usable = self._usable(first, inputs, leave_out)
        while rows := list(islice(usable, self._batch_size)):
            for (key, item, _), tensors in zip(rows, self._encode(rows), strict=True):
                wrong = [name for name, value in tensors.items() if not bool(torch.isfinite(value).all())]
                if wrong:
                    leave_out(item, f"{', '.join(wrong)} are not finite in {self.options.dtype}")
                    continue
                yield f"{key:08d}.safetensors", safetensors.torch.save(tensors)
                yield f"{key:08d}.txt", item.prompt.encode("utf-8", "replace")
                keys.append(key)
                self.bar.update()

    @property
    def _batch_size(self) -> int:
        return self.options.batch_size or (PROMPT_BATCH if self.codec is None else IMAGE_BATCH)

    def _usable(
        self, first: int, inputs: list[Input], leave_out: Callable[[Input, str], None]
    ) -> Iterator[tuple[int, Input, Square | None]]:
        """(key, input, image) of what can be used, in order; images are read some ahead."""

        def read(item: Input) -> Square | str | None:
            if item.problem is not None or item.path is None:
                return item.problem
            try:
                return read_square(item.path, self.resolution)
            except ValueError as error:
                return str(error)

        results = _map_ahead(self.executor, read, inputs, ahead=2 * self._batch_size + THREADS)
        for key, (item, found) in enumerate(zip(inputs, results, strict=True), first):
            if isinstance(found, str):
                leave_out(item, found)
            else:
                yield key, item, found

    def _encode(self, rows: list[tuple[int, Input, Square | None]]) -> list[dict[str, Tensor]]:
        """The tensors of each row, on the CPU, in the dtype they are stored in; time_ids stay f32."""
        try:
            tensors = dict(self.encoders.encode([item.prompt for _, item, _ in rows]))
            squares = [square for _, _, square in rows if square is not None]
            if self.codec is not None:
                pixels = torch.from_numpy(np.stack([square.pixels for square in squares]))
                images = pixels.to(self.device).permute(0, 3, 1, 2).float() / 127.5 - 1
                tensors[LATENTS] = self.codec.encode(images.contiguous())
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"--batch-size {self._batch_size}: the encoders do not fit the memory of {self.device} "
                f"({str(error).splitlines()[0]}): choose a smaller one; finished shards are kept."
            ) from None
        stored = {name: value.to("cpu", DTYPES[self.options.dtype]) for name, value in tensors.items()}
        if self.config.model.kind == "sdxl":
            stored["time_ids"] = torch.stack([self._time_ids(square) for _, _, square in rows])
        return [{name: value[row].contiguous() for name, value in stored.items()} for row in range(len(rows))]

    def _time_ids(self, square: Square | None) -> Tensor:
        target = (self.resolution, self.resolution)
        if square is None or self.settings["size_condition"] == "target":
            return time_ids(target, (0, 0), target)
        return time_ids(square.original_size, square.crop_top_left, target)

    def _finish(self, records: list[dict[str, Any]]) -> None:
        left_out = [item for record in records for item in record["left_out"]]
        if left_out:
            lines = "".join(json.dumps(item) + "\n" for item in left_out)
            write_atomic(self.folder / LEFT_OUT, lines)
        num_samples = sum(record["num_samples"] for record in records)
        if not num_samples:
            raise DataError(
                f"none of {len(self.inputs)} inputs can be used, {self.folder / LEFT_OUT} says why; the first: "
                f"{left_out[0]['name']}: {left_out[0]['problem']}."
            )
        write_json(
            self.folder / DESCRIPTION,
            {
                "kind": "latents",
                "num_samples": num_samples,
                "num_left_out": len(left_out),
                "sample_shape": list(self.shape),
                "fields": self._fields(),
                "unconditional": UNCONDITIONAL,
                "prepared": self.settings,
            },
        )

    def _fields(self) -> dict[str, Any]:
        """Shape and dtype of each field, without batch dimension."""
        dtype, empty = self.options.dtype, self.encoders.unconditional()
        fields = {name: (list(value.shape[1:]), dtype) for name, value in empty.items()}
        if self.codec is not None:
            fields[LATENTS] = (list(self.shape), dtype)
        if self.config.model.kind == "sdxl":
            fields["time_ids"] = ([6], "float32")
        return {name: {"shape": shape, "dtype": kept} for name, (shape, kept) in sorted(fields.items())}


def _map_ahead(executor: ThreadPoolExecutor, function: Callable[[T], R], items: Iterable[T], ahead: int) -> Iterator[R]:
    """`map` in the executor, in order, at most `ahead` results before they are asked for."""
    queue: deque[Future[R]] = deque()
    try:
        for item in items:
            queue.append(executor.submit(function, item))
            if len(queue) > ahead:
                yield queue.popleft().result()
        while queue:
            yield queue.popleft().result()
    finally:
        for future in queue:
            future.cancel()
