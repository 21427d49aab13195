# fp8rl on a CPU: `make demo` from a fresh clone needs Python 3.11, git, make and a C++ compiler.
SHELL := /bin/bash
PYTHON ?= python3.11
BIN := .venv/bin
STAMP := .venv/.installed
VERL_STAMP := .venv-verl/.installed
TORCH_INDEX := https://download.pytorch.org/whl/cpu

ifndef RUN
RUN := runs/demo-$(shell date +%Y%m%d-%H%M%S)
endif

.PHONY: setup setup-verl demo bench stability test test-long test-verl test-gpu bench-gpu lint

## make .venv with everything that is pinned; does nothing when it is up to date
setup: $(STAMP)

$(STAMP): requirements/torch.txt requirements/cpu.txt pyproject.toml
	@command -v $(PYTHON) > /dev/null || \
	  { echo "fp8rl needs Python 3.11: '$(PYTHON)' is not on the PATH (or: make PYTHON=...)"; exit 1; }
	@echo "installing the pinned CPU environment into .venv (3.7 GB, a minute or two)"
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --no-deps -r requirements/torch.txt || { \
	  echo "*** No CPU build of torch in the configured indexes; taking it from $(TORCH_INDEX)"; \
	  $(BIN)/pip install --quiet --no-deps --index-url $(TORCH_INDEX) -r requirements/torch.txt; }
	$(BIN)/pip install --quiet --no-deps -r requirements/cpu.txt
	$(BIN)/pip install --quiet --no-deps --no-build-isolation -e .
	@touch $(STAMP)

## run RL with FP8 rollouts and show what happened; RUN=folder chooses where
demo: setup
	@echo "run folder: $(RUN)"
	$(BIN)/fp8rl train examples/grpo.yaml run_dir=$(RUN)

## every benchmark of the README, each beside its alternatives; a folder in runs/ for each
bench: setup setup-verl
	$(BIN)/fp8rl bench quant
	.venv-verl/bin/fp8rl bench correction
	$(BIN)/fp8rl bench rollout --shape 0.3b --batches 1,4,8,32 --tokens 32 --lengths 128
	$(BIN)/fp8rl bench sync
	$(BIN)/fp8rl bench kv-scales
	$(BIN)/fp8rl bench density

# the last rollouts that `make bench` measured, for the claims table
BENCHED = $(lastword $(sort $(patsubst %/result.json,%,$(wildcard runs/bench-rollout-*/result.json))))

## is FP8 safe to train with? every arm, five seeds each; goes on where it was stopped
stability: setup
	$(BIN)/fp8rl stability examples/stability.yaml $(BENCHED:%=--bench %)

## on a machine with CUDA, in an environment with its torch and vLLM: make test-gpu GPU_BIN=...
GPU_BIN ?= .venv-gpu/bin
test-gpu:
	$(GPU_BIN)/python -m pytest -q -m gpu -rs

bench-gpu:
	$(GPU_BIN)/fp8rl bench quant --device cuda
	$(GPU_BIN)/fp8rl bench correction --device cuda
	$(GPU_BIN)/fp8rl bench rollout --shape qwen3-8b --device cuda --batches 64,256 \
	  --tokens 1024 --lengths 4096 --prompt 512

## the checks of `make lint`, then every test, two files at a time on a thread each
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder -m "not long"

## every architecture over every layout, every failure in every phase, hundreds of updates
test-long: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder -m long

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p fp8rl
	$(BIN)/lint-imports

## fp8rl inside the real veRL and TRL, which want another transformers than vLLM: .venv-verl
test-verl: setup-verl
	OMP_NUM_THREADS=1 .venv-verl/bin/python -m pytest -q tests/integrations/verl tests/integrations/trl

## make .venv-verl with what is pinned; does nothing when it is up to date
setup-verl: $(VERL_STAMP)

$(VERL_STAMP): requirements/torch.txt requirements/verl.txt pyproject.toml
	@echo "installing veRL and TRL into .venv-verl (2.3 GB, a minute or two)"
	$(PYTHON) -m venv .venv-verl
	.venv-verl/bin/pip install --quiet --no-deps -r requirements/torch.txt || \
	  .venv-verl/bin/pip install --quiet --no-deps --index-url $(TORCH_INDEX) -r requirements/torch.txt
	.venv-verl/bin/pip install --quiet --no-deps -r requirements/verl.txt
	.venv-verl/bin/pip install --quiet --no-deps --no-build-isolation -e .
	@touch $(VERL_STAMP)
