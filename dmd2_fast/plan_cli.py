"""The command line of `dmd2-fast plan`."""

from __future__ import annotations

import argparse
import sys

from dmd2_fast.errors import UserError

MAX_GPUS = 1 << 20


def run_plan(arguments: argparse.Namespace) -> None:
    """Print the plan; `UserError` where it cannot fit."""
    from dmd2_fast.plan import Machine, format_plan, make_plan, refusal, to_json

    machine = Machine(
        arguments.gpus, arguments.gpu_memory, arguments.peak_tflops, arguments.efficiency, arguments.bandwidth,
        arguments.reserve,
    )  # fmt: skip
    plan = make_plan(arguments.config, arguments.set, machine)
    print(to_json(plan) if arguments.json else format_plan(plan))
    if not plan.fits:
        sys.stdout.flush()
        raise UserError(refusal(plan))


def _count(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number") from None
    if not 1 <= value <= MAX_GPUS:
        raise argparse.ArgumentTypeError(f"{value} is not in 1..{MAX_GPUS}")
    return value


def _bytes(text: str) -> int:
    """80GB, 40GiB, 2e9: bytes."""
    units = {"GB": 10**9, "GIB": 2**30, "MB": 10**6, "MIB": 2**20, "G": 10**9, "": 1}
    number = text.rstrip("BGMKgbmkiI")
    try:
        value = float(number) * units[text[len(number) :].upper()]
    except (ValueError, KeyError):
        raise argparse.ArgumentTypeError(f"{text!r} is no size: expected one such as 80GB or 75GiB") from None
    if not 0 < value < 2**63:
        raise argparse.ArgumentTypeError(f"{text!r} is no size above 0")
    return int(value)


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number") from None
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{value} is not above 0")
    return value


def add_plan_arguments(plan: argparse.ArgumentParser) -> None:
    """The machine that is planned for, and the form of the answer."""
    plan.add_argument("--gpus", type=_count, default=1, help="GPUs, one rank each (default: 1)")
    plan.add_argument("--gpu-memory", type=_bytes, default="80GB", metavar="SIZE", help="of one (default: 80GB)")
    plan.add_argument(
        "--peak-tflops", type=_positive, default=312.0, metavar="N", help="of one GPU (default: 312, A100 in bf16)"
    )
    plan.add_argument(
        "--efficiency", type=_positive, default=0.4, metavar="SHARE", help="of the peak that is reached (default: 0.4)"
    )
    plan.add_argument(
        "--bandwidth", type=_positive, default=100.0, metavar="GB/S", help="that a GPU receives (default: 100)"
    )
    plan.add_argument(
        "--reserve", type=_bytes, default="2GiB", metavar="SIZE",
        help="for CUDA's context, workspaces and fragmentation (default: 2GiB)",
    )  # fmt: skip
    plan.add_argument("--json", action="store_true", help="print JSON: bytes, FLOPs, seconds")
