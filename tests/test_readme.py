"""README.md and docs/: short enough to be read, links that lead somewhere, commands that the programs take."""

import re
import subprocess
from pathlib import Path

import pytest
from command_lines import arguments_of, commands_in, split_command

from dmd2_fast.cli_parser import COMMANDS, build_parser, parse_training_arguments
from dmd2_fast.config import load_config
from dmd2_fast.errors import ConfigError

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


def checked(words, parse):
    """The command parses, and the configuration it names takes the settings it gives."""
    if any("..." in word for word in words):  # left out on purpose
        return
    arguments = parse(["1" if re.fullmatch("[A-Z]+", word) else word for word in words])  # N, FILE and the like
    path = ROOT / (getattr(arguments, "config", None) or "none.json")
    if path.is_file():
        load_config(path, arguments.set)


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) < 150


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_command_lines_of_dmd2_fast(page):
    text = page.read_text()
    for words in commands_in(text, "dmd2-fast"):
        checked(words, build_parser().parse_args)
    names = {command.name for command in COMMANDS}
    for span in re.findall(r"`(dmd2-fast [^`]+)`", FENCE.sub("", text)):
        words = arguments_of(split_command(span))
        if words[1:] in ([], ["--help"]):  # a mention
            assert words[0] in names | {"COMMAND"}
        else:
            checked(words, build_parser().parse_args)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_command_lines_of_training(page):
    text = page.read_text()
    for program in ("deepspeed", "srun"):
        for words in commands_in(text, program):
            checked(words, parse_training_arguments)
    for span in re.findall(r"`((?:deepspeed|srun|torchrun) [^`]*train.py [^`]+)`", FENCE.sub("", text)):
        checked(arguments_of(split_command(span)), parse_training_arguments)
    for span in re.findall(r"`(--set [^`]+)`", FENCE.sub("", text)):
        settings = split_command(span)
        try:
            checked(["--config", "ds_sdxl.json", *settings], parse_training_arguments)
        except ConfigError:  # what makes no sense with independent passes or prompts may do so on the digits
            checked(["--config", "ds_digits.json", *settings], parse_training_arguments)


def anchors(page):
    """What GitHub makes of a page's headings: lower case, no punctuation, hyphens for spaces."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_of_the_repository(page):
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a checkout")
    tracked = {ROOT / name for name in done.stdout.splitlines()}
    known = tracked | {parent for path in tracked for parent in path.parents}
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", page.read_text())):
        if re.match(r"\w+:", target):  # another site
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path in known, f"{target} is not in the repository"
        assert not anchor or anchor in anchors(path), f"{target}: no such heading"
