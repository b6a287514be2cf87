"""The command line as argparse knows it: commands, options, help and examples of `dmd2-fast`, options of train.py.

What a command does is in cli.py; this module imports nothing heavy. A test parses every example.
"""

from __future__ import annotations

import argparse
import io
import os
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

from dmd2_fast.errors import UserError
from dmd2_fast.plan_cli import add_plan_arguments

DTYPES = ("float32", "float16", "bfloat16")
SHELLS = ("bash", "zsh", "tcsh")
DESCRIPTION = """Few-step distillation of diffusion models: everything around the training itself,
which is `deepspeed train.py --config ds_digits.json`."""
OVERVIEW = """the embedded default, without a GPU (`make train` runs the first three):
  dmd2-fast prepare --digits --config ds_digits.json
  dmd2-fast teacher --config ds_digits.json
  deepspeed train.py --config ds_digits.json
  dmd2-fast sample runs/digits --num 100 --out more.png

SDXL:
  dmd2-fast plan --config ds_sdxl.json --gpus 8 --gpu-memory 80GB
  dmd2-fast prepare --images my-images --config ds_sdxl.json
  deepspeed train.py --config ds_sdxl.json
  dmd2-fast export runs/sdxl --format diffusers --out sdxl-4step

`dmd2-fast COMMAND --help` has examples of each command."""

Adder = Callable[[argparse.ArgumentParser], None]


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


def _add_set_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override one setting, as in run.iterations=500; the value is JSON, or else text (repeatable)",
    )


CONFIG_HELP = "configuration, such as ds_digits.json"


def _add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """`--config FILE` and a repeatable `--set dotted.key=value`."""
    parser.add_argument("--config", required=True, metavar="FILE", help=CONFIG_HELP)
    _add_set_argument(parser)


def _add_folder_argument(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("folder", nargs="?", metavar="FOLDER", help=what)
    parser.add_argument("--run", metavar="FOLDER", help="the same")


def _add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    _add_config_arguments(parser)
    add_plan_arguments(parser)


def _add_show_arguments(parser: argparse.ArgumentParser) -> None:
    shown = parser.add_mutually_exclusive_group(required=True)
    shown.add_argument("--config", metavar="FILE", help=CONFIG_HELP)
    shown.add_argument(
        "--schema", action="store_true", help="print the JSON Schema of a whole configuration instead, for editors"
    )
    _add_set_argument(parser)
    parser.add_argument("--ranks", type=_at_least(1), default=1, help="ranks the batch must divide over (default: 1)")


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
    _add_config_arguments(prepare)
    side = "side of the images (default: the model's)"
    prepare.add_argument("--resolution", type=_at_least(1), metavar="PIXELS", help=side)
    prepare.add_argument("--batch-size", type=_at_least(1), help="encoded together (default: 4 images, 64 prompts)")
    prepare.add_argument("--samples-per-shard", type=_at_least(1), help="inputs of one tar file (default: 1000)")
    stored = "what is stored (default: float16); the encoders run in f32"
    prepare.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), help=stored)
    sizes = "SDXL's time_ids: the size that is sampled in (default), or each image's own size and crop"
    prepare.add_argument("--size-condition", choices=("target", "image"), help=sizes)
    prepare.add_argument("--device", help="where the encoders run (default: cuda where there is one)")


def _add_teacher_arguments(parser: argparse.ArgumentParser) -> None:
    _add_config_arguments(parser)
    parser.add_argument("--fresh", action="store_true", help="move an existing teacher aside and train a new one")


def _add_pairs_arguments(parser: argparse.ArgumentParser) -> None:
    _add_config_arguments(parser)
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


def _add_evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    _add_folder_argument(parser, "folder of a finished run, such as runs/digits")


def _add_report_arguments(parser: argparse.ArgumentParser) -> None:
    _add_folder_argument(parser, "folder of a run, such as runs/digits")


def _add_export_arguments(parser: argparse.ArgumentParser) -> None:
    _add_folder_argument(parser, "folder of a finished run, such as runs/sdxl")
    parser.add_argument(
        "--format", required=True, choices=("diffusers", "lora"), help="UNet in diffusers' layout, or the adapter alone"
    )
    parser.add_argument("--out", required=True, metavar="FOLDER", help="new folder to write")
    parser.add_argument("--full", action="store_true", help="a whole pipeline, the rest copied from model.path")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="dtype of the UNet (default: float32)")


def _add_completion_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=SHELLS, help="the shell that reads the script")


def _add_nothing(_: argparse.ArgumentParser) -> None:
    pass


@dataclass(frozen=True)
class Command:
    """A subcommand, as its help shows it."""

    name: str
    about: str
    """What it does, after its name in the overview."""
    add_arguments: Adder
    examples: tuple[str, ...]
    """Command lines without the program's name; the shell reads them, so quotes and redirections may stand there."""


COMMANDS = (
    Command(
        "config",
        "check a configuration and print it with every default",
        _add_show_arguments,
        (
            "config --config ds_digits.json --ranks 2",
            "config --config ds_sdxl.json --set run.iterations=500 --set model.sample_size=64 --ranks 8",
            "config --schema > dmd2_fast.schema.json",
        ),
    ),
    Command(
        "plan",
        "say what a run needs on each GPU, computes and sends, without allocating it; exit code 2 where it cannot fit",
        _add_plan_arguments,
        (
            "plan --config ds_sdxl.json --gpus 8 --gpu-memory 80GB",
            "plan --config configs/ds_sdxl_lora.json --gpu-memory 24GB --peak-tflops 165",
            "plan --config ds_sdxl.json --gpus 8 --set train_micro_batch_size_per_gpu=4 --json",
        ),
    ),
    Command(
        "prepare",
        "write the training data as WebDataset shards, and go on where it was stopped",
        _add_prepare_arguments,
        (
            "prepare --digits --config ds_digits.json",
            "prepare --images my-images --config ds_sdxl.json",
            "prepare --prompts prompts.txt --config configs/ds_sd15_stage1.json",
        ),
    ),
    Command(
        "teacher",
        "train the small teacher from nothing",
        _add_teacher_arguments,
        (
            "teacher --config ds_digits.json",
            "teacher --config ds_digits.json --set teacher.training.iterations=4000 --fresh",
        ),
    ),
    Command(
        "pairs",
        "make a teacher's noise-image pairs, for the regression loss",
        _add_pairs_arguments,
        (
            "pairs --config ds_digits.json --set regression.path=data/digits-pairs --num 10000 --steps 18",
            "pairs --config configs/ds_sdxl_1step.json --num 10000",
        ),
    ),
    Command(
        "report",
        "write a run's report.html, also while it is going on",
        _add_report_arguments,
        ("report runs/digits",),
    ),
    Command(
        "evaluate",
        "measure a finished run again and write its summary.json",
        _add_evaluate_arguments,
        ("evaluate runs/digits",),
    ),
    Command(
        "sample",
        "draw samples from the generator of a run or an export",
        _add_sample_arguments,
        (
            "sample runs/digits --num 100 --seed 1 --out more.png",
            'sample runs/sdxl --prompt "a red cat" --num 4 --out cats.png',
            "sample sdxl-4step --prompts prompts.txt --out samples.safetensors",
        ),
    ),
    Command(
        "export",
        "write a run's generator as a folder that diffusers loads, with its timesteps",
        _add_export_arguments,
        (
            "export runs/sdxl --format diffusers --out sdxl-4step",
            "export runs/sdxl --format diffusers --full --dtype float16 --out sdxl-4step-pipeline",
            "export runs/sdxl-lora --format lora --out sdxl-4step-lora",
        ),
    ),
    Command(
        "doctor",
        "say what is installed, what each operator runs on, what is missing and how to get it",
        _add_nothing,
        ("doctor",),
    ),
    Command(
        "completion",
        "print a script by which a shell completes this command line at the tab key",
        _add_completion_arguments,
        (
            "completion bash > ~/.dmd2-fast.bash && echo 'source ~/.dmd2-fast.bash' >> ~/.bashrc",
            "completion zsh > ~/.dmd2-fast.zsh && echo 'eval \"$(<~/.dmd2-fast.zsh)\"  # after compinit' >> ~/.zshrc",
            "completion tcsh > ~/.dmd2-fast.tcsh && echo 'source ~/.dmd2-fast.tcsh' >> ~/.cshrc",
        ),
    ),
)
"""In the order in which a newcomer meets them."""


def build_parser() -> argparse.ArgumentParser:
    """The whole command line of `dmd2-fast`; `command` of what it parses is the subcommand's name."""
    parser = argparse.ArgumentParser(
        prog="dmd2-fast",
        description=DESCRIPTION,
        epilog=OVERVIEW,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command", required=True)
    for command in COMMANDS:
        examples = "\n".join(f"  dmd2-fast {example}" for example in command.examples)
        added = commands.add_parser(
            command.name,
            help=command.about,
            description=command.about[0].upper() + command.about[1:] + ".",
            epilog=f"{'examples' if len(command.examples) > 1 else 'example'}:\n{examples}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_arguments(added)
    return parser


def parse_training_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line of train.py; usage and help come from rank 0 alone."""
    parser = argparse.ArgumentParser(
        prog="train.py",
        description="Distil a diffusion model with DMD2; the same command goes on with an interrupted run.",
        epilog="examples:\n"
        "  deepspeed train.py --config ds_digits.json --set run.iterations=500 --set run.folder=runs/short\n"
        "  deepspeed --num_gpus 4 train.py --config ds_sdxl.json",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_config_arguments(parser)
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
