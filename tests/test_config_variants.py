"""The variants' settings: which combinations are refused, and which are not."""

import pytest
from tiny import ROOT

from dmd2_fast.config import load_config
from dmd2_fast.distillation import Algorithm
from dmd2_fast.errors import ConfigError
from dmd2_fast.schedules import TimeSampling

DIGITS = ROOT / "ds_digits.json"
EXACT = ("adversarial.r1.kind=exact",)
UNFUSED = ("model.fused_operators=false",)
SKIP = ('teacher.skip_layer_guidance={"scale": 2}',)

VARIANT_CLASHES = {
    ('adversarial.time_sampling={"kind": "shifted"}',): "adversarial.time_sampling would be ignored",
    ("distribution_matching.divergence=js", "passes=independent"): "which shared passes alone have",
    (
        "distribution_matching.divergence=kl",
        "adversarial.discriminator_weight=0",
        "adversarial.generator_weight=0",
    ): "read from the GAN head, which is not trained",
    ("distribution_matching.ratio_histogram={}",): "reads no density ratio",
    ("generator.input=mixed", "generator.steps=[5]"): "only input of a 1-step generator is pure noise",
    ("generator.noised_data_share=0.25",): "the share is for a mixed input",
    ('adversarial.levels=["mid", "mid"]',): "a level is named twice",
    (*EXACT, "adversarial.r1.input=features", "adversarial.r1.std=0.2"): "perturbs nothing",
    ("adversarial.r1.kind=fastgen_compat", "adversarial.r1.input=features"): "FastGen's form perturbs samples",
    EXACT: "the fused operators inside the networks have no double backward",
    (*EXACT, *UNFUSED, "model.compile=true"): "neither recomputed nor compiled blocks",
    (*EXACT, *UNFUSED, "model.activation_checkpointing=true"): "neither recomputed nor compiled blocks",
    (*EXACT, *UNFUSED, "model.lora={}"): "the base under the adapters",
    (*EXACT, *UNFUSED): "sharded by ZeRO stage 3 do not survive",
    ("distribution_matching.weight=0", *SKIP): "leave skip_layer_guidance out",
    (*SKIP, "teacher.guidance_scale=0", "teacher.training.label_dropout=0.1"): "scale 0 leaves the conditional",
    (*SKIP, "model.compile=true"): "layers are left out by hooks",
    (
        "distribution_matching.weight=0",
        "adversarial.features=teacher",
        "fake_score.t_range=[0.1, 0.9]",
    ): "no fake score is kept and nothing is denoised",
    ("fake_score.t_range=[0.5, 0.5]",): "the range is empty",
    ('distribution_matching.time_sampling={"mean": -1}',): "leave out what the kind does not read",
    ('fake_score.time_sampling={"kind": "log_normal", "shift": 2}',): "leave out what the kind does not read",
    ("passes=independent", 'adversarial.time_sampling={"kind": "shifted", "std": 2}'): "leave out what the kind",
}


@pytest.mark.parametrize("overrides", VARIANT_CLASHES)
def test_a_combination_without_sense_is_refused_with_its_reason(overrides):
    with pytest.raises(ConfigError) as error:
        load_config(DIGITS, overrides)
    assert VARIANT_CLASHES[overrides] in str(error.value)


@pytest.mark.parametrize(
    "overrides",
    [
        ("distribution_matching.weight=0", "adversarial.features=teacher", 'adversarial.levels=["down.0", "mid"]'),
        ("distribution_matching.weight=0", "passes=independent"),
        ("distribution_matching.divergence=js", "distribution_matching.ratio_histogram={}"),
        ("distribution_matching.divergence=jeffreys", "adversarial.generator_weight=0"),
        ("distribution_matching.divergence=neyman", "adversarial.features=teacher"),
        (*EXACT, "adversarial.r1.input=features", "adversarial.r1.interval=8"),
        ("adversarial.r1.kind=approximate", "adversarial.r1.input=features"),
        ("adversarial.r1.kind=fastgen_compat", "adversarial.r1.std=0.01"),
        ("generator.input=noised_data",),
        ("generator.input=mixed", "generator.noised_data_share=0.25"),
        SKIP,
        (*SKIP, "teacher.guidance_scale=2", "teacher.training.label_dropout=0.1"),
        ("fake_score.t_range=[0.1, 0.9]", 'fake_score.time_sampling={"kind": "log_normal", "mean": 0}'),
    ],
)
def test_combinations_with_sense_are_not_refused(overrides):
    load_config(DIGITS, overrides)


def test_every_setting_reaches_the_algorithm():
    """Settings that differ from their defaults all, one by one."""
    overrides = {
        "generator.input=mixed": {"input": "mixed"},
        "generator.rollout_index=batch": {"rollout_index": "batch"},
        'teacher.skip_layer_guidance={"scale": 2, "layers": ["mid_block", "down_blocks.0"]}': {
            "skip_scale": 2.0,
            "skip_layers": ("mid_block", "down_blocks.0"),
        },
        "distribution_matching.divergence=kl": {"divergence": "kl"},
        'fake_score.time_sampling={"kind": "shifted", "shift": 4}': {
            "denoising_sampling": TimeSampling("shifted", shift=4.0)
        },
        "fake_score.t_range=[0.1, 0.9]": {"denoising_t_range": (0.1, 0.9)},
        'distribution_matching.time_sampling={"kind": "log_normal", "mean": 0.5}': {
            "dmd_sampling": TimeSampling("log_normal", mean=0.5)
        },
        'adversarial.levels=["down.0", "mid"]': {"levels": ("down.0", "mid")},
    }
    usual = Algorithm.from_config(load_config(DIGITS)).__dict__
    for override, expected in overrides.items():
        found = Algorithm.from_config(load_config(DIGITS, [override])).__dict__
        assert {name: value for name, value in found.items() if value != usual[name]} == expected
    together = ["distribution_matching.divergence=js", 'distribution_matching.ratio_histogram={"num_bins": 4}']
    found = Algorithm.from_config(load_config(DIGITS, together))
    assert (found.divergence, found.ratio_bins, found.ratio_decay) == ("js", 4, 0.9)
    own = ["passes=independent", 'adversarial.time_sampling={"kind": "shifted"}', "adversarial.t_range=[0.2, 0.8]"]
    found = Algorithm.from_config(load_config(DIGITS, own))
    assert found.gan_draws == ((0.2, 0.8), TimeSampling("shifted"))
    r1 = ["adversarial.r1.kind=exact", "adversarial.r1.input=features", "adversarial.r1.weight=3"]
    found = Algorithm.from_config(load_config(DIGITS, r1))
    assert (found.r1_kind, found.r1_input, found.r1_weight) == ("exact", "features", 3.0)
