"""What an adversary found in the listener and the watchers: each must stay mended."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import psycopg
import psycopg_pool
import pytest
from psycopg.conninfo import make_conninfo

from aiopgsafe import AsyncConnection, AsyncConnectionPool, Database, Gap, Notify
from aiopgsafe.testing import Cut, Delay, FaultProxy, Freeze, TemporaryServer, query
from tests.test_listen import payloads, take, until

pytestmark = pytest.mark.anyio

Admin = psycopg.Connection[Any]
Conn = AsyncConnection[Any]


@pytest.fixture
async def db(dsn: str, anyio_backend: object) -> AsyncIterator[Database]:
    async with Database(f"{dsn} application_name=heard", min_size=1) as db:
        yield db


def end_sessions(admin: Admin) -> None:
    admin.execute(
        "select pg_terminate_backend(pid) from pg_stat_activity where application_name = 'heard'"
    )


# Subscribers


async def test_a_gap_stands_where_something_is_missing_beside_a_slow_subscriber(
    db: Database, admin: Admin
) -> None:
    async with db.listen("a", max_buffer=2) as slow, db.listen("a") as subscription:
        admin.execute("select pg_notify('a', i::text) from generate_series(0, 9) i")
        await until(lambda: slow.excess == 8)  # a session that is ended delivers nothing more
        end_sessions(admin)
        items = await take(subscription, 11)
        assert [i.payload for i in items[:10]] == [str(i) for i in range(10)]
        assert isinstance(items[10], Gap)
        await db.notify("a", "after")
        assert await payloads(subscription, 1) == ["after"]


async def test_gaps_that_nobody_reads_are_one(db: Database, admin: Admin) -> None:
    async with db.listen("a", max_buffer=1) as subscription:
        hub = db._hub
        assert hub is not None
        for _ in range(3):
            await until(lambda: hub._listening)
            end_sessions(admin)
            await until(lambda: not hub._listening)
        await until(lambda: hub._listening)
        await db.notify("a", "fits")
        (gap, notify) = await take(subscription, 2)
        assert isinstance(gap, Gap)
        assert isinstance(notify, Notify)
        assert subscription.error is None


async def test_who_takes_one_a_turn_neither_holds_up_others_nor_fills_the_memory(
    db: Database,
) -> None:
    async with db.listen("a", max_buffer=1) as slow, db.listen("a", max_buffer=30_000) as fast:
        async with anyio.create_task_group() as tasks:

            async def crawl() -> None:
                with pytest.raises(psycopg.OperationalError, match="too slow"):
                    async for _ in slow:
                        for _ in range(50):
                            await anyio.lowlevel.checkpoint()

            tasks.start_soon(crawl)
            await db.execute("select pg_notify('a', i::text) from generate_series(1, 20000) i")
            assert await payloads(fast, 20_000) == [str(i) for i in range(1, 20_001)]
        assert len(slow._items) <= 1


async def test_nobody_enters_once_the_database_closes(dsn: str, anyio_backend: object) -> None:
    db = Database(f"{dsn} application_name=heard", min_size=1)
    await db.open()
    refused: list[str] = []

    async def resubscribe() -> None:
        while not refused:
            try:
                async with db.listen("a") as subscription:
                    async for _ in subscription:
                        pass
            except psycopg_pool.PoolClosed as exc:
                refused.append(str(exc))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(resubscribe)
        await until(lambda: db._hub and db._hub._listening)
        await db.close()
    assert len(refused) == 1
    assert not db.available
    with psycopg.connect(dsn, autocommit=True) as admin:  # a transaction sees one state only
        count = "select count(*) from pg_stat_activity where application_name = 'heard'"
        await until(lambda: admin.execute(count).fetchone() == (0,))


async def test_a_channel_that_cannot_be_sent_is_its_subscribers_error_only(
    dsn: str, anyio_backend: object
) -> None:
    db = Database(f"{dsn} client_encoding=latin1", min_size=1)
    async with db, db.listen("a") as subscription:
        with pytest.raises(UnicodeError):
            async with db.listen("€"):
                pass
        await db.notify("a", "still there")
        assert await payloads(subscription, 1) == ["still there"]


async def test_newcomers_do_not_keep_others_from_being_confirmed(
    proxy: FaultProxy, anyio_backend: object
) -> None:
    sent = proxy.inject(Delay(0.02), query("LISTEN"))
    async with Database(proxy.dsn, min_size=1) as db, anyio.create_task_group() as tasks:
        entered: list[int] = []

        async def enter(number: int) -> None:
            async with db.listen(f"c{number}"):
                entered.append(number)
                await anyio.sleep_forever()

        # One more with each LISTEN that is on its way: there is always one that waits.
        count = 0
        while len(entered) < 20:
            if count <= sent.hits:
                tasks.start_soon(enter, count)
                count += 1
            assert count < 200
            await anyio.lowlevel.checkpoint()
        tasks.cancel_scope.cancel()


# Losses


async def test_a_loss_at_each_listen_is_followed_by_longer_pauses(
    proxy: FaultProxy, anyio_backend: object
) -> None:
    async with Database(proxy.dsn, min_size=1) as db, db.listen("a") as subscription:
        cut = proxy.inject(Cut("rst"), query("LISTEN"))
        proxy.cut()
        with anyio.move_on_after(1):
            await anext(subscription)
        assert 1 <= cut.hits <= 20
        proxy.clear()
        (gap,) = await take(subscription, 1)
        assert isinstance(gap, Gap)


async def test_what_the_conninfo_function_raises_is_a_failed_attempt(
    dsn: str, admin: Admin, anyio_backend: object
) -> None:
    fails = 0

    def conninfo() -> str:
        nonlocal fails
        if fails:
            fails -= 1
            raise ConnectionError("no credentials just now")
        return f"{dsn} application_name=heard"

    async with Database(conninfo, min_size=0, max_size=1) as db, db.listen("a") as subscription:
        fails = 2
        end_sessions(admin)
        (gap,) = await take(subscription, 1)
        assert isinstance(gap, Gap)
        assert fails == 0


async def test_closing_does_not_wait_for_a_frozen_server(
    proxy: FaultProxy, anyio_backend: object
) -> None:
    async with Database(proxy.dsn, min_size=1) as db:
        frozen = proxy.inject(Freeze(), query("UNLISTEN"))
        async with db.listen("a"):
            async with db.listen("b"):
                pass
            await anyio.to_thread.run_sync(frozen.wait)
            with anyio.fail_after(3):
                await db.close()


# Health


async def test_a_server_is_found_again_though_nobody_connects_by_himself(
    dsn: str, admin: Admin, anyio_backend: object
) -> None:
    async with Database(f"{dsn} application_name=heard", min_size=0, max_size=1) as db:
        async with db.listen("a"):
            (place,) = db.pool._places.idle
            admin.execute("select pg_terminate_backend(%s)", (place.conn.info.backend_pid,))
            await until(lambda: not db.pool._places.idle)
            assert db.available  # the listener's lives
        end_sessions(admin)
        await db.execute("select 1")
        end_sessions(admin)
        with anyio.fail_after(5):
            await db.wait_unavailable()
            await db.wait_available()


async def test_a_killed_server_is_unavailable_though_a_connection_is_held(
    db: Database, server: TemporaryServer
) -> None:
    async with db.listen("a"), db.connection():
        await anyio.to_thread.run_sync(server.kill)
        try:
            with anyio.fail_after(5):
                await db.wait_unavailable()
        finally:
            await anyio.to_thread.run_sync(server.start)


async def test_a_silent_way_of_the_listeners_own_says_nothing_about_the_pool(
    dsn: str, proxy: FaultProxy, anyio_backend: object
) -> None:
    db = Database(
        dsn, min_size=1, listen_conninfo=proxy.dsn, heartbeat=0.05, heartbeat_timeout=0.05
    )
    async with db, db.listen("a"):
        hub = db._hub
        assert hub is not None
        proxy.freeze()
        await until(lambda: not hub._listening)
        assert db.available


async def test_other_event_loops_are_refused(db: Database) -> None:
    errors: list[str] = []

    async def elsewhere(subscription: Any) -> None:
        for use in (db.wait_available, db.wait_unavailable, subscription.__anext__):
            try:
                await use()
            except psycopg.InterfaceError as exc:
                errors.append(str(exc))

    async with db.listen("a") as subscription:
        thread = threading.Thread(target=anyio.run, args=(elsewhere, subscription))
        thread.start()
        await anyio.to_thread.run_sync(thread.join)
    assert len(errors) == 3
    assert all("another event loop" in error for error in errors)


# Connections


async def test_bytes_of_no_encoding_disturb_nobody(
    server: TemporaryServer, admin: Admin, anyio_backend: object
) -> None:
    admin.execute("drop database if exists ascii")
    admin.execute("create database ascii encoding 'SQL_ASCII' template template0 locale 'C'")
    dsn = make_conninfo(server.dsn, dbname="ascii")
    received: list[str] = []
    async with await AsyncConnection.connect(dsn, autocommit=True) as conn:
        conn.add_notify_handler(lambda notify: received.append(notify.payload))
        await conn.execute("listen a")
        with psycopg.connect(dsn, autocommit=True) as other:
            other.execute(b"notify a, '1'; notify a, '\xc3\xbc\xff'; notify a, '3'")
        await until(lambda: len(received) == 3)
        await conn.execute("select 1")
    assert received[0] == "1"
    assert received[1].encode("utf-8", "surrogateescape").endswith(b"\xff")
    assert received[2] == "3"


async def test_what_comes_behind_an_answer_in_one_packet_is_told(
    proxy: FaultProxy, admin: Admin, anyio_backend: object
) -> None:
    """libpq has read it already: nothing more makes the socket readable."""
    received: list[str] = []
    async with await AsyncConnection.connect(proxy.dsn, autocommit=True) as conn:
        conn.add_notify_handler(lambda notify: received.append(notify.payload))
        await conn.execute("listen a")
        for number in range(20):
            held = proxy.inject(Freeze(), "Z", direction="backend", times=1)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(conn.execute, "select 1")
                await anyio.to_thread.run_sync(held.wait)
                admin.execute("select pg_notify('a', %s)", (str(number),))
                held.release()
            await until(lambda number=number: len(received) > number)  # type: ignore[misc]
    assert received == [str(number) for number in range(20)]


async def test_why_a_busy_connection_was_lost_is_told(
    dsn: str, admin: Admin, anyio_backend: object
) -> None:
    told: list[Exception] = []
    conn = await AsyncConnection.connect(dsn, autocommit=True)
    conn.add_disconnect_handler(told.append)
    async with anyio.create_task_group() as tasks:

        async def sleep() -> None:
            with pytest.raises(psycopg.errors.AdminShutdown):
                await conn.execute("select pg_sleep(30)")

        tasks.start_soon(sleep)
        await until(conn.lock.locked)
        admin.execute("select pg_terminate_backend(%s)", (conn.info.backend_pid,))
    await conn.close()
    assert [type(error) for error in told] == [psycopg.errors.AdminShutdown]


async def test_a_handler_that_closes_the_connection_is_not_told_of_a_loss(
    dsn: str, admin: Admin, anyio_backend: object
) -> None:
    for how in ("notify", "notice"):
        told: list[Exception] = []
        conn = await AsyncConnection.connect(dsn, autocommit=True)
        conn.add_disconnect_handler(told.append)

        def close(_: object, conn: Conn = conn) -> None:
            conn._close_now()

        if how == "notify":
            conn.add_notify_handler(close)
            await conn.execute("listen a")
            admin.execute("notify a")
            await until(lambda conn=conn: conn.closed)  # type: ignore[misc]
        else:
            conn.add_notice_handler(close)  # called from inside of libpq
            with suppress(psycopg.OperationalError):
                await conn.execute("do $$begin raise notice 'x'; end$$")
            await until(lambda conn=conn: conn.closed)  # type: ignore[misc]
        assert told == []


async def test_handlers_that_configure_has_set_cannot_be_removed_for_others(
    dsn: str, anyio_backend: object
) -> None:
    async def configure(conn: Conn) -> None:
        conn.add_notify_handler(print)
        conn.add_notice_handler(print)
        conn.add_disconnect_handler(print)

    pool: AsyncConnectionPool[Conn] = AsyncConnectionPool(
        dsn, min_size=1, configure=configure, open=False
    )
    async with pool:
        async with pool.connection() as conn:
            conn.remove_notify_handler(print)
            conn.remove_notice_handler(print)
            conn.remove_disconnect_handler(print)
        async with pool.connection() as conn:
            assert conn._handlers() == ((print,), (print,), (print,))


@pytest.mark.parametrize("loop_name", ["trio"])
async def test_a_descriptor_that_was_closed_behind_our_back_is_watched_anew(
    dsn: str, anyio_backend: object
) -> None:
    for _ in range(3):
        conn = await AsyncConnection.connect(dsn, autocommit=True)
        heard: list[Notify] = []
        conn.add_notify_handler(heard.append)
        await conn.execute("listen a")
        await conn.execute("notify a")
        assert len(heard) == 1
        conn.pgconn.finish()
        await conn.close()


# Poolers


async def test_a_failed_proof_leaves_no_listen_in_the_poolers_sessions(
    dsn: str, pgbouncer: str, anyio_backend: object
) -> None:
    async with Database(pgbouncer, min_size=1) as db:
        with pytest.raises(psycopg.NotSupportedError):
            async with db.listen("a"):
                pass
        cur = await db.execute("select * from pg_listening_channels()")
        assert await cur.fetchall() == []
