# Everything sets itself up: Python 3.11+ and make are enough.
PYTHON ?= python3
# Beside it, another Python: make test VENV=.venv-3.13 PYTHON=python3.13
VENV ?= .venv
BIN := $(VENV)/bin
# Python compiles what is imported, when it is: a fraction of what is installed.
INSTALL := $(BIN)/python -m pip install --quiet --no-compile
unexport PYTHONDONTWRITEBYTECODE  # or each process would compile it again
# Two processes, a test file at a time: compiling, most of the work, uses one core.
PARALLEL := --numprocesses=2 --dist=loadfile
# Many slow tests wait for processes of their own: the third works meanwhile.
WAITING := --numprocesses=3

# Each is `python -m benchmarks.speed.NAME`; without --short they are what is published.
BENCHMARKS := train_step inference operators memory_bound growth start_up \
	input_pipeline end_to_end preparation

.PHONY: quickstart test test-slow test-nightly test-all lint bench clean

quickstart: $(VENV)/.installed  ## train a narrowed AlexNet in two columns, no download
	$(BIN)/python -m alexnet_jax.main --config=configs/quickstart.py \
		--workdir=runs/quickstart --cpu_devices=2
	$(BIN)/python -m alexnet_jax.report --workdir=runs/quickstart

# The tiers of the tests; tests/README.md says what belongs in which.
test: $(VENV)/.dev  ## for every change; three minutes on two cores
	$(BIN)/python -m pytest $(PARALLEL)

test-slow: $(VENV)/.dev  ## for CI: real processes, notebooks, the paper's network on more meshes
	$(BIN)/python -m pytest $(PARALLEL) $(WAITING) -m slow

test-nightly: $(VENV)/.bench  ## by hand: SLURM, 60 kills, eight devices, benchmarks
	$(BIN)/python -m pytest -m nightly
	$(MAKE) bench

test-all: $(VENV)/.dev  ## quick and slow, with the programs compiled as users run them
	ALEXNET_TEST_OPTIMIZED=1 $(BIN)/python -m pytest $(PARALLEL) -m "not nightly"

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: $(VENV)/.bench  ## every benchmark beside PyTorch, short form, into build/benchmarks
	for name in $(BENCHMARKS); do \
		$(BIN)/python -m benchmarks.speed.$$name --short --out=build/benchmarks || exit 1; \
	done

clean:
	rm -rf .venv .venv-* build *.egg-info .pytest_cache .ruff_cache

$(VENV)/.installed: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; \
		sys.exit(0 if sys.version_info >= (3, 11) else \
		f"Python 3.11 or newer is needed; $(PYTHON) is {v}. Name another one: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(INSTALL) --editable .
	@touch $@

$(VENV)/.dev: $(VENV)/.installed
	$(INSTALL) --editable ".[dev]"
	@touch $@

# The peer. On a GPU machine: `pip install torch==2.13.0` by hand, with its CUDA.
$(VENV)/.bench: $(VENV)/.dev
	$(INSTALL) "torch==2.13.0"
	@touch $@
