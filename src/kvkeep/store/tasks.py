"""The background tasks of a store: each is kept until it ends, and what it fails with is logged.

asyncio itself holds tasks by weak references only, and reports a failure when it collects the task. Knows nothing about
what the tasks do.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar

log = logging.getLogger("kvkeep.store")

Result = TypeVar("Result")


@dataclass
class Tasks:
    """All background tasks of one store process; only its event loop's thread may use it."""

    _running: dict[asyncio.Task[Any], object] = field(default_factory=dict)

    def start(self, steps: Coroutine[Any, Any, Result], owner: object = None) -> asyncio.Task[Result]:
        """Run `steps` in the background; `cancel(owner)` ends it early."""
        task = asyncio.get_running_loop().create_task(steps)
        self._running[task] = owner
        task.add_done_callback(self._ended)
        return task

    def cancel(self, owner: object) -> None:
        """Cancel the tasks of `owner`: they clean up in the loop's next turn."""
        for task in [task for task, of in self._running.items() if of is owner]:
            task.cancel()

    async def wait(self, steps: Coroutine[Any, Any, Result], limit_s: float) -> asyncio.Task[Result]:
        """Run `steps` and wait at most `limit_s` for its end; what takes longer goes on in the background."""
        task = self.start(steps)
        await asyncio.wait({task}, timeout=limit_s)  # not wait_for, which cancels what is late
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        del self._running[task]
        failure = None if task.cancelled() else task.exception()
        if failure is not None:
            log.error("a background task failed: %r", failure, exc_info=failure)
