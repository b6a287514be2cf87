"""`dmd2-fast`: one subcommand for every step around training, each handing over to one function."""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from dmd2_fast.errors import UserError
from dmd2_fast.failures import message_of
from dmd2_fast.plan_cli import add_plan
from dmd2_fast.stopping import StopRequested, StopSignals

DTYPES = ("float32", "float16", "bfloat16")
DESCRIPTION = """Few-step distillation of diffusion models: everything around the training itself,
which is `deepspeed train.py --config ds_digits.json`."""
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
    from dmd2_fast.config import load_config

    config = load_config(arguments.config, arguments.set, arguments.ranks)
    if importlib.util.find_spec("deepspeed") is not None:
        from dmd2_fast.config_deepspeed import validate_with_deepspeed

        with redirect_stdout(sys.stderr):  # importing DeepSpeed logs to what stdout is then
            validate_with_deepspeed(config.deepspeed, arguments.ranks)
    print(json.dumps(config.to_dict(), indent=2))


def _run_folder(arguments: argparse.Namespace) -> Path:
    """The folder named as an argument or after --run."""
    named = [folder for folder in (getattr(arguments, "folder", None), arguments.run) if folder is not None]
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


def _at_least(minimum: int, limit: int = 2**63) -> Callable[[str], int]:
    def number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number") from None
        if value < minimum:
            raise argparse.ArgumentTypeError(f"{value} is below {minimum}")
        if value >= limit:
            raise argparse.ArgumentTypeError(f"{value} is {limit} or more")
        return value

    return number


def _sample_file(text: str) -> str:
    if Path(text).suffix not in (".png", ".safetensors"):
        raise argparse.ArgumentTypeError(f"{text!r} ends neither in .png nor in .safetensors")
    if not Path(text).absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {Path(text).parent}")
    return text


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """`--config FILE` and a repeatable `--set dotted.key=value`."""
    parser.add_argument("--config", required=True, metavar="FILE", help="configuration, such as ds_digits.json")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override one setting, as in run.iterations=500; the value is JSON, or else text (repeatable)",
    )


def parse_training_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line of train.py; usage and help come from rank 0 alone."""
    parser = argparse.ArgumentParser(
        prog="train.py",
        description="Distil a diffusion model with DMD2.",
        epilog="example: deepspeed train.py --config ds_digits.json --set run.iterations=500",
    )
    add_config_arguments(parser)
    parser.add_argument("--fresh", action="store_true", help="move an existing run folder aside and start anew")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the launcher appends it
    if os.environ.get("RANK", "0") == "0":
        return parser.parse_args(argv)
    text = io.StringIO()
    try:
        with redirect_stderr(text), redirect_stdout(text):
            return parser.parse_args(argv)
    except SystemExit as end:
        if end.code:
            raise UserError(text.getvalue()) from None  # which rank 0 has said
        raise


def _add_run_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", required=True, metavar="FOLDER", help="folder of a run, such as runs/digits")


def _add_prepare_arguments(prepare: argparse.ArgumentParser) -> None:
    source = prepare.add_mutually_exclusive_group(required=True)
    source.add_argument("--digits", action="store_true", help="the 1,797 handwritten digits that scikit-learn ships")
    source.add_argument(
        "--images",
        metavar="FOLDER",
        help="images with captions (NAME.txt beside each, or metadata.jsonl), to latents and text embeddings",
    )
    source.add_argument(
        "--prompts", metavar="FILE", help="one prompt a line, to text embeddings alone, for runs without a GAN"
    )
    side = "side of the images (default: the model's)"
    prepare.add_argument("--resolution", type=_at_least(1), metavar="PIXELS", help=side)
    prepare.add_argument("--batch-size", type=_at_least(1), help="encoded together (default: 4 images, 64 prompts)")
    prepare.add_argument("--samples-per-shard", type=_at_least(1), help="inputs of one tar file (default: 1000)")
    stored = "what is stored (default: float16); the encoders run in f32"
    prepare.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), help=stored)
    sizes = "SDXL's time_ids: the size that is sampled in (default), or each image's own size and crop"
    prepare.add_argument("--size-condition", choices=("target", "image"), help=sizes)
    prepare.add_argument("--device", help="where the encoders run (default: cuda where there is one)")


def _add_folder_argument(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("folder", nargs="?", metavar="FOLDER", help=what)
    parser.add_argument("--run", metavar="FOLDER", help="the same")


def _add_pairs_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_arguments(parser)
    parser.add_argument("--num", type=_at_least(1), required=True, help="how many pairs")
    parser.add_argument("--steps", type=_at_least(1), default=50, help="steps of the teacher's sampler (default: 50)")
    parser.add_argument("--guidance", type=float, metavar="SCALE", help="default: teacher.guidance_scale")
    parser.add_argument("--batch-size", type=_at_least(1), help="sampled together (default: 4 of text, 500 of classes)")
    parser.add_argument("--dtype", choices=DTYPES, help="dtype of the teacher (default: bfloat16 for text on a GPU)")


def _add_sample_arguments(parser: argparse.ArgumentParser) -> None:
    _add_folder_argument(parser, "folder of a finished run, such as runs/digits, or of an export")
    parser.add_argument("--num", type=_at_least(1), help="how many samples (default: one a prompt, 64 of classes)")
    parser.add_argument("--seed", type=_at_least(0), default=0, help="seed of the noise (default: 0)")
    parser.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="what to show (repeatable)")
    parser.add_argument("--prompts", metavar="FILE", help="text file with one prompt a line")
    parser.add_argument(
        "--pipeline", metavar="FOLDER", help="pipeline whose text encoders and VAE are used (default: the teacher's)"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="dtype of the weights (default: bfloat16 for text on a GPU)")
    parser.add_argument(
        "--out", type=_sample_file, default="samples.png", metavar="FILE",
        help=".png or .safetensors (default: samples.png)",
    )  # fmt: skip


def _add_export_arguments(parser: argparse.ArgumentParser) -> None:
    _add_folder_argument(parser, "folder of a finished run, such as runs/sdxl")
    parser.add_argument(
        "--format", required=True, choices=("diffusers", "lora"), help="UNet in diffusers' layout, or the adapter alone"
    )
    parser.add_argument("--out", required=True, metavar="FOLDER", help="new folder to write")
    parser.add_argument("--full", action="store_true", help="a whole pipeline, the rest copied from model.path")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="dtype of the UNet (default: float32)")


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = argparse.ArgumentParser(
        prog="dmd2-fast",
        description=DESCRIPTION,
        epilog="example:\n  dmd2-fast doctor",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name: str, action: Callable[..., None], about: str, example: str) -> argparse.ArgumentParser:
        added = commands.add_parser(
            name,
            help=about,
            description=about[0].upper() + about[1:] + ".",
            epilog=f"example:\n  dmd2-fast {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        added.set_defaults(action=action)
        return added

    command("doctor", _doctor, "say what is installed, what each operator runs on and what is missing", "doctor")

    prepare = command(
        "prepare",
        _prepare,
        "write the training data as WebDataset shards, and go on where it was stopped",
        "prepare --images photos --config ds_sdxl.json",
    )
    _add_prepare_arguments(prepare)
    add_config_arguments(prepare)

    teacher = command("teacher", _teacher, "train the small teacher from nothing", "teacher --config ds_digits.json")
    add_config_arguments(teacher)
    teacher.add_argument("--fresh", action="store_true", help="move an existing teacher aside and train a new one")

    _add_run_argument(
        command(
            "evaluate", _evaluate, "measure a finished run and write its summary.json", "evaluate --run runs/digits"
        )
    )

    _add_sample_arguments(
        command(
            "sample",
            _sample,
            "draw samples from the generator of a run or an export",
            "sample runs/sdxl --prompt cats --num 4 --seed 1 --out cats.png",
        )
    )
    _add_pairs_arguments(
        command(
            "pairs",
            _pairs,
            "make a teacher's noise-image pairs, for the regression loss",
            "pairs --config ds_digits.json --set regression.path=data/digits-pairs --num 10000 --steps 18",
        )
    )
    _add_export_arguments(
        command(
            "export",
            _export,
            "write a run's generator as a folder that diffusers loads, with its timesteps",
            "export runs/sdxl --format diffusers --full --out sdxl-4step",
        )
    )
    _add_run_argument(
        command("report", _report, "write a run's report.html, also while it is going on", "report --run runs/digits")
    )

    add_plan(command, add_config_arguments)

    shown = command(
        "config",
        _config,
        "check a configuration and print it with every default",
        "config --config ds_digits.json --set run.iterations=500",
    )
    add_config_arguments(shown)
    shown.add_argument("--ranks", type=_at_least(1), default=1, help="ranks the batch must divide over (default: 1)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; 0, 128 + the signal that stopped it, or 2 with the message where the user can mend it."""
    arguments = build_parser().parse_args(argv)
    stop = StopSignals()
    stop.listen()
    try:
        with stop.at_once():
            arguments.action(arguments)
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
