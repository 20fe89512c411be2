# Needs python3 (3.11 or newer) and make; everything else is set up in .venv from uv.lock.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.synced
DEMO_DIR ?= demo
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))

# Tests start many processes: each would compile PyTorch's sources again, two seconds of CPU.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup demo wheel test test-slow lint docs bench fuzz mutants gpu-check clean

help:  ## show this list
	@awk -F ':.*##' '/^[a-z-]+:.*##/ {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP)  ## create .venv from uv.lock (first run downloads PyTorch: several GB on Linux)

$(STAMP): pyproject.toml uv.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "slide2vec needs Python 3.11 or newer: set PYTHON=python3.12, say (found: $$($(PYTHON) --version 2>&1))"; exit 1; }
	@test -x $(BIN)/python || { echo "==> creating $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@test -x $(BIN)/uv || { echo "==> installing uv into $(VENV)"; $(BIN)/python -m pip install --quiet --disable-pip-version-check uv; }
	@echo "==> installing the locked packages"
	@UV_PROJECT_ENVIRONMENT=$(VENV) $(BIN)/uv sync --frozen --python $(BIN)/python
	@touch $@

demo: $(STAMP)  ## embed a generated slide on this machine and draw the result into demo/
	@$(BIN)/slide2vec demo --output $(DEMO_DIR)

wheel: $(STAMP)  ## build dist/slide2vec-….whl, to install elsewhere: pip install 'dist/slide2vec-….whl[openvino]'
	@$(BIN)/uv build --quiet --wheel --no-build-isolation --python $(BIN)/python
	@ls dist/slide2vec-*.whl

test: $(STAMP)  ## run the test suite, on all CPUs of the job (ARGS=-n0: in one process)
	@$(BIN)/python -m pytest -q -m "not gpu and not slow" -n auto --dist loadfile --no-loadscope-reorder $(ARGS)

test-slow: $(STAMP)  ## run the tests that take minutes and gigabytes
	@$(BIN)/python -m pytest -q -m slow $(ARGS)

lint: $(STAMP)  ## ruff (lint and format), mypy --strict, and whether uv.lock is of pyproject.toml as it is
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/uv lock --check --offline --no-cache --quiet --python $(BIN)/python || \
	  { echo "uv.lock is not of pyproject.toml as it is: run $(BIN)/uv lock"; exit 1; }

docs: $(STAMP)  ## build the documentation into site/, strictly; open site/index.html, no server is needed
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict -f tools/docs/mkdocs.yml
	@echo "site/index.html"

bench: $(STAMP)  ## CPU benchmarks, side by side; results under benchmarks/results/
	@$(BIN)/python -m benchmarks.cpu $(ARGS)

fuzz: $(STAMP)  ## damage N slides and files (default 800) and see what comes of them; goes on where it was stopped
	@$(BIN)/python -m tools.fuzz --cases $(or $(N),800) --seed $(or $(SEED),1) $(ARGS)

mutants: $(STAMP)  ## change the code of core modules here and there: do their unit tests notice? goes on where it was stopped
	@$(BIN)/python -m tools.mutants $(ARGS)

gpu-check:  ## tests and benchmarks on an NVIDIA GPU, with what is installed (.venv, else PYTHON as it is)
	@$(GPU_PYTHON) tools/gpu_check.py $(ARGS)

clean:  ## remove the environment and what the demo wrote
	rm -rf $(VENV) $(DEMO_DIR) site .pytest_cache .mypy_cache .ruff_cache
