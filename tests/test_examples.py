"""The examples run, and do what they say."""

import re
import subprocess
import sys

from tiny import ROOT, one_core


def test_ring_finds_the_modes():
    command = [sys.executable, str(ROOT / "examples" / "ring.py"), "--iterations", "2000"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, preexec_fn=one_core, check=True)
    before, after = (re.findall(r"\d+", line) for line in done.stdout.splitlines())
    assert before == ["0", "0", "0", "8"]
    assert after[0] == "2000" and int(after[1]) > 40 and int(after[2]) == 8, done.stdout
