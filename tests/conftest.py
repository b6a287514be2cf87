"""Fixtures that several suites share: a folder in which everything is sound, to break one thing in it."""

import json
import shutil
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def sound_folder(tmp_path_factory):
    """data/ with 40 training and 20 test images, and teacher/."""
    from tiny import tiny_denoiser, write_split

    from dmd2_fast.networks import save_denoiser

    folder = tmp_path_factory.mktemp("sound")
    write_split(folder / "data", "train", 40)
    write_split(folder / "data", "test", 20)
    save_denoiser(tiny_denoiser(), folder / "teacher")
    return folder


@pytest.fixture
def world(sound_folder, tmp_path, monkeypatch):
    """The test's folder with a copy of `sound_folder` and c.json for it; it is the current folder."""
    from tiny import tiny_config

    shutil.copytree(sound_folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "c.json").write_text(json.dumps(tiny_config(Path(), data={"loader": "plain"})))
    monkeypatch.chdir(tmp_path)
    return tmp_path
