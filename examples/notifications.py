"""Shows notifications: subscribers over one connection, and a gap where some may be missed.

python examples/notifications.py [DSN]
"""

from __future__ import annotations

import anyio
from _server import database

from aiopgsafe import Database, Gap

APPLICATION = "aiopgsafe example"


async def subscriber(db: Database, name: str, channel: str, ready: anyio.Event) -> None:
    async with db.listen(channel) as subscription:
        ready.set()
        async for item in subscription:
            if isinstance(item, Gap):
                print(f"{name}: something may have been missed")
            elif item.payload == "end":
                return
            else:
                print(f"{name}: {item.payload}")


async def main(dsn: str) -> None:
    async with (
        Database(dsn, application_name=APPLICATION) as db,
        anyio.create_task_group() as tasks,
    ):
        for name, channel in (("one", "a"), ("two", "a"), ("three", "b")):
            ready = anyio.Event()
            tasks.start_soon(subscriber, db, name, channel, ready)
            await ready.wait()
        await db.notify("a", "for one and two")
        async with db.transaction() as tx:
            await db.notify("b", "for three, with the COMMIT")
            await tx.execute("select 1")
        # The listener loses its connection, and makes another one.
        await db.execute(
            "select pg_terminate_backend(pid) from pg_stat_activity"
            " where application_name = %s and query like 'LISTEN%%'",
            (APPLICATION,),
        )
        await anyio.sleep(1)
        for channel in ("a", "b"):
            await db.notify(channel, "again")
            await db.notify(channel, "end")


if __name__ == "__main__":
    with database() as dsn:
        anyio.run(main, dsn)
