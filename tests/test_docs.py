"""The examples in docs/ run, and print what they say."""

import doctest
import sys
from pathlib import Path

import pytest
from tiny import ROOT

PAGES = [page for page in sorted((ROOT / "docs").glob("*.md")) if ">>> " in page.read_text()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_examples_of(page: Path, monkeypatch):
    stand_in = ROOT / "tests" / "fastgen_stand_in"
    if stand_in.is_dir():
        monkeypatch.setattr(sys, "path", [str(stand_in), *sys.path])
    result = doctest.testfile(str(page), module_relative=False, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.attempted and not result.failed


def test_the_page_that_needs_them_has_examples():
    assert "drop_in.md" in [page.name for page in PAGES]
