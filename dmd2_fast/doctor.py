"""`dmd2-fast doctor`: what is installed, what each operator runs on, what is missing and the command that installs it.

Nothing here may raise: a package that breaks at import is a finding. Imports happen in this process, with their
messages kept back.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Package:
    """Something that is imported, and what it is for."""

    title: str
    module: str
    distributions: tuple[str, ...]
    """Names it may be installed under; the first that is found gives the version."""
    use: str
    install: str
    required: bool = True

    gpu_only: bool = False
    """Whether nobody without a GPU misses it."""


PIP = "pip install -c constraints.txt "
APEX = (
    "git clone https://github.com/NVIDIA/apex && "
    "APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install --no-build-isolation ./apex  # PyPI's apex is something else"
)
PACKAGES = (
    Package("torch", "torch", ("torch",), "everything", PIP + "torch"),
    Package("DeepSpeed", "deepspeed", ("deepspeed",), "training", PIP + "deepspeed"),
    Package("diffusers", "diffusers", ("diffusers",), "the networks", PIP + "diffusers"),
    Package("scikit-learn", "sklearn", ("scikit-learn",), "the digits", PIP + "scikit-learn"),
    Package("safetensors", "safetensors", ("safetensors",), "exports", PIP + "safetensors"),
    Package("Pillow", "PIL", ("pillow",), "images", PIP + "pillow"),
    Package("shtab", "shtab", ("shtab",), "tab completion", PIP + "shtab"),
    Package(
        "transformers",
        "transformers",
        ("transformers",),
        "SDXL's and SD1.5's text encoders",
        PIP + "transformers  # or all of it: pip install -c constraints.txt -e '.[text]'",
        required=False,
    ),
    Package("accelerate", "accelerate", ("accelerate",), "loading pipelines", PIP + "accelerate", required=False),
    Package("peft", "peft", ("peft",), "LoRA", PIP + "peft", required=False),
    Package("Triton", "triton", ("triton",), "the CUDA kernels", PIP + "triton", required=False),
    Package(
        "DALI",
        "nvidia.dali",
        ("nvidia-dali-cuda130", "nvidia-dali-cuda120", "nvidia-dali-cuda110"),
        "data loading (else the plain reader, same batches)",
        PIP + "nvidia-dali-cuda130  # nvidia-dali-cuda120 on drivers before 580",
        required=False,
    ),
    Package(
        "TensorBoard",
        "tensorboard",
        ("tensorboard",),
        "live curves (else report.html)",
        PIP + "tensorboard",
        required=False,
    ),
    Package(
        "LPIPS",
        "lpips",
        ("lpips",),
        'regression.loss "lpips" (else "mse")',
        "pip install lpips torchvision",
        required=False,
    ),
    Package(
        "flash-attn",
        "flash_attn",
        ("flash-attn", "flash_attn"),
        "attention in 16 bits (else PyTorch's own)",
        "pip install --no-build-isolation flash-attn",
        required=False,
        gpu_only=True,
    ),
    Package("apex", "amp_C", ("apex",), "AdamW in one kernel (else torch's own)", APEX, required=False, gpu_only=True),
)

TOOLS = (
    (("c++", "g++", "clang++"), "C++ compiler", "apt-get install g++"),
    (("cmake",), "cmake", "apt-get install cmake  # or: pip install cmake"),
)

EXTENSION_COMMAND = "pip install --no-build-isolation --no-deps -e ."


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    state: str
    """ok, missing, broken or note."""
    name: str
    detail: str
    use: str = ""
    install: str = ""


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep back what packages print while they are imported."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:157] + '...' if len(text) > 160 else text}"


def _version(package: Package) -> str:
    for name in package.distributions:
        with contextlib.suppress(Exception):  # absent, or its metadata is damaged
            return metadata.version(name)
    return "?"


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the parent of a dotted name
        return False
    except Exception:  # a parent that breaks is there, and the import will say how
        return True


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def check_package(package: Package) -> Finding:
    """Whether a package is there and can be imported."""
    if not _is_there(package.module):
        if package.gpu_only and not _has_gpu():
            return Finding("note", package.title, "not installed, and of use on a GPU alone", package.use)
        return Finding("missing", package.title, "not installed", package.use, package.install)
    try:
        with _quiet():
            importlib.import_module(package.module)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # some packages exit the interpreter
        detail = f"{_version(package)}, but importing it fails: {_one_line(error)}"
        return Finding("broken", package.title, detail, package.use, package.install + " --force-reinstall")
    return Finding("ok", package.title, _version(package), package.use)


def check_launcher() -> Finding:
    """Whether the shell finds the command that training is started with."""
    use, path = "starting training", shutil.which("deepspeed")
    if path is not None:
        return Finding("ok", "launcher", path, use)
    beside = Path(sys.executable).with_name("deepspeed")
    if beside.is_file():
        activate = beside.with_name("activate")
        install = f"source {activate}" if activate.is_file() else f"export PATH={beside.parent}:$PATH"
        return Finding("missing", "launcher", f"{beside} is not on PATH", use, install)
    return Finding("missing", "launcher", "no command deepspeed on PATH", use, PIP + "deepspeed")


def check_tools() -> list[Finding]:
    """What the C++ extension is built with."""
    found = []
    for names, title, install in TOOLS:
        path = next((path for name in names if (path := shutil.which(name))), None)
        if path is None:
            found.append(Finding("missing", title, "not on PATH", "building the C++ extension", install))
            continue
        try:
            result = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20, check=True)
            found.append(Finding("ok", title, (result.stdout.splitlines() or [path])[0], "building the C++ extension"))
        except (OSError, subprocess.SubprocessError) as error:
            found.append(Finding("broken", title, _one_line(error), "building the C++ extension", install))
    return found


def check_extension() -> Finding:
    """Whether the compiled operators load, and for which instruction set."""
    from dmd2_fast import dispatch

    use = "fast operators on the CPU"
    if not dispatch.EXTENSION.exists():
        return Finding("missing", "C++ extension", "not built", use, EXTENSION_COMMAND)
    import torch

    torch.ops.load_library(str(dispatch.EXTENSION))
    names = {512: "AVX-512", 256: "AVX2", 0: "the compiler's baseline"}
    running = names[torch.ops.dmd2_fast_cpp.instruction_set()]
    return Finding("ok", "C++ extension", f"{dispatch.EXTENSION.name} with {running}", use)


def _processor() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        for line in file:
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def check_machine() -> list[Finding]:
    """Processor, threads, and the CUDA devices torch can use."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = [Finding("ok", "CPU", f"{_processor()}, {cores} cores, torch uses {torch.get_num_threads()} threads")]
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(index)
            memory = f"{device.total_memory / 2**30:.0f} GiB"
            detail = f"{device.name}, {memory}, sm_{device.major}{device.minor}, torch {build}"
            found.append(Finding("ok", f"GPU {index}", detail))
    elif shutil.which("nvidia-smi"):
        install = "pip install --force-reinstall -c constraints.txt torch  # or a newer driver"
        found.append(Finding("broken", "GPU", f"nvidia-smi is here, but torch's {build} build sees none", "", install))
    else:
        found.append(Finding("note", "GPU", f"none here; torch's {build} build runs on the CPU"))
    return found


def _backend_rows() -> list[tuple[str, str, str]]:
    from dmd2_fast import backends

    with _quiet():
        table: dict[str, Any] = backends()
    return [(name, _choice(row, "cpu"), _choice(row, "cuda")) for name, row in table.items()]


def _choice(row: Any, device: str) -> str:
    value = row.get(device, "-") if isinstance(row, dict) else row
    return value[0] if isinstance(value, tuple) else str(value)


def _guarded(name: str, check: Callable[[], Any]) -> list[Finding]:
    try:
        found = check()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a doctor that dies of the disease is of no use
        return [Finding("broken", name, _one_line(error))]
    return found if isinstance(found, list) else [found]


def _lines(findings: list[Finding]) -> list[str]:
    return [
        f"  {item.state:<8} {item.name:<14} {item.detail}{f'  ({item.use})' if item.use else ''}" for item in findings
    ]


def doctor() -> str:
    """The whole report as text. Raises nothing."""
    packages = [item for package in PACKAGES for item in _guarded(package.title, partial(check_package, package))]
    packages += _guarded("launcher", check_launcher)
    machine = _guarded("machine", check_machine)
    build = [*_guarded("tools", check_tools), *_guarded("C++ extension", check_extension)]
    try:
        version = metadata.version("dmd2_fast")
    except Exception:
        version = "(not installed, run from its folder)"
    lines = [f"dmd2_fast {version}, Python {platform.python_version()}, {platform.platform()}", ""]
    for title, findings in (("Machine", machine), ("Packages", packages), ("Compiled operators", build)):
        lines += [title, *_lines(findings), ""]
    try:
        rows = _backend_rows()
        width = max(len(name) for name, *_ in rows)
        lines += ["Operators", f"  {'':<{width}}  {'on CPU':<10} on CUDA"]
        lines += [f"  {name:<{width}}  {cpu:<10} {cuda}" for name, cpu, cuda in rows]
    except Exception as error:
        lines += ["Operators", f"  broken   {_one_line(error)}"]
    needed = {"launcher", *(package.title for package in PACKAGES if package.required)}
    wanting = [item for item in (*machine, *packages, *build) if item.state in ("missing", "broken") and item.install]
    wanting.sort(key=lambda item: item.name not in needed)
    lines += ["", "To do" if wanting else "Nothing is missing."]
    for item in wanting:
        lines.append(f"  {item.name} ({'required' if item.name in needed else 'optional'}):  {item.install}")
    return "\n".join(lines)
