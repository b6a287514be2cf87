"""The configurations in which ranks and plain PyTorch are compared: a covering set, not the product."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

FOUR_STEPS, ONE_STEP = [5, 2, 0.8, 0.3], [2.5]
APPROXIMATE = {"kind": "approximate", "weight": 0.5, "std": 0.3, "interval": 2}


@dataclass
class Case:
    """A run: sections of the tiny configuration, DeepSpeed's keys, ranks."""

    section: dict[str, Any]
    deepspeed: dict[str, Any] = field(default_factory=dict)
    world_size: int = 2

    @property
    def iterations(self) -> int:
        return self.section["run"]["iterations"]


def case(
    *,
    gather: str,
    passes: str,
    features: str = "fake_score",
    steps=FOUR_STEPS,
    index: str = "sample",
    guidance: float = 1.0,
    r1=None,
    iterations: int = 5,
    ttur_ratio: int = 2,
    clipping: float = 0.5,
    ema: float | None = 0.9,
    weights: tuple[float, float] = (0.1, 0.1),
    scheduler: str = "cosine",
    deepspeed=None,
    world_size: int = 2,
) -> Case:
    """A run of the tiny network. Its clipping limit is below the gradients' norms, so that clipping counts."""
    rates = {"lr_scheduler": {"type": scheduler, "params": {"warmup_iterations": 2}}, "gradient_clipping": clipping}
    # eps: at 1e-8, Adam turns the rounding errors of gradients that are zero but for rounding into full steps.
    common = {"optimizer": {"params": {"lr": 1e-3, "eps": 1e-5}}, **rates}
    section = {
        "generator": {"steps": steps, "rollout_index": index, "ema": ema, **common},
        "fake_score": {"ttur_ratio": ttur_ratio, **common},
        "teacher": {"guidance_scale": guidance, "training": {"label_dropout": 0.1}},
        "adversarial": {
            "generator_weight": weights[0],
            "discriminator_weight": weights[1],
            "features": features,
            "r1": r1 or {"kind": "none"},
        },
        "passes": passes,
        "run": {"gather": gather, "iterations": iterations},
    }
    return Case(copy.deepcopy(section), deepspeed or {}, world_size)


def accumulate(micro_batch_size: int, steps: int) -> dict[str, Any]:
    return {"train_micro_batch_size_per_gpu": micro_batch_size, "gradient_accumulation_steps": steps}


ZERO = {
    "stage": 3,
    "stage3_param_persistence_threshold": 0,
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
}
LEAF = {"zero_optimization": {**ZERO, "leaf_module": {"classes": ["diffusers.models.resnet.ResnetBlock2D"]}}}
DEFAULTS = {"zero_optimization": {"stage": 3}}  # persistent parameters, which stay whole, and reuse between passes
SPLIT = {"gather": "network", "passes": "independent", "guidance": 2.0, "r1": APPROXIMATE}

CASES = {
    "long": case(gather="network", passes="shared", iterations=20),
    "module-guided": case(gather="module", passes="independent", index="batch", guidance=3.0, r1=APPROXIMATE),
    "teacher-features": case(
        gather="network", passes="independent", features="teacher", steps=ONE_STEP, guidance=3.0, ema=None,
        deepspeed=LEAF,
    ),
    "teacher-module": case(
        gather="module", passes="shared", features="teacher", index="batch", guidance=2.0, deepspeed=accumulate(2, 2),
        clipping=0.0,
    ),
    "one-step-defaults": case(
        gather="module", passes="shared", steps=ONE_STEP, deepspeed=DEFAULTS, scheduler="constant", r1=APPROXIMATE
    ),
    "no-gan": case(gather="network", passes="independent", weights=(0.0, 0.0), guidance=2.0, deepspeed=DEFAULTS),
    "split-one-rank": case(**SPLIT, world_size=1),
    "split-two-ranks": case(**SPLIT, deepspeed=LEAF),
    "split-accumulated": case(**SPLIT, deepspeed=accumulate(2, 2)),
}  # fmt: skip
