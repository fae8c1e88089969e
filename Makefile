# `make help` lists the targets.
# Settable: PYTHON (3.10 or newer, makes the environments), PYTEST_ARGS (handed on to pytest),
# MATRIX_ARGS (handed on to the matrix: --only REGEX, --quick, --jobs N), SEEDS and FIDELITY_ARGS
# (of fidelity: --minutes N, --only MODEL, --threads N), BENCH_ARGS (of bench: --only REGEX, --quick,
# --pairs N, --threads N).

PYTHON      ?= python3
PYTEST_ARGS ?= -n auto --dist loadfile --max-worker-restart 0
MATRIX_ARGS ?=
SEEDS       ?= 1
FIDELITY_ARGS ?=
BENCH_ARGS  ?=

VENV    := .venv
OLDEST  := .venv-minimum
BIN     := $(VENV)/bin
PIP_ENV := PIP_DISABLE_PIP_VERSION_CHECK=1
# One thread a worker, or the pytest workers fight over the cores; no model is ever downloaded.
TEST_ENV := HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1

.DEFAULT_GOAL := help
.PHONY: help setup demo test matrix fidelity bench screenshot lint types format setup-minimum test-minimum clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-14s %s\n", $$1, $$2}' Makefile

setup: $(VENV)/.installed  ## make .venv with the package and everything its tests need

demo: setup  ## convert the digits transformer and show the report
	@HF_HUB_OFFLINE=1 $(BIN)/python examples/digits/convert.py

test: setup  ## run the whole test suite
	@$(TEST_ENV) $(BIN)/python -m pytest $(PYTEST_ARGS)

matrix: setup  ## take every architecture every way, and write docs/matrix.md (an hour)
	@$(TEST_ENV) $(BIN)/python -m benchmarks.matrix $(MATRIX_ARGS)

fidelity: setup  ## convert and recover three models, and write docs/fidelity.md (40 minutes a seed)
	@HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.fidelity --seeds $(SEEDS) $(FIDELITY_ARGS)

bench: setup  ## time every form in every runtime, and write docs/performance.md (half an hour)
	@HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.speed $(BENCH_ARGS)

screenshot: setup  ## take the README's picture of a report, docs/report.png (needs chromium)
	@HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.screenshot

lint: setup  ## check style and formatting
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

format: setup  ## apply both
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

types: setup  ## check types
	@$(BIN)/mypy

setup-minimum: $(OLDEST)/.installed  ## make .venv-minimum with the oldest supported versions

test-minimum: setup-minimum  ## run the core tests on the oldest supported versions
	@$(TEST_ENV) $(OLDEST)/bin/python -m pytest -m core $(PYTEST_ARGS)

clean:  ## remove both environments and every cache
	rm -rf $(VENV) $(OLDEST) .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps are written last, so that a killed installation is done again.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(call install,$(VENV),constraints.txt,cpu$(comma)rtx$(comma)dev)

$(OLDEST)/.installed: pyproject.toml constraints-minimum.txt
	$(call install,$(OLDEST),constraints-minimum.txt,cpu$(comma)test)

comma := ,

# install(environment, constraints, extras)
define install
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed; this is " + sys.version.split()[0] + ". Set PYTHON=...")'
	@echo "Installing dyt-compile[$(3)] into $(1), versions from $(2) (torch is large: minutes)"
	@test -x $(1)/bin/python || $(PYTHON) -m venv $(1)
	@$(PIP_ENV) $(1)/bin/python -m pip install -qq --progress-bar off -c $(2) -e '.[$(3)]'
	@touch $@
	@echo "Installed: $$($(1)/bin/python --version), torch $$($(1)/bin/python -c 'from importlib.metadata import version; print(version("torch"))')"
endef
