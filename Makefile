# make setup | test | train [RANKS=n] [STEPS=1] | results | ablations | sanitize | lint | clean. Each does its own set-up, in .venv.
PYTHON ?= python3
RANKS ?= 1
STEPS ?= 4
BIN := .venv/bin
# What the command `deepspeed` is; its own first line breaks where the checkout's path has a space.
DEEPSPEED := $(BIN)/python -m deepspeed.launcher.runner
STAMP := .venv/.setup-done

ifeq ($(STEPS),1)
CONFIG ?= configs/ds_digits_1step.json
else
CONFIG ?= ds_digits.json
endif

.PHONY: options setup test teacher train results ablations sanitize lint clean
.DELETE_ON_ERROR:

options:
	@case "$(STEPS)" in 1|4) ;; *) echo "STEPS is '$(STEPS)': expected 4 (ds_digits.json) or 1 (configs/ds_digits_1step.json)" >&2; exit 2;; esac
	@case "$(RANKS)" in ''|*[!0-9]*|0*) echo "RANKS is '$(RANKS)': expected 1 or more" >&2; exit 2;; esac

setup: $(STAMP)

$(STAMP): constraints.txt pyproject.toml setup.py tools/setup_env.py CMakeLists.txt $(wildcard csrc/*)
	@command -v $(PYTHON) >/dev/null || { echo "setup: no $(PYTHON): apt-get install python3 python3-venv (as root)"; exit 2; }
	@$(PYTHON) tools/setup_env.py .venv
	@touch $@

test: setup
	$(BIN)/python -m pytest tests --ignore=tests/distributed --ignore=tests/compiled

teacher: setup
	$(BIN)/dmd2-fast prepare --digits --config $(CONFIG)
	$(BIN)/dmd2-fast teacher --config $(CONFIG)

train: options teacher
	$(DEEPSPEED) --num_accelerators $(RANKS) train.py --config $(CONFIG)

results: teacher
	$(BIN)/python -m dmd2_fast.results

ablations: teacher
	$(BIN)/python -m dmd2_fast.ablations

sanitize: setup
	tools/sanitize.sh

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell

# Leaves .venv, data and runs/: they took minutes to make.
clean:
	rm -rf build dist *.egg-info dmd2_fast/_C*.so .pytest_cache .mypy_cache .ruff_cache .benchmarks
	find . -path ./.venv -prune -o -name __pycache__ -type d -print0 | xargs -0 rm -rf
	rm -f $(STAMP)
