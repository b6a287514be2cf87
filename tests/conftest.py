"""What several suites share: the backends of the operators, and a folder in which everything is sound."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch


def pytest_configure(config):
    """Without a GPU, Triton's kernels run in its interpreter; tests/compiled, run on its own, wants them compiled."""
    if not torch.cuda.is_available() and not any("compiled" in argument for argument in config.args):
        os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(params=["reference", "cpp", "triton"])
def backend(request):
    """Each backend in turn: the operators of the test run on it, on CPU tensors, or on a GPU's where Triton has one."""
    from dmd2_fast import dispatch, use_backend

    if reason := dispatch.missing(request.param):
        pytest.skip(reason)
    is_interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if request.param == "triton" and not is_interpreted and not torch.cuda.is_available():
        pytest.skip("the Triton kernels need a GPU or TRITON_INTERPRET=1")
    device = "cuda" if request.param == "triton" and not is_interpreted else "cpu"
    with use_backend(request.param), torch.device(device):
        yield request.param


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
