"""Daemon threads for calls that block: reads go before deletes, deletes before writes, and a limited number may wait.

One event loop submits calls, and gets their results back. The threads are never joined, so a device that hangs delays
neither the loop nor the end of the process.
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
    """Which calls go first: an engine waits for reads, and deletes make room for writes."""

    READ = 0
    DELETE = 1
    WRITE = 2


class Scratch:
    """A thread's own page-aligned memory, for headers."""

    def __init__(self) -> None:
        self._memory = aligned_bytes(1 << 16)

    def take(self, nbytes: int) -> Bytes:
        """The first `nbytes` of the memory, with whatever they hold; the next call gives them out again."""
        if nbytes > self._memory.nbytes:
            self._memory = aligned_bytes(nbytes)
        return self._memory[:nbytes]


class IoJob(Generic[T]):
    """A submitted call. `done` gives its result, or None if it never ran: withdrawn, or too many calls were waiting."""

    __slots__ = ("call", "done", "urgency")

    def __init__(self, urgency: Urgency, call: Callable[[Scratch], T], done: asyncio.Future[T | None]) -> None:
        self.urgency = urgency
        self.call = call
        self.done = done

    def finish(self, result: T | None, error: TierError | None) -> None:
        """In the loop: hand the outcome to the caller that waits."""
        if self.done.done():
            return
        if error is None:
            self.done.set_result(result)
        else:
            self.done.set_exception(error)


class IoThreads:
    """`count` threads, one of which never writes; at most `queue_jobs` calls of each urgency wait."""

    def __init__(self, count: int, queue_jobs: int, name: str) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue_jobs = queue_jobs
        self._writers = max(1, count - 1)
        self._changed = threading.Condition()
        self._waiting: dict[Urgency, deque[IoJob]] = {urgency: deque() for urgency in Urgency}  # type: ignore[type-arg]
        self._writing = 0
        self._closed = False
        for index in range(count):
            self._start(f"{name}-{index}")

    def submit(self, urgency: Urgency, call: Callable[[Scratch], T]) -> IoJob[T]:
        """Queue a call; an OSError of the call becomes a TierUnavailable."""
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
        """Take a call out of the queue; one that has begun goes on."""
        with self._changed:
            try:
                self._waiting[job.urgency].remove(job)
            except ValueError:
                return
        job.finish(None, None)

    def withdraw_all(self) -> None:
        """Empty the queue; calls that have begun go on."""
        with self._changed:
            jobs = [job for waiting in self._waiting.values() for job in waiting]
            for waiting in self._waiting.values():
                waiting.clear()
        for job in jobs:
            job.finish(None, None)

    def close(self) -> None:
        """Empty the queue, and end each thread when its call has returned."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self.withdraw_all()

    def _start(self, name: str) -> None:
        threading.Thread(target=self._serve, name=name, daemon=True).start()

    def _serve(self) -> None:
        """Run jobs until `close`. A bug in a job ends this thread, with a traceback, and a new thread replaces it."""
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
                    if waiting and (urgency is not Urgency.WRITE or self._writing < self._writers):
                        self._writing += urgency is Urgency.WRITE
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
                if job.urgency is Urgency.WRITE:
                    self._writing -= 1
                    self._changed.notify()
            with contextlib.suppress(RuntimeError):  # the loop has ended, and with it the caller
                self._loop.call_soon_threadsafe(job.finish, result, error)
