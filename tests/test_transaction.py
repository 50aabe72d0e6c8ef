"""P2: what a transaction block says is true; savepoints, callbacks, bad use."""

from __future__ import annotations

import logging
from typing import Any

import anyio
import anyio.lowlevel
import psycopg
import pytest
from psycopg.pq import TransactionStatus

from aiopgsafe import (
    AsyncConnection,
    CommitRolledBack,
    CommitUnknown,
    IsolationLevel,
    Rollback,
    TransactionState,
    resolve_commit,
    safe_to_retry,
)
from aiopgsafe.testing import Cut, Delay, FaultProxy, command_complete, query

pytestmark = pytest.mark.anyio

Conn = AsyncConnection[Any]
S = TransactionState


async def one(conn: psycopg.AsyncConnection[Any], sql: str) -> Any:
    row = await (await conn.execute(sql)).fetchone()
    assert row is not None
    return row[0]


@pytest.fixture(autouse=True)
async def table(conn: Conn) -> None:
    await conn.set_autocommit(True)
    await conn.execute("create table t (id int primary key)")


async def test_the_state_follows_the_block(conn: Conn, proxy: FaultProxy) -> None:
    tx = conn.transaction()
    assert tx.state is S.PENDING
    async with tx as entered:
        assert entered is tx
        assert tx.state is S.ACTIVE
        assert tx.connection is conn
        await tx.execute("insert into t values (1)")
    assert tx.state is S.COMMITTED
    assert await one(conn, "select count(*) from t") == 1


async def test_a_block_that_raises_is_rolled_back_and_the_exception_goes_through(
    conn: Conn,
) -> None:
    with pytest.raises(LookupError):
        async with conn.transaction() as tx:
            await tx.execute("insert into t values (1)")
            raise LookupError
    assert tx.state is S.ROLLED_BACK
    assert await one(conn, "select count(*) from t") == 0


async def test_a_commit_that_the_server_answers_with_rollback_raises(conn: Conn) -> None:
    called: list[str] = []
    with pytest.raises(CommitRolledBack) as info:
        async with conn.transaction() as tx:
            tx.on_commit(called.append, "commit")
            tx.on_rollback(called.append, "rollback")
            await tx.execute("insert into t values (1)")
            with pytest.raises(psycopg.errors.DivisionByZero):
                await tx.execute("select 1/0")
    assert tx.state is S.ROLLED_BACK
    assert called == ["rollback"]
    assert info.value.sqlstate == "40000"
    assert isinstance(info.value, psycopg.errors.TransactionRollback)
    assert conn.info.transaction_status == TransactionStatus.IDLE


async def test_commit_of_a_failed_implicit_transaction_raises_too(conn: Conn) -> None:
    await conn.set_autocommit(False)
    with pytest.raises(psycopg.errors.DivisionByZero):
        await conn.execute("select 1/0")
    with pytest.raises(CommitRolledBack):
        await conn.commit()
    assert conn.info.transaction_status == TransactionStatus.IDLE


async def test_an_error_in_answer_to_commit_is_known_to_have_rolled_back(conn: Conn) -> None:
    await conn.execute("create table d (id int primary key deferrable initially deferred)")
    called: list[str] = []
    with pytest.raises(psycopg.errors.UniqueViolation):
        async with conn.transaction() as tx:
            tx.on_commit(called.append, "commit")
            tx.on_rollback(called.append, "rollback")
            await tx.execute("insert into d values (1), (1)")
    assert tx.state is S.ROLLED_BACK
    assert called == ["rollback"]
    assert conn.info.transaction_status == TransactionStatus.IDLE


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("how", ["rst", "fin"])
async def test_a_connection_lost_in_commit_whose_server_cannot_be_asked_leaves_it_unknown(
    conn: Conn, proxy: FaultProxy, when: Any, how: Any
) -> None:
    called: list[str] = []
    if when == "before":
        proxy.inject(Cut(how), query("COMMIT"))
    else:
        proxy.inject(Cut(how), command_complete("COMMIT"))
    other = await AsyncConnection.connect(proxy.dsn, commit_timeout=0.3, cancel_timeout=0.1)
    proxy.refuse = True
    with pytest.raises(CommitUnknown, match="can't be asked") as info:
        async with other.transaction() as tx:
            tx.on_commit(called.append, "commit")
            tx.on_rollback(called.append, "rollback")
            await tx.execute("insert into t values (1)")
    assert tx.state is S.UNKNOWN
    assert called == []
    assert other.closed
    assert other.broken
    assert isinstance(info.value.__cause__, psycopg.OperationalError)
    assert info.value.sqlstate == "08007"
    assert info.value.xid == tx.xid
    assert tx.xid is not None
    # What was not known then can be asked for later.
    state = await resolve_commit(tx.ticket(), conn.info.dsn)
    assert state is (S.ROLLED_BACK if when == "before" else S.COMMITTED)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("how", ["rst", "fin"])
async def test_a_connection_lost_in_commit_is_asked_for_over_another_one(
    conn: Conn, proxy: FaultProxy, when: Any, how: Any
) -> None:
    """Cut before the server has COMMIT it is rolled back, cut after it is committed."""
    called: list[str] = []
    error: Exception | None = None
    proxy.inject(Cut(how), query("COMMIT") if when == "before" else command_complete("COMMIT"))
    other = await AsyncConnection.connect(proxy.dsn)
    try:
        async with other.transaction() as tx:
            tx.on_commit(called.append, "commit")
            tx.on_rollback(called.append, "rollback")
            await tx.execute("insert into t values (1)")
    except psycopg.OperationalError as exc:
        error = exc
    assert other.closed
    rows = await one(conn, "select count(*) from t")
    if when == "before":
        assert (tx.state, called, rows) == (S.ROLLED_BACK, ["rollback"], 0)
        assert error is not None
        assert safe_to_retry(error)
        assert "the server was asked: the transaction is rolled back" in error.__notes__[0]
    else:
        assert (tx.state, called, rows, error) == (S.COMMITTED, ["commit"], 1, None)


async def test_a_session_terminated_inside_its_commit_is_asked_for(conn: Conn, dsn: str) -> None:
    """FATAL in answer to COMMIT may come before or after the commit record was written."""
    other = await AsyncConnection.connect(dsn, autocommit=True)
    with pytest.raises(psycopg.errors.AdminShutdown) as info:
        async with other.transaction() as tx:
            await tx.execute(
                "create function pg_temp.die() returns trigger language plpgsql as 'begin"
                f" perform pg_terminate_backend({other.info.backend_pid}); return null; end'"
            )
            await tx.execute(
                "create constraint trigger die after insert on t deferrable initially deferred"
                " for each row execute function pg_temp.die()"
            )
            await tx.execute("insert into t values (1)")
    assert safe_to_retry(info.value)
    assert tx.state is S.ROLLED_BACK
    assert other.closed


async def test_a_block_whose_connection_was_lost_does_not_end_as_if_nothing_was(
    conn: Conn, dsn: str
) -> None:
    other = await AsyncConnection.connect(dsn)
    with pytest.raises(psycopg.OperationalError):
        async with other.transaction() as tx:
            await tx.execute("insert into t values (1)")
            await conn.execute("select pg_terminate_backend(%s)", (other.info.backend_pid,))
            with pytest.raises(psycopg.OperationalError):
                await tx.execute("select 1")
    assert tx.state is S.ROLLED_BACK
    assert await one(conn, "select count(*) from t") == 0


@pytest.mark.parametrize("command", ["COMMIT", "ROLLBACK"])
async def test_a_block_that_was_ended_by_a_statement_inside_does_not_guess(
    conn: Conn, command: str
) -> None:
    with pytest.raises(CommitUnknown):
        async with conn.transaction() as tx:
            await tx.execute("insert into t values (1)")
            await conn.execute(command.encode())
    assert tx.state is S.UNKNOWN


# Savepoints


async def test_savepoints_share_the_fate_of_what_is_around_them(conn: Conn) -> None:
    async with conn.transaction() as tx:
        async with conn.transaction() as kept:
            await kept.execute("insert into t values (1)")
        assert kept.state is S.ACTIVE
        with pytest.raises(psycopg.errors.UniqueViolation):
            async with conn.transaction() as undone:
                await undone.execute("insert into t values (1)")
        assert undone.state is S.ROLLED_BACK
        assert tx.state is S.ACTIVE
    assert kept.state is tx.state is S.COMMITTED
    assert undone.state is S.ROLLED_BACK
    assert await one(conn, "select count(*) from t") == 1


async def test_a_savepoint_released_inside_one_that_is_rolled_back_is_rolled_back(
    conn: Conn,
) -> None:
    called: list[str] = []
    async with conn.transaction() as tx:
        tx.on_commit(called.append, "outer")
        async with conn.transaction() as middle:
            async with conn.transaction() as inner:
                inner.on_commit(called.append, "inner")
                inner.on_rollback(called.append, "inner undone")
                await inner.execute("insert into t values (1)")
            raise Rollback(middle)
        assert called == ["inner undone"]
        assert inner.state is middle.state is S.ROLLED_BACK
    assert called == ["inner undone", "outer"]
    assert await one(conn, "select count(*) from t") == 0


async def test_an_inner_block_that_failed_silently_is_rolled_back_and_the_outer_goes_on(
    conn: Conn,
) -> None:
    async with conn.transaction() as tx:
        await tx.execute("insert into t values (1)")
        with pytest.raises(psycopg.errors.InFailedSqlTransaction):
            async with conn.transaction() as inner:
                await inner.execute("insert into t values (2)")
                with pytest.raises(psycopg.errors.DivisionByZero):
                    await inner.execute("select 1/0")
        assert inner.state is S.ROLLED_BACK
        await tx.execute("insert into t values (3)")
    assert await one(conn, "select array_agg(id order by id) from t") == [1, 3]


async def test_a_cancelled_inner_block_leaves_the_outer_one_usable(conn: Conn) -> None:
    async with conn.transaction() as tx:
        await tx.execute("insert into t values (1)")
        with anyio.move_on_after(0.05) as scope:
            async with conn.transaction() as inner:
                await inner.execute("insert into t values (2)")
                await inner.execute("select pg_sleep(30)")
        assert scope.cancelled_caught
        assert inner.state is S.ROLLED_BACK
        await tx.execute("insert into t values (3)")
    assert await one(conn, "select array_agg(id order by id) from t") == [1, 3]


async def test_savepoints_of_an_implicit_transaction_are_settled_by_commit(conn: Conn) -> None:
    await conn.set_autocommit(False)
    called: list[str] = []
    for end in (conn.commit, conn.rollback):
        await conn.execute("select 1")
        async with conn.transaction() as tx:
            assert tx.savepoint_name
            tx.on_commit(called.append, "commit")
            tx.on_rollback(called.append, "rollback")
        assert tx.state is S.ACTIVE
        assert called == []
        await end()
        assert called == (["commit"] if end == conn.commit else ["rollback"])
        called.clear()
        assert tx.state is (S.COMMITTED if end == conn.commit else S.ROLLED_BACK)


async def test_closing_a_connection_rolls_back_what_was_open(dsn: str, anyio_backend: Any) -> None:
    called: list[str] = []
    other = await AsyncConnection.connect(dsn)
    await other.execute("select 1")
    async with other.transaction() as tx:
        tx.on_rollback(called.append, "rollback")
    await other.close()
    assert tx.state is S.ROLLED_BACK
    assert called == ["rollback"]


# Options of BEGIN


async def test_isolation_level_read_only_and_deferrable_are_in_begin(
    conn: Conn, dsn: str, proxy: FaultProxy
) -> None:
    other = await AsyncConnection.connect(proxy.dsn, autocommit=True)
    async with other.transaction():  # the first one asks for the server's history
        await one(other, "select 1")
    proxy.reset_stats()
    async with other.transaction(
        isolation_level=IsolationLevel.SERIALIZABLE, read_only=True, deferrable=True
    ):
        assert await one(other, "show transaction_isolation") == "serializable"
        assert await one(other, "show transaction_read_only") == "on"
        assert await one(other, "show transaction_deferrable") == "on"
    assert proxy.stats.round_trips == 4  # BEGIN is in the first one
    async with other.transaction():
        assert await one(other, "show transaction_isolation") == "read committed"
    await other.set_isolation_level(IsolationLevel.REPEATABLE_READ)
    async with other.transaction(read_only=True):
        assert await one(other, "show transaction_isolation") == "repeatable read"
    await other.close()


async def test_options_of_begin_are_refused_for_a_savepoint(conn: Conn) -> None:
    async with conn.transaction() as tx:
        with pytest.raises(psycopg.ProgrammingError, match="outermost"):
            async with conn.transaction(read_only=True):
                pass
        await tx.execute("insert into t values (1)")
    with pytest.raises(ValueError, match="99"):
        conn.transaction(isolation_level=99)


# Callbacks


async def test_callbacks_run_once_in_order_whatever_kind_they_are(conn: Conn) -> None:
    called: list[int] = []

    async def later(n: int, *, factor: int = 1) -> None:
        await anyio.lowlevel.checkpoint()
        called.append(n * factor)

    async with conn.transaction() as tx:
        tx.on_commit(called.append, 1)
        tx.on_commit(later, 2)
        async with conn.transaction() as inner:
            inner.on_commit(called.append, 3)
            tx.on_commit(later, 2, factor=2)
            inner.on_commit(lambda: later(5))
        tx.on_commit(called.append, 6)
    assert called == [1, 2, 3, 4, 5, 6]


async def test_callbacks_may_use_the_connection(conn: Conn) -> None:
    async def note() -> None:
        async with conn.transaction() as tx:
            await tx.execute("insert into t values (2)")

    async with conn.transaction() as tx:
        tx.on_commit(note)
        await tx.execute("insert into t values (1)")
    assert await one(conn, "select count(*) from t") == 2


async def test_callbacks_that_raise_do_not_stop_the_others_and_come_out_together(
    conn: Conn,
) -> None:
    called: list[str] = []

    async def fail() -> None:
        raise LookupError("async")

    def fail_too() -> None:
        raise ValueError("sync")

    with pytest.raises(ExceptionGroup, match="the transaction is committed") as info:
        async with conn.transaction() as tx:
            tx.on_commit(fail)
            tx.on_commit(called.append, "one")
            tx.on_commit(fail_too)
            tx.on_commit(called.append, "two")
            await tx.execute("insert into t values (1)")
    assert called == ["one", "two"]
    assert [str(exc) for exc in info.value.exceptions] == ["async", "sync"]
    assert tx.state is S.COMMITTED
    assert await one(conn, "select count(*) from t") == 1


async def test_errors_of_rollback_callbacks_are_noted_on_what_goes_through(
    conn: Conn, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise ValueError("callback")

    with caplog.at_level(logging.ERROR, "aiopgsafe"), pytest.raises(LookupError) as info:
        async with conn.transaction() as tx:
            tx.on_rollback(fail)
            raise LookupError
    assert "ValueError('callback')" in info.value.__notes__[0]
    assert "callbacks failed" in caplog.text

    with pytest.raises(ExceptionGroup, match="rolled back"):
        async with conn.transaction() as tx:
            tx.on_rollback(fail)
            raise Rollback


async def test_an_async_callback_is_shielded_from_the_cancellation(conn: Conn) -> None:
    called: list[str] = []

    async def slow() -> None:
        cancel.cancel()
        await anyio.sleep(0.05)
        called.append("slow")

    async def with_timeout() -> None:
        with anyio.move_on_after(0.01):
            await anyio.sleep_forever()
        called.append("own timeout works")

    with anyio.CancelScope() as cancel:
        async with conn.transaction() as tx:
            tx.on_commit(slow)
            tx.on_commit(with_timeout)
    assert called == ["slow", "own timeout works"]
    assert tx.state is S.COMMITTED


async def test_an_async_callback_that_hangs_is_cancelled_after_commit_timeout(
    dsn: str, anyio_backend: Any
) -> None:
    async with await AsyncConnection.connect(dsn, autocommit=True, commit_timeout=0.1) as other:
        ended: list[str] = []

        async def hang() -> None:
            try:
                await anyio.sleep_forever()
            finally:
                ended.append("hang")

        with pytest.raises(ExceptionGroup) as info:
            async with other.transaction() as tx:
                tx.on_commit(hang)
                tx.on_commit(ended.append, "next")
        assert isinstance(info.value.exceptions[0], TimeoutError)
        assert ended == ["hang", "next"]
        assert tx.state is S.COMMITTED


@pytest.mark.parametrize("method", ["on_commit", "on_rollback"])
async def test_callbacks_are_refused_where_they_would_never_run(conn: Conn, method: str) -> None:
    tx = conn.transaction()
    with pytest.raises(psycopg.ProgrammingError, match="inside the block"):
        getattr(tx, method)(print)
    async with tx:
        with pytest.raises(TypeError, match="function"):
            getattr(tx, method)("not callable")
        async with conn.transaction() as inner:
            pass
        with pytest.raises(psycopg.ProgrammingError, match="inside the block"):
            getattr(inner, method)(print)
    with pytest.raises(psycopg.ProgrammingError, match="inside the block"):
        getattr(tx, method)(print)


async def test_statements_are_refused_outside_the_block(conn: Conn) -> None:
    tx = conn.transaction()
    for _ in range(2):
        with pytest.raises(psycopg.ProgrammingError, match="inside the block"):
            await tx.execute("select 1")
        with pytest.raises(psycopg.ProgrammingError, match="inside the block"):
            tx.cursor()
        if tx.state is S.PENDING:
            async with tx:
                assert await (await tx.cursor().execute("select 1")).fetchone() == (1,)
    with pytest.raises(TypeError, match="only once"):
        async with tx:
            pass


async def test_a_cancelled_commit_by_hand_ends_as_statements_do_with_a_note(
    conn: Conn, proxy: FaultProxy
) -> None:
    """`execute("COMMIT")` is not cancelled on the server: the answer could be a lie."""
    proxy.inject(Delay(0.1), command_complete("COMMIT"))
    async with await AsyncConnection.connect(proxy.dsn, autocommit=True) as other:
        await other.execute("begin")
        await other.execute("insert into t values (1)")
        with anyio.move_on_after(0.02) as scope:
            try:
                await other.execute("  -- end it\n commit")
            except BaseException as exc:
                assert "the server said: COMMIT" in exc.__notes__[0]
                raise
        assert scope.cancelled_caught
        assert proxy.stats.cancel_requests == 0
        assert other.info.transaction_status == TransactionStatus.IDLE
    assert await one(conn, "select count(*) from t") == 1
