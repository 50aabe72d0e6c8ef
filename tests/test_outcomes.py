"""P2, tried: faults around COMMIT, and every client knows what became of its transaction."""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from time import monotonic
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import psycopg
import pytest

from aiopgsafe import (
    AsyncConnection,
    CommitUnknown,
    Database,
    Retry,
    TransactionState,
    resolve_commit,
    safe_to_retry,
)
from aiopgsafe._tools.tokens import CREATE
from aiopgsafe.testing import (
    Cut,
    Delay,
    FaultProxy,
    Freeze,
    Message,
    TemporaryServer,
    command_complete,
)
from tests.conftest import Figures
from tests.standby import PRIMARY, Standby, wait_for_standby

pytestmark = pytest.mark.anyio

COMMITTED, ROLLED_BACK, UNKNOWN = (
    TransactionState.COMMITTED,
    TransactionState.ROLLED_BACK,
    TransactionState.UNKNOWN,
)

WRITERS = 8
FAULTS = {
    # What is done to the connections, or the server; in a short run, and in a long one.
    "rst before": (2, 50),
    "rst after": (2, 50),
    "fin before": (2, 50),
    "fin after": (2, 50),
    "freeze before": (1, 25),
    "freeze after": (1, 25),
    "terminate": (2, 50),
    "backend": (2, 50),
    "immediate": (1, 40),
    "kill": (1, 40),
    "promotion": (1, 10),
    "asynchronous promotion": (1, 15),
}
"""Trials of each fault: in a short run, in a long one."""

ids = count(1)


@dataclass
class Writer:
    """One transaction with a row of its own, and what its client knows of it.

    :ivar doubt: whether its COMMIT was lost.
    :ivar by_the_old: whether it was known before the old primary was gone.
    """

    id: int
    state: TransactionState | None = None
    called: list[str] = field(default_factory=list)
    error: BaseException | None = None
    doubt: bool = False
    by_the_old: bool = False


async def write(
    writer: Writer, conn: AsyncConnection[Any], ready: Callable[[], Any], old: TemporaryServer
) -> None:
    try:
        async with conn.transaction() as tx:
            tx.on_commit(writer.called.append, "committed")
            tx.on_rollback(writer.called.append, "rolled back")
            await tx.execute("insert into t values (%s)", (writer.id,))
            await ready()
        writer.doubt = conn.closed
    except psycopg.OperationalError as exc:
        writer.error = exc
        asked = "the server was asked" in "".join(getattr(exc, "__notes__", []))
        writer.doubt = asked or isinstance(exc, CommitUnknown)
    writer.state = tx.state
    writer.by_the_old = old.running
    await conn.close()


class Filler:
    """Others who work on, and are given the numbers that were lost in a crash."""

    def __init__(self, dsn: str) -> None:
        self._dsn = dsn
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not self._over.is_set():
            with suppress(psycopg.Error), psycopg.connect(self._dsn, autocommit=True) as conn:
                while not self._over.is_set():
                    conn.execute("insert into t values (-1 - (random() * 2000000000)::int)")
                    self._over.wait(0.002)
            self._over.wait(0.01)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *exc_info: object) -> None:
        self._over.set()
        self._thread.join()


def do(fault: str, server: TemporaryServer, pids: list[int]) -> None:
    """What happens to the server while COMMITs are under way."""
    if fault == "terminate":
        server.psql(f"select pg_terminate_backend(pid) from unnest(array{pids}) pid")
    elif fault == "backend":
        with psycopg.connect(server.dsn) as victim:
            server.kill_backend(victim.info.backend_pid, wait=True)
    elif fault == "immediate":
        server.restart("immediate")
    elif fault == "kill":
        server.kill()
        server.start()


def is_commit(message: Message) -> bool:
    """COMMIT, alone or behind a token."""
    return message.type in ("Q", "P") and b"COMMIT" in message.payload


def inject(fault: str, proxy: FaultProxy, rng: random.Random) -> None:
    """What happens to the messages."""
    kind, _, when = fault.partition(" ")
    match = is_commit if when == "before" else command_complete("COMMIT")
    if kind in ("rst", "fin"):
        proxy.inject(Cut("rst" if kind == "rst" else "fin"), match)
    elif kind == "freeze":
        proxy.inject(Freeze(), match)
    else:
        # A COMMIT is long on its way, there or back, while it happens.
        there = rng.random() < 0.5
        proxy.inject(Delay(0.1), is_commit if there else command_complete("COMMIT"))


async def trial(
    fault: str,
    server: TemporaryServer,
    rng: random.Random,
    *,
    token: bool,
    standby: Standby | None = None,
) -> list[Writer]:
    """Some writers in COMMIT, and the fault. Returns what each believes."""
    writers = [Writer(next(ids)) for _ in range(WRITERS)]
    waiting, all_ready = WRITERS, anyio.Event()

    async def ready() -> None:
        nonlocal waiting
        waiting -= 1
        if not waiting:
            all_ready.set()
        await all_ready.wait()

    with FaultProxy(server.dsn) as proxy, Filler((standby or server).dsn):
        dsn = proxy.dsn
        if standby is not None:
            dsn = (
                f"host={proxy.host},{standby.host} port={proxy.port},{standby.port}"
                " user=postgres dbname=postgres target_session_attrs=primary"
            )
        timeouts: Any = {"commit_timeout": 0.3 if "freeze" in fault else 20.0}
        conns = [
            await AsyncConnection.connect(dsn, autocommit=True, commit_token=token, **timeouts)
            for _ in writers
        ]
        pids = [conn.info.backend_pid for conn in conns]
        inject(fault, proxy, rng)

        async def happen() -> None:
            await all_ready.wait()
            await anyio.sleep(rng.random() * 0.04)
            if not fault.endswith(("before", "after")) and rng.random() < 0.6:
                proxy.cut()  # what the server has said already doesn't get through
            if standby is not None:
                await anyio.to_thread.run_sync(server.kill)
                await anyio.to_thread.run_sync(standby.promote)
            else:
                await anyio.to_thread.run_sync(do, fault, server, pids)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(happen)
            for writer, conn in zip(writers, conns, strict=True):
                tasks.start_soon(write, writer, conn, ready, server)
        proxy.clear()
    return writers


def check(writers: list[Writer], server: TemporaryServer, counts: Counter[str]) -> None:
    """Compare what was believed with what is in the table."""
    with psycopg.connect(server.dsn, autocommit=True) as conn:
        found = conn.execute(
            "select id from t where id = any(%s)", ([writer.id for writer in writers],)
        )
        truth = {id for (id,) in found}
    for writer in writers:
        assert writer.state is not None
        there = writer.id in truth
        counts["doubts"] += writer.doubt
        if writer.doubt:
            counts[writer.state.value.replace(" ", "_")] += 1
        if writer.state is COMMITTED and not there and (writer.by_the_old or not writer.doubt):
            # The old primary had said so. Only an asynchronous promotion may lose that.
            counts["acknowledged_missing"] += 1
            continue
        assert writer.called == {UNKNOWN: []}.get(writer.state, [writer.state.value]), writer
        if writer.state is UNKNOWN:
            assert isinstance(writer.error, CommitUnknown)
            continue
        assert (writer.state is COMMITTED) == there, writer
        assert (writer.error is None) == there, writer
        if writer.error is not None:
            assert safe_to_retry(writer.error), writer


SETUP = f"create table t (id int primary key); {CREATE.decode()}"


@pytest.fixture(scope="module")
def crashing(bindir: Path) -> Iterator[TemporaryServer]:
    with TemporaryServer(bindir=bindir, settings=PRIMARY) as server:
        server.psql(SETUP)
        yield server


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("token", [False, True], ids=["number", "token"])
@pytest.mark.parametrize("fault", [fault for fault in FAULTS if "promotion" not in fault])
async def test_no_client_is_told_a_lie_and_each_is_told_something(
    crashing: TemporaryServer,
    fault: str,
    token: bool,
    figures: Figures,
    long: bool,
    loop_name: str,
    anyio_backend: object,
) -> None:
    trials = FAULTS[fault][long]
    rng = random.Random(f"{fault} {loop_name} {token}")
    counts: Counter[str] = Counter(doubts=0, committed=0, rolled_back=0, unknown=0)
    for _ in range(trials):
        writers = await trial(fault, crashing, rng, token=token)
        check(writers, crashing, counts)
    assert counts["unknown"] == counts["acknowledged_missing"] == 0
    if "before" in fault or "after" in fault:
        assert counts["doubts"] == trials * WRITERS
    figures(**counts, wrong=0)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("token", [False, True], ids=["number", "token"])
@pytest.mark.parametrize("fault", [fault for fault in FAULTS if "promotion" in fault])
async def test_after_a_promotion_the_new_primary_is_believed(
    bindir: Path,
    fault: str,
    token: bool,
    figures: Figures,
    long: bool,
    loop_name: str,
    anyio_backend: object,
) -> None:
    rng = random.Random(f"{fault} {loop_name} {token}")
    counts: Counter[str] = Counter(doubts=0, committed=0, rolled_back=0, unknown=0)
    for _ in range(FAULTS[fault][long]):
        with ExitStack() as stack:
            primary = stack.enter_context(TemporaryServer(bindir=bindir, settings=PRIMARY))
            primary.psql(SETUP)
            standby = stack.enter_context(Standby(primary))
            standby.wait_streaming()
            if fault == "promotion":
                wait_for_standby(primary, wanted=True)
            elif rng.random() < 0.7:
                standby.stop_receiving()
            writers = await trial(fault, primary, rng, token=token, standby=standby)
            check(writers, standby, counts)
    if fault == "promotion":
        assert counts["unknown"] == counts["acknowledged_missing"] == 0
    figures(**counts, wrong=0)


async def test_a_commit_that_comes_late_finds_nothing(
    dsn: str, figures: Figures, long: bool, anyio_backend: object
) -> None:
    """The partition ends after the work was done again: nothing is there twice."""
    trials, at_once = (1000, 20) if long else (20, 10)
    with psycopg.connect(dsn, autocommit=True) as admin, FaultProxy(dsn) as proxy:
        admin.execute("create table t (id int)")
        retry = Retry(backoff=0.001)
        options: Any = {"min_size": at_once, "max_size": 2 * at_once, "commit_timeout": 0.05}
        options["application_name"] = "late"
        async with Database(proxy.dsn, **options) as db:

            @db.atomic(retry=retry)
            async def insert(id: int) -> None:
                await db.execute("insert into t values (%s)", (id,))

            for first in range(0, trials, at_once):
                partition = proxy.inject(Freeze(), is_commit, times=at_once)
                async with anyio.create_task_group() as tasks:
                    for id in range(first, first + at_once):
                        tasks.start_soon(insert, id)
                partition.release()
        # Those that are late have arrived when their sessions have ended.
        there = "select count(*) from pg_stat_activity where application_name = 'late'"
        while admin.execute(there).fetchone() != (0,):
            await anyio.lowlevel.checkpoint()
        rows = admin.execute("select id from t order by id").fetchall()
        assert rows == [(id,) for id in range(trials)]
    figures(trials=trials, attempts_again=retry.retries, doubled=0, missing=0)


async def test_who_waits_for_a_standby_is_not_cancelled(
    bindir: Path, anyio_backend: object
) -> None:
    """Cancelling would commit it locally: it is waited for, and then it is unknown."""
    with TemporaryServer(bindir=bindir, settings=PRIMARY) as server:
        server.psql(SETUP)
        with Standby(server) as standby, FaultProxy(server.dsn) as proxy:
            standby.wait_streaming()
            wait_for_standby(server, wanted=True)
            timeouts: Any = {"commit_timeout": 1.0, "cancel_timeout": 0.5}
            conn = await AsyncConnection.connect(proxy.dsn, autocommit=True, **timeouts)
            standby.stop_receiving()
            began = monotonic()
            with anyio.CancelScope() as scope:
                try:
                    async with conn.transaction() as tx:
                        await tx.execute("insert into t values (1)")
                        ticket = tx.ticket()
                        scope.deadline = anyio.current_time() + 0.1
                except BaseException as exc:
                    said = [*exc.__notes__, str(exc.__cause__)]
                    raise
            assert 1.0 <= monotonic() - began < 5
            assert scope.cancelled_caught
            assert tx.state is UNKNOWN
            assert said[0] == "aiopgsafe: the transaction is unknown"
            assert "the session is still active" in said[-1]
            assert proxy.stats.cancel_requests == 0
            standby.receive()
            assert await resolve_commit(ticket, server.dsn) is COMMITTED
            assert "committed locally" not in server.log
            assert "canceling" not in server.log
            assert standby.psql("select count(*) from t") == "1"
