# Every target sets up .venv by itself and needs no more than Python, pip and git.
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
BIN = $(VENV)/bin
# Tests that share what they train (marked xdist_group) run in one process, the others in whichever is free.
PARALLEL = --numprocesses logical --maxprocesses 4 --dist loadgroup
PYTEST = -m pytest -q --promises $(PARALLEL)
# Python compiles a module when it is first imported: pip would compile all of them, most of which nothing imports.
PIP_INSTALL = $(BIN)/python -m pip install --disable-pip-version-check --no-compile
# Where nothing may be kept, each of the many processes that the tests start would compile torch and transformers anew.
unexport PYTHONDONTWRITEBYTECODE

DATA_DIR ?=

.PHONY: help demo model test test-all fuzz kill-test test-isa test-lower lint docs reference clean
.DEFAULT_GOAL := help

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /  make \1	/p' $(MAKEFILE_LIST) | expand -t 20

demo: $(VENV)/.stamp-demo ## convert, judge, train and publish a real model; goes on where it was stopped
	$(BIN)/python experiments/demo.py

model: $(VENV)/.stamp-demo ## DATA_DIR=FOLDER makes the released longembed-minilm again; goes on where it was stopped
	@test -n "$(DATA_DIR)" || { echo "error: give DATA_DIR=FOLDER, with train/ and dev/, whose documents \
	model_cards/longembed-minilm/README.md lists" >&2; exit 2; }
	$(BIN)/python -m model_cards.rebuild longembed-minilm --data_dir "$(DATA_DIR)" --output_dir runs/model

test: lint ## lint, then all tests that are not slow, then the result for each promise
	$(BIN)/python $(PYTEST) -m 'not slow' --hypothesis-profile fast

test-all: lint ## the same with the tests that take long, which are marked slow
	$(BIN)/python $(PYTEST)

# oneDNN and ATen are limited to the named instructions; rounding differs from one to the other.
test-isa: $(VENV)/.stamp-dev ## the tests with the instructions of other processors: AVX2, AVX-512, all available
	@failed=; \
	best=$$($(BIN)/python -c 'import torch; print(torch.backends.cpu.get_cpu_capability())'); \
	for isa in avx2 avx512 default; do \
		case $$isa:$$best in \
		avx2:AVX2* | avx2:AVX512*) limits='ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2' ;; \
		avx512:AVX512*) limits='ONEDNN_MAX_CPU_ISA=AVX512_CORE ATEN_CPU_CAPABILITY=avx512' ;; \
		default:*) limits= ;; \
		*) echo "$$isa: not on this processor"; continue ;; \
		esac; \
		echo "$$isa: $$limits"; \
		env $$limits $(BIN)/python $(PYTEST) || failed="$$failed $$isa"; \
	done; \
	if [ -n "$$failed" ]; then echo "failed with:$$failed" >&2; exit 1; fi; \
	echo 'passed with every set of instructions'

lint: $(VENV)/.stamp-dev ## style, format and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

fuzz: $(VENV)/.stamp-dev ## 1,000 bad inputs for the scripts, each refused in one sentence; goes on where it was stopped
	$(BIN)/python -m tests.fuzz --count 1000 --folder runs/fuzz

kill-test: $(VENV)/.stamp-dev ## runs killed 100 times at random moments end like those left alone; goes on likewise
	$(BIN)/python -m tests.kill --count 100 --folder runs/kill

test-lower: ## the tests with the lowest versions that pyproject.toml allows
	$(MAKE) --no-print-directory VENV=.venv-lower CONSTRAINTS=constraints-lower.txt .venv-lower/.stamp-dev
	.venv-lower/bin/python $(PYTEST)

docs: reference ## build the documentation into site/; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

reference: $(VENV)/.stamp-dev ## write the option tables of docs/reference/ from the scripts
	$(BIN)/python docs/make_reference.py

clean: ## remove the environments and what tools cached; runs/ stays
	rm -rf .venv .venv-lower build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis site
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is made last: a setup that was interrupted leaves none and is taken up again. An interrupted
# `python -m venv` leaves a python without pip, and running it once more completes it.
$(VENV)/.stamp-%: pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { echo "error: \
	$(PYTHON) is not a Python >= 3.10 with the modules venv and ensurepip: install one (Debian: python3-venv) and name \
	it, make PYTHON=/path/to/python" >&2; exit 2; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	@echo "setting up $(VENV) for '$*'; the first time downloads about 1 GB (several with CUDA builds of torch)"
	$(PIP_INSTALL) --constraint $(CONSTRAINTS) --editable '.[$*]'
	@touch $@
