# The front door: every target works from a bare clone on Python 3.10+.
PYTHON ?= python3
VENV   ?= .venv
BIN     = $(VENV)/bin
STAMP   = $(VENV)/.installed

.PHONY: quickstart test test-all lint bench errors clean

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $(STAMP)

quickstart: $(STAMP)  ## distil a small reasoning model and open its report
	$(BIN)/kd run quickstart --open

test: $(STAMP)  ## the default test suite
	$(BIN)/python -m pytest

test-all: $(STAMP)  ## the default suite and the slow tests
	$(BIN)/python -m pytest -m "slow or not slow"

lint: $(STAMP)  ## formatting, lint, types, import layers
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

errors: $(STAMP)  ## the table of errors against the float64 oracle
	$(BIN)/python benchmarks/error_table.py

bench: $(STAMP)  ## CPU benchmarks; peers are included where they are installed
	$(BIN)/python -m pytest benchmarks --benchmark-enable -o python_files='bench_*.py' -q

clean:
	rm -rf $(VENV) runs .pytest_cache .mypy_cache .ruff_cache
