"""Pools that open, close, shrink and outlive their server, cancelled meanwhile or not."""

from __future__ import annotations

import gc
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from time import monotonic
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import psycopg
import pytest

from aiopgsafe import AsyncConnection, AsyncConnectionPool, Database
from aiopgsafe.testing import CancelSweep, TemporaryServer
from tests.conftest import Figures, resident, sweeps

pytestmark = pytest.mark.anyio

Admin = psycopg.Connection[Any]
Pool = AsyncConnectionPool[AsyncConnection[Any]]


async def life_of_a_pool(dsn: str, opened: list[Callable[[], Awaitable[None]]]) -> None:
    pool: Pool = AsyncConnectionPool(dsn, min_size=2, open=False)
    opened.append(pool.close)
    await pool.open(wait=True)
    await pool.resize(1, 2)
    async with pool.connection() as conn:
        await conn.execute("select 1")
        await pool.drain()
    await pool.check()
    await pool.close()


async def life_of_a_database(dsn: str, opened: list[Callable[[], Awaitable[None]]]) -> None:
    db = Database(dsn, min_size=1)
    opened.append(db.close)
    async with db:
        async with db.transaction():
            await db.execute("select 1")
        await db.drain()


async def none_left(admin: Admin, name: str) -> None:
    count = "select count(*) from pg_stat_activity where application_name = %s"
    with anyio.fail_after(5):
        while admin.execute(count, (name,)).fetchone() != (0,):
            await anyio.lowlevel.checkpoint()


@pytest.mark.parametrize(("loop_name", "how"), sweeps())
@pytest.mark.parametrize("life", [life_of_a_pool, life_of_a_database])
async def test_no_connection_is_left_wherever_a_life_is_cancelled(
    dsn: str, admin: Admin, life: Any, how: Any, figures: Figures
) -> None:
    points = 0
    opened: list[Callable[[], Awaitable[None]]] = []
    named = f"{dsn} application_name=swept"
    async for trial in CancelSweep(lambda: life(named, opened), how=how):
        points = trial.point - 1
        try:
            assert trial.completed or trial.exception is not None or how == "level"
            while opened:
                await opened.pop()()
            await none_left(admin, "swept")
        except BaseException as exc:
            exc.add_note(f"point {trial.point}: {trial.where}: {trial.exception!r}")
            raise
    assert points > 0
    figures(life=life.__name__, points=points, failures=0)


async def test_a_server_killed_under_load_is_served_again_and_nobody_gets_the_dead(
    dsn: str, server: TemporaryServer, figures: Figures, anyio_backend: object
) -> None:
    """Every request that begins when the server is back succeeds, at its first attempt."""
    clients = 20
    restarted = 0.0
    errors = served = 0
    first: list[float] = []

    pool: Pool = AsyncConnectionPool(dsn, min_size=5, max_size=5, open=False)
    async with pool:
        await pool.wait()

        async def client() -> None:
            nonlocal errors, served
            done = 0
            while done < 50:
                begun = monotonic()
                try:
                    async with pool.connection(timeout=10) as conn:
                        await conn.execute("select 1")
                except psycopg.OperationalError:
                    assert not restarted or begun < restarted
                    errors += 1
                    continue
                served += 1
                if restarted and begun >= restarted:
                    done += 1
                    if done == 1:
                        first.append(monotonic() - restarted)

        async with anyio.create_task_group() as tasks:
            for _ in range(clients):
                tasks.start_soon(client)
            while served < 200:
                await anyio.lowlevel.checkpoint()
            await anyio.to_thread.run_sync(server.kill)
            await anyio.to_thread.run_sync(server.start)
            restarted = monotonic()
    assert len(first) == clients
    assert errors > 0
    figures(
        errors_while_down=errors,
        errors_after_recovery=0,
        first_served_after=f"{min(first):.3f} s",
        all_served_after=f"{max(first):.3f} s",
    )


def tasks_running() -> int:
    trio = sys.modules.get("trio")
    if trio is not None and trio.lowlevel.in_trio_task():
        return int(trio.lowlevel.current_statistics().tasks_living)
    import asyncio

    return len(asyncio.all_tasks())


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
async def test_opening_and_closing_leaves_nothing_behind(
    dsn: str, long: bool, figures: Figures, anyio_backend: object
) -> None:
    """Of connections of a program's own and of a pool's, some interrupted meanwhile."""
    cycles = 10_000 if long else 200

    async def cycle(number: int) -> None:
        if number % 10 == 0:
            pool: Pool = AsyncConnectionPool(dsn, min_size=1, open=False)
            async with pool, pool.connection() as pooled:
                await pooled.execute("select 1")
        else:
            with anyio.move_on_after(0.001 if number % 10 == 1 else 10):
                async with await AsyncConnection.connect(dsn, autocommit=True) as conn:
                    await conn.execute("select 1")

    def left() -> tuple[int, int, int]:
        gc.collect()
        return len(list(Path("/proc/self/fd").iterdir())), tasks_running(), len(gc.get_objects())

    for number in range(50):  # caches, prepared types, the watcher
        await cycle(number)
    before, memory = left(), resident()
    for number in range(cycles):
        await cycle(number)
    with anyio.fail_after(5):
        while left()[:2] != before[:2]:
            await anyio.lowlevel.checkpoint()
    after = left()
    assert after[2] - before[2] < 500
    figures(
        cycles=cycles,
        descriptors=after[0] - before[0],
        tasks=after[1] - before[1],
        objects=after[2] - before[2],
        memory=f"{resident() - memory:+.1f} MB",
    )
