"""Django on our backend: its own semantics, and exceptions at every bytecode of a block's end."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
from collections.abc import Iterator
from functools import partial
from time import monotonic, sleep
from typing import Any

import django
import psycopg
import pytest
from asgiref.sync import sync_to_async
from django.conf import settings

if not settings.configured:
    settings.configure(USE_TZ=True, DATABASES={})
    django.setup()

from django.db import IntegrityError, OperationalError, connections, transaction
from django.db.utils import ConnectionHandler

from aiopgsafe.testing import Cut, Delay, FaultProxy, command_complete
from tests.conftest import Figures
from tests.tearing import WAYS, Stop, Tear, TimeLimit, handling, ignore_unraisable, lies

Admin = psycopg.Connection[Any]
IDLE = psycopg.pq.TransactionStatus.IDLE
OURS, STOCK = "aiopgsafe.django", "django.db.backends.postgresql"


def configured(dsn: str, engine: str, **options: Any) -> dict[str, Any]:
    params = psycopg.conninfo.conninfo_to_dict(dsn)
    database = {
        "ENGINE": engine,
        "NAME": params["dbname"],
        "USER": params["user"],
        "HOST": params["host"],
        "PORT": params["port"],
        "OPTIONS": options,
    }
    found: dict[str, Any] = ConnectionHandler().configure_settings({"default": database})
    return found["default"]  # type: ignore[no-any-return]


def connect(dsn: str, engine: str = OURS, alias: str = "default", **options: Any) -> Any:
    """This thread's connection of that alias."""
    from django.db.utils import load_backend

    config = configured(dsn, engine, **options)
    connections.settings[alias] = config
    wrapper = load_backend(engine).DatabaseWrapper(config, alias)
    connections[alias] = wrapper
    return wrapper


@pytest.fixture
def wrapper(dsn: str, admin: Admin) -> Iterator[Any]:
    admin.execute("create table t (i int primary key deferrable)")
    wrapper = connect(dsn)
    yield wrapper
    wrapper.close()


def ids(admin: Admin) -> list[int]:
    return [i for (i,) in admin.execute("select i from t order by i")]


def insert(i: int) -> None:
    with connections["default"].cursor() as cur:
        cur.execute("insert into t values (%s)", [i])


# Django's semantics


def test_blocks_commit_and_roll_back(wrapper: Any, admin: Admin) -> None:
    called: list[str] = []
    with transaction.atomic():
        insert(1)
        transaction.on_commit(partial(called.append, "outer"))
        with pytest.raises(KeyError), transaction.atomic():
            insert(2)
            transaction.on_commit(partial(called.append, "undone"))
            raise KeyError
        with transaction.atomic():
            insert(3)
            transaction.on_commit(partial(called.append, "inner"))
        assert called == []
    assert called == ["outer", "inner"]
    assert ids(admin) == [1, 3]
    with pytest.raises(KeyError), transaction.atomic():
        insert(4)
        raise KeyError
    assert ids(admin) == [1, 3]
    insert(5)  # in autocommit mode
    assert ids(admin) == [1, 3, 5]


def test_a_commit_that_fails_is_django_s_error(wrapper: Any, admin: Admin) -> None:
    called: list[str] = []
    with pytest.raises(IntegrityError), transaction.atomic():
        transaction.on_commit(partial(called.append, "a"))
        with wrapper.cursor() as cur:
            cur.execute("set constraints all deferred")
        insert(1)
        insert(1)
    assert called == []
    assert ids(admin) == []
    insert(1)
    assert ids(admin) == [1]


def test_the_silent_rollback_raises(wrapper: Any, admin: Admin) -> None:
    with pytest.raises(OperationalError, match="ROLLBACK"), transaction.atomic():
        insert(1)
        with pytest.raises(psycopg.Error), wrapper.cursor() as cur:
            cur.cursor.execute("select nonsense")  # past Django, which would have noticed
    assert ids(admin) == []


def test_robust_callbacks_and_others(wrapper: Any, admin: Admin) -> None:
    called: list[str] = []

    def fail() -> None:
        raise KeyError

    with transaction.atomic():
        insert(1)
        transaction.on_commit(fail, robust=True)
        transaction.on_commit(partial(called.append, "a"))
    assert called == ["a"]
    with pytest.raises(KeyError), transaction.atomic():
        insert(2)
        transaction.on_commit(fail)
        transaction.on_commit(partial(called.append, "b"))
    assert called == ["a"]
    assert ids(admin) == [1, 2]
    assert wrapper.get_autocommit()


def test_callbacks_may_begin_transactions(wrapper: Any, admin: Admin) -> None:
    called: list[str] = []

    def work() -> None:
        with transaction.atomic():
            insert(2)
            transaction.on_commit(partial(called.append, "inner"))

    with transaction.atomic():
        insert(1)
        transaction.on_commit(work)
        transaction.on_commit(partial(called.append, "outer"))
    assert called == ["inner", "outer"]
    assert ids(admin) == [1, 2]


def test_a_callback_may_manage_a_transaction_by_hand(wrapper: Any, admin: Admin) -> None:
    called: list[str] = []

    def work() -> None:
        transaction.set_autocommit(False)
        with transaction.atomic():
            insert(2)
            transaction.on_commit(partial(called.append, "inner"))
        transaction.commit()
        transaction.set_autocommit(True)
        called.append("end")

    with transaction.atomic():
        insert(1)
        transaction.on_commit(work)
        transaction.on_commit(partial(called.append, "second"))
    assert called == ["inner", "end", "second"]
    assert ids(admin) == [1, 2]


def test_durable_and_savepoint_and_decorators(wrapper: Any, admin: Admin) -> None:
    @transaction.atomic(durable=True)  # type: ignore[untyped-decorator]
    def work() -> None:
        insert(1)

    work()
    with pytest.raises(RuntimeError), transaction.atomic():
        work()
    with transaction.atomic():
        insert(2)
        with pytest.raises(KeyError), transaction.atomic(savepoint=False):
            raise KeyError
        assert wrapper.needs_rollback
        transaction.set_rollback(True)
    assert ids(admin) == [1]


def test_several_databases(dsn: str, wrapper: Any, admin: Admin) -> None:
    stock = connect(dsn, STOCK, "stock")
    try:
        with transaction.atomic(), transaction.atomic(using="stock"):
            insert(1)
            with stock.cursor() as cur:
                cur.execute("insert into t values (2)")
        assert ids(admin) == [1, 2]
    finally:
        stock.close()


def test_options_are_those_of_the_connection(dsn: str) -> None:
    wrapper = connect(dsn, commit_timeout=3.0, server_side_binding=True, statement_timeout=60.0)
    wrapper.ensure_connection()
    assert wrapper.connection.commit_timeout == 3
    with wrapper.cursor() as cur:
        cur.execute("select %s::int", [1])
        assert cur.fetchone() == (1,)
    wrapper.close()
    pooled = connect(dsn, pool={"min_size": 1, "max_size": 2})
    with transaction.atomic(), pooled.cursor() as cur:
        cur.execute("select 1")
    pooled.close()
    pooled.close_pool()


def test_async_code_goes_through_a_thread(wrapper: Any, admin: Admin) -> None:
    called: list[str] = []

    def work() -> None:
        try:
            with transaction.atomic():
                insert(1)
                transaction.on_commit(partial(called.append, "a"))
        finally:
            connections["default"].close()

    async def view() -> None:
        await sync_to_async(work, thread_sensitive=False)()

    asyncio.run(view())
    assert called == ["a"]
    assert ids(admin) == [1]


def test_a_commit_whose_answer_is_lost_is_asked_for(proxy: FaultProxy, admin: Admin) -> None:
    admin.execute("create table t (i int)")
    called: list[str] = []
    wrapper = connect(proxy.dsn)
    with wrapper.cursor() as cur:
        cur.execute("select 1")
    with transaction.atomic():
        insert(0)  # the server's history is known
    lost = proxy.inject(Cut("rst"), command_complete("COMMIT"), times=1)
    with transaction.atomic():
        insert(1)
        transaction.on_commit(partial(called.append, "a"))
    assert lost.hits == 1
    assert called == ["a"]
    with transaction.atomic():  # on a new connection
        insert(2)
    assert ids(admin) == [0, 1, 2]
    wrapper.close()


# Torn


class Trial:
    """One block, and what became of it."""

    def __init__(self, admin: Admin) -> None:
        self.admin = admin
        self.called: list[str] = []
        self.raised: BaseException | None = None

    def run(self, tear: Tear) -> None:
        try:
            with transaction.atomic():
                insert(1)
                transaction.on_commit(partial(self.called.append, "a"))
                transaction.on_commit(partial(self.called.append, "b"))
                tear.start()
        except BaseException as exc:
            self.raised = exc
        finally:
            tear.stop()

    def faults(self, exc: type[BaseException]) -> list[str]:
        """What must not be."""
        wrapper = connections["default"]
        there = ids(self.admin) == [1]
        faults = lies(there, self.called, self.raised)
        if self.raised is not None and not isinstance(self.raised, exc):
            faults.append(f"raised {self.raised!r}")
        if wrapper.in_atomic_block or wrapper.atomic_blocks or wrapper.savepoint_ids:
            faults.append("left in a block")
        elif wrapper.connection is None or wrapper.connection.closed:
            faults.append("closed")
        elif wrapper.connection.pgconn.transaction_status != IDLE:
            faults.append("left in a transaction")
        elif not wrapper.get_autocommit():
            faults.append("autocommit left off")
        else:
            before = [*self.called]
            try:
                with transaction.atomic():
                    insert(2)
                    transaction.on_commit(partial(before.append, "c"))
                    transaction.on_commit(partial(self.called.append, "c"))
            except BaseException as exc:
                faults.append(f"the next block raised {exc!r}")
            if 2 not in ids(self.admin) or self.called != before:
                faults.append(f"the next block: {ids(self.admin)}, called {self.called}")
        return faults


TEARS: dict[int, Tear] = {}


def sweep(
    dsn: str,
    admin: Admin,
    engine: str,
    way: str,
    exc: type[BaseException],
    again: int | None,
    step: int,
) -> tuple[int, int, list[str], list[str]]:
    """How many were tried, how many committed, and the faults: within the end, and at its door."""
    admin.execute("set lock_timeout to '5s'")
    wrapper = connect(dsn, engine)
    tried = committed = at = 0
    found: list[str] = []
    at_the_door: list[str] = []
    with wrapper.cursor() as cur:
        cur.execute("select 1")
    while True:
        with WAYS[way](exc) as happens:
            admin.execute("truncate t")
            tear = TEARS[threading.get_ident()] = Tear(at, happens, again if at else None, __file__)
            trial = Trial(admin)
            trial.run(tear)
        if at and not tear.where:
            break
        if at:  # the first one only warms up
            tried += 1
            committed += ids(admin) == [1]
            if faults := trial.faults(exc):
                door = at <= DOOR and tear.where[0].startswith("leave")
                (at_the_door if door else found).append(f"{at}: {tear.where}: {faults}")
                wrapper.close()
                wrapper = connect(dsn, engine)
                admin.execute("truncate t")
                Trial(admin).run(Tear(0, happens, None, __file__))
        at += at == 0 or step
    wrapper.close()
    return tried, committed, found, at_the_door


DOOR = 7
"""Bytecodes of our `Atomic.__exit__()` before its ``try``."""


@pytest.fixture
def start_again(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    from aiopgsafe._sync_ending import Ending
    from aiopgsafe._sync_section import Calls
    from aiopgsafe.django._atomic import Leaving, Running

    # Where what has torn them is handled.
    for cls, name in ((Running, "torn"), (Ending, "torn"), (Leaving, "torn"), (Calls, "note")):
        handle = getattr(cls, name)

        def handle_again(self: Any, exc: BaseException, handle: Any = handle) -> object:
            TEARS[threading.get_ident()].start_again()
            return handle(self, exc)

        monkeypatch.setattr(cls, name, handle_again)
    monkeypatch.setattr(sys, "unraisablehook", ignore_unraisable)
    yield
    TEARS.clear()


@pytest.mark.parametrize("again", [None, 1, 20])
@pytest.mark.parametrize("exc", [Stop, TimeLimit])
@pytest.mark.parametrize("way", ["signal", "exception"])
def test_nothing_tears_the_end_of_a_block(
    dsn: str,
    admin: Admin,
    start_again: None,
    way: str,
    exc: type[BaseException],
    again: int | None,
    figures: Figures,
    long: bool,
) -> None:
    admin.execute("create table t (i int)")
    step = 1 if long else 7 if again is None and exc is TimeLimit else 61
    tried, committed, found, at_the_door = sweep(dsn, admin, OURS, way, exc, again, step)
    figures(tried=tried, committed=committed, faults=len(found), at_the_door=at_the_door)
    assert found == []
    assert len(at_the_door) <= DOOR


@pytest.mark.parametrize("engine", [OURS, STOCK])
def test_a_signal_during_the_commit_loses_callbacks_with_the_stock_backend_only(
    proxy: FaultProxy, admin: Admin, engine: str, figures: Figures, long: bool
) -> None:
    admin.execute("create table t (i int)")
    trials = 50 if long else 10
    answer = proxy.inject(Delay(0.05), command_complete("COMMIT"))
    lost = 0
    for _ in range(trials):
        admin.execute("truncate t")
        wrapper = connect(proxy.dsn, engine)
        with wrapper.cursor() as cur:
            cur.execute("select 1")
        trial = Trial(admin)
        with handling(Stop):
            sender = threading.Thread(target=send_when_hit, args=(answer, answer.hits))
            sender.start()
            trial.run(Tear(0, bool))
            sender.join()
        # Stock Django may raise an error of its own in its place.
        assert isinstance(trial.raised, Stop) or engine == STOCK
        deadline = monotonic() + 5
        while ids(admin) != [1]:
            assert monotonic() < deadline
        lost += trial.called != ["a", "b"]
        wrapper.close()
    figures(trials=trials, lost=lost)
    assert lost == (trials if engine == STOCK else 0)


def send_when_hit(answer: Any, hits: int) -> None:
    while answer.hits == hits:
        sleep(0.001)
    os.kill(os.getpid(), signal.SIGTERM)
