"""Waiting for work that touches lent memory, which is not given back before the work has ended."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

T = TypeVar("T")


async def outlast(tasks: Iterable[asyncio.Future[Any]]) -> None:
    """Wait however often this is cancelled: lent memory is not given back before its thread has returned."""
    pending = {task for task in tasks if not task.done()}
    while pending:
        try:
            _, pending = await asyncio.wait(pending)
        except asyncio.CancelledError:
            pending = {task for task in pending if not task.done()}


async def in_thread(call: Callable[[], T]) -> T:
    """The result of a call that another thread makes; where this is cancelled, it raises once the call has ended."""
    task = asyncio.ensure_future(asyncio.to_thread(call))
    try:
        await asyncio.wait([task])
    except asyncio.CancelledError:
        await outlast([task])
        raise
    return task.result()
