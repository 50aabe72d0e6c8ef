"""The other endings, cancelled everywhere: commit(), rollback(), two-phase, `async with conn`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import psycopg
import pytest
from psycopg.pq import TransactionStatus

from aiopgsafe import AsyncConnection, Transaction
from aiopgsafe.testing import CancelSweep, Delay, FaultProxy, command_complete
from tests.conftest import Figures, sweeps

pytestmark = pytest.mark.anyio

Conn = AsyncConnection[Any]
INSERT = "insert into t values (%s)"

blocks: dict[int, Transaction[Any]] = {}


async def by_commit(conn: Conn, n: int) -> None:
    await conn.execute(INSERT, (n,))
    await conn.commit()


async def by_rollback(conn: Conn, n: int) -> None:
    await conn.execute(INSERT, (n,))
    await conn.rollback()


async def by_tpc_commit(conn: Conn, n: int) -> None:
    await conn.tpc_begin(str(n))
    await conn.execute(INSERT, (n,))
    await conn.tpc_commit()


async def by_tpc_commit_prepared(conn: Conn, n: int) -> None:
    await conn.tpc_begin(str(n))
    await conn.execute(INSERT, (n,))
    await conn.tpc_prepare()
    await conn.tpc_commit()


async def by_pipeline(conn: Conn, n: int) -> None:
    """The pipeline's own exit may be cancelled after the transaction's, with no note: see state."""
    async with conn.pipeline(), conn.transaction() as tx:
        blocks[n] = tx
        await tx.execute(INSERT, (n,))
        await tx.execute("select 1")


ENDINGS = [by_commit, by_rollback, by_tpc_commit, by_tpc_commit_prepared, by_pipeline]


async def tidy(conn: Conn) -> None:
    """What a user does after an interruption that came before the ending."""
    if conn._tpc is not None:  # the transaction of two phases is still there
        await conn.tpc_rollback()
    await conn.rollback()


@pytest.mark.parametrize(("loop_name", "how"), sweeps())
@pytest.mark.parametrize("ending", ENDINGS)
async def test_an_ending_that_was_sent_is_noted_on_the_cancellation(
    proxy: FaultProxy,
    dsn: str,
    how: Any,
    turns: bool,
    ending: Callable[[Conn, int], Awaitable[None]],
    figures: Figures,
) -> None:
    for tag in ("COMMIT", "COMMIT PREPARED", "ROLLBACK"):
        proxy.inject(Delay(0.005), command_complete(tag))
    with psycopg.connect(dsn, autocommit=True) as admin:
        admin.execute("create table t (id int)")
        conn = await AsyncConnection.connect(proxy.dsn)
        # A connection's first BEGIN asks for the server's history: one point more, which
        # would shift the others as soon as a trial has it answered.
        await conn.execute("select 1")
        await conn.rollback()
        blocks.clear()
        pid, n, points, held_back = conn.info.backend_pid, 0, 0, 0

        async def work() -> None:
            nonlocal n
            n += 1
            await ending(conn, n)

        async for trial in CancelSweep(work, how=how):
            found = admin.execute("select 1 from t where id = %s", (n,)).fetchone()
            said = "".join(getattr(trial.exception, "__notes__", []))
            if n in blocks:
                said += f"the transaction is {blocks[n].state.value}"
            where = f"point {trial.point}: {trial.where}: {trial.exception!r} {said}"
            # A scope that is cancelled when nothing waits any more has nobody to tell.
            assert trial.completed or trial.exception is not None or how == "level", where
            if trial.exception is None:
                assert bool(found) == (ending is not by_rollback), where
            elif found:
                assert "the transaction is committed" in said, where
                held_back += 1
            else:
                assert "is committed" not in said, where
            assert not conn.closed, where
            await tidy(conn)
            assert conn.info.transaction_status == TransactionStatus.IDLE, where
            assert conn.pgconn.pipeline_status == 0, where
            assert conn.info.backend_pid == pid
            points += not trial.completed
        await conn.close()
        prepared = admin.execute("select count(*) from pg_prepared_xacts").fetchone()
        assert prepared == (0,)
    # Without turns a pipeline suspends only where the answers are not there yet: points
    # shift from trial to trial, and the one in COMMIT may be missed.
    assert held_back or ending is by_rollback or (ending is by_pipeline and not turns)
    figures(ending=ending.__name__, points=points, held_back=held_back, failures=0)


@pytest.mark.usefixtures("turns")
@pytest.mark.parametrize(("loop_name", "how"), sweeps())
async def test_leaving_the_connections_block_closes_it_wherever_it_is_cancelled(
    dsn: str, how: Any
) -> None:
    with psycopg.connect(dsn, autocommit=True) as admin:
        admin.execute("create table t (id int)")
        n = 0
        conn: Conn | None = None

        async def work() -> None:
            nonlocal n, conn
            n += 1
            conn = None
            conn = await AsyncConnection.connect(dsn)
            async with conn:
                await conn.execute(INSERT, (n,))

        async for trial in CancelSweep(work, how=how):
            where = f"point {trial.point}: {trial.where}: {trial.exception!r}"
            assert conn is None or conn.closed, where
            found = admin.execute("select 1 from t where id = %s", (n,)).fetchone()
            said = "".join(getattr(trial.exception, "__notes__", []))
            assert bool(found) == (trial.exception is None or "is committed" in said), where
