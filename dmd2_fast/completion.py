"""`dmd2-fast completion`: shtab's script for the parser, with what each argument names on the disk."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import shtab


def _arguments(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                yield from _arguments(inner)


def completion_script(parser: argparse.ArgumentParser, shell: str) -> str:
    """The script for bash, zsh or tcsh; `parser` is marked with what its arguments complete to.

    Arguments whose metavar is FILE or FOLDER complete to those, `--config` to JSON files, choices to themselves.
    """
    named = {"FILE": shtab.FILE, "FOLDER": shtab.DIRECTORY}
    for action in _arguments(parser):
        found = shtab.glob("*.json") if action.dest == "config" else named.get(str(action.metavar))
        if found is not None:
            action.complete = found  # type: ignore[attr-defined]
    return shtab.complete(parser, shell=shell)
