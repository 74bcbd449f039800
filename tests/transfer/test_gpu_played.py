"""What only a device runs (`make gpu-test`, `make gpu-bench`) runs through where the CPU plays one: it must not rot."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PLAYED = Path(__file__).with_name("played_device.py")
LIMIT_S = 300.0

pytestmark = pytest.mark.slow


def run(*arguments: str) -> str:
    command = [sys.executable, *arguments]
    env = {"PATH": "/usr/bin:/bin", "PYTHONPATH": f"{ROOT / 'src'}:{PLAYED.parent}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def test_the_tests_of_a_device_pass_where_one_is_played():
    options = ["-p", "played_device", "-p", "no:cacheprovider", "-W", "default", "-m", "not real_device"]
    said = run("-m", "pytest", *options, "tests/transfer/test_gpu.py")
    assert " passed" in said or "100%" in said
    assert "skipped" not in said


def test_the_benchmark_runs_through_and_writes_its_rows(tmp_path: Path):
    said = run(str(PLAYED), "bench/gpu.py", "--json", str(tmp_path / "gpu.json"))
    rows = json.loads((tmp_path / "gpu.json").read_text())
    names = {row["case"] for row in rows}
    assert {"store-4KiB-kernel", "both-64KiB-copy", "product-beside-load-kernel", "load-64KiB-turned"} <= names
    assert "a CPU that plays a device: copy engine for pages from" in said
