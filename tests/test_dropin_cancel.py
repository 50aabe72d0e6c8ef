"""P3: every operation, cancelled at each of its suspension points, leaves nothing behind.

The statement has ended on the server, the same session serves the next one, and no
descriptor is left over.
"""

from __future__ import annotations

import gc
from collections.abc import Awaitable, Callable
from contextlib import aclosing, suppress
from pathlib import Path
from time import monotonic
from typing import Any, TypeAlias, cast

import anyio
import anyio.lowlevel
import psycopg
import pytest
from psycopg.pq import PipelineStatus, TransactionStatus

from aiopgsafe import AsyncConnection
from aiopgsafe.testing import CancelSweep
from tests.conftest import Figures, sweeps

pytestmark = pytest.mark.anyio

Operation: TypeAlias = Callable[[AsyncConnection[Any]], Awaitable[None]]


async def copy_in(conn: AsyncConnection[Any]) -> None:
    async with conn.cursor().copy("copy t from stdin") as copy:
        for _ in range(4):
            await copy.write(b"x" * 1_000_000 + b"\n")


async def copy_out(conn: AsyncConnection[Any]) -> None:
    query = "copy (select repeat('x', 100000) from generate_series(1, 20)) to stdout"
    async with conn.cursor().copy(query) as copy:
        async for _ in copy:
            pass


async def stream(conn: AsyncConnection[Any]) -> None:
    rows = conn.cursor().stream("select repeat('x', 100000) from generate_series(1, 20)")
    async with aclosing(cast("Any", rows)):
        async for _ in rows:
            pass


async def executemany(conn: AsyncConnection[Any]) -> None:
    cur = conn.cursor()
    text = "x" * 100_000
    await cur.executemany("insert into t values (%s) returning s", [(text,)] * 20, returning=True)


async def pipeline(conn: AsyncConnection[Any]) -> None:
    async with conn.pipeline() as pipeline:
        cur = await conn.execute("insert into t values (%s) returning s", ("x" * 100_000,))
        await cur.fetchone()
        async with conn.transaction():
            await conn.execute("select pg_sleep(0.001)")
            async with conn.transaction():
                await conn.execute("select 1")
        await pipeline.sync()
        await conn.execute("select pg_sleep(0.001)")


async def server_cursor(conn: AsyncConnection[Any]) -> None:
    async with conn.cursor("c", withhold=True) as cur:
        await cur.execute("select generate_series(1, 100)")
        await cur.fetchmany(10)
        await cur.scroll(5)
        await cur.fetchone()


async def transactions(conn: AsyncConnection[Any]) -> None:
    async with conn.transaction():
        await conn.execute("insert into t values ('a')")
        async with conn.transaction():
            await conn.execute("select pg_sleep(0.001)", prepare=True)


async def execute(conn: AsyncConnection[Any]) -> None:
    cur = await conn.execute("select pg_sleep(0.005), %s", ("x" * 100_000,))
    await cur.fetchone()


async def notifies(conn: AsyncConnection[Any]) -> None:
    await conn.execute("listen c")
    await conn.execute("notify c")
    async with aclosing(cast("Any", conn.notifies(timeout=0.005))) as notifies_:
        async for _ in notifies_:
            pass


async def savepoint_under_a_scope(conn: AsyncConnection[Any]) -> None:
    async with conn.transaction():
        with anyio.CancelScope() as scope:
            async with conn.transaction():
                await conn.execute("insert into t values ('inner')")
                scope.cancel()
                await conn.execute("select pg_sleep(10)")
        cur = await conn.execute("select count(*) from t")
        assert await cur.fetchone() == (0,)
        await conn.execute("insert into t values ('outer')")


async def two_phases(conn: AsyncConnection[Any]) -> None:
    await conn.set_autocommit(False)
    await conn.tpc_begin("x")
    await conn.execute("insert into t values ('a')")
    await conn.tpc_prepare()
    await conn.tpc_rollback()


OPERATIONS = (
    *(execute, executemany, stream, copy_in, copy_out, server_cursor, pipeline, notifies),
    *(transactions, savepoint_under_a_scope, two_phases),
)


def wait_until_nothing_runs(admin: psycopg.Connection[Any], at: str) -> None:
    """Nothing but the administrator's own query is active within a second."""
    deadline = monotonic() + 1
    active = (
        "select query from pg_stat_activity where state = 'active' and pid <> pg_backend_pid()"
        " and backend_type = 'client backend'"
    )
    while found := admin.execute(active).fetchall():
        assert monotonic() < deadline, (at, found)


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.usefixtures("turns")
@pytest.mark.parametrize(("loop_name", "how"), sweeps())
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda op: op.__name__)
async def test_an_operation_cancelled_anywhere_leaves_nothing_behind(
    conn: AsyncConnection[Any],
    admin: psycopg.Connection[Any],
    anyio_backend: tuple[str, Any],
    operation: Operation,
    how: Any,
    figures: Figures,
) -> None:
    await conn.execute("create table t (s text)")
    await conn.commit()
    await conn.set_autocommit(True)

    async def work() -> None:
        await operation(conn)

    points, pid, descriptors = 0, conn.info.backend_pid, open_descriptors()
    # A connection on trio keeps an epoll once it has waited in both directions.
    descriptors += anyio_backend[0] == "trio"
    async for trial in CancelSweep(work, how=how):
        points = trial.point - 1
        at = f"{operation.__name__} cancelled at {trial.point} ({trial.where}): {trial.exception!r}"
        assert not isinstance(trial.exception, Exception), at
        assert not conn.closed, at
        assert conn._pipeline is None, at
        assert conn.pgconn.pipeline_status == PipelineStatus.OFF, at
        assert conn.pgconn.transaction_status != TransactionStatus.ACTIVE, at
        assert not conn.lock.locked(), at
        wait_until_nothing_runs(admin, at)
        if conn._tpc:
            await conn.tpc_rollback()  # whichever phase it was cancelled in
        else:
            await conn.rollback()
        await conn.set_autocommit(True)
        cur = await conn.execute("select count(*) from pg_cursors where name <> ''")
        assert await cur.fetchone() == (0,), at
        cur = await conn.execute("select pg_backend_pid()")
        assert await cur.fetchone() == (pid,), at
        await conn.execute("truncate t")
        assert open_descriptors() <= descriptors, at
    assert points > 0
    figures(operation=operation.__name__, points=points, failures=0)
    gc.collect()  # what was left open warns in this test


@pytest.mark.usefixtures("turns")
@pytest.mark.parametrize(("loop_name", "how"), sweeps())
async def test_connect_cancelled_anywhere_leaves_no_socket(
    dsn: str, admin: psycopg.Connection[Any], how: Any, figures: Figures
) -> None:
    async def work() -> None:
        conn = await AsyncConnection.connect(dsn, host="localhost")
        try:
            await conn.execute("select 1")
        finally:
            await conn.close()

    await work()  # what the loop and name resolution keep is there from now on
    points, descriptors = 0, open_descriptors()
    sessions = "select count(*) from pg_stat_activity where backend_type = 'client backend'"
    async for trial in CancelSweep(work, how=how):
        at = f"point {trial.point}: {trial.where}: {trial.exception!r}"
        points = trial.point - 1
        # A thread that resolves a name is left to itself, and opens some of its own meanwhile.
        deadline = monotonic() + 5
        while open_descriptors() > descriptors:
            assert monotonic() < deadline, at
            await anyio.lowlevel.checkpoint()
    assert points > 0
    deadline = monotonic() + 1
    while admin.execute(sessions).fetchone() != (1,):
        assert monotonic() < deadline
    figures(operation="connect, close", points=points, failures=0)


async def test_a_pipeline_cancelled_while_another_task_waits_for_the_connection_ends(
    conn: AsyncConnection[Any],
) -> None:
    await conn.set_autocommit(True)
    scope = anyio.CancelScope()

    async def pipelined(ready: anyio.Event) -> None:
        with scope:
            async with conn.pipeline():
                cur = await conn.execute("select pg_sleep(20)")
                ready.set()
                await cur.fetchone()

    async def waits(ready: anyio.Event) -> None:
        await ready.wait()
        while not conn.lock.locked():
            await anyio.lowlevel.checkpoint()
        tasks.start_soon(cancel)
        # It rides the pipeline and may fall with it: psycopg's AttributeError says that
        # the pipeline ended while fetchone() waited for the lock.
        with suppress(psycopg.Error, AttributeError):
            await (await conn.execute("select 'other'")).fetchone()

    async def cancel() -> None:
        scope.cancel()

    with anyio.fail_after(10):
        async with anyio.create_task_group() as tasks:
            ready = anyio.Event()
            tasks.start_soon(pipelined, ready)
            tasks.start_soon(waits, ready)
    assert conn._pipeline is None
    assert conn.closed or conn.pgconn.pipeline_status == PipelineStatus.OFF
    if not conn.closed:
        cur = await conn.execute("select 'usable'")
        assert await cur.fetchone() == ("usable",)
