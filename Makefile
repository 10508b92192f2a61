# The front door: every target works from a bare clone on Python 3.10+.
PYTHON ?= python3
VENV   ?= .venv
BIN     = $(VENV)/bin
STAMP   = $(VENV)/.installed
# Processes that share the tests, whole files each; about 2 GiB of memory for one.
JOBS   ?= 2
# Options of the benchmarks, such as BENCH="--tokens 512 -k linear".
BENCH  ?=

.PHONY: quickstart test test-all lint errors gradients steps aot bench bench-gpu bench-compare help clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 16

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $(STAMP)

quickstart: $(STAMP)  ## distil a small reasoning model and open its report
	$(BIN)/kd run quickstart --open

test: $(STAMP)  ## the default test suite
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile

test-all: $(STAMP)  ## the default suite and the slow tests
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m "slow or not slow"

lint: $(STAMP)  ## formatting, lint, types, import layers
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

errors: $(STAMP)  ## every loss against the float64 oracle, as a table
	$(BIN)/python benchmarks/error_table.py

gradients: $(STAMP)  ## gradients of a batch split over processes, against one process
	$(BIN)/python tests/training_ranks.py --table

steps: $(STAMP)  ## time of a training step, beside TRL's where it is installed
	$(BIN)/python -m pytest benchmarks/bench_training.py --results benchmarks/results $(BENCH)

aot: $(STAMP)  ## compile every kernel for GPUs that are not here and check the counts
	$(BIN)/python benchmarks/aot_table.py --check tests/aot_budgets.json --write benchmarks/results/aot/table

bench: $(STAMP)  ## measure this machine's CPU; peers take part where they are installed
	$(BIN)/python -m pytest benchmarks --results benchmarks/results $(BENCH)

bench-gpu: $(STAMP)  ## measure this machine's GPU; a rerun continues
	$(BIN)/python -m pytest benchmarks --device cuda --results benchmarks/results $(BENCH)

bench-compare: $(STAMP)  ## two results side by side: make bench-compare OLD=folder NEW=folder
	$(BIN)/pytest-benchmark compare $(OLD)/results.json $(NEW)/results.json \
		--group-by=fullname --columns=min,median --sort=name

clean:  ## remove the environment, runs and caches
	rm -rf $(VENV) runs .pytest_cache .mypy_cache .ruff_cache
