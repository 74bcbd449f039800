"""Daemon threads for calls that block: promotions before deletes before stores, and a bound on what waits.

Knows nothing about files. One event loop submits; answers come back into it. The threads are never joined, so a device
that hangs delays neither the loop nor the end of the process.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import Callable
from enum import IntEnum
from typing import Generic, TypeVar

from kvkeep.errors import TierError, TierUnavailable
from kvkeep.tiers.aligned import aligned_bytes
from kvkeep.tiers.tier import Bytes

T = TypeVar("T")


class Urgency(IntEnum):
    """What goes first."""

    LOAD = 0
    DELETE = 1
    STORE = 2


class Scratch:
    """A thread's own page-aligned memory, for headers."""

    def __init__(self) -> None:
        self._memory = aligned_bytes(1 << 16)

    def take(self, nbytes: int) -> Bytes:
        """The first `nbytes` of it, whatever they hold."""
        if nbytes > self._memory.nbytes:
            self._memory = aligned_bytes(nbytes)
        return self._memory[:nbytes]


class IoJob(Generic[T]):
    """A call on its way; `done` gives its result, or None where it never ran: withdrawn, or too many were waiting."""

    __slots__ = ("call", "done", "urgency")

    def __init__(self, urgency: Urgency, call: Callable[[Scratch], T], done: asyncio.Future[T | None]) -> None:
        self.urgency = urgency
        self.call = call
        self.done = done

    def finish(self, result: T | None, error: TierError | None) -> None:
        """In the loop: hands the outcome to whoever waits."""
        if self.done.done():
            return
        if error is None:
            self.done.set_result(result)
        else:
            self.done.set_exception(error)


class IoThreads:
    """`count` threads; at most `queue_jobs` calls of each urgency wait. One thread is never given to stores."""

    def __init__(self, count: int, queue_jobs: int, name: str) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue_jobs = queue_jobs
        self._stores_at_once = max(1, count - 1)
        self._changed = threading.Condition()
        self._waiting: dict[Urgency, deque[IoJob]] = {urgency: deque() for urgency in Urgency}  # type: ignore[type-arg]
        self._storing = 0
        self._closed = False
        for number in range(count):
            self._start(f"{name}-{number}")

    def submit(self, urgency: Urgency, call: Callable[[Scratch], T]) -> IoJob[T]:
        """Queue a call; an OSError that it raises becomes a TierUnavailable."""
        job = IoJob(urgency, call, self._loop.create_future())
        with self._changed:
            full = self._closed or len(self._waiting[urgency]) >= self._queue_jobs
            if not full:
                self._waiting[urgency].append(job)
                self._changed.notify()
        if full:
            job.finish(None, None)
        return job

    def withdraw(self, job: IoJob[T]) -> None:
        """Take back a call that has not begun; one that has is not affected."""
        with self._changed:
            try:
                self._waiting[job.urgency].remove(job)
            except ValueError:
                return
        job.finish(None, None)

    def withdraw_all(self) -> None:
        """Take back every call that has not begun."""
        with self._changed:
            jobs = [job for waiting in self._waiting.values() for job in waiting]
            for waiting in self._waiting.values():
                waiting.clear()
        for job in jobs:
            job.finish(None, None)

    def close(self) -> None:
        """Let the threads end once they have returned from what they do."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self.withdraw_all()

    def _start(self, name: str) -> None:
        threading.Thread(target=self._serve, name=name, daemon=True).start()

    def _serve(self) -> None:
        """Performs jobs until `close`. A bug in one ends this thread, with a traceback, and another takes its place."""
        scratch = Scratch()
        closed = False
        try:
            while (job := self._next()) is not None:
                self._perform(job, scratch)
            closed = True
        finally:
            if not closed:
                self._start(threading.current_thread().name)

    def _next(self) -> IoJob | None:  # type: ignore[type-arg]
        with self._changed:
            while not self._closed:
                for urgency, waiting in self._waiting.items():
                    if waiting and (urgency is not Urgency.STORE or self._storing < self._stores_at_once):
                        self._storing += urgency is Urgency.STORE
                        return waiting.popleft()
                self._changed.wait()
        return None

    def _perform(self, job: IoJob[T], scratch: Scratch) -> None:
        result: T | None = None
        error: TierError | None = TierUnavailable("an I/O thread died of a bug; its traceback is in the log")
        try:
            result, error = job.call(scratch), None
        except OSError as failure:
            error = TierUnavailable(str(failure))
        except TierError as failure:
            error = failure
        finally:
            with self._changed:
                if job.urgency is Urgency.STORE:
                    self._storing -= 1
                    self._changed.notify()
            with contextlib.suppress(RuntimeError):  # the loop has ended: nobody waits any more
                self._loop.call_soon_threadsafe(job.finish, result, error)
