"""`python tests/golden/make.py` writes golden/losses.json: 20 iterations of the plain loop, never of the trainer."""

import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from plain_loop import plain_run, prepare, write_config

PATH = Path(__file__).resolve().parent / "losses.json"
ITERATIONS = 20
SECTION = {
    "generator": {
        "optimizer": {"params": {"lr": 1e-3, "eps": 1e-5}},
        "lr_scheduler": {"type": "cosine", "params": {"warmup_iterations": 2}},
    },
    "fake_score": {
        "ttur_ratio": 5,
        "optimizer": {"params": {"lr": 1e-3, "eps": 1e-5}},
        "lr_scheduler": {"type": "cosine", "params": {"warmup_iterations": 2}},
    },
    "run": {"iterations": ITERATIONS},
}


def derive() -> list[dict[str, float]]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        return plain_run(write_config(folder, "golden", 1, **SECTION)[1], ITERATIONS).losses


if __name__ == "__main__":
    lines = [json.dumps({name: float(f"{value:.7g}") for name, value in line.items()}) for line in derive()]
    PATH.write_text("[\n" + ",\n".join(lines) + "\n]\n")
