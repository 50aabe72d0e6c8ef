"""The workloads: on a connection of one's own, on a pool, and many tasks on a pool."""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Callable
from contextlib import AsyncExitStack
from time import perf_counter
from typing import Any

import asyncpg
import psycopg

import aiopgsafe
from benchmarks.clients import Client, Do, asyncpg_options
from benchmarks.turns import Operation, Workload

TASKS = (1, 10, 100, 1000)
POOL_SIZE = 10


async def on_one_connection(clients: dict[str, Client], stack: AsyncExitStack) -> dict[str, Any]:
    """By title: the workload, and how many operations a turn has."""
    conns = {n: await stack.enter_async_context(c.connection()) for n, c in clients.items()}

    def each(of: Callable[[Client], Do | None]) -> Workload:
        def bound(do: Do, conn: Any) -> Operation:
            return lambda: do(conn)

        return {n: bound(do, conns[n]) for n, c in clients.items() if (do := of(c)) is not None}

    def inserts(client: Client, number: int) -> Do:
        async def run(conn: Any) -> None:
            async with client.transaction(conn):
                for _ in range(number):
                    await client.insert(conn)

        return run

    return {
        "SELECT 1": (each(lambda c: c.select), 25),
        "SELECT by key": (each(lambda c: c.by_key), 25),
        "one INSERT": (each(lambda c: inserts(c, 1)), 25),
        "three INSERTs": (each(lambda c: inserts(c, 3)), 25),
        "10,000 rows": (each(lambda c: c.fetch), 1),
        "executemany, 1,000 rows": (each(lambda c: c.insert_many), 1),
        "COPY in, 100,000 rows": (each(lambda c: c.copy_in), 1),
        "COPY out, 100,000 rows": (each(lambda c: c.copy_out), 1),
    }


def on_a_pool(clients: dict[str, Client]) -> dict[str, Workload]:
    def acquire(client: Client) -> Operation:
        async def run() -> None:
            async with client.connection():
                pass

        return run

    def inserts(client: Client, number: int) -> Operation:
        async def run() -> None:
            async with client.connection() as conn, client.transaction(conn):
                for _ in range(number):
                    await client.insert(conn)

        return run

    def nested(client: Client) -> Operation:
        async def run() -> None:
            async with client.connection() as conn, client.transaction(conn):
                await client.insert(conn)
                async with client.transaction(conn):
                    await client.insert(conn)

        return run

    return {
        "pool: acquire, release": {name: acquire(c) for name, c in clients.items()},
        "pool: one INSERT": {name: inserts(c, 1) for name, c in clients.items()},
        "pool: three INSERTs": {name: inserts(c, 3) for name, c in clients.items()},
        "pool: nested, two INSERTs": {name: nested(c) for name, c in clients.items()},
    }


async def contend(client: Client, tasks: int, each: int) -> tuple[float, float]:
    """Tasks with so many one-INSERT transactions each: transactions/s, and their p99 in ms."""
    took: list[float] = []

    async def work() -> None:
        for _ in range(each):
            start = perf_counter()
            async with client.connection() as conn, client.transaction(conn):
                await client.insert(conn)
            took.append(perf_counter() - start)

    start = perf_counter()
    async with asyncio.TaskGroup() as group:
        for _ in range(tasks):
            group.create_task(work())
    return len(took) / (perf_counter() - start), statistics.quantiles(took, n=100)[-1] * 1e3


def connecting(dsn: str) -> Workload:
    """Connect, ask one question, and close."""

    async def ours() -> None:
        await _use(await aiopgsafe.AsyncConnection.connect(dsn, autocommit=True))

    async def theirs() -> None:
        await _use(await psycopg.AsyncConnection.connect(dsn, autocommit=True))

    async def fast() -> None:
        conn = await asyncpg.connect(**asyncpg_options(dsn))
        await conn.fetchrow("select 1")
        await conn.close()

    return {"aiopgsafe": ours, "psycopg": theirs, "asyncpg": fast}


async def _use(conn: Any) -> None:
    await conn.execute("select 1")
    await conn.close()
