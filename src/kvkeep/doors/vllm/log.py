"""kvkeep's log lines beside vLLM's: wherever vLLM writes at that time, each once, until the last engine has ended.

Knows nothing about what is logged. What vLLM sets up is looked at for each line, since it may be set up anew.
"""

from __future__ import annotations

import logging

log = logging.getLogger("kvkeep")


class BesideVllm(logging.Handler):
    """Gives each record to vLLM's logger; remembers for how many, and how kvkeep's logger was before."""

    def __init__(self) -> None:
        super().__init__()
        self.users = 0
        self._before = (log.level, log.propagate)

    def emit(self, record: logging.LogRecord) -> None:
        """Writes it where vLLM writes."""
        logging.getLogger("vllm").handle(record)

    def put_back(self) -> None:
        """Leaves kvkeep's logger as it was."""
        log.removeHandler(self)
        log.setLevel(self._before[0])
        log.propagate = self._before[1]


def join_log(level: str) -> None:
    """From now on kvkeep's lines of this level and above go where vLLM's go, and to handlers of its own.

    Each call is undone by one of `leave_log`.
    """
    beside = _beside() or BesideVllm()
    beside.users += 1
    log.addHandler(beside)
    log.setLevel(level.upper())
    log.propagate = False  # a handler of the root logger would write every line again


def leave_log() -> None:
    """An engine has ended; after the last one the log is as it was before the first."""
    beside = _beside()
    if beside is not None:
        beside.users -= 1
        if not beside.users:
            beside.put_back()


def _beside() -> BesideVllm | None:
    return next((handler for handler in log.handlers if isinstance(handler, BesideVllm)), None)
