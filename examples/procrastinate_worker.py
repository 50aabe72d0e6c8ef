"""Shows procrastinate, a job queue, on a pool of ours: `pool_factory`.

    python examples/procrastinate_worker.py [DSN]

Its worker is stopped by SIGTERM in the middle: what runs is finished, and each job is done once.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal

import procrastinate
from _server import database

from aiopgsafe import AsyncConnectionPool, Database

JOBS = 20


async def main(dsn: str) -> None:
    # It would rather have its App in a module of its own.
    logging.getLogger("procrastinate").setLevel(logging.ERROR)
    app = procrastinate.App(
        connector=procrastinate.PsycopgConnector(
            conninfo=dsn,
            kwargs={"options": "-c search_path=procrastinate_example"},
            pool_factory=AsyncConnectionPool,
        )
    )
    done: list[int] = []

    @app.task(name="work")
    async def work(number: int) -> None:
        await asyncio.sleep(0.01)
        done.append(number)
        if number == JOBS // 2:
            os.kill(os.getpid(), signal.SIGTERM)

    async with Database(dsn) as db:
        await db.execute("drop schema if exists procrastinate_example cascade")
        await db.execute("create schema procrastinate_example")
        async with app.open_async():
            await app.schema_manager.apply_schema_async()
            for number in range(JOBS):
                await work.defer_async(number=number)
            await app.run_worker_async(concurrency=2)
            print(f"stopped by SIGTERM: {len(done)} jobs are done")
            await app.run_worker_async(concurrency=2, wait=False)
            print(f"another worker: {len(done)} jobs are done")
        cur = await db.execute(
            "select status, count(*) from procrastinate_example.procrastinate_jobs group by status"
        )
        print(await cur.fetchall())
        await db.execute("drop schema procrastinate_example cascade")
    assert sorted(done) == [*range(JOBS)]


if __name__ == "__main__":
    with database() as dsn:
        asyncio.run(main(dsn))
