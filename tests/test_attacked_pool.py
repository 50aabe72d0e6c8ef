"""What an adversary found in the pool, the Database and its draining: each must stay mended."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator, Callable
from time import monotonic
from types import FrameType
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import psycopg
import psycopg_pool
import pytest
from psycopg.pq import TransactionStatus

from aiopgsafe import (
    AsyncConnection,
    AsyncConnectionPool,
    ConnectionReleased,
    Database,
    Draining,
    Transaction,
    TransactionState,
)
from aiopgsafe._shield import GATE
from aiopgsafe.testing import Delay, FaultProxy, TemporaryServer, command_complete

pytestmark = pytest.mark.anyio

Admin = psycopg.Connection[Any]
Conn = AsyncConnection[Any]
Pool = AsyncConnectionPool[Conn]


def new_pool(dsn: str, **options: Any) -> Pool:
    return AsyncConnectionPool(dsn, open=False, **options)


@pytest.fixture
async def db(dsn: str, admin: Admin, anyio_backend: object) -> AsyncIterator[Database]:
    admin.execute("create table t (id int)")
    async with Database(dsn, min_size=1, max_size=3) as db:
        yield db


async def until(condition: Callable[[], object]) -> None:
    with anyio.fail_after(10):
        while not condition():
            await anyio.lowlevel.checkpoint()


def rows(admin: Admin) -> list[int]:
    return [id for (id,) in admin.execute("select id from t order by id")]


async def end_session(admin: Admin, conn: Conn) -> None:
    admin.execute("select pg_terminate_backend(%s, 5000)", (conn.info.backend_pid,))


# The ambient rule


async def numbers(db: Database) -> AsyncIterator[int]:
    async with db.transaction() as tx:
        cur = await tx.execute("select generate_series(1, 2)")
        async for (number,) in cur:
            yield number


async def test_a_block_left_in_a_generator_leaves_the_blocks_around_it_alone(
    db: Database, dsn: str, admin: Admin
) -> None:
    async with Database(dsn, min_size=1) as other:
        generator = numbers(other)
        await anext(generator)
        with pytest.raises(LookupError):
            async with db.transaction():
                await db.execute("insert into t values (1)")
                async for _ in generator:
                    pass
                await db.execute("insert into t values (2)")  # still the block's
                raise LookupError
    assert rows(admin) == []


async def test_a_generator_begun_in_another_task_leaves_our_block_alone(
    db: Database, admin: Admin
) -> None:
    generator = numbers(db)

    async def begin() -> None:
        await anext(generator)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(begin)
    with pytest.raises(LookupError):
        async with db.transaction():
            async for _ in generator:
                pass
            await db.execute("insert into t values (1)")
            raise LookupError
    assert rows(admin) == []


# Callbacks


async def test_callbacks_of_as_many_blocks_as_there_are_places_use_the_database(
    db: Database, admin: Admin
) -> None:
    """The blocks have given their connections back before."""

    async def work(number: int) -> None:
        async with db.transaction() as tx:
            tx.on_commit(db.execute, "insert into t values (%s)", (10 + number,))
            await tx.execute("insert into t values (%s)", (number,))

    with anyio.fail_after(5):
        async with anyio.create_task_group() as tasks:
            for number in range(db.pool.max_size):
                tasks.start_soon(work, number)
    assert rows(admin) == [0, 1, 2, 10, 11, 12]


@pytest.mark.parametrize("how", ["putconn", "close", "close in a block"])
async def test_a_callback_that_gives_a_connection_back_disturbs_nobody(
    dsn: str, how: str, anyio_backend: object
) -> None:
    """Nor does it leave signals deferred for ever."""
    called: list[str] = []
    pool = new_pool(dsn, min_size=2, close_returns=True)

    async def in_a_block() -> None:
        async with pool.connection() as other:
            await other.execute("select 1")
            await other.commit()
            await other.close()

    async with pool:
        async with pool.connection() as conn:
            callbacks: dict[str, Any] = {
                "putconn": lambda: pool.putconn(conn),
                "close": lambda: conn.close(),
                "close in a block": in_a_block,
            }
            async with conn.transaction() as tx:
                tx.on_commit(callbacks[how])
                tx.on_commit(called.append, "second")
        assert tx.state is TransactionState.COMMITTED
        assert called == ["second"]
        assert not GATE._shields
        await pool.wait()
        assert pool.get_stats()["pool_available"] == 2


async def test_what_a_callback_does_to_its_connection_is_not_the_blocks_error(
    db: Database, admin: Admin
) -> None:
    """The connection is the pool's by then, and refuses."""
    with pytest.raises(ExceptionGroup, match="is committed") as caught:
        async with db.transaction() as tx:
            tx.on_commit(tx.connection.execute, "select 1/0")
            await tx.execute("insert into t values (1)")
    assert isinstance(caught.value.exceptions[0], ConnectionReleased)
    assert rows(admin) == [1]


async def test_a_task_that_a_callback_started_outlives_it_as_any_other_task(
    db: Database, admin: Admin
) -> None:
    """It has no share in the connection, nor in what callbacks may do in a drain."""
    over = anyio.Event()

    async def worker() -> None:
        await over.wait()
        with pytest.raises(Draining):
            await db.execute("select 1")

    async with anyio.create_task_group() as tasks:

        async def start() -> None:
            tasks.start_soon(worker)
            tasks.start_soon(db.execute, "insert into t values (2)")
            async with db.transaction() as inner:
                await until(lambda: rows(admin) == [1, 2])
                await inner.execute("insert into t values (3)")

        async with db.transaction() as tx:
            tx.on_commit(start)
            await tx.execute("insert into t values (1)")
        await db.drain(5)
        over.set()
    assert rows(admin) == [1, 2, 3]


# Draining


async def test_a_drain_ends_though_a_connection_in_use_has_died(db: Database, admin: Admin) -> None:
    async with db.connection() as conn:
        with anyio.fail_after(5):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(db.drain, 30)
                await until(lambda: db.draining)
                await end_session(admin, conn)
                with pytest.raises(psycopg.OperationalError):
                    await conn.execute("select 1")
    assert db.pool.closed


@pytest.mark.parametrize("whose", ["block", "execute"])
async def test_a_commit_in_flight_is_waited_for_however_often_one_hurries(
    proxy: FaultProxy, admin: Admin, whose: str, anyio_backend: object
) -> None:
    admin.execute("create table t (id int)")
    held = proxy.inject(Delay(1.0), command_complete("COMMIT"))
    ended = False

    async def commit(db: Database) -> None:
        nonlocal ended
        if whose == "block":
            async with db.transaction() as tx:
                await tx.execute("insert into t values (1)")
        else:
            async with db.connection() as conn:
                await conn.execute("insert into t values (1)")
                await conn.execute("commit")
        ended = True

    db = Database(proxy.dsn, min_size=1, cancel_timeout=0.1)
    async with db, anyio.create_task_group() as tasks:
        tasks.start_soon(commit, db)
        await until(lambda: held.hits)
        for _ in range(3):
            tasks.start_soon(db.drain, 0)
        await db.drain(0)
        assert ended
    assert rows(admin) == [1]


async def test_of_several_databases_the_last_one_passes_the_signal_on(
    db: Database, dsn: str, admin: Admin
) -> None:
    arrived: list[bool] = []
    work_over = False

    def handler(signum: int, frame: FrameType | None) -> None:
        arrived.append(work_over)

    async def work() -> None:
        nonlocal work_over
        async with db.transaction() as tx:
            await tx.execute("select pg_sleep(0.3)")
            await tx.execute("insert into t values (1)")
        work_over = True

    previous = signal.signal(signal.SIGUSR1, handler)
    try:
        async with Database(dsn, min_size=1) as idle:
            with db.drain_on_signal(signal.SIGUSR1), idle.drain_on_signal(signal.SIGUSR1):
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(work)
                    await until(lambda: db.pool._places.used)
                    os.kill(os.getpid(), signal.SIGUSR1)
                await until(lambda: arrived)
    finally:
        signal.signal(signal.SIGUSR1, previous)
    assert arrived == [True]
    assert rows(admin) == [1]


async def test_a_client_between_two_checks_gets_nothing_once_the_database_drains(
    dsn: str, anyio_backend: object
) -> None:
    checked = 0

    async def check(conn: Conn) -> None:
        nonlocal checked
        checked += 1
        raise LookupError

    async with Database(dsn, min_size=1, check=check) as db, anyio.create_task_group() as tasks:

        async def client() -> None:
            with pytest.raises(Draining):
                await db.execute("select 1")

        tasks.start_soon(client)
        await until(lambda: checked)
        await db.drain(5)


# Connections that are handed out


async def test_a_waiting_client_gets_no_dead_connection(
    dsn: str, admin: Admin, anyio_backend: object
) -> None:
    """Died in use, and given back before the loop could see it."""
    async with new_pool(dsn, min_size=1) as pool:
        conn = await pool.getconn()

        async def client() -> None:
            async with pool.connection() as conn:
                await conn.execute("select 1")

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(client)
            await until(lambda: pool.get_stats()["requests_waiting"])
            await end_session(admin, conn)
            await pool.putconn(conn)


@pytest.mark.parametrize("how", ["raw", "client", "executemany", "stream"])
async def test_the_next_holder_listens_to_nothing(
    dsn: str, how: str, anyio_backend: object
) -> None:
    async with new_pool(dsn, min_size=1, kwargs={"autocommit": True}) as pool:
        async with pool.connection() as conn:
            if how == "raw":
                await psycopg.AsyncRawCursor(conn).execute("listen c")
            elif how == "client":
                await psycopg.AsyncClientCursor(conn).execute("listen c")
            elif how == "executemany":
                await conn.cursor().executemany("listen c", [()])
            else:
                with pytest.raises(psycopg.ProgrammingError):
                    async for _ in conn.cursor().stream("listen c"):
                        pass
        async with pool.connection() as conn:
            cur = await conn.execute("select count(*) from pg_listening_channels()")
            assert await cur.fetchone() == (0,)


async def test_callbacks_of_the_pool_may_use_the_connection_as_a_block(
    dsn: str, anyio_backend: object
) -> None:
    async def callback(conn: Conn) -> None:
        async with conn:
            await conn.execute("select 1")

    options: dict[str, Any] = dict.fromkeys(("configure", "check", "reset"), callback)
    async with new_pool(dsn, min_size=1, **options) as pool:
        for _ in range(2):
            async with pool.connection(timeout=5) as conn:
                await conn.execute("select 1")
        assert pool.get_stats()["connections_num"] == 1


async def test_a_check_that_leaves_a_transaction_open_gives_out_none(
    dsn: str, anyio_backend: object
) -> None:
    async def check(conn: Conn) -> None:
        await conn.execute("select 1")

    async with new_pool(dsn, min_size=1, check=check) as pool, pool.connection() as conn:
        assert conn.info.transaction_status is TransactionStatus.IDLE


async def test_nothing_of_a_transaction_is_left_to_the_next_holder(
    dsn: str, anyio_backend: object
) -> None:
    async with new_pool(dsn, min_size=1) as pool:
        conn = await pool.getconn()
        await conn.tpc_begin("left")
        await conn.execute("select 1")
        await conn.tpc_prepare()
        await pool.putconn(conn)
        conn = await pool.getconn()
        await conn.tpc_rollback("left")
        tx = conn.transaction()
        await tx.__aenter__()
        await conn.execute("rollback")
        await pool.putconn(conn)
        async with pool.connection() as conn:
            await conn.execute("select 1")
            await conn.commit()


async def test_callbacks_of_a_transaction_that_was_lost_run_when_it_is_given_back(
    dsn: str, admin: Admin, anyio_backend: object
) -> None:
    called: list[str] = []
    async with new_pool(dsn, min_size=1) as pool:
        conn = await pool.getconn()
        await conn.execute("select 1")
        tx: Transaction[Any]
        async with conn.transaction() as tx:
            tx.on_rollback(called.append, "rolled back")
        await end_session(admin, conn)
        with pytest.raises(psycopg.OperationalError):
            await conn.execute("select 1")
        await pool.putconn(conn)
    assert called == ["rolled back"]
    assert tx.state is TransactionState.ROLLED_BACK


# The pool's own life


async def test_a_pool_that_was_made_smaller_has_no_more_connections(
    dsn: str, anyio_backend: object
) -> None:
    async with new_pool(dsn, min_size=4) as pool:
        await pool.wait()
        conn = await pool.getconn()
        await pool.resize(1, 1)
        await pool.putconn(conn)
        assert pool.get_stats()["pool_size"] == 1
        async with pool.connection():
            with pytest.raises(psycopg_pool.PoolTimeout):
                await pool.getconn(timeout=0.05)


async def test_opening_twice_at_once_and_closing_meanwhile_leave_no_connection(
    dsn: str, admin: Admin, anyio_backend: object
) -> None:
    named = f"{dsn} application_name=twice"
    sessions = "select count(*) from pg_stat_activity where application_name = 'twice'"
    errors: list[type[Exception]] = []

    async def open_it(db: Database) -> None:
        try:
            await db.open()
        except Exception as exc:
            errors.append(type(exc))

    db = Database(named, min_size=1)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(open_it, db)
        tasks.start_soon(open_it, db)
    assert errors == [psycopg.InterfaceError]
    assert admin.execute(sessions).fetchone() == (1,)
    await db.close()

    errors.clear()
    db = Database(named, min_size=1)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(open_it, db)
        await until(lambda: db.pool._opening)
        await db.close()
    assert errors == [psycopg_pool.PoolClosed]
    await until(lambda: admin.execute(sessions).fetchone() == (0,))


async def test_closed_before_it_began_to_connect_it_counts_nothing(
    dsn: str, anyio_backend: object
) -> None:
    pool = new_pool(dsn, min_size=2)
    await pool.open()
    await pool.close()
    assert pool.get_stats()["pool_size"] == 0


@pytest.mark.parametrize("loop_name", ["asyncio", "uvloop"])
@pytest.mark.parametrize("callback", ["configure", "reset"])
async def test_a_callback_that_raises_a_cancellation_of_its_own_costs_a_connection(
    dsn: str, callback: str, anyio_backend: object
) -> None:
    import asyncio

    calls = 0

    async def fail_once(conn: Conn) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise asyncio.CancelledError

    options: dict[str, Any] = {callback: fail_once}
    async with new_pool(dsn, min_size=1, **options) as pool:
        with anyio.fail_after(5):
            for _ in range(2):
                async with pool.connection() as conn:
                    await conn.execute("select 1")
    assert calls >= 2


@pytest.mark.parametrize("loop_name", ["asyncio", "uvloop"])
async def test_a_reset_that_does_not_let_itself_be_cancelled_is_left_behind(
    dsn: str, anyio_backend: object
) -> None:
    import asyncio

    over = anyio.Event()

    async def reset(conn: Conn) -> None:
        while not over.is_set():
            try:
                await over.wait()
            except asyncio.CancelledError:
                continue

    kwargs = {"commit_timeout": 0.1, "cancel_timeout": 0.1}
    async with new_pool(dsn, min_size=1, kwargs=kwargs, reset=reset) as pool:
        conn = await pool.getconn()
        start = monotonic()
        await pool.putconn(conn)
        assert monotonic() - start < 5
        over.set()


async def test_wait_is_woken_by_a_resize(server: TemporaryServer, anyio_backend: object) -> None:
    async def refuse(conn: Conn) -> None:
        raise LookupError

    pool = new_pool(server.dsn, min_size=1, configure=refuse)
    async with pool:
        with anyio.fail_after(5):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(pool.wait, 30)
                await until(lambda: pool._filling)
                await pool.resize(0, 1)


async def test_who_waits_is_served_though_the_pool_has_given_up_once(
    server: TemporaryServer, anyio_backend: object
) -> None:
    failed: list[object] = []
    options = {"reconnect_timeout": 0.3, "reconnect_failed": failed.append}
    server.stop("immediate")
    try:
        pool = new_pool(server.dsn, min_size=1, **options)
        async with pool, anyio.create_task_group() as tasks:

            async def client() -> None:
                async with pool.connection(timeout=20) as conn:
                    await conn.execute("select 1")

            tasks.start_soon(client)
            await until(lambda: failed)
            await anyio.to_thread.run_sync(server.start)
    finally:
        if not server.running:
            server.start()


# A drop-in


async def test_what_is_assigned_anew_counts_for_new_connections(
    dsn: str, anyio_backend: object
) -> None:
    async with new_pool(dsn, min_size=1) as pool:
        pool.kwargs = {"application_name": "anew"}
        await pool.drain()
        async with pool.connection() as conn:
            cur = await conn.execute("show application_name")
            assert await cur.fetchone() == ("anew",)


async def test_close_returns_in_a_block_and_twice(dsn: str, anyio_backend: object) -> None:
    async with new_pool(dsn, min_size=1, close_returns=True) as pool:
        async with pool.connection() as conn:
            await conn.close()
            await conn.close()
            assert conn.closed
            with pytest.raises(ConnectionReleased):
                await conn.execute("select 1")
        async with pool.connection() as conn:
            await conn.execute("select 1")


async def test_a_block_is_one_tasks(dsn: str, anyio_backend: object) -> None:
    async with new_pool(dsn, min_size=0, max_size=1) as pool:
        lease = pool.connection()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(lease.__aenter__)
            await until(lambda: pool.get_stats()["requests_waiting"])
            with pytest.raises(RuntimeError, match="entered already"):
                await lease.__aenter__()
        await lease.__aexit__(None, None, None)
        assert pool.get_stats()["pool_available"] == 1


async def test_a_subclass_may_have_slots(dsn: str, anyio_backend: object) -> None:
    class Slotted(AsyncConnection[Any]):
        __slots__ = ("note",)
        note: str

    pool = AsyncConnectionPool(dsn, connection_class=Slotted, min_size=1, open=False)
    async with pool:
        async with pool.connection() as conn:
            conn.note = "kept"
        async with pool.connection() as conn:
            assert conn.note == "kept"
