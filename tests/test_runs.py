"""The run folder: created, resumed, refused, moved aside; files whole or absent; checkpoints that count."""

import json
import math
import os
from pathlib import Path

import pytest

from dmd2_fast import runs
from dmd2_fast.config import load_config
from dmd2_fast.errors import RunFolderError
from dmd2_fast.runs import (
    HARMLESS_KEYS,
    LOCK_FILE,
    RunFolder,
    differences,
    load_run_config,
    open_run,
    read_metrics,
    replacing,
    write_atomic,
)

DIGITS = Path(__file__).parents[1] / "ds_digits.json"
CONSTANT = ('generator.lr_scheduler={"type": "constant"}', 'fake_score.lr_scheduler={"type": "constant"}')


def make_config(folder, *overrides, world_size=1):
    return load_config(DIGITS, [f"run.folder={json.dumps(str(folder))}", *overrides], world_size)


def refusal(config, **arguments):
    with pytest.raises(RunFolderError) as error:
        open_run(config, **arguments)
    return str(error.value)


def test_a_new_folder_holds_the_whole_config(tmp_path):
    config = make_config(tmp_path / "a" / "b")
    run = open_run(config)
    assert not run.resumed
    assert json.loads((run.path / "config.json").read_text()) == config.to_dict()
    assert load_run_config(run.path) == config
    assert sorted(os.listdir(run.path)) == [LOCK_FILE, "config.json"]


def test_the_same_config_resumes_on_any_number_of_ranks(tmp_path):
    open_run(make_config(tmp_path / "r"))
    assert open_run(make_config(tmp_path / "r")).resumed
    assert open_run(make_config(tmp_path / "r", world_size=2)).resumed


def test_another_config_is_refused_with_every_difference(tmp_path):
    open_run(make_config(tmp_path / "r"))
    before = (tmp_path / "r" / "config.json").read_bytes()
    message = refusal(
        make_config(tmp_path / "r", "generator.ema=0.5", "adversarial.r1.kind=approximate", "generator.steps=[3, 1]")
    )
    assert "dmd2_fast.generator.ema: 0.985 -> 0.5" in message
    assert 'dmd2_fast.adversarial.r1.kind: "none" -> "approximate"' in message
    assert "dmd2_fast.generator.steps: [5.0, 1.6, 0.6, 0.2] -> [3.0, 1.0]" in message
    assert message.count("->") == 3 and "--fresh" in message
    message = refusal(make_config(tmp_path / "r", "bf16.enabled=true", "zero_optimization.stage3_max_reuse_distance=5"))
    assert "bf16.enabled: (absent) -> true" in message and "stage3_max_reuse_distance: 0 -> 5" in message
    assert (tmp_path / "r" / "config.json").read_bytes() == before


def test_settings_that_do_not_change_the_training_may_change(tmp_path):
    open_run(make_config(tmp_path / "r"))
    changed = [
        "run.log_interval=5",
        "run.checkpoint_interval=7",
        "run.keep_checkpoints=3",
        "run.sample_interval=0",
        "run.num_samples=10",
        "run.sample_prompts=[]",
        "run.progress=false",
        "run.gather=network",
        "data.loader=plain",
        "data.num_threads=1",
        "steps_per_print=3",
        'flops_profiler={"enabled": false}',
    ]
    assert {f"dmd2_fast.{text.split('=')[0]}" for text in changed[:10]} | {"dmd2_fast.run.folder"} == {
        key for key in HARMLESS_KEYS if key.startswith("dmd2_fast")
    }
    config = make_config(tmp_path / "r", *changed)
    assert open_run(config).resumed
    assert load_run_config(tmp_path / "r") == config, "the folder describes the run as it goes on"


def test_a_moved_folder_resumes(tmp_path):
    open_run(make_config(tmp_path / "r"))
    (tmp_path / "r").rename(tmp_path / "moved")
    assert open_run(make_config(tmp_path / "moved")).resumed


def test_the_number_of_iterations_is_fixed_by_a_cosine_alone(tmp_path):
    open_run(make_config(tmp_path / "cosine"))
    message = refusal(make_config(tmp_path / "cosine", "run.iterations=2000"))
    assert "dmd2_fast.run.iterations: 1000 -> 2000" in message and "cosine" in message
    open_run(make_config(tmp_path / "constant", *CONSTANT))
    assert open_run(make_config(tmp_path / "constant", *CONSTANT, "run.iterations=2000")).resumed
    open_run(make_config(tmp_path / "mixed", CONSTANT[0]))
    assert "cosine" in refusal(make_config(tmp_path / "mixed", CONSTANT[0], "run.iterations=2000"))


def test_a_config_written_before_a_setting_existed_gets_its_default(tmp_path):
    open_run(make_config(tmp_path / "r"))
    path = tmp_path / "r" / "config.json"
    old = json.loads(path.read_text())
    del old["dmd2_fast"]["adversarial"]["r1"]
    path.write_text(json.dumps(old))
    assert open_run(make_config(tmp_path / "r")).resumed
    path.write_text(json.dumps(old))
    assert "r1.kind" in refusal(make_config(tmp_path / "r", "adversarial.r1.kind=approximate"))


def test_fresh_moves_the_old_run_aside_under_the_next_free_name(tmp_path):
    for ema in (0.1, 0.2, 0.3):
        assert not open_run(make_config(tmp_path / "r", f"generator.ema={ema}"), fresh=True).resumed
    emas = {name: load_run_config(tmp_path / name).generator.ema for name in sorted(os.listdir(tmp_path))}
    assert emas == {"r": 0.3, "r.1": 0.1, "r.2": 0.2}


def test_fresh_touches_nothing_but_a_run(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_bytes(b"x")
    for fresh in (False, True):
        assert "holds no run" in refusal(make_config(tmp_path / "photos"), fresh=fresh)
    assert os.listdir(tmp_path) == ["photos"] and os.listdir(tmp_path / "photos") == ["cat.png"]
    (tmp_path / "file").write_text("x")
    assert "is a file" in refusal(make_config(tmp_path / "file"))


def test_what_a_crash_before_config_json_left_is_no_obstacle(tmp_path):
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / ".config.json.77.tmp").write_text("{")
    assert not open_run(make_config(tmp_path / "r")).resumed


def test_an_unreadable_config_json_is_one_message(tmp_path):
    open_run(make_config(tmp_path / "r"))
    (tmp_path / "r" / "config.json").write_text('{"dmd2_fast": ')
    assert "config.json" in refusal(make_config(tmp_path / "r"))
    with pytest.raises(RunFolderError, match="is no run folder"):
        load_run_config(tmp_path / "nowhere")
    assert "cannot be written" in refusal(make_config("/proc/nowhere/run"))


def test_write_atomic_leaves_the_old_file_when_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "f"
    write_atomic(path, "old")
    write_atomic(path, b"newer")
    assert path.read_bytes() == b"newer"

    def no_space(*_):
        raise OSError("no space left")

    monkeypatch.setattr(runs.os, "fsync", no_space)
    with pytest.raises(OSError, match="no space"):
        write_atomic(path, "newest")
    assert path.read_bytes() == b"newer" and os.listdir(tmp_path) == ["f"]


def test_metrics_are_strict_json_lines_and_torn_lines_are_left_out(tmp_path):
    run = RunFolder(tmp_path)
    run.append_metrics({"iteration": 0, "loss": 1.5, "bad": math.nan, "worse": [math.inf]})
    run.append_metrics({"iteration": 10, "loss": 1.25})
    text = run.metrics.read_text()
    assert "NaN" not in text and "Infinity" not in text and text.count("\n") == 2
    with run.metrics.open("a") as file:
        file.write('{"iteration": 20, "lo')
    assert read_metrics(run.metrics) == [
        {"iteration": 0, "loss": 1.5, "bad": None, "worse": [None]},
        {"iteration": 10, "loss": 1.25},
    ]
    assert read_metrics(tmp_path / "missing") == []


def test_resuming_drops_the_lines_that_will_be_written_again(tmp_path):
    run = RunFolder(tmp_path)
    run.truncate_metrics(5)  # nothing there yet
    assert not run.metrics.exists()
    for iteration in range(0, 60, 10):
        run.append_metrics({"iteration": iteration})
    with run.metrics.open("a") as file:
        file.write('{"iteration": 6')
    run.truncate_metrics(30)
    run.append_metrics({"iteration": 30, "again": True})
    assert [record["iteration"] for record in read_metrics(run.metrics)] == [0, 10, 20, 30]
    assert len(run.metrics.read_text().splitlines()) == 4
    assert read_metrics(run.metrics)[-1]["again"]


def commit(run, iteration, keep=9):
    (run.pending_checkpoint(iteration) / "state").write_text(str(iteration))
    return run.commit_checkpoint(iteration, keep)


def test_only_committed_checkpoints_count(tmp_path):
    run = RunFolder(tmp_path)
    assert run.latest_checkpoint() is None
    pending = run.pending_checkpoint(250)
    (pending / "state").write_text("half")
    assert run.latest_checkpoint() is None
    assert list(run.pending_checkpoint(250).iterdir()) == [], "a second attempt starts empty"
    commit(run, 250)
    commit(run, 1_000_000)
    commit(run, 500)
    run.pending_checkpoint(2_000_000)
    (run.checkpoints / "iteration-9999999").write_text("a file")
    (run.checkpoints / "best").mkdir()
    iteration, folder = run.latest_checkpoint()
    assert iteration == 1_000_000 and (folder / "state").read_text() == "1000000"
    assert (run.checkpoints / "latest").read_text() == "iteration-000500\n"


def test_a_checkpoint_of_the_same_iteration_is_replaced(tmp_path):
    run = RunFolder(tmp_path)
    commit(run, 5)
    (run.pending_checkpoint(5) / "other").write_text("x")
    folder = run.commit_checkpoint(5, keep=1)
    assert os.listdir(folder) == ["other"]
    assert sorted(os.listdir(run.checkpoints)) == ["iteration-000005", "latest"]


def test_pruning_keeps_the_newest_and_removes_what_crashes_left(tmp_path):
    run = RunFolder(tmp_path)
    for iteration in (10, 20, 30, 40):
        commit(run, iteration)
    (run.checkpoints / "iteration-000015.tmp").mkdir()
    (run.checkpoints / "iteration-000005.old.tmp").mkdir()
    (run.checkpoints / ".latest.9.tmp").write_text("")
    commit(run, 50, keep=2)
    assert sorted(os.listdir(run.checkpoints)) == ["iteration-000040", "iteration-000050", "latest"]
    with pytest.raises(ValueError, match="keep is 0"):
        run.prune_checkpoints(0)


def test_a_crash_while_pruning_leaves_no_half_checkpoint_that_counts(tmp_path, monkeypatch):
    run = RunFolder(tmp_path)
    commit(run, 10)
    commit(run, 20)
    real = runs.shutil.rmtree

    def dies_on_the_old_one(path, **arguments):
        if "iteration-000010" in str(path) and Path(path).exists():
            raise KeyboardInterrupt
        real(path, **arguments)

    monkeypatch.setattr(runs.shutil, "rmtree", dies_on_the_old_one)
    with pytest.raises(KeyboardInterrupt):
        run.prune_checkpoints(1)
    assert [iteration for iteration, _ in run.list_checkpoints()] == [20]


def test_replacing_is_whole_or_not_at_all_and_as_readable_as_the_umask_says(tmp_path):
    path = tmp_path / "weights"
    umask = os.umask(0o027)
    try:
        with replacing(path) as temporary:
            temporary.write_text("new")
            temporary.chmod(0o600)  # as safetensors leaves its files
        assert path.read_text() == "new" and path.stat().st_mode & 0o777 == 0o640
        with pytest.raises(KeyError), replacing(path) as temporary:
            temporary.write_text("half")
            raise KeyError
    finally:
        os.umask(umask)
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["weights"]


def test_grids_are_named_so_that_names_sort(tmp_path):
    run = RunFolder(tmp_path)
    assert run.grid(100) == tmp_path / "grids" / "iteration-000100.png"
    assert run.grids.is_dir()


def test_differences_are_by_leaf():
    old = {"a": {"b": 1, "c": [1, 2]}, "d": {}, "e": None}
    new = {"a": {"b": 1, "c": [1, 3]}, "d": {"f": 2}, "g": False}
    assert differences(old, new) == [
        ("a.c", "[1, 2]", "[1, 3]"),
        ("d.f", "(absent)", "2"),
        ("g", "(absent)", "false"),
        ("d", "{}", "(absent)"),
        ("e", "null", "(absent)"),
    ]
    assert differences(old, old) == []
