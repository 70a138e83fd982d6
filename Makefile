# Every target does its own set-up. PYTHON=python3.12 chooses the interpreter.
SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
STARTED := $(shell date +%s)
# pip with the versions tested; its output goes to a file, of which large downloads are shown
LOG := $(VENV)/install.log
INSTALL := PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore $(BIN)/python -m pip install \
    --constraint constraints.txt
SHOWN := 2>&1 | tee -a $(LOG) | sed -un -E \
    -e 's/^ *(Downloading|Using cached) ([A-Za-z0-9_.]+)-.* (\([0-9]{2,}[0-9.]* [MG]B\))$$/  \2 \3/p' \
    -e 's/^Installing collected .*/  installing all packages/p' || { tail -n 20 $(LOG); exit 1; }

.PHONY: help setup play demo lab test test-all test-fast test-pythons lint notebooks gallery \
    kaggle gpu-check

help:
	@echo "make setup      virtual environment, pinned packages, OpenGL libraries"
	@echo "make play       a trained policy plays and is filmed on three tasks"
	@echo "make demo       demonstrations, training and evaluation of one task, notebooks 00 to 07"
	@echo "make lab        JupyterLab with the notebooks"
	@echo "make test       lint and tests, without the slowest"
	@echo "make test-all   lint and all tests"
	@echo "make test-fast  tests that need neither the simulator nor the notebooks"
	@echo "make test-pythons  test-fast under each supported Python that is installed"
	@echo "make lint       ruff"
	@echo "make kaggle     dist/kaggle: wheels and kernels to push, for sessions without internet"
	@echo "make notebooks  regenerate the .ipynb from their .py"
	@echo "make gpu-check  minutes of measurements of this machine in one table, for a bug report"
	@echo "make gallery    docs/notebooks: executed copies, from the run of make demo; 03 again, trained"

setup:  # one at a time; anew for another PYTHON, and if the one it was made with is gone
	@mkdir -p $(dir $(VENV))
	@found=$$($(BIN)/python -VV 2> /dev/null); [ ! -e $(STAMP) ] || { [ -n "$$found" ] && \
	    [ "$(origin PYTHON)" = file -o "$$found" = "$$($(PYTHON) -VV)" ]; } || rm $(STAMP)
	@flock $(VENV).lock $(MAKE) --silent $(STAMP)

$(STAMP): requirements.txt constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; (3, 10) <= sys.version_info[:2] <= (3, 13) or sys.exit( \
	    "Python %d.%d found, 3.10 to 3.13 needed; try: make PYTHON=python3.12" \
	    % sys.version_info[:2])'
	@echo "installing into $(VENV), with all messages in $(LOG)"
	@$(PYTHON) -m venv $$([ "$$($(BIN)/python -VV 2> /dev/null)" = "$$($(PYTHON) -VV)" ] || echo --clear) $(VENV)
	@rm -f $(LOG)
	@$(INSTALL) --quiet --upgrade pip setuptools $(SHOWN)
	@$(INSTALL) --build-constraint constraints.txt --editable '.[dev]' $(SHOWN)
	@$(BIN)/python -m trm_helpers preflight --gl
	@touch $(STAMP)

# One episode of each of three tasks; another policy and other tasks:
# make play POLICY=pretrained/four-suites TASKS="0 19 29 33"
POLICY := pretrained/spatial-trm
TASKS := 0 4 5
play: setup
	@$(BIN)/python -m trm_helpers evaluate $(POLICY) --task-ids $(TASKS) --num-episodes 1 | sed -u '/^next /d'
	@page=$$($(BIN)/python -m trm_helpers report $(POLICY) | tail -n 1) && \
	    echo "page  $$page" && echo "next  make demo (all of it, from no data), make lab (notebooks)" && \
	    if [ -n "$$DISPLAY$$WAYLAND_DISPLAY" ]; then \
	        $(BIN)/python -m webbrowser "file://$$page" > /dev/null || true; fi

demo: setup
	@TRM_STARTED_AT=$(STARTED) $(BIN)/python -m trm_helpers run demo -p demos scripted

lab: $(BIN)/jupyter-lab
	$(BIN)/jupyter-lab $(if $(filter 0,$(shell id -u)),--allow-root) \
	    --ServerApp.jpserver_extensions=jupyterlab_jupytext=False \
	    --LabApp.default_url=/lab/tree/notebooks

$(BIN)/jupyter-lab: | setup
	@$(INSTALL) jupyterlab $(SHOWN)

# A process per core, up to 4, each with one thread and whole files: fixtures are expensive. Files
# keep the order of tests/conftest.py, so that no long one is left for the end.
WORKERS := --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
test: setup lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(WORKERS) -m "not slow"

test-all: setup lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(WORKERS)

test-fast: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(WORKERS) --dist worksteal -m "not sim and not notebooks"

# A virtual environment for each Python, 3 to 7 GB; PYTHONS="3.12 3.13" chooses.
PYTHONS ?= 3.10 3.11 3.12 3.13
test-pythons:
	@for version in $(PYTHONS); do \
	    python$$version -c "" 2> /dev/null || { echo "no python$$version: skipped"; continue; }; \
	    $(MAKE) test-fast PYTHON=python$$version VENV=.venv-$$version || exit; \
	done

lint: setup
	$(BIN)/ruff check

# One way: the .py is the source. --update keeps the cell ids, so that only changed cells change.
notebooks: setup
	$(BIN)/jupytext --update --to ipynb notebooks/*.py

gallery: setup
	$(BIN)/python -m trm_helpers run 03_model --run-name demo -p preset demo
	$(BIN)/python benchmarks/gallery.py artifacts/demo

# SUITES="libero_spatial libero_object" DEMOS=data/scripted PARTS_MB=60 choose what is packed.
KAGGLE_USERNAME ?= USERNAME
SUITES ?=
DEMOS ?=
PARTS_MB ?=
kaggle: setup
	$(BIN)/python kaggle/build.py --user $(KAGGLE_USERNAME) $(if $(SUITES),--suites $(SUITES)) \
	    $(if $(DEMOS),--demos $(DEMOS)) $(if $(PARTS_MB),--parts-mb $(PARTS_MB))

gpu-check: setup
	$(BIN)/python benchmarks/gpu_check.py
