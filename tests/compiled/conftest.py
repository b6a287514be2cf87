"""The compiled suite runs the PTX that Triton makes, in a simulator on the CPU: it needs `ptxsim` on PYTHONPATH."""

import importlib.util
import os

# Without the simulator there is nothing to collect, and `pytest tests/compiled` says so with exit code 5.
# Beside the other suites Triton's interpreter is on (tests/conftest.py), and nothing is compiled.
is_possible = importlib.util.find_spec("ptxsim") and os.environ.get("TRITON_INTERPRET") != "1"
collect_ignore_glob = [] if is_possible else ["test_*.py"]
