# `make demo` and `make test` do their own set-up. PYTHON=python3.12 chooses the interpreter.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
STARTED := $(shell date +%s)

.PHONY: help setup demo test lint notebooks

help:
	@echo "make setup      virtual environment, pinned packages, OpenGL libraries"
	@echo "make demo       demonstrations, training and evaluation of one task, notebooks 00 to 07"
	@echo "make test       lint and all tests"
	@echo "make lint       ruff"
	@echo "make notebooks  regenerate the .ipynb from their .py"

setup: $(STAMP)

$(STAMP): requirements.txt constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; (3, 10) <= sys.version_info[:2] <= (3, 13) or sys.exit( \
	    "Python %d.%d found, 3.10 to 3.13 needed; try: make PYTHON=python3.12" \
	    % sys.version_info[:2])'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --upgrade pip
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m trm_helpers preflight --gl
	@touch $(STAMP)

demo: setup
	TRM_STARTED_AT=$(STARTED) $(BIN)/python -m trm_helpers run demo

# A process per core, up to 4, each with one thread and whole files of tests, whose fixtures are dear.
test: setup lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

lint: setup
	$(BIN)/ruff check

# One way: the .py is the source. --update keeps the cell ids, so that only changed cells change.
notebooks: setup
	$(BIN)/jupytext --update --to ipynb notebooks/*.py
