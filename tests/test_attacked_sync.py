"""Sync code: what somebody found who wanted to break it."""

from __future__ import annotations

import copy
import gc
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from types import FrameType
from typing import Any

import psycopg
import pytest
from django.db import connections, transaction
from django.db.transaction import TransactionManagementError

from aiopgsafe import Connection, TransactionState
from aiopgsafe.testing import Delay, FaultProxy, Message, command_complete
from tests.tearing import Stop, handling, see_calls
from tests.test_django import connect, insert

Admin = psycopg.Connection[Any]
IDLE = psycopg.pq.TransactionStatus.IDLE


@pytest.fixture
def conn(dsn: str, admin: Admin) -> Iterator[Connection[Any]]:
    admin.execute("create table t (i int)")
    with Connection.connect(dsn, autocommit=True) as conn:
        with conn.transaction():
            conn.execute("select 1")  # the server's history is known
        yield conn


@pytest.fixture
def wrapper(dsn: str, admin: Admin) -> Iterator[Any]:
    admin.execute("create table t (i int)")
    wrapper = connect(dsn)
    with transaction.atomic():
        insert(0)
    yield wrapper
    wrapper.close()


def ids(admin: Admin) -> list[int]:
    return [i for (i,) in admin.execute("select i from t order by i")]


@contextmanager
def torn_in(function: str, caller: str = "") -> Iterator[None]:
    """A signal comes as that function is called, where Python looks for one; then no more."""

    def see(frame: FrameType) -> None:
        calls = frame.f_back.f_code.co_name if frame.f_back is not None else ""
        if frame.f_code.co_name == function and calls.startswith(caller):
            stop_seeing()
            signal.raise_signal(signal.SIGTERM)

    with handling(Stop):
        stop_seeing = see_calls(see)
        try:
            yield
        except Stop:
            return  # and nobody has it any more, nor the frames that it came through
        finally:
            stop_seeing()
    raise AssertionError(f"{function}() was not called")


@contextmanager
def interrupted_when_waiting(admin: Admin, table: str) -> Iterator[None]:
    """Who wants the table waits for its lock, and is interrupted by a signal."""
    waiting = "select count(*) from pg_locks where not granted"

    def interrupt() -> None:
        while admin.execute(waiting).fetchone() == (0,):
            pass
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)

    with psycopg.connect(admin.info.dsn) as blocker, handling(Stop):
        blocker.execute(f"lock table {table}".encode())
        thread = threading.Thread(target=interrupt)
        thread.start()
        with pytest.raises(Stop):
            yield
        thread.join()


@pytest.mark.parametrize("function", ["_push_block", "_can_wait", "_enter"])
def test_a_signal_while_a_block_is_entered_leaves_nothing_waiting(
    conn: Connection[Any], admin: Admin, function: str
) -> None:
    with torn_in(function), conn.transaction():
        conn.execute("insert into t values (1)")
    called: list[str] = []
    with conn.transaction() as tx:
        conn.execute("insert into t values (2)")
        tx.on_commit(called.append, "a")
    assert tx.state is TransactionState.COMMITTED
    assert called == ["a"]
    with conn.transaction():
        conn.execute("insert into t values (3)")
        with torn_in(function), conn.transaction():
            conn.execute("insert into t values (4)")
    assert ids(admin) == [2, 3]


def test_a_signal_at_the_door_of_an_exit_ends_the_block(
    conn: Connection[Any], admin: Admin
) -> None:
    undone: list[str] = []
    with torn_in("__exit__"), conn.transaction() as tx:
        conn.execute("insert into t values (1)")
        tx.on_rollback(undone.append, "a")
    gc.collect()  # contextlib's own `__exit__()` keeps exceptions in cycles
    assert tx.state is TransactionState.ROLLED_BACK
    assert undone == ["a"]
    with torn_in("__exit__"), conn.transaction():
        conn.execute("insert into t values (1)")
        with conn.transaction():
            conn.execute("insert into t values (2)")
    gc.collect()
    assert conn.pgconn.transaction_status == IDLE
    with conn.transaction():
        conn.execute("insert into t values (3)")
    assert ids(admin) == [3]


def copy_out(conn: Connection[Any]) -> None:
    with (
        conn.cursor() as cur,
        cur.copy("copy (select generate_series(1, 10000)) to stdout") as copy,
    ):
        next(iter(copy))


def copy_in(conn: Connection[Any]) -> None:
    with torn_in("finish"), conn.cursor() as cur, cur.copy("copy t from stdin") as copy:
        copy.write_row((1,))


@pytest.mark.parametrize("left", [copy_out, copy_in])
def test_an_unfinished_copy_ends_with_its_transaction(
    conn: Connection[Any], admin: Admin, left: Callable[[Connection[Any]], None]
) -> None:
    with pytest.raises(psycopg.OperationalError, match="in progress"), conn.transaction():
        conn.execute("insert into t values (1)")
        left(conn)
    conn.autocommit = False
    conn.execute("insert into t values (2)")
    left(conn)
    conn.rollback()
    conn.execute("insert into t values (3)")
    conn.commit()
    assert ids(admin) == [3]


def test_an_unfinished_stream_costs_the_connection_and_no_time(
    conn: Connection[Any], admin: Admin
) -> None:
    with pytest.raises(psycopg.OperationalError, match="closed"), conn.transaction() as tx:
        conn.execute("insert into t values (1)")
        rows = conn.cursor().stream("select generate_series(1, 10000)")
        next(iter(rows))
    assert tx.state is TransactionState.ROLLED_BACK
    assert conn.closed
    del rows
    assert ids(admin) == []


def test_what_was_to_be_prepared_by_an_interrupted_statement_is_not(
    conn: Connection[Any], admin: Admin
) -> None:
    def add(i: int) -> None:
        with conn.transaction():
            conn.execute("insert into t values (%s)", (i,), prepare=True)

    with interrupted_when_waiting(admin, "t"):
        add(1)
    add(2)
    with conn.transaction():
        with interrupted_when_waiting(admin, "t"):
            add(3)
        add(4)
    assert ids(admin) == [2, 4]


@pytest.mark.parametrize("how", ["lost", "closed"])
def test_rollback_says_that_the_connection_is_gone(
    conn: Connection[Any], admin: Admin, how: str
) -> None:
    conn.autocommit = False
    conn.execute("insert into t values (1)")
    if how == "lost":
        admin.execute("select pg_terminate_backend(%s, 5000)", (conn.info.backend_pid,))
    else:
        conn.close()
    for _ in range(2):
        with pytest.raises(psycopg.OperationalError):
            conn.rollback()


def test_a_function_may_be_decorated(conn: Connection[Any], admin: Admin) -> None:
    @conn.transaction()
    def add(i: int, *, fail: bool = False) -> int:
        conn.execute("insert into t values (%s)", (i,))
        if fail:
            raise KeyError
        return i

    assert add(1) == 1
    with pytest.raises(KeyError):
        add(2, fail=True)
    with conn.transaction():
        assert add(3) == 3
    assert ids(admin) == [1, 3]


def test_who_does_not_enter_a_block_does_not_end_it(conn: Connection[Any], admin: Admin) -> None:
    block, other = conn.transaction(), conn.transaction()
    with block:
        conn.execute("insert into t values (1)")
        with pytest.raises(TypeError, match="only once"), block:
            pass
        copy.copy(block)
        with pytest.raises(psycopg.ProgrammingError, match="not entered"):
            other.__exit__(None, None, None)
        assert not other.__exit__(KeyError, KeyError(), None)
        conn.execute("insert into t values (2)")
    assert ids(admin) == [1, 2]


@pytest.mark.parametrize("autocommit", [True, False])
def test_what_is_inside_a_block_that_has_ended_is_not_committed_on_its_own(
    conn: Connection[Any], admin: Admin, autocommit: bool
) -> None:
    def block() -> Iterator[None]:
        with conn.transaction():
            yield

    conn.autocommit = autocommit
    outer = block()
    next(outer)
    with pytest.raises(psycopg.OperationalError, match="ended before"), conn.transaction():
        conn.execute("insert into t values (1)")
        with pytest.raises(psycopg.transaction.OutOfOrderTransactionNesting):
            outer.close()  # type: ignore[attr-defined]
        with pytest.raises(psycopg.OperationalError, match="ended before"):
            conn.execute("insert into t values (2)")
    conn.rollback()
    with conn.transaction():
        conn.execute("insert into t values (3)")
    assert ids(admin) == [3]


def test_another_thread_s_rollback_is_waited_for(proxy: FaultProxy, admin: Admin) -> None:
    begun = threading.Event()

    def seen(message: Message) -> bool:
        if is_rolled_back(message):
            begun.set()
        return is_rolled_back(message)

    is_rolled_back = command_complete("ROLLBACK")
    proxy.inject(Delay(0.1), seen)
    with Connection.connect(proxy.dsn) as conn:
        conn.execute("select 1")
        thread = threading.Thread(target=conn.rollback)
        thread.start()
        begun.wait(10)
        conn.rollback()
        thread.join()
        assert not conn.closed


def test_executemany_torn_at_its_beginning_ends_with_the_block(
    conn: Connection[Any], admin: Admin
) -> None:
    query = "insert into t values (%s)"
    # psycopg asserts that the pipeline has ended.
    torn = torn_in("__exit__", "_pipeline_nolock")
    with suppress(AssertionError), torn, conn.transaction():
        conn.cursor().executemany(query, [(1,), (2,)])
    conn.execute(query, (3,))
    assert ids(admin) == [3]


# Django


@pytest.mark.parametrize(
    ("function", "caller"), [("__exit__", "set_autocommit"), ("savepoint", "")]
)
def test_a_signal_while_atomic_is_entered_leaves_autocommit_as_it_was(
    wrapper: Any, admin: Admin, function: str, caller: str
) -> None:
    with torn_in(function, caller), transaction.atomic(), transaction.atomic():
        insert(1)
    assert wrapper.autocommit
    assert wrapper.connection.autocommit
    insert(2)
    with transaction.atomic():
        insert(3)
    assert ids(admin) == [0, 2, 3]


def test_a_signal_at_the_door_of_an_inner_exit_ends_with_the_outer_one(
    wrapper: Any, admin: Admin
) -> None:
    called: list[str] = []
    with torn_in("leave"), transaction.atomic():
        insert(1)
        with transaction.atomic():
            insert(2)
    insert(3)
    with pytest.raises(TransactionManagementError, match="never left"), transaction.atomic():
        insert(4)
        with torn_in("leave"), transaction.atomic():
            insert(5)
    with transaction.atomic():
        insert(6)
        transaction.on_commit(partial(called.append, "a"))
    assert called == ["a"]
    assert ids(admin) == [0, 3, 6]


def test_an_exception_of_ones_own_goes_through_though_the_connection_is_lost(
    wrapper: Any, admin: Admin
) -> None:
    with pytest.raises(KeyError), transaction.atomic():
        insert(1)
        pid = wrapper.connection.info.backend_pid
        admin.execute("select pg_terminate_backend(%s, 5000)", (pid,))
        raise KeyError
    assert wrapper.get_autocommit()
    insert(2)
    assert ids(admin) == [0, 2]


def test_a_time_limit_leaves_a_usable_connection(wrapper: Any, admin: Admin) -> None:
    for i in (1, 2):
        with interrupted_when_waiting(admin, "t"), transaction.atomic():
            insert(i)
        with transaction.atomic():
            insert(10 * i)
    assert not connections["default"].closed_in_transaction
    assert ids(admin) == [0, 10, 20]


def test_blocks_of_generators_may_be_left_out_of_order(wrapper: Any, admin: Admin) -> None:
    called: list[int] = []

    def block(i: int) -> Iterator[None]:
        with transaction.atomic():
            for j in range(2):
                insert(10 * i + j)
                yield
            transaction.on_commit(partial(called.append, i))

    for _ in zip(block(1), block(2), strict=True):
        pass
    assert called == [1, 2]
    assert ids(admin) == [0, 10, 11, 20, 21]


def test_a_decorated_function_that_calls_itself_may_be_torn(wrapper: Any, admin: Admin) -> None:
    @transaction.atomic  # type: ignore[untyped-decorator]
    def call(i: int) -> None:
        insert(i)
        if i < 3:
            call(i + 1)

    with torn_in("leave"):
        call(1)
    assert not wrapper.in_atomic_block
    with transaction.atomic():
        insert(4)
    assert ids(admin) == [0, 4]
