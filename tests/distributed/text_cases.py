"""Runs of a tiny SDXL-shaped pipeline on ZeRO-3: folders, configurations, and what one rank does with them."""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import weakref
from pathlib import Path

import safetensors.torch
import torch
from data_oracle import write_tar
from diffusers import UNet2DConditionModel
from pipelines import UNET_SDXL, make_pipeline
from torch.utils._python_dispatch import TorchDispatchMode

from dmd2_fast.config import Config, load_config
from dmd2_fast.construction import build_networks
from dmd2_fast.distillation import Algorithm
from dmd2_fast.engine import Engines
from dmd2_fast.errors import UserError
from dmd2_fast.networks.source import Source
from dmd2_fast.ranks import init_distributed
from dmd2_fast.shards import in_decoder, whole_on_cpu
from dmd2_fast.traffic import counted

NUM_SAMPLES, SIDE, TOKENS = 11, 8, 7  # an epoch ends inside a batch
ZERO = {
    "stage": 3,
    "stage3_param_persistence_threshold": 0,
    "stage3_max_live_parameters": 10**9,  # so that ZeRO-3 prefetches
    "stage3_max_reuse_distance": 0,
}
ITERATIONS, RATIO = 6, 5
CPU = {"device": "cpu"}
RUNS = {
    "module": {"gather": "module"},
    "network": {"gather": "network"},
    "offload": {"gather": "rollout", "zero": {"offload_optimizer": CPU, "offload_param": CPU}},
    "teacher": {"gather": "module", "features": "teacher"},
}
"""One cycle of one generator's update and five of the fake score, and the start of the next; two micro-batches each."""


def prepare(folder: Path) -> None:
    make_pipeline(folder / "pipeline", sample_size=SIDE)
    (folder / "start").mkdir()
    for seed, name in enumerate(("generator", "fake_score"), start=1):
        # Three networks apart: where fake score and teacher agree, their difference is rounding alone.
        torch.manual_seed(seed)
        weights = UNet2DConditionModel(**{**UNET_SDXL, "sample_size": SIDE}).state_dict()
        safetensors.torch.save_file(weights, folder / "start" / f"{name}.safetensors")
    data, samples = folder / "latents", []
    data.mkdir()
    for index in range(NUM_SAMPLES):
        generator = torch.Generator().manual_seed(index)
        samples.append(
            {
                "latents": torch.randn(4, SIDE, SIDE, generator=generator),
                "prompt_embeds": torch.randn(TOKENS, 32, generator=generator),
                "pooled_prompt_embeds": torch.randn(16, generator=generator),
                "time_ids": torch.tensor([16.0, 20, 0, 2, 16, 16]),
            }
        )
    members = [[(f"{key:08d}.safetensors", safetensors.torch.save(value))] for key, value in enumerate(samples)]
    write_tar(data / "train-000000.tar", itertools.chain(*members))
    fields = {name: {"shape": list(value.shape)} for name, value in samples[0].items()}
    (data / "dataset.json").write_text(json.dumps({"sample_shape": [4, SIDE, SIDE], "fields": fields}))
    empty = {"prompt_embeds": torch.zeros(TOKENS, 32), "pooled_prompt_embeds": torch.zeros(16)}
    safetensors.torch.save_file(empty, data / "unconditional.safetensors")


def write_run(
    folder: Path, name: str, *, gather: str, zero: dict | None = None, features: str = "fake_score",
    world_size: int = 2, **deepspeed,
) -> Config:  # fmt: skip
    """folder/NAME.json; SDXL's recipe but for rates, with which a difference would show."""
    trained = {
        "optimizer": {"params": {"lr": 1e-3, "eps": 1e-5}},
        "lr_scheduler": {"params": {"warmup_iterations": 2}},
        "gradient_clipping": 0.5,
    }
    values = {
        "train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "zero_optimization": {**ZERO, **(zero or {})},
        **deepspeed,
        "dmd2_fast": {
            "model": {
                "kind": "sdxl", "path": str(folder / "pipeline"), "activation_checkpointing": True,
            },
            "generator": {"steps": [999, 749, 499, 249], "ema": 0.9, **trained},
            "fake_score": {"ttur_ratio": RATIO, **trained},
            "teacher": {"guidance_scale": 8.0},
            "adversarial": {"generator_weight": 0.1, "discriminator_weight": 0.1, "features": features},
            "passes": "shared",
            "data": {"kind": "latents", "path": str(folder / "latents"), "loader": "plain"},
            "run": {
                "folder": str(folder / name), "iterations": ITERATIONS, "seed": 1, "log_interval": 1, "gather": gather,
                "start_from": str(folder / "start"), "sample_interval": 0, "checkpoint_interval": 1000,
                "progress": False,
            },
        },
    }  # fmt: skip
    path = folder / f"{name}.json"
    path.write_text(json.dumps(values))
    return load_config(path, (), world_size)


@contextlib.contextmanager
def invalidated():
    """Counts how often ZeRO-3 drops a recorded order of modules."""
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    original, found = PartitionedParameterCoordinator._invalidate_trace, []

    def invalidate(self):
        found.append(1)
        return original(self)

    PartitionedParameterCoordinator._invalidate_trace = invalidate
    try:
        yield found
    finally:
        PartitionedParameterCoordinator._invalidate_trace = original


class Held(TorchDispatchMode):
    """Bytes of tensors that were made inside and are alive, now and at the most."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        for value in result if isinstance(result, (list, tuple)) else (result,):
            if isinstance(value, torch.Tensor) and value.device.type != "meta":
                storage = value.untyped_storage()
                if storage._cdata not in self.alive and storage.nbytes():
                    self.alive[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self.alive.pop, storage._cdata, None)
        self.peak = max(self.peak, sum(self.alive.values()))
        return result


def construction(folder: Path, options: dict) -> None:
    """The networks' tensors gathered, what was held meanwhile; then a file that rank 0 cannot read to its end."""
    rank = init_distributed()
    config = load_config(folder / "module.json", (), rank.world_size)
    algorithm = Algorithm.from_config(config)
    gc.collect()
    with Held() as held:
        networks = build_networks(config, algorithm, rank)
    found = {}
    for name, module in zip(("generator", "fake_score", "teacher"), networks, strict=True):
        found[name] = whole_on_cpu(dict(module.named_parameters()))
    sizes = [p.ds_numel for module in networks for p in module.parameters()]
    result = {"tensors": found, "peak": held.peak, "whole": 4 * sum(sizes), "largest": 4 * max(sizes)}
    original, errors = Source.tensors, []

    def broken(self):
        yield from itertools.islice(original(self), 5)
        raise OSError("disk on fire")

    Source.tensors = broken
    try:
        build_networks(config, algorithm, rank)
    except UserError as error:
        errors.append(str(error))
    Source.tensors = original
    torch.save({**result, "errors": errors}, folder / f"construction-rank{rank.rank}.pt")


def nvme(folder: Path, small: int = 4096) -> dict:
    """Settings with weights on NVMe and the optimizer on the CPU, for tensors as small as the tiny network's."""
    from deepspeed.runtime.swap_tensor import partitioned_param_swapper

    partitioned_param_swapper.MIN_AIO_BYTES = small
    weights = {"device": "nvme", "nvme_path": str(folder / "swap"), "buffer_count": 8, "buffer_size": 10**6}
    return {
        "gather": "rollout", "aio": {"block_size": small},
        "zero": {"offload_param": weights, "offload_optimizer": CPU},
    }  # fmt: skip


def passes(folder: Path, options: dict) -> None:
    """Bytes gathered by encoder-only and whole passes of the teacher, in turn, for each way to gather."""
    rank, result = init_distributed(), {}
    for name in ("module", "network"):
        config = load_config(folder / f"{name}.json", (), rank.world_size)
        networks = build_networks(config, Algorithm.from_config(config), rank)
        engines = Engines(config, *networks)
        x, t = torch.randn(2, 4, SIDE, SIDE), torch.tensor([10, 900])
        condition = {
            "prompt_embeds": torch.randn(2, TOKENS, 32), "pooled_prompt_embeds": torch.randn(2, 16),
            "time_ids": torch.ones(2, 6),
        }  # fmt: skip
        seen = {"encode": [], "decode": []}
        with torch.no_grad(), invalidated() as dropped:
            for decode in (True, False, False, True, False, True, False, True):
                rows = None if decode else 0
                with counted() as traffic, engines.bare(engines.teacher, decode=decode) as teacher:
                    teacher(x, t, condition, decode_rows=rows, levels=("mid",))
                seen["decode" if decode else "encode"].append((traffic.gathered, len(dropped)))
        parameters = dict(engines.teacher.module.named_parameters())
        sizes = {key: 4 * 2 * -(-p.ds_numel // 2) for key, p in parameters.items()}
        seen["sizes"] = {
            "decode": sum(sizes.values()), "encode": sum(v for key, v in sizes.items() if not in_decoder(key)),
        }  # fmt: skip
        if name == "module":
            with torch.no_grad(), counted() as traffic:
                for _ in range(3):
                    engines.teacher.module(x, t, condition)
                traffic.gathered = 0
                engines.teacher.module(x, t, condition, decode_rows=0)
            seen["one trace"] = traffic.gathered
        seen["parameters"] = {
            name: sum(4 * 2 * -(-p.ds_numel // 2) for p in getattr(engines, name).module.parameters())
            for name in ("generator", "fake_score")
        }
        result[name] = seen
    torch.save(result, folder / f"passes-rank{rank.rank}.pt")
