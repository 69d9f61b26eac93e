# Every target builds what it needs in .venv, from nothing; a second run starts at once.
#
#   make quickstart   fine-tune the small 4-bit base that comes with the repository, and measure it before and after
#   make test         all tests                         make test PYTEST_ARGS="-k nf4 -m 'not slow'"
#   make lint         ruff, mypy, layers, budgets       make format   let ruff rewrite
#   make bench        every file in benchmarks/         make clean    remove .venv and caches
#   make sanitize     the native kernels under AddressSanitizer and UBSan, called at random for FUZZ seconds and by their
#                     Python tests; make sanitize-native does the first half and needs no Python
#   make fuzz         the readers of archives and folders under atheris, each target for FUZZ seconds
#
# Variables: PYTHON  the interpreter that makes .venv
#            TORCH   what pip installs first: a version, a wheel file, or several words that pip understands
#            CONSTRAINTS  the file with the tested versions; "none" takes the newest that fit together
#            FUZZ, SEED  seconds of random calls, and the first of them; another seed is other calls
PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
TORCH ?= $(shell grep '^torch==' constraints.txt)
WORKERS ?= 2
FUZZ ?= 20
SEED ?= 1
PYTEST_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q
QUICKSTART_RUN := runs/quickstart
SOURCES := src tests tools benchmarks examples

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help quickstart test lint format bench sanitize sanitize-native fuzz clean

help:
	@sed -n '3,9s/^# *//p' Makefile

# --------------------------------------------------------------------------------------------------------- environment
# torch goes first and alone. Pulled in as somebody's dependency it would be whatever build pip prefers, and on Linux
# that is the one with gigabytes of CUDA libraries. The build that is now installed joins the constraints, so that no
# later step can exchange it; so does the triton that a build for CUDA brings, each its own version.
$(VENV)/.torch: constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	if [ "$(CONSTRAINTS)" = none ]; then : > $(VENV)/constraints.txt; \
	else grep -v '^torch==\|^triton==' $(CONSTRAINTS) > $(VENV)/constraints.txt; fi
	$(PIP) install -c $(VENV)/constraints.txt $(TORCH)
	$(BIN)/python -c "from importlib.metadata import version; print('torch==' + version('torch'))" >> $(VENV)/constraints.txt
	if [ "$(CONSTRAINTS)" != none ] && ! $(PIP) show triton >/dev/null 2>&1; then \
	    grep '^triton==' $(CONSTRAINTS) >> $(VENV)/constraints.txt || true; fi
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

# Python is not built with AddressSanitizer, so its runtime is loaded first, and before it the C++ library whose exceptions
# it watches. Python keeps memory until it ends, which is no leak of ours; a request for 8 TiB is torch's to refuse. The
# sanitized library lies in a copy of the package, so that it is never mistaken for the one that is installed.
SANITIZED := build/sanitize
SANITIZED_PYTHON = LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libstdc++.so)" \
    ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 PYTHONPATH=$(SANITIZED)/src OMP_WAIT_POLICY=PASSIVE $(BIN)/python

sanitize-native:
	cmake -S . -B $(SANITIZED) -DHB_TESTS=ON -DHB_SANITIZE=address,undefined
	cmake --build $(SANITIZED) --parallel $(WORKERS)
	$(SANITIZED)/native_test --fuzz $(FUZZ) --seed $(SEED)

sanitize: sanitize-native $(VENV)/.train,test
	rm -rf $(SANITIZED)/src && cp -r src $(SANITIZED)/src
	cp $(SANITIZED)/libhalfbyte_cpu.so $(SANITIZED)/src/halfbyte/kernels/cpu/
	$(SANITIZED_PYTHON) -c "from halfbyte.kernels.cpu import library; assert '$(SANITIZED)' in str(library.FILE)"
	$(SANITIZED_PYTHON) -m pytest tests/kernels -n $(WORKERS) $(PYTEST_ARGS)

# What it finds is written to build/fuzz/ and ends the run.
fuzz: $(VENV)/.train,test
	$(PIP) install -c $(VENV)/constraints.txt "atheris>=3"
	@set -e; for target in archive forged safetensors index; do \
	    echo "== $$target"; OMP_WAIT_POLICY=PASSIVE $(BIN)/python tests/fuzz/fuzz_readers.py $$target $(FUZZ); done

clean:
	rm -rf $(VENV) .cache .hypothesis build dist
	find $(SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +
