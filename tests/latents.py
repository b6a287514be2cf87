"""Folders of latents and text embeddings, as `dmd2-fast prepare` lays them out, and configs of runs on them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from pipelines import CAPTIONS
from safetensors.torch import save, save_file

from dmd2_fast.data.shards import write_shard
from dmd2_fast.sampling import encode_prompts


def write_latents(folder: Path, pipeline: Path, kind: str, num: int, side: int = 16, **extra: torch.Tensor) -> Path:
    """`num` random latents (4, side, side) with the embeddings of CAPTIONS in turn; `extra` fields have num rows."""
    folder.mkdir(parents=True)
    texts = [CAPTIONS[i % len(CAPTIONS)] for i in range(num)]
    fields = {**encode_prompts(pipeline, kind, texts, (2 * side, 2 * side), "cpu"), **extra}
    if "latents" not in fields:
        fields["latents"] = torch.randn(num, 4, side, side, generator=torch.Generator().manual_seed(0))
    samples = ({name: value[i].contiguous() for name, value in fields.items()} for i in range(num))
    write_shard(
        folder / "train-000000.tar", ((f"{i:09d}.safetensors", save(sample)) for i, sample in enumerate(samples))
    )
    shapes = {name: {"shape": list(value.shape[1:]), "dtype": "float32"} for name, value in fields.items()}
    (folder / "dataset.json").write_text(json.dumps({"sample_shape": [4, side, side], "fields": shapes}))
    empty = encode_prompts(pipeline, kind, [""], (2 * side, 2 * side), "cpu")
    unconditional = {name: value[0] * (kind == "sd15") for name, value in empty.items() if name != "time_ids"}
    save_file(unconditional, folder / "unconditional.safetensors")
    return folder


def text_section(folder: Path, pipeline: Path, kind: str, **run) -> dict:
    """What tests.tiny.tiny_config needs for a run on the latents in folder/latents."""
    return {
        "model": {"path": str(pipeline), "kind": kind},
        "data": {"path": str(folder / "latents"), "kind": "latents", "loader": "plain"},
        "teacher": {"training": None, "guidance_scale": 2.0},
        "generator": {"steps": [999, 749, 499, 249]},
        "distribution_matching": {"t_range": [0.02, 0.98]},
        "run": run,
    }
