"""Starts, watches and stops vLLM's OpenAI server. Knows nothing about kvkeep: what differs comes in as arguments."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

START_LIMIT_S = 240.0
STOP_LIMIT_S = 15.0
HOST = "127.0.0.1"


class DemoError(Exception):
    """The demo cannot go on; the message says why and what to do."""


@dataclass(frozen=True)
class ServerOptions:
    """What one server runs: a model, `cpus` for its threads, `more` arguments at the end."""

    name: str
    model: Path
    log: Path
    cpus: str
    more: tuple[str, ...] = ()

    def command(self, port: int) -> list[str]:
        """Make the command line; float32 and greedy sampling make answers comparable with those of a cold run."""
        return [
            *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
            *("--model", str(self.model), "--served-model-name", self.model.name),
            *("--host", HOST, "--port", str(port)),
            *("--dtype", "float32", "--max-model-len", "8192", "--block-size", "128"),
            *("--enforce-eager", "--enable-prompt-tokens-details", "--max-num-seqs", "8"),
            *self.more,
        ]

    def environment(self) -> dict[str, str]:
        """The demo's own environment with the network off, an explicit thread binding and the reset routes on."""
        return os.environ | {
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_SERVER_DEV_MODE": "1",  # POST /reset_prefix_cache
            "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
            "OMP_WAIT_POLICY": "PASSIVE",  # idle threads sleep, so that the server beside is not slowed down
            "VLLM_CPU_OMP_THREADS_BIND": self.cpus,  # "auto" would differ between with and without a connector
        }


def free_port() -> int:
    """Find a loopback TCP port on which nobody listens just now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def log_tail(log: Path, n_lines: int = 30) -> str:
    """Return the last lines of a log, for an error message."""
    if not log.exists():
        return "(no log)"
    return "\n".join(log.read_text(errors="replace").splitlines()[-n_lines:])


def last_line(log: Path, n_characters: int) -> str:
    """Return the end of a log's last line, for a progress bar."""
    return log_tail(log, 1)[-n_characters:]


class Server:
    """One running server, ended by `stop`; its processes share a session of their own, so none is left behind."""

    def __init__(self, options: ServerOptions) -> None:
        self.options = options
        self.port = free_port()
        options.log.parent.mkdir(parents=True, exist_ok=True)
        with options.log.open("wb") as log:
            self._process = subprocess.Popen(
                options.command(self.port),
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=options.environment(),
                start_new_session=True,
            )
        self._started_s = time.monotonic()

    def failure(self, what: str) -> DemoError:
        """Make an error that quotes the log's last lines and says where the rest is."""
        log = self.options.log
        return DemoError(
            f"The server {self.options.name} {what}.\nThe last lines of {log}:\n\n{log_tail(log)}\n\n"
            f"Read the whole log, look at free memory (the demo wants about 8 GiB) and run it again; "
            f"`make clean` and `make demo` start from scratch."
        )

    def check_alive(self) -> None:
        """Raise DemoError if the server has ended."""
        code = self._process.poll()
        if code is not None:
            raise self.failure(f"ended with exit status {code}")

    def until_ready(self) -> Iterator[float]:
        """Yield the seconds since the start until /health answers 200; DemoError if that takes too long."""
        while not self._healthy():
            self.check_alive()
            waited_s = time.monotonic() - self._started_s
            if waited_s > START_LIMIT_S:
                raise self.failure(f"was not ready after {START_LIMIT_S:.0f} s")
            yield waited_s
            time.sleep(0.2)

    def _healthy(self) -> bool:
        connection = http.client.HTTPConnection(HOST, self.port, timeout=5)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == http.client.OK
        except OSError:
            return False
        finally:
            connection.close()

    def stop(self) -> None:
        """End the server by its process id, within STOP_LIMIT_S, and then whatever is left of its session."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(STOP_LIMIT_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # an engine outlives an API process that was killed
