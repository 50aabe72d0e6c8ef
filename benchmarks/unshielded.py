"""What the shield costs: a copy of aiopgsafe that holds nothing back, for comparison only.

A second copy of the modules, patched once: patching the first for a turn would
throw away what the interpreter has learnt of it, and measure that.
"""

from __future__ import annotations

import importlib
import sys
from contextlib import AsyncExitStack
from types import ModuleType
from typing import Any

import psycopg

import aiopgsafe
from benchmarks.turns import Operation, Workload


def unshielded_copy() -> ModuleType:
    """`aiopgsafe`, with waiting that any cancellation ends and no signal deferred."""
    original = {name: sys.modules.pop(name) for name in list(sys.modules) if _is_ours(name)}
    try:
        copy = importlib.import_module("aiopgsafe")
        shield = importlib.import_module("aiopgsafe._shield")
        importlib.import_module("aiopgsafe._backends._asyncio")
    finally:
        for name in [name for name in sys.modules if _is_ours(name)]:
            del sys.modules[name]
        sys.modules.update(original)

    async def hold(self: Any, job: Any) -> Any:
        return await job.wait()

    def enter(self: Any, shield: Any, *, ending: bool = False) -> bool:
        return True

    def leave(self: Any, shield: Any) -> None:
        self.delivered = False

    shield.Shield.hold = hold
    shield.SignalGate.enter = enter
    shield.SignalGate.leave = leave
    return copy


def _is_ours(name: str) -> bool:
    return name.partition(".")[0] == "aiopgsafe"


UNSHIELDED: type[psycopg.AsyncConnection] = unshielded_copy().AsyncConnection


async def workload(dsn: str, stack: AsyncExitStack) -> Workload:
    """An INSERT in a transaction, on a connection each."""

    async def transaction(cls: type[psycopg.AsyncConnection]) -> Operation:
        conn = await cls.connect(dsn, autocommit=True)
        stack.push_async_callback(conn.close)

        async def run() -> None:
            async with conn.transaction():
                await conn.execute("insert into bench values (%s, %s)", (1, "one"))

        return run

    return {
        "aiopgsafe": await transaction(aiopgsafe.AsyncConnection),
        "unshielded": await transaction(UNSHIELDED),
    }
