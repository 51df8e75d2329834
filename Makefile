# setup   .venv with everything the tests and the demo need (once)
# demo    train, evaluate and report the small model: make demo MODEL=vl2|vl SEED=0 NPROC=4 ROOT=runs/demo
# test    ruff, then all tests; ends with a line that counts them. test-quick leaves the multi-process ones out,
#         test-full adds the whole matrix of layouts and, where slurm-wlm is installed, runs on a Slurm of its own (hours on 4 cores)
# fuzz    ten thousand corrupted shards against the reader; the tests run a thousand
# chaos   fifty kills of a small job, which must end with the bits of a job that nobody killed
# lint    ruff, the type checker and shellcheck; format rewrites the files as ruff likes them
# bench   everything timed
# clean   remove caches and builds; runs/ and .venv stay

VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.setup_done
TORCH := torch==2.13.0
MODEL ?= vl2
SEED ?= 0
NPROC ?= 4
ROOT ?= runs/demo
# the first of these that is there and is Python 3.11 or 3.12
PYTHON ?= $(shell for python in python3.11 python3.12 python3 python; do \
	"$$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null && echo "$$python" && break; done)

.PHONY: setup demo test test-quick test-full fuzz chaos lint format bench clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "error: Python 3.11 or 3.12 is needed and none was found; name one with: make $(MAKECMDGOALS) PYTHON=/path/to/python" >&2; exit 1; }
	@echo "making $(VENV) with $(PYTHON)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing $(TORCH)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(TORCH)
	@echo "installing the package with its test and demo requirements"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev,demo]"
	@touch $@

demo: setup
	@$(BIN)/python -m data_recipes.demo.run --model $(MODEL) --seed $(SEED) --nproc $(NPROC) --root $(ROOT)

test: setup
	@$(BIN)/python tests/run.py

test-quick: setup
	@$(BIN)/python tests/run.py --quick

test-full: setup
	@$(BIN)/python tests/run.py --full

fuzz: setup
	@$(BIN)/python -m tests.fuzz_shards --shards 10000

chaos: setup
	@$(BIN)/python -m tests.chaos --kills 50

lint: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/shellcheck launch/*.sh launch/slurm.sbatch .ci/run

format: setup
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: setup
	@for file in benchmarks/*.py; do test -e "$$file" || { echo "no benchmarks yet"; break; }; echo "$$file"; $(BIN)/python "$$file" || exit 1; done

clean:
	@rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	@find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
