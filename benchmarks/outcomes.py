"""What it costs that a lost COMMIT can be asked for: on a server that flushes each commit."""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import Any

import aiopgsafe
from benchmarks.turns import Operation, Workload

CREATE_TOKENS = """
    create schema if not exists aiopgsafe;
    create table if not exists aiopgsafe.token (
        token uuid primary key, resolved boolean not null default false,
        created timestamptz not null default now()
    )
"""


async def workload(dsn: str, stack: AsyncExitStack) -> Workload:
    """An INSERT in a transaction, on a connection each."""

    async def connect(**kwargs: Any) -> aiopgsafe.AsyncConnection[Any]:
        conn = await aiopgsafe.AsyncConnection.connect(dsn, autocommit=True, **kwargs)
        stack.push_async_callback(conn.close)
        return conn

    asking, silent, token = await connect(), await connect(), await connect(commit_token=True)
    silent._origin = False  # as behind a pooler
    await asking.execute("create table if not exists bench_logged (id int, what text)")
    await asking.execute(CREATE_TOKENS.encode())

    def transaction(conn: aiopgsafe.AsyncConnection[Any]) -> Operation:
        async def run() -> None:
            async with conn.transaction():
                await conn.execute("insert into bench_logged values (%s, %s)", (1, "one"))

        return run

    return {
        "aiopgsafe": transaction(asking),
        "that can't ask": transaction(silent),
        "with a token": transaction(token),
    }
