"""Shows `Retry`: writers of one row under SERIALIZABLE, each of whom wins in the end.

python examples/retry_serializable.py [DSN]
"""

from __future__ import annotations

import anyio
from _server import database

from aiopgsafe import Database, IsolationLevel, Retry

WRITERS, TIMES = 8, 5


async def main(dsn: str) -> None:
    retry = Retry(attempts=50)
    async with Database(dsn, max_size=WRITERS) as db:
        await db.execute("drop table if exists hot")
        await db.execute("create table hot (n int)")
        await db.execute("insert into hot values (0)")

        @db.atomic(isolation_level=IsolationLevel.SERIALIZABLE, retry=retry)
        async def increment() -> None:
            row = await (await db.execute("select n from hot")).fetchone()
            assert row is not None
            await db.execute("update hot set n = %s", (row[0] + 1,))

        async def writer() -> None:
            for _ in range(TIMES):
                await increment()

        async with anyio.create_task_group() as tasks:
            for _ in range(WRITERS):
                tasks.start_soon(writer)
        print(await (await db.execute("select n from hot")).fetchone(), "=", WRITERS * TIMES)
        print(f"{retry.retries} attempts were run again")
        await db.execute("drop table hot")


if __name__ == "__main__":
    with database() as dsn:
        anyio.run(main, dsn)
