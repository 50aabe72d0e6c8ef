"""`Connection`: psycopg's, in sync code."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from time import monotonic, sleep
from typing import Any

import psycopg
import psycopg_pool
import pytest
from psycopg import IsolationLevel, pq
from psycopg.rows import dict_row

from aiopgsafe import (
    CommitRolledBack,
    CommitUnknown,
    Connection,
    ConnectionReleased,
    Rollback,
    TransactionState,
    safe_to_retry,
)
from aiopgsafe._tools.tokens import CREATE
from aiopgsafe.testing import Cut, Delay, FaultProxy, Freeze, Message, command_complete
from tests.tearing import Stop, handling

Admin = psycopg.Connection[Any]
COMMITTED, ROLLED_BACK = TransactionState.COMMITTED, TransactionState.ROLLED_BACK
UNKNOWN = TransactionState.UNKNOWN
IDLE = pq.TransactionStatus.IDLE


@pytest.fixture
def conn(proxy: FaultProxy, admin: Admin) -> Iterator[Connection[Any]]:
    admin.execute("create table t (i int primary key deferrable initially deferred)")
    with Connection.connect(proxy.dsn, commit_timeout=5) as conn:
        with conn.transaction():
            conn.execute("select 1")  # the server's history is known
        yield conn


def ids(admin: Admin) -> list[int]:
    return [i for (i,) in admin.execute("select i from t order by i")]


def test_blocks_savepoints_and_callbacks(conn: Connection[Any], admin: Admin) -> None:
    called: list[str] = []
    with conn.transaction() as tx:
        tx.execute("insert into t values (1)")
        tx.on_commit(called.append, "outer")
        with pytest.raises(KeyError), conn.transaction() as inner:
            inner.execute("insert into t values (2)")
            inner.on_commit(called.append, "never")
            inner.on_rollback(called.append, "undone")
            raise KeyError
        assert inner.state is ROLLED_BACK
        with conn.transaction() as inner:
            inner.execute("insert into t values (3)")
            inner.on_commit(called.append, "inner")
        with conn.transaction(force_rollback=True):
            conn.execute("insert into t values (4)")
        with conn.transaction():
            conn.execute("insert into t values (5)")
            raise Rollback
        assert called == ["undone"]
        assert tx.xid is not None
    assert tx.state is COMMITTED
    assert inner.state is COMMITTED
    assert called == ["undone", "outer", "inner"]
    assert ids(admin) == [1, 3]
    with conn.transaction(), conn.transaction(), conn.transaction():
        pass
    assert conn.info.transaction_status == IDLE


def test_begin_rides_and_an_empty_block_sends_nothing(
    conn: Connection[Any], proxy: FaultProxy
) -> None:
    proxy.reset_stats()
    with conn.transaction():
        pass
    assert proxy.stats.round_trips == 0
    with conn.transaction():
        conn.execute("insert into t values (1)")
    assert proxy.stats.round_trips == 2


def test_commit_and_rollback_without_a_block(conn: Connection[Any], admin: Admin) -> None:
    conn.execute("insert into t values (1)")
    conn.commit()
    conn.execute("insert into t values (2)")
    conn.rollback()
    conn.commit()
    assert ids(admin) == [1]
    with pytest.raises(psycopg.ProgrammingError, match="forbidden"), conn.transaction():
        conn.commit()
    with pytest.raises(psycopg.ProgrammingError, match="forbidden"), conn.transaction():
        conn.rollback()
    assert conn.info.transaction_status == IDLE


def test_what_is_not_committed_says_so(conn: Connection[Any], admin: Admin) -> None:
    undone: list[str] = []
    with pytest.raises(CommitRolledBack), conn.transaction() as tx:
        tx.on_rollback(undone.append, "a")
        with pytest.raises(psycopg.Error):
            tx.execute("select nonsense")
    assert tx.state is ROLLED_BACK
    with pytest.raises(psycopg.errors.UniqueViolation), conn.transaction() as tx:
        tx.execute("insert into t values (1), (1)")
        tx.on_rollback(undone.append, "b")
    assert tx.state is ROLLED_BACK
    with pytest.raises(CommitUnknown, match="ended its transaction"), conn.transaction() as tx:
        tx.execute("commit")
    assert tx.state is UNKNOWN
    assert undone == ["a", "b"]
    assert conn.info.transaction_status == IDLE
    assert ids(admin) == []


def test_errors_of_callbacks_come_together(conn: Connection[Any], admin: Admin) -> None:
    called: list[str] = []

    def fail() -> None:
        raise KeyError

    with pytest.raises(ExceptionGroup) as caught, conn.transaction() as tx:
        tx.execute("insert into t values (1)")
        tx.on_commit(fail)
        tx.on_commit(called.append, "a")
        tx.on_commit(fail)
    assert len(caught.value.exceptions) == 2
    assert called == ["a"]
    assert ids(admin) == [1]

    async def coroutine() -> None: ...

    with conn.transaction() as tx:
        with pytest.raises(TypeError, match="plain function"):
            tx.on_commit(coroutine)
        with pytest.raises(TypeError, match="takes a function"):
            tx.on_commit(1)  # type: ignore[arg-type]
    with pytest.raises(psycopg.ProgrammingError, match="inside the block"):
        tx.on_commit(fail)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_commit_whose_answer_is_lost_is_asked_for(
    conn: Connection[Any], proxy: FaultProxy, admin: Admin, when: Any
) -> None:
    called: list[str] = []
    if when == "after":  # the server has committed
        proxy.inject(Cut("rst"), command_complete("COMMIT"), times=1)
    else:
        proxy.inject(Cut("rst"), lambda m: m.type == "Q" and b"COMMIT" in m.payload, times=1)
    raised: BaseException | None = None
    try:
        with conn.transaction() as tx:
            tx.execute("insert into t values (1)")
            tx.on_commit(called.append, "a")
    except psycopg.OperationalError as exc:
        raised = exc
    if when == "after":
        assert raised is None
        assert (tx.state, called, ids(admin)) == (COMMITTED, ["a"], [1])
    else:
        assert raised is not None
        assert safe_to_retry(raised)
        assert (tx.state, called, ids(admin)) == (ROLLED_BACK, [], [])


def test_a_token_decides_where_it_is_wanted(proxy: FaultProxy, admin: Admin) -> None:
    admin.execute(CREATE.encode() if isinstance(CREATE, str) else CREATE)
    admin.execute("create table t (i int)")
    with Connection.connect(proxy.dsn, commit_token=True) as conn:
        proxy.inject(Cut("rst"), command_complete("COMMIT"), times=1)
        with conn.transaction() as tx:
            tx.execute("insert into t values (1)")
        assert tx.state is COMMITTED


def test_a_server_that_does_not_answer_costs_a_bounded_time(
    conn: Connection[Any], proxy: FaultProxy
) -> None:
    conn.commit_timeout = 0.3
    frozen = proxy.inject(Freeze(), command_complete("COMMIT"))
    before = monotonic()
    with pytest.raises(CommitUnknown), conn.transaction() as tx:
        tx.execute("select 1")
    assert tx.state is UNKNOWN
    assert monotonic() - before < 10
    assert conn.closed
    frozen.release()


def test_a_statement_that_a_signal_interrupts_is_cancelled_on_the_server(
    conn: Connection[Any], admin: Admin
) -> None:
    sender = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM))
    sender.start()
    with handling(Stop), pytest.raises(Stop), conn.transaction():
        conn.execute("insert into t values (1)")
        conn.execute("select pg_sleep(60)")
    sender.join()
    assert not conn.closed
    assert conn.execute("select 1").fetchone() == (1,)
    conn.rollback()
    running = "select count(*) from pg_stat_activity where state = 'active' and query ~ 'sleep\\('"
    assert admin.execute(running).fetchone() == (0,)
    assert ids(admin) == []


def send_twice(apart: float) -> None:
    for _ in range(2):
        sleep(apart)
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_waits_for_the_commit_and_one_more_does_not(
    conn: Connection[Any], proxy: FaultProxy, admin: Admin
) -> None:
    proxy.inject(Delay(0.5), command_complete("COMMIT"), times=1)
    called: list[str] = []
    sender = threading.Thread(target=send_twice, args=(0.1,))
    sender.start()
    with handling(Stop), pytest.raises(Stop) as caught, conn.transaction() as tx:
        tx.execute("insert into t values (1)")
        tx.on_commit(called.append, "a")
    sender.join()
    assert any("is committed" in note for note in caught.value.__notes__)
    assert (tx.state, called) == (COMMITTED, ["a"])

    frozen = proxy.inject(Freeze(), command_complete("COMMIT"))
    conn.commit_timeout = 60
    sender = threading.Thread(target=send_twice, args=(0.7,))
    sender.start()
    before = monotonic()
    with handling(Stop), pytest.raises(Stop) as caught, conn.transaction() as tx:
        tx.execute("select 1")
    sender.join()
    assert monotonic() - before < 20
    assert any("is unknown" in note for note in caught.value.__notes__)
    assert isinstance(caught.value.__cause__, CommitUnknown)
    frozen.release()


def test_options_and_wrong_ones(dsn: str) -> None:
    with Connection.connect(
        dsn, autocommit=True, row_factory=dict_row, statement_timeout=7
    ) as conn:
        assert conn.execute("show statement_timeout").fetchone() == {"statement_timeout": "7s"}
        with conn.transaction(isolation_level=IsolationLevel.SERIALIZABLE, read_only=True) as tx:
            assert tx.execute("show transaction_isolation").fetchone() == {
                "transaction_isolation": "serializable"
            }
            with (
                pytest.raises(psycopg.ProgrammingError, match="outermost"),
                conn.transaction(read_only=True),
            ):
                pass
        with pytest.raises(ValueError, match="isolation_level"):
            conn.transaction(isolation_level=17)
        block = conn.transaction()
        with block:
            pass
        with pytest.raises(TypeError, match="only once"), block:
            pass
    with pytest.raises(psycopg.OperationalError, match="closed"):
        conn.execute("select 1")
    for name in ("commit_timeout", "cancel_timeout", "statement_timeout"):
        with pytest.raises(ValueError, match=name):
            Connection.connect(dsn, **{name: -1})  # type: ignore[arg-type]
    with pytest.raises(psycopg.OperationalError):
        Connection.connect("host=127.0.0.1 port=1")


def test_pipelines_copies_streams_and_two_phases(conn: Connection[Any], admin: Admin) -> None:
    with conn.pipeline(), conn.transaction():
        conn.execute("insert into t values (1)")
    with conn.transaction(), conn.pipeline():
        conn.execute("insert into t values (2)")
    with conn.transaction(), conn.cursor().copy("copy t from stdin") as copy:
        copy.write_row((3,))
    with conn.transaction():
        for _ in conn.cursor().stream("select i from t"):
            break
    with conn.transaction():
        conn.cursor().executemany("insert into t values (%s)", [(4,), (5,)])
    assert ids(admin) == [1, 2, 3, 4, 5]
    conn.tpc_begin("x")
    conn.execute("insert into t values (6)")
    conn.tpc_prepare()
    conn.tpc_commit()
    assert ids(admin) == [1, 2, 3, 4, 5, 6]
    with conn.transaction(), conn.cursor("named") as cur:
        cur.execute("select i from t order by i")
        assert cur.fetchmany(2) == [(1,), (2,)]


def test_prepared_statements_survive_a_rollback(conn: Connection[Any]) -> None:
    conn.prepare_threshold = 0
    for _ in range(3):
        with conn.transaction(force_rollback=True):
            assert conn.execute("select %s::int", (1,)).fetchone() == (1,)
        assert conn.execute("select %s::int", (2,)).fetchone() == (2,)
        conn.rollback()


def test_threads_take_turns(conn: Connection[Any], admin: Admin) -> None:
    conn.autocommit = True
    errors: list[BaseException] = []

    def work(first: int) -> None:
        try:
            for i in range(first, first + 50):
                conn.execute("insert into t values (%s)", (i,))
        except BaseException as exc:
            errors.append(exc)

    threads = [threading.Thread(target=work, args=(1000 * n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len(ids(admin)) == 200


# What an adversary found


def test_blocks_in_a_pipeline_are_psycopgs(conn: Connection[Any], admin: Admin) -> None:
    for outer in (True, False):
        with conn.transaction(force_rollback=outer), conn.pipeline():
            with pytest.raises(KeyError), conn.transaction():
                conn.execute("insert into t values (1)")
                raise KeyError
            with conn.transaction():
                conn.execute("insert into t values (2)")
    assert ids(admin) == [2]
    with conn.pipeline():
        with pytest.raises(KeyError), conn.transaction():
            conn.execute("insert into t values (3)")
            raise KeyError
        with conn.transaction():
            conn.execute("insert into t values (4)")
    assert ids(admin) == [2, 4]
    with conn.transaction(), conn.pipeline(), conn.transaction(force_rollback=True):
        conn.execute("insert into t values (5)")
    assert ids(admin) == [2, 4]


def test_a_rollback_leaves_no_release_behind(conn: Connection[Any], admin: Admin) -> None:
    for _ in range(2):
        with pytest.raises(KeyError), conn.transaction():
            with conn.transaction():
                conn.execute("insert into t values (1)")
            raise KeyError
        conn.execute("insert into t values (2)")
        with conn.transaction():
            conn.execute("insert into t values (3)")
        conn.rollback()
    conn.execute("insert into t values (4)")
    conn.commit()
    assert ids(admin) == [4]


def test_executemany_after_a_rollback_finds_its_statements(
    conn: Connection[Any], admin: Admin
) -> None:
    cur = conn.cursor()
    with pytest.raises(psycopg.Error), conn.transaction():
        cur.executemany("insert into t values (%s)", [(1,), (1,)])
        cur.execute("set constraints all immediate")
    cur.executemany("insert into t values (%s)", [(1,), (2,)])
    cur.executemany("insert into t values (%s)", [(3,), (4,)])
    conn.commit()
    assert ids(admin) == [1, 2, 3, 4]


def test_what_was_never_sent_has_begun_nothing(conn: Connection[Any]) -> None:
    with pytest.raises(psycopg.ProgrammingError, match="adapt"):
        conn.execute("select %s", [object()])
    conn.autocommit = True
    assert conn.execute("select 1").fetchone() == (1,)


def test_a_commit_waits_for_another_threads_statement(
    conn: Connection[Any], proxy: FaultProxy
) -> None:
    conn.commit_timeout = 0.2
    began = threading.Event()

    def work() -> None:
        began.set()
        conn.execute("select pg_sleep(1)")

    thread = threading.Thread(target=work)
    thread.start()
    began.wait()
    while conn.pgconn.transaction_status != pq.TransactionStatus.ACTIVE:
        sleep(0.001)
    conn.commit()
    thread.join()
    assert not conn.closed


def test_a_savepoint_whose_end_is_interrupted_is_undone_with_its_callbacks(
    conn: Connection[Any], proxy: FaultProxy, admin: Admin
) -> None:
    called: list[str] = []
    sent: list[int] = []

    def interrupt(message: Message) -> bool:
        if message.payload.startswith(b"ROLLBACK TO") and not sent:
            sent.append(1)
            os.kill(os.getpid(), signal.SIGTERM)
        return False

    proxy.inject(Delay(0.0), interrupt, direction="frontend")
    with handling(Stop), conn.transaction() as tx:
        tx.execute("insert into t values (1)")
        tx.on_commit(called.append, "outer")
        with pytest.raises((Stop, KeyError)), conn.transaction() as inner:
            inner.execute("insert into t values (2)")
            inner.on_commit(called.append, "never")
            inner.on_rollback(called.append, "undone")
            raise KeyError
        tx.execute("insert into t values (3)")
    assert called == ["undone", "outer"]
    assert ids(admin) == [1, 3]


def test_a_block_that_nobody_leaves_is_no_concern_of_the_next_holder(
    conn: Connection[Any], admin: Admin, caplog: pytest.LogCaptureFixture
) -> None:
    with psycopg_pool.ConnectionPool(
        admin.info.dsn, connection_class=Connection[Any], min_size=1, max_size=1
    ) as pool:
        given = pool.getconn()
        block = given.transaction()
        tx = block.__enter__()  # BEGIN waits: to the pool the connection looks idle
        pool.putconn(given)
        assert "given back inside a transaction block" in caplog.text
        assert tx.state is ROLLED_BACK
        with pool.connection() as given:
            given.execute("insert into t values (1)")
            with pytest.raises(ConnectionReleased):
                block.__exit__(None, None, None)
            assert not block.__exit__(KeyError, KeyError(), None)
            assert ids(admin) == []
        assert ids(admin) == [1]
