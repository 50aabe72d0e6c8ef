"""P5: every notification is received, or lies inside a gap that was told. Never a silent hole."""

from __future__ import annotations

import random
import ssl
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import psycopg
import psycopg_pool
import pytest
from psycopg.conninfo import make_conninfo

from aiopgsafe import AsyncConnection, Database, Draining, Gap, Notify
from aiopgsafe.testing import CancelSweep, FaultProxy, Freeze, TemporaryServer
from tests.conftest import Figures, resident, sweeps

pytestmark = pytest.mark.anyio

Admin = psycopg.Connection[Any]


@pytest.fixture
async def db(dsn: str, anyio_backend: object) -> AsyncIterator[Database]:
    async with Database(dsn, min_size=1) as db:
        yield db


async def until(condition: Callable[[], object], seconds: float = 10) -> None:
    with anyio.fail_after(seconds):
        while not condition():
            await anyio.lowlevel.checkpoint()


def listeners(admin: Admin) -> int:
    """Sessions that have executed LISTEN or UNLISTEN last, or our question."""
    query = (
        "select count(*) from pg_stat_activity where pid <> pg_backend_pid()"
        " and (query like 'LISTEN%' or query like 'UNLISTEN%' or query like '%; LISTEN%')"
    )
    row = admin.execute(query).fetchone()
    assert row is not None
    return int(row[0])


async def take(subscription: Any, count: int) -> list[Any]:
    with anyio.fail_after(10):
        return [await anext(subscription) for _ in range(count)]


async def payloads(subscription: Any, count: int) -> list[str]:
    return [item.payload for item in await take(subscription, count)]


# Subscribing


async def test_subscribers_share_a_connection_that_goes_with_the_last_of_them(
    db: Database, admin: Admin
) -> None:
    async with db.listen("a") as one, db.listen("a", "B c", "a") as two:
        assert two.channels == ("a", "B c")
        await db.notify("a", "1")
        await db.notify("B c", "2")
        assert await payloads(one, 1) == ["1"]
        assert await payloads(two, 2) == ["1", "2"]
        assert listeners(admin) == 1
    await until(lambda: listeners(admin) == 0)
    async with db.listen("a") as again:
        await db.notify("a", "3")
        assert await payloads(again, 1) == ["3"]


@pytest.mark.parametrize("channel", ['"', "Grüße", "select 1; --", "x" * 63, "%s"])
async def test_names_are_quoted(db: Database, channel: str) -> None:
    async with db.listen(channel) as subscription:
        await db.notify(channel, "there")
        assert await payloads(subscription, 1) == ["there"]


async def test_the_last_subscriber_of_a_channel_takes_its_listen_along(
    db: Database, admin: Admin
) -> None:
    async with db.listen("a") as one:
        async with db.listen("b"):
            pass
        hub = db._hub
        assert hub is not None
        await until(lambda: hub._listening == {"a"})
        await db.notify("b")
        await db.notify("a", "only this")
        assert await payloads(one, 1) == ["only this"]


async def test_a_transaction_notifies_when_it_commits(db: Database) -> None:
    async with db.listen("a") as subscription:
        async with db.transaction() as tx:
            await db.notify("a", "rolled back")
            raise_it = psycopg.Rollback(tx)
            raise raise_it
        async with db.transaction() as tx:
            await db.notify("a", "1")
            await tx.execute("select pg_notify('a', '2')")
        assert await payloads(subscription, 2) == ["1", "2"]


async def test_a_slow_subscriber_is_told_so_and_the_others_notice_nothing(db: Database) -> None:
    async with db.listen("a", max_buffer=5) as slow, db.listen("a", max_buffer=50) as other:
        await db.execute("select pg_notify('a', i::text) from generate_series(1, 20) i")
        assert await payloads(other, 20) == [str(i) for i in range(1, 21)]
        await until(lambda: slow.error)
        assert await payloads(slow, 5) == ["1", "2", "3", "4", "5"]
        with pytest.raises(psycopg.OperationalError, match="too slow: 5 notifications wait"):
            await anext(slow)
        await db.notify("a", "21")
        assert await payloads(other, 1) == ["21"]


async def test_who_takes_them_out_at_once_gets_any_number(db: Database) -> None:
    """A thousand come in one piece: no reason to call a subscriber slow."""
    async with db.listen("a", max_buffer=2) as subscription, anyio.create_task_group() as tasks:
        tasks.start_soon(
            db.execute, "select pg_notify('a', i::text) from generate_series(1, 1000) i"
        )
        assert await payloads(subscription, 1000) == [str(i) for i in range(1, 1001)]


@pytest.mark.parametrize(
    ("channels", "max_buffer", "error"),
    [
        ((), 1, "at least one channel"),
        (("",), 1, "can't be empty"),
        (("a\0b",), 1, "NUL"),
        (("x" * 64,), 1, "at most 63 bytes"),
        (("ü" * 32,), 1, "at most 63 bytes"),
        ((1,), 1, "a channel is a str, not int"),
        (("a",), 0, "at least 1: 0"),
        (("a",), 1.5, "an int, not float"),
    ],
)
async def test_bad_subscriptions_are_refused_at_once(
    db: Database, channels: Any, max_buffer: Any, error: str
) -> None:
    with pytest.raises((ValueError, TypeError), match=error):
        db.listen(*channels, max_buffer=max_buffer)


@pytest.mark.parametrize(
    ("channel", "payload", "error"),
    [
        ("", "", "can't be empty"),
        ("a", "x" * 8000, "less than 8000 bytes: this one has 8000"),
        ("a", "ü" * 4000, "has 8000"),
        ("a", "\0", "NUL"),
        ("a", b"bytes", "a str, not bytes"),
    ],
)
async def test_bad_notifications_are_refused_before_anything_is_sent(
    db: Database, channel: Any, payload: Any, error: str
) -> None:
    with pytest.raises((ValueError, TypeError), match=error):
        await db.notify(channel, payload)
    await db.notify("a", "x" * 7999)


async def test_wrong_use_is_a_clear_error(db: Database) -> None:
    subscription = db.listen("a")
    with pytest.raises(psycopg.InterfaceError, match="async with"):
        await anext(subscription)
    async with subscription:
        with pytest.raises(RuntimeError, match="entered already"):
            await subscription.__aenter__()
        async with anyio.create_task_group() as tasks:

            async def wait() -> None:
                await anext(subscription)

            tasks.start_soon(wait)
            await until(lambda: subscription._waiter)
            with pytest.raises(RuntimeError, match="another task waits"):
                await anext(subscription)
            await db.notify("a")


async def test_iteration_ends_when_the_database_drains(db: Database) -> None:
    received: list[Notify | Gap] = []

    async def worker(started: anyio.Event) -> None:
        async with db.listen("a") as subscription:
            started.set()
            async for item in subscription:
                received[:] = [*received, item]

    async with anyio.create_task_group() as tasks:
        started = anyio.Event()
        tasks.start_soon(worker, started)
        await started.wait()
        await db.notify("a")
        await until(lambda: received)
        await db.drain(5)
    with pytest.raises(Draining):
        async with db.listen("a"):
            pass


async def test_listening_before_open_and_after_close_is_refused(dsn: str, db: Database) -> None:
    other = Database(dsn, min_size=1)
    with pytest.raises(psycopg_pool.PoolClosed):
        async with other.listen("a"):
            pass
    async with other, other.listen("a") as subscription:
        await other.close()
        assert [item async for item in subscription] == []
    with pytest.raises(psycopg_pool.PoolClosed):
        async with other.listen("a"):
            pass


async def test_a_server_that_cannot_be_reached_is_an_error_for_who_subscribes(
    dsn: str, anyio_backend: object
) -> None:
    async with Database(dsn, min_size=1, listen_conninfo="host=127.0.0.1 port=1") as db:
        with pytest.raises(psycopg.OperationalError, match="port 1 failed"):
            async with db.listen("a"):
                pass


@pytest.mark.parametrize(("loop_name", "how"), sweeps())
async def test_a_subscriber_that_is_cancelled_anywhere_leaves_nothing_and_misses_nothing(
    db: Database, admin: Admin, how: Any
) -> None:
    async def work() -> None:
        async with db.listen("swept") as subscription:
            await db.notify("swept", "1")
            await anext(subscription)
        ended.append(True)

    ended: list[bool] = []
    async with db.listen("other") as other:
        async for trial in CancelSweep(work, how=how):
            hub = db._hub
            assert hub is not None
            try:
                await until(lambda hub=hub: hub._listening == {"other"})  # type: ignore[misc]
                assert hub._subscribers.keys() == {"other"}
                await db.notify("other", str(trial.point))
                assert await payloads(other, 1) == [str(trial.point)]
                # A task that goes on at once may have ended when its cancellation comes.
                assert ended or trial.exception is not None or how == "level"
                ended.clear()
            except BaseException as exc:
                exc.add_note(f"point {trial.point}: {trial.where}: {trial.exception!r}")
                raise


# Losses


class Sender:
    """Sends numbers from a thread of its own, whatever happens to the others' connections."""

    def __init__(self, dsn: str) -> None:
        self._dsn = dsn
        self.sent = 0
        self._conn: Admin | None = None

    def send(self) -> None:
        try:
            if self._conn is None:
                self._conn = psycopg.connect(self._dsn, autocommit=True)
            self._conn.execute("select pg_notify('numbers', %s)", (str(self.sent),))
            self.sent += 1
        except psycopg.OperationalError:
            self.close()  # the server is away: in doubt, but then a gap comes in any case
            self.sent += 1

    def close(self) -> None:
        if self._conn is not None:
            self._conn.close()
            self._conn = None


LOSSES = ("terminate", "restart", "rst", "fin", "freeze")


@pytest.mark.parametrize("loss", LOSSES)
async def test_after_a_loss_there_is_a_gap_wherever_one_is_missing(
    dsn: str,
    server: TemporaryServer,
    loss: str,
    figures: Figures,
    long: bool,
    anyio_backend: object,
) -> None:
    times = 100 if long else 2 if loss in ("restart", "freeze") else 5
    rng = random.Random(loss)
    items: list[int | Gap] = []
    sender = Sender(dsn)

    with FaultProxy(dsn) as proxy:
        through = proxy.dsn if loss in ("rst", "fin", "freeze") else dsn
        named = f"{through} application_name=lost"
        # Only a frozen network is for the heartbeat to find out: on a busy machine a
        # healthy server may be slow.
        answer = 0.2 if loss == "freeze" else 10
        async with (
            Database(named, min_size=1, heartbeat=0.2, heartbeat_timeout=answer) as db,
            db.listen("numbers") as subscription,
            anyio.create_task_group() as tasks,
        ):
            hub = db._hub
            assert hub is not None

            async def receive() -> None:
                while True:
                    item = await anext(subscription)
                    items.append(item if isinstance(item, Gap) else int(item.payload))

            async def send() -> None:
                while True:
                    await anyio.to_thread.run_sync(sender.send)
                    await anyio.sleep(rng.random() * 0.005)

            def lose() -> None:
                if loss == "terminate":
                    with psycopg.connect(dsn, autocommit=True) as admin:
                        admin.execute(
                            "select pg_terminate_backend(pid) from pg_stat_activity"
                            " where application_name = 'lost'"
                        )
                elif loss == "restart":
                    server.restart("immediate")
                elif loss == "freeze":
                    frozen = proxy.freeze()
                    frozen.wait()
                else:
                    proxy.cut(loss)  # type: ignore[arg-type]

            def gaps() -> int:
                return sum(isinstance(item, Gap) for item in items)

            tasks.start_soon(receive)
            tasks.start_soon(send)
            for number in range(times):
                await anyio.sleep(rng.random() * 0.05)
                await anyio.to_thread.run_sync(lose)
                if loss == "freeze":
                    await until(lambda: not hub._listening)
                    proxy.clear()
                await until(lambda: gaps() >= number + 1 and not isinstance(items[-1], Gap), 30)  # noqa: B023
            last = sender.sent
            await until(lambda: last in items or gaps() > times)
            tasks.cancel_scope.cancel()
        sender.close()
    expected = 0
    silent = doubled = 0
    gap = False
    for item in items:
        if isinstance(item, Gap):
            gap = True
            continue
        silent += item > expected and not gap
        doubled += item < expected
        expected, gap = item + 1, False
    assert (silent, doubled) == (0, 0)
    received = sum(not isinstance(item, Gap) for item in items)
    figures(losses=times, sent=sender.sent, received=received, silent_holes=0, doubled=0)


async def test_a_gap_says_since_when_and_comes_once(
    db: Database, admin: Admin, server: TemporaryServer
) -> None:
    before = time.time()
    async with db.listen("a", "b") as subscription, db.listen("a") as other:
        await anyio.to_thread.run_sync(server.restart)
        (gap,) = await take(subscription, 1)
        assert isinstance(gap, Gap)
        assert gap.channels == ("a", "b")
        assert before <= gap.since <= time.time()
        await db.notify("a", "after")
        assert await payloads(subscription, 1) == ["after"]
        (gap, notify) = await take(other, 2)
        assert isinstance(gap, Gap)
        assert notify.payload == "after"


async def test_a_network_that_is_silent_is_found_out_by_the_heartbeat(
    proxy: FaultProxy, anyio_backend: object
) -> None:
    db = Database(proxy.dsn, min_size=1, heartbeat=0.1, heartbeat_timeout=0.1)
    async with db, db.listen("a") as subscription:
        proxy.freeze()
        with anyio.fail_after(5):
            await db.wait_unavailable()
        assert not db.available
        proxy.clear()
        with anyio.fail_after(5):
            await db.wait_available()
        (gap,) = await take(subscription, 1)
        assert isinstance(gap, Gap)


async def test_health_follows_the_server(
    dsn: str, server: TemporaryServer, anyio_backend: object
) -> None:
    db = Database(dsn, min_size=1)
    assert not db.available
    async with db:
        assert db.available
        await db.wait_available()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(anyio.to_thread.run_sync, server.stop)
            with anyio.fail_after(10):
                await db.wait_unavailable()
        server.start()
        with anyio.fail_after(10):
            await db.wait_available()
        await db.execute("select 1")
    await db.wait_unavailable()
    with pytest.raises(psycopg_pool.PoolClosed):
        await db.wait_available()


async def test_through_pgbouncer_in_transaction_mode_listen_fails_with_an_explanation(
    dsn: str, pgbouncer: str, anyio_backend: object
) -> None:
    async with Database(pgbouncer, min_size=1) as db:
        with anyio.fail_after(5), pytest.raises(psycopg.NotSupportedError, match="PgBouncer"):
            async with db.listen("a"):
                pass
    db = Database(pgbouncer, min_size=1, listen_conninfo=dsn)
    async with db, db.listen("a") as subscription:
        await db.notify("a", "past it")
        assert await payloads(subscription, 1) == ["past it"]


# Many


async def test_every_subscriber_gets_exactly_its_own(
    dsn: str, admin: Admin, figures: Figures, long: bool, anyio_backend: object
) -> None:
    subscribers, channels, total = (1000, 100, 100_000) if long else (100, 10, 2_000)
    per_channel = total // channels
    wrong = 0
    before = most = 0.0

    async with Database(dsn, min_size=1) as db, AsyncExitStack() as stack:
        everybody = [
            await stack.enter_async_context(db.listen(f"c{number % channels}"))
            for number in range(subscribers)
        ]
        assert listeners(admin) == 1

        async def receive(subscription: Any) -> None:
            nonlocal wrong
            for number in range(per_channel):
                notify = await anext(subscription)
                wrong += (notify.channel, notify.payload) != (
                    subscription.channels[0],
                    str(number),
                )

        async def send() -> None:
            nonlocal most
            for first in range(0, per_channel, 100):
                await db.execute(
                    "select pg_notify('c' || c, i::text)"
                    " from generate_series(%s::int, %s::int) i, generate_series(0, %s::int) c",
                    (first, min(first + 100, per_channel) - 1, channels - 1),
                )
                most = max(most, resident())

        before = most = resident()
        with anyio.fail_after(300):
            async with anyio.create_task_group() as tasks:
                for subscription in everybody:
                    tasks.start_soon(receive, subscription)
                tasks.start_soon(send)
        assert not any(subscription._items for subscription in everybody)
    assert wrong == 0
    figures(
        subscribers=subscribers,
        notifications=total,
        delivered=per_channel * subscribers,
        memory=f"{most - before:+.1f} MB at most",
    )


async def test_a_hundred_in_one_tls_record_on_a_silent_connection_all_arrive(
    dsn: str,
    admin: Admin,
    tls: ssl.SSLContext,
    monkeypatch: pytest.MonkeyPatch,
    anyio_backend: object,
) -> None:
    """Readable is not a message: what TLS has decrypted already makes no socket readable."""
    records: list[int] = []
    send = ssl.SSLSocket.send

    def recorded(self: ssl.SSLSocket, data: Any, flags: int = 0) -> int:
        records.append(len(data))
        return send(self, data, flags)

    monkeypatch.setattr(ssl.SSLSocket, "send", recorded)
    received: list[str] = []
    with FaultProxy(dsn, tls=tls) as proxy:
        encrypted = make_conninfo(proxy.dsn, sslmode="require")
        async with await AsyncConnection.connect(encrypted, autocommit=True) as conn:
            assert conn.pgconn.ssl_in_use
            conn.add_notify_handler(lambda notify: received.append(notify.payload))
            await conn.execute("listen c")
            for _ in range(5):
                received.clear()
                held = proxy.inject(Freeze(), "A", direction="backend", times=1)
                admin.execute("select pg_notify('c', i::text) from generate_series(1, 100) i")
                held.wait()
                records.clear()
                held.release()
                await until(lambda: len(received) == 100)
                assert max(records) > 100 * len("A....pid.c.0.")
    assert received == [str(i) for i in range(1, 101)]


async def test_watchers_and_cancelled_queries_share_a_connection(
    dsn: str, figures: Figures, long: bool, anyio_backend: object
) -> None:
    seconds = 60 if long else 1
    received: list[int] = []
    sender = Sender(dsn)
    cancelled = 0
    rng = random.Random(3)
    async with await AsyncConnection.connect(dsn, autocommit=True) as conn:
        conn.add_notify_handler(lambda notify: received.append(int(notify.payload)))
        await conn.execute("listen numbers")
        stop = anyio.current_time() + seconds
        async with anyio.create_task_group() as tasks:

            async def send() -> None:
                while anyio.current_time() < stop:
                    await anyio.to_thread.run_sync(sender.send)

            tasks.start_soon(send)
            while anyio.current_time() < stop:
                with anyio.move_on_after(rng.random() * 0.01) as scope:
                    await conn.execute("select pg_sleep(%s)", (rng.random() * 0.01,))
                cancelled += scope.cancelled_caught
        await until(lambda: len(received) >= sender.sent)
        assert not conn.closed
    sender.close()
    assert received == list(range(sender.sent))
    figures(seconds=seconds, notifications=sender.sent, cancelled=cancelled, lost=0, doubled=0)


async def test_connections_that_come_and_go_under_watch_disturb_no_other(
    dsn: str, admin: Admin, figures: Figures, long: bool, anyio_backend: object
) -> None:
    """Descriptors are reused at once: no ENOENT, no closed handle, nobody else's event."""
    cycles = 1000 if long else 50
    lost: list[int] = []
    numbers: set[int] = set()
    for cycle in range(cycles):
        conn = await AsyncConnection.connect(dsn, autocommit=True)
        numbers.add(conn.fileno())
        conn.add_disconnect_handler(lambda error, cycle=cycle: lost.append(cycle))  # type: ignore[misc]
        heard: list[Notify] = []
        conn.add_notify_handler(heard.append)
        await conn.execute("listen c")
        await conn.execute("notify c")
        assert len(heard) == 1
        if cycle % 2:
            admin.execute("select pg_terminate_backend(%s)", (conn.info.backend_pid,))
            await until(lambda cycle=cycle: cycle in lost)  # type: ignore[misc]
        await conn.close()
    assert lost == list(range(1, cycles, 2))
    assert len(numbers) < 20
    figures(reconnects=cycles, descriptors_used=len(numbers))
