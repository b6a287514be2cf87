"""ds_digits.json's own settings and network shard everything: what each of two ranks holds between iterations."""

import json
from pathlib import Path

import pytest
import torch
from data_oracle import make_folder, random_pixels
from ranks import run_ranks

from dmd2_fast.config import load_config
from dmd2_fast.networks import build_denoiser, save_denoiser
from dmd2_fast.teacher import teacher_settings

ROOT = Path(__file__).resolve().parent.parent.parent
GATHER = ("network", "module")
SHARE = 0.55


@pytest.fixture(scope="module")
def held(tmp_path_factory):
    """gather -> rank -> what is held after a generator update, an iteration without one and a checkpoint."""
    folder = tmp_path_factory.mktemp("sharding")
    images = random_pixels(44)
    make_folder(folder / "data", images, samples_per_shard=22)
    config = load_config(ROOT / "ds_digits.json")
    torch.manual_seed(0)
    settings = teacher_settings(config.teacher.training, lambda: (images / 127.5 - 1).std())
    save_denoiser(build_denoiser(settings), folder / "teacher")
    for gather in GATHER:
        values = json.loads((ROOT / "ds_digits.json").read_text())
        ours = values["dmd2_fast"]
        ours["model"]["path"], ours["data"]["path"] = str(folder / "teacher"), str(folder / "data")
        # Scores need a test split; the schedule's warm-up must fit into two iterations.
        ours["run"].update(folder=str(folder / gather), iterations=2, sample_interval=0, progress=False, gather=gather)
        for network in ("generator", "fake_score"):
            ours[network]["lr_scheduler"]["params"]["warmup_iterations"] = 1
        (folder / f"{gather}.json").write_text(json.dumps(values))
    ended = run_ranks(folder, "sharding", str(folder), json.dumps({"runs": GATHER}), timeout=200)
    assert set(ended.codes) == {0}, "\n".join(text[-3000:] for text in ended.output)
    return {gather: [torch.load(folder / f"{gather}-rank{rank}.pt") for rank in (0, 1)] for gather in GATHER}


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("gather", GATHER)
def test_at_most_a_share_at_rest(held, gather, rank):
    elements = held[gather][rank]["elements"]
    expected = {f"{network} weights" for network in ("generator", "fake_score", "teacher")} | {"ema"}
    expected |= {
        f"{network} {kind}" for network in ("generator", "fake_score") for kind in ("optimizer", "master weights")
    }
    assert expected <= elements.keys()
    assert all(total > 500_000 for _, total in elements.values())
    for name, (mine, total) in elements.items():
        assert mine <= SHARE * total, (name, mine, total)
        other = held[gather][1 - rank]["elements"][name][0]
        assert name.endswith("whole") or mine + other >= total, (name, mine, other, total)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("gather", GATHER)
def test_nothing_whole_stays_behind(held, gather, rank):
    """Neither in the modules that are put together for a pass nor anywhere else in the process."""
    whole = [mine for name, (mine, _) in held[gather][rank]["elements"].items() if name.endswith(" whole")]
    assert whole == [0, 0, 0] * (gather == "network")
    assert held[gather][rank]["whole"] == []
