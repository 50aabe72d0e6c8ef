"""P1 and P2, cancelled at every suspension point: table, state, callbacks and exception agree."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import anyio
import anyio.lowlevel
import psycopg
import pytest
from psycopg.pq import TransactionStatus

from aiopgsafe import AsyncConnection, Transaction, TransactionState
from aiopgsafe.testing import CancelSweep, Delay, FaultProxy, Freeze, Trial, command_complete
from tests.conftest import Figures, sweeps

pytestmark = pytest.mark.anyio

CANCELLATIONS = ("CancelledError", "Cancelled", "TimeoutError")


@dataclass
class Run:
    """What one trial left behind, to be compared with the table."""

    id: int
    tx: Transaction[Any] | None = None
    inner: Transaction[Any] | None = None
    registered: list[str] = field(default_factory=list)
    called: list[str] = field(default_factory=list)

    async def later(self, name: str) -> None:
        await anyio.lowlevel.checkpoint()
        self.called.append(name)


async def transfer(conn: AsyncConnection[Any], run: Run) -> None:
    """Two statements, a savepoint, callbacks of both kinds."""
    async with conn.transaction() as run.tx:
        run.tx.on_commit(run.called.append, "outer")
        run.tx.on_rollback(run.called.append, "undone")
        run.registered += ["outer", "undone"]
        await run.tx.execute("insert into t values (%s, 'outer')", (run.id,))
        async with conn.transaction() as run.inner:
            run.inner.on_commit(run.later, "inner")
            run.registered.append("inner")
            await run.inner.execute("insert into t values (%s, 'inner')", (run.id,))
        await run.tx.execute("update t set what = what || '!' where id = %s", (run.id,))


def check(admin: psycopg.Connection[Any], run: Run, trial: Trial[None]) -> None:
    rows = admin.execute("select what from t where id = %s order by 1", (run.id,)).fetchall()
    committed = bool(rows)
    state = run.tx.state if run.tx is not None else TransactionState.PENDING
    if committed:
        assert rows == [("inner!",), ("outer!",)]
        assert state is TransactionState.COMMITTED
        assert run.called == ["outer", "inner"]
        assert run.inner is not None
        assert run.inner.state is TransactionState.COMMITTED
    else:
        assert state in (TransactionState.ROLLED_BACK, TransactionState.PENDING)
        assert run.called == (["undone"] if "undone" in run.registered else [])
    if trial.exception is None:
        assert committed
    else:
        assert type(trial.exception).__name__ in CANCELLATIONS
        notes = "".join(getattr(trial.exception, "__notes__", []))
        if committed:
            assert "the transaction is committed" in notes
        elif run.registered:
            assert "the transaction is rolled back" in notes


@pytest.mark.usefixtures("turns")
@pytest.mark.parametrize(("loop_name", "how"), sweeps())
@pytest.mark.parametrize("late", [0.0, 0.02], ids=["prompt", "late"])
async def test_nothing_disagrees_wherever_the_transaction_is_cancelled(
    proxy: FaultProxy, dsn: str, how: Any, late: float, figures: Figures
) -> None:
    with psycopg.connect(dsn, autocommit=True) as admin:
        admin.execute("create table t (id int, what text)")
        if late:
            proxy.inject(Delay(late), command_complete("COMMIT"))
        conn = await AsyncConnection.connect(proxy.dsn)
        pid = conn.info.backend_pid
        points, in_commit, run = 0, 0, Run(0)

        def work() -> Any:
            nonlocal run
            run = Run(run.id + 1)
            return transfer(conn, run)

        async for trial in CancelSweep(work, how=how):
            try:
                check(admin, run, trial)
                assert not conn.closed
                assert conn.info.transaction_status == TransactionStatus.IDLE
                cur = await conn.execute("select pg_backend_pid()")
                assert await cur.fetchone() == (pid,)
                await conn.rollback()
            except BaseException as exc:
                exc.add_note(
                    f"cancelled at point {trial.point}: {trial.where}: {trial.exception!r}"
                )
                raise
            points += not trial.completed
            in_commit += (
                run.tx is not None
                and trial.exception is not None
                and (run.tx.state is TransactionState.COMMITTED)
            )
        await conn.close()
    assert in_commit >= 1
    figures(points=points, held_back_in_commit=in_commit, failures=0)


@pytest.mark.usefixtures("turns")
@pytest.mark.parametrize(("loop_name", "how"), sweeps())
async def test_a_commit_that_is_never_answered_is_asked_for(
    proxy: FaultProxy, dsn: str, how: Any, figures: Figures
) -> None:
    """Every run meets a COMMIT whose answer never comes, and asks over another connection."""
    with psycopg.connect(dsn, autocommit=True) as admin:
        admin.execute("create table t (id int, what text)")
        proxy.inject(Freeze(), command_complete("COMMIT"))
        points, asked, run = 0, 0, Run(0)
        timeouts: Any = {"commit_timeout": 0.15, "cancel_timeout": 5.0}
        conn = await AsyncConnection.connect(proxy.dsn, **timeouts)

        async def work() -> None:
            nonlocal run
            run = Run(run.id + 1)
            await transfer(conn, run)

        async for trial in CancelSweep(work, how=how):
            try:
                check(admin, run, trial)
            except BaseException as exc:
                exc.add_note(f"point {trial.point}: {trial.where}: {trial.exception!r}")
                raise
            if conn.closed:
                asked += 1
                conn = await AsyncConnection.connect(proxy.dsn, **timeouts)
            points += not trial.completed
        await conn.close()
    assert asked >= 2  # the point in COMMIT, and the run that nobody cancelled
    figures(points=points, asked=asked, failures=0)


@pytest.mark.usefixtures("turns")
@pytest.mark.parametrize(("loop_name", "how"), sweeps())
async def test_a_frozen_server_leaves_the_outcome_unknown_and_says_so(
    proxy: FaultProxy, dsn: str, how: Any, figures: Figures
) -> None:
    """Nobody answers COMMIT, and nobody can be asked; the connection is closed."""
    with psycopg.connect(dsn, autocommit=True) as admin:
        admin.execute("create table t (id int, what text)")
        proxy.inject(Freeze(), command_complete("COMMIT"))
        points, unknown, run = 0, 0, Run(0)
        conn = await AsyncConnection.connect(proxy.dsn, commit_timeout=0.15, cancel_timeout=0.15)
        proxy.refuse = True

        async def work() -> None:
            nonlocal run
            run = Run(run.id + 1)
            await transfer(conn, run)

        sweep = CancelSweep(work, how=how)
        async for trial in sweep:
            where = f"point {trial.point}: {trial.where}"
            state = run.tx.state if run.tx is not None else TransactionState.PENDING
            if state is TransactionState.UNKNOWN:
                unknown += 1
                assert conn.closed, where
                assert run.called == [], where
                assert trial.exception is not None, where
                said = repr(trial.exception) + "".join(getattr(trial.exception, "__notes__", []))
                assert "unknown" in said.lower(), where
                # It did commit: the server just could not say so.
                count = "select count(*) from t where id = %s"
                assert admin.execute(count, (run.id,)).fetchone() == (2,), where
                proxy.refuse = False
                conn = await AsyncConnection.connect(
                    proxy.dsn, commit_timeout=0.15, cancel_timeout=0.15
                )
                proxy.refuse = True
            else:
                check(admin, run, trial)
                assert not conn.closed, where
                assert conn.info.transaction_status == TransactionStatus.IDLE, where
            points += not trial.completed
        await conn.close()
    assert unknown >= 2  # the point in COMMIT, and the run that nobody cancelled
    figures(points=points, unknown=unknown, failures=0)
