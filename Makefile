# `make demo` and `make test` do all set-up themselves, in .venv of this checkout.
#   PYTHON=python3.12 make .venv      another interpreter (>= 3.11)
#   make test PYTEST_ARGS="-k layers -m 'not slow'"
#   make bench BENCH_ARGS="--only speed_svi --resume"

SHELL := /bin/sh
BIN := .venv/bin
STAMP := .venv/.installed
PYTHON ?=
PYTEST_ARGS ?=
# Processes of the test suite, each of one thread; `JOBS=0` is one process, as a debugger wants it.
JOBS ?= auto
BENCH_ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help .venv demo test lint bench clean

help: ## show this list
	@sed -n 's/^\([.a-z]*\):.*## \(.*\)/  make \1@\2/p' Makefile | awk -F@ '{printf "%-14s %s\n", $$1, $$2}'

.venv: $(STAMP) ## the virtual environment, with the pinned versions of constraints.txt

$(STAMP): pyproject.toml constraints.txt
	@set -e; python=; \
	for candidate in $(or $(PYTHON),python3.11 python3); do \
	    if $$candidate -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	        python=$$candidate; break; \
	    fi; \
	done; \
	if [ -z "$$python" ]; then \
	    echo "Python 3.11 or newer is needed; found: $$($(or $(PYTHON),python3) --version 2>&1 || true)." >&2; \
	    echo "Install it, or name an interpreter: make PYTHON=/path/to/python3.11 $(or $(MAKECMDGOALS),.venv)" >&2; \
	    exit 1; \
	fi; \
	echo "Setting up .venv with $$($$python --version) (the first time takes some minutes)"; \
	$$python -m venv .venv || { \
	    echo "'$$python -m venv' failed; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@$(BIN)/python -m pip install --quiet --upgrade pip || echo "pip was not upgraded; going on with what there is"
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(STAMP) ## a first fit from end to end; writes to results/
	@mkdir -p results
	$(BIN)/python -m benchmarks.demo

test: $(STAMP) ## the whole test suite, slow tests too
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(PYTEST_ARGS)

lint: $(STAMP) ## ruff, ruff format, pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

bench: $(STAMP) ## all benchmarks beside their peers, the short version; writes docs/BENCHMARKS.md
	@$(BIN)/python -c "import numpyro" 2>/dev/null || { \
	    echo "Installing NumPyro, a peer (600 MB)"; \
	    $(BIN)/python -m pip install --quiet -c constraints.txt -e '.[bench]' \
	        || echo "NumPyro could not be installed; going on without it"; }
	$(BIN)/python -m benchmarks.report --quick $(BENCH_ARGS)

clean: ## remove caches and build outputs; keeps .venv and results/
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache
	find . -path ./.venv -prune -o -type d -name __pycache__ -exec rm -rf {} +
