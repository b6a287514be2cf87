"""Where packages live in the tree, and one CMake step for the C++ operators. Everything else is in pyproject.toml.

`kernels/` and `configs/` lie at the top of the repository for readers, and are installed inside the package: a
top-level `kernels` package would shadow Hugging Face's. A wheel has the top-level `ds_*.json` beside the other configs
and their JSON Schema.

DMD2_FAST_CPP=0 builds pure Python, =1 makes a failing C++ build an error; unset, a failing build warns and goes on
without the extension (the operators then run on their `reference` backend, and `dmd2_fast.backends()` says so).
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
WITH_CPP = os.environ.get("DMD2_FAST_CPP", "auto")
if WITH_CPP not in ("0", "1", "auto"):
    sys.exit(f"DMD2_FAST_CPP is {WITH_CPP!r}: expected 0 (pure Python), 1 (fail without the C++ operators) or nothing")


class BuildWithCMake(build_ext):
    """Builds the one target of CMakeLists.txt, dmd2_fast/_C.abi3.so."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        try:
            self.run_cmake(target)
        except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
            message = f"the C++ operators were not built: {error}"
            if WITH_CPP == "1":
                raise RuntimeError(message) from error
            line = "!" * 100
            print(f"{line}\nWARNING: {message}\nGoing on in pure Python.\n{line}", file=sys.stderr, flush=True)
            (ROOT / "dmd2_fast" / target.name).unlink(missing_ok=True)  # one from an earlier build would be stale

    def run_cmake(self, target: Path) -> None:
        torch = importlib.util.find_spec("torch")
        if torch is None or torch.origin is None:
            raise RuntimeError("torch is not installed here (pip needs --no-build-isolation)")
        if shutil.which("cmake") is None:
            raise RuntimeError("cmake was not found (apt-get install cmake g++ make)")
        build = Path(self.build_temp).resolve() / "cmake"
        # An existing cache may name a generator, a compiler or a torch that is gone (pip's temporary folders).
        shutil.rmtree(build, ignore_errors=True)
        build.mkdir(parents=True)
        configure = [
            "cmake",
            str(ROOT),
            f"-DDMD2_FAST_TORCH={Path(torch.origin).parent}",
            f"-DDMD2_FAST_OUTPUT={target.parent}",
            "-DCMAKE_BUILD_TYPE=Release",
        ]
        subprocess.run(configure, cwd=build, check=True)
        subprocess.run(["cmake", "--build", ".", "--parallel"], cwd=build, check=True)
        if not target.is_file():
            raise RuntimeError(f"cmake did not leave {target}")


class BuildPython(build_py):
    """Adds the top-level ds_*.json to the packaged configs; drops a stale extension from a pure-Python tree."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            folder = Path(self.build_lib) / "dmd2_fast" / "configs"
            folder.mkdir(parents=True, exist_ok=True)
            for config in sorted(ROOT.glob("ds_*.json")):
                text = config.read_text().replace('"configs/dmd2_fast.schema.json"', '"dmd2_fast.schema.json"')
                (folder / config.name).write_text(text)
        elif WITH_CPP == "0":
            (ROOT / "dmd2_fast" / "_C.abi3.so").unlink(missing_ok=True)


EXTENSION = Extension("dmd2_fast._C", [], py_limited_api=True, optional=WITH_CPP != "1")
EXTENSIONS = [] if WITH_CPP == "0" else [EXTENSION]

setup(
    package_dir={"dmd2_fast": "dmd2_fast", "dmd2_fast.kernels": "kernels", "dmd2_fast.configs": "configs"},
    packages=[*find_packages(include=["dmd2_fast", "dmd2_fast.*"]), "dmd2_fast.kernels", "dmd2_fast.configs"],
    package_data={"dmd2_fast.configs": ["*.json"]},
    include_package_data=False,
    ext_modules=EXTENSIONS,
    cmdclass={"build_ext": BuildWithCMake, "build_py": BuildPython},
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if EXTENSIONS else {},
)
