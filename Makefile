# Every target sets up .venv by itself and needs no more than Python, pip and git.
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
BIN = $(VENV)/bin
PARALLEL = --numprocesses logical --maxprocesses 4
PIP_INSTALL = $(BIN)/python -m pip install --disable-pip-version-check

.PHONY: help demo test lint test-lower clean
.DEFAULT_GOAL := help

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /  make \1	/p' $(MAKEFILE_LIST) | expand -t 20

demo: $(VENV)/.stamp-demo ## convert, train, judge and publish a real model; goes on where it was stopped
	$(BIN)/python experiments/demo.py

test: lint ## lint, then all tests, then what each promise came to
	$(BIN)/python -m pytest -q --promises $(PARALLEL)

lint: $(VENV)/.stamp-dev ## style, format and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

test-lower: ## the tests with the lowest versions that pyproject.toml allows
	$(MAKE) --no-print-directory VENV=.venv-lower CONSTRAINTS=constraints-lower.txt .venv-lower/.stamp-dev
	.venv-lower/bin/python -m pytest -q --promises $(PARALLEL)

clean: ## remove the environments and what tools cached; runs/ stays
	rm -rf .venv .venv-lower build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is made last: a setup that was interrupted leaves none and is taken up again. An interrupted `python -m venv`
# leaves a python without pip, and running it once more completes it.
$(VENV)/.stamp-%: pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { echo "error: \
	$(PYTHON) is not a Python >= 3.10 with the modules venv and ensurepip: install one (Debian: python3-venv) and name \
	it, make PYTHON=/path/to/python" >&2; exit 2; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	@echo "setting up $(VENV) for '$*'; the first time downloads about 1 GB (several with CUDA builds of torch)"
	$(PIP_INSTALL) --constraint $(CONSTRAINTS) --editable '.[$*]'
	@touch $@
