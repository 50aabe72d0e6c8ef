"""Sync code: exceptions at every bytecode of an end, in the main thread and in another."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest

from aiopgsafe import Connection, TransactionState
from aiopgsafe._sync_ending import Ending
from tests.conftest import Figures
from tests.tearing import WAYS, Stop, Tear, TimeLimit, ignore_unraisable, lies

Admin = psycopg.Connection[Any]
IDLE = psycopg.pq.TransactionStatus.IDLE


class Trial:
    """One transaction, and what became of it."""

    def __init__(self, conn: Connection[Any], admin: Admin) -> None:
        self.conn = conn
        self.admin = admin
        self.called: list[str] = []
        self.undone: list[str] = []
        self.raised: BaseException | None = None
        self.state = TransactionState.ACTIVE

    def run(self, work: Callable[[Trial, Tear], None], tear: Tear) -> None:
        try:
            work(self, tear)
        except BaseException as exc:
            # Torn at its very first bytecode, `__exit__()` ends the block when nobody has its
            # frame any more, as psycopg's does.
            self.raised = exc.with_traceback(None)
        finally:
            tear.stop()

    def faults(self, exc: type[BaseException]) -> list[str]:
        """What must not be."""
        conn = self.conn
        there = self.admin.execute("select count(*) from t").fetchone() == (1,)
        faults = lies(there, self.called, self.raised)
        if self.raised is not None and not isinstance(self.raised, (exc, KeyError)):
            faults.append(f"raised {self.raised!r}")
        notes = getattr(self.raised, "__notes__", ())
        if any("committed" in note for note in notes) and not there:
            faults.append(f"noted {notes}")
        if conn.closed or conn.pgconn.transaction_status != IDLE or conn._blocks:
            faults.append(f"left {conn}")
        if conn.lock.locked():
            faults.append("left the lock")
        return faults


def by_block(trial: Trial, tear: Tear) -> None:
    with trial.conn.transaction() as tx:
        tx.execute("insert into t values (1)")
        tx.on_commit(trial.called.append, "a")
        tx.on_commit(trial.called.append, "b")
        tx.on_rollback(trial.undone.append, "c")
        tear.start()


def by_block_that_raises(trial: Trial, tear: Tear) -> None:
    with trial.conn.transaction() as tx:
        tx.execute("insert into t values (1)")
        tx.on_commit(trial.called.append, "a")
        tear.start()
        raise KeyError


def by_commit(trial: Trial, tear: Tear) -> None:
    trial.conn.execute("insert into t values (1)")
    trial.called += ["a", "b"]  # there are no callbacks
    tear.start()
    try:
        trial.conn.commit()
    except BaseException as exc:
        tear.stop()
        if trial.conn.pgconn.transaction_status != IDLE:  # it was not sent
            trial.called.clear()
            trial.conn.rollback()
        elif not any("committed" in note for note in getattr(exc, "__notes__", ())):
            # It came when all was over: `commit()` was about to return.
            assert trial.admin.execute("select count(*) from t").fetchone() == (1,)
        tear.start()
        raise


def by_rollback(trial: Trial, tear: Tear) -> None:
    trial.conn.execute("insert into t values (1)")
    tear.start()
    try:
        trial.conn.rollback()
    except BaseException:
        tear.stop()
        if trial.conn.pgconn.transaction_status != IDLE:  # it had not begun
            trial.conn.rollback()
        tear.start()
        raise
    raise KeyError


class Sweep:
    """A trial for each bytecode."""

    def __init__(self, dsn: str, admin: Admin) -> None:
        self.dsn = dsn
        self.admin = admin
        self.tried = self.committed = 0
        self.faults: list[str] = []

    def connect(self) -> Connection[Any]:
        conn = Connection.connect(self.dsn)
        conn.execute("select 1")
        conn.commit()
        return conn

    def run(
        self,
        work: Callable[[Trial, Tear], None],
        way: str,
        exc: type[BaseException],
        again: int | None,
        step: int = 1,
        *,
        looks: bool = False,
    ) -> None:
        conn = self.connect()
        trial = Trial(conn, self.admin)
        at = 0
        while True:
            with WAYS[way](exc) as happens:
                self.admin.execute("truncate t")
                tear = Tear(at, happens, again if at else None, __file__, looks=looks)
                TEARS[threading.get_ident()] = tear
                trial = Trial(conn, self.admin)
                trial.run(work, tear)
            assert sys.exception() is None, f"still handled after {tear.where}"
            if at and not tear.where:
                break
            if at:  # the first one only warms up
                self.tried += 1
                there = self.admin.execute("select count(*) from t").fetchone() == (1,)
                self.committed += there
                if faults := trial.faults(exc):
                    self.faults.append(f"{tear.where}: {faults}")
            if conn.closed or conn._blocks or conn.pgconn.transaction_status != IDLE:
                conn.close()
                conn = self.connect()
                self.admin.execute("truncate t")
                Trial(conn, self.admin).run(work, Tear(0, happens, None, __file__))
            at += step
        conn.close()

    def check(self, figures: Figures) -> None:
        figures(tried=self.tried, committed=self.committed, faults=len(self.faults))
        assert self.faults == []


TEARS: dict[int, Tear] = {}


@pytest.fixture
def sweep(dsn: str, admin: Admin, monkeypatch: pytest.MonkeyPatch) -> Iterator[Sweep]:
    admin.execute("create table t (i int)")
    torn = Ending.torn

    def torn_again(ending: Ending, exc: BaseException) -> None:
        TEARS[threading.get_ident()].start_again()
        torn(ending, exc)

    monkeypatch.setattr(Ending, "torn", torn_again)
    monkeypatch.setattr(sys, "unraisablehook", ignore_unraisable)
    yield Sweep(dsn, admin)
    TEARS.clear()


def by_program(trial: Trial, tear: Tear) -> None:
    """Not the end only: entering, statements, and a savepoint."""
    conn = trial.conn
    tear.start()
    with conn.transaction() as tx:
        tx.execute("insert into t values (1)")
        tx.on_commit(trial.called.append, "a")
        with conn.transaction("s"):
            conn.execute("insert into t values (2)")
        with conn.transaction():
            tx.on_commit(trial.called.append, "b")
            conn.execute("delete from t where i = %s", (2,))


WORKS = [by_block, by_block_that_raises, by_commit, by_rollback]
AGAIN = [1, 2, 5, 20, 100]


@pytest.mark.parametrize("exc", [Stop, TimeLimit])
@pytest.mark.parametrize("way", ["signal", "exception"])
@pytest.mark.parametrize("work", WORKS)
def test_nothing_tears_an_end(
    sweep: Sweep,
    work: Callable[[Trial, Tear], None],
    way: str,
    exc: type[BaseException],
    figures: Figures,
    long: bool,
) -> None:
    # A CI run has all places of the end that matters most, and some of the others.
    all_of_them = long or (work is by_block and exc is TimeLimit and way == "exception")
    sweep.run(work, way, exc, None, 1 if all_of_them else 11)
    sweep.check(figures)


@pytest.mark.parametrize("again", AGAIN)
@pytest.mark.parametrize("way", ["signal", "exception"])
@pytest.mark.parametrize("work", [by_block, by_block_that_raises])
def test_nor_do_two_that_come_one_after_the_other(
    sweep: Sweep,
    work: Callable[[Trial, Tear], None],
    way: str,
    again: int,
    figures: Figures,
    long: bool,
) -> None:
    sweep.run(work, way, TimeLimit, again, 1 if long else 17)
    sweep.check(figures)


@pytest.mark.parametrize("again", [None, 1, 5])
@pytest.mark.parametrize("way", ["signal", "exception"])
def test_nor_is_anything_left_of_a_program_that_is_torn_anywhere(
    sweep: Sweep, way: str, again: int | None, figures: Figures, long: bool
) -> None:
    sweep.run(by_program, way, Stop, again, 1 if long else 7, looks=True)
    sweep.check(figures)


@pytest.mark.parametrize("again", [None, *AGAIN])
def test_nor_in_another_thread(
    sweep: Sweep, again: int | None, figures: Figures, long: bool
) -> None:
    errors: list[BaseException] = []

    def run() -> None:
        try:
            sweep.run(by_block, "exception", TimeLimit, again, 1 if long else 17)
        except BaseException as exc:
            errors.append(exc)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert errors == []
    sweep.check(figures)
