"""Of two exceptions at once none is lost, and the right one comes out.

What stops the program (SystemExit, KeyboardInterrupt) goes before what stops its task, a
cancellation, and that before errors, a time limit's among them; the other is its context.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import psycopg
import pytest
from django.db import IntegrityError, transaction

from aiopgsafe import AsyncConnection, AsyncConnectionPool, Connection
from aiopgsafe._errors import chain_of
from aiopgsafe.testing import (
    Cut,
    Fault,
    FaultProxy,
    Freeze,
    cancel_request,
    query,
)
from tests.tearing import Stop, TimeLimit
from tests.test_cancel_on_signal import send_when_active
from tests.test_django import connect, insert

Admin = psycopg.Connection[Any]
Conn = AsyncConnection[Any]

SIGNALS: dict[int, type[BaseException]] = {signal.SIGTERM: Stop, signal.SIGUSR1: TimeLimit}


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """SIGTERM stops the program, SIGUSR1 is a time limit."""

    def handler(signum: int, frame: object) -> None:
        raise SIGNALS[signum]

    before = {signum: signal.signal(signum, handler) for signum in SIGNALS}
    yield
    for signum, was in before.items():
        assert signal.signal(signum, was) is handler


@pytest.fixture(autouse=True)
def table(admin: Admin) -> None:
    admin.execute("create table t (i int unique deferrable initially deferred)")


@contextmanager
def sending(fault: Fault, *signums: int) -> Iterator[None]:
    """Send these, one after the other, when the fault has been reached; then it is released."""

    def send() -> None:
        fault.wait()
        for signum in signums:
            os.kill(os.getpid(), signum)
            while signum in signal.sigpending():
                pass
        fault.remove()
        fault.release()

    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield
    finally:
        thread.join()


def kinds(exc: BaseException) -> list[type[BaseException]]:
    return [type(before) for before in chain_of(exc)]


# Sync


@pytest.fixture
def sync(proxy: FaultProxy) -> Iterator[Connection[Any]]:
    with Connection.connect(proxy.dsn, autocommit=True) as conn:
        yield conn


def test_the_first_of_two_signals_in_commit_may_be_the_greater(
    sync: Connection[Any], proxy: FaultProxy
) -> None:
    committing = proxy.inject(Freeze(), query("COMMIT"))
    signums = signal.SIGTERM, signal.SIGUSR1
    with sending(committing, *signums), pytest.raises(Stop) as caught, sync.transaction():
        sync.execute("insert into t values (1)")
    assert kinds(caught.value) == [Stop, TimeLimit]


def test_contexts_are_no_circle_where_a_third_is_handled(
    sync: Connection[Any], proxy: FaultProxy
) -> None:
    committing = proxy.inject(Freeze(), query("COMMIT"))
    signums = signal.SIGTERM, signal.SIGUSR1
    try:
        raise LookupError
    except LookupError:
        with sending(committing, *signums), pytest.raises(Stop) as caught, sync.transaction():
            sync.execute("insert into t values (1)")
    seen: list[type[BaseException]] = []
    exc: BaseException | None = caught.value
    while exc is not None and len(seen) < 10:
        seen.append(type(exc))
        exc = exc.__context__
    assert seen == [Stop, LookupError, TimeLimit]


def test_a_callback_that_raises_stop_iteration_is_told_of(
    sync: Connection[Any], wrapper: Any
) -> None:
    called: list[int] = []
    with pytest.raises(ExceptionGroup) as caught, sync.transaction() as tx:
        tx.on_commit(next, iter(()))
        tx.on_commit(called.append, 1)
        sync.execute("insert into t values (1)")
    assert [type(exc) for exc in caught.value.exceptions] == [StopIteration]
    assert called == [1]

    with pytest.raises(StopIteration), transaction.atomic():
        insert(2)
        transaction.on_commit(partial(next, iter(())), robust=True)  # logged
        transaction.on_commit(partial(next, iter(())))
        transaction.on_commit(partial(called.append, 2))
    assert called == [1]


@pytest.mark.parametrize("nested", [False, True], ids=["block", "savepoint"])
def test_a_time_limit_in_rollback_does_not_replace_what_stops_the_program(
    sync: Connection[Any], proxy: FaultProxy, nested: bool
) -> None:
    undoing = proxy.inject(Freeze(), query("ROLLBACK"))
    stop = Stop("body")
    with sending(undoing, signal.SIGUSR1), pytest.raises(Stop) as caught, sync.transaction():
        sync.execute("insert into t values (1)")
        if nested:
            with sync.transaction():
                sync.execute("insert into t values (2)")
                raise stop
        raise stop
    assert caught.value is stop
    assert TimeLimit in kinds(stop)
    assert sync.info.transaction_status == psycopg.pq.TransactionStatus.IDLE


def test_a_time_limit_in_rollback_goes_before_the_error_of_with_connect(
    proxy: FaultProxy,
) -> None:
    undoing = proxy.inject(Freeze(), query("ROLLBACK"))
    with (
        sending(undoing, signal.SIGUSR1),
        pytest.raises(TimeLimit),
        Connection.connect(proxy.dsn) as conn,
    ):
        conn.execute("insert into t values (1)")
        raise ValueError("body")


def test_a_time_limit_while_a_statement_is_cancelled_does_not_replace_what_interrupted_it(
    sync: Connection[Any], proxy: FaultProxy, dsn: str
) -> None:
    cancelling = proxy.inject(Freeze(), cancel_request())
    thread = send_when_active(dsn, signal.SIGTERM)
    with sending(cancelling, signal.SIGUSR1), pytest.raises(Stop) as caught:
        sync.execute("select pg_sleep(60)")
    thread.join()
    assert TimeLimit in kinds(caught.value)
    assert sync.execute("select 1").fetchone() == (1,)


def test_a_block_left_open_inside_does_not_hide_what_stops_the_program(
    sync: Connection[Any],
) -> None:
    stop = Stop("body")
    inner = sync.transaction()
    with pytest.raises(Stop) as caught, sync.transaction():
        sync.execute("insert into t values (1)")
        inner.__enter__()
        raise stop
    assert caught.value is stop
    with suppress(psycopg.Error):
        inner.__exit__(None, None, None)


# Django


@pytest.fixture
def wrapper(proxy: FaultProxy) -> Iterator[Any]:
    wrapper = connect(proxy.dsn)
    wrapper.ensure_connection()
    yield wrapper
    wrapper.close()


@pytest.mark.parametrize("nested", [False, True], ids=["block", "savepoint"])
def test_django_does_not_replace_what_stops_the_program(
    wrapper: Any, proxy: FaultProxy, nested: bool
) -> None:
    undoing = proxy.inject(Freeze(), query("ROLLBACK"))
    stop = Stop("body")
    with sending(undoing, signal.SIGUSR1), pytest.raises(Stop) as caught, transaction.atomic():
        insert(1)
        if nested:
            with transaction.atomic():
                insert(2)
                raise stop
        raise stop
    assert caught.value is stop
    assert TimeLimit in kinds(stop)
    assert not wrapper.in_atomic_block


def test_djangos_own_errors_hide_no_time_limit(wrapper: Any, proxy: FaultProxy) -> None:
    def fail() -> None:
        raise ValueError("a callback's")

    committing = proxy.inject(Freeze(), query("COMMIT"))
    with (
        sending(committing, signal.SIGUSR1),
        pytest.raises(TimeLimit) as caught,
        transaction.atomic(),
    ):
        insert(1)
        transaction.on_commit(fail)
    assert ValueError in kinds(caught.value)

    committing = proxy.inject(Freeze(), query("COMMIT"))
    with (
        sending(committing, signal.SIGUSR1),
        pytest.raises(TimeLimit) as caught,
        transaction.atomic(),
    ):
        insert(2)
        insert(2)
    assert IntegrityError in kinds(caught.value)

    committing = proxy.inject(Freeze(), query("COMMIT"))
    try:
        raise LookupError
    except LookupError:
        with (
            sending(committing, signal.SIGUSR1),
            pytest.raises(TimeLimit) as caught,
            transaction.atomic(),
        ):
            insert(3)
            insert(3)
    assert {IntegrityError, LookupError} < {*kinds(caught.value)}


# Async


@pytest.fixture
async def conn(proxy: FaultProxy) -> Any:
    conn = await AsyncConnection.connect(proxy.dsn, autocommit=True)
    yield conn
    await conn.close()


async def block(conn: Conn) -> None:
    async with conn.transaction():
        await conn.execute("insert into t values (1)")
        raise Stop("body")


async def savepoint(conn: Conn) -> None:
    async with conn.transaction():
        await conn.execute("insert into t values (1)")
        async with conn.transaction():
            await conn.execute("insert into t values (2)")
            raise Stop("body")


async def server_cursor(conn: Conn) -> None:
    async with conn.cursor("c", withhold=True) as cur:
        await cur.execute("select 1")
        raise Stop("body")


async def copy(conn: Conn) -> None:
    async with conn.cursor().copy("copy (select generate_series(1, 10000000)) to stdout") as copy:
        await copy.read()
        raise Stop("body")


async def pipeline(conn: Conn) -> None:
    async with conn.pipeline():
        await conn.execute("select pg_sleep(60)")
        at_the_end.append("pipeline")
        raise Stop("body")


at_the_end: list[str] = []

ENDS = {
    block: query("ROLLBACK"),
    savepoint: query("ROLLBACK TO"),
    server_cursor: query("CLOSE"),
    copy: cancel_request(),
}


@pytest.mark.anyio
@pytest.mark.parametrize("work", [*ENDS, pipeline], ids=lambda work: work.__name__)
async def test_a_cancellation_at_the_end_does_not_replace_what_stops_the_program(
    conn: Conn, proxy: FaultProxy, work: Callable[[Conn], Awaitable[None]]
) -> None:
    ending = proxy.inject(Freeze(), ENDS[work]) if work in ENDS else None
    raised: list[BaseException] = []
    scope = anyio.CancelScope()
    at_the_end.clear()

    async def run() -> None:
        with scope:
            try:
                await work(conn)
            except BaseException as exc:  # it must not end the test
                raised.append(exc)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run)
        if ending is not None:
            await ending.reached()
        else:
            while not at_the_end:
                await anyio.lowlevel.checkpoint()
        scope.cancel()
        await anyio.lowlevel.checkpoint()
        await anyio.lowlevel.checkpoint()
        if ending is not None:
            ending.remove()
            ending.release()
    assert isinstance(raised[0], Stop), kinds(raised[0])


async def commits(conn: Conn) -> None:
    async with conn.transaction() as tx:
        tx.on_commit(stop_the_program)
        await conn.execute("insert into t values (1)")


async def rolls_back(conn: Conn) -> None:
    async with conn.transaction() as tx:
        tx.on_rollback(stop_the_program)
        await conn.execute("insert into t values (1)")
        raise ValueError("body")


def stop_the_program() -> None:
    raise Stop("a callback's")


@pytest.mark.anyio
@pytest.mark.parametrize("work", [commits, rolls_back])
async def test_a_callback_may_stop_the_program(
    conn: Conn, work: Callable[[Conn], Awaitable[None]]
) -> None:
    with pytest.raises(Stop, match="a callback's"):
        await work(conn)


@pytest.mark.anyio
async def test_a_cursor_that_can_not_be_closed_hides_nothing(conn: Conn, proxy: FaultProxy) -> None:
    proxy.inject(Cut(), query("CLOSE"))
    with pytest.raises(LookupError, match="body"):
        async with conn.cursor("c", withhold=True) as cur:
            await cur.execute("select 1")
            raise LookupError("body")


async def given_back(pool: AsyncConnectionPool[Conn], lost: bool, proxy: FaultProxy) -> None:
    conn = await pool.getconn()
    await conn.execute("insert into t values (1)")
    async with conn.transaction() as tx:
        await conn.execute("insert into t values (2)")
        if lost:
            tx.on_rollback(anyio.sleep, 0.3)
    if lost:
        proxy.cut()
        await conn.wait_disconnected()
    await pool.putconn(conn)


@pytest.mark.anyio
async def test_a_time_limit_is_not_lost_giving_back(
    proxy: FaultProxy, anyio_backend: object
) -> None:
    undoing = proxy.inject(Freeze(), query("ROLLBACK"))
    async with AsyncConnectionPool(proxy.dsn, min_size=1, max_size=1) as pool:
        with sending(undoing, signal.SIGUSR1), pytest.raises(TimeLimit):
            await given_back(pool, False, proxy)
        async with pool.connection(timeout=10) as conn:
            await conn.execute("select 1")


@pytest.mark.anyio
async def test_nor_is_one_while_callbacks_of_a_lost_connection_run(
    proxy: FaultProxy, anyio_backend: object
) -> None:
    async with AsyncConnectionPool(proxy.dsn, min_size=1, max_size=1) as pool:
        conn = await pool.getconn()
        await conn.execute("insert into t values (1)")
        async with conn.transaction() as tx:
            await conn.execute("insert into t values (2)")

            async def callback() -> None:
                os.kill(os.getpid(), signal.SIGUSR1)
                await anyio.sleep(0.05)

            tx.on_rollback(callback)
        proxy.cut()
        await conn.wait_disconnected()
        with pytest.raises(TimeLimit):
            await pool.putconn(conn)


# Programs that end


PROGRAM = """
import os, signal, sys
import anyio
from aiopgsafe import AsyncConnection

async def main() -> None:
    one, other = [await AsyncConnection.connect(sys.argv[1]) for _ in range(2)]
    watching = other.cancel_on_signal(signal.SIGTERM)
    watching.__enter__()

    async def leave() -> None:
        os.kill(os.getpid(), signal.SIGTERM)  # deferred: the COMMIT's callbacks run
        watching.__exit__(None, None, None)

    async with one.transaction() as tx:
        await one.execute("insert into t values (1)")
        tx.on_commit(leave)
    await anyio.sleep(20)

anyio.run(main, backend=sys.argv[2])
"""


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_a_deferred_signal_ends_a_program_that_has_no_handler(dsn: str, backend: str) -> None:
    command = [sys.executable, "-c", PROGRAM, dsn, backend]
    ended = subprocess.run(command, timeout=15, check=False)
    assert ended.returncode == -signal.SIGTERM


CTRL_C = """
import os, signal, sys, time
from threading import Thread
import trio
from aiopgsafe import AsyncConnection
from aiopgsafe.testing import Freeze, FaultProxy, cancel_request, query

async def main() -> None:
    with FaultProxy(sys.argv[1]) as proxy:
        conn = await AsyncConnection.connect(proxy.dsn)
        sent = query("commit") if sys.argv[2] == "commit" else cancel_request()
        ending = proxy.inject(Freeze(), sent)

        def press() -> None:
            ending.wait()
            while time.monotonic() < began + 0.3:
                pass  # the scope has been cancelled
            os.kill(os.getpid(), signal.SIGINT)
            ending.release()

        began = time.monotonic()
        Thread(target=press).start()
        await conn.execute("select 1")
        with trio.move_on_after(0.1):
            await conn.execute(sys.argv[2])
        await trio.sleep(20)

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
trio.run(main)
"""


@pytest.mark.parametrize("statement", ["select pg_sleep(60)", "commit"])
def test_ctrl_c_on_trio_is_not_lost_while_a_cancelled_statement_is_ended(
    dsn: str, statement: str
) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", CTRL_C, dsn, statement],
        timeout=15,
        check=False,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
    )
    assert "KeyboardInterrupt" in ended.stderr
