"""asyncio's own ways to cancel: all that the demo needs asyncio for."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeAlias

import anyio

Work: TypeAlias = Callable[[], Awaitable[None]]
"""What is cancelled. It handles its own errors: only cancellations come out."""


async def task_cancel(work: Work, delay: float | None) -> None:
    """By `task.cancel()`."""
    task = asyncio.ensure_future(work())
    loop = asyncio.get_running_loop()
    timer = None if delay is None else loop.call_later(delay, task.cancel)
    try:
        await asyncio.wait([task])
    finally:
        if timer is not None:
            timer.cancel()
        if not task.done():  # Ctrl-C
            task.cancel()
            with anyio.CancelScope(shield=True):
                await asyncio.wait([task])
    if not task.cancelled():
        task.result()


async def timeout(work: Work, delay: float | None) -> None:
    """By `asyncio.timeout()`."""
    try:
        async with asyncio.timeout(delay) as scope:
            await work()
    except TimeoutError:
        if not scope.expired():
            raise
