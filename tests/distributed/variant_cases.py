"""The variants that ranks and plain PyTorch are compared in: one run each, of few iterations."""

from __future__ import annotations

from cases import Case, case

LEVELS = {"features": "teacher", "levels": ["down.0", "mid"]}


def variant(base: Case, **sections: dict) -> Case:
    """The case with these settings written into its sections."""
    for name, values in sections.items():
        base.section[name] = {**base.section.get(name, {}), **values}
    return base


def adversarial(base: Case, **values: object) -> Case:
    return variant(base, adversarial=values)


VARIANTS = {
    "ladd": variant(
        adversarial(case(gather="module", passes="independent"), **LEVELS), distribution_matching={"weight": 0}
    ),
    "f-distill": variant(
        case(gather="network", passes="shared", iterations=8),
        distribution_matching={"divergence": "js", "ratio_histogram": {"num_bins": 3}},
    ),
    "exact-own": adversarial(
        case(gather="module", passes="independent"), r1={"kind": "exact", "input": "features", "interval": 2}
    ),
    "exact-teacher": adversarial(
        case(gather="network", passes="shared", features="teacher"), **LEVELS, r1={"kind": "exact", "input": "features"}
    ),
    "skip-layers-mixed": variant(
        case(gather="module", passes="independent"),
        teacher={"skip_layer_guidance": {"scale": 1.0}}, generator={"input": "mixed"},
    ),
}  # fmt: skip
