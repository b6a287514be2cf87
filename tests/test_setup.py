"""The decisions of tools/setup_env.py: which torch is kept or fetched, which DALI and pins; its error messages."""

from __future__ import annotations

import importlib.util
import itertools
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
if not (ROOT / "tools" / "setup_env.py").is_file():
    pytest.skip("not a checkout", allow_module_level=True)

spec = importlib.util.spec_from_file_location("setup_env", ROOT / "tools" / "setup_env.py")
assert spec is not None and spec.loader is not None
setup_env = importlib.util.module_from_spec(spec)
sys.modules["setup_env"] = setup_env  # dataclasses look their module up
spec.loader.exec_module(setup_env)

Torch = setup_env.Torch
CONSTRAINTS = (ROOT / "constraints.txt").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

NAMED = [*PROJECT["dependencies"], *itertools.chain(*PROJECT["optional-dependencies"].values())]

HEADER = """\
+-----------------------------------------------------------------------------------------+
| NVIDIA-SMI {driver}             Driver Version: {driver}     {label}: {cuda}     |
|-----------------------------------------+------------------------+----------------------+
|   0  NVIDIA H100 80GB HBM3          On  |   00000000:04:00.0 Off |                    0 |
"""


@pytest.mark.parametrize(
    ("label", "cuda", "expected"),
    [("CUDA Version", "13.0", (13, 0)), ("CUDA Version", "12.4", (12, 4)), ("CUDA UMD Version", "13.1", (13, 1))],
)
def test_driver_cuda(label, cuda, expected):
    assert setup_env.driver_cuda(HEADER.format(driver="580.65.06", label=label, cuda=cuda)) == expected


def test_driver_cuda_without_gpu_and_without_version():
    assert setup_env.driver_cuda(None) is None
    assert setup_env.driver_cuda("| NVIDIA-SMI 999 |") == (0, 0)


@pytest.mark.parametrize(
    ("torch", "has_gpu", "usable"),
    [
        (None, False, False),
        (Torch("2.9.1", False), False, False),
        (Torch("2.10.0", False), False, True),
        (Torch("2.13.0+cpu", False), False, True),
        (Torch("2.13.0+cpu", False), True, False),  # a CPU build would leave the GPU unused
        (Torch("2.13.0+cu130", True), True, True),
        (Torch("2.11.0a0+eb27fa7", True), True, True),
        (Torch("2.9.1", True), True, False),
        (Torch("unknown", True), True, False),
    ],
)
def test_is_usable(torch, has_gpu, usable):
    assert setup_env.is_usable(torch, has_gpu) is usable


def test_torch_on_a_cpu_machine():
    own, pytorch, plain = setup_env.torch_attempts("2.13.0", has_gpu=False)
    assert own.pip[-1] == "torch==2.13.0+cpu" and "--index-url" not in own.pip
    assert pytorch.pip[-1] == "torch==2.13.0+cpu" and "https://download.pytorch.org/whl/cpu" in pytorch.pip
    assert plain.pip == ("torch==2.13.0",)


def test_torch_on_a_gpu_machine_never_takes_a_cpu_build():
    (only,) = setup_env.torch_attempts("2.13.0", has_gpu=True)
    assert only.pip == ("torch===2.13.0",)
    from packaging.requirements import Requirement

    assert not Requirement(only.pip[0]).specifier.contains("2.13.0+cpu")
    assert Requirement(only.pip[0]).specifier.contains("2.13.0")


@pytest.mark.parametrize(
    ("driver", "package"),
    [
        (None, "nvidia-dali-cuda130"),
        ((13, 0), "nvidia-dali-cuda130"),
        ((13, 2), "nvidia-dali-cuda130"),
        ((12, 9), "nvidia-dali-cuda120"),
        ((0, 0), "nvidia-dali-cuda120"),
    ],
)
def test_dali_package(driver, package):
    assert setup_env.dali_package(driver) == package
    assert setup_env.pinned(CONSTRAINTS, package)


def pins(text: str) -> dict[str, str]:
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return dict(line.split("==", 1) for line in lines)


def test_constraints_pin_everything_the_project_names():
    given = pins(CONSTRAINTS)
    assert given["torch"] == "2.13.0" and given["triton"] == "3.7.1"
    assert {setup_env.requirement_name(requirement) for requirement in NAMED} <= set(given)


def test_constraints_lie_within_the_ranges():
    from packaging.requirements import Requirement

    given = pins(CONSTRAINTS)
    for text in NAMED:
        requirement = Requirement(text)
        version = given[setup_env.requirement_name(text)]
        assert requirement.specifier.contains(version), f"{text} does not admit constraints.txt's {version}"


def test_constraints_for_the_pinned_torch():
    made = pins(setup_env.constraints_for(CONSTRAINTS, "2.13.0+cpu"))
    assert made == {**pins(CONSTRAINTS), "torch": "2.13.0+cpu"}


def test_constraints_for_another_torch_leave_it_its_triton():
    made = pins(setup_env.constraints_for(CONSTRAINTS, "2.12.0a0+5228986"))
    expected = {**pins(CONSTRAINTS), "torch": "2.12.0a0+5228986"}
    del expected["triton"]
    assert made == expected
    assert setup_env.triton_attempt(CONSTRAINTS, "2.12.0") is None
    assert setup_env.triton_attempt(CONSTRAINTS, "2.13.0+cu130").pip == ("triton==3.7.1",)


def test_requirements_leave_torch_to_its_own_step():
    names = {setup_env.requirement_name(requirement) for requirement in setup_env.requirements(PROJECT)}
    assert "torch" not in names
    assert {"deepspeed", "diffusers", "numpy", "scikit-learn", "pytest", "kernels"} <= names
    assert not any(name.startswith("nvidia-dali") or name == "triton" for name in names)


def test_missing_tools():
    everything = {"c++": True, "cmake": True, "make": True, "ninja": False}
    assert setup_env.missing_tools(everything) == []
    assert setup_env.missing_tools({**everything, "c++": False, "cmake": False}) == ["g++", "cmake"]
    assert setup_env.missing_tools({**everything, "make": False}) == ["make"]
    assert setup_env.missing_tools({**everything, "make": False, "ninja": True}) == []


def test_a_missing_pin_is_named():
    with pytest.raises(setup_env.SetupError, match="pins no triton"):
        setup_env.pinned("torch==2.13.0\n", "triton")


class FakeEnvironment:
    """Answers pip by a function of the arguments, and remembers what was asked."""

    folder = Path(".venv")
    python = "python"

    def __init__(self, works):
        self.works = works
        self.asked = []

    def pip(self, *arguments, env=None):
        self.asked.append(arguments)
        return self.works(arguments), "ERROR: No matching distribution found"


def install(monkeypatch, works, driver=None, present=None):
    environment = FakeEnvironment(works)
    monkeypatch.setattr(setup_env, "installed_torch", lambda python: present)
    monkeypatch.setattr(setup_env, "env_version", lambda environment, name: "2.13.0")
    setup_env.install_torch(environment, CONSTRAINTS, driver)
    return [arguments[-1] for arguments in environment.asked]


def test_install_torch_goes_through_the_indexes_in_order(monkeypatch):
    assert install(monkeypatch, lambda arguments: True) == ["torch==2.13.0+cpu"]
    only_pytorch = install(monkeypatch, lambda arguments: "--index-url" in arguments)
    assert only_pytorch == ["torch==2.13.0+cpu"] * 2
    assert install(monkeypatch, lambda arguments: arguments[-1] == "torch==2.13.0")[-1] == "torch==2.13.0"
    with pytest.raises(setup_env.SetupError, match="No matching distribution"):
        install(monkeypatch, lambda arguments: False)


def test_install_torch_keeps_a_usable_one(monkeypatch):
    assert install(monkeypatch, lambda arguments: True, present=Torch("2.14.1", False)) == []
    assert install(monkeypatch, lambda arguments: True, (13, 0), Torch("2.13.0+cpu", False)) == ["torch===2.13.0"]


def test_old_driver_is_warned_about(monkeypatch, capsys):
    install(monkeypatch, lambda arguments: True, driver=(12, 4))
    assert "serves CUDA 12.4" in capsys.readouterr().err


def test_failing_dali_warns_and_goes_on(monkeypatch, capsys):
    environment = FakeEnvironment(lambda arguments: False)
    environment.constraints = Path("constraints.txt")
    attempt = setup_env.Attempt("nvidia-dali-cuda130", ("nvidia-dali-cuda130",))
    setup_env.install_optional(environment, attempt, "the plain loader reads the data")
    message = capsys.readouterr().err
    assert "WARNING" in message and "nvidia-dali-cuda130" in message and "the plain loader reads the data" in message


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("ERROR: No matching distribution found for torch==2.13.0+cpu", "no such version there"),
        ("conflict\nERROR: ResolutionImpossible: for help visit ...", "no such version there"),
        ("Collecting\nERROR: [Errno 28] No space left on device\n\n", "ERROR: [Errno 28] No space left on device"),
        ("", "no message"),
    ],
)
def test_reason(output, expected):
    assert setup_env.reason(output) == expected


def test_no_compiler_says_what_to_install(monkeypatch):
    monkeypatch.setattr(setup_env.shutil, "which", lambda name: None)
    monkeypatch.setenv("DMD2_FAST_CPP", "1")
    with pytest.raises(setup_env.SetupError, match=r"apt-get install g\+\+ cmake make"):
        setup_env.install_project(FakeEnvironment(lambda arguments: True))


def test_no_venv_module_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(setup_env, "has_module", lambda name: False)
    monkeypatch.setattr(setup_env.shutil, "which", lambda name: f"/usr/bin/{name}")
    with pytest.raises(setup_env.SetupError, match="apt-get install python3-venv"):
        setup_env.Environment(tmp_path / "venv").create(see_system=False)
    assert not (tmp_path / "venv").exists()


def test_an_old_python_gets_a_message(monkeypatch, capsys):
    monkeypatch.setattr(setup_env.sys, "version_info", (3, 10, 2))
    assert setup_env.main() == 2
    assert "3.11 or newer is needed" in capsys.readouterr().out


def make(*arguments):
    """`make` as a user calls it: when make runs the tests, it leaves variables for makes below it."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(["make", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("STEPS=3", "STEPS is '3': expected 4"),
        ("STEPS=", "STEPS is ''"),
        ("RANKS=0", "RANKS is '0': expected 1 or more"),
        ("RANKS=-1", "RANKS is '-1'"),
        ("RANKS=two", "RANKS is 'two'"),
    ],
)
def test_the_makefile_refuses_other_steps_and_ranks(argument, message):
    done = make("train", argument)
    assert done.returncode != 0 and message in done.stderr


@pytest.mark.parametrize(
    ("arguments", "config", "ranks"),
    [((), "ds_digits.json", "1"), (("STEPS=1", "RANKS=2"), "configs/ds_digits_1step.json", "2")],
)
def test_make_train_runs_the_three_stages(arguments, config, ranks):
    done = make("-n", "train", *arguments)
    assert done.stdout.splitlines()[-3:] == [
        f".venv/bin/dmd2-fast prepare --digits --config {config}",
        f".venv/bin/dmd2-fast teacher --config {config}",
        f".venv/bin/python -m deepspeed.launcher.runner --num_accelerators {ranks} train.py --config {config}",
    ]
    assert (ROOT / config).is_file()
