"""The doctor: findings for what is there, missing and broken, and no exception whatever is wrong."""

import re
import sys
import tomllib
import types
from pathlib import Path

import pytest

from dmd2_fast import doctor as module
from dmd2_fast.doctor import Package, check_package, check_tools, doctor

ROOT = Path(__file__).parents[1]


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """A folder on sys.path with packages that break in several ways."""
    sources = {
        "fine_package": "print('chatter')\nimport sys\nsys.stderr.write('more chatter')\n",
        "raising_package": "raise RuntimeError('libmissing.so:\\n  cannot open')\n",
        "exiting_package": "raise SystemExit('no GPU')\n",
        "typo_package": "this is no python\n",
    }
    for name, text in sources.items():
        (tmp_path / f"{name}.py").write_text(text)
    (tmp_path / "broken_parent").mkdir()
    (tmp_path / "broken_parent" / "__init__.py").write_text("1 / 0\n")
    (tmp_path / "broken_parent" / "child.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in (*sources, "broken_parent"):
        sys.modules.pop(name, None)


def make(name, **arguments):
    return Package(name.title(), name, (name,), "a test", f"pip install {name}", **arguments)


def test_a_package_that_imports_is_ok_and_kept_quiet(packages, capsys):
    assert check_package(make("fine_package")).state == "ok"
    assert capsys.readouterr() == ("", "")
    installed = check_package(Package("pytest", "pytest", ("no-such-name", "pytest"), "tests", ""))
    assert installed.state == "ok" and installed.detail == pytest.__version__


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("raising_package", "RuntimeError: libmissing.so: cannot open"),
        ("exiting_package", "SystemExit: no GPU"),
        ("typo_package", "SyntaxError"),
        ("broken_parent.child", "ZeroDivisionError"),
    ],
)
def test_a_package_that_breaks_is_reported_and_not_raised(packages, name, words):
    finding = check_package(make(name))
    assert finding.state == "broken" and words in finding.detail and "\n" not in finding.detail
    assert finding.install.startswith(f"pip install {name}")


@pytest.mark.parametrize("name", ["not_here_at_all", "not_here.at_all"])
def test_a_package_that_is_missing(name):
    finding = check_package(make(name))
    assert finding.state == "missing" and finding.install == f"pip install {name}"


def test_tools_are_looked_up_on_the_path(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert [finding.state for finding in check_tools()] == ["missing", "missing"]
    for name, script in (("g++", "#!/bin/sh\necho imaginary 1.2\n"), ("cmake", "#!/bin/sh\nexit 1\n")):
        (tmp_path / name).write_text(script)
        (tmp_path / name).chmod(0o755)
    compiler, cmake = check_tools()
    assert (compiler.state, compiler.detail) == ("ok", "imaginary 1.2")
    assert cmake.state == "broken"


def test_packages_for_gpus_are_missed_where_there_is_one(monkeypatch):
    import torch

    package = make("not_here_at_all", required=False, gpu_only=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    finding = check_package(package)
    assert (finding.state, finding.install) == ("note", "") and "GPU" in finding.detail
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert check_package(package).state == "missing"


def test_the_launcher_is_looked_up_on_the_path(tmp_path, monkeypatch):
    scripts = tmp_path / "venv" / "bin"
    scripts.mkdir(parents=True)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(scripts / "python"))
    absent = module.check_launcher()
    assert absent.state == "missing" and absent.install.startswith("pip install") and "deepspeed" in absent.install
    for name in ("deepspeed", "activate"):
        (scripts / name).touch(mode=0o755)
    asleep = module.check_launcher()
    assert (asleep.state, asleep.install) == ("missing", f"source {scripts / 'activate'}")
    monkeypatch.setenv("PATH", str(scripts))
    found = module.check_launcher()
    assert (found.state, found.detail) == ("ok", str(scripts / "deepspeed"))


def test_every_optional_dependency_is_looked_for():
    """What pyproject.toml's extras bring for use (not for development), and what the code takes where it is there."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    names = {re.match("[a-z0-9-]+", wanted)[0] for name in ("gpu", "data", "text") for wanted in extras[name]}
    known = {name: package for package in module.PACKAGES for name in package.distributions}
    assert names | {"lpips", "flash-attn", "apex", "tensorboard"} <= known.keys()
    assert not any(known[name].required for name in names)
    assert all(package.use and package.install for package in module.PACKAGES)


def test_the_report_names_what_is_missing_and_how_to_get_it(monkeypatch, packages):
    wanted = (make("fine_package"), make("not_here_at_all", required=False), make("raising_package"))
    monkeypatch.setattr(module, "PACKAGES", wanted)
    lines = doctor().splitlines()
    todo = lines[lines.index("To do") + 1 :]
    assert todo[0] == "  Raising_Package (required):  pip install raising_package --force-reinstall"
    assert "  Not_Here_At_All (optional):  pip install not_here_at_all" in todo
    assert not any("Fine_Package" in line for line in todo)


def test_the_report_says_what_every_operator_runs_on(monkeypatch):
    monkeypatch.setattr(module, "PACKAGES", ())
    import dmd2_fast

    table = {
        "one": {"cpu": ("cpp", "why"), "cuda": ("triton", "")},
        "another": {"cpu": "reference", "cuda": "reference"},
    }
    monkeypatch.setattr(dmd2_fast, "backends", lambda: table)
    lines = doctor().splitlines()
    rows = [line.split() for line in lines[lines.index("Operators") + 2 :]][:2]
    assert rows == [["one", "cpp", "triton"], ["another", "reference", "reference"]]


def test_the_real_operators_are_listed(monkeypatch):
    monkeypatch.setattr(module, "PACKAGES", ())
    from dmd2_fast import backends

    text = doctor()
    for name, row in backends().items():
        assert any(line.split() == [name, row["cpu"][0], row["cuda"][0]] for line in text.splitlines())


def test_nothing_that_is_wrong_with_the_machine_raises(monkeypatch):
    monkeypatch.setattr(module, "PACKAGES", (make("not_here_at_all"),))

    def breaks(*_):
        raise OSError("driver has gone away")

    for name in ("check_package", "check_launcher", "check_tools", "check_machine", "check_extension", "_backend_rows"):
        monkeypatch.setattr(module, name, breaks)
    monkeypatch.setattr(module.metadata, "version", breaks)
    assert doctor().count("driver has gone away") >= 6


def test_a_driver_that_torch_cannot_use_is_a_finding(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(module.shutil, "which", lambda name: "/usr/bin/nvidia-smi" if name == "nvidia-smi" else None)
    gpu = module.check_machine()[-1]
    assert gpu.state == "broken" and "torch" in gpu.install
    monkeypatch.setattr(module.shutil, "which", lambda name: None)
    assert module.check_machine()[-1].state == "note"
    device = types.SimpleNamespace(name="Imaginary 9", total_memory=80 * 2**30, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: device)
    assert "Imaginary 9, 80 GiB, sm_90" in module.check_machine()[-1].detail
