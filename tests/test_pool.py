"""P4: no connection, place, waiting client or cancellation is lost."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import suppress
from time import monotonic
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import psycopg
import psycopg_pool
import pytest
from psycopg.pq import TransactionStatus

import aiopgsafe
from aiopgsafe import AsyncConnection, AsyncConnectionPool, ConnectionReleased
from aiopgsafe.testing import CancelSweep, FaultProxy, Freeze, TemporaryServer, query
from tests.conftest import Figures, sweeps

pytestmark = pytest.mark.anyio

Conn = AsyncConnection[Any]
Pool = AsyncConnectionPool[Conn]


def new_pool(dsn: str, **options: Any) -> Pool:
    return AsyncConnectionPool(dsn, open=False, **options)


@pytest.fixture
async def pool(dsn: str, anyio_backend: object) -> AsyncIterator[Pool]:
    async with new_pool(dsn, min_size=2, max_size=2) as pool:
        await pool.wait()
        yield pool


async def all_can_be_had(pool: Pool) -> None:
    """All of `max_size` can be acquired, at the same time, and the statistics add up."""
    with anyio.fail_after(5):
        conns = [await pool.getconn() for _ in range(pool.max_size)]
        for conn in conns:
            assert conn.info.transaction_status is TransactionStatus.IDLE
            await conn.set_autocommit(True)
            await conn.execute("select 1")
            await conn.set_autocommit(False)
            await pool.putconn(conn)
    stats = pool.get_stats()
    assert stats["pool_size"] == stats["pool_available"] == pool.max_size
    assert stats["requests_waiting"] == 0


async def idle(pool: Pool) -> None:
    async with pool.connection() as conn:
        await conn.execute("select 1")


async def waiting(pool: Pool) -> None:
    """The only free connection is somebody else's, who gives it back in a while."""
    other = [await pool.getconn() for _ in range(pool.max_size)]

    async def give_back() -> None:
        with anyio.CancelScope(shield=True):
            for _ in range(3):
                await anyio.lowlevel.checkpoint()
            for conn in other:
                await pool.putconn(conn)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(give_back)
        conn = await pool.getconn()
        try:
            await conn.execute("select 1")
        finally:
            await pool.putconn(conn)  # in a transaction: it is rolled back


async def growing(pool: Pool) -> None:
    """No connection is left: it must grow."""
    await pool.drain()
    async with pool.connection() as conn, conn.transaction():
        await conn.execute("select 1")


async def checking(pool: Pool) -> None:
    await pool.check()


@pytest.mark.parametrize(("loop_name", "how"), sweeps())
@pytest.mark.parametrize("work", [idle, waiting, growing, checking])
async def test_nothing_is_lost_wherever_a_client_is_cancelled(
    pool: Pool, work: Any, how: Any, figures: Figures
) -> None:
    points = 0
    async for trial in CancelSweep(lambda: work(pool), how=how):
        points = trial.point - 1
        try:
            # A scope that is cancelled when nothing waits any more has nobody to tell.
            assert trial.completed or trial.exception is not None or how == "level"
            await all_can_be_had(pool)
        except BaseException as exc:
            exc.add_note(f"point {trial.point}: {trial.where}: {trial.exception!r}")
            raise
    assert points > 0 or work is checking
    figures(work=work.__name__, points=points, failures=0)


async def test_a_released_connection_refuses_its_old_holder(pool: Pool) -> None:
    async with pool.connection() as conn:
        cur = conn.cursor()
        tx = conn.transaction()
        pid = conn.info.backend_pid
    for holder in (conn, cur):
        with pytest.raises(ConnectionReleased):
            await holder.execute("select 1")
    with pytest.raises(ConnectionReleased):
        await tx.__aenter__()
    with pytest.raises(ConnectionReleased):
        await pool.putconn(conn)
    with pytest.raises(ConnectionReleased):
        async with conn:
            pass
    assert isinstance(conn, AsyncConnection)
    async with pool.connection() as other:
        assert other.info.backend_pid == pid
        with pytest.raises(ConnectionReleased):
            await conn.execute("select 1")


async def test_what_comes_back_is_made_clean(pool: Pool) -> None:
    conn = await pool.getconn()
    await conn.execute("listen c")
    conn.add_notify_handler(print)
    await pool.putconn(conn)
    async with pool.connection() as conn:
        await conn.set_autocommit(True)
        cur = await conn.execute("select count(*) from pg_listening_channels()")
        assert await cur.fetchone() == (0,)
        assert not conn._notify_handlers
        await conn.set_autocommit(False)


async def test_what_cannot_be_made_clean_is_replaced(pool: Pool) -> None:
    conn = await pool.getconn()
    rows = conn.cursor().stream("select generate_series(1, 100000)")
    await anext(rows)
    await pool.putconn(conn)
    assert conn.closed
    with suppress(psycopg.Error):
        await rows.aclose()  # type: ignore[attr-defined]
    await all_can_be_had(pool)


async def test_reset_that_fails_costs_the_connection_only(dsn: str, anyio_backend: object) -> None:
    async def reset(conn: Conn) -> None:
        await conn.execute("select 1/0")

    async with new_pool(dsn, min_size=1, reset=reset) as pool:
        async with pool.connection() as conn:
            pass
        assert conn.closed
        async with pool.connection():
            pass


async def test_first_come_first_served(pool: Pool) -> None:
    served: list[int] = []
    conns = [await pool.getconn() for _ in range(2)]

    async def client(number: int) -> None:
        async with pool.connection():
            served.append(number)

    async with anyio.create_task_group() as tasks:
        for number in range(10):
            tasks.start_soon(client, number)
            while pool.get_stats()["requests_waiting"] <= number:
                await anyio.lowlevel.checkpoint()
        await pool.putconn(conns.pop())
    await pool.putconn(conns.pop())
    assert served == list(range(10))


async def test_errors_are_psycopg_pools(dsn: str, anyio_backend: object) -> None:
    pool = new_pool(dsn, min_size=1, max_waiting=1)
    with pytest.raises(psycopg_pool.PoolClosed, match="not open yet"):
        await pool.getconn()
    async with pool:
        conn = await pool.getconn()
        with pytest.raises(psycopg_pool.PoolTimeout):
            await pool.getconn(timeout=0.01)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(pool.getconn)
            while not pool.get_stats()["requests_waiting"]:
                await anyio.lowlevel.checkpoint()
            with pytest.raises(psycopg_pool.TooManyRequests):
                await pool.getconn()
            tasks.cancel_scope.cancel()
        async with await AsyncConnection.connect(dsn) as stranger:
            with pytest.raises(ValueError, match="doesn't come from any pool"):
                await pool.putconn(stranger)
        await pool.putconn(conn)
    with pytest.raises(psycopg_pool.PoolClosed, match="already closed"):
        await pool.getconn()
    with pytest.raises(psycopg_pool.PoolClosed):
        await pool.open()


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"min_size": -1}, ValueError),
        ({"min_size": 3, "max_size": 2}, ValueError),
        ({"min_size": 0, "max_size": 0}, ValueError),
        ({"timeout": -1}, ValueError),
        ({"max_idle": "1"}, TypeError),
        ({"num_workers": 0}, ValueError),
        ({"connection_class": psycopg.AsyncConnection}, TypeError),
    ],
)
async def test_bad_options_are_refused_at_once(
    anyio_backend: object, options: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error):
        new_pool("", **options)


async def test_a_pool_of_another_loop_is_a_clear_error(pool: Pool) -> None:
    async def use() -> None:
        async with pool.connection():
            pass

    def elsewhere() -> None:
        with pytest.raises(psycopg.InterfaceError, match="another event loop"):
            asyncio.run(use())

    await anyio.to_thread.run_sync(elsewhere)


async def test_the_dead_are_replaced_and_nobody_gets_one(
    pool: Pool, server: TemporaryServer, figures: Figures
) -> None:
    """Idle ones are watched: no query finds it out."""
    with psycopg.connect(server.dsn, autocommit=True) as admin:
        admin.execute(
            "select pg_terminate_backend(pid, 5000) from pg_stat_activity"
            " where pid <> pg_backend_pid() and backend_type = 'client backend'"
        )
    start = monotonic()
    with anyio.fail_after(5):
        while pool.get_stats().get("connections_lost", 0) < 2:
            await anyio.lowlevel.checkpoint()
        seen = monotonic() - start
        await pool.wait()
    await all_can_be_had(pool)
    figures(seen_after=f"{seen * 1000:.1f} ms")


async def test_a_server_that_is_gone_and_comes_back_is_connected_to_again(
    pool: Pool, server: TemporaryServer, figures: Figures
) -> None:
    server.kill()
    with pytest.raises(psycopg_pool.PoolTimeout):
        async with pool.connection(timeout=0.3):
            pass
    server.start()
    start = monotonic()
    with anyio.fail_after(20):
        async with pool.connection() as conn:
            await conn.execute("select 1")
    figures(recovered_after=f"{monotonic() - start:.2f} s")


async def test_idle_ones_beyond_min_size_are_closed(dsn: str, anyio_backend: object) -> None:
    async with new_pool(dsn, min_size=1, max_size=4, max_idle=0.1) as pool:
        conns = [await pool.getconn() for _ in range(4)]
        for conn in conns:
            await pool.putconn(conn)
        with anyio.fail_after(5):
            while pool.get_stats()["pool_size"] > 1:
                await anyio.lowlevel.checkpoint()


async def test_a_frozen_reset_costs_bounded_time(proxy: FaultProxy, anyio_backend: object) -> None:
    proxy.inject(Freeze(), query("ROLLBACK"))
    kwargs = {"cancel_timeout": 0.2, "commit_timeout": 0.2}
    async with new_pool(proxy.dsn, min_size=1, kwargs=kwargs) as pool:
        conn = await pool.getconn()
        await conn.execute("select 1")
        with anyio.fail_after(2):
            await pool.putconn(conn)
        assert conn.closed
        async with pool.connection():
            pass


async def test_storm(
    dsn: str, admin: psycopg.Connection[Any], figures: Figures, long: bool, anyio_backend: object
) -> None:
    """200 tasks on 10 connections, cancelled at random: afterwards all 10 are there at once."""
    seconds = 10 if long else 2
    admin.execute("create table t (id int primary key)")
    told: set[int] = set()
    count = 0
    async with new_pool(dsn, min_size=10, kwargs={"autocommit": True}) as pool:
        await pool.wait()
        until = monotonic() + seconds
        rng = random.Random(1)

        async def client() -> None:
            nonlocal count
            while monotonic() < until:
                count += 1
                number = count
                with anyio.move_on_after(rng.random() * 0.1):
                    async with pool.connection() as conn, conn.transaction() as tx:
                        tx.on_commit(told.add, number)
                        await tx.execute("insert into t values (%s)", (number,))

        async with anyio.create_task_group() as tasks:
            for _ in range(200):
                tasks.start_soon(client)
        start = monotonic()
        conns = [await pool.getconn() for _ in range(10)]
        took = monotonic() - start
        for conn in conns:
            await pool.putconn(conn)
        created = pool.get_stats()["connections_num"]
    truth = {id for (id,) in admin.execute("select id from t")}
    assert told == truth
    assert created <= 12
    assert took < 1
    figures(
        transfers=count,
        committed=len(truth),
        lies=0,
        created=created,
        all_had_after=f"{took * 1000:.2f} ms",
    )


def test_the_pool_is_exported() -> None:
    assert aiopgsafe.AsyncConnectionPool.__module__ == "aiopgsafe"


def test_who_asks_for_the_class_is_answered_and_gets_none_of_its_machinery(dsn: str) -> None:
    """Libraries look whether they were given a connection or a pool (LangGraph does)."""
    parent = psycopg_pool.AsyncConnectionPool
    assert isinstance(AsyncConnectionPool(dsn, open=False), parent)
    names = [name for name in dir(parent) if not name.startswith("_")]
    inherited = {n for n in names if getattr(AsyncConnectionPool, n) is getattr(parent, n)}
    assert inherited == {"run_task", "schedule_task"}  # for its own workers
