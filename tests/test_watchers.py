"""P5: what the server says unasked is told at once, also while nothing runs."""

from __future__ import annotations

import statistics
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from time import perf_counter
from typing import Any

import anyio
import anyio.lowlevel
import psycopg
import pytest
from psycopg import Notify
from psycopg.errors import Diagnostic

from aiopgsafe import AsyncConnection, AsyncConnectionPool, ConnectionReleased
from aiopgsafe.testing import FaultProxy, TemporaryServer
from tests.conftest import Figures

pytestmark = pytest.mark.anyio

Admin = psycopg.Connection[Any]
Conn = AsyncConnection[Any]
Pool = AsyncConnectionPool[Conn]


@pytest.fixture
async def conn(dsn: str, anyio_backend: object) -> AsyncIterator[Conn]:
    async with await AsyncConnection.connect(dsn, autocommit=True) as conn:
        yield conn


async def until(condition: Callable[[], object]) -> None:
    with anyio.fail_after(10):
        while not condition():
            await anyio.lowlevel.checkpoint()


async def idle(conn: Conn, send: Callable[[], None]) -> None:
    send()


async def querying(conn: Conn, send: Callable[[], None]) -> None:
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(conn.execute, "select pg_sleep(0.1)")
        await anyio.lowlevel.checkpoint()
        send()


async def copying(conn: Conn, send: Callable[[], None]) -> None:
    async with conn.cursor().copy("copy (select generate_series(1, 10000)) to stdout") as copy:
        await copy.read()
        send()
        while await copy.read():
            pass


async def in_pipeline(conn: Conn, send: Callable[[], None]) -> None:
    async with conn.pipeline():
        await conn.execute("select 1")
        send()
        await conn.execute("select 2")


@pytest.mark.parametrize("busy_with", [idle, querying, copying, in_pipeline])
async def test_notifications_come_once_and_in_order_whatever_runs(
    conn: Conn, admin: Admin, busy_with: Any
) -> None:
    received: list[str] = []
    conn.add_notify_handler(lambda notify: received.append(notify.payload))
    await conn.execute("listen c")
    sent: list[str] = []

    def send() -> None:
        for _ in range(10):
            sent.append(str(len(sent)))
            admin.execute("select pg_notify('c', %s)", (sent[-1],))

    for _ in range(3):
        await busy_with(conn, send)
        await until(lambda: len(received) >= len(sent))
    await conn.execute("select 1")
    assert received == sent
    assert [n.payload async for n in conn.notifies(timeout=0)] == []


async def test_notices_come_while_idle_and_may_be_kept(
    conn: Conn, admin: Admin, server: TemporaryServer
) -> None:
    notices: list[Diagnostic] = []
    conn.add_notice_handler(notices.append)
    await conn.execute("do $$begin raise notice 'busy' using hint = 'kept'; end$$")
    assert (notices[0].message_primary, notices[0].message_hint) == ("busy", "kept")
    # A session that is ended, idle, is told why: a notice of severity FATAL.
    admin.execute("select pg_terminate_backend(%s)", (conn.info.backend_pid,))
    await until(lambda: len(notices) == 2)
    assert notices[1].severity_nonlocalized == "FATAL"


async def test_a_handler_that_fails_disturbs_nobody(conn: Conn) -> None:
    received: list[Notify] = []

    def fail(notify: Notify) -> None:
        raise LookupError

    conn.add_notify_handler(fail)
    conn.add_notify_handler(received.append)
    await conn.execute("listen c")
    await conn.execute("notify c")
    assert len(received) == 1


async def test_a_lost_connection_is_told_of_at_once(
    dsn: str, admin: Admin, figures: Figures, anyio_backend: object
) -> None:
    """Idle ones, a program's own and a pool's."""
    took: list[float] = []
    async with AsyncExitStack() as stack:
        conns = [
            await stack.enter_async_context(await AsyncConnection.connect(dsn)) for _ in range(20)
        ]
        pool: Pool = AsyncConnectionPool(dsn, min_size=20, open=False)
        await stack.enter_async_context(pool)
        await pool.wait()
        conns += [await stack.enter_async_context(pool.connection()) for _ in range(20)]
        for conn in conns:
            errors: list[psycopg.OperationalError] = []
            conn.add_disconnect_handler(errors.append)
            start = perf_counter()
            admin.execute("select pg_terminate_backend(%s)", (conn.info.backend_pid,))
            await until(lambda errors=errors: errors)  # type: ignore[misc]
            took.append(perf_counter() - start)
            assert isinstance(errors[0], psycopg.errors.AdminShutdown)
            assert await conn.wait_disconnected() is errors[0]
            assert len(errors) == 1
    took.sort()
    figures(
        median=f"{statistics.median(took) * 1000:.2f} ms",
        p99=f"{took[-1] * 1000:.2f} ms",
    )


@pytest.mark.parametrize("how", ["rst", "fin"])
@pytest.mark.parametrize("busy", [False, True], ids=["idle", "busy"])
async def test_a_cut_is_told_of_idle_and_in_a_query(
    proxy: FaultProxy, how: Any, busy: bool, anyio_backend: object
) -> None:
    conn = await AsyncConnection.connect(proxy.dsn, autocommit=True)
    errors: list[psycopg.OperationalError] = []
    conn.add_disconnect_handler(errors.append)
    async with anyio.create_task_group() as tasks:
        if busy:

            async def query() -> None:
                with pytest.raises(psycopg.OperationalError):
                    await conn.execute("select pg_sleep(30)")

            tasks.start_soon(query)
            await until(conn.lock.locked)
        proxy.cut(how)
        await until(lambda: errors)
    assert conn.broken
    await conn.close()
    assert len(errors) == 1


async def test_who_closes_is_not_told_but_who_waits_for_the_end_is(conn: Conn) -> None:
    errors: list[psycopg.OperationalError] = []
    conn.add_disconnect_handler(errors.append)
    ended: list[psycopg.OperationalError] = []

    async def wait() -> None:
        ended.append(await conn.wait_disconnected())

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(wait)
        await until(lambda: conn._waiting_for_loss)
        await conn.execute("select 'used meanwhile'")
        await conn.close()
    assert [str(error) for error in ended] == ["the connection is closed"]
    assert errors == []
    with pytest.raises(psycopg.OperationalError):
        conn.add_disconnect_handler(errors.append)


async def test_a_handler_that_was_removed_is_not_called(conn: Conn, admin: Admin) -> None:
    conn.add_disconnect_handler(print)
    conn.remove_disconnect_handler(print)
    with pytest.raises(ValueError, match="not in list"):
        conn.remove_disconnect_handler(print)
    with anyio.move_on_after(0.05) as scope:
        await conn.wait_disconnected()
    assert scope.cancelled_caught
    assert not conn._waiting_for_loss


async def test_handlers_of_a_pools_connection_are_its_holders(
    dsn: str, anyio_backend: object
) -> None:
    """But those that `configure` has set: they are for all."""
    configured: list[Diagnostic] = []

    async def configure(conn: Conn) -> None:
        conn.add_notice_handler(configured.append)

    pool: Pool = AsyncConnectionPool(dsn, min_size=1, configure=configure, open=False)
    async with pool:
        held: list[Diagnostic] = []
        async with anyio.create_task_group() as tasks, pool.connection() as conn:
            conn.add_notice_handler(held.append)
            conn.add_disconnect_handler(print)

            async def wait() -> None:
                with pytest.raises(ConnectionReleased):
                    await conn.wait_disconnected()

            tasks.start_soon(wait)
            await until(lambda: conn._waiting_for_loss)
        async with pool.connection() as conn:
            await conn.execute("do $$begin raise notice 'x'; end$$")
            assert not conn._disconnect_handlers
        assert (len(configured), len(held)) == (1, 0)
