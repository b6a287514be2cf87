"""The compiled suite runs the PTX that Triton makes, in a simulator on the CPU: it needs `ptxsim` on PYTHONPATH."""

import importlib.util

# Without the simulator there is nothing to collect, and `pytest tests/compiled` says so with exit code 5.
collect_ignore_glob = [] if importlib.util.find_spec("ptxsim") else ["test_*.py"]
