"""What is run again is known not to be committed; what may be committed never is."""

from __future__ import annotations

import pickle
from collections.abc import AsyncIterator
from math import inf
from typing import Any

import anyio
import psycopg
import pytest
from psycopg import IsolationLevel, errors
from psycopg.pq import TransactionStatus

from aiopgsafe import (
    AsyncConnection,
    CommitUnknown,
    Database,
    Retry,
    TransactionState,
    safe_to_retry,
)
from aiopgsafe.testing import Cut, FaultProxy, command_complete, query
from tests.conftest import Figures

pytestmark = pytest.mark.anyio

Admin = psycopg.Connection[Any]


@pytest.fixture
async def db(dsn: str, admin: Admin, anyio_backend: object) -> AsyncIterator[Database]:
    admin.execute("create table t (id int primary key, n int)")
    admin.execute("insert into t values (1, 0)")
    async with Database(dsn, min_size=1, max_size=8) as db:
        yield db


async def test_writers_of_one_hot_row_all_succeed(
    db: Database, admin: Admin, figures: Figures
) -> None:
    writers, rounds = 8, 5
    retry = Retry(attempts=20)

    @db.atomic(isolation_level=IsolationLevel.SERIALIZABLE, retry=retry)
    async def add_one() -> None:
        cur = await db.execute("select n from t where id = 1")
        ((n,),) = await cur.fetchall()
        await db.execute("update t set n = %s where id = 1", (n + 1,))

    async def writer() -> None:
        for _ in range(rounds):
            await add_one()

    async with anyio.create_task_group() as tasks:
        for _ in range(writers):
            tasks.start_soon(writer)
    assert admin.execute("select n from t").fetchone() == (writers * rounds,)
    assert retry.given_up == 0
    figures(transactions=writers * rounds, attempts=writers * rounds + retry.retries)


async def test_a_deadlock_is_run_again(db: Database, admin: Admin) -> None:
    admin.execute("insert into t values (2, 0)")
    retry = Retry()
    first = {1: anyio.Event(), 2: anyio.Event()}

    @db.atomic(retry=retry)
    async def both(one: int, other: int) -> None:
        await db.execute("set local deadlock_timeout = '20ms'")
        await db.execute("update t set n = n + 1 where id = %s", (one,))
        first[one].set()
        await first[other].wait()
        await db.execute("update t set n = n + 1 where id = %s", (other,))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(both, 1, 2)
        tasks.start_soon(both, 2, 1)
    assert admin.execute("select sum(n) from t").fetchone() == (4,)
    assert retry.retries >= 1


async def test_a_connection_lost_before_commit_is_run_again_on_another_one(
    db: Database, admin: Admin
) -> None:
    retry = Retry()
    pids: list[int] = []

    @db.atomic(retry=retry)
    async def work() -> str:
        cur = await db.execute("select pg_backend_pid()")
        ((pid,),) = await cur.fetchall()
        pids.append(pid)
        await db.execute("update t set n = n + 1")
        if len(pids) == 1:
            admin.execute("select pg_terminate_backend(%s, 5000)", (pid,))
            await db.execute("select 1")
        return "done"

    assert await work() == "done"
    assert len(set(pids)) == 2
    assert admin.execute("select n from t").fetchone() == (1,)


@pytest.mark.parametrize("idempotent", [False, True])
async def test_an_unknown_outcome_is_run_again_only_if_the_work_is_idempotent(
    proxy: FaultProxy, admin: Admin, idempotent: bool, anyio_backend: object
) -> None:
    admin.execute("create table t (id int)")
    proxy.inject(Cut("rst"), command_complete("COMMIT"), times=1)
    retry = Retry(idempotent=idempotent)
    timeouts: Any = {"commit_timeout": 0.2, "cancel_timeout": 0.1}
    async with Database(proxy.dsn, min_size=1, **timeouts) as db:

        @db.atomic(retry=retry)
        async def work() -> None:
            await db.execute("insert into t values (1)")
            proxy.refuse = not retry.retries  # nobody can be asked what became of the first

        async def server_comes_back() -> None:
            while not retry.retries:
                await anyio.lowlevel.checkpoint()
            proxy.refuse = False

        if idempotent:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(server_comes_back)
                await work()
        else:
            with pytest.raises(CommitUnknown) as caught:
                await work()
            assert not safe_to_retry(caught.value)
    assert retry.retries == idempotent
    assert admin.execute("select count(*) from t").fetchone() == (1 + idempotent,)


async def test_other_errors_are_not_retried(db: Database) -> None:
    retry = Retry()
    calls = 0

    @db.atomic(retry=retry)
    async def work(error: Exception) -> None:
        nonlocal calls
        calls += 1
        raise error

    for error in (LookupError(), errors.UniqueViolation(), psycopg.OperationalError()):
        calls = 0
        with pytest.raises(type(error)):
            await work(error)
        assert calls == 1
    assert (retry.retries, retry.given_up) == (0, 0)


async def test_an_error_that_comes_after_the_commit_is_not_retried(
    db: Database, admin: Admin
) -> None:
    retry = Retry()

    def fail() -> None:
        raise errors.SerializationFailure

    @db.atomic(retry=retry)
    async def work() -> None:
        async with db.transaction() as tx:
            tx.on_commit(fail)
            await tx.execute("update t set n = n + 1")

    with pytest.raises(ExceptionGroup, match="is committed"):
        await work()
    assert retry.retries == 0
    assert admin.execute("select n from t").fetchone() == (1,)


ENDINGS = [
    "commit",
    "commit and chain",
    "update t set n = n; commit; begin",
    "select ';'; /* ; */ end",
    "select 1 -- ;\n; commit",
]


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("then", ["fails", "is lost", "ends"])
async def test_what_the_program_itself_has_committed_is_never_run_again(
    db: Database, admin: Admin, ending: str, then: str
) -> None:
    retry = Retry()
    seen: list[Any] = []

    @db.atomic(retry=retry)
    async def work() -> None:
        async with db.transaction() as tx:
            tx.on_rollback(seen.append, "rolled back")
            conn = tx.connection
            await tx.execute("update t set n = n + 1")
            await tx.execute(ending)
            assert tx.state is TransactionState.UNKNOWN
            with pytest.raises(psycopg.ProgrammingError, match="is unknown"):
                await db.execute("select 1")
            if then == "fails":
                raise errors.SerializationFailure
            if then == "is lost":
                admin.execute("select pg_terminate_backend(%s, 5000)", (conn.info.backend_pid,))
                await conn.execute("select 1")

    with pytest.raises(psycopg.OperationalError) as caught:
        await work()
    assert not safe_to_retry(caught.value)
    assert (retry.retries, seen) == (0, [])
    assert admin.execute("select n from t").fetchone() == (1,)
    async with db.connection() as conn:
        assert conn.info.transaction_status is TransactionStatus.IDLE


@pytest.mark.parametrize("ending", ENDINGS)
async def test_a_commit_in_any_text_whose_answer_is_lost_is_unknown(
    proxy: FaultProxy, admin: Admin, ending: str, anyio_backend: object
) -> None:
    admin.execute("create table t (n int)")
    admin.execute("insert into t values (0)")
    retry = Retry()
    async with Database(proxy.dsn, min_size=1) as db:
        proxy.inject(Cut("rst"), command_complete("COMMIT"), times=1)

        @db.atomic(retry=retry)
        async def work() -> None:
            await db.execute("update t set n = n + 1")
            await db.execute(ending)

        with pytest.raises(psycopg.OperationalError) as caught:
            await work()
        assert not safe_to_retry(caught.value)
    assert retry.retries == 0
    assert admin.execute("select n from t").fetchone() == (1,)


@pytest.mark.parametrize(
    "text",
    [
        "select case when true then 1 end",
        "do $$begin perform 1; end$$",
        "select ';commit', $x$;commit$x$, E'\\';commit' -- ;commit",
        'select 1 as ";commit" /* ;commit /* */ ;commit */',
        "rollback to savepoint s",
        "rollback work to s; select 1",
        "select 'commit'",
    ],
)
async def test_what_only_looks_like_commit_leaves_the_block_its_transaction(
    db: Database, admin: Admin, text: str
) -> None:
    async with db.transaction() as tx:
        await tx.execute("update t set n = n + 1")
        await tx.execute("savepoint s")
        await tx.execute(text)
        assert tx.state is TransactionState.ACTIVE
    assert tx.state is TransactionState.COMMITTED
    assert admin.execute("select n from t").fetchone() == (1,)


async def test_a_commit_that_never_was_sent_or_refused_leaves_the_block_its_transaction(
    db: Database, admin: Admin
) -> None:
    with pytest.raises(psycopg.errors.DivisionByZero):
        async with db.transaction() as tx:
            await tx.execute("update t set n = n + 1")
            await tx.execute("select 1/0; commit")
    assert tx.state is TransactionState.ROLLED_BACK
    with pytest.raises(psycopg.ProgrammingError):
        async with db.transaction() as tx:
            await tx.execute("update t set n = n + 1")
            await tx.execute("commit -- %s %s", (1,))
    assert tx.state is TransactionState.ROLLED_BACK
    assert admin.execute("select n from t").fetchone() == (0,)


@pytest.mark.parametrize("cursor", ["ours", "client", "pipeline"])
async def test_a_commit_of_the_programs_own_that_was_lost_is_unknown(
    proxy: FaultProxy, admin: Admin, cursor: str, anyio_backend: object
) -> None:
    admin.execute("create table t (id int)")
    async with await AsyncConnection.connect(proxy.dsn, autocommit=True) as conn:
        cut = proxy.inject(Cut("rst"), command_complete("COMMIT"), times=1)
        with pytest.raises(psycopg.OperationalError) as caught:
            async with conn.transaction() as tx:
                await conn.execute("insert into t values (1)")
                if cursor == "ours":
                    await conn.execute("commit")
                elif cursor == "client":
                    await psycopg.AsyncClientCursor(conn).execute("commit")
                else:
                    async with conn.pipeline():
                        await conn.execute("commit")
    cut.wait()
    assert tx.state is TransactionState.UNKNOWN
    assert not safe_to_retry(caught.value)
    assert admin.execute("select count(*) from t").fetchone() == (1,)


async def test_it_gives_up_after_so_many_attempts_or_at_the_deadline(db: Database) -> None:
    retry = Retry(attempts=3, backoff=0.001)

    @db.atomic(retry=retry)
    async def fail() -> None:
        raise errors.SerializationFailure

    with pytest.raises(errors.SerializationFailure) as caught:
        await fail()
    assert caught.value.__notes__ == ["aiopgsafe: given up after 3 attempts"]
    assert (retry.retries, retry.given_up) == (2, 1)

    slow = Retry(backoff=60, max_backoff=60)
    with anyio.fail_after(30), pytest.raises(errors.SerializationFailure) as caught:
        await db.atomic(retry=slow)(fail.__wrapped__)()  # type: ignore[attr-defined]
    assert caught.value.__notes__ == [
        "aiopgsafe: not run again: the pause would outlast the deadline"
    ]
    assert (slow.retries, slow.given_up) == (0, 1)


async def test_a_pause_can_be_cancelled(db: Database) -> None:
    @db.atomic(retry=Retry(backoff=60, max_backoff=60))
    async def fail() -> None:
        raise errors.SerializationFailure

    with anyio.CancelScope() as scope:
        async with anyio.create_task_group() as tasks:

            async def cancel() -> None:
                while db.pool.get_stats()["requests_num"] == 0 or db.pool._places.used:
                    await anyio.lowlevel.checkpoint()
                scope.cancel()

            tasks.start_soon(cancel)
            await fail()
    assert scope.cancelled_caught


async def test_within_a_transaction_only_the_outermost_is_run_again(db: Database) -> None:
    inner_retry, outer_retry = Retry(), Retry()
    calls = {"inner": 0, "outer": 0}

    @db.atomic(retry=inner_retry)
    async def inner() -> None:
        calls["inner"] += 1
        if calls["inner"] < 3:
            raise errors.SerializationFailure

    @db.atomic(retry=outer_retry)
    async def outer() -> None:
        calls["outer"] += 1
        await inner()

    await outer()
    assert calls == {"inner": 3, "outer": 3}
    assert (inner_retry.retries, outer_retry.retries) == (0, 2)


async def test_safe_to_retry_tells_for_those_who_loop_themselves(
    proxy: FaultProxy, admin: Admin, anyio_backend: object
) -> None:
    admin.execute("create table t (id int)")
    # Lost before COMMIT: in a statement, idle in the block, and in BEGIN.
    for trigger in ("insert", "idle", "begin"):
        conn = await AsyncConnection.connect(proxy.dsn, autocommit=True)
        if trigger == "begin":
            proxy.inject(Cut("rst"), query("BEGIN"), times=1)
        with pytest.raises(psycopg.OperationalError) as caught:
            async with conn.transaction():
                if trigger == "insert":
                    proxy.inject(Cut("rst"), query("insert"), times=1)
                elif trigger == "idle":
                    proxy.cut()
                await conn.execute("insert into t values (1)")
        assert safe_to_retry(caught.value), trigger
        await conn.close()
    # A single statement may have been committed.
    conn = await AsyncConnection.connect(proxy.dsn, autocommit=True)
    proxy.inject(Cut("rst"), command_complete("INSERT"), times=1)
    with pytest.raises(psycopg.OperationalError) as caught:
        await conn.execute("insert into t values (1)")
    assert not safe_to_retry(caught.value)
    await conn.close()
    assert admin.execute("select count(*) from t").fetchone() == (1,)
    assert not safe_to_retry(LookupError())
    assert safe_to_retry(errors.DeadlockDetected())
    assert safe_to_retry(pickle.loads(pickle.dumps(errors.SerializationFailure())))


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"attempts": 0}, ValueError),
        ({"attempts": 1.5}, TypeError),
        ({"backoff": -1}, ValueError),
        ({"backoff": inf}, ValueError),
        ({"jitter": 2}, ValueError),
        ({"max_backoff": -1}, ValueError),
    ],
)
async def test_bad_options_are_refused(options: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        Retry(**options)


async def test_a_retry_that_is_none_is_refused(db: Database) -> None:
    with pytest.raises(TypeError, match="retry is a Retry, not int"):
        db.atomic(retry=3)  # type: ignore[call-overload]
