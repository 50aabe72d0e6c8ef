"""Blocks, commit and rollback, two-phase commit: each scenario as psycopg's own class plays it."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import psycopg
import pytest
from psycopg import Rollback
from psycopg.pq import TransactionStatus

from aiopgsafe import AsyncConnection, CommitRolledBack, CommitUnknown, TransactionState
from tests.dropin import Scene, compared

CREATE = "create table t (i int primary key)"


async def table(s: Scene) -> None:
    await s.conn.execute(CREATE)
    await s.conn.commit()


async def add(s: Scene, i: int) -> None:
    await s.conn.execute("insert into t values (%s)", (i,))


@compared
async def test_commit_and_rollback_end_what_a_statement_began(s: Scene) -> None:
    await s.conn.commit()
    await s.conn.rollback()
    await table(s)
    await add(s, 1)
    s.status()
    await s.conn.commit()
    s.status()
    await add(s, 2)
    await s.conn.rollback()
    s.note(await s.elsewhere("select * from t"))
    with s.fails():
        await add(s, 1)
    s.status()
    with s.fails():
        await add(s, 3)
    await s.conn.rollback()
    await s.conn.set_autocommit(True)
    await add(s, 4)
    await s.conn.commit()
    await s.conn.rollback()
    s.note(await s.elsewhere("select * from t"))


@compared
async def test_async_with_the_connection_commits_or_rolls_back_and_closes(s: Scene) -> None:
    await table(s)
    async with await s.cls.connect(s.dsn) as conn:
        await conn.execute("insert into t values (1)")
    s.note(conn.closed, conn.broken)
    with s.fails():
        async with await s.cls.connect(s.dsn) as conn:
            await conn.execute("insert into t values (2)")
            raise ZeroDivisionError("in the block")
    s.note(conn.closed, conn.broken)
    async with await s.cls.connect(s.dsn) as conn:
        await conn.execute("insert into t values (3)")
        await conn.close()
    with s.fails():
        async with await s.cls.connect(s.dsn) as conn:
            await conn.close()
            raise ZeroDivisionError("after close")
    async with await s.cls.connect(s.dsn) as conn:
        async with conn.transaction():
            await conn.execute("insert into t values (4)")
        await conn.execute("insert into t values (5)")
    s.note(await s.fetch("select * from t order by 1"))


@compared
async def test_blocks_nest_and_each_undoes_its_own(s: Scene) -> None:
    await table(s)
    async with s.conn.transaction() as outer:
        s.note(outer.savepoint_name, outer.status.value, outer.connection is s.conn)
        await add(s, 1)
        async with s.conn.transaction() as inner:
            s.note(inner.savepoint_name)
            await add(s, 2)
            async with s.conn.transaction('it\'s a "name"') as named:
                s.note(named.savepoint_name)
                await add(s, 3)
                raise Rollback
            await add(s, 4)
        with s.fails():
            async with s.conn.transaction() as failed:
                await add(s, 1)
        s.status()
        with s.fails():
            async with s.conn.transaction():
                await add(s, 5)
                raise ZeroDivisionError("in the block")
        async with s.conn.transaction(force_rollback=True) as forced:
            await add(s, 6)
    s.note([tx.status.value for tx in (outer, inner, named, failed, forced)])
    s.note(await s.elsewhere("select * from t order by 1"))
    async with s.conn.transaction("outermost", force_rollback=True) as outer:
        s.note(outer.savepoint_name)
        await add(s, 7)
    s.note(outer.status.value, await s.elsewhere("select * from t order by 1"))


@compared
async def test_rollback_leaves_the_blocks_up_to_its_target(s: Scene) -> None:
    await table(s)
    async with s.conn.transaction():
        await add(s, 1)
        async with s.conn.transaction() as target:
            await add(s, 2)
            async with s.conn.transaction():
                await add(s, 3)
                raise Rollback(target)
            s.note("not reached")
        await add(s, 4)
    s.note(await s.fetch("select * from t order by 1"))
    await s.conn.rollback()
    with s.fails():
        async with s.conn.transaction():
            await add(s, 5)
            raise Rollback(target)
    async with s.conn.transaction() as tx:
        raise Rollback(tx)
    s.note(repr(Rollback()), await s.fetch("select * from t order by 1"))


@compared
async def test_a_block_in_a_transaction_that_was_begun_is_a_savepoint(s: Scene) -> None:
    await table(s)
    await add(s, 1)
    async with s.conn.transaction() as tx:
        s.note(tx.savepoint_name)
        await add(s, 2)
    s.status()
    with s.fails():
        async with s.conn.transaction():
            await add(s, 3)
            raise ZeroDivisionError("in the block")
    s.note(await s.elsewhere("select * from t"))
    await s.conn.commit()
    s.note(await s.elsewhere("select * from t order by 1"))
    await s.conn.set_autocommit(True)
    await s.conn.execute("begin")
    async with s.conn.transaction():
        await add(s, 4)
    s.status()
    await s.conn.execute("commit")
    s.note(await s.elsewhere("select * from t order by 1"))


@compared
async def test_commit_and_rollback_are_refused_inside_a_block(s: Scene) -> None:
    await table(s)
    async with s.conn.transaction():
        await add(s, 1)
        with s.fails():
            await s.conn.commit()
        with s.fails():
            await s.conn.rollback()
        async with s.conn.transaction():
            with s.fails():
                await s.conn.commit()
        with s.fails():
            await s.conn.tpc_begin("x")
        s.status()
    s.note(await s.elsewhere("select * from t order by 1"))


@compared
async def test_a_block_serves_once_and_begins_when_it_is_entered(s: Scene) -> None:
    tx = s.conn.transaction()
    s.status()
    async with tx as entered:
        s.status()
    for _ in range(2):
        with s.fails():
            async with entered:
                s.note("not reached")
        s.status()


@compared
async def test_blocks_that_are_left_out_of_order_say_so(s: Scene) -> None:
    for error in (None, ZeroDivisionError("in the block")):
        first, second = s.conn.transaction(), s.conn.transaction()
        kind = type(error) if error else None
        await first.__aenter__()
        await second.__aenter__()
        try:
            await first.__aexit__(kind, error, None)
        except psycopg.ProgrammingError as exc:
            s.note(type(exc).__name__)
        with suppress(psycopg.Error):
            await second.__aexit__(kind, error, None)
        await s.conn.rollback()
        s.status()
        s.note(s.conn._num_transactions)
        break  # psycopg's own count is wrong from here on


@compared
async def test_a_deferred_constraint_fails_the_block_at_its_end(s: Scene) -> None:
    await s.conn.set_autocommit(True)
    await s.conn.execute("create table t (i int unique deferrable initially deferred)")
    with s.fails():
        async with s.conn.transaction():
            await add(s, 1)
            await add(s, 1)
    s.status()
    await s.conn.set_autocommit(False)
    await add(s, 1)
    await add(s, 1)
    with s.fails():
        await s.conn.commit()
    s.status()
    s.note(await s.fetch("select * from t"))


@compared
async def test_a_block_can_end_by_return_break_and_in_a_generator(s: Scene) -> None:
    await table(s)

    async def returns() -> int:
        async with s.conn.transaction():
            await add(s, 1)
            return 7

    s.note(await returns())
    for i in (2, 3):
        async with s.conn.transaction():
            await add(s, i)
            if i == 2:
                continue
            break
    s.note(await s.elsewhere("select * from t order by 1"))


@compared
async def test_a_failed_begin_leaves_no_block(s: Scene) -> None:
    await s.conn.set_autocommit(True)
    with s.fails():
        async with s.conn.transaction("\0"):
            s.note("not reached")
    await s.conn.rollback()
    s.note(s.conn._num_transactions)
    s.status()
    with s.fails():
        await s.conn.execute("begin; select 1/0")
    with s.fails():
        async with s.conn.transaction():
            s.note("not reached")
    s.note(s.conn._num_transactions)
    s.status()


@compared
async def test_two_phase_transactions_prepare_commit_roll_back_and_recover(s: Scene) -> None:
    await table(s)
    one, two = s.conn.xid(1, "gtrid", "bqual"), "plain"
    await s.conn.tpc_begin(one)
    await add(s, 1)
    for refused in (s.conn.commit, s.conn.rollback):
        with s.fails():
            await refused()
    with s.fails():
        await s.conn.tpc_commit("another")
    with s.fails():
        await s.conn.tpc_begin(two)
    await s.conn.tpc_prepare()
    s.status()
    with s.fails():
        await s.conn.tpc_prepare()
    with s.fails():
        await s.conn.cancel_safe()
    for refused in (s.conn.commit, s.conn.rollback):
        with s.fails():
            await refused()
    async with s.another() as other:
        found = await other.tpc_recover()
        s.note([(x.format_id, x.gtrid, x.bqual, x.owner, x.database) for x in found])
    await s.conn.tpc_commit()
    s.note(await s.elsewhere("select * from t"), await s.conn.tpc_recover())
    s.status()

    await s.conn.tpc_begin(two)
    await add(s, 2)
    await s.conn.tpc_commit()
    await s.conn.tpc_begin(two)
    await add(s, 3)
    await s.conn.tpc_rollback()
    await s.conn.tpc_begin(two)
    await add(s, 4)
    await s.conn.tpc_prepare()
    await s.conn.tpc_rollback()
    s.note(await s.elsewhere("select * from t order by 1"), await s.conn.tpc_recover())


@compared
async def test_a_prepared_transaction_is_ended_from_another_connection(s: Scene) -> None:
    await table(s)
    for i, action in enumerate(("tpc_commit", "tpc_rollback")):
        async with s.another() as other:
            await other.set_autocommit(False)
            await other.tpc_begin(f"x{i}")
            await other.execute("insert into t values (%s)", (i,))
            await other.tpc_prepare()
        (xid,) = await s.conn.tpc_recover()
        await getattr(s.conn, action)(xid)
        s.status()
        with s.fails():
            await getattr(s.conn, action)(xid)
        await s.conn.rollback()
        with s.fails():
            await getattr(s.conn, action)()
    s.note(await s.elsewhere("select * from t"))


@compared
async def test_two_phase_transactions_are_refused_where_they_make_no_sense(s: Scene) -> None:
    with s.fails():
        await s.conn.tpc_prepare()
    await s.conn.execute("select 1")
    with s.fails():
        await s.conn.tpc_begin("x")
    await s.conn.rollback()
    await s.conn.set_autocommit(True)
    with s.fails():
        await s.conn.tpc_begin("x")
    with s.fails():
        s.conn.xid(-1, "gtrid", "bqual")
    await s.conn.set_autocommit(False)
    await s.conn.tpc_begin("x")
    with s.fails():
        await s.conn.execute("select 1/0")
    s.status()
    await s.conn.tpc_rollback()
    s.status()


# What differs from psycopg, because the design wants it


pytest_anyio = pytest.mark.anyio


@pytest_anyio
async def test_a_commit_that_the_server_answers_with_rollback_raises(
    conn: AsyncConnection[Any],
) -> None:
    with pytest.raises(psycopg.errors.DivisionByZero):
        await conn.execute("select 1/0")
    with pytest.raises(CommitRolledBack):
        await conn.commit()
    with pytest.raises(CommitRolledBack):
        async with conn.transaction() as tx:
            with pytest.raises(psycopg.errors.DivisionByZero):
                await conn.execute("select 1/0")
    assert tx.state is TransactionState.ROLLED_BACK
    with pytest.raises(CommitRolledBack):
        async with conn:
            with pytest.raises(psycopg.errors.DivisionByZero):
                await conn.execute("select 1/0")
    assert conn.closed


@pytest_anyio
async def test_a_block_whose_connection_was_lost_raises_instead_of_ending_quietly(
    conn: AsyncConnection[Any],
) -> None:
    with pytest.raises(psycopg.OperationalError):
        async with conn.transaction() as tx:
            with pytest.raises(psycopg.OperationalError):
                await conn.execute("select pg_terminate_backend(pg_backend_pid())")
    assert tx.state is TransactionState.ROLLED_BACK
    assert conn.broken


@pytest_anyio
async def test_a_block_that_was_committed_by_a_statement_inside_does_not_know(
    conn: AsyncConnection[Any],
) -> None:
    with pytest.raises(CommitUnknown):
        async with conn.transaction() as tx:
            await conn.execute("commit")
    assert tx.state is TransactionState.UNKNOWN
    assert not conn.closed
    assert conn.info.transaction_status is TransactionStatus.IDLE


@pytest_anyio
@pytest.mark.parametrize("why", ["failed before", "temporary table", "identifier", "timeout"])
async def test_a_transaction_that_could_not_be_prepared_is_rolled_back_and_known_to_be(
    conn: AsyncConnection[Any], why: str
) -> None:
    for ending in ("tpc_rollback", "tpc_commit"):
        # A timeout, or a cancel, that hits it while it is parsed: the transaction is still there.
        await conn.tpc_begin("x" * {"identifier": 300, "timeout": 20_000_000}.get(why, 1))
        if why == "failed before":
            with pytest.raises(psycopg.errors.DivisionByZero):
                await conn.execute("select 1/0")
            expected: type[Exception] = CommitRolledBack
        elif why == "temporary table":
            await conn.execute("create temporary table temporary (i int)")
            expected = psycopg.NotSupportedError
        elif why == "identifier":
            expected = psycopg.errors.InvalidParameterValue
        else:
            await conn.execute("set local statement_timeout to 1")
            expected = psycopg.errors.QueryCanceled
        with pytest.raises(expected):
            await conn.tpc_prepare()
        status = TransactionStatus.INERROR if why == "timeout" else TransactionStatus.IDLE
        assert conn.info.transaction_status is status
        if ending == "tpc_rollback":
            await conn.tpc_rollback()
        else:
            with pytest.raises(CommitRolledBack):
                await conn.tpc_commit()
        assert not await conn.tpc_recover()
        await conn.rollback()


@pytest_anyio
async def test_a_two_phase_transaction_that_a_statement_has_ended_does_not_know(
    conn: AsyncConnection[Any],
) -> None:
    await conn.tpc_begin("x")
    await conn.execute("commit")
    with pytest.raises(CommitUnknown):
        await conn.tpc_commit()
    await conn.execute("select 1")
    await conn.commit()


@compared
async def test_a_function_may_be_decorated(s: Scene) -> None:
    await s.conn.set_autocommit(True)
    await s.conn.execute("create table decorated (i int)")

    @s.conn.transaction()
    async def add(i: int) -> int:
        await s.conn.execute("insert into decorated values (%s)", (i,))
        if i == 2:
            raise KeyError
        return i

    s.note(await add(1))
    with s.fails():
        await add(2)
    async with s.conn.transaction():
        s.note(await add(3))
    s.note(await s.fetch("select i from decorated order by i"))
