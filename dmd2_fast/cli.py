"""`dmd2-fast`: one subcommand for every step around training, each handing over to one function."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from pathlib import Path

from dmd2_fast.cli_parser import build_parser
from dmd2_fast.errors import UserError
from dmd2_fast.failures import message_of
from dmd2_fast.plan_cli import run_plan
from dmd2_fast.stopping import StopRequested, StopSignals

PREPARE_OPTIONS = ("resolution", "batch_size", "samples_per_shard", "dtype", "size_condition", "device")


def _doctor(_: argparse.Namespace) -> None:
    from dmd2_fast.doctor import doctor

    print(doctor())


def _prepare(arguments: argparse.Namespace) -> None:
    from dmd2_fast.config import load_config

    config = load_config(arguments.config, arguments.set)
    options = {name: value for name in PREPARE_OPTIONS if (value := getattr(arguments, name)) is not None}
    if not arguments.digits:
        from dmd2_fast.prepare import Options, prepare

        number, left_out = prepare(
            config, images=arguments.images, prompts=arguments.prompts, options=Options(**options)
        )
        listed = f", {left_out} inputs left out, listed in left_out.jsonl" if left_out else ""
        print(f"{config.data.path}: {number} samples{listed}")
        return
    if options or config.data.kind != "webdataset":
        what = f"--{next(iter(options)).replace('_', '-')}" if options else f"data.kind {config.data.kind}"
        raise UserError(f"{what} is for --images and --prompts: the digits have a form of their own (webdataset)")
    from dmd2_fast.data import prepare_digits

    prepare_digits(config.data.path)
    print(f"{config.data.path}: ready")


def _teacher(arguments: argparse.Namespace) -> None:
    from dmd2_fast.config import load_config

    config = load_config(arguments.config, arguments.set)
    if config.teacher.training is None:
        raise UserError(
            f"{arguments.config}: dmd2_fast.teacher.training is null, so there is no teacher to train: "
            f"{config.model.path} is taken as it is."
        )
    from dmd2_fast.teacher import train_teacher

    train_teacher(config, fresh=arguments.fresh)


def _config(arguments: argparse.Namespace) -> None:
    if arguments.schema:
        from dmd2_fast.config_json_schema import schema_text

        print(schema_text(), end="")
        return
    from dmd2_fast.config import load_config

    config = load_config(arguments.config, arguments.set, arguments.ranks)
    if importlib.util.find_spec("deepspeed") is not None:
        from dmd2_fast.config_deepspeed import validate_with_deepspeed

        with redirect_stdout(sys.stderr):  # importing DeepSpeed logs to what stdout is then
            validate_with_deepspeed(config.deepspeed, arguments.ranks)
    print(json.dumps(config.to_dict(), indent=2))


def _completion(arguments: argparse.Namespace) -> None:
    from dmd2_fast.completion import completion_script

    print(completion_script(build_parser(), arguments.shell))


def _run_folder(arguments: argparse.Namespace) -> Path:
    """The folder named as an argument or after --run."""
    named = [folder for folder in (arguments.folder, arguments.run) if folder is not None]
    if len(named) != 1:
        raise UserError(f"expected one folder, got {len(named)}: name a run, such as runs/digits")
    return Path(named[0])


def _existing_run(arguments: argparse.Namespace) -> Path:
    from dmd2_fast.errors import RunFolderError
    from dmd2_fast.runs import is_run_folder

    run = _run_folder(arguments)
    if not is_run_folder(run):
        what = "has no config.json" if run.is_dir() else "does not exist"
        raise RunFolderError(f"{run} {what}: expected the folder of a run, such as runs/digits.")
    return run


def _finished_run(arguments: argparse.Namespace) -> Path:
    from dmd2_fast.errors import RunFolderError

    run = _existing_run(arguments)
    if not (run / "generator.safetensors").is_file():
        raise RunFolderError(
            f"{run} has no generator.safetensors yet, which the last iteration writes: "
            "the command that started the run goes on with it."
        )
    return run


def _evaluate(arguments: argparse.Namespace) -> None:
    run = _finished_run(arguments)
    from dmd2_fast.evaluation import evaluate_run
    from dmd2_fast.locks import acquire
    from dmd2_fast.report import format_table, write_report
    from dmd2_fast.runs import LOCK_FILE

    with acquire(run / LOCK_FILE, str(run)):
        print(format_table(evaluate_run(run)))
        write_report(run)


def _sample(arguments: argparse.Namespace) -> None:
    from dmd2_fast.runs import METADATA_FILE

    folder = _run_folder(arguments)
    if not (folder / METADATA_FILE).is_file():  # no export, so a run
        folder = _finished_run(arguments)
    from dmd2_fast.sampling import sample_run

    sample_run(
        folder, arguments.num, arguments.seed, Path(arguments.out), prompts=arguments.prompt,
        prompts_file=arguments.prompts, pipeline=arguments.pipeline, dtype=arguments.dtype,
    )  # fmt: skip
    print(arguments.out)


def _pairs(arguments: argparse.Namespace) -> None:
    from dmd2_fast.config import load_config

    config = load_config(arguments.config, arguments.set)
    from dmd2_fast.pairs import PairsOptions, make_pairs, pairs_summary

    options = PairsOptions(
        arguments.num, arguments.steps, arguments.guidance, arguments.batch_size, arguments.dtype
    )  # fmt: skip
    print(pairs_summary(make_pairs(config, options)))


def _export(arguments: argparse.Namespace) -> None:
    run = _finished_run(arguments)
    from dmd2_fast.export_folder import export_run

    print(export_run(run, arguments.format, arguments.out, full=arguments.full, dtype=arguments.dtype))


def _report(arguments: argparse.Namespace) -> None:
    run = _existing_run(arguments)
    from dmd2_fast.report import write_report

    print(write_report(run))


ACTIONS: dict[str, Callable[[argparse.Namespace], None]] = {
    "config": _config,
    "plan": run_plan,
    "prepare": _prepare,
    "teacher": _teacher,
    "pairs": _pairs,
    "report": _report,
    "evaluate": _evaluate,
    "sample": _sample,
    "export": _export,
    "doctor": _doctor,
    "completion": _completion,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; 0, 128 + the signal that stopped it, or 2 with the message where the user can mend it."""
    arguments = build_parser().parse_args(argv)
    stop = StopSignals()
    stop.listen()
    try:
        with stop.at_once():
            ACTIONS[arguments.command](arguments)
            sys.stdout.flush()
    except (StopRequested, KeyboardInterrupt):
        print("dmd2-fast: stopped", file=sys.stderr)
        return 128 + (stop.number or signal.SIGINT)
    except BrokenPipeError:  # the reader of a pipe, such as head, has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception as error:
        message = message_of(error)
        if message is None:
            raise
        print(f"dmd2-fast: error: {message}", file=sys.stderr)
        return 2
    finally:
        stop.restore()
    return 0


if __name__ == "__main__":
    sys.exit(main())
