"""Ends of sync code where there is no stack left, nothing works, or others' functions raise."""

from __future__ import annotations

import inspect
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import psycopg
import pytest
from django.core.exceptions import ImproperlyConfigured
from django.db import IntegrityError, transaction

import aiopgsafe
from aiopgsafe import Connection, TransactionState
from aiopgsafe._errors import chain_of, foremost
from aiopgsafe._sync_ending import Ending, Exchange
from aiopgsafe._sync_section import Calls
from aiopgsafe.django._atomic import Leaving
from aiopgsafe.testing import FaultProxy
from tests.tearing import Stop, Tear, TimeLimit, handling, ignore_unraisable, see_calls
from tests.test_django import connect, ids, insert

Admin = psycopg.Connection[Any]
IDLE = psycopg.pq.TransactionStatus.IDLE
PACKAGE = str(Path(aiopgsafe.__file__).parent)


@pytest.fixture
def conn(dsn: str, admin: Admin) -> Iterator[Connection[Any]]:
    admin.execute("create table t (i int)")
    with Connection.connect(dsn, autocommit=True) as conn:
        yield conn


@pytest.fixture
def wrapper(dsn: str, admin: Admin) -> Iterator[Any]:
    admin.execute("create table t (i int)")
    wrapper = connect(dsn)
    wrapper.ensure_connection()
    yield wrapper
    wrapper.close()


def deeper(frames: int, fn: Callable[[], None]) -> None:
    if frames:
        deeper(frames - 1, fn)
    else:
        fn()


def near_the_limit(fn: Callable[[], None], check: Callable[[list[str] | None], None]) -> None:
    """Call `fn` with ever more of the stack left: it raises first, and does not in the end.

    :param check: takes the notes of what it has raised, of which nothing else is left.
    """
    limit = sys.getrecursionlimit()
    seen = []
    for left in range(80):
        notes = None
        try:
            deeper(limit - len(inspect.stack(0)) - left, fn)
        except RecursionError as exc:
            notes = [*getattr(exc, "__notes__", ())]
        assert sys.getrecursionlimit() == limit
        check(notes)
        seen.append(notes)
    assert seen[0] is not None
    assert seen[-1] is None


COMMITTED = "aiopgsafe: the transaction is committed"


def nested(conn: Connection[Any]) -> None:
    with conn.transaction():
        conn.execute("insert into t values (1)")


def alone(conn: Connection[Any]) -> None:
    conn.execute("insert into t values (1)")


@pytest.mark.parametrize("work", [alone, nested])
def test_an_end_that_has_no_stack_left_leaves_nothing(
    conn: Connection[Any], admin: Admin, work: Callable[[Connection[Any]], None]
) -> None:
    called: list[str] = []

    def block() -> None:
        with conn.transaction() as tx:
            work(conn)
            tx.on_commit(called.append, "a")

    with handling(Stop) as send:  # which sees that the handler is there afterwards

        def check(notes: list[str] | None) -> None:
            assert not conn._blocks
            assert not conn.lock.locked()
            assert conn.pgconn.transaction_status == IDLE
            there = ids(admin) == [1]
            assert there == bool(called)
            assert there == (notes is None or COMMITTED in notes)
            with pytest.raises(Stop):
                send()
            called.clear()
            admin.execute("truncate t")

        near_the_limit(block, check)


def test_nor_does_djangos(wrapper: Any, admin: Admin) -> None:
    called: list[int] = []

    def block() -> None:
        with transaction.atomic():
            insert(1)
            transaction.on_commit(partial(called.append, 1))

    with handling(Stop) as send:

        def check(notes: list[str] | None) -> None:
            committed = notes is None or COMMITTED in notes
            assert not wrapper.in_atomic_block
            assert wrapper.autocommit
            with transaction.atomic():
                insert(2)
                transaction.on_commit(partial(called.append, 2))
            # A callback for whose call no stack was left has raised.
            assert called == ids(admin) or (called == [2] and notes)
            assert ids(admin) == ([1, 2] if committed else [2])
            with pytest.raises(Stop):
                send()
            called.clear()
            admin.execute("truncate t")

        near_the_limit(block, check)


def fail(self: object, *args: object) -> None:
    raise KeyError("ours")


def test_an_end_that_fails_for_good_closes_the_connection_and_says_so(
    conn: Connection[Any], admin: Admin, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[str] = []
    with handling(Stop) as send:
        with pytest.raises(KeyError, match="ours") as raised, conn.transaction() as tx:
            conn.execute("insert into t values (1)")
            tx.on_commit(called.append, "a")
            tx.on_rollback(called.append, "b")
            monkeypatch.setattr(Ending, "_verdict", fail)
        with pytest.raises(Stop):
            send()
    assert raised.value.__notes__ == ["aiopgsafe: the transaction is unknown"]
    assert (tx.state, tx.status) == (TransactionState.UNKNOWN, tx.Status.FAILED)
    assert conn.closed
    assert not conn.lock.locked()
    assert not conn._blocks
    assert called == []


def test_a_signal_that_waited_for_such_an_end_is_not_lost(
    proxy: FaultProxy, admin: Admin, monkeypatch: pytest.MonkeyPatch
) -> None:
    def send_and_fail(self: object, *args: object) -> None:
        if not sent:
            sent.append("SIGTERM")
            signal.raise_signal(signal.SIGTERM)
        raise KeyError("ours")

    sent: list[str] = []
    with handling(Stop), Connection.connect(proxy.dsn, autocommit=True) as conn:
        with pytest.raises(Stop), conn.transaction():
            conn.execute("select 1")
            monkeypatch.setattr(Ending, "_end", send_and_fail)
        assert conn.closed


def test_an_exit_of_djangos_that_fails_for_good_leaves_the_block(
    wrapper: Any, admin: Admin, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[int] = []
    with handling(Stop) as send:
        with pytest.raises(KeyError, match="ours"), transaction.atomic():
            insert(1)
            transaction.on_commit(partial(called.append, 1))
            monkeypatch.setattr(Leaving, "_step", fail)
        monkeypatch.undo()
        with pytest.raises(Stop):
            send()
    assert wrapper.connection is None
    with transaction.atomic():
        insert(2)
        transaction.on_commit(partial(called.append, 2))
    assert (ids(admin), called) == ([2], [2])


def test_handlers_of_notifications_that_raise_in_commit_are_all_called(
    conn: Connection[Any], admin: Admin
) -> None:
    told: list[str] = []
    called: list[str] = []

    def handler(notify: psycopg.Notify) -> None:
        told.append(notify.payload)
        raise KeyError(notify.payload)

    conn.execute("listen c")
    conn.add_notify_handler(handler)
    with handling(Stop), pytest.raises(KeyError, match="0") as raised, conn.transaction() as tx:
        tx.on_commit(called.append, "a")
        for i in range(60):
            conn.execute("select pg_notify('c', %s)", (str(i),))
    assert told == [str(i) for i in range(60)]
    assert raised.value.__notes__ == [COMMITTED]
    assert (tx.state, called) == (TransactionState.COMMITTED, ["a"])
    assert not conn.lock.locked()


def test_a_block_that_was_left_runs_nothing_when_it_is_let_go(conn: Connection[Any]) -> None:
    """What a signal's handler raises in a finaliser is lost."""
    with conn.transaction():  # a savepoint is left as well
        block = conn.transaction()
        with block:
            conn.execute("select 1")
        undone = conn.transaction()
        with suppress(KeyError), undone:
            raise KeyError
    outermost = conn.transaction()
    with outermost:
        conn.execute("select 1")
    seen: list[str] = []
    stop = see_calls(lambda frame: seen.append(frame.f_code.co_filename))
    del block, undone, outermost
    stop()
    assert [name for name in seen if name.startswith(PACKAGE)] == []


@pytest.mark.parametrize("end", [KeyError("own"), psycopg.Rollback()], ids=["error", "Rollback"])
def test_what_a_savepoints_callbacks_raise_hides_nothing(
    conn: Connection[Any], end: Exception
) -> None:
    called: list[str] = []

    def inner() -> None:
        with conn.transaction() as savepoint:
            savepoint.on_rollback(fail, None)
            savepoint.on_rollback(called.append, "a")
            raise end

    with conn.transaction():
        conn.execute("insert into t values (1)")
        if isinstance(end, KeyError):
            with pytest.raises(KeyError, match="own") as raised:
                inner()
            assert "1 callback(s) failed" in raised.value.__notes__[0]
        else:
            with pytest.raises(ExceptionGroup, match="callbacks failed"):
                inner()
    assert called == ["a"]
    assert ids(conn) == [1]


def test_a_savepoint_that_is_let_go_is_left_whatever_its_callbacks_raise(
    conn: Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "unraisablehook", ignore_unraisable)
    with conn.transaction():
        conn.execute("insert into t values (1)")
        block = conn.transaction()
        block.__enter__().on_rollback(fail, None)
        conn.execute("insert into t values (2)")
        del block
        conn.execute("insert into t values (3)")
    assert ids(conn) == [1, 3]


def test_a_signal_between_two_callbacks_of_a_savepoint_loses_none(
    conn: Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[str] = []
    places = 0
    while len(called) == 2 * places:
        places += 1
        tear = Tear(places, partial(signal.raise_signal, signal.SIGTERM), None, __file__)
        call_all = Calls.call_all

        def torn(calls: Calls, tear: Tear = tear, call_all: Any = call_all) -> None:
            if tear.count:  # called again
                call_all(calls)
                return
            tear.start()
            try:
                call_all(calls)
            finally:
                tear.stop()

        with monkeypatch.context() as patch, handling(Stop), suppress(Stop, KeyError):
            patch.setattr(Calls, "call_all", torn)
            with conn.transaction(), conn.transaction() as savepoint:
                savepoint.on_rollback(called.append, "a")
                savepoint.on_rollback(called.append, "b")
                conn.execute("select 1")
                raise KeyError
        if not tear.where:
            break
    assert places > 20
    assert called == ["a", "b"] * places


def test_a_closed_connection_calls_all_that_waited_for_the_rollback(dsn: str) -> None:
    called: list[str] = []
    conn = Connection.connect(dsn)
    conn.execute("select 1")
    with conn.transaction() as tx:
        tx.on_rollback(fail, None)
        tx.on_rollback(called.append, "a")
    with pytest.raises(ExceptionGroup, match="callbacks failed"):
        conn.close()
    assert (tx.state, called) == (TransactionState.ROLLED_BACK, ["a"])


def test_a_rollback_in_a_pipeline_calls_back(dsn: str) -> None:
    called: list[str] = []
    with Connection.connect(dsn) as conn:
        conn.execute("select 1")
        with conn.transaction() as tx:
            tx.on_rollback(called.append, "a")
        with conn.pipeline():
            conn.execute("select 1")
            conn.rollback()
        assert (tx.state, called) == (TransactionState.ROLLED_BACK, ["a"])


def test_callbacks_of_a_two_phase_transaction_are_refused(dsn: str) -> None:
    with Connection.connect(dsn) as conn:
        conn.tpc_begin("x")
        with conn.transaction() as tx:
            for register in (tx.on_commit, tx.on_rollback):
                with pytest.raises(psycopg.NotSupportedError, match="two-phase"):
                    register(print)
        conn.tpc_rollback()


@pytest.mark.parametrize("pooled", [False, True], ids=["own", "pooled"])
def test_a_connection_whose_commit_raises_is_closed_by_its_with(dsn: str, pooled: bool) -> None:
    conn = Connection.connect(dsn)
    if pooled:
        conn._pool = object()
    with pytest.raises(psycopg.errors.UniqueViolation), conn:
        conn.execute("create temporary table t (i int unique deferrable initially deferred)")
        conn.execute("insert into t values (1), (1)")
    assert conn.closed is not pooled
    conn.close()


@pytest.mark.parametrize("value", [-1, "10", None])
def test_a_timeout_that_is_none_names_the_setting(dsn: str, value: Any) -> None:
    wrapper = connect(dsn, commit_timeout=value)
    with pytest.raises(ImproperlyConfigured, match="OPTIONS of database 'default': commit_timeout"):
        wrapper.ensure_connection()


def test_a_torn_commit_by_hand_keeps_its_callbacks(
    wrapper: Any, admin: Admin, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[int] = []
    transaction.set_autocommit(False)
    with handling(Stop) as send, pytest.raises(Stop):
        commit = wrapper._commit
        monkeypatch.setattr(wrapper, "_commit", lambda: (commit(), send()))
        try:
            with transaction.atomic():
                insert(1)
                transaction.on_commit(partial(called.append, 1))
            transaction.commit()
        except BaseException:
            transaction.rollback()
            raise
        finally:
            transaction.set_autocommit(True)
    assert (ids(admin), called) == ([1], [1])
    assert wrapper.run_on_commit == []


def test_and_no_others(wrapper: Any, admin: Admin, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[int] = []

    def work(i: int) -> None:
        with transaction.atomic():
            insert(i)
            transaction.on_commit(partial(called.append, i))

    transaction.set_autocommit(False)
    work(1)
    commit = wrapper._commit
    with monkeypatch.context() as patch, handling(Stop) as send, pytest.raises(Stop):
        patch.setattr(wrapper, "_commit", lambda: (commit(), send()))
        transaction.commit()
    work(2)
    transaction.rollback()
    transaction.set_autocommit(True)
    assert (ids(admin), called) == ([1], [1])


def test_a_signal_while_an_interrupted_statement_is_cancelled_comes_out(
    conn: Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    rest = conn._come_to_rest

    def limit(signum: int, frame: FrameType | None) -> None:
        raise TimeLimit

    def stopped_meanwhile() -> None:
        send()
        rest()

    monkeypatch.setattr(conn, "_come_to_rest", stopped_meanwhile)
    before = signal.signal(signal.SIGALRM, limit)
    try:
        with handling(Stop) as send:
            signal.setitimer(signal.ITIMER_REAL, 0.1)
            with pytest.raises(Stop) as caught:
                conn.execute("select pg_sleep(60)")
    finally:
        signal.signal(signal.SIGALRM, before)
    assert isinstance(caught.value.__context__, TimeLimit)
    assert conn.execute("select 1").fetchone() == (1,)


def raised_in_handling(exc: BaseException) -> list[type[BaseException]]:
    return [type(before) for before in chain_of(exc)]


def test_what_stops_the_program_goes_before_an_error(conn: Connection[Any], admin: Admin) -> None:
    def handler(notify: psycopg.Notify) -> None:
        send()
        raise KeyError("of a handler")

    conn.execute("listen c")
    conn.add_notify_handler(handler)
    with handling(Stop) as send, pytest.raises(Stop) as caught, conn.transaction():
        conn.execute("insert into t values (1)")
        conn.execute("notify c")
    assert raised_in_handling(caught.value) == [Stop, KeyError]
    assert caught.value.__notes__ == [COMMITTED]
    assert ids(admin) == [1]


def test_a_signal_is_not_lost_for_a_commit_of_djangos_that_fails(
    wrapper: Any, admin: Admin, monkeypatch: pytest.MonkeyPatch
) -> None:
    def send_and_go_on(self: Exchange, *args: Any) -> None:
        send()
        go_on(self, *args)

    admin.execute("alter table t add unique (i) deferrable initially deferred")
    go_on = Exchange.go_on
    with handling(Stop) as send, pytest.raises(Stop) as caught, transaction.atomic():
        insert(1)
        insert(1)
        monkeypatch.setattr(Exchange, "go_on", send_and_go_on)
    assert IntegrityError in raised_in_handling(caught.value)
    monkeypatch.undo()
    with transaction.atomic():
        insert(2)
    assert ids(admin) == [2]


def test_of_several_exceptions_none_is_forgotten() -> None:
    error, stop, late = KeyError(), Stop(), SystemExit()
    stop.__context__ = before = ValueError()
    first = foremost(None, error, stop, late)
    assert first is stop
    assert [*chain_of(stop)] == [stop, before, error, late]
    assert foremost(late, stop) is late  # which was behind it
    assert [*chain_of(late)] == [late, stop, before, error]
    closed = GeneratorExit()
    assert foremost(error, closed) is error
    assert foremost(None, None) is None
