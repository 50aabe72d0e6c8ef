"""The ways in which the clients are cancelled."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeAlias

import anyio

from . import native
from .native import Work

Way: TypeAlias = Callable[[Work, float | None], Awaitable[None]]
"""Does the work, and cancels it after so many seconds (None: never) if it isn't done by then."""


async def scope_cancel(work: Work, delay: float | None) -> None:
    """By `cancel()` of a cancel scope."""

    async def cancel_later(seconds: float) -> None:
        await anyio.sleep(seconds)
        scope.cancel()

    async with anyio.create_task_group() as tasks:
        with anyio.CancelScope() as scope:
            if delay is not None:
                tasks.start_soon(cancel_later, delay)
            await work()
        tasks.cancel_scope.cancel()  # the task that would come too late


async def scope_deadline(work: Work, delay: float | None) -> None:
    """By the deadline of a cancel scope."""
    with anyio.move_on_after(delay):
        await work()


def ways_of(loop: str) -> dict[str, Way]:
    """The ways that a loop has ("asyncio", "uvloop", "trio"), by the names shown to people."""
    if loop == "trio":
        return {"scope.cancel()": scope_cancel, "move_on_after()": scope_deadline}
    return {
        "task.cancel()": native.task_cancel,
        "scope.cancel()": scope_cancel,
        "asyncio.timeout()": native.timeout,
    }
