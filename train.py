"""`deepspeed train.py --config ds_digits.json`: the distillation, on every rank. See dmd2_fast/trainer.py.

Needs the package installed (`make setup`, or `pip install -e . --no-build-isolation`).
"""

import signal
import sys
from pathlib import Path

# Python puts this file's folder first on sys.path, where our kernels/ would shadow Hugging Face's package of that name.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]

if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        # Until the trainer listens, Ctrl-C ends it without a stack trace from some import.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        from dmd2_fast.trainer import main
    except ModuleNotFoundError as error:
        if error.name != "dmd2_fast":
            raise
        sys.exit("dmd2_fast is not installed in this Python: run `make setup`, then use .venv/bin/deepspeed")
    sys.exit(main())
