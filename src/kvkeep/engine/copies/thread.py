"""Where copies run: in the caller, or on one thread of our own beside the engine's.

Knows nothing about plans, chunks or what is copied. FIFO; background jobs run only when no other job is queued. The
thread is a daemon and is never joined. NumPy's copies and xxhash release the interpreter's lock, so the engine's thread
goes on meanwhile.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections import deque
from collections.abc import Callable, Collection
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from pathlib import Path
from typing import Protocol, TypeVar

from kvkeep.errors import CopyFailed

T = TypeVar("T")
COPY_LIMIT_S = 60.0
"""The longest wait for copies."""
_DIED = "the copying thread died of a bug; its traceback is in the log"


class Copier(Protocol):
    """Runs copies in the order in which they were submitted."""

    def submit(self, call: Callable[[], T], background: bool = False) -> Future[T]:
        """The call's result, now or later; CopyFailed as its exception if the call did not return.

        `background`: no step waits for it, so it runs after all jobs that a step waits for.
        """

    def close(self) -> None:
        """No more jobs will be submitted; those that were still run."""


class InlineCopier:
    """Runs each copy before `submit` returns."""

    def submit(self, call: Callable[[], T], background: bool = False) -> Future[T]:
        """As `Copier.submit`; what the call raises is raised here."""
        job: Future[T] = Future()
        job.set_result(call())
        return job

    def close(self) -> None:
        """As `Copier.close`."""


class ThreadCopier:
    """One thread, on `cores` if any are given. Its queue is bounded by two steps' plans and the loads beside steps."""

    def __init__(self, cores: frozenset[int] = frozenset()) -> None:
        self._cores = cores
        self._lock = threading.Condition()
        self._jobs: dict[bool, deque[Callable[[bool], None]]] = {False: deque(), True: deque()}
        self._closed = False
        self._dead = False
        threading.Thread(target=self._serve, name="kvkeep-copier", daemon=True).start()

    def submit(self, call: Callable[[], T], background: bool = False) -> Future[T]:
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

        with self._lock:
            dead = self._dead
            if not dead:
                self._jobs[background].append(run)
                self._lock.notify()
        if dead:
            run(False)
        return job

    def close(self) -> None:
        """As `Copier.close`."""
        with self._lock:
            self._closed = True
            self._lock.notify()

    def _serve(self) -> None:
        if self._cores:
            with contextlib.suppress(OSError):  # then it shares the engine's core
                os.sched_setaffinity(0, self._cores)
        try:
            while (run := self._next()) is not None:
                run(True)
        finally:
            with self._lock:
                self._dead = True
                left = [*self._jobs[False], *self._jobs[True]]
            for run in left:
                run(False)

    def _next(self) -> Callable[[bool], None] | None:
        """Waits for a job; None once it is closed and nothing is left."""
        with self._lock:
            while not any(self._jobs.values()) and not self._closed:
                self._lock.wait()
            waiting = self._jobs[False] or self._jobs[True]
            return waiting.popleft() if waiting else None


def result_of(job: Future[T]) -> T | None:
    """A job's result once it has ended; None if it died.

    TimeoutError after COPY_LIMIT_S: its copies may still write, so nobody may go on as if they had ended.
    """
    try:
        return job.result(COPY_LIMIT_S)
    except CopyFailed:
        return None


def all_done(jobs: Collection[Future[T]], limit_s: float = 0.0) -> bool:
    """Whether all of these have ended, waiting for that at most `limit_s`."""
    if limit_s:
        wait_for(jobs, limit_s)
    return all(job.done() for job in jobs)


def spare_cores() -> frozenset[int]:
    """The CPUs that this process may use and the calling thread does not; empty if there are none.

    An engine binds its own threads; the affinities of its parent and its other threads show what the process may use.
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
