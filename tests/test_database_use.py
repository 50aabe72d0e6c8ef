"""What somebody does with a `Database` on the first day, and what it answers."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
from collections.abc import AsyncIterator
from typing import Any, assert_type

import anyio
import anyio.lowlevel
import psycopg
import pytest
from psycopg.rows import DictRow, TupleRow, dict_row

from aiopgsafe import (
    AsyncConnection,
    AsyncConnectionPool,
    Database,
    IsolationLevel,
    Retry,
    Transaction,
    TransactionState,
)
from aiopgsafe._signals import ends_the_program
from aiopgsafe.testing import TemporaryServer
from tests.test_cancel_on_signal import program_handler

pytestmark = pytest.mark.anyio


@pytest.fixture
async def db(dsn: str, anyio_backend: object) -> AsyncIterator[Database]:
    async with Database(dsn, min_size=1, max_size=3, timeout=5) as db:
        yield db


async def test_it_may_be_closed_and_opened_again(dsn: str, anyio_backend: object) -> None:
    db = Database(dsn, min_size=1)
    for _ in range(2):
        async with db, db.listen("a") as subscription:
            await db.notify("a", "1")
            item = await anext(aiter(subscription))
            assert isinstance(item, psycopg.Notify)
            assert item.payload == "1"
    await db.open()
    await db.drain()
    assert db.draining
    async with db:
        assert not db.draining
        await db.execute("select 1")


def test_it_may_be_opened_in_one_event_loop_after_another(dsn: str) -> None:
    db = Database(dsn, min_size=1)

    async def once() -> None:
        async with db:
            await db.execute("select 1")

    asyncio.run(once())
    anyio.run(once, backend="trio")


async def test_rows_have_the_type_of_the_row_factory(dsn: str, anyio_backend: object) -> None:
    async with Database(dsn, min_size=1, row_factory=dict_row) as db:
        assert_type(db, Database[DictRow])
        row = await (await db.execute("select 1 as a")).fetchone()
        assert_type(row, DictRow | None)
        assert row == {"a": 1}
        async with db.transaction() as tx:
            assert_type(tx, Transaction[DictRow])
            assert await (await tx.execute("select 2 as b")).fetchall() == [{"b": 2}]
        async with db.connection() as conn:
            assert_type(conn, AsyncConnection[DictRow])
    async with Database(dsn, min_size=1) as plain:
        assert_type(plain, Database[TupleRow])
        first = await (await plain.execute("select 1")).fetchone()
        assert_type(first, TupleRow | None)
        assert first == (1,)
    async with AsyncConnectionPool(dsn, min_size=1, open=False) as pool:
        assert_type(pool, AsyncConnectionPool[AsyncConnection[TupleRow]])


async def test_on_commit_and_on_rollback_belong_to_the_tasks_own_transaction(db: Database) -> None:
    called: list[str] = []
    async with db.transaction():
        db.on_commit(called.append, "committed")
        db.on_rollback(called.append, "not that")
        with pytest.raises(LookupError):
            async with db.transaction():
                db.on_rollback(called.append, "savepoint rolled back")
                db.on_commit(called.append, "never")
                raise LookupError
    assert called == ["savepoint rolled back", "committed"]
    for register in (db.on_commit, db.on_rollback):
        with pytest.raises(psycopg.ProgrammingError, match="inside a transaction"):
            register(print)


async def test_a_block_that_was_not_entered_says_where_the_transaction_is(db: Database) -> None:
    block: Any = db.transaction()
    with pytest.raises(AttributeError, match="async with"):
        await block.execute("select 1")
    assert block.state is TransactionState.PENDING


async def test_the_options_of_the_outer_block_are_fine_for_an_inner_one(db: Database) -> None:
    options: Any = {"isolation_level": IsolationLevel.SERIALIZABLE, "read_only": True}
    async with db.transaction(**options) as tx:
        async with db.transaction(**options), db.transaction(**options):
            pass
        with pytest.raises(psycopg.ProgrammingError):
            async with db.transaction(isolation_level=IsolationLevel.REPEATABLE_READ):
                pass
        assert await (await tx.execute("show transaction_isolation")).fetchone() == (
            "serializable",
        )


@pytest.mark.parametrize(
    ("kwargs", "error", "text"),
    [
        ({"min_size": True}, TypeError, "min_size is an int"),
        ({"max_size": 2.5}, TypeError, "max_size is an int"),
        ({"max_waiting": -1}, ValueError, "max_waiting"),
        ({"num_workers": 0}, ValueError, "num_workers"),
        ({"timeout": -1}, ValueError, "timeout must be a number of seconds"),
        ({"timeout": "1"}, TypeError, "timeout is a number of seconds"),
        ({"heartbeat": 0}, ValueError, "heartbeat"),
        ({"connection_class": psycopg.AsyncConnection}, TypeError, "aiopgsafe.AsyncConnection"),
    ],
)
async def test_a_bad_parameter_is_an_error_at_once(
    dsn: str, kwargs: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        Database(dsn, **kwargs)


async def test_bad_options_of_a_transaction_are_an_error_before_it_begins(db: Database) -> None:
    with pytest.raises(ValueError, match=r"one of .*IsolationLevel\.SERIALIZABLE"):
        db.transaction(isolation_level=42)
    with pytest.raises(ValueError, match="isolation_level"):
        db.atomic(isolation_level=42)
    with pytest.raises(TypeError, match="idempotent"):
        Retry(idempotent="yes")  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["notify", "notice", "disconnect"])
async def test_a_handler_that_nobody_could_call_is_refused(db: Database, kind: str) -> None:
    async def handler(_: object) -> None: ...

    async with db.connection() as conn:
        add = getattr(conn, f"add_{kind}_handler")
        with pytest.raises(TypeError, match="plain function"):
            add(handler)
        with pytest.raises(TypeError, match="not int"):
            add(1)


def throw_away(what: list[Any]) -> None:
    what.clear()
    gc.collect()


def test_a_pool_that_is_left_open_behind_its_event_loop_warns(dsn: str) -> None:
    async def leave() -> AsyncConnectionPool:
        pool = AsyncConnectionPool(dsn, min_size=0, max_size=1, open=False)
        await pool.open()
        return pool

    left = [asyncio.run(leave())]
    with pytest.warns(ResourceWarning, match="deleted while still open"):
        throw_away(left)


async def test_what_a_pool_waited_for_is_in_its_timeout(anyio_backend: object) -> None:
    db = Database("host=127.0.0.1 port=1", min_size=1, timeout=0.2)
    await db.open(wait=False)
    try:
        with pytest.raises(psycopg.OperationalError, match="refused"):
            await db.execute("select 1")
    finally:
        await db.close()


async def test_one_lost_connection_is_one_line_in_the_log(
    dsn: str, server: TemporaryServer, anyio_backend: object, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "aiopgsafe")
    async with Database(dsn, min_size=1) as db:
        async with db.connection() as conn:
            pid = conn.info.backend_pid
        with psycopg.connect(dsn, autocommit=True) as admin:
            admin.execute("select pg_terminate_backend(%s)", (pid,))
        with anyio.fail_after(5):
            while not any("lost" in record.getMessage() for record in caplog.records):
                await anyio.lowlevel.checkpoint()
        await db.execute("select 1")
    lines = [record.getMessage() for record in caplog.records]
    assert sum("discards a lost connection" in line for line in lines) == 1, lines
    assert not any("\n" in line for line in lines), lines
    assert not any(record.levelno >= logging.WARNING for record in caplog.records), lines


async def test_who_is_interrupted_between_two_attempts_is_told_of_the_last_error(
    db: Database,
) -> None:
    retry = Retry(backoff=60)

    @db.atomic(retry=retry)
    async def fails() -> None:
        await db.execute("do $$ begin raise 'try again' using errcode = '40001'; end $$")

    async def client() -> None:
        while not retry.retries:
            await anyio.lowlevel.checkpoint()
        scope.cancel()

    told: list[str] = []
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(client)
        with anyio.CancelScope() as scope:
            try:
                await fails()
            except BaseException as exc:
                told += exc.__notes__
                raise
    assert len(told) == 1
    assert "try again" in told[0]


# A signal drains a program that has no handler for it


async def serve(db: Database, signum: int, body: Any) -> None:
    with db.drain_on_signal(signum, grace=5):
        await body()
        raise AssertionError("the block was not left")


@pytest.fixture
def no_handler() -> Any:
    before = signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    yield signal.SIGUSR1
    signal.signal(signal.SIGUSR1, before)


async def test_without_a_handler_the_block_is_left_when_all_is_closed(
    db: Database, no_handler: int
) -> None:
    async def body() -> None:
        assert ends_the_program(no_handler)
        os.kill(os.getpid(), no_handler)
        await anyio.sleep_forever()

    with anyio.fail_after(5):
        await serve(db, no_handler, body)
        assert db.pool.closed
    assert signal.getsignal(no_handler) is signal.SIG_DFL


async def test_two_databases_that_drain_on_one_signal_both_leave_their_blocks(
    db: Database, dsn: str, no_handler: int
) -> None:
    async with Database(dsn, min_size=1) as other:

        async def body() -> None:
            os.kill(os.getpid(), no_handler)
            await anyio.sleep_forever()

        with anyio.fail_after(5):
            with other.drain_on_signal(no_handler):
                await serve(db, no_handler, body)
            assert db.pool.closed
            assert other.pool.closed
    assert signal.getsignal(no_handler) is signal.SIG_DFL


async def test_a_program_that_has_left_its_block_is_not_told_any_more(
    db: Database, no_handler: int
) -> None:
    with db.drain_on_signal(no_handler):
        os.kill(os.getpid(), no_handler)
        while not db.draining:
            await anyio.lowlevel.checkpoint()
    with anyio.fail_after(5):
        await db.drain()
    assert db.pool.closed


async def test_with_a_handler_the_block_goes_on_and_the_handler_is_called(db: Database) -> None:
    with program_handler(signal.SIGUSR1) as called, db.drain_on_signal(signal.SIGUSR1):
        os.kill(os.getpid(), signal.SIGUSR1)
        with anyio.fail_after(5):
            while not called:
                await anyio.lowlevel.checkpoint()
    assert db.pool.closed


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_signal_that_cannot_be_caught_is_refused(db: Database, signum: int) -> None:
    with pytest.raises(ValueError, match="can't be caught"), db.drain_on_signal(signum):
        pass
    async with db.connection() as conn:
        with pytest.raises(ValueError, match="can't be caught"), conn.cancel_on_signal(signum):
            pass
