"""Transactions on pooled connections: one INSERT, a nested one, three INSERTs."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from typing import Any, NamedTuple

import asyncpg
import psycopg_pool

import aiopgsafe
from benchmarks.turns import Operation, Workload


class Client(NamedTuple):
    """How each client takes a connection, begins a transaction on it, and inserts."""

    connection: Callable[[], AbstractAsyncContextManager[Any]]
    transaction: Callable[[Any], AbstractAsyncContextManager[Any]]
    insert: Callable[[Any], Awaitable[object]]


async def clients(dsn: str, stack: AsyncExitStack) -> dict[str, Client]:
    options: dict[str, Any] = {"min_size": 1, "max_size": 1, "open": False}
    options["kwargs"] = {"autocommit": True}
    ours = await stack.enter_async_context(aiopgsafe.AsyncConnectionPool(dsn, **options))
    theirs = await stack.enter_async_context(psycopg_pool.AsyncConnectionPool(dsn, **options))
    async with ours.connection() as conn:
        await conn.execute("create unlogged table if not exists bench (id int, what text)")
        info = conn.info
    fast = await stack.enter_async_context(
        asyncpg.create_pool(
            host=info.host,
            port=info.port,
            user=info.user,
            database=info.dbname,
            min_size=1,
            max_size=1,
        )
    )

    async def insert(conn: Any) -> None:
        await conn.execute("insert into bench values (%s, %s)", (1, "one"))

    async def insert_asyncpg(conn: Any) -> None:
        await conn.execute("insert into bench values ($1, $2)", 1, "one")

    def transaction(conn: Any) -> Any:
        return conn.transaction()

    return {
        "aiopgsafe": Client(ours.connection, transaction, insert),
        "psycopg_pool": Client(theirs.connection, transaction, insert),
        "asyncpg": Client(fast.acquire, transaction, insert_asyncpg),
    }


def workloads(clients: dict[str, Client]) -> dict[str, Workload]:
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
        "pooled one-INSERT": {name: inserts(client, 1) for name, client in clients.items()},
        "pooled nested": {name: nested(client) for name, client in clients.items()},
        "pooled three INSERTs": {name: inserts(client, 3) for name, client in clients.items()},
    }
