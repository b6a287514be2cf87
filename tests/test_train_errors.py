"""What users get wrong, through the real entry points: one message, exit code 2, and nothing changed on the disk."""

import contextlib
import io
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist
from tiny import ROOT, on_one_core, tiny_config, write_split

from dmd2_fast import failures, trainer
from dmd2_fast.cli import main as dmd2_fast
from dmd2_fast.config import load_config
from dmd2_fast.errors import DataError, RunFolderError
from dmd2_fast.runs import open_run
from dmd2_fast.stopping import StopSignals
from dmd2_fast.trainer import main

RUN_FLAGS = {"env": {**os.environ, "OMP_NUM_THREADS": "1"}, "text": True, "capture_output": True, "timeout": 240}


def tree(folder):
    """Every path below a folder, with its content."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def check_message(err, *parts):
    lines = [line for line in err.splitlines() if re.match(r"(dmd2-fast: |train.py: )?error", line)]
    assert len(lines) == 1 and "Traceback" not in err, err
    for part in parts:
        assert part in err


def refused(world, capfd, monkeypatch, *arguments, config="c.json", command=main):
    """The message of a call that must end before any process group is made and leave the folder as it is."""

    def never():
        raise AssertionError("a process group was made")

    monkeypatch.setattr(trainer, "init_distributed", never)
    before = tree(world)
    capfd.readouterr()
    if command is main:
        arguments = ("--config", str(config), *arguments)
    try:
        code = command(list(arguments))
    except SystemExit as end:  # argparse
        code = end.code
    assert code == 2
    assert tree(world) == before
    return capfd.readouterr().err


SETTINGS = {
    "run.iteration=5": ('unknown key "dmd2_fast.run.iteration"', 'did you mean "iterations"'),
    "advesarial.r1.kind=none": ('did you mean "adversarial"',),
    "zero_optimisation.stage=3": ('unknown key "zero_optimisation"', 'did you mean "zero_optimization"'),
    "zero_optimization.stge=3": ('unknown key "zero_optimization.stge"', 'did you mean "stage"'),
    "zero_optimization.reduce_bucket_size=many": ("DeepSpeed refuses", "reduce_bucket_size"),
    'zero_optimization.offload_optimizer={"device": "nvme"}': ("zero_optimization.offload_optimizer", "cpu"),
    "zero_optimization.zero_quantized_weights=true": ("zero_optimization.zero_quantized_weights", "not supported"),
    "zero_optimization.leaf_module=3": ("DeepSpeed refuses", "leaf_module"),
    "zero_optimization.stage3_max_live_parameters=-1": ("DeepSpeed refuses", "max_live_parameters"),
    "run.iterations=soon": ("dmd2_fast.run.iterations", "expected a whole number"),
    "run.folder=3": ("dmd2_fast.run.folder", "expected a string"),
    "adversarial.discriminator_weight=0": ("follow a random one",),
    "generator.steps=[100, 1]": ("Karras steps are sigmas",),
    "run.iterations": ("dotted.key=value",),
    "data.path=nowhere": ("nowhere", "train-000000.tar"),
    "data.path=c.json": ("c.json is a file",),
    "data.path=teacher": ("holds no train shards",),
    "model.path=nowhere": ("there is no denoiser in 'nowhere'", "dmd2-fast teacher"),
    "model.path=c.json": ("there is no denoiser in 'c.json'",),
    "model.path=data": ("there is no denoiser in 'data'",),
    "run.folder=c.json": ("c.json is a file",),
    "run.folder=.": ("run folder",),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_wrong_setting(world, capfd, monkeypatch, setting):
    check_message(refused(world, capfd, monkeypatch, "--set", setting), *SETTINGS[setting])


def test_a_wrong_config_file(world, capfd, monkeypatch):
    contents = {
        b"": "not valid JSON",
        b"{'a': 1}": "c.json:1:2",
        b"[]": "expected an object",
        b"\xff\xfe\x00": "cannot be read",
    }
    for content, part in contents.items():
        (world / "c.json").write_bytes(content)
        check_message(refused(world, capfd, monkeypatch), "c.json", part)
    check_message(refused(world, capfd, monkeypatch, config="d.json"), "d.json: no such configuration file")
    check_message(refused(world, capfd, monkeypatch, config="data"), "data", "cannot be read")


def test_a_wrong_teacher(world, capfd, monkeypatch):
    weights = world / "teacher" / "unet" / "diffusion_pytorch_model.safetensors"
    settings = world / "teacher" / "denoiser.json"
    whole, sound = weights.read_bytes(), json.loads(settings.read_text())

    def message():
        return refused(world, capfd, monkeypatch)

    for content in (whole[:-100], whole[:4], b"", b"x" * 1000):
        weights.write_bytes(content)
        check_message(message(), str(weights.relative_to(world)), "cannot be read")
    weights.unlink()
    check_message(message(), "cannot be read")
    weights.write_bytes(whole)
    other = json.loads(json.dumps(sound))
    other["network"]["config"]["block_out_channels"] = [16, 32]
    larger = json.loads(json.dumps(sound))
    larger["network"]["config"]["sample_size"] = 8
    fewer = json.loads(json.dumps(sound))
    fewer["network"]["config"]["num_class_embeds"] = None
    ddpm = {**sound, "schedule": {"kind": "ddpm"}, "prediction_type": "epsilon", "preconditioning": "none"}
    for value, parts in (
        (other, ("does not fit the network", "expected")),
        (larger, ("(1, 8, 8)", "(1, 16, 16)")),
        (fewer, ("is not part of this network",)),
        (ddpm, ("1.6 is no DDPM timestep",)),
        ({**sound, "network": {"kind": "unet3d"}}, ("unet3d",)),
        ({}, ("denoiser.json",)),
        ([], ("denoiser.json",)),
        ({**sound, "schedule": 3}, ("denoiser settings",)),
    ):
        settings.write_text(json.dumps(value))
        check_message(message(), *parts)
    settings.write_bytes(b"\x80\xff")
    check_message(message(), "denoiser.json", "cannot be read")


def test_wrong_data(world, capfd, monkeypatch):
    def message():
        return refused(world, capfd, monkeypatch)

    for split in ("train", "test"):
        shard = world / "data" / f"{split}-000000.tar"
        sound = shard.read_bytes()
        shard.write_bytes(sound[:5000])
        check_message(message(), shard.name)
        write_split(world / "data", split, 0)
        check_message(message(), "0 images")
        write_split(world / "data", split, 12, broken=True)
        check_message(message(), shard.name, "000011.png")
        write_split(world / "data", split, 12, side=16)
        check_message(message(), f"{split} images", "(1, 16, 16)", "(1, 8, 8)")
        write_split(world / "data", split, 12, classes=12)
        check_message(message(), f"{split} labels up to 11", "10 classes")
        shard.unlink()
        shard.mkdir()
        check_message(message(), shard.name)
        shard.rmdir()
        shard.write_bytes(sound)


def test_ranks_that_the_batch_does_not_divide_over(world, capfd, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    check_message(refused(world, capfd, monkeypatch), "train_batch_size 8", "3 ranks", "6 or 9 would work")


def test_a_run_folder_that_cannot_be_used(world, capfd, monkeypatch):
    (world / "full").mkdir()
    (world / "full" / "thesis.tex").write_text("years of work")
    check_message(refused(world, capfd, monkeypatch, "--set", "run.folder=full"), "is not empty and holds no run")
    old = world / "run"
    old.mkdir()
    (old / "config.json").write_text("{")
    check_message(refused(world, capfd, monkeypatch), "config.json is not usable")
    (old / "config.json").write_text(json.dumps(tiny_config(Path(), data={"loader": "plain"}, run={"seed": 8})))
    check_message(refused(world, capfd, monkeypatch), "another configuration", "run.seed: 8 -> 0", "--fresh")


def test_the_other_commands(world, capfd, monkeypatch):
    def message(*arguments):
        return refused(world, capfd, monkeypatch, *arguments, command=dmd2_fast)

    run = world / "run"
    for command in ("evaluate", "sample", "report"):
        check_message(message(command, "--run", "nowhere"), "nowhere does not exist")
    run.mkdir()
    (run / "config.json").write_text((world / "c.json").read_text())
    for command in ("evaluate", "sample"):
        check_message(message(command, "--run", "run"), "run has no generator.safetensors yet")
    for arguments, part in {
        ("--out", "x.jpg"): ".png",
        ("--out", "nowhere/x.png"): "no folder nowhere",
        ("--num", "0"): "below 1",
        ("--num", "many"): "no whole number",
    }.items():
        assert part in message("sample", "--run", "run", *arguments)
    for content in (b"", b"x" * 100):
        (run / "generator.safetensors").write_bytes(content)
        for command in ("evaluate", "sample"):
            check_message(message(command, "--run", "run"), "generator.safetensors", "cannot be read")
    for command in ("prepare --digits", "teacher", "config"):
        check_message(message(*command.split(), "--config", "nowhere"), "no such configuration file")
        check_message(message(*command.split(), "--config", "c.json", "--set", "run.x=1"), "unknown key")
    check_message(message("prepare", "--digits", "--config", "c.json"), "holds 40 train images", "expected 1437 digits")
    check_message(message("teacher", "--config", "c.json"), "something else", "--fresh")
    check_message(
        message("teacher", "--config", "c.json", "--fresh", "--set", "model.path=data"), "no teacher's folder"
    )
    check_message(
        message("teacher", "--config", "c.json", "--set", "data.path=x", "--set", "model.path=y"), "no folder x"
    )
    check_message(
        message("teacher", "--config", "c.json", "--set", "model.path=c.json/t"), "could not be opened or written"
    )


def damage_checkpoints():
    """Train, then start again on the checkpoint damaged in every way; for a process of its own."""
    Path("data/test-000000.tar").unlink()  # nothing to evaluate with
    dist.destroy_process_group = lambda: None  # one group serves all the starts: DeepSpeed keeps it
    assert main(["--config", "c.json", "--set", "run.iterations=1"]) == 0
    latest = next(Path("run/checkpoints").glob("iteration-*"))
    Path("run/generator.safetensors").unlink()  # else there is nothing left to do
    shutil.copytree(latest, "kept")
    files = sorted(
        path.relative_to("kept") for path in Path("kept").rglob("*") if path.is_file() and path.suffix != ".py"
    )
    assert len(files) == 6, files  # two of each engine, one of the rank, trainer.json
    damages = [(name, damage) for name in files for damage in (lambda content: content[: len(content) // 2], None)]
    damages += [(Path("trainer.json"), lambda _: b"{}"), (Path("trainer.json"), lambda _: b"[1]")]
    for name, damage in damages:
        path = latest / name
        if damage is None:
            path.unlink()
        else:
            path.write_bytes(damage(path.read_bytes()))
        before, message = tree(Path("run")), io.StringIO()
        with contextlib.redirect_stderr(message):
            assert main(["--config", "c.json", "--set", "run.iterations=1"]) == 2, (name, damage)
        assert tree(Path("run")) == before
        check_message(message.getvalue(), "checkpoint", latest.name, "--fresh")
        shutil.copy("kept" / name, path)


def test_a_damaged_checkpoint(world):
    code = "import test_train_errors as t; t.damage_checkpoints(); print('as expected')"
    environment = {**RUN_FLAGS["env"], "PYTHONPATH": str(ROOT / "tests")}
    done = subprocess.run(on_one_core([sys.executable, "-c", code]), cwd=world, **{**RUN_FLAGS, "env": environment})
    assert done.returncode == 0 and done.stdout.endswith("as expected\n"), done.stderr


FULL_DISK = """
import resource, sys
sys.path[:] = [entry for entry in sys.path if entry not in ("", {root!r})]
from dmd2_fast.stopping import StopSignals
from dmd2_fast.trainer import main
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
sys.exit(main(["--config", "c.json"]))
"""


def test_a_disk_that_is_full_at_the_first_file(world):
    """A limit on the size of a file fails a write as a full disk does."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = tree(world)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20, limits[1]))
        with pytest.raises(RunFolderError, match=r"run: the run folder cannot be written: .*File too large"):
            open_run(load_config("c.json"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert tree(world) == before


def test_a_disk_that_is_full_at_the_checkpoint(world):
    code = FULL_DISK.format(root=str(ROOT), limit=100_000)
    done = subprocess.run(on_one_core([sys.executable, "-c", code]), cwd=world, **RUN_FLAGS)
    assert done.returncode == 2, done.stderr
    check_message(done.stderr, "a file could not be opened or written", "Is the disk full")
    assert not list(world.rglob("*.tmp")) and not list(world.rglob(".lock"))


def test_two_ranks_speak_once(world):
    """DeepSpeed's launch.py with two ranks and no --config: usage and message of rank 0 alone."""
    command = [sys.executable, "-m", "deepspeed.launcher.launch", "--world_info=eyJsb2NhbGhvc3QiOiBbMCwgMV19"]
    command += ["--master_addr=127.0.0.1", "--master_port=29617", str(ROOT / "train.py")]
    done = subprocess.run(on_one_core(command), cwd=world, **RUN_FLAGS)
    assert done.returncode == 2
    assert done.stderr.count("usage:") == 1 and done.stderr.count("--config") == 2
    check_message(done.stderr, "the following arguments are required: --config")


def test_what_a_rank_alone_has_met_is_said_after_a_while(world, monkeypatch, capfd):
    monkeypatch.setattr(failures, "PATIENCE_SECONDS", 0)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    err = refused(world, capfd, monkeypatch, "--set", "data.path=nowhere")
    check_message(err, "error on rank 1: data.path: there is no folder nowhere")
    stop = StopSignals()
    assert failures.exit_code(DataError("x"), stop) == 2 and "error on rank 1: x" in capfd.readouterr().err
    assert failures.exit_code(RuntimeError("Connection closed by peer [127.0.0.1]:9"), stop) == 3  # nobody came
    assert "connection to another rank is lost" in capfd.readouterr().err
    assert failures.exit_code(RuntimeError("a mistake of ours"), stop) is None
    stop.number = signal.SIGTERM  # the launcher ends the ranks: rank 0 has spoken
    assert failures.exit_code(DataError("x"), stop) == 2
    assert failures.exit_code(RuntimeError("Connection closed by peer [127.0.0.1]:9"), stop) == 143
    assert failures.exit_code(RuntimeError("a mistake of ours"), stop) is None
    assert capfd.readouterr().err == ""
