"""What an adversary found once, and must not find again."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType
from typing import Any

import anyio
import anyio.lowlevel
import psycopg
import pytest

from aiopgsafe import AsyncConnection, TransactionState
from aiopgsafe.testing import Delay, FaultProxy, Freeze, TemporaryServer, command_complete, query

Conn = AsyncConnection[Any]
S = TransactionState


@pytest.fixture
async def table(conn: Conn) -> None:
    await conn.set_autocommit(True)
    await conn.execute("create table t (id int primary key)")


@pytest.mark.anyio
@pytest.mark.parametrize("loop_name", ["asyncio", "uvloop"])
async def test_a_callback_that_ends_by_a_cancellation_of_its_own_is_one_that_failed(
    conn: Conn, table: None
) -> None:
    import asyncio

    async def callback() -> None:
        task = asyncio.create_task(asyncio.sleep(10))
        task.cancel()
        await task

    with anyio.fail_after(5), pytest.raises(BaseExceptionGroup, match="is committed") as info:
        async with conn.transaction() as tx:
            tx.on_commit(callback)
    assert isinstance(info.value.exceptions[0], asyncio.CancelledError)
    assert tx.state is S.COMMITTED


@pytest.mark.anyio
async def test_a_block_ends_though_a_stream_keeps_the_connection(
    dsn: str, anyio_backend: object
) -> None:
    """The stream's generator has the lock and is never resumed: the connection is closed."""
    conn = await AsyncConnection.connect(dsn, commit_timeout=0.2)
    with anyio.fail_after(5), pytest.raises(LookupError):
        async with conn.transaction() as tx:
            rows = conn.cursor().stream("select generate_series(1, 100000)")
            await anext(rows)
            raise LookupError
    assert tx.state is S.ROLLED_BACK
    assert conn.closed
    await rows.aclose()  # type: ignore[attr-defined]


@pytest.mark.anyio
@pytest.mark.parametrize("end", ["ROLLBACK", "COMMIT"])
async def test_callbacks_of_a_transaction_never_run_in_the_next_one(
    conn: Conn, table: None, end: str
) -> None:
    await conn.set_autocommit(False)
    called: list[str] = []
    await conn.execute("insert into t values (1)")
    async with conn.transaction() as tx:
        tx.on_commit(called.append, "commit")
        tx.on_rollback(called.append, "rollback")
    await conn.execute(end.encode())
    await conn.execute("insert into t values (2)")
    await conn.commit()
    assert called == []
    assert tx.state is S.UNKNOWN


@pytest.mark.anyio
@pytest.mark.parametrize("loop_name", ["asyncio", "uvloop"])
async def test_a_timeout_of_a_begin_that_is_not_answered_is_a_timeout(proxy: FaultProxy) -> None:
    import asyncio

    proxy.inject(Freeze(), query("BEGIN"))
    conn = await AsyncConnection.connect(proxy.dsn, cancel_timeout=0.2)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1):
            # Elsewhere it rides on a statement.
            async with conn.pipeline(), conn.transaction():
                pass
    assert conn.closed


@pytest.mark.anyio
async def test_a_pipeline_whose_server_is_killed_in_a_block_ends(
    dsn: str, server: TemporaryServer, anyio_backend: object
) -> None:
    conn = await AsyncConnection.connect(dsn)
    with anyio.fail_after(5), pytest.raises(LookupError):
        async with conn.pipeline(), conn.transaction() as tx:
            await conn.execute("select 1")
            server.psql(f"select pg_terminate_backend({conn.info.backend_pid})")
            raise LookupError
    assert tx.state is S.ROLLED_BACK
    await conn.close()


@pytest.mark.anyio
async def test_the_connection_is_out_of_the_block_when_its_callbacks_run(
    conn: Conn, table: None
) -> None:
    await conn.set_autocommit(False)

    async def again() -> None:
        await conn.execute("insert into t values (2)")
        await conn.commit()

    async with conn.transaction() as tx:
        tx.on_commit(again)
        await tx.execute("insert into t values (1)")
    assert await (await conn.execute("select count(*) from t")).fetchone() == (2,)
    await conn.rollback()


@pytest.mark.anyio
async def test_a_block_inside_one_that_has_ended_runs_nothing_more(conn: Conn, table: None) -> None:
    outer, inner = conn.transaction(), conn.transaction()
    await outer.__aenter__()
    await inner.__aenter__()
    with pytest.raises(psycopg.transaction.OutOfOrderTransactionNesting):
        await outer.__aexit__(None, None, None)
    assert inner.state is outer.state is S.ROLLED_BACK
    with pytest.raises(psycopg.ProgrammingError):
        await inner.execute("insert into t values (2)")
    with pytest.raises(psycopg.OperationalError):
        await inner.__aexit__(None, None, None)
    await conn.commit()
    assert await (await conn.execute("select count(*) from t")).fetchone() == (0,)


# Signals


class Arrivals:
    """A handler of the program's, with what it was called for."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        self.times.append(time.monotonic())


@pytest.fixture
def arrivals() -> Any:
    arrivals = Arrivals()
    before = signal.signal(signal.SIGUSR1, arrivals)
    yield arrivals
    signal.signal(signal.SIGUSR1, before)


@pytest.mark.anyio
async def test_a_handler_saved_and_set_again_while_a_commit_ran_is_the_same_one(
    proxy: FaultProxy, arrivals: Arrivals
) -> None:
    in_commit = proxy.inject(Delay(0.2), command_complete("COMMIT"))
    saved: list[Any] = []

    async def meanwhile() -> None:
        await in_commit.reached()
        saved.append(signal.signal(signal.SIGUSR1, signal.SIG_IGN))

    async with await AsyncConnection.connect(proxy.dsn, autocommit=True) as conn:
        async with anyio.create_task_group() as group:
            group.start_soon(meanwhile)
            async with conn.transaction() as tx:
                await tx.execute("select 1")
        signal.signal(signal.SIGUSR1, saved[0])
        os.kill(os.getpid(), signal.SIGUSR1)
        assert len(arrivals.times) == 1
        async with conn.transaction():
            os.kill(os.getpid(), signal.SIGUSR1)
        assert len(arrivals.times) == 2


@pytest.mark.anyio
async def test_a_signal_does_not_set_two_transactions_to_wait_for_each_other(
    conn: Conn, dsn: str, proxy: FaultProxy, arrivals: Arrivals, table: None
) -> None:
    """One COMMIT waits in the server for a row of the other, which waits for the signal."""
    await conn.execute("create table d (id int references t deferrable initially deferred)")
    await conn.execute("insert into t values (1)")
    first = await AsyncConnection.connect(proxy.dsn, autocommit=True, commit_timeout=10)
    second = await AsyncConnection.connect(dsn, autocommit=True, commit_timeout=10)
    committing = proxy.inject(Delay(0), query("COMMIT"))

    async def wait_for_the_row() -> None:
        async with first.transaction() as tx:
            await tx.execute("insert into d values (1)")
        ended.append(tx.state)

    async def have_the_row() -> None:
        async with second.transaction() as tx:
            await tx.execute("select * from t for update")
            got.set()
            await committing.reached()
            os.kill(os.getpid(), signal.SIGUSR1)
        ended.append(tx.state)

    ended: list[S] = []
    got = anyio.Event()
    with anyio.fail_after(8):
        async with anyio.create_task_group() as group:
            group.start_soon(have_the_row)
            await got.wait()
            group.start_soon(wait_for_the_row)
    assert ended == [S.COMMITTED, S.COMMITTED]
    assert len(arrivals.times) == 1
    await first.close()
    await second.close()


@pytest.mark.anyio
@pytest.mark.parametrize("loop_name", ["asyncio"])
async def test_a_child_forked_in_a_commit_has_its_handlers(
    proxy: FaultProxy, arrivals: Arrivals
) -> None:
    in_commit = proxy.inject(Delay(0.2), command_complete("COMMIT"))

    children: list[int] = []

    async def fork() -> None:
        await in_commit.reached()
        if (pid := os.fork()) == 0:
            os.kill(os.getpid(), signal.SIGUSR1)
            os._exit(7 if len(arrivals.times) == 1 else 99)
        children.append(pid)

    conn = await AsyncConnection.connect(proxy.dsn, autocommit=True)
    async with anyio.create_task_group() as group:
        group.start_soon(fork)
        async with conn.transaction() as tx:
            await tx.execute("select 1")
    await conn.close()
    status = await anyio.to_thread.run_sync(os.waitpid, children[0], 0)
    assert os.waitstatus_to_exitcode(status[1]) == 7
