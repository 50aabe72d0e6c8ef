"""What an application opens once: transactions that know each other, and an orderly end."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from time import monotonic
from typing import Any, cast

import anyio
import anyio.lowlevel
import anyio.to_thread
import psycopg
import psycopg_pool
import pytest

from aiopgsafe import AsyncConnection, Database, Draining, IsolationLevel, TransactionState
from aiopgsafe.testing import CancelSweep, Delay, FaultProxy, TemporaryServer, command_complete
from tests.conftest import sweeps
from tests.test_cancel_on_signal import program_handler

pytestmark = pytest.mark.anyio

Admin = psycopg.Connection[Any]


@pytest.fixture
async def db(dsn: str, anyio_backend: object) -> AsyncIterator[Database]:
    async with Database(dsn, min_size=1, max_size=3, timeout=5) as db:
        await db.execute("create table t (id int)")
        yield db


async def rows(db: Database) -> list[int]:
    cur = await db.execute("select id from t order by id")
    return [id for (id,) in await cur.fetchall()]


async def test_execute_is_one_statement_whose_result_is_loaded(db: Database) -> None:
    cur = await db.execute("select generate_series(1, %s)", (3,))
    assert await cur.fetchall() == [(1,), (2,), (3,)]
    assert cur.rowcount == 3
    await db.execute("insert into t values (1)")
    assert await rows(db) == [1]


async def test_a_block_inside_a_block_of_the_same_task_is_a_savepoint(db: Database) -> None:
    async with db.transaction() as outer:
        await outer.execute("insert into t values (1)")
        with pytest.raises(LookupError):
            async with db.transaction() as inner:
                assert inner.connection is outer.connection
                await db.execute("insert into t values (2)")
                raise LookupError
        await db.execute("insert into t values (3)")
    assert outer.state is TransactionState.COMMITTED
    assert await rows(db) == [1, 3]


async def test_a_child_task_has_a_transaction_of_its_own(db: Database) -> None:
    async def child() -> None:
        async with db.transaction() as tx:
            assert tx.connection is not outer.connection
            await tx.execute("insert into t values (2)")

    with pytest.raises(LookupError):
        async with db.transaction() as outer:
            await outer.execute("insert into t values (1)")
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(child)
            raise LookupError
    assert await rows(db) == [2]


async def test_atomic_is_a_fresh_block_at_every_call(db: Database) -> None:
    @db.atomic
    async def insert(id: int, depth: int = 0) -> int:
        await db.execute("insert into t values (%s)", (id,))
        if depth:
            await insert(id + 1, depth - 1)
        return id

    @db.atomic(isolation_level=IsolationLevel.SERIALIZABLE, read_only=True)
    async def level() -> Any:
        cur = await db.execute("show transaction_isolation")
        return await cur.fetchone()

    assert await insert(1, depth=2) == 1
    async with anyio.create_task_group() as tasks:
        for id in (10, 20, 30):
            tasks.start_soon(insert, id)
    assert await rows(db) == [1, 2, 3, 10, 20, 30]
    assert await level() == ("serializable",)
    with pytest.raises(TypeError):
        db.atomic(print)  # type: ignore[arg-type]


async def test_callbacks_may_use_the_database(db: Database) -> None:
    async def later() -> None:
        async with db.transaction() as tx:
            await tx.execute("insert into t values (2)")

    async with db.transaction() as tx:
        tx.on_commit(later)
        await tx.execute("insert into t values (1)")
    assert await rows(db) == [1, 2]


@pytest.mark.parametrize(("loop_name", "how"), sweeps())
async def test_nothing_is_lost_wherever_a_block_is_cancelled(
    db: Database, admin: Admin, how: Any
) -> None:
    n = 0

    async def work() -> None:
        nonlocal n
        n += 1
        async with db.transaction() as tx:
            await tx.execute("insert into t values (%s)", (n,))
            async with db.transaction():
                await db.execute("select 1")

    async for trial in CancelSweep(work, how=how):
        where = f"point {trial.point}: {trial.where}: {trial.exception!r}"
        found = admin.execute("select 1 from t where id = %s", (n,)).fetchone()
        notes = "".join(getattr(trial.exception, "__notes__", []))
        assert bool(found) == (trial.exception is None or "is committed" in notes), where
        stats = db.pool.get_stats()
        assert stats["pool_size"] == stats["pool_available"] >= 1, where


async def test_wrong_use_is_a_clear_error(dsn: str, anyio_backend: object) -> None:
    db = Database(dsn, min_size=1)
    with pytest.raises(psycopg_pool.PoolClosed, match="not open yet"):
        await db.execute("select 1")
    await db.open()
    with pytest.raises(psycopg.InterfaceError, match="open already"):
        await db.open()
    await db.close()
    with pytest.raises(psycopg_pool.PoolClosed, match="closed"):
        await db.execute("select 1")


async def test_another_thread_is_a_clear_error(db: Database) -> None:
    def elsewhere() -> None:
        with pytest.raises(psycopg.InterfaceError, match="another event loop"):
            asyncio.run(use())

    async def use() -> None:
        await db.execute("select 1")

    await anyio.to_thread.run_sync(elsewhere)


@pytest.mark.parametrize("dsn", ["host=127.0.0.1 port=1", "what is that"])
async def test_a_database_that_cannot_be_reached_says_so_at_once(
    dsn: str, anyio_backend: object
) -> None:
    db = Database(dsn)
    with anyio.fail_after(5), pytest.raises(psycopg.Error):
        await db.open()
    assert db.pool.closed


# Draining


async def wait_until_refused(db: Database) -> None:
    while not db.draining:
        await anyio.lowlevel.checkpoint()
    with pytest.raises(Draining):
        await db.execute("select 1")
    with pytest.raises(Draining):
        async with db.transaction():
            pass


async def test_draining_lets_what_runs_end_and_begins_nothing_new(
    db: Database, admin: Admin
) -> None:
    async def later() -> None:
        await db.execute("insert into t values (3)")

    async with anyio.create_task_group() as tasks, db.transaction() as tx:
        tasks.start_soon(db.drain)
        await wait_until_refused_by_others(db, tasks)
        await tx.execute("insert into t values (1)")
        async with db.transaction():
            await db.execute("insert into t values (2)")
        tx.on_commit(later)
    assert admin.execute("select id from t order by id").fetchall() == [(1,), (2,), (3,)]
    assert db.pool.closed


async def wait_until_refused_by_others(db: Database, tasks: Any) -> None:
    refused = anyio.Event()

    async def other() -> None:
        await wait_until_refused(db)
        refused.set()

    tasks.start_soon(other)
    await refused.wait()


async def test_after_the_grace_statements_are_cancelled_and_the_rest_is_closed(
    db: Database, admin: Admin
) -> None:
    ended: list[str] = []

    async def sleeps() -> None:
        try:
            async with db.transaction() as tx:
                await tx.execute("insert into t values (1)")
                await tx.execute("select pg_sleep(60)")
        except psycopg.errors.QueryCanceled:
            ended.append("cancelled")

    async def idles() -> None:
        try:
            async with db.transaction() as tx:
                await tx.execute("insert into t values (2)")
                await cast("AsyncConnection[Any]", tx.connection).wait_disconnected()
        except psycopg.OperationalError:
            ended.append("closed")

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(sleeps)
        tasks.start_soon(idles)
        busy = (
            "select count(*) from pg_stat_activity where pid <> pg_backend_pid()"
            " and (wait_event = 'PgSleep' or state = 'idle in transaction')"
        )
        while admin.execute(busy).fetchone() != (2,):
            await anyio.lowlevel.checkpoint()
        with anyio.fail_after(5):
            await db.drain(grace=0.05)
    assert sorted(ended) == ["cancelled", "closed"]
    assert admin.execute("select count(*) from t").fetchone() == (0,)


async def test_a_commit_in_flight_is_waited_for(
    proxy: FaultProxy, admin: Admin, anyio_backend: object
) -> None:
    admin.execute("create table t (id int)")
    in_commit = proxy.inject(Delay(0.4), command_complete("COMMIT"))
    async with Database(proxy.dsn, min_size=1) as db:
        states: list[Any] = []

        async def work() -> None:
            async with db.transaction() as tx:
                tx.on_commit(states.append, "called")
                await tx.execute("insert into t values (1)")
            states.append(tx.state)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(work)
            await anyio.to_thread.run_sync(in_commit.wait)
            await db.drain(grace=0)
    assert states == ["called", TransactionState.COMMITTED]


async def test_a_signal_drains_a_second_one_hurries_and_the_program_gets_it_at_the_end(
    db: Database, admin: Admin
) -> None:
    signum = signal.SIGUSR1

    async def sleeps() -> None:
        with pytest.raises(psycopg.errors.QueryCanceled):
            async with db.transaction() as tx:
                await tx.execute("select pg_sleep(60)")

    with program_handler(signum) as called, db.drain_on_signal(signum, grace=60):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(sleeps)
            asleep = "select count(*) from pg_stat_activity where wait_event = 'PgSleep'"
            while admin.execute(asleep).fetchone() != (1,):
                await anyio.lowlevel.checkpoint()
            os.kill(os.getpid(), signum)
            while not db.draining:
                await anyio.lowlevel.checkpoint()
            assert called == []
            os.kill(os.getpid(), signum)
        with anyio.fail_after(5):
            while not called:
                await anyio.lowlevel.checkpoint()
        assert called == [signum]
        assert db.pool.closed


async def test_bad_grace_is_refused(db: Database) -> None:
    with pytest.raises(ValueError, match="grace"):
        await db.drain(-1)
    with pytest.raises(ValueError, match="grace"):
        db.drain_on_signal(grace=-1)
    assert not db.draining


async def test_a_demoted_server_is_let_go_of(db: Database, server: TemporaryServer) -> None:
    async with db.connection() as conn:
        pid = conn.info.backend_pid
    server.psql("alter system set default_transaction_read_only = on")
    server.psql("select pg_reload_conf()")
    try:
        with anyio.fail_after(5):
            while True:
                try:
                    async with db.transaction() as tx:
                        await tx.execute("insert into t values (1)")
                except psycopg.errors.ReadOnlySqlTransaction:
                    break
    finally:
        with psycopg.connect(server.dsn, autocommit=True) as admin:
            admin.execute("set default_transaction_read_only = off")
            admin.execute("alter system reset default_transaction_read_only")
            admin.execute("select pg_reload_conf()")
    async with db.connection() as conn:
        assert conn.info.backend_pid != pid


@pytest.mark.anyio
async def test_the_one_that_was_closed_while_it_opened_fails_and_not_the_next(
    dsn: str, anyio_backend: object
) -> None:
    go_on = anyio.Event()

    async def configure(conn: AsyncConnection[Any]) -> None:
        await go_on.wait()

    db = Database(dsn, configure=configure, min_size=1)
    ends: list[str] = []

    async def open(name: str) -> None:
        try:
            await db.open()
            ends.append(f"{name} opened")
        except psycopg_pool.PoolClosed:
            ends.append(f"{name} closed")

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(open, "first")
        await anyio.lowlevel.checkpoint()
        await anyio.wait_all_tasks_blocked()
        await db.close()
        tasks.start_soon(open, "second")
        await anyio.wait_all_tasks_blocked()
        go_on.set()
    assert sorted(ends) == ["first closed", "second opened"]
    await db.close()


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_what_is_left_open_in_a_loop_that_ended_is_closed_by_the_next_open(
    dsn: str, admin: Admin, backend: str
) -> None:
    db = Database(f"{dsn} application_name=left", min_size=2)
    counts = []

    async def use() -> None:
        await db.open()
        await db.pool.wait()
        async with db.listen("a"):
            pass

    count = "select count(*) from pg_stat_activity where application_name = 'left'"
    for _ in range(4):
        anyio.run(use, backend=backend)
        deadline = monotonic() + 5
        while (row := admin.execute(count).fetchone()) and row[0] > 2:
            assert monotonic() < deadline
        counts.append(row)
    assert counts == [(2,)] * 4
    db.pool._abandon()
