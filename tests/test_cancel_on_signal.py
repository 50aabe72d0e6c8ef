"""P6: the first Ctrl-C cancels the running statement, like psql; the next one is the program's."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import psycopg
import pytest

from aiopgsafe import AsyncConnection
from aiopgsafe.testing import (
    Delay,
    FaultProxy,
    Freeze,
    cancel_request,
    command_complete,
)

PROGRAM = Path(__file__).parent / "programs" / "at_terminal.py"

Conn = AsyncConnection[Any]
SLEEP = "select pg_sleep(60)"


class Terminal:
    """A program in the foreground of a pseudo-terminal."""

    def __init__(self, *args: str) -> None:
        self.master, slave = os.openpty()
        path = os.ttyname(slave)
        # Opening a terminal makes it the controlling one of a new session's leader.
        opens = (
            "import os,sys; os.close(os.open(sys.argv[1], os.O_RDWR));"
            "os.execv(sys.executable, [sys.executable, '-W', 'error', *sys.argv[2:]])"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", opens, path, str(PROGRAM), *args],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
        )
        os.close(slave)
        self._said = b""

    def press_ctrl_c(self) -> None:
        os.write(self.master, b"\x03")

    def wait_for(self, text: str) -> None:
        while text.encode() not in self._said:
            self._said += os.read(self.master, 4096)

    def end(self) -> tuple[int, str]:
        """The exit status as a shell sees it, and all that was said."""
        try:
            while data := os.read(self.master, 4096):
                self._said += data
        except OSError:  # Linux's way to say that the other side is closed
            pass
        status = self.process.wait(20)
        return (status if status >= 0 else 128 - status), self._said.decode()


@contextmanager
def terminal(*args: str) -> Iterator[Terminal]:
    at = Terminal(*args)
    try:
        yield at
    finally:
        at.process.kill()
        at.process.wait()
        os.close(at.master)


@pytest.fixture
def admin(dsn: str) -> Iterator[psycopg.Connection[tuple[int]]]:
    with psycopg.connect(dsn, autocommit=True) as admin:
        admin.execute("create table t (id int)")
        yield admin


def wait_until_active(admin: psycopg.Connection[Any], count: int = 1) -> None:
    """Until so many statements sleep on the server."""
    sleeping = "select count(*) from pg_stat_activity where wait_event = 'PgSleep'"
    while admin.execute(sleeping).fetchone() != (count,):
        pass


def test_ctrl_c_cancels_the_statement_and_the_program_goes_on(
    loop_name: str, dsn: str, admin: psycopg.Connection[Any]
) -> None:
    with terminal(loop_name, "once", dsn) as at:
        wait_until_active(admin)
        at.press_ctrl_c()
        status, said = at.end()
    assert "cancelled\r\ngoes on" in said
    assert "put back True" in said
    assert "handlers True" in said
    assert status == 0, said


def test_the_second_ctrl_c_ends_the_program(
    loop_name: str, dsn: str, admin: psycopg.Connection[Any]
) -> None:
    with terminal(loop_name, "twice", dsn) as at:
        wait_until_active(admin)
        at.press_ctrl_c()
        at.wait_for("cancelled")
        wait_until_active(admin)
        at.press_ctrl_c()
        status, said = at.end()
    assert said.count("cancelled") == 1
    assert "raised" in said
    assert "put back True" in said
    assert status == 130, said
    assert "KeyboardInterrupt" in said
    wait_until_active(admin, 0)


def test_ctrl_c_in_commit_waits_for_the_outcome(
    loop_name: str, proxy: FaultProxy, admin: psycopg.Connection[Any]
) -> None:
    in_commit = proxy.inject(Delay(0.3), command_complete("COMMIT"))
    with terminal(loop_name, "commit", proxy.dsn) as at:
        in_commit.wait()
        at.press_ctrl_c()
        status, said = at.end()
    assert proxy.stats.cancel_requests == 0
    assert "callback\r\n" in said
    assert "the transaction is committed" in said
    assert "state COMMITTED" in said
    assert status == 130, said
    assert admin.execute("select count(*) from t").fetchone() == (1,)


# In this process


@contextmanager
def program_handler(signum: int) -> Iterator[list[int]]:
    """The program's own handler: notes its calls."""
    calls: list[int] = []
    before = signal.signal(signum, lambda signum, frame: calls.append(signum))
    try:
        yield calls
    finally:
        signal.signal(signum, before)


def send_when_active(dsn: str, signum: int, count: int = 1) -> threading.Thread:
    """Send ourselves `signum` once so many statements sleep on the server."""

    def run() -> None:
        with psycopg.connect(dsn, autocommit=True) as admin:
            wait_until_active(admin, count)
        os.kill(os.getpid(), signum)

    thread = threading.Thread(target=run)
    thread.start()
    return thread


@pytest.mark.anyio
async def test_a_signal_while_nothing_runs_is_the_programs(conn: Conn) -> None:
    with program_handler(signal.SIGUSR1) as calls:
        with conn.cancel_on_signal(signal.SIGUSR1):
            os.kill(os.getpid(), signal.SIGUSR1)
            assert calls == [signal.SIGUSR1]
        os.kill(os.getpid(), signal.SIGUSR1)
        assert calls == [signal.SIGUSR1] * 2


@pytest.mark.anyio
async def test_blocks_nest_and_may_be_left_in_any_order(conn: Conn, dsn: str) -> None:
    async with await AsyncConnection.connect(dsn, autocommit=True) as other:
        with program_handler(signal.SIGUSR1) as calls:
            handler = signal.getsignal(signal.SIGUSR1)
            first, second = [c.cancel_on_signal(signal.SIGUSR1) for c in (conn, other)]
            first.__enter__()
            second.__enter__()
            first.__exit__(None, None, None)
            sender = send_when_active(dsn, signal.SIGUSR1)
            with pytest.raises(psycopg.errors.QueryCanceled):
                await other.execute(SLEEP)
            sender.join()
            second.__exit__(None, None, None)
            assert signal.getsignal(signal.SIGUSR1) is handler
            assert calls == []


@pytest.mark.anyio
async def test_what_runs_on_several_connections_is_cancelled(conn: Conn, dsn: str) -> None:
    cancelled: list[Conn] = []

    async def sleep(conn: Conn) -> None:
        with conn.cancel_on_signal(signal.SIGUSR1), pytest.raises(psycopg.errors.QueryCanceled):
            await conn.execute(SLEEP)
        cancelled.append(conn)

    async with await AsyncConnection.connect(dsn, autocommit=True) as other:
        with program_handler(signal.SIGUSR1) as calls:
            sender = send_when_active(dsn, signal.SIGUSR1, 2)
            async with anyio.create_task_group() as tasks:
                for each in (conn, other):
                    tasks.start_soon(sleep, each)
            sender.join()
            assert calls == []
            assert len(cancelled) == 2


@pytest.mark.anyio
async def test_a_copy_between_two_writes_is_cancelled(
    conn: Conn, admin: psycopg.Connection[Any]
) -> None:
    with program_handler(signal.SIGUSR1) as calls, conn.cancel_on_signal(signal.SIGUSR1):
        with pytest.raises(psycopg.errors.QueryCanceled):
            async with conn.cursor().copy("copy t (id) from stdin") as copy:
                await copy.write(b"1\n")
                os.kill(os.getpid(), signal.SIGUSR1)
                while conn._signalled is None:
                    await anyio.lowlevel.checkpoint()
                await copy.write(b"2\n")
        assert calls == []
    await conn.rollback()
    cur = await conn.execute("select 'usable'")
    assert await cur.fetchone() == ("usable",)
    await conn.rollback()


@pytest.mark.anyio
async def test_the_next_statement_waits_for_a_cancel_request_on_its_way(
    proxy: FaultProxy, dsn: str
) -> None:
    """The request arrives when the statement has ended: it hits nothing, least of all the next."""
    late = proxy.inject(Delay(0.3), cancel_request())
    conn = await AsyncConnection.connect(proxy.dsn, autocommit=True)
    with program_handler(signal.SIGUSR1), conn.cancel_on_signal(signal.SIGUSR1):
        sender = send_when_active(dsn, signal.SIGUSR1)
        await conn.execute("select pg_sleep(0.2)")
        sender.join()
        assert late.hits == 1
        await conn.execute("select pg_sleep(0.3)")
    await conn.close()


@pytest.mark.anyio
async def test_a_server_that_does_not_cancel_costs_no_more_than_cancel_timeout(
    proxy: FaultProxy, dsn: str, admin: psycopg.Connection[Any]
) -> None:
    proxy.inject(Freeze(), cancel_request())
    conn = await AsyncConnection.connect(proxy.dsn, autocommit=True, cancel_timeout=0.2)
    pid = conn.info.backend_pid
    with program_handler(signal.SIGUSR1), conn.cancel_on_signal(signal.SIGUSR1):
        sender = send_when_active(dsn, signal.SIGUSR1)
        with anyio.fail_after(10), pytest.raises(psycopg.OperationalError, match="cancel request"):
            await conn.execute(SLEEP)
        sender.join()
    assert conn.closed
    admin.execute("select pg_terminate_backend(%s)", (pid,))
    wait_until_active(admin, 0)


@pytest.mark.anyio
async def test_notifies_is_nothing_that_runs_on_the_server(conn: Conn) -> None:
    with program_handler(signal.SIGUSR1) as calls, conn.cancel_on_signal(signal.SIGUSR1):
        sender = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGUSR1))
        sender.start()
        assert [n async for n in conn.notifies(timeout=0.3)] == []
        sender.join()
        assert calls == [signal.SIGUSR1]


@pytest.mark.anyio
async def test_a_commit_as_text_is_not_cancelled(proxy: FaultProxy, admin: Any) -> None:
    late = proxy.inject(Delay(0.3), command_complete("COMMIT"))
    conn = await AsyncConnection.connect(proxy.dsn, autocommit=True)
    await conn.execute("begin")
    await conn.execute("insert into t values (1)")
    with program_handler(signal.SIGUSR1) as calls, conn.cancel_on_signal(signal.SIGUSR1):

        def send() -> None:
            late.wait()
            os.kill(os.getpid(), signal.SIGUSR1)

        sender = threading.Thread(target=send)
        sender.start()
        await conn.execute("commit")
        sender.join()
        assert calls == [signal.SIGUSR1]
    assert proxy.stats.cancel_requests == 0
    await conn.close()


@pytest.mark.anyio
@pytest.mark.parametrize("loop_name", ["asyncio"])
async def test_handlers_of_the_loops_own_survive(conn: Conn, dsn: str) -> None:
    loop, called = asyncio.get_running_loop(), asyncio.Event()
    loop.add_signal_handler(signal.SIGUSR1, called.set)
    try:
        with conn.cancel_on_signal(signal.SIGUSR1):
            sender = send_when_active(dsn, signal.SIGUSR1)
            with pytest.raises(psycopg.errors.QueryCanceled):
                await conn.execute(SLEEP)
            sender.join()
            assert not called.is_set()
            os.kill(os.getpid(), signal.SIGUSR1)
            await called.wait()
        called.clear()
        os.kill(os.getpid(), signal.SIGUSR1)
        await called.wait()
    finally:
        loop.remove_signal_handler(signal.SIGUSR1)


@pytest.mark.anyio
@pytest.mark.parametrize("loop_name", ["uvloop"])
async def test_a_handler_that_uvloop_keeps_to_itself_is_a_clear_error(conn: Conn) -> None:
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGUSR1, print)
    try:
        with pytest.raises(RuntimeError, match="add_signal_handler"):
            conn.cancel_on_signal(signal.SIGUSR1).__enter__()
        with conn.cancel_on_signal(signal.SIGUSR2):
            pass
    finally:
        loop.remove_signal_handler(signal.SIGUSR1)


@pytest.mark.anyio
async def test_another_thread_is_a_clear_error(conn: Conn) -> None:
    def enter() -> None:
        with conn.cancel_on_signal():
            pass

    with pytest.raises(RuntimeError, match="main thread"):
        await anyio.to_thread.run_sync(enter)
    with pytest.raises(ValueError, match="4711"):
        conn.cancel_on_signal(4711).__enter__()
    with pytest.raises((OSError, ValueError)):
        conn.cancel_on_signal(signal.SIGKILL).__enter__()
    with conn.cancel_on_signal(signal.SIGUSR1):
        pass
