"""Installing and importing: from the repository's root, editable, from a wheel, without this or that."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
STEMS = {"noise", "dmd", "denoising", "gan", "r1", "norm"}
if not (ROOT / "setup.py").is_file():
    pytest.skip("not a checkout", allow_module_level=True)


def python(code: str, cwd: Path = ROOT, executable: str | Path = sys.executable, **env: str) -> str:
    """What a fresh interpreter prints; `-c` puts the current folder first on sys.path, as a run from the root does."""
    done = subprocess.run(
        [str(executable), "-c", code], cwd=cwd, capture_output=True, text=True, env={**os.environ, **env}, timeout=240
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# Filters every finder, so that a name is absent as if never installed: find_spec gives None, import raises.
BLOCK = """
import sys
class Without:
    def __init__(self, finder): self.finder = finder
    def __getattr__(self, name): return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        if (name + ".").startswith(tuple(n + "." for n in {names})): return None
        return self.finder.find_spec(name, path, target)
sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
"""
USE = """
import torch, dmd2_fast
out = dmd2_fast.r1_perturb(torch.zeros(2, 3), 0.5, key=dmd2_fast.NoiseKey(1), sample_ids=torch.arange(2))
assert out.shape == (4, 3) and out[2:].abs().min() > 0
"""


def test_hugging_face_kernels_imports_from_the_root():
    """A top-level folder `kernels` must not shadow the package of that name that transformers and diffusers import."""
    pytest.importorskip("kernels")
    printed = python("import kernels, sys; print(kernels.__file__); print(callable(kernels.get_kernel))")
    file, is_callable = printed.splitlines()
    assert not Path(file).is_relative_to(ROOT / "kernels") and is_callable == "True"


def test_transformers_and_diffusers_import_from_the_root():
    pytest.importorskip("transformers")
    pytest.importorskip("kernels")
    code = (
        "import transformers.utils as u, diffusers, sys\n"
        "assert u.is_kernels_available(), 'transformers does not take the installed kernels'\n"
        "from transformers.integrations import hub_kernels\n"
        "from diffusers import UNet2DModel\n"
        "print(sys.modules['kernels'].__file__)"
    )
    assert not Path(python(code)).is_relative_to(ROOT / "kernels")


def test_kernels_gives_way_to_nothing_too(tmp_path):
    """Where Hugging Face's package is not installed, `import kernels` fails in our root as it does elsewhere."""
    code = (
        "import sys; sys.path[:] = ['', {!r}]\n"
        "try: import kernels\n"
        "except ModuleNotFoundError as e: print(e.name, sys.path[0] == '')"
    )
    assert python(code.format(sysconfig.get_path("stdlib"))) == "kernels True"


def test_train_drops_its_own_folder():
    code = (
        "import runpy, sys; sys.path.insert(0, {0!r}); runpy.run_path({0!r} + '/train.py', run_name='not_main');"
        "print([p for p in sys.path if p in ('', {0!r})])"
    )
    assert python(code.format(str(ROOT))) == "[]"


def test_the_installed_package_has_its_kernels(tmp_path):
    code = "import importlib.util as u; print(u.find_spec('dmd2_fast.kernels').origin)"
    assert Path(python(code, cwd=tmp_path)).parts[-2] == "kernels"


@pytest.mark.parametrize(
    "names", [("triton",), ("nvidia.dali",), ("deepspeed",), ("triton", "nvidia", "deepspeed", "apex")]
)
def test_imports_without(names, tmp_path):
    python(BLOCK.format(names=names) + USE + "print(dmd2_fast.backends())", cwd=tmp_path)


def test_without_triton_the_reason_is_given():
    code = "import dmd2_fast\ntry: dmd2_fast.use_backend('triton')\nexcept RuntimeError as e: print(e)"
    assert "triton is not installed" in python(BLOCK.format(names=("triton",)) + code)


def test_importing_touches_no_gpu(tmp_path):
    """No CUDA context, no device query: torch's own lazy initialisation must not have been asked for."""
    code = (
        "import torch\n"
        "def refuse(*a, **k): raise AssertionError('a GPU was asked for at import')\n"
        "for name in ('_lazy_init', 'is_available', 'device_count', 'current_device', 'get_device_properties',"
        " 'get_device_capability', 'get_device_name'): setattr(torch.cuda, name, refuse)\n"
        "import dmd2_fast\n"
        "loaded = {name.split('.')[0] for name in __import__('sys').modules}\n"
        "print(sorted(loaded & {'triton', 'deepspeed', 'nvidia', 'diffusers'}))"
    )
    assert python(code, cwd=tmp_path) == "[]"


def test_stems_are_the_same_everywhere():
    """An operator has one stem: every operator in ops/ and tests/, and no file elsewhere under another name."""

    def stems(folder: str, pattern: str, prefix: str = "") -> set[str]:
        return {path.stem.removeprefix(prefix) for path in (ROOT / folder).glob(pattern)}

    assert stems("dmd2_fast/ops", "[!_]*.py") == STEMS
    assert stems("tests", "test_*.py", "test_") >= STEMS
    assert stems("kernels", "[!_]*.py") <= STEMS
    assert stems("csrc", "*.c*") <= STEMS
    assert stems("benchmarks", "bench_*.py", "bench_") == STEMS | {"cycle", "step"}


# The extension and the wheel


def needs_compiler() -> None:
    from shutil import which

    if which("cmake") is None or not any(which(name) for name in ("c++", "g++", "clang++")):
        pytest.skip("needs cmake and a C++ compiler")


def checkout(folder: Path) -> Path:
    """What a build takes of the checkout, without what earlier builds left there."""
    from shutil import copytree, ignore_patterns

    ignored = ignore_patterns("__pycache__", "*.so", "*.egg-info")
    for name in ("dmd2_fast", "kernels", "csrc", "configs"):
        copytree(ROOT / name, folder / name, ignore=ignored)
    for path in [
        *ROOT.glob("ds_*.json"),
        *(ROOT / n for n in ("setup.py", "pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE")),
    ]:
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def pip_wheel(source: Path, target: Path, **env: str) -> subprocess.CompletedProcess:
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-index",
        "--no-build-isolation",
        "--no-deps",
        "-v",
        "-w",
        str(target),
        ".",
    ]
    return subprocess.run(
        command,
        cwd=source,
        capture_output=True,
        text=True,
        env={**os.environ, "DMD2_FAST_CPP": "auto", **env},
        timeout=280,
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    needs_compiler()
    folder = tmp_path_factory.mktemp("wheel")
    source = checkout(folder / "source")
    done = pip_wheel(source, folder / "dist", DMD2_FAST_CPP="1")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (path,) = (folder / "dist").glob("*.whl")
    return path


def test_wheel_contents(wheel):
    archive = zipfile.ZipFile(wheel)
    names = set(archive.namelist())
    assert re.search(r"-cp311-abi3-linux_\w+\.whl$", wheel.name)
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"dmd2_fast"}, "nothing else top-level"
    assert [name for name in names if name.endswith(".so")] == ["dmd2_fast/_C.abi3.so"]
    assert {"dmd2_fast/kernels/__init__.py", "dmd2_fast/kernels/_philox.py", "dmd2_fast/kernels/r1.py"} <= names
    configs = {path.name for path in [*ROOT.glob("ds_*.json"), *(ROOT / "configs").glob("*.json")]}
    assert {
        name.split("/")[-1] for name in names if name.startswith("dmd2_fast/configs/") and name.endswith(".json")
    } == configs
    for name in configs - {"dmd2_fast.schema.json"}:
        assert json.loads(archive.read(f"dmd2_fast/configs/{name}"))["$schema"] in configs, "beside it"
    packages = {path.relative_to(ROOT).as_posix() for path in (ROOT / "dmd2_fast").rglob("*.py")}
    assert packages <= names, "a package of the tree is missing"
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_extension_has_no_paths_of_this_machine_and_no_python(wheel, tmp_path):
    """No rpath (a wheel is used where torch lies elsewhere), and no symbol of libpython: stable ABI alone."""
    library = Path(zipfile.ZipFile(wheel).extract("dmd2_fast/_C.abi3.so", tmp_path))
    dynamic = subprocess.run(["readelf", "-d", str(library)], capture_output=True, text=True)
    if dynamic.returncode == 0:
        assert "RPATH" not in dynamic.stdout and "RUNPATH" not in dynamic.stdout
        assert "libtorch_cpu.so" in dynamic.stdout and "libtorch_python" not in dynamic.stdout
    symbols = subprocess.run(["nm", "-D", "--undefined-only", str(library)], capture_output=True, text=True).stdout
    assert not re.search(r"\b_?Py[A-Z_]", symbols)
    assert not re.search(r"N3c10|N2at", symbols), "a C++ symbol of torch: outside the stable ABI"


def test_wheel_installs_and_runs(wheel, tmp_path):
    """In a new environment that sees this one's packages but not the checkout, on the C++ backend."""
    venv.create(tmp_path / "venv", with_pip=False)
    interpreter = tmp_path / "venv" / "bin" / "python"
    site = Path(python("import sysconfig; print(sysconfig.get_path('purelib'))", executable=interpreter))
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    # Comes after the wheel's own files on sys.path; .pth files in that folder are not read.
    (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    code = USE + (
        "import dmd2_fast.kernels, importlib.resources as r, json\n"
        "assert dmd2_fast.backends()  # and the extension is the one that runs:\n"
        "with dmd2_fast.use_backend('cpp'): pass\n"
        "configs = sorted(p.name for p in r.files('dmd2_fast.configs').iterdir() if p.name.endswith('.json'))\n"
        "print(json.dumps([dmd2_fast.__file__, dmd2_fast.kernels.__file__, configs]))"
    )
    package, kernels, configs = json.loads(python(code, cwd=tmp_path, executable=interpreter))
    assert Path(package).is_relative_to(site) and Path(kernels) == site / "dmd2_fast" / "kernels" / "__init__.py"
    assert "ds_digits.json" in configs


def test_pure_python_wheel(tmp_path):
    """DMD2_FAST_CPP=0 builds without compiler; the package says so, and the reference does the work."""
    source = checkout(tmp_path / "source")
    done = pip_wheel(source, tmp_path / "dist", DMD2_FAST_CPP="0", PATH="/nowhere")
    assert done.returncode == 0, done.stdout[-3000:]
    (path,) = (tmp_path / "dist").glob("*.whl")
    assert path.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(path) as archive:
        assert not [name for name in archive.namelist() if name.endswith(".so")]
        archive.extractall(tmp_path / "site")
    code = (
        "import sys; sys.path.insert(0, {!r})".format(str(tmp_path / "site"))
        + USE
        + ("try: dmd2_fast.use_backend('cpp')\nexcept RuntimeError as e: print(dmd2_fast.__file__); print(e)")
    )
    file, message = python(code, cwd=tmp_path).splitlines()[:2]
    assert Path(file).is_relative_to(tmp_path / "site")
    assert "not built" in message


def test_a_failing_build_warns_or_fails_as_asked(tmp_path):
    """Without cmake: unset goes on with a loud warning, 1 is an error that says what to install."""
    source = checkout(tmp_path / "source")
    done = pip_wheel(source, tmp_path / "dist", PATH="/nowhere")
    assert done.returncode == 0, done.stdout[-3000:]
    assert "WARNING: the C++ operators were not built: cmake was not found" in done.stdout + done.stderr
    (path,) = (tmp_path / "dist").glob("*.whl")
    assert not [name for name in zipfile.ZipFile(path).namelist() if name.endswith(".so")]
    done = pip_wheel(source, tmp_path / "dist", DMD2_FAST_CPP="1", PATH="/nowhere")
    assert done.returncode != 0 and "apt-get install cmake" in done.stdout + done.stderr
    done = pip_wheel(source, tmp_path / "dist", DMD2_FAST_CPP="yes")
    assert done.returncode != 0 and "DMD2_FAST_CPP is 'yes'" in done.stdout + done.stderr
