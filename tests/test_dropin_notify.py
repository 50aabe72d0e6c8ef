"""What the server says unasked: each scenario as psycopg's own class plays it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import aclosing
from typing import Any, cast

import anyio
import anyio.lowlevel
import psycopg
import pytest
from psycopg.pq import TransactionStatus

from aiopgsafe import AsyncConnection
from aiopgsafe.testing import Cut, FaultProxy
from tests.dropin import Connection, Scene, compared


async def take(conn: Connection, **kwargs: Any) -> list[str]:
    return [f"{n.channel}:{n.payload}" async for n in conn.notifies(**kwargs)]


async def hear(conn: Connection, *channels: str) -> None:
    for channel in channels:
        await conn.execute(f"listen {channel}".encode())
    await conn.commit()


# Notifications


@compared
async def test_notifies_stops_by_timeout_or_count_and_keeps_what_is_left(s: Scene) -> None:
    await s.conn.set_autocommit(True)
    await hear(s.conn, "a", "b")
    s.note(await take(s.conn, timeout=0))
    s.note(await take(s.conn, timeout=0.05))
    async with s.another() as other:
        for i in range(3):
            await other.execute("select pg_notify('a', %s)", (str(i),))
        s.note(await take(s.conn, stop_after=3))
        await other.execute("notify b")
        await other.execute("notify nobody_listens")
        s.note(await take(s.conn, stop_after=1, timeout=5))
        s.note(await take(s.conn, timeout=0))
    (notify,) = [n async for n in notified_by_itself(s)]
    s.note(notify.pid == s.conn.info.backend_pid, notify.payload)


async def notified_by_itself(s: Scene) -> Any:
    await s.conn.execute("notify a, 'self'")
    async for notify in s.conn.notifies(timeout=5, stop_after=1):
        yield notify


@compared
async def test_notification_that_came_before_notifies_is_yielded_first(s: Scene) -> None:
    await s.conn.set_autocommit(True)
    await hear(s.conn, "a")
    async with s.another() as other:
        for i in range(2):
            await other.execute("select pg_notify('a', %s)", (str(i),))
    await s.conn.execute("select 1")
    await s.conn.execute("notify a, 'with a result'")
    s.note(await take(s.conn, stop_after=3, timeout=5))
    s.note(await take(s.conn, timeout=0))


@compared
async def test_notifies_left_early_leaves_the_rest_to_the_next(s: Scene) -> None:
    await s.conn.set_autocommit(True)
    await hear(s.conn, "a")
    await s.conn.execute("notify a, '1'; notify a, '2'; notify a, '3'")
    generator = cast("Any", s.conn.notifies(timeout=5))
    async with aclosing(generator):
        async for notify in generator:
            s.note(notify.payload)
            break
    s.note(await (await s.conn.execute("select 1")).fetchall())
    s.note(await take(s.conn, stop_after=2, timeout=5))


@compared
async def test_a_statement_waits_until_notifies_ends(s: Scene) -> None:
    await s.conn.set_autocommit(True)
    await hear(s.conn, "a")
    order: list[str] = []

    async def listen() -> None:
        order.extend(await take(s.conn, stop_after=1, timeout=10))

    async def ask() -> None:
        while not s.conn.lock.locked():
            await anyio.lowlevel.checkpoint()
        tasks.start_soon(tell)
        await s.conn.execute("select 1")
        order.append("asked")

    async def tell() -> None:
        async with s.another() as other:
            await other.execute("notify a")

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(listen)
        tasks.start_soon(ask)
    s.note(order)


@pytest.mark.anyio
async def test_a_cancelled_notifies_leaves_a_usable_connection(conn: AsyncConnection[Any]) -> None:
    await conn.set_autocommit(True)
    await hear(conn, "a")
    with anyio.move_on_after(0.05) as scope:
        await take(conn)
    assert scope.cancelled_caught
    assert conn.info.transaction_status is TransactionStatus.IDLE
    await conn.execute("notify a, 'after'")
    assert await take(conn, stop_after=1, timeout=5) == ["a:after"]


@pytest.mark.anyio
async def test_notifies_raises_when_the_connection_is_lost(
    dsn: str, conn: AsyncConnection[Any]
) -> None:
    await conn.set_autocommit(True)
    await hear(conn, "a")

    async def kill() -> None:
        async with await AsyncConnection.connect(dsn, autocommit=True) as other:
            await other.execute("select pg_terminate_backend(%s)", (conn.info.backend_pid,))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(kill)
        with pytest.raises(psycopg.OperationalError):
            await take(conn, timeout=10)
    assert conn.broken


@compared
async def test_handlers_get_each_notification_once(s: Scene) -> None:
    await s.conn.set_autocommit(True)
    got: list[str] = []
    handler: Callable[[psycopg.Notify], None] = lambda n: got.append(n.payload)  # noqa: E731
    s.conn.add_notify_handler(handler)
    await hear(s.conn, "a")
    await s.conn.execute("notify a, 'own'")
    async with s.another() as other:
        await other.execute("notify a, 'other'")
    await s.conn.execute("select 1")
    s.note(got)
    s.conn.remove_notify_handler(handler)
    await s.conn.execute("notify a, 'nobody'")
    s.note(got, await take(s.conn, stop_after=1, timeout=5))
    with s.fails():
        s.conn.remove_notify_handler(handler)


@pytest.mark.anyio
async def test_handlers_and_notifies_both_get_a_notification(conn: AsyncConnection[Any]) -> None:
    """psycopg warns that this is unreliable; here it is not."""
    await conn.set_autocommit(True)
    got: list[str] = []
    conn.add_notify_handler(lambda n: got.append(n.payload))
    await hear(conn, "a")
    await conn.execute("notify a, 'before'")
    assert got == ["before"]
    taken: list[str] = []

    async def listen() -> None:
        taken.extend(await take(conn, stop_after=1, timeout=10))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(listen)
        while not conn.lock.locked():
            await anyio.lowlevel.checkpoint()
        async with await AsyncConnection.connect(conn.info.dsn, autocommit=True) as other:
            await other.execute("notify a, 'now'")
    assert taken == ["a:now"]
    assert got == ["before", "now"]


# Notices


@compared
async def test_notices_go_to_the_handlers_and_a_bad_handler_harms_nobody(s: Scene) -> None:
    got: list[Any] = []

    def bad(diag: Any) -> None:
        raise ZeroDivisionError

    def good(diag: psycopg.errors.Diagnostic) -> None:
        got.append((diag.severity, diag.message_primary))

    s.conn.add_notice_handler(bad)
    s.conn.add_notice_handler(good)
    say = "do $$begin raise notice '%', 'hé'; raise warning 'w'; end$$"
    await s.conn.execute(say.encode())
    s.note(list(got))
    s.conn.remove_notice_handler(good)
    await s.conn.execute(say.encode())
    s.note(len(got))
    with s.fails():
        s.conn.remove_notice_handler(good)


@pytest.mark.anyio
async def test_a_reset_behind_a_notification_is_seen_by_the_next_statement(
    proxy: FaultProxy, dsn: str
) -> None:
    conn = await AsyncConnection.connect(proxy.dsn, autocommit=True)
    await hear(conn, "a")
    cut = proxy.inject(Cut("rst"), "A", when="after", direction="backend")
    async with await AsyncConnection.connect(dsn, autocommit=True) as other:
        await other.execute("notify a")
    cut.wait()
    # The loop is asked for what has come meanwhile.
    for _ in range(3):
        await anyio.lowlevel.checkpoint()
    with anyio.fail_after(5), pytest.raises(psycopg.OperationalError):
        await conn.execute("select 1")
    assert conn.broken
    await conn.close()
