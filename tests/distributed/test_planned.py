"""`dmd2-fast plan` against runs of two ranks: bytes of states, passes, and bytes that collectives put together.

The runs are the trainer's own, on a small SDXL-shaped network; planned.py measures in each rank's process.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from cases import ZERO
from pipelines import SCHEDULER, UNET_SDXL
from ranks import run_ranks

from dmd2_fast.config import load_config
from dmd2_fast.plan import Machine, Plan, Planner

ROOT = Path(__file__).resolve().parent.parent.parent
RUNS = {
    "module": {"gather": "module", "model": {"activation_checkpointing": True}, "accumulation": 2},
    "network": {"gather": "network", "passes": "shared", "bf16": True},
    "lora": {"gather": "module", "model": {"lora": {"rank": 4, "alpha": 2}, "activation_checkpointing": True}},
    "stage 1": {"gather": "network", "accumulation": 2, "zero": {"stage": 1, "reduce_bucket_size": 200_000}},
    "stage 2": {
        "gather": "module",
        "bf16": True,
        "accumulation": 2,
        "zero": {"stage": 2, "reduce_bucket_size": 200_000, "overlap_comm": True},
    },
}
STAGES = [name for name in RUNS if "zero" in RUNS[name]]
CYCLE = 2


def write_config(
    folder: Path, name: str, gather: str, model=None, passes="independent", accumulation=1, bf16=False, zero=None
) -> Path:
    values = json.loads((ROOT / "ds_sdxl.json").read_text())
    values |= {"train_batch_size": 4 * accumulation, "train_micro_batch_size_per_gpu": 2, "bf16": {"enabled": bf16}}
    values["zero_optimization"] = zero or {**ZERO, "reduce_bucket_size": 200_000}
    ours = values["dmd2_fast"]
    ours["model"] = {"kind": "sdxl", "path": str(folder / "model"), **(model or {})}
    ours["generator"].update(steps=[999, 499], rollout_index="sample")
    ours["fake_score"]["ttur_ratio"], ours["passes"] = CYCLE, passes
    ours["run"].update(folder=str(folder / name), sample_interval=0, progress=False, gather=gather)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(values))
    return path


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> tuple[dict[str, Plan], dict[str, list[dict]]]:
    """run -> its plan; run -> what each rank measured."""
    from diffusers import UNet2DConditionModel

    folder = tmp_path_factory.mktemp("planned")
    UNet2DConditionModel(**UNET_SDXL).save_pretrained(folder / "model" / "unet")
    (folder / "model" / "scheduler").mkdir()
    (folder / "model" / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER))
    plans = {}
    for name, options in RUNS.items():
        path = write_config(folder, name, **options)
        plans[name] = Planner(lambda more, gpus, path=path: load_config(path, more, gpus), Machine(gpus=2)).plan()
    ended = run_ranks(folder, "planned", str(folder), json.dumps({"runs": list(RUNS)}), timeout=400)
    assert set(ended.codes) == {0}, "\n".join(text[-3000:] for text in ended.output)
    return plans, {name: [torch.load(folder / f"{name}-rank{rank}.pt") for rank in (0, 1)] for name in RUNS}


@pytest.mark.parametrize("name", RUNS)
def test_states(measured, name):
    """Within 5 %, line by line, on both ranks."""
    plans, runs = measured
    planned = plans[name].memory.states
    names = {"weights": "weights", "gradients": "gradients", "optimizer (f32 masters, two moments)": "optimizer",
             "EMA": "ema", "reduce buckets": "buckets"}  # fmt: skip
    for rank in (0, 1):
        held = runs[name][rank]["held"]
        for line, key in names.items():
            assert planned.get(line, 0) == pytest.approx(held[key], rel=0.05), (line, rank)


@pytest.mark.parametrize("name", STAGES)
def test_gradients_of_an_update(measured, name):
    """Stages 1 and 2 let gradients and buckets go after each update."""
    plans, runs = measured
    plan = plans[name]
    sent = {n: min(200_000, plan.sizes[n]) * 4 for n in ("generator", "fake_score")}  # as f32, flat
    for rank in (0, 1):
        found = runs[name][rank]["in an update"]
        for network in ("generator", "fake_score"):
            phase, part = plan.memory.phases[network], found[f"{network} gradients"]
            elements = plan.sizes[network]
            assert part == pytest.approx(elements / 2 * 4, rel=0.05)
            # Stage 1 has all gradients until they are reduced; stage 2 in f32 adds a micro-batch's part to the sum.
            whole = 4 * elements if name == "stage 1" else 0
            assert phase.gradients == pytest.approx(
                part + whole + found[f"{network} buckets"] + sent[network], rel=0.05
            )
            assert phase.step == (pytest.approx(part, rel=0.05) if name == "stage 1" else 0)


@pytest.mark.parametrize("name", RUNS)
def test_passes(measured, name):
    """Rows through encoders and decoders, forward and backward, for each update: exact."""
    plans, runs = measured
    plan = plans[name]
    times = {"generator": 1, "rollout": CYCLE - 1, "fake_score": CYCLE}
    planned: Counter = Counter()
    for update, number in times.items():
        for item, n in getattr(plan.counts, update).passes.items():
            number_of = number * n * plan.config.gradient_accumulation_steps
            network = "all" if plan.config.model.lora else item.network  # one base under all adapters
            for half in ("encoder", "decoder", "encoder_backward", "decoder_backward"):
                planned[update, network, half] += number_of * getattr(item, half)
    for rank in (0, 1):
        seen: Counter = Counter()
        for (update, network, half), rows in runs[name][rank]["rows"].items():
            seen[update, "all" if plan.config.model.lora else network, half] += rows
        assert +planned == +seen


@pytest.mark.parametrize("name", RUNS)
def test_traffic(measured, name):
    """Bytes put together by all-gathers and taken apart by reduce-scatters: exact but for the shards' padding.

    An adapter that is still whole from the pass before is not gathered again, which the plan does not follow.
    """
    plans, runs = measured
    tolerance = 0.05 if name == "lora" else 1e-4
    for rank in (0, 1):
        run = runs[name][rank]
        assert plans[name].traffic["gathered"] == pytest.approx(sum(run["gathered"].values()), rel=tolerance)
        assert plans[name].traffic["reduced"] == pytest.approx(sum(run["reduced"].values()), rel=1e-4)
