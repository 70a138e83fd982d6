# `make demo` and `make test` do their own set-up. PYTHON=python3.12 chooses the interpreter.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
STARTED := $(shell date +%s)

.PHONY: help setup demo test test-fast test-pythons lint notebooks gallery kaggle

help:
	@echo "make setup      virtual environment, pinned packages, OpenGL libraries"
	@echo "make demo       demonstrations, training and evaluation of one task, notebooks 00 to 07"
	@echo "make test       lint and all tests"
	@echo "make test-fast  tests that need neither the simulator nor the notebooks"
	@echo "make test-pythons  test-fast under each supported Python that is installed"
	@echo "make lint       ruff"
	@echo "make kaggle     dist/kaggle: wheels and kernels to push, for sessions without internet"
	@echo "make notebooks  regenerate the .ipynb from their .py"
	@echo "make gallery    docs/notebooks: executed copies, from the run of make demo"

setup: $(STAMP)

$(STAMP): requirements.txt constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; (3, 10) <= sys.version_info[:2] <= (3, 13) or sys.exit( \
	    "Python %d.%d found, 3.10 to 3.13 needed; try: make PYTHON=python3.12" \
	    % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --upgrade pip setuptools
	$(BIN)/python -m pip install --constraint constraints.txt --build-constraint constraints.txt \
	    --editable '.[dev]'
	$(BIN)/python -m trm_helpers preflight --gl
	@touch $(STAMP)

demo: setup
	TRM_STARTED_AT=$(STARTED) $(BIN)/python -m trm_helpers run demo -p demos scripted

# A process per core, up to 4, each with one thread and whole files: fixtures are expensive.
WORKERS := --numprocesses auto --maxprocesses 4 --dist loadfile
test: setup lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(WORKERS)

test-fast: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(WORKERS) --dist worksteal -m "not sim and not notebooks"

# A virtual environment for each Python, 3 to 7 GB; PYTHONS="3.12 3.13" chooses.
PYTHONS ?= 3.10 3.11 3.12 3.13
test-pythons:
	@for version in $(PYTHONS); do \
	    command -v python$$version > /dev/null || { echo "no python$$version: skipped"; continue; }; \
	    $(MAKE) test-fast PYTHON=python$$version VENV=.venv-$$version || exit; \
	done

lint: setup
	$(BIN)/ruff check

# One way: the .py is the source. --update keeps the cell ids, so that only changed cells change.
notebooks: setup
	$(BIN)/jupytext --update --to ipynb notebooks/*.py

gallery: setup
	$(BIN)/python benchmarks/gallery.py artifacts/demo

# SUITES="libero_spatial libero_object" DEMOS=data/scripted PARTS_MB=60 choose what is packed.
KAGGLE_USERNAME ?= USERNAME
SUITES ?=
DEMOS ?=
PARTS_MB ?=
kaggle: setup
	$(BIN)/python kaggle/build.py --user $(KAGGLE_USERNAME) $(if $(SUITES),--suites $(SUITES)) \
	    $(if $(DEMOS),--demos $(DEMOS)) $(if $(PARTS_MB),--parts-mb $(PARTS_MB))
