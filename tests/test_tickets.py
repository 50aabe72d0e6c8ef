"""How a transaction gets its number, or a token, and what that costs."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import anyio
import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from aiopgsafe import (
    AsyncConnection,
    CommitUnknown,
    Database,
    Transaction,
    TransactionState,
    resolve_commit,
)
from aiopgsafe._tools.tokens import CREATE
from aiopgsafe.testing import CancelSweep, Cut, FaultProxy, command_complete
from tests.conftest import Figures, sweeps
from tests.test_outcomes import is_commit

pytestmark = pytest.mark.anyio

Admin = psycopg.Connection[Any]
Conn = AsyncConnection[Any]
COMMITTED, ROLLED_BACK, UNKNOWN = (
    TransactionState.COMMITTED,
    TransactionState.ROLLED_BACK,
    TransactionState.UNKNOWN,
)


@pytest.fixture
async def conn(proxy: FaultProxy, admin: Admin, anyio_backend: object) -> AsyncIterator[Conn]:
    admin.execute("create table t (id int)")
    admin.execute(CREATE)
    async with await AsyncConnection.connect(proxy.dsn, autocommit=True) as conn:
        async with conn.transaction():  # the first one asks for the server's history
            await conn.execute("select 1")
        yield conn


WRITES = [
    "insert into t values (1)",
    "  INSERT INTO t VALUES (1) RETURNING id",
    "update t set id = 2",
    "delete from t",
    "with x as (select 1) insert into t select * from x",
    "merge into t using (values (1)) v (id) on t.id = v.id when not matched then insert values (1)",
]


@pytest.mark.parametrize("query", WRITES)
async def test_the_number_comes_with_the_first_statement_that_writes(
    conn: Conn, proxy: FaultProxy, admin: Admin, query: str
) -> None:
    admin.execute("insert into t values (0)")
    proxy.reset_stats()
    async with conn.transaction() as tx:
        assert tx.xid is None
        cur = await tx.execute(query)
        assert cur.rowcount == 1
        assert tx.xid is not None
        number = await (await tx.execute("select pg_current_xact_id()::text::bigint")).fetchone()
        assert number == (tx.xid,)
    assert proxy.stats.round_trips == 3  # the statement, select, COMMIT: none more


@pytest.mark.parametrize("prepare", [None, True])
async def test_a_statement_that_carries_it_is_prepared_as_ever(conn: Conn, prepare: Any) -> None:
    for id in range(8):
        async with conn.transaction() as tx:
            cur = await tx.execute("insert into t values (%s) returning id", (id,), prepare=prepare)
            assert await cur.fetchall() == [(id,)]
            assert cur.statusmessage == "INSERT 0 1"
            assert tx.xid is not None
    cur = await conn.execute("select count(*) from pg_prepared_statements where name like '_pg3%'")
    assert await cur.fetchone() == (1,)


async def test_a_statement_that_fails_is_its_own_error(conn: Conn, admin: Admin) -> None:
    admin.execute("alter table t add primary key (id)")
    for prepare in (False, True):
        with pytest.raises(psycopg.errors.UniqueViolation):
            async with conn.transaction() as tx:
                async with conn.transaction():
                    await tx.execute("insert into t values (%s)", (1,), prepare=prepare)
                await tx.execute("insert into t values (%s)", (1,), prepare=prepare)
    for prepare in (False, True):
        with pytest.raises(psycopg.errors.UndefinedTable):
            async with conn.transaction() as tx:
                await tx.execute("insert into nowhere values (%s)", (1,), prepare=prepare)
        assert tx.state is ROLLED_BACK
    async with conn.transaction() as tx:
        await tx.execute("insert into t values (%s)", (2,), prepare=True)
    assert not conn.closed


@pytest.mark.parametrize("forget", ["deallocate all", "discard all", "DEALLOCATE PREPARE ALL"])
async def test_a_program_that_forgets_prepared_statements_forgets_ours(
    conn: Conn, forget: str
) -> None:
    for _ in range(2):
        async with conn.transaction() as tx:
            await tx.execute("insert into t values (1)")
            assert tx.xid is not None
        await conn.execute(forget)


async def test_what_could_not_be_prepared_is_prepared_later(conn: Conn, admin: Admin) -> None:
    """Behind an error nothing is; and nothing piles up on the server."""
    admin.execute("alter table t add primary key (id)")
    admin.execute("insert into t values (1)")
    await conn.execute("deallocate all")
    for _ in range(3):
        with pytest.raises(psycopg.errors.UniqueViolation):
            async with conn.transaction(), conn.transaction():
                await conn.execute("insert into t values (1)")
    async with conn.transaction() as tx, conn.transaction():
        await conn.execute("insert into t values (2)")
        assert tx.xid is not None
    found = "select count(*) from pg_prepared_statements where name like '_aiopgsafe%'"
    assert await (await conn.execute(found)).fetchone() == (3,)  # BEGIN, SAVEPOINT, the number


async def test_a_deallocate_that_nobody_sees_costs_nothing(conn: Conn, admin: Admin) -> None:
    for i in range(3):
        async with conn.transaction() as tx, conn.transaction():
            await conn.execute("insert into t values (%s)", (i,))
        assert tx.xid is not None
        await conn.execute("do $$ begin execute 'deall' || 'ocate all'; end $$")
    assert admin.execute("select id from t order by id").fetchall() == [(0,), (1,), (2,)]


async def copy_in(tx: Transaction[Any]) -> None:
    async with tx.cursor() as cur, cur.copy("copy t from stdin") as copy:
        await copy.write("1\n")


async def many(tx: Transaction[Any]) -> None:
    await tx.cursor().executemany("insert into t values (%s)", [(1,), (2,)])


async def by_function(tx: Transaction[Any]) -> None:
    await tx.execute("select writes()")


async def several(tx: Transaction[Any]) -> None:
    await tx.execute("select 1; insert into t values (1)")


async def raw(tx: Transaction[Any]) -> None:
    await psycopg.AsyncRawCursor(tx.connection).execute("insert into t values ($1)", (1,))


@pytest.mark.parametrize("work", [copy_in, many, by_function, several, raw])
@pytest.mark.parametrize("when", ["before", "after"])
async def test_whatever_writes_has_its_number_with_commit_at_the_latest(
    conn: Conn, proxy: FaultProxy, admin: Admin, work: Any, when: str
) -> None:
    admin.execute(
        "create function writes() returns void language sql as 'insert into t values (1)'"
    )
    called: list[str] = []
    if when == "after":
        # The number has come through by then: the server flushes it before it commits.
        proxy.inject(Cut("rst"), command_complete("COMMIT"))
    try:
        async with conn.transaction() as tx:
            tx.on_commit(called.append, "committed")
            await work(tx)
    finally:
        assert tx.state is COMMITTED
        assert tx.xid is not None
        assert called == ["committed"]
        assert conn.closed == (when == "after")


async def test_a_transaction_that_only_reads_has_none(conn: Conn, proxy: FaultProxy) -> None:
    proxy.reset_stats()
    async with conn.transaction() as tx:
        await tx.execute("select 1")
        with pytest.raises(psycopg.ProgrammingError, match="has not written anything"):
            tx.ticket()
    assert (tx.state, tx.xid) == (COMMITTED, None)
    assert proxy.stats.round_trips == 2
    async with conn.transaction(read_only=True) as tx:
        await tx.execute("select 1")
    assert tx.xid is None


async def test_in_a_pipeline_it_comes_with_commit(conn: Conn, proxy: FaultProxy) -> None:
    async with conn.pipeline(), conn.transaction() as tx:
        await tx.execute("insert into t values (1)")
    assert tx.xid is not None
    assert tx.state is COMMITTED


async def test_commit_without_a_block_is_asked_for_too(
    conn: Conn, proxy: FaultProxy, admin: Admin
) -> None:
    async with await AsyncConnection.connect(proxy.dsn) as other:
        await other.execute("insert into t values (1)")
        proxy.inject(Cut("rst"), command_complete("COMMIT"))
        await other.commit()
        assert other.closed
    assert admin.execute("select count(*) from t").fetchone() == (1,)
    proxy.clear()
    proxy.inject(Cut("rst"), is_commit)
    with pytest.raises(psycopg.OperationalError) as caught:
        async with await AsyncConnection.connect(proxy.dsn) as other:
            await other.execute("insert into t values (1)")
    assert "the transaction is rolled back" in caught.value.__notes__[0]
    assert admin.execute("select count(*) from t").fetchone() == (1,)


async def test_a_ticket_outlives_its_program(conn: Conn, dsn: str) -> None:
    async with conn.transaction() as tx:
        await tx.execute("insert into t values (1)")
        kept = tx.ticket()
    assert await resolve_commit(kept, dsn) is COMMITTED
    with pytest.raises(LookupError):
        async with conn.transaction() as tx:
            await tx.execute("insert into t values (1)")
            kept = tx.ticket()
            raise LookupError
    assert await resolve_commit(kept, dsn) is ROLLED_BACK


async def test_asking_for_an_open_transaction_ends_it(conn: Conn, dsn: str) -> None:
    with pytest.raises(psycopg.OperationalError):
        async with conn.transaction() as tx:
            await tx.execute("insert into t values (1)")
            assert await resolve_commit(tx.ticket(), dsn, timeout=5) is ROLLED_BACK
    assert tx.state is ROLLED_BACK


async def test_bad_questions_are_refused(dsn: str, conn: Conn) -> None:
    with pytest.raises(ValueError, match="no ticket"):
        await resolve_commit("something", dsn)
    async with conn.transaction() as tx:
        await tx.execute("insert into t values (1)")
        kept = tx.ticket()
    with pytest.raises(ValueError, match="timeout"):
        await resolve_commit(kept, dsn, timeout=-1)
    with pytest.raises(psycopg.ProgrammingError):
        await resolve_commit(kept, "what is that")
    with anyio.fail_after(5):
        assert await resolve_commit(kept, "host=127.0.0.1 port=1", timeout=0.1) is UNKNOWN


async def test_another_server_does_not_know(conn: Conn, dsn: str) -> None:
    async with conn.transaction() as tx:
        await tx.execute("insert into t values (1)")
        kept = tx.ticket()
    system = kept.partition('"system": "')[2].partition('"')[0]
    assert await resolve_commit(kept.replace(system, "1234"), dsn) is UNKNOWN


async def test_a_role_that_may_not_ask_works_and_says_unknown(
    conn: Conn, proxy: FaultProxy, admin: Admin
) -> None:
    admin.execute("drop role if exists small")
    admin.execute("create role small login")
    admin.execute("grant usage on schema public to small")
    admin.execute("grant all on t to small")
    admin.execute("revoke execute on function pg_control_system() from public")
    try:
        small = await AsyncConnection.connect(make_conninfo(proxy.dsn, user="small"))
        async with small.transaction() as tx:
            await tx.execute("insert into t values (1)")
            with pytest.raises(psycopg.NotSupportedError, match="commit_token"):
                tx.ticket()
        assert tx.xid is None
        proxy.inject(Cut("rst"), command_complete("COMMIT"))
        with pytest.raises(CommitUnknown):
            async with small.transaction() as tx:
                await tx.execute("insert into t values (1)")
    finally:
        admin.execute("grant execute on function pg_control_system() to public")
        admin.execute("drop owned by small")
        admin.execute("drop role small")


async def test_statistics_that_are_reset_by_hand_are_no_crash(
    conn: Conn, proxy: FaultProxy, admin: Admin
) -> None:
    proxy.inject(Cut("rst"), command_complete("COMMIT"))
    async with conn.transaction() as tx:
        await tx.execute("insert into t values (1)")
        admin.execute("select pg_stat_reset_shared('bgwriter')")
    assert tx.state is COMMITTED


# Tokens


@pytest.mark.parametrize("when", ["before", "after"])
async def test_a_token_says_it_through_a_pooler_too(
    pgbouncer: str, admin: Admin, when: str, anyio_backend: object
) -> None:
    admin.execute("create table t (id int)")
    admin.execute(CREATE)
    with FaultProxy(pgbouncer) as proxy:
        options: Any = {"min_size": 1, "commit_token": True, "prepare_threshold": None}
        async with Database(proxy.dsn, **options) as db:
            proxy.inject(Cut("rst"), is_commit if when == "before" else command_complete("COMMIT"))
            try:
                async with db.transaction() as tx:
                    await tx.execute("insert into t values (1)")
                    kept = tx.ticket()
            except psycopg.OperationalError as exc:
                assert when == "before", exc
            expected = ROLLED_BACK if when == "before" else COMMITTED
            assert tx.state is expected
            assert await resolve_commit(kept, pgbouncer) is expected
    assert admin.execute("select count(*) from t").fetchone() == (int(when == "after"),)


async def test_a_token_costs_no_round_trip_and_no_table_is_an_error(
    conn: Conn, proxy: FaultProxy, admin: Admin
) -> None:
    proxy.reset_stats()
    async with conn.transaction(commit_token=True) as tx:
        await tx.execute("insert into t values (1)")
    assert proxy.stats.round_trips == 2
    assert admin.execute("select count(*) from aiopgsafe.token").fetchone() == (1,)
    admin.execute("drop table aiopgsafe.token")
    with pytest.raises(psycopg.errors.UndefinedTable):
        async with conn.transaction(commit_token=True) as tx:
            await tx.execute("insert into t values (1)")
    assert tx.state is ROLLED_BACK
    assert not conn.closed
    assert admin.execute("select count(*) from t").fetchone() == (1,)


@pytest.mark.parametrize(("loop_name", "how"), sweeps())
async def test_asking_is_shielded_wherever_it_is_cancelled(
    proxy: FaultProxy, admin: Admin, how: Any, figures: Figures
) -> None:
    """Each COMMIT loses its answer; the task is cancelled at each point, in the asking too."""
    admin.execute("create table t (id int)")
    proxy.inject(Cut("rst"), command_complete("COMMIT"))
    n, points = 0, 0
    called: list[int] = []
    tx: Transaction[Any] | None = None
    conn = await AsyncConnection.connect(proxy.dsn, autocommit=True)

    async def work() -> None:
        nonlocal n, tx
        n += 1
        tx = conn.transaction()
        async with tx:
            tx.on_commit(called.append, n)
            await tx.execute("insert into t values (%s)", (n,))

    async for trial in CancelSweep(work, how=how):
        where = f"point {trial.point}: {trial.where}: {trial.exception!r}"
        there = admin.execute("select 1 from t where id = %s", (n,)).fetchone() is not None
        assert (n in called) == there, where
        assert (tx is not None and tx.state is COMMITTED) == there, where
        assert tx is None or tx.state is not UNKNOWN, where
        notes = "".join(getattr(trial.exception, "__notes__", []))
        assert there == (trial.exception is None or "is committed" in notes), where
        points += not trial.completed
        if conn.closed:
            conn = await AsyncConnection.connect(proxy.dsn, autocommit=True)
    await conn.close()
    figures(points=points, failures=0)
