# Every target builds what it needs in .venv, from nothing; a second run starts at once.
#
#   make quickstart   fine-tune the small 4-bit base that comes with the repository, and measure it before and after
#   make test         all tests                         make test PYTEST_ARGS="-k nf4 -m 'not slow'"
#   make lint         ruff, mypy, layers, budgets       make format   let ruff rewrite
#   make bench        every file in benchmarks/         make clean    remove .venv and caches
#
# Variables: PYTHON  the interpreter that makes .venv
#            TORCH   what pip installs first: a version, a wheel file, or several words that pip understands
#            CONSTRAINTS  the file with the tested versions; "none" takes the newest that fit together
PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
TORCH ?= $(shell grep '^torch==' constraints.txt)
WORKERS ?= 2
PYTEST_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q
QUICKSTART_RUN := runs/quickstart
SOURCES := src tests tools benchmarks examples

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help quickstart test lint format bench clean

help:
	@sed -n '3,6s/^# *//p' Makefile

# --------------------------------------------------------------------------------------------------------- environment
# torch goes first and alone. Pulled in as somebody's dependency it would be whatever build pip prefers, and on Linux
# that is the one with gigabytes of CUDA libraries. The build that is now installed joins the constraints, so that no
# later step can exchange it.
$(VENV)/.torch: constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	if [ "$(CONSTRAINTS)" = none ]; then : > $(VENV)/constraints.txt; \
	else grep -v '^torch==' $(CONSTRAINTS) > $(VENV)/constraints.txt; fi
	$(PIP) install -c $(VENV)/constraints.txt $(TORCH)
	$(BIN)/python -c "from importlib.metadata import version; print('torch==' + version('torch'))" >> $(VENV)/constraints.txt
	touch $@

# One stamp for each set of extras: .venv/.train, .venv/.train,test and so on. The core is part of each, and so are the
# native kernels: pip builds them (hatch_build.py) where there is a C++ compiler, and again when a source changes.
NATIVE := CMakeLists.txt hatch_build.py $(wildcard csrc/*)
$(VENV)/.train $(VENV)/.train,test $(VENV)/.train,lint $(VENV)/.train,bench: $(VENV)/.%: $(VENV)/.torch pyproject.toml $(NATIVE)
	$(PIP) install -c $(VENV)/constraints.txt -e ".[$*]"
	touch $@

# ------------------------------------------------------------------------------------------------------------- targets
# The recipe refuses a folder that is not empty. A run made by this target is replaced by the next one; one that a
# person made there by hand is theirs, and the recipe's refusal stands.
quickstart: $(VENV)/.train
	@if [ -e $(QUICKSTART_RUN).by-make ]; then rm -rf $(QUICKSTART_RUN) $(QUICKSTART_RUN).by-make; fi
	@if [ ! -e $(QUICKSTART_RUN) ]; then mkdir -p $(dir $(QUICKSTART_RUN)) && touch $(QUICKSTART_RUN).by-make; fi
	$(BIN)/halfbyte train examples/quickstart.yaml

test: $(VENV)/.train,test
	$(BIN)/python -m pytest -n $(WORKERS) --durations=10 $(PYTEST_ARGS)

lint: $(VENV)/.train,lint
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo --cache-dir .cache/import-linter
	$(BIN)/python tools/budgets.py

format: $(VENV)/.train,lint
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

bench: $(VENV)/.train,bench
	@set -e; for subject in $(sort $(filter-out benchmarks/_%,$(wildcard benchmarks/*.py))); do \
	    echo "== $$subject"; $(BIN)/python $$subject; done

clean:
	rm -rf $(VENV) .cache .hypothesis build dist
	find $(SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +
