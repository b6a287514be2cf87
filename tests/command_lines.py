"""Command lines as help texts and documents show them, split into words."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator

SHELL_SIGNS = (">", ">>", "&&", "|", "\\")


def split_command(line: str) -> list[str]:
    """The words of a line's first command: up to a comment, a redirection or the next command."""
    words = shlex.split(line, comments=True)
    return words[: next((i for i, word in enumerate(words) if word in SHELL_SIGNS), len(words))]


def arguments_of(words: list[str]) -> list[str]:
    """What a program gets: what follows its name, or `train.py` where the program is a launcher."""
    return words[words.index("train.py") + 1 if "train.py" in words else 1 :]


def commands_in(text: str, program: str) -> Iterator[list[str]]:
    """The arguments in every line that starts with a program's name, indented or after a prompt."""
    for line in text.splitlines():
        if re.match(rf"\s*(\$ )?{program} ", line):
            yield arguments_of(split_command(line.strip().removeprefix("$ ")))
