"""Shows a psycopg_pool that stays, with connections of ours: `connection_class`.

    python examples/psycopg_pool_drop_in.py [DSN]

For a library that brings a `psycopg_pool.AsyncConnectionPool` of its own. Where you can choose,
take `aiopgsafe.AsyncConnectionPool`: the same, without lost places, on trio too.
"""

from __future__ import annotations

import asyncio

from _server import database
from psycopg_pool import AsyncConnectionPool

from aiopgsafe import AsyncConnection


async def main(dsn: str) -> None:
    async with AsyncConnectionPool(
        dsn, connection_class=AsyncConnection, min_size=1, open=False
    ) as pool:
        async with pool.connection() as conn, conn.transaction() as tx:
            await tx.execute("create temporary table t (id int)")
            tx.on_commit(print, "committed")
        print("the transaction is", tx.state.value)


if __name__ == "__main__":
    with database() as dsn:
        asyncio.run(main(dsn))
