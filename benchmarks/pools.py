"""A pool of each client: acquire and release, and many tasks that want few connections."""

from __future__ import annotations

import asyncio
import random
import statistics
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from time import perf_counter
from typing import Any, NamedTuple

import asyncpg
import psycopg_pool

import aiopgsafe
from benchmarks.turns import Operation, Workload

TASKS = 1000
SIZE = 10


class Pool(NamedTuple):
    connection: Callable[[], AbstractAsyncContextManager[Any]]
    select: Callable[[Any], Awaitable[object]]


async def pools(dsn: str, stack: AsyncExitStack) -> dict[str, Pool]:
    options: dict[str, Any] = {
        "min_size": SIZE,
        "max_size": SIZE,
        "open": False,
        "kwargs": {"autocommit": True},
    }
    ours = await stack.enter_async_context(aiopgsafe.AsyncConnectionPool(dsn, **options))
    theirs = await stack.enter_async_context(psycopg_pool.AsyncConnectionPool(dsn, **options))
    await ours.wait()
    await theirs.wait()
    async with ours.connection() as conn:
        info = conn.info
        fast = await stack.enter_async_context(
            asyncpg.create_pool(
                host=info.host,
                port=info.port,
                user=info.user,
                database=info.dbname,
                min_size=SIZE,
                max_size=SIZE,
            )
        )

    async def select(conn: Any) -> None:
        await (await conn.execute("select 1")).fetchone()

    async def select_asyncpg(conn: Any) -> None:
        await conn.fetchrow("select 1")

    return {
        "aiopgsafe": Pool(ours.connection, select),
        "psycopg_pool": Pool(theirs.connection, select),
        "asyncpg": Pool(fast.acquire, select_asyncpg),
    }


def acquiring(clients: dict[str, Pool]) -> Workload:
    """Acquire and release a connection that is idle."""

    def operation(pool: Pool) -> Operation:
        async def run() -> None:
            async with pool.connection():
                pass

        return run

    return {name: operation(pool) for name, pool in clients.items()}


async def contend(pool: Pool) -> tuple[float, float]:
    """All tasks at once, one statement each: µs per task, and the 99th percentile of the waits."""
    waits: list[float] = []

    async def client() -> None:
        asked = perf_counter()
        async with pool.connection() as conn:
            waits.append(perf_counter() - asked)
            await pool.select(conn)

    start = perf_counter()
    async with asyncio.TaskGroup() as tasks:
        for _ in range(TASKS):
            tasks.create_task(client())
    took = perf_counter() - start
    return took / TASKS * 1e6, statistics.quantiles(waits, n=100)[-1] * 1e3


async def contention(
    clients: dict[str, Pool], rounds: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Medians over the rounds, in which the clients take turns: µs per task, p99 wait in ms."""
    costs: dict[str, list[float]] = {name: [] for name in clients}
    waits: dict[str, list[float]] = {name: [] for name in clients}
    order = random.Random(0)
    for _ in range(rounds):
        for name, pool in order.sample(list(clients.items()), len(clients)):
            cost, wait = await contend(pool)
            costs[name].append(cost)
            waits[name].append(wait)
    return (
        {name: statistics.median(values) for name, values in costs.items()},
        {name: statistics.median(values) for name, values in waits.items()},
    )
