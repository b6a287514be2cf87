"""`dmd2-fast`: what each subcommand hands on, messages without stack traces, exit codes, help."""

import json
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
from command_lines import commands_in

from dmd2_fast.cli import ACTIONS, build_parser, main
from dmd2_fast.cli_parser import COMMANDS, SHELLS, parse_training_arguments
from dmd2_fast.completion import completion_script
from dmd2_fast.config import load_config
from dmd2_fast.errors import DataError

ROOT = Path(__file__).parents[1]
DIGITS = str(ROOT / "ds_digits.json")


class Calls(list):
    """What the modules behind the subcommands were called with; `install` puts a stand-in for one in place."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.monkeypatch = monkeypatch

    def install(self, module, name, result):
        def function(*arguments, **keywords):
            self.append((name, *arguments, *keywords.items()))
            if isinstance(result, BaseException):
                raise result
            return result

        stand_in = types.ModuleType(f"dmd2_fast.{module}")
        setattr(stand_in, name, function)
        self.monkeypatch.setitem(sys.modules, f"dmd2_fast.{module}", stand_in)


@pytest.fixture
def calls(monkeypatch):
    calls = Calls(monkeypatch)
    calls.install("data", "prepare_digits", None)
    calls.install("teacher", "train_teacher", None)
    calls.install("evaluation", "evaluate_run", {"rows": [{"network": "generator", "evaluations": 4, "fd": 0.5}]})
    calls.install("sampling", "sample_run", None)
    calls.install("doctor", "doctor", "all is well")
    return calls


@pytest.fixture
def run_folder(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(load_config(DIGITS).to_dict()))
    (folder / "generator.safetensors").write_bytes(b"its content is the stand-ins' business")
    return folder


def test_config_prints_what_loads_again(capsys, tmp_path):
    assert main(["config", "--config", DIGITS, "--set", "run.iterations=7", "--set", "generator.ema=null"]) == 0
    path = tmp_path / "c.json"
    path.write_text(capsys.readouterr().out)
    assert load_config(path) == load_config(DIGITS, ["run.iterations=7", "generator.ema=null"])
    assert main(["config", "--config", DIGITS, "--ranks", "3"]) == 2
    assert "3 ranks" in capsys.readouterr().err


def test_prepare_and_teacher_get_what_the_config_says(calls):
    assert main(["prepare", "--digits", "--config", DIGITS, "--set", "data.path=elsewhere"]) == 0
    assert main(["teacher", "--config", DIGITS, "--set", "teacher.training.iterations=3"]) == 0
    assert calls[0] == ("prepare_digits", "elsewhere")
    assert calls[1] == ("train_teacher", load_config(DIGITS, ["teacher.training.iterations=3"]), ("fresh", False))
    assert main(["teacher", "--config", DIGITS, "--fresh"]) == 0
    assert calls[2] == ("train_teacher", load_config(DIGITS), ("fresh", True))


def test_commands_on_a_run(calls, run_folder, capsys):
    run = str(run_folder)
    assert main(["evaluate", "--run", run]) == 0
    assert "generator" in capsys.readouterr().out
    assert main(["sample", "--run", run, "--num", "9", "--seed", "4", "--out", "x.png"]) == 0
    assert main(["report", run]) == 0
    assert main(["doctor"]) == 0
    none = (("prompts", []), ("prompts_file", None), ("pipeline", None), ("dtype", None))
    sampled = ("sample_run", run_folder, 9, 4, Path("x.png"), *none)
    assert calls == [("evaluate_run", run_folder), sampled, ("doctor",)]
    assert "<!doctype html>" in (run_folder / "report.html").read_text()
    assert capsys.readouterr().out.splitlines() == ["x.png", str(run_folder / "report.html"), "all is well"]


@pytest.mark.parametrize("command", ["evaluate", "sample", "report", "export"])
def test_a_folder_is_named_once(command, capsys):
    """As an argument or after --run, which is the same; neither or both is an error."""
    needed = ["--format", "diffusers", "--out", "x"] if command == "export" else []
    for folders in ([], ["a", "--run", "a"]):
        assert main([command, *folders, *needed]) == 2
        assert f"expected one folder, got {2 if folders else 0}" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["evaluate", "sample", "report"])
def test_a_folder_that_is_no_run_is_one_line(calls, tmp_path, capsys, command):
    for folder, what in ((tmp_path / "missing", "does not exist"), (tmp_path, "has no config.json")):
        assert main([command, "--run", str(folder)]) == 2
        error = capsys.readouterr().err
        assert what in error and error.count("\n") == 1
    assert calls == [] and os.listdir(tmp_path) == []


def test_what_the_user_did_is_a_message_and_exit_2(calls, capsys):
    calls.install("data", "prepare_digits", DataError("data/digits: 0 images"))
    assert main(["prepare", "--digits", "--config", DIGITS]) == 2
    captured = capsys.readouterr()
    assert captured.err == "dmd2-fast: error: data/digits: 0 images\n" and captured.out == ""
    assert main(["teacher", "--config", DIGITS, "--set", "teacher.training=null"]) == 2
    assert "no teacher to train" in capsys.readouterr().err
    assert [name for name, *_ in calls] == ["prepare_digits"]


def test_our_own_mistakes_keep_their_stack_trace(calls):
    calls.install("data", "prepare_digits", ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        main(["prepare", "--digits", "--config", DIGITS])
    calls.install("data", "prepare_digits", KeyboardInterrupt())
    assert main(["prepare", "--digits", "--config", DIGITS]) == 130


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["nonsense"],
        ["sample", "--run", "x", "--num", "0"],
        ["sample", "--run", "x", "--seed", "-1"],
        ["sample", "--run", "x", "--num", "many"],
        ["config"],
        ["prepare", "--config", DIGITS],
    ],
)
def test_wrong_arguments_exit_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "usage: dmd2-fast" in capsys.readouterr().err


def shown_help(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--help"])
    assert stop.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", [command.name for command in COMMANDS])
def test_help_has_examples_that_parse(command, capsys):
    examples = list(commands_in(shown_help(capsys, command), "dmd2-fast"))
    assert len(examples) == len(next(item.examples for item in COMMANDS if item.name == command)) > 0
    for example in examples:
        assert example[0] == command
        arguments = build_parser().parse_args(example)
        assert arguments.command == command
        if getattr(arguments, "config", None):  # a file that the repository has, and settings that it takes
            load_config(ROOT / arguments.config, arguments.set, getattr(arguments, "ranks", 1))


def test_the_overview_lists_every_command_and_its_examples_parse(capsys):
    shown = shown_help(capsys)
    assert all(f"    {command.name} " in shown or f"    {command.name}\n" in shown for command in COMMANDS)
    assert {command.name for command in COMMANDS} == set(ACTIONS)
    assert {build_parser().parse_args(line).command for line in commands_in(shown, "dmd2-fast")} >= {"plan", "sample"}
    for line in commands_in(shown, "deepspeed"):
        load_config(ROOT / parse_training_arguments(line).config)


def test_the_examples_of_training_parse(capsys):
    with pytest.raises(SystemExit):
        parse_training_arguments(["--help"])
    lines = list(commands_in(capsys.readouterr().out, "deepspeed"))
    assert len(lines) == 2
    for line in lines:
        arguments = parse_training_arguments(line)
        load_config(ROOT / arguments.config, arguments.set)


# Completion


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    """What bash offers for the last of some words, with the script sourced, in a folder with a few files."""
    folder = tmp_path_factory.mktemp("completion")
    (folder / "script.bash").write_text(completion_script(build_parser(), "bash"))
    (folder / "my runs").mkdir()
    for name in ("one.json", "other.txt", "onward/deep.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()

    def offered(*words):
        # As readline does: the words, the place of the cursor's, then the function that is registered for the program.
        code = r"""source script.bash
            [[ $(complete -p dmd2-fast) =~ -F\ ([^ ]+) ]] && function=${BASH_REMATCH[1]}
            COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); $function
            printf '%s\n' "${COMPREPLY[@]}" """
        command = ["bash", "--norc", "-c", code, "bash", "dmd2-fast", *words]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
        return set(done.stdout.splitlines()) - {""}

    return offered


def test_bash_completes(complete):
    assert complete("ex") == {"export"}
    assert complete("") == {command.name for command in COMMANDS}
    assert complete("export", "--f") == {"--format", "--full"}
    assert complete("export", "--format", "") == {"diffusers", "lora"}
    assert complete("completion", "") == set(SHELLS)
    assert complete("config", "--config", "o") == {"one.json", "onward"}, "JSON files, and folders on the way to them"
    assert complete("config", "--config", "onward/") == {"onward/deep.json"}
    assert complete("report", "") == {"my runs", "onward"}, "a FOLDER"
    assert complete("prepare", "--prompts", "o") == {"one.json", "other.txt", "onward"}, "a FILE"


@pytest.mark.parametrize("shell", SHELLS)
def test_every_shell_takes_its_script(shell, tmp_path, capsys):
    assert main(["completion", shell]) == 0
    script = tmp_path / "script"
    script.write_text(capsys.readouterr().out)
    assert "size-condition" in script.read_text()
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell} here")
    subprocess.run([shell, "-n", str(script)], check=True)


def test_as_a_program(tmp_path):
    program = [sys.executable, "-m", "dmd2_fast.cli"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    broken = tmp_path / "c.json"
    broken.write_text('{"train_batch_size": 4,}')
    result = subprocess.run(
        [*program, "config", "--config", str(broken)], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith(f"dmd2-fast: error: {broken}:1:") and "Traceback" not in result.stderr
    assert os.listdir(tmp_path) == ["c.json"]
