"""Triton kernels, installed as `dmd2_fast.kernels`; one stem per operator file in `dmd2_fast/ops`.

Met as top-level `kernels`, that is with the repository's root on sys.path, this package gives way to Hugging Face's
package of the same name, which transformers and diffusers import: they would fail in our root otherwise.
"""

import importlib
import sys
from pathlib import Path


def _give_way() -> None:
    """Puts the next `kernels` on sys.path in this module's place; ModuleNotFoundError where there is none."""
    own_root = Path(__file__).resolve().parent.parent
    shadowed = sys.path[:]
    this = sys.modules.pop(__name__)
    # An empty entry means the current folder.
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != own_root]
    importlib.invalidate_caches()
    try:
        sys.modules[__name__] = importlib.import_module(__name__)
    except ImportError:
        sys.modules[__name__] = this  # the import system takes the failed module out of here itself
        raise
    finally:
        sys.path[:] = shadowed


if __name__ == "kernels":
    _give_way()
