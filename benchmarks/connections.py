"""One connection of each client, and what is done on it."""

from __future__ import annotations

from contextlib import AsyncExitStack

import asyncpg
import psycopg

import aiopgsafe
from benchmarks.turns import Operation, Workload
from benchmarks.unshielded import unshielded_copy

UNSHIELDED: type[psycopg.AsyncConnection] = unshielded_copy().AsyncConnection


async def workloads(dsn: str, stack: AsyncExitStack) -> dict[str, Workload]:
    theirs, ours, bare = [
        await cls.connect(dsn, autocommit=True)
        for cls in (psycopg.AsyncConnection, aiopgsafe.AsyncConnection, UNSHIELDED)
    ]
    for conn in (theirs, ours, bare):
        stack.push_async_callback(conn.close)
    info = theirs.info
    fast = await asyncpg.connect(
        host=info.host, port=info.port, user=info.user, database=info.dbname
    )
    stack.push_async_callback(fast.close)
    await theirs.execute("create unlogged table if not exists bench (id int, what text)")
    await theirs.execute("create table if not exists bench_logged (id int, what text)")
    insert = "insert into bench values (%s, %s)"

    def select(conn: psycopg.AsyncConnection) -> Operation:
        async def run() -> None:
            await (await conn.execute("select 1")).fetchone()

        return run

    async def select_asyncpg() -> None:
        await fast.fetchrow("select 1")

    def transaction(conn: psycopg.AsyncConnection) -> Operation:
        async def run() -> None:
            async with conn.transaction():
                await conn.execute(insert, (1, "one"))

        return run

    async def transaction_asyncpg() -> None:
        async with fast.transaction():
            await fast.execute("insert into bench values ($1, $2)", 1, "one")

    return {
        "SELECT 1": {
            "aiopgsafe": select(ours),
            "psycopg": select(theirs),
            "asyncpg": select_asyncpg,
        },
        "one-INSERT transaction": {
            "aiopgsafe": transaction(ours),
            "psycopg": transaction(theirs),
            "asyncpg": transaction_asyncpg,
            "aiopgsafe, unshielded": transaction(bare),
        },
    }
