"""Shows a `Database`: statements, a transaction with a savepoint, callbacks, a retry.

    python examples/quickstart.py [DSN]

The same on asyncio (as here), uvloop and trio: `anyio.run(main, dsn, backend="trio")`.
"""

from __future__ import annotations

import anyio
from _server import database

from aiopgsafe import Database, Retry, Rollback


async def main(dsn: str) -> None:
    async with Database(dsn, max_size=5) as db:
        await db.execute("create temporary table if not exists warm_up ()")
        await db.execute("drop table if exists quickstart")
        await db.execute("create table quickstart (name text primary key, n int)")

        async with db.transaction() as tx:
            await tx.execute("insert into quickstart values ('a', 1)")
            tx.on_commit(print, "committed: a")
            async with db.transaction() as savepoint:  # the same task: a savepoint
                await savepoint.execute("insert into quickstart values ('b', 1)")
                raise Rollback(savepoint)  # of this block only
        print("the transaction is", tx.state.value)

        @db.atomic(retry=Retry())
        async def count(name: str) -> int:
            cur = await db.execute(
                "update quickstart set n = n + 1 where name = %s returning n", (name,)
            )
            row = await cur.fetchone()
            return row[0] if row else 0

        async with anyio.create_task_group() as tasks:
            for _ in range(10):
                tasks.start_soon(count, "a")
        cur = await db.execute("select name, n from quickstart")
        print(await cur.fetchall())
        await db.execute("drop table quickstart")


if __name__ == "__main__":
    with database() as dsn:
        anyio.run(main, dsn)
