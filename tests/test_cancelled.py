"""P3: what a cancelled statement costs, and what it can't hit."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from time import monotonic, process_time
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import psycopg
import pytest
from psycopg.pq import TransactionStatus

from aiopgsafe import AsyncConnection
from aiopgsafe.testing import (
    Cut,
    Delay,
    FaultProxy,
    Freeze,
    cancel_request,
    command_complete,
    query,
)
from tests.conftest import Figures

pytestmark = pytest.mark.anyio

Conn = AsyncConnection[Any]


async def cancelled_natively(work: Callable[[], Awaitable[Any]], when: anyio.Event) -> float:
    """Cancel the task once `when` is set; seconds until it has ended."""
    task = asyncio.ensure_future(work())
    await when.wait()
    start = monotonic()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    return monotonic() - start


async def cancelled_by_scope(
    work: Callable[[], Coroutine[Any, Any, Any]], when: anyio.Event
) -> float:
    start = 0.0
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(work)
        await when.wait()
        start = monotonic()
        tasks.cancel_scope.cancel()
    return monotonic() - start


WAYS = [
    pytest.param("asyncio", cancelled_natively, id="asyncio-native"),
    pytest.param("asyncio", cancelled_by_scope, id="asyncio-level"),
    pytest.param("uvloop", cancelled_natively, id="uvloop-native"),
    pytest.param("uvloop", cancelled_by_scope, id="uvloop-level"),
    pytest.param("trio", cancelled_by_scope, id="trio-level"),
]


@pytest.mark.parametrize(("loop_name", "cancelled"), WAYS)
@pytest.mark.parametrize("frozen", ["statement", "cancel request"])
async def test_a_server_that_does_not_answer_costs_cancel_timeout_and_the_connection(
    proxy: FaultProxy, cancelled: Any, frozen: str, figures: Figures
) -> None:
    if frozen == "cancel request":
        proxy.inject(Freeze(), cancel_request())
    action = Delay(0) if frozen == "cancel request" else Freeze()
    fault = proxy.inject(action, query("select pg_sleep"))
    conn = await AsyncConnection.connect(proxy.dsn, autocommit=True, cancel_timeout=0.5)
    sent = anyio.Event()

    async def work() -> None:
        await conn.execute("select pg_sleep(2)")

    async def wait_until_sent() -> None:
        await anyio.to_thread.run_sync(fault.wait)
        sent.set()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(wait_until_sent)
        took = await cancelled(work, sent)
    assert conn.closed
    assert took < 1.5  # not when the server would have answered
    figures(frozen=frozen, cancel_timeout="0.500 s", back_after=f"{took:.3f} s")


@pytest.mark.parametrize("what", ["commit", "statement"])
async def test_waiting_in_a_cancelled_scope_does_not_spin(
    proxy: FaultProxy, what: str, long: bool, figures: Figures
) -> None:
    seconds = 5 if long else 1
    proxy.inject(Freeze(), command_complete("COMMIT"))
    proxy.inject(Freeze(), query("select pg_sleep"))
    conn = await AsyncConnection.connect(
        proxy.dsn, autocommit=True, cancel_timeout=seconds, commit_timeout=seconds
    )
    used = 0.0
    with anyio.move_on_after(0.1):
        if what == "commit":
            async with conn.transaction():
                await conn.execute("select 1")
                used = process_time()
        else:
            used = process_time()
            await conn.execute("select pg_sleep(1)")
    used = process_time() - used
    assert conn.closed
    figures(waited=f"{seconds} s", cpu=f"{used * 1000:.1f} ms")
    assert used < seconds / 4  # one that spins takes all of them


async def cancel_and_go_on(conn: Conn, cycles: int) -> float:
    """Cancel a statement at once, run the next one, as fast as it goes. Cycles a second."""
    pid = conn.info.backend_pid
    start = monotonic()
    for n in range(cycles):
        with anyio.CancelScope() as scope:
            # Now and then the statement has ended when the request arrives.
            seconds = (0, 0.0005, 10)[n % 3]
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(conn.execute, "select pg_sleep(%s)", (seconds,))
                await anyio.lowlevel.checkpoint()
                await anyio.lowlevel.checkpoint()
                scope.cancel()
        cur = await conn.execute("select %s::int", (n,))
        assert await cur.fetchone() == (n,)
    assert not conn.closed
    assert conn.info.backend_pid == pid
    assert conn.info.transaction_status is TransactionStatus.IDLE
    return cycles / (monotonic() - start)


async def test_a_cancel_never_hits_the_next_statement(
    conn: Conn, long: bool, figures: Figures
) -> None:
    await conn.set_autocommit(True)
    cycles = 10_000 if long else 500
    rate = await cancel_and_go_on(conn, cycles)
    figures(cycles=cycles, stray_cancels=0, per_second=f"{rate:.0f}")


async def test_a_cancel_through_pgbouncer_never_hits_the_next_statement(
    pgbouncer: str, anyio_backend: object, long: bool, figures: Figures
) -> None:
    async with await AsyncConnection.connect(
        pgbouncer, autocommit=True, prepare_threshold=None
    ) as conn:
        cycles = 10_000 if long else 500
        rate = await cancel_and_go_on(conn, cycles)
    figures(cycles=cycles, stray_cancels=0, per_second=f"{rate:.0f}")


async def test_a_cancel_request_that_is_lost_on_its_way_hits_nobody(
    proxy: FaultProxy, admin: psycopg.Connection[Any], anyio_backend: object
) -> None:
    """Cut after it was sent: it may arrive at any time. The connection goes, not the next query."""
    proxy.inject(Cut("rst", server=False), cancel_request(), when="after")
    conn = await AsyncConnection.connect(proxy.dsn, autocommit=True)
    with anyio.move_on_after(0.1):
        await conn.execute("select pg_sleep(10)")
    assert conn.closed


async def test_a_cancelled_copy_in_stores_nothing(conn: Conn, admin: Any) -> None:
    await conn.set_autocommit(True)
    await conn.execute("create table t (s text)")
    with anyio.CancelScope() as scope:
        async with conn.cursor().copy("copy t from stdin") as copy:
            await copy.write(b"a\n" * 100_000)
            scope.cancel()
            await anyio.lowlevel.checkpoint()
    assert admin.execute("select count(*) from t").fetchone() == (0,)
    assert conn.info.transaction_status is TransactionStatus.IDLE
