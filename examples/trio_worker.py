"""Shows a job queue on trio: SKIP LOCKED, woken by notifications, drained by SIGTERM.

    python examples/trio_worker.py [DSN]

Jobs are rows. A worker takes one in a transaction and deletes it there: a job whose worker dies,
or is cancelled, is somebody else's next. The example sends itself SIGTERM in the middle of
its work: what runs is finished, nothing new is begun, and no job is done twice or lost.
"""

from __future__ import annotations

import os
import signal

import trio
from _server import database

from aiopgsafe import Database, Draining

JOBS, WORKERS = 60, 4
TAKE = """
    delete from job where id = (select id from job order by id for update skip locked limit 1)
    returning id
"""


async def worker(db: Database, done: list[int]) -> None:
    async with db.listen("job") as wakeups:
        while True:
            while (job := await take(db, done)) is not None:
                print("done:", job)
            async for _ in wakeups:  # a notification, or a gap: look again in either case
                break


async def take(db: Database, done: list[int]) -> int | None:
    async with db.transaction() as tx:
        row = await (await tx.execute(TAKE)).fetchone()
        if row is not None:
            await trio.sleep(0.02)  # the work
            tx.on_commit(done.append, row[0])
    return row[0] if row is not None else None


async def producer(db: Database) -> None:
    for number in range(JOBS):
        async with db.transaction() as tx:
            await tx.execute("insert into job values (%s)", (number,))
            await db.notify("job")  # goes out with the COMMIT
        if number == JOBS // 2:
            os.kill(os.getpid(), signal.SIGTERM)


async def main(dsn: str) -> None:
    done: list[int] = []
    async with Database(dsn, max_size=WORKERS + 1) as db:
        await db.execute("drop table if exists job")
        await db.execute("create table job (id int primary key)")
    async with Database(dsn, max_size=WORKERS + 1) as db:
        with db.drain_on_signal(signal.SIGTERM, grace=10):
            try:
                async with trio.open_nursery() as nursery:
                    for _ in range(WORKERS):
                        nursery.start_soon(worker, db, done)
                    nursery.start_soon(producer, db)
            except* Draining:
                print("drained: no new jobs are taken")
    async with Database(dsn) as db:
        left = [row[0] for row in await (await db.execute("select id from job")).fetchall()]
        await db.execute("drop table job")
    assert len(done) == len(set(done)), "a job was done twice"
    assert not set(done) & set(left), "a job that was done is still there"
    print(f"{len(done)} jobs done, {len(left)} left for the next worker")


if __name__ == "__main__":
    with database() as dsn:
        trio.run(main, dsn)
