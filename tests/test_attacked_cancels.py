"""What an adversary found in cancelling and signals, and must not find again."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import aclosing, suppress
from pathlib import Path
from time import monotonic
from typing import Any, cast

import anyio
import anyio.lowlevel
import anyio.to_thread
import psycopg
import pytest
from psycopg.pq import TransactionStatus

from aiopgsafe import AsyncConnection, TransactionState
from aiopgsafe.testing import Cut, Delay, FaultProxy, Freeze, cancel_request, command_complete
from aiopgsafe.testing import query as sends
from tests.test_cancel_on_signal import program_handler

Conn = AsyncConnection[Any]
Admin = psycopg.Connection[Any]
USR1 = signal.SIGUSR1


@pytest.fixture(autouse=True)
def a_handler() -> Iterator[None]:
    """A signal that found nothing to do comes once more, when the program's handler is back."""
    with program_handler(USR1):
        yield
        for thread in threading.enumerate():
            if thread is not threading.main_thread() and thread.name.startswith("signal again"):
                thread.join()


def kill() -> None:
    os.kill(os.getpid(), USR1)


@pytest.fixture
def slow_commit(admin: Admin) -> None:
    """COMMIT of a transaction that writes to `t` takes a while."""
    admin.execute("create table t (id int)")
    admin.execute(
        "create function slow() returns trigger language plpgsql as"
        " 'begin perform pg_sleep(0.4); return null; end'"
    )
    admin.execute(
        "create constraint trigger slow after insert on t deferrable initially deferred"
        " for each row execute function slow()"
    )


async def in_pipeline(conn: Conn) -> None:
    async with conn.pipeline():
        await conn.execute("select 1")
        kill()
        await anyio.lowlevel.checkpoint()
        await conn.commit()


async def in_copy(conn: Conn) -> None:
    async with conn.cursor().copy("copy (values (1), (2)) to stdout") as copy:
        rows = 0
        async for _ in copy:
            rows += 1
            if rows == 2:
                kill()


async def in_stream(conn: Conn) -> None:
    rows = 0
    async for _ in conn.cursor().stream("values (1), (2)"):
        rows += 1
        if rows == 2:
            kill()


@pytest.mark.anyio
@pytest.mark.usefixtures("slow_commit")
@pytest.mark.parametrize("work", [in_pipeline, in_copy, in_stream])
async def test_a_late_cancel_never_hits_commit(
    proxy: FaultProxy, admin: Admin, work: Callable[[Conn], Any], anyio_backend: object
) -> None:
    proxy.inject(Delay(0.1), cancel_request())
    conn = await AsyncConnection.connect(proxy.dsn)
    with program_handler(USR1), conn.cancel_on_signal(USR1):
        await conn.execute("insert into t values (1)")
        # It may have been quick enough to be a cancel of the statement itself.
        with suppress(psycopg.errors.QueryCanceled):
            await work(conn)
        if conn.info.transaction_status is TransactionStatus.INTRANS:
            await conn.commit()
            assert admin.execute("select count(*) from t").fetchone() == (1,)
    await conn.close()


@pytest.mark.anyio
async def test_a_signal_and_a_cancellation_together_leave_no_copy_open(
    proxy: FaultProxy, anyio_backend: object
) -> None:
    conn = await AsyncConnection.connect(proxy.dsn, autocommit=True)
    proxy.inject(Delay(0.3), cancel_request())
    with program_handler(USR1):
        timer = threading.Timer(0.1, kill)
        timer.start()
        with conn.cancel_on_signal(USR1), anyio.move_on_after(0.25):
            async with conn.cursor().copy("copy (select pg_sleep(0.2)) to stdout") as copy:
                async for _ in copy:
                    pass
        timer.join()
    assert not conn.closed
    cur = await conn.execute("select 'usable'")
    assert await cur.fetchone() == ("usable",)
    await conn.close()


async def many_short_ones(conn: Conn, called: list[int]) -> None:
    while not called:
        await conn.execute("select 1")


async def one_long_copy(conn: Conn, called: list[int]) -> None:
    query = "copy (select generate_series(1, 100000000)) to stdout"
    async with conn.cursor().copy(query) as copy:
        async for _ in copy:
            if called:
                break


async def one_long_stream(conn: Conn, called: list[int]) -> None:
    async for _ in conn.cursor().stream("select generate_series(1, 100000000)"):
        if called:
            break


@pytest.mark.anyio
@pytest.mark.parametrize("work", [many_short_ones, one_long_copy, one_long_stream])
async def test_no_signal_is_swallowed(
    dsn: str, anyio_backend: object, work: Callable[[Conn, list[int]], Any]
) -> None:
    """It cancels what runs, or it is the program's: one of both, every time."""
    conn = await AsyncConnection.connect(dsn, autocommit=True)
    for _ in range(5 if work is many_short_ones else 2):
        with program_handler(USR1) as called, anyio.fail_after(20):
            timer = threading.Timer(0.02, kill)
            timer.start()
            cancelled = False
            with conn.cancel_on_signal(USR1):
                try:
                    await work(conn, called)
                except psycopg.errors.QueryCanceled:
                    cancelled = True
            timer.join()
            assert cancelled or called == [USR1]
    await conn.close()


@pytest.mark.anyio
@pytest.mark.parametrize(
    "text",
    [
        "/* a */ select case when true then pg_sleep(30) /* else nothing */ end",
        "/* a */ " * 40 + "select pg_sleep(30)",
        "/* nested /* comment */ end */ select pg_sleep(30)",
        "-- commit\nselect pg_sleep(30)",
    ],
)
async def test_a_query_that_only_looks_like_commit_is_cancelled(conn: Conn, text: str) -> None:
    with anyio.fail_after(5), anyio.move_on_after(0.1):
        await conn.execute(text.encode())
    assert conn.info.transaction_status is TransactionStatus.INERROR


@pytest.mark.anyio
@pytest.mark.usefixtures("slow_commit")
@pytest.mark.parametrize("pipelined", [False, True])
@pytest.mark.parametrize("text", ["commit", " ;; /* /* x */ */ -- y\n commit", "end"])
async def test_a_commit_as_text_is_waited_for(
    conn: Conn, admin: Admin, text: str, pipelined: bool
) -> None:
    await conn.set_autocommit(True)
    await conn.execute("begin")
    await conn.execute("insert into t values (1)")
    with anyio.move_on_after(0.1):
        if pipelined:
            async with conn.pipeline():
                await conn.execute(text.encode())
        else:
            await conn.execute(text.encode())
    assert admin.execute("select count(*) from t").fetchone() == (1,)
    assert conn.info.transaction_status is TransactionStatus.IDLE


@pytest.mark.anyio
async def test_handlers_are_put_back_while_a_transaction_ends(
    conn: Conn, proxy: FaultProxy
) -> None:
    in_commit = proxy.inject(Delay(0.2), command_complete("COMMIT"))
    other = await AsyncConnection.connect(proxy.dsn, autocommit=True)

    async def transaction() -> None:
        async with other.transaction():
            await other.execute("select 1")

    with program_handler(USR1):
        handler = signal.getsignal(USR1)
        async with anyio.create_task_group() as tasks:
            with conn.cancel_on_signal(USR1, signal.SIGUSR2):
                tasks.start_soon(transaction)
                await anyio.to_thread.run_sync(in_commit.wait)
        assert signal.getsignal(USR1) is handler
        assert signal.getsignal(signal.SIGUSR2) is signal.SIG_DFL
    await other.close()


@pytest.mark.anyio
async def test_a_block_sees_signals_though_the_program_set_its_handler_in_between(
    conn: Conn,
) -> None:
    outer = conn.cancel_on_signal(USR1)
    outer.__enter__()
    with program_handler(USR1) as called, conn.cancel_on_signal(USR1):
        timer = threading.Timer(0.1, kill)
        timer.start()
        with pytest.raises(psycopg.errors.QueryCanceled):
            await conn.execute("select pg_sleep(10)")
        timer.join()
        assert called == []
    outer.__exit__(None, None, None)


def test_a_block_that_outlives_the_main_task_leaves_no_stale_handler(dsn: str) -> None:
    async def background() -> None:
        async with await AsyncConnection.connect(dsn, autocommit=True) as conn:
            with conn.cancel_on_signal():
                started.set()
                await conn.execute("select pg_sleep(30)")

    async def main() -> None:
        tasks.append(asyncio.create_task(background()))
        await started.wait()

    tasks: list[asyncio.Task[None]] = []
    started = asyncio.Event()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        asyncio.run(main())
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.anyio
async def test_closing_in_the_middle_of_a_cancel_leaves_no_task(
    proxy: FaultProxy, anyio_backend: object
) -> None:
    proxy.inject(Delay(0.3), cancel_request())
    conn = await AsyncConnection.connect(proxy.dsn)
    with program_handler(USR1), conn.cancel_on_signal(USR1), suppress(psycopg.Error):
        async with conn.pipeline():
            await conn.execute("select pg_sleep(1)")
            kill()
            while conn._signalled is None:
                await anyio.lowlevel.checkpoint()
            await conn.close()
    assert conn._signalled is None
    await anyio.lowlevel.checkpoint()
    gc.collect()


@pytest.mark.anyio
@pytest.mark.parametrize("fault", [Cut("rst"), Freeze()])
async def test_the_outcome_of_commit_prepared_hangs_on_nothing_after_it(
    proxy: FaultProxy, admin: Admin, anyio_backend: object, fault: Any
) -> None:
    admin.execute("create table t (id int)")
    conn = await AsyncConnection.connect(proxy.dsn, statement_timeout=10, commit_timeout=0.5)
    called: list[int] = []
    await conn.tpc_begin("x")
    await conn.execute("insert into t values (2)")
    async with conn.transaction() as tx:
        tx.on_commit(called.append, 1)
    await conn.tpc_prepare()
    proxy.inject(fault, sends("SET statement_timeout TO '10s'"))
    await conn.tpc_commit()
    assert called == [1]
    assert tx.state is TransactionState.COMMITTED
    assert conn.closed


@pytest.mark.anyio
async def test_a_timeout_of_the_programs_own_survives_commit_prepared(
    dsn: str, anyio_backend: object
) -> None:
    conn = await AsyncConnection.connect(dsn, statement_timeout=10)
    await conn.execute("set statement_timeout to '5s'")
    await conn.commit()
    await conn.tpc_begin("y")
    await conn.execute("select 1")
    await conn.tpc_prepare()
    await conn.tpc_commit()
    cur = await conn.execute("show statement_timeout")
    assert await cur.fetchone() == ("5s",)
    await conn.close()


@pytest.mark.anyio
async def test_a_query_that_a_cancelled_pipeline_was_to_prepare_works_on(conn: Conn) -> None:
    await conn.set_autocommit(True)
    for _ in range(5):
        await conn.execute("select 42")
    with anyio.move_on_after(0.1):
        async with conn.pipeline():
            await conn.execute("select pg_sleep(30)")
            await conn.execute("select 42")  # the one that is prepared
    cur = await conn.execute("select 42")
    assert await cur.fetchone() == (42,)


@pytest.mark.anyio
@pytest.mark.parametrize("limit", [None, 10])
async def test_a_commit_that_was_refused_leaves_no_failed_transaction(
    dsn: str, admin: Admin, anyio_backend: object, limit: float | None
) -> None:
    """Somebody's cancel requests may hit COMMIT before it begins."""
    conn = await AsyncConnection.connect(dsn, autocommit=True, statement_timeout=limit)
    over = threading.Event()

    def spam() -> None:
        query = "select pg_cancel_backend(%s) from generate_series(1, 2000)"
        while not over.is_set():
            admin.execute(query, (conn.info.backend_pid,))

    thread = threading.Thread(target=spam)
    thread.start()
    try:
        end = monotonic() + 1
        while monotonic() < end:
            tx = conn.transaction()
            with suppress(psycopg.errors.QueryCanceled):
                async with tx:
                    pass
            assert conn.info.transaction_status is TransactionStatus.IDLE
            assert tx.state in (TransactionState.COMMITTED, TransactionState.ROLLED_BACK)
    finally:
        over.set()
        thread.join()
    await conn.close()


@pytest.mark.anyio
async def test_a_cursor_is_closed_though_another_task_has_the_connection(conn: Conn) -> None:
    cur = conn.cursor("named")
    await cur.execute("select generate_series(1, 10)")
    scope = anyio.CancelScope()

    async def other() -> None:
        await conn.execute("select pg_sleep(0.3)")

    async def leave() -> None:
        with scope:
            async with cur:
                await anyio.sleep(10)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(leave)
        tasks.start_soon(other)
        while not conn.lock.locked():
            await anyio.lowlevel.checkpoint()
        scope.cancel()
    assert cur.closed
    found = await conn.execute("select count(*) from pg_cursors where name = 'named'")
    assert await found.fetchone() == (0,)


@pytest.mark.anyio
async def test_a_cancellation_is_not_lost_for_a_cursor_that_can_not_be_closed(
    proxy: FaultProxy, anyio_backend: object
) -> None:
    conn = await AsyncConnection.connect(proxy.dsn)
    cur = conn.cursor("named")
    await cur.execute("select generate_series(1, 10)")
    closing = proxy.inject(Freeze(), sends("CLOSE"))
    scope = anyio.CancelScope()

    async def leave() -> None:
        with scope:
            await cur.close()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(leave)
        await closing.reached()
        scope.cancel()
        await anyio.lowlevel.checkpoint()
        proxy.cut()
    assert scope.cancelled_caught
    assert conn.closed


@pytest.mark.anyio
async def test_a_cancellation_goes_before_the_error_of_a_handler(
    proxy: FaultProxy, anyio_backend: object
) -> None:
    def limit(signum: int, frame: object) -> None:
        raise KeyError("a time limit")

    conn = await AsyncConnection.connect(proxy.dsn, autocommit=True)
    committing = proxy.inject(Freeze(), sends("COMMIT"))
    scope = anyio.CancelScope()
    raised: list[BaseException] = []

    async def work() -> None:
        with scope:
            try:
                async with conn.transaction():
                    await conn.execute("select 1")
            except BaseException as exc:
                raised.append(exc)
                raise

    before = signal.signal(USR1, limit)
    try:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(work)
            await committing.reached()
            scope.cancel()
            await anyio.lowlevel.checkpoint()
            kill()
            committing.release()
    finally:
        signal.signal(USR1, before)
    assert scope.cancelled_caught
    assert isinstance(raised[0].__context__, KeyError)
    await conn.close()


@pytest.mark.anyio
async def test_the_options_of_a_service_are_kept(
    dsn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, anyio_backend: object
) -> None:
    (tmp_path / "services").write_text("[s]\noptions=-c search_path=pg_catalog\n")
    monkeypatch.setenv("PGSERVICEFILE", str(tmp_path / "services"))
    conn = await AsyncConnection.connect(f"{dsn} service=s", statement_timeout=10)
    cur = await conn.execute(
        "select current_setting('search_path'), current_setting('statement_timeout')"
    )
    assert await cur.fetchone() == ("pg_catalog", "10s")
    await conn.close()


@pytest.mark.anyio
async def test_a_statement_that_needs_many_cancels_gets_them(conn: Conn) -> None:
    with anyio.move_on_after(0.1):
        await conn.execute(
            "do $$ begin for i in 1..8 loop begin perform pg_sleep(30);"
            " exception when query_canceled then null; end; end loop; end $$"
        )
    assert not conn.closed


def test_a_forked_child_has_the_programs_handlers(dsn: str) -> None:
    async def main() -> int:
        conn = await AsyncConnection.connect(dsn)
        with program_handler(USR1) as called, conn.cancel_on_signal(USR1):
            pid = os.fork()
            if not pid:
                kill()
                os._exit(len(called) + 40)
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])  # noqa: ASYNC222
        await conn.close()
        return status

    assert asyncio.run(main()) == 41


@pytest.mark.anyio
async def test_an_exception_before_the_first_wait_leaves_the_connection_usable(
    conn: Conn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal handler's may come between any two bytecodes."""
    wait = conn._channel.wait
    cls = type(conn._channel)

    def interrupted(self: Any) -> Any:
        monkeypatch.setattr(cls, "wait", original)
        raise KeyboardInterrupt

    original = cls.wait
    monkeypatch.setattr(cls, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        await conn.execute("select pg_sleep(10)")
    assert wait is not None
    await conn.rollback()
    cur = await conn.execute("select 'usable'")
    assert await cur.fetchone() == ("usable",)


# What is cut short by the program itself, and interrupted while that is cleaned up


ROWS = "select generate_series(1, 300000)"


async def stream_cut_short(conn: Conn) -> None:
    async with aclosing(cast("Any", conn.cursor().stream(ROWS))) as rows:
        async for _ in rows:
            break


async def stream_that_fails(conn: Conn) -> None:
    with suppress(KeyError):
        async with aclosing(cast("Any", conn.cursor().stream(ROWS))) as rows:
            async for _ in rows:
                raise KeyError


async def copy_that_fails(conn: Conn) -> None:
    with suppress(KeyError):
        copy_out = "copy (select generate_series(1, 300000)) to stdout"
        async with conn.cursor().copy(copy_out) as copy:
            await copy.read()
            raise KeyError


@pytest.mark.anyio
@pytest.mark.parametrize("loop_name", ["asyncio", "uvloop"])
@pytest.mark.parametrize("work", [stream_cut_short, stream_that_fails, copy_that_fails])
async def test_a_cancellation_in_the_clean_up_is_not_lost(
    conn: Conn, work: Callable[[Conn], Any], anyio_backend: object
) -> None:
    await conn.set_autocommit(True)
    loop = asyncio.get_running_loop()
    began = loop.time()
    await work(conn)
    took = loop.time() - began

    async def work_and_sleep() -> None:
        await work(conn)
        await asyncio.sleep(60)

    for turn in range(40):
        task = asyncio.ensure_future(work_and_sleep())
        loop.call_later(took * turn / 30, task.cancel)
        with anyio.fail_after(10), pytest.raises(asyncio.CancelledError):
            await task
        assert conn.info.transaction_status == TransactionStatus.IDLE
        assert await (await conn.execute("select 1")).fetchone() == (1,)


@pytest.mark.anyio
async def test_what_is_prepared_after_a_cancelled_pipeline_stays(
    conn: Conn, anyio_backend: object
) -> None:
    await conn.set_autocommit(True)
    conn.prepare_threshold = 0
    await conn.execute("select 1")
    with anyio.move_on_after(0.1):
        async with conn.pipeline():
            await conn.execute("select pg_sleep(60)")
    assert not conn.closed
    for _ in range(3):
        cur = await conn.execute("select %s::int", (1,))
        assert await cur.fetchone() == (1,)
