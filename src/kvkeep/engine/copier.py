"""Where a rank's copies run: in the caller, or on one thread of our own beside the engine's.

Knows nothing about plans, chunks or what is copied. Jobs run in their order. The thread is a daemon and is never
joined; NumPy's copies and xxhash release the interpreter's lock, so the engine's thread goes on meanwhile.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Protocol, TypeVar

from kvkeep.errors import CopyFailed

T = TypeVar("T")
MAX_JOBS = 4096
QUEUE_LIMIT_S = 60.0
_DIED = "the copying thread died of a bug; its traceback is in the log"


class Copier(Protocol):
    """Runs copies in the order in which they were submitted."""

    def submit(self, call: Callable[[], T]) -> Future[T]:
        """The call's result, now or later; CopyFailed as its exception if it never ran to its end."""

    def close(self) -> None:
        """Nothing more will be submitted; what was is still run."""


class InlineCopier:
    """Runs each copy before `submit` returns."""

    def submit(self, call: Callable[[], T]) -> Future[T]:
        """As `Copier.submit`; what the call raises is raised here."""
        job: Future[T] = Future()
        job.set_result(call())
        return job

    def close(self) -> None:
        """As `Copier.close`."""


class ThreadCopier:
    """One thread, on `cores` if there are any; at most MAX_JOBS copies wait, then `submit` does."""

    def __init__(self, cores: frozenset[int] = frozenset()) -> None:
        self._cores = cores
        self._jobs: queue.Queue[Callable[[bool], None] | None] = queue.Queue(MAX_JOBS)
        self._dead = threading.Event()
        threading.Thread(target=self._serve, name="kvkeep-copier", daemon=True).start()

    def submit(self, call: Callable[[], T]) -> Future[T]:
        """As `Copier.submit`."""
        job: Future[T] = Future()

        def run(alive: bool) -> None:
            done = False
            try:
                if alive:
                    job.set_result(call())
                    done = True
            finally:
                if not done:
                    job.set_exception(CopyFailed(_DIED))

        if self._dead.is_set():
            run(False)
        else:
            self._jobs.put(run, timeout=QUEUE_LIMIT_S)
            if self._dead.is_set():
                self._drop_all()
        return job

    def close(self) -> None:
        """As `Copier.close`."""
        with contextlib.suppress(queue.Full):
            self._jobs.put_nowait(None)

    def _serve(self) -> None:
        if self._cores:
            with contextlib.suppress(OSError):  # then it shares the engine's core
                os.sched_setaffinity(0, self._cores)
        try:
            while (run := self._jobs.get()) is not None:
                run(True)
        finally:
            self._dead.set()
            self._drop_all()

    def _drop_all(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                run = self._jobs.get_nowait()
                if run is not None:
                    run(False)


def spare_cores() -> frozenset[int]:
    """The CPUs that this process may use and the calling thread does not; empty if there are none.

    An engine binds its own threads; what the process was given is seen in its parent and its other threads.
    """
    mine = os.sched_getaffinity(0)
    given = set(mine)
    pids = [os.getppid(), *(int(task.name) for task in Path("/proc/self/task").iterdir())]
    for pid in pids:
        with contextlib.suppress(OSError):
            given |= os.sched_getaffinity(pid)
    if given == mine:
        return frozenset(mine) if len(mine) > 1 else frozenset()
    return frozenset(given - mine)
