# Two commands set up everything on a fresh machine: `make train` (the main job) and `make test`.
# Each makes its own virtual environment if there is none, installs what it needs, and may be repeated.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --constraint constraints.txt
CONFIG ?= demo
ARGS   ?=
OUT    ?= benchmarks/results
JOBS   ?= 2

.DEFAULT_GOAL := help
.PHONY: help train test lint format bench bench-report check-triton check-cuda emulator check-emulated test-long threads faults test-install test-matrix audit fuzz gpu-check gpu-sanitize clean distclean

help: ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12

train: $(VENV)/.train ## Convert and train the demo model on real text (CONFIG=small, ARGS="model.rank=64" …)
	$(BIN)/npt train $(CONFIG) $(ARGS)

test: $(VENV)/.dev ## Run the test suite
	$(BIN)/python -m pytest -n $(JOBS) $(ARGS)

lint: $(VENV)/.dev ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check-cuda: $(VENV)/.cuda ## Build every CUDA kernel and check its machine code (needs nvcc, no GPU)
	$(BIN)/python tools/gen_wgmma.py --check
	$(BIN)/python tools/protocol_model.py
	$(BIN)/python tools/check_cuda.py

emulator: $(VENV)/.dev ## Build the CUDA kernels for this CPU; then NPT_EMULATE=1 runs the backend cuda on CPU tensors
	$(BIN)/python tools/emulator/build_emulator.py --jobs $(JOBS)

check-emulated: emulator ## Run every CUDA kernel on this CPU under adversarial schedules (no nvcc, driver or GPU)
	$(BIN)/python tools/emulator/check.py --jobs $(JOBS) $(ARGS)
	$(BIN)/python tools/emulator/overlap.py
	NPT_EMULATE=1 $(BIN)/python -m pytest -q -n $(JOBS) tests/cuda/test_gpu.py tests/cuda/test_emulated_model.py tests/cuda/test_emulated_offsets.py
	NPT_EMULATE=1 $(BIN)/python -m pytest -q tests/ops/test_rows_of_a_batch.py -k cuda

test-install: | $(BIN)/python ## Build sdist and wheel, install them into fresh environments without nvcc, use them there
	$(BIN)/python tools/check_install.py $(ARGS)

test-matrix: | $(BIN)/python ## Models, files and commands with the oldest and the newest transformers, accelerate, peft …; a table
	$(BIN)/python tools/version_matrix.py --jobs $(JOBS) $(ARGS)

audit: | $(BIN)/python ## Known vulnerabilities in the versions of constraints.txt (pip-audit); a warning where nobody can be asked
	$(BIN)/python tools/audit.py $(ARGS)

fuzz: $(VENV)/.dev ## 100,000 drawn cases of ops, configurations, text, adapters, checkpoints; a table (ARGS="--seed 1")
	$(BIN)/python -m tests.fuzz --jobs $(JOBS) $(ARGS)

faults: $(VENV)/.dev ## npt train killed, starved and deceived 154 times; a table (a quarter of an hour; ARGS="--seed 1")
	$(BIN)/python -m tests.faults $(ARGS)

test-long: emulator threads faults ## What is too slow for CI: threads, faults, the emulator on many shapes, planted faults (two hours)
	$(BIN)/python tools/emulator/check.py --jobs $(JOBS) --shapes 8
	$(BIN)/python tools/emulator/mutations.py
	$(BIN)/python tools/emulator/sanitize.py --jobs $(JOBS)

threads: $(VENV)/.dev ## Threads, copies and processes on one model, 1,000 times each (part of test-long; ten minutes)
	NPT_THREAD_REPEATS=1000 $(BIN)/python -m pytest -q --timeout 3600 tests/model/test_threads.py

format: $(VENV)/.dev ## Rewrite files in the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

check-triton: $(VENV)/.dev ## Compile every Triton kernel for sm_80, sm_90, sm_100 (no GPU needed)
	$(BIN)/python tools/check_triton.py

bench: $(VENV)/.bench ## Benchmarks of this machine and their report (ARGS=--small: two minutes; OUT=DIR)
	$(BIN)/npt bench kernels --out $(OUT) $(ARGS)
	$(BIN)/npt bench memory --out $(OUT) $(ARGS)
	$(BIN)/npt bench train --out $(OUT) $(ARGS)
	$(MAKE) --no-print-directory bench-report OUT=$(OUT)

bench-report: $(VENV)/.bench ## The page, the documents' figures and the table of goals from OUT (default: benchmarks/results)
	$(BIN)/npt bench report --in $(OUT) --png docs/images --table docs/benchmarks.md

gpu-check: $(VENV)/.dev ## Numerics and timings of every backend on a GPU (ARGS="--device cpu --small": dry run)
	$(BIN)/npt bench check --out $(OUT) $(ARGS)

gpu-sanitize: $(VENV)/.dev ## Every CUDA kernel under compute-sanitizer (needs an H100 or H200)
	$(BIN)/python tools/sanitize_cuda.py $(ARGS)

clean: ## Remove caches and builds (keeps .venv, runs and downloads)
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean ## Also remove the virtual environment and runs
	rm -rf $(VENV) runs

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip setuptools wheel

# Editable install; a stamp per extra, renewed when the requirements change.
$(VENV)/.train: pyproject.toml setup.py constraints.txt | $(BIN)/python
	@echo "installing npt_kernels[train] into $(VENV) (first time: a few minutes)"
	$(PIP) --editable '.[train]'
	@touch $@

$(VENV)/.dev: pyproject.toml setup.py constraints.txt | $(BIN)/python
	@echo "installing npt_kernels[dev] into $(VENV) (first time: a few minutes)"
	$(PIP) --editable '.[dev]'
	@touch $@ $(VENV)/.train

$(VENV)/.bench: pyproject.toml setup.py constraints.txt | $(BIN)/python
	@echo "installing npt_kernels[bench] into $(VENV) (first time: a few minutes)"
	$(PIP) --editable '.[bench]'
	@touch $@ $(VENV)/.train

$(VENV)/.cuda: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) ninja pybind11 nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm
	@touch $@
