"""Makes .venv, with everything the project needs; `make setup` runs it. Standard library only, safe to run again.

What it decides, in functions without side effects (tests/test_setup.py):

- A usable torch is kept: one in .venv already, or one of the base interpreter, which .venv then sees
  (--system-site-packages). Usable: torch >= 2.10 that imports and, where nvidia-smi works, reaches the GPU.
- Otherwise, where nvidia-smi works, the plain wheel, which is the CUDA build. Elsewhere the CPU build: torch's `+cpu`
  version from the configured indexes, then from PyTorch's own CPU wheel index; the plain wheel where neither has one.
- DALI for the driver's CUDA version: it and Triton are optional, so a failing install warns and setup goes on.
- Everything else at the versions of constraints.txt; the project itself editable, with its C++ operators.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CPU_WHEELS = "https://download.pytorch.org/whl/cpu"
OLDEST_PYTHON = (3, 11)
OLDEST_TORCH = (2, 10)
APT = "apt-get install"


class SetupError(Exception):
    """Setup cannot go on; the message says what to do."""


@dataclass(frozen=True)
class Torch:
    """An installed torch: version as in torch.__version__, whether it reaches a GPU."""

    version: str
    cuda_available: bool


@dataclass(frozen=True)
class Attempt:
    """One way to get a package: what to tell the user, and pip's arguments."""

    what: str
    pip: tuple[str, ...]


# Decisions


def version_tuple(version: str) -> tuple[int, ...]:
    """(2, 13, 0) of "2.13.0a0+git": the leading numbers."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in match.group().split(".")) if match else ()


def driver_cuda(nvidia_smi: str | None) -> tuple[int, int] | None:
    """The newest CUDA the driver serves, from nvidia-smi's output; (0, 0) if it does not say, None without a GPU."""
    if nvidia_smi is None:
        return None
    match = re.search(r"CUDA (?:UMD |Driver )?Version\s*:\s*(\d+)\.(\d+)", nvidia_smi)
    return (int(match.group(1)), int(match.group(2))) if match else (0, 0)


def is_usable(torch: Torch | None, has_gpu: bool) -> bool:
    """Whether an installed torch is kept."""
    if torch is None or version_tuple(torch.version)[:2] < OLDEST_TORCH:
        return False
    return torch.cuda_available or not has_gpu


def pinned(constraints: str, name: str) -> str:
    """The version that constraints.txt pins a package to."""
    match = re.search(rf"^{re.escape(name)}==(\S+)$", constraints, re.MULTILINE | re.IGNORECASE)
    if match is None:
        raise SetupError(f"constraints.txt pins no {name}: expected a line {name}==VERSION")
    return match.group(1)


def torch_attempts(version: str, has_gpu: bool) -> list[Attempt]:
    """The ways to get torch, best first. The CPU builds come without dependencies: those come with all others."""
    if has_gpu:
        # === compares the text: == would also take a +cpu build that one of the indexes has.
        return [Attempt(f"torch {version}, CUDA build", (f"torch==={version}",))]
    cpu = ("--no-deps", f"torch=={version}+cpu")
    own_index = ("--index-url", CPU_WHEELS, "--retries", "1", "--timeout", "20", *cpu)
    return [
        Attempt(f"torch {version}+cpu from the configured indexes", cpu),
        Attempt(f"torch {version}+cpu from {CPU_WHEELS}", own_index),
        Attempt(f"torch {version}, the plain wheel (on Linux a download of gigabytes)", (f"torch=={version}",)),
    ]


def dali_package(driver: tuple[int, int] | None) -> str:
    """DALI's wheel for a driver. Its CPU pipelines need no GPU, so a machine without one takes the newest."""
    return "nvidia-dali-cuda120" if driver is not None and driver < (13, 0) else "nvidia-dali-cuda130"


def requirement_name(requirement: str) -> str:
    """ "deepspeed" of "deepspeed>=0.19,<0.20; marker", normalised."""
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert match is not None
    return re.sub(r"[-_.]+", "-", match.group()).lower()


def requirements(project: dict) -> list[str]:
    """What the project and its tests need, of pyproject.toml's table, but for torch, Triton and DALI."""
    wanted = [
        *project["dependencies"],
        *project["optional-dependencies"]["text"],
        *project["optional-dependencies"]["dev"],
    ]
    return [requirement for requirement in wanted if requirement_name(requirement) != "torch"]


def constraints_for(constraints: str, torch_version: str) -> str:
    """constraints.txt with torch at exactly what is installed, so that no later install replaces it.

    For a kept torch of another release the pin of Triton goes: that torch has its own.
    """
    same_release = version_tuple(torch_version) == version_tuple(pinned(constraints, "torch"))
    lines = [f"torch=={torch_version}"]
    for line in constraints.splitlines():
        name = requirement_name(line) if line and not line.startswith("#") else ""
        if name and name != "torch" and (same_release or name != "triton"):
            lines.append(line)
    return "\n".join(lines) + "\n"


def triton_attempt(constraints: str, torch_version: str) -> Attempt | None:
    """Triton for the pinned torch alone: another needs another Triton, and its CUDA build brought that along."""
    if version_tuple(torch_version) != version_tuple(pinned(constraints, "torch")):
        return None
    version = pinned(constraints, "triton")
    return Attempt(f"triton {version}", (f"triton=={version}",))


def missing_tools(found: dict[str, bool]) -> list[str]:
    """Debian's names of what the C++ operators need and the machine lacks; found: c++, cmake, make, ninja."""
    packages = [package for tool, package in (("c++", "g++"), ("cmake", "cmake")) if not found[tool]]
    if not found["make"] and not found["ninja"]:
        packages.append("make")
    return packages


# Actions


def say(message: str) -> None:
    print(f"setup: {message}", flush=True)


def warn(message: str) -> None:
    print(f"setup: WARNING: {message}", file=sys.stderr, flush=True)


def nvidia_smi() -> str | None:
    """nvidia-smi's output where it works."""
    try:
        done = subprocess.run(["nvidia-smi"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def installed_torch(python: str | Path) -> Torch | None:
    """The torch that an interpreter imports. A torch that does not import counts as none."""
    code = "import json, torch; print(json.dumps([str(torch.__version__), torch.cuda.is_available()]))"
    try:
        # From a folder of our choice: the current one is on sys.path.
        done = subprocess.run(
            [str(python), "-c", code], capture_output=True, text=True, cwd=ROOT / "tools", timeout=300
        )
        return Torch(*json.loads(done.stdout.splitlines()[-1])) if done.returncode == 0 else None
    except (OSError, subprocess.TimeoutExpired, IndexError, ValueError):
        return None


class Environment:
    """The virtual environment in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.python = folder / "bin" / "python"
        self.constraints = folder / "constraints.txt"

    def works(self) -> bool:
        try:
            return subprocess.run([self.python, "-m", "pip", "--version"], capture_output=True).returncode == 0
        except OSError:
            return False

    def create(self, see_system: bool) -> None:
        if shutil.which("dpkg") and not has_module("ensurepip"):
            raise SetupError(f"this Python has no venv module: {APT} python3-venv (as root), then `make setup` again")
        options = ["--clear", *(["--system-site-packages"] if see_system else [])]
        done = subprocess.run([sys.executable, "-m", "venv", *options, self.folder], capture_output=True, text=True)
        if done.returncode != 0:
            raise SetupError(f"python -m venv failed ({APT} python3-venv may help):\n{done.stdout}{done.stderr}")

    def pip(self, *arguments: str, env: dict[str, str] | None = None) -> tuple[bool, str]:
        """pip install; whether it worked, and what it printed (quiet but for warnings and errors)."""
        command = [
            self.python,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-input",
            "--disable-pip-version-check",
            *arguments,
        ]
        quiet = {"PIP_ROOT_USER_ACTION": "ignore", "PIP_PROGRESS_BAR": "off"}
        done = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
            env={**os.environ, **quiet, **(env or {})},
        )
        return done.returncode == 0, done.stdout.strip()

    def must(self, what: str, *arguments: str, env: dict[str, str] | None = None) -> str:
        say(what)
        ok, output = self.pip(*arguments, env=env)
        if not ok:
            raise SetupError(f"pip failed at: {what}\n{output}")
        return output


def has_module(name: str) -> bool:
    return subprocess.run([sys.executable, "-c", f"import {name}"], capture_output=True).returncode == 0


def reason(output: str) -> str:
    """Why pip failed, in one line. Beside a constraint on torch it calls a version that is nowhere a conflict."""
    if "No matching distribution" in output or "ResolutionImpossible" in output:
        return "no such version there"
    return next((line for line in reversed(output.splitlines()) if line.strip()), "no message")


def install_torch(env: Environment, constraints: str, driver: tuple[int, int] | None) -> Torch:
    """Keeps a usable torch or installs one."""
    has_gpu = driver is not None
    torch = installed_torch(env.python)
    if torch is not None and is_usable(torch, has_gpu):
        say(f"torch {torch.version} is there and usable: kept")
        return torch
    for attempt in torch_attempts(pinned(constraints, "torch"), has_gpu):
        say(f"{attempt.what} ...")
        ok, output = env.pip("-c", "constraints.txt", *attempt.pip)
        if ok:
            break
        say(f"  not available ({reason(output)})")
    else:
        raise SetupError(f"torch could not be installed:\n{output}")
    version = env_version(env, "torch")
    if has_gpu and driver is not None and driver < (13, 0):
        warn(
            f"the driver serves CUDA {driver[0]}.{driver[1]}, torch {version} is built for CUDA 13: if it finds no "
            f"GPU, update the driver, or install a torch for CUDA {driver[0]} into {env.folder.name}: it is kept"
        )
    return Torch(version, has_gpu)


def env_version(env: Environment, name: str) -> str:
    code = f"from importlib.metadata import version; print(version({name!r}))"
    return subprocess.run([env.python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def install_optional(env: Environment, attempt: Attempt | None, without: str) -> None:
    if attempt is None:
        return
    say(attempt.what)
    ok, output = env.pip("-c", str(env.constraints), *attempt.pip)
    if not ok:
        warn(f"{attempt.what} could not be installed ({reason(output)}); {without}")


def install_project(env: Environment) -> None:
    """The project, editable, built against the torch in the environment (build isolation would fetch another)."""
    tools = {tool: shutil.which(tool) is not None for tool in ("cmake", "make", "ninja")}
    tools["c++"] = any(shutil.which(name) for name in (os.environ.get("CXX") or "c++", "g++", "clang++"))
    lacking = missing_tools(tools)
    wanted = os.environ.get("DMD2_FAST_CPP", "auto")
    if lacking and wanted != "0":
        packages = " ".join(lacking)
        message = f"no C++ operators without compiler and cmake: {APT} {packages} (as root), `make setup` again"
        if wanted == "1":
            raise SetupError(message)
        warn(f"{message}; going on in pure Python, which is slower")
    cpp = {"DMD2_FAST_CPP": "0"} if lacking else {}
    env.must(
        "dmd2_fast itself, editable, with its C++ operators", "--no-build-isolation", "--no-deps", "-e", ".", env=cpp
    )
    if not (ROOT / "dmd2_fast" / "_C.abi3.so").is_file() and not lacking and wanted != "0":
        warn("the C++ operators were not built, dmd2_fast runs in pure Python; `DMD2_FAST_CPP=1 make setup` shows why")


def summary(env: Environment) -> str:
    """What the new environment has, in one line."""
    code = (
        "import importlib.util as u, torch; has = lambda n: 'yes' if u.find_spec(n) else 'no';"
        "gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else 'none';"
        "dali = has('nvidia.dali') if u.find_spec('nvidia') else 'no';"
        "print(f'torch {torch.__version__}, GPU: {gpu}, DALI: {dali}, Triton: {has(\"triton\")}')"
    )
    done = subprocess.run([env.python, "-c", code], capture_output=True, text=True, cwd=ROOT / "tools")
    if done.returncode != 0:
        raise SetupError(f"the new environment does not work:\n{done.stderr}")
    cpp = "yes" if (ROOT / "dmd2_fast" / "_C.abi3.so").is_file() else "no"
    return f"{done.stdout.strip()}, C++ operators: {cpp}"


def setup(folder: Path) -> None:
    import tomllib  # not there before 3.11, whose users should read the message of main() instead

    start = time.monotonic()
    constraints = (ROOT / "constraints.txt").read_text()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    driver = driver_cuda(nvidia_smi())
    say("NVIDIA GPU found" if driver is not None else "no NVIDIA GPU (nvidia-smi does not work)")

    env = Environment(folder)
    if not env.works():
        # In a virtual environment the base interpreter's packages are not what python3 sees.
        base = installed_torch(sys.executable) if sys.prefix == sys.base_prefix else None
        see_system = is_usable(base, driver is not None)
        seeing = ", seeing this interpreter's packages" if see_system else ""
        say(f"{folder.name} with Python {sys.version.split()[0]}{seeing}")
        env.create(see_system)

    torch = install_torch(env, constraints, driver)
    env.constraints.write_text(constraints_for(constraints, torch.version))
    pinned_install = ("-c", str(env.constraints))
    env.must("build tools", *pinned_install, "setuptools>=77", "wheel")
    env.must("the other packages (a few minutes)", *pinned_install, f"torch=={torch.version}", *requirements(project))
    install_optional(env, triton_attempt(constraints, torch.version), "the Triton kernels will not run")
    dali = dali_package(driver)
    install_optional(env, Attempt(dali, (dali,)), "data is read by the plain loader, with the same batches")
    install_project(env)
    say(f"{summary(env)}; done in {time.monotonic() - start:.0f} s")


def main() -> int:
    if sys.version_info < OLDEST_PYTHON:
        wanted = ".".join(map(str, OLDEST_PYTHON))
        found = sys.version.split()[0]
        print(f"setup: this is Python {found}, {wanted} or newer is needed: make setup PYTHON=python{wanted}")
        return 2
    try:
        setup(Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else ROOT / ".venv")
    except SetupError as error:
        print(f"setup: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
