"""The variants on two ranks of ZeRO-3: what plain PyTorch does on the whole batch, and who gets a gradient."""

import pytest
import torch
from plain_loop import plain_run, prepare, split_noise, write_config
from ranks import run_ranks
from test_equality import GRADIENT, LOSS, STEPS, WEIGHTS, differences
from variant_cases import VARIANTS

from dmd2_fast.runs import RunFolder

pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("variants")
    prepare(folder)
    configs = {name: write_config(folder, name, 2, **case.section)[1] for name, case in VARIANTS.items()}
    write_config(folder, "f-distill-resumed", 2, **VARIANTS["f-distill"].section)
    finished = run_ranks(folder, "variants", str(folder), timeout=350)
    assert set(finished.codes) == {0}, "\n".join(text[-3000:] for text in finished.output)
    return folder, configs


@pytest.mark.parametrize("name", list(VARIANTS))
def test_equals_plain_pytorch(runs, name):
    folder, configs = runs
    got = torch.load(folder / f"{name}-rank0.pt", weights_only=False)
    expected = plain_run(configs[name], VARIANTS[name].iterations)
    found = differences(got, expected)
    print(name, found)
    gradient = GRADIENT
    if configs[name].teacher.skip_layer_guidance is not None:  # a difference of predictions: the split changes more
        gradient = max(GRADIENT, split_noise(configs[name], expected))
    for kind, limit in (("gradient", gradient), ("loss", LOSS), ("steps", STEPS), ("weights", WEIGHTS)):
        assert max(found[kind].values()) < limit, (kind, found[kind])
    assert got["updates"] == len(expected.updates["generator"]) >= 3


def test_ladd_keeps_a_head_and_no_fake_score(runs):
    folder, _ = runs
    got = torch.load(folder / "ladd-rank0.pt", weights_only=False)
    assert got["weights"]["fake_score"] and all(name.startswith("heads.") for name in got["weights"]["fake_score"])
    assert {name.split(".")[2] for name in got["weights"]["fake_score"]} == {"0", "1"}
    assert not (folder / "ladd" / "fake_score.safetensors").exists()
    assert (folder / "f-distill" / "fake_score.safetensors").exists()


def test_the_running_means_go_on_from_a_checkpoint(runs):
    """Stopped in the middle and taken up by new ranks' processes: the bins, and so all weights, to the bit."""
    folder, _ = runs
    through, resumed = (
        [torch.load(folder / f"{name}-rank{rank}.pt", weights_only=False) for rank in (0, 1)]
        for name in ("f-distill", "f-distill-resumed")
    )
    for one, other in zip(through, resumed, strict=True):
        for network, values in one["weights"].items():
            assert all(torch.equal(value, other["weights"][network][key]) for key, value in values.items())
        assert torch.equal(one["bins"], other["bins"]) and torch.equal(one["bins"], through[0]["bins"])
    assert (through[0]["bins"] != 1).any()
    saved = {folder.name for _, folder in RunFolder(folder / "f-distill-resumed").list_checkpoints()}
    assert "iteration-000008" in saved
