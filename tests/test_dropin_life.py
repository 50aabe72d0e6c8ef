"""Cancelling, closing, losing, sharing a connection: as psycopg's own class does."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from typing import Any

import anyio
import anyio.lowlevel
import psycopg
import psycopg_pool
import pytest
from psycopg.pq import TransactionStatus

import aiopgsafe
from aiopgsafe import AsyncConnection
from aiopgsafe.testing import Cut, FaultProxy
from tests.dropin import Scene, compared

# Cancelling


@compared
async def test_a_running_statement_is_cancelled_from_another_task(s: Scene) -> None:
    async def cancel(how: Callable[[], Any]) -> None:
        async with s.another() as other:
            running = "select 1 from pg_stat_activity where pid = %s and query like '%%sleep%%'"
            while not await (
                await other.execute(running + " and state = 'active'", (s.conn.info.backend_pid,))
            ).fetchall():
                pass
        if (awaitable := how()) is not None:
            await awaitable

    for how in (s.conn.cancel, s.conn.cancel_safe, lambda: s.conn.cancel_safe(timeout=0)):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(cancel, how)
            with s.fails():
                await s.conn.execute("select pg_sleep(20)")
        s.status()
        await s.conn.rollback()
    await s.conn.cancel_safe()  # with nothing running
    s.note(await s.fetch("select 1"))
    await s.conn.close()
    await s.conn.cancel_safe()
    s.conn.cancel()


@pytest.mark.anyio
async def test_cancel_safe_gives_up_after_its_timeout(proxy: FaultProxy) -> None:
    conn = await AsyncConnection.connect(proxy.dsn)
    try:
        frozen = proxy.freeze()
        with pytest.raises(psycopg.errors.CancellationTimeout), anyio.fail_after(5):
            await conn.cancel_safe(timeout=0.1)
        frozen.release()
        frozen.remove()
    finally:
        await conn.close()


# Closing


@compared
async def test_a_closed_connection_refuses_everything(s: Scene) -> None:
    cur = s.conn.cursor()
    await s.conn.close()
    await s.conn.close()
    s.note(s.conn.closed, s.conn.broken, s.conn.pgconn.status)

    async def nothing(s: Scene) -> None:
        async with s.conn.transaction():
            s.note("not reached")

    async def pipeline(s: Scene) -> None:
        async with s.conn.pipeline():
            s.note("not reached")

    async def copy(s: Scene) -> None:
        async with cur.copy("copy (select 1) to stdout"):
            s.note("not reached")

    async def listen(s: Scene) -> None:
        async for _ in s.conn.notifies(timeout=1):
            s.note("not reached")

    async def stream(s: Scene) -> None:
        async for _ in cur.stream("select 1"):
            s.note("not reached")

    calls: tuple[Callable[[], Any], ...] = (
        lambda: s.conn.execute("select 1"),
        lambda: cur.execute("select 1"),
        lambda: cur.executemany("select %s", [(1,)]),
        lambda: s.conn.set_autocommit(True),
        lambda: s.conn.set_read_only(True),
        lambda: s.conn.tpc_begin("x"),
        lambda: s.conn.tpc_recover(),
        lambda: listen(s),
        lambda: nothing(s),
        lambda: pipeline(s),
        lambda: copy(s),
        lambda: stream(s),
        s.conn.commit,
        s.conn.rollback,
    )
    for call in calls:
        with s.fails():
            await call()
    with s.fails():
        s.conn.cursor()
    with s.fails():
        s.conn.fileno()


@compared
async def test_closing_in_a_transaction_rolls_it_back(s: Scene) -> None:
    await s.conn.execute("create table t (i int)")
    await s.conn.close()
    s.note(await s.elsewhere("select to_regclass('t')"))


@compared
async def test_a_statement_on_a_session_that_was_terminated_breaks_the_connection(
    s: Scene,
) -> None:
    with s.fails():
        await s.conn.execute("select pg_terminate_backend(pg_backend_pid())")
    s.note(s.conn.closed, s.conn.broken)
    with s.fails():
        await s.conn.execute("select 1")
    with s.fails():
        await s.conn.rollback()
    await s.conn.close()
    s.note(s.conn.closed, s.conn.broken)


@pytest.mark.anyio
async def test_a_session_terminated_while_idle_says_so_at_the_next_statement(
    dsn: str, conn: AsyncConnection[Any], anyio_backend: tuple[str, Any]
) -> None:
    async with await AsyncConnection.connect(dsn, autocommit=True) as other:
        await other.execute("select pg_terminate_backend(%s, 5000)", (conn.info.backend_pid,))
    # asyncio sees it in its next cycle. A statement before that may meet the socket's reset.
    while anyio_backend[0] != "trio" and not conn.closed:
        await anyio.lowlevel.checkpoint()
    with pytest.raises(psycopg.errors.AdminShutdown):
        await conn.execute("select 1")
    assert conn.broken
    with pytest.raises(psycopg.OperationalError, match="the connection is closed"):
        await conn.execute("select 1")


@pytest.mark.anyio
async def test_closing_ends_a_statement_that_runs(conn: AsyncConnection[Any]) -> None:
    async def close() -> None:
        while conn.info.transaction_status is not TransactionStatus.ACTIVE:
            await anyio.lowlevel.checkpoint()
        await conn.close()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(close)
        with pytest.raises(psycopg.OperationalError), anyio.fail_after(10):
            await conn.execute("select pg_sleep(20)")


@pytest.mark.anyio
async def test_a_forgotten_connection_warns_and_gives_its_descriptor_back(dsn: str) -> None:
    conn = await AsyncConnection.connect(dsn)
    async with conn.transaction():  # COMMIT has a time limit, which must not keep it
        await conn.execute("select 1")
    fd = conn.fileno()
    forgotten = [conn]
    del conn
    with pytest.warns(ResourceWarning, match="was deleted while still open"):
        forgotten.clear()
    gc.collect()
    await anyio.lowlevel.checkpoint()
    with pytest.raises(OSError):
        os.fstat(fd)
    for _ in range(3):
        async with await AsyncConnection.connect(dsn) as conn:
            cur = await conn.execute("select 'the loop works'")
            assert await cur.fetchone() == ("the loop works",)


# Sharing


@compared
async def test_tasks_take_turns_on_one_connection(s: Scene) -> None:
    results: list[Any] = []

    async def work(n: int) -> None:
        for i in range(5):
            cur = await s.conn.execute("select %s::int, pg_sleep(0.001)", (10 * n + i,))
            row = await cur.fetchone()
            assert row is not None
            results.append(row[0])

    async with anyio.create_task_group() as tasks:
        for n in range(5):
            tasks.start_soon(work, n)
    s.note(sorted(results))
    s.note(s.conn.lock.locked())


@compared
async def test_what_info_says_is_true(s: Scene) -> None:
    info = s.conn.info
    s.note(info.dbname, info.user, info.host, info.hostaddr, info.port, info.dsn, info.password)
    s.note(info.server_version, info.encoding, info.timezone, info.status.name, info.vendor)
    s.note(info.parameter_status("client_encoding"), info.transaction_status.name)
    s.note(info.get_parameters(), info.pipeline_status.name, info.error_message)
    await s.conn.execute("set client_encoding to latin1; set timezone to 'Asia/Tokyo'")
    s.note(info.encoding, info.timezone, await s.fetch("select 'é', timestamptz '2000-01-01'"))
    s.note(s.conn.fileno() == s.conn.pgconn.socket, s.conn.info.backend_pid > 0)


@pytest.mark.anyio
@pytest.mark.parametrize("loop_name", ["asyncio", "uvloop"])
async def test_psycopgs_pool_hands_out_our_connections(dsn: str) -> None:
    served: set[int] = set()

    async def work(pool: psycopg_pool.AsyncConnectionPool[AsyncConnection[Any]]) -> None:
        for _ in range(10):
            async with pool.connection() as conn, conn.transaction():
                assert type(conn) is aiopgsafe.AsyncConnection
                await conn.execute("insert into t default values")
                served.add(conn.info.backend_pid)

    with psycopg.connect(dsn) as admin:
        admin.execute("create table t (i serial)")
    async with psycopg_pool.AsyncConnectionPool(
        dsn, connection_class=AsyncConnection[Any], min_size=2, max_size=3, open=False
    ) as pool:
        async with anyio.create_task_group() as tasks:
            for _ in range(6):
                tasks.start_soon(work, pool)
        with pytest.raises(ZeroDivisionError):
            async with pool.connection() as conn:
                await conn.execute("insert into t default values")
                raise ZeroDivisionError
        with anyio.move_on_after(0.05):
            async with pool.connection() as conn:
                await conn.execute("select pg_sleep(20)")
        async with pool.connection() as conn:
            cur = await conn.execute("select count(*) from t")
            assert await cur.fetchone() == (60,)
        await pool.check()
        assert pool.get_stats().get("connections_lost", 0) == 0
        assert pool.get_stats().get("returns_bad", 0) == 0
    assert len(served) <= 3


@pytest.mark.anyio
@pytest.mark.parametrize("loop_name", ["asyncio", "uvloop"])
async def test_a_block_that_nobody_leaves_is_no_concern_of_the_next_holder(
    dsn: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with psycopg_pool.AsyncConnectionPool(
        dsn, connection_class=AsyncConnection[Any], min_size=1, open=False
    ) as pool:
        conn = await pool.getconn()
        tx = conn.transaction()
        await tx.__aenter__()  # BEGIN waits: to the pool the connection looks idle
        await pool.putconn(conn)
        assert "given back inside a transaction block" in caplog.text
        assert tx.state is aiopgsafe.TransactionState.ROLLED_BACK
        async with pool.connection() as conn:
            await conn.execute("create table t (i int)")
            assert conn.info.transaction_status == TransactionStatus.INTRANS
            with pytest.raises(aiopgsafe.ConnectionReleased):
                await tx.__aexit__(None, None, None)
            assert not await tx.__aexit__(KeyError, KeyError(), None)
            assert conn.info.transaction_status == TransactionStatus.INTRANS
        async with pool.connection() as conn:
            await conn.execute("insert into t values (1)")


# Resets


@pytest.mark.anyio
@pytest.mark.parametrize("behind", ["half an answer", "an answer"])
async def test_a_reset_behind_an_answer_is_seen(proxy: FaultProxy, behind: str) -> None:
    """uvloop tells of a reset once: it comes with data here, and the data is read first."""
    conn = await AsyncConnection.connect(proxy.dsn, autocommit=True)
    letter = "T" if behind == "half an answer" else "Z"
    cut = proxy.inject(Cut("rst"), letter, when="after", direction="backend")

    async def ask() -> None:
        if letter == "Z":
            await conn.execute("select pg_sleep(0.05)")
            return
        with pytest.raises(psycopg.OperationalError):
            await conn.execute("select pg_sleep(0.05)")

    with anyio.fail_after(5):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(ask)
            await anyio.lowlevel.checkpoint()
            while conn.info.transaction_status is not TransactionStatus.ACTIVE:
                await anyio.lowlevel.checkpoint()
            # Blocks the loop: it finds the answer and the reset together.
            cut.wait()
        if letter == "Z":
            with pytest.raises(psycopg.OperationalError):
                await conn.execute("select 1")
    assert conn.broken
    await conn.close()


@pytest.mark.parametrize("loop_name", ["asyncio"])
def test_use_in_another_event_loop_is_refused_before_anything_is_sent(
    dsn: str, loop_name: str
) -> None:
    """psycopg allows it. A persistent reader belongs to its loop."""
    conns: list[AsyncConnection[Any]] = []

    async def connect() -> None:
        conns.append(await AsyncConnection.connect(dsn))
        await conns[0].execute("select 1")

    async def use() -> None:
        for operation in (conns[0].execute("select 1"), conns[0].commit(), conns[0].rollback()):
            with pytest.raises(psycopg.InterfaceError, match="another event loop"):
                await operation
        with pytest.raises(psycopg.InterfaceError, match="another event loop"):
            async with conns[0].transaction():
                pass
        await conns[0].close()

    anyio.run(connect)
    anyio.run(use)
    assert conns[0].closed
