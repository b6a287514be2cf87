"""Checkpoints of one rank: what is saved is what is loaded, and what is damaged is named."""

import json
import shutil

import pytest
import torch
from one_rank import group_of_one, make_trainer, steps
from plain_loop import prepare

from dmd2_fast.checkpoint import load_checkpoint, read_state
from dmd2_fast.errors import RunFolderError, UserError
from dmd2_fast.meters import Metrics
from dmd2_fast.runs import RunFolder


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A trainer that saved after 2 iterations and then went on for 2 more; what it held at the save."""
    folder = tmp_path_factory.mktemp("checkpoint")
    prepare(folder)
    with group_of_one() as rank:
        trainer = make_trainer(folder, "run", rank, fake_score={"ttur_ratio": 2}, run={"iterations": 8})
        steps(trainer, 2)
        trainer.save()
        held = state_of(trainer)
        steps(trainer, 2)
        yield trainer, held
        trainer.close()


def state_of(trainer):
    """Copies of this rank's weights, optimizer states, average and open sums."""
    found = {f"ema {name}": value.clone() for name, value in trainer.ema.shards.items()}
    found |= {f"sum {name}": value.clone() for name, value in trainer.metrics.sums.items()}
    for name in ("generator", "fake_score"):
        engine = getattr(trainer.engines, name)
        found |= {f"{name} {key}": p.ds_tensor.clone() for key, p in engine.module.named_parameters()}
        for i, state in enumerate(engine.optimizer.optimizer.state.values()):
            found |= {f"{name} {i} {key}": torch.as_tensor(value).clone() for key, value in state.items()}
    return found


def load(trainer, folder, metrics=None):
    load_checkpoint(folder, trainer.engines, trainer.ema, metrics or trainer.metrics, trainer.rank)


def test_loading_restores_what_was_saved(saved):
    trainer, held = saved
    (_, folder) = trainer.run.latest_checkpoint()
    now = state_of(trainer)
    assert now.keys() == held.keys()
    different = {name.split()[0] for name in held if not torch.equal(now[name], held[name])}
    assert different == {"ema", "sum", "generator", "fake_score"}
    metrics = Metrics()
    load(trainer, folder, metrics)
    trainer.metrics = metrics
    now = state_of(trainer)
    assert [name for name in held if not torch.equal(now[name], held[name])] == []
    assert metrics.counts["fake_score/loss"] == 2 and metrics.counts["generator/loss"] == 1
    assert list(metrics.sums) == list(json.loads((folder / "trainer.json").read_text()) and metrics.counts)
    assert read_state(folder, 1)["iteration"] == 2


def test_another_number_of_ranks(saved):
    (_, folder) = saved[0].run.latest_checkpoint()
    with pytest.raises(RunFolderError, match=r"written by 1 rank\(s\) and this run has 4.*Resume with 1"):
        read_state(folder, 4)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(bytes(content))


def remove(path):
    path.unlink()


def empty(path):
    path.write_bytes(b"")


DEEPSPEED_FILES = ["generator/*/*model_states.pt", "fake_score/*/*optim_states.pt"]  # zip: with checksums
DAMAGES = [(file, damage) for file in (*DEEPSPEED_FILES, "rank00000.safetensors") for damage in (cut, remove, empty)]


@pytest.mark.parametrize(("file", "damage"), [*DAMAGES, *((file, flip) for file in DEEPSPEED_FILES)])
def test_damaged_files_are_named(saved, tmp_path, file, damage):
    trainer, _ = saved
    folder = shutil.copytree(trainer.run.latest_checkpoint()[1], tmp_path / "iteration-000002")
    (path,) = folder.glob(file)
    damage(path)
    with pytest.raises(UserError) as caught:
        load(trainer, folder)
    message = str(caught.value)
    assert str(path) in message or str(path.parent) in message
    assert f"Remove {folder} to resume from the checkpoint before it" in message


WRONG_TYPE = json.dumps(
    {"world_size": 1, "iteration": "2", "skipped": {}, "in_a_row": {}, "generator_updates": 1, "seconds": 2.0}
)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"iteration": 2}', "null", WRONG_TYPE])
def test_damaged_counters_are_named(saved, tmp_path, content):
    folder = shutil.copytree(saved[0].run.latest_checkpoint()[1], tmp_path / "iteration-000002")
    (folder / "trainer.json").write_text(content)
    with pytest.raises(RunFolderError, match=r"trainer\.json cannot be read"):
        read_state(folder, 1)


def test_half_written_and_old_ones_go(saved):
    trainer, _ = saved
    run = trainer.run
    (run.checkpoints / "iteration-000099.tmp").mkdir()
    assert run.latest_checkpoint()[0] == 2
    for iteration in (5, 6):
        trainer.iteration = iteration
        trainer.save()
    assert [iteration for iteration, _ in RunFolder(run.path).list_checkpoints()] == [5, 6]
    assert sorted(path.name for path in run.checkpoints.iterdir()) == ["iteration-000005", "iteration-000006", "latest"]
    assert (run.checkpoints / "latest").read_text() == "iteration-000006\n"
