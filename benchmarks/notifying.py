"""From another session's COMMIT of a NOTIFY to the handler, while the connection is idle."""

from __future__ import annotations

import random
import statistics
import sys
from contextlib import AsyncExitStack
from time import perf_counter

import anyio
import asyncpg
import psycopg

import aiopgsafe
from benchmarks.turns import Figures


async def latencies(dsn: str, rounds: int) -> dict[str, Figures]:
    """Of each client that this loop has; they take turns."""
    names = {"aiopgsafe": "aiopgsafe", "asyncpg": "asyncpg", "aiopgsafe's listen()": "listen"}
    if "trio" in sys.modules and sys.modules["trio"].lowlevel.in_trio_run():
        del names["asyncpg"]
    arrived = anyio.Event()
    came = 0.0

    def on_notify(*args: object) -> None:
        nonlocal came
        came = perf_counter()
        arrived.set()

    async with AsyncExitStack() as stack:
        ours = await aiopgsafe.AsyncConnection.connect(dsn, autocommit=True)
        stack.push_async_callback(ours.close)
        await ours.execute("listen aiopgsafe")
        ours.add_notify_handler(on_notify)
        if "asyncpg" in names:
            info = ours.info
            fast = await asyncpg.connect(
                host=info.host, port=info.port, user=info.user, database=info.dbname
            )
            stack.push_async_callback(fast.close)
            await fast.add_listener("asyncpg", on_notify)
        db = await stack.enter_async_context(aiopgsafe.Database(dsn, min_size=1))
        subscription = await stack.enter_async_context(db.listen("listen"))

        async def subscribed() -> None:
            async for _ in subscription:
                on_notify()

        tasks = await stack.enter_async_context(anyio.create_task_group())
        tasks.start_soon(subscribed)
        sender = stack.enter_context(psycopg.connect(dsn, autocommit=True))
        samples: dict[str, list[float]] = {name: [] for name in names}
        order = random.Random(0)
        for _ in range(rounds):
            for name, channel in order.sample(list(names.items()), len(names)):
                arrived = anyio.Event()
                # Blocks the loop until it is committed: from then on it is on its way.
                sender.execute(f"notify {channel}".encode())
                committed = perf_counter()
                await arrived.wait()
                samples[name].append((came - committed) * 1e6)
        tasks.cancel_scope.cancel()
    return {
        name: Figures(statistics.median(values), statistics.quantiles(values, n=100)[-1], 0, 0)
        for name, values in samples.items()
    }
