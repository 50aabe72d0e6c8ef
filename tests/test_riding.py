"""What rides on what: round trips, counted in the proxy; and ROLLBACK TO, which waits if it can."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import anyio
import psycopg
import pytest
from psycopg import sql
from psycopg.pq import TransactionStatus

from aiopgsafe import AsyncConnection
from aiopgsafe.testing import FaultProxy
from tests.dropin import Scene, compared

pytestmark = pytest.mark.anyio

Conn = AsyncConnection[Any]
INSERT = "insert into t values (%s)"


@pytest.fixture
async def conn(proxy: FaultProxy, anyio_backend: object) -> AsyncIterator[Conn]:
    conn = await AsyncConnection.connect(proxy.dsn, autocommit=True, prepare_threshold=None)
    await conn.execute("create table t (i int primary key)")
    async with conn.transaction():  # the connection's first one may ask for the history
        await conn.execute("select 1")
    yield conn
    await conn.close()


# Each shape: what it sends, and in how many round trips


async def one_insert(conn: Conn) -> None:
    async with conn.transaction():
        await conn.execute(INSERT, (1,))


async def composed(conn: Conn) -> None:
    async with conn.transaction():
        await conn.execute(sql.SQL("insert into {} values (%s)").format(sql.Identifier("t")), (1,))


async def nested(conn: Conn) -> None:
    async with conn.transaction():
        await conn.execute(INSERT, (1,))
        async with conn.transaction():
            await conn.execute(INSERT, (2,))


async def released_before_another(conn: Conn) -> None:
    async with conn.transaction():
        async with conn.transaction():
            await conn.execute(INSERT, (1,))
        await conn.execute(INSERT, (2,))


async def empty(conn: Conn) -> None:
    async with conn.transaction(), conn.transaction():
        pass


async def implicit(conn: Conn) -> None:
    await conn.set_autocommit(False)
    await conn.execute(INSERT, (1,))
    await conn.commit()


async def failed_savepoint(conn: Conn) -> None:
    async with conn.transaction():
        await conn.execute(INSERT, (1,))
        try:
            async with conn.transaction():
                await conn.execute(INSERT, (1,))
        except psycopg.errors.UniqueViolation:
            await conn.execute(INSERT, (2,))


async def failed_last(conn: Conn) -> None:
    async with conn.transaction():
        await conn.execute(INSERT, (1,))
        try:
            async with conn.transaction():
                await conn.execute(INSERT, (1,))
        except psycopg.errors.UniqueViolation:
            pass


async def undone_by_the_program(conn: Conn) -> None:
    async with conn.transaction():
        async with conn.transaction():
            await conn.execute(INSERT, (1,))
            raise psycopg.Rollback
        await conn.execute(INSERT, (2,))


SHAPES: list[tuple[Callable[[Conn], Awaitable[None]], int, list[int]]] = [
    (one_insert, 2, [1]),
    (composed, 2, [1]),
    (nested, 3, [1, 2]),
    (released_before_another, 3, [1, 2]),
    (empty, 0, []),
    (implicit, 2, [1]),
    (failed_savepoint, 4, [1, 2]),  # ROLLBACK TO rides on the third
    (failed_last, 4, [1]),  # ROLLBACK TO has one of its own
    (undone_by_the_program, 4, [2]),  # and so it has where it frees locks
]


@pytest.mark.parametrize(("shape", "trips", "rows"), SHAPES, ids=[s[0].__name__ for s in SHAPES])
async def test_round_trips(
    conn: Conn,
    proxy: FaultProxy,
    admin: psycopg.Connection[Any],
    shape: Callable[[Conn], Awaitable[None]],
    trips: int,
    rows: list[int],
) -> None:
    proxy.reset_stats()
    await shape(conn)
    assert proxy.stats.round_trips == trips
    assert [i for (i,) in admin.execute("select i from t order by i")] == rows


# ROLLBACK TO


async def test_a_savepoint_that_was_left_by_an_exception_holds_no_lock(
    conn: Conn, admin: psycopg.Connection[Any]
) -> None:
    """Whoever waits for the row would wait for the block's next statement: perhaps for ever."""
    admin.execute("insert into t values (1)")
    admin.execute("set lock_timeout to '1s'")
    async with conn.transaction():
        with pytest.raises(KeyError):
            async with conn.transaction():
                await conn.execute("delete from t")
                raise KeyError
        await anyio.to_thread.run_sync(admin.execute, "update t set i = 2")
        # The same where a statement has failed in a block inside of it.
        with pytest.raises(psycopg.errors.DivisionByZero):
            async with conn.transaction():
                await conn.execute("delete from t")
                async with conn.transaction():
                    await conn.execute("select 1/0")
        await anyio.to_thread.run_sync(admin.execute, "update t set i = 3")
        # And where ROLLBACK TO waits: the server has freed them by itself.
        with pytest.raises(psycopg.errors.DivisionByZero):
            async with conn.transaction():
                await conn.execute("delete from t")
                await conn.execute("select 1/0")
        await anyio.to_thread.run_sync(admin.execute, "update t set i = 4")
        cur = await conn.execute("select i from t")
        assert await cur.fetchall() == [(4,)]


async def test_a_cancelled_savepoint_is_undone_at_once(
    conn: Conn, proxy: FaultProxy, admin: psycopg.Connection[Any]
) -> None:
    async with conn.transaction():
        await conn.execute(INSERT, (1,))
        with anyio.CancelScope() as scope:
            async with conn.transaction():
                await conn.execute(INSERT, (2,))
                scope.cancel()
                await conn.execute("select pg_sleep(10)")
        assert conn.pgconn.transaction_status == TransactionStatus.INTRANS
        await conn.execute(INSERT, (3,))
    assert [i for (i,) in admin.execute("select i from t order by i")] == [1, 3]


async def fails(s: Scene, name: str | None = None) -> None:
    with s.fails():
        async with s.conn.transaction(name):
            await s.conn.execute("insert into t values (1)")
            await s.conn.execute("insert into t values (1)")
    s.note(s.conn.info.transaction_status)


async def next_statement(s: Scene) -> None:
    await s.conn.execute("insert into t values (10)")


async def next_copy(s: Scene) -> None:
    async with s.conn.cursor().copy("copy t from stdin") as copy:
        await copy.write_row((10,))


async def next_commands(s: Scene) -> None:
    await s.conn.execute("insert into t values (10); insert into t values (11)")


async def next_pipeline(s: Scene) -> None:
    async with s.conn.pipeline():
        await s.conn.execute("insert into t values (10)")
        await s.conn.execute("insert into t values (11)")


async def next_many(s: Scene) -> None:
    await s.conn.cursor().executemany("insert into t values (%s)", [(10,), (11,)])


async def next_server_cursor(s: Scene) -> None:
    async with s.conn.cursor("c") as cur:
        await cur.execute("select * from t")
        s.note(await cur.fetchall())


async def next_savepoint(s: Scene) -> None:
    async with s.conn.transaction():
        await s.conn.execute("insert into t values (10)")


async def next_failure(s: Scene) -> None:
    await fails(s)
    await s.conn.execute("insert into t values (10)")


async def next_same_name(s: Scene) -> None:
    await fails(s, "sp")
    await fails(s, "sp")
    async with s.conn.transaction("sp"):
        await s.conn.execute("insert into t values (10)")


async def next_rollback(s: Scene) -> None:
    async with s.conn.transaction():
        await s.conn.execute("insert into t values (10)")
        await fails(s)
        raise psycopg.Rollback


async def next_outer_of_the_same_name(s: Scene) -> None:
    async with s.conn.transaction("sp"):
        await s.conn.execute("insert into t values (10)")
        await fails(s, "sp")
        raise psycopg.Rollback


async def next_by_hand(s: Scene) -> None:
    await s.conn.execute("savepoint mine")
    await s.conn.execute("insert into t values (10)")
    await fails(s)
    await s.conn.execute("rollback to mine")


async def next_nothing(s: Scene) -> None:
    pass


NEXT = [
    *(next_statement, next_copy, next_commands, next_pipeline, next_many, next_server_cursor),
    *(next_savepoint, next_failure, next_same_name, next_rollback, next_outer_of_the_same_name),
    *(next_by_hand, next_nothing),
]


@compared
async def test_whatever_comes_behind_a_savepoint_that_failed(s: Scene) -> None:
    await s.conn.set_autocommit(True)
    await s.conn.execute("create table t (i int primary key)")
    for what in NEXT:
        s.note(what.__name__)
        await s.conn.execute("delete from t")
        async with s.conn.transaction():
            await s.conn.execute("insert into t values (0)")
            await fails(s)
            await what(s)
            s.note(s.conn.info.transaction_status)
        s.note(await s.elsewhere("select i from t order by i"))


@compared
async def test_whatever_comes_behind_a_savepoint_that_failed_where_no_block_began(
    s: Scene,
) -> None:
    await s.conn.execute("create table t (i int primary key)")
    await s.conn.commit()
    for what in NEXT:
        for ending in (s.conn.rollback, s.conn.commit):
            s.note(what.__name__, ending.__name__)
            await s.conn.execute("delete from t")
            await fails(s)
            await what(s)
            await ending()
            s.status()
            s.note(await s.elsewhere("select i from t order by i"))


@compared
async def test_prepared_statements_after_a_savepoint_that_failed(s: Scene) -> None:
    await s.conn.set_autocommit(True)
    await s.conn.execute("create table t (i int primary key)")
    for _ in range(3):
        async with s.conn.transaction():
            with s.fails():
                async with s.conn.transaction():
                    await s.conn.execute("create table u (i int)")
                    await s.conn.execute("insert into u values (%s)", (1,), prepare=True)
                    await s.conn.execute("select 1/0")
            for i in range(3):
                await s.conn.execute("insert into t values (%s)", (i,), prepare=True)
            cur = await s.conn.execute(
                "select count(*) from pg_prepared_statements where statement ~ ' into '"
            )
            s.note(await cur.fetchall())
            await s.conn.execute("delete from t")
