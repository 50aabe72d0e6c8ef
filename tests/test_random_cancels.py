"""P2 and P3, cancelled at seeded random moments while COMMIT's answers come 20 ms late."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import anyio
import psycopg
import pytest

from aiopgsafe import AsyncConnection, Transaction, TransactionState
from aiopgsafe.testing import Delay, FaultProxy, command_complete
from tests.conftest import Figures

pytestmark = pytest.mark.anyio

CONNECTIONS = 10
CANCELLATIONS = 300
LATE = 0.02
SPAN = 0.035  # seconds: what a transfer takes through the proxy, and a little more


async def by_scope(work: Callable[[], Awaitable[None]], delay: float) -> None:
    with anyio.CancelScope(deadline=anyio.current_time() + delay):
        await work()


async def by_task_cancel(work: Callable[[], Awaitable[None]], delay: float) -> None:
    async def run() -> None:
        await work()

    task = asyncio.create_task(run())
    asyncio.get_running_loop().call_later(delay, task.cancel)
    await asyncio.wait([task])
    if not task.cancelled():
        task.result()


async def by_timeout(work: Callable[[], Awaitable[None]], delay: float) -> None:
    try:
        async with asyncio.timeout(delay):
            await work()
    except TimeoutError:
        pass


async def by_sibling(work: Callable[[], Awaitable[None]], delay: float) -> None:
    async def fail() -> None:
        await asyncio.sleep(delay)
        raise LookupError

    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(fail())
            await work()
    except* LookupError:
        pass


KINDS = {"scope": by_scope, "cancel": by_task_cancel, "timeout": by_timeout, "sibling": by_sibling}


@dataclass
class Tally:
    tried: int = 0
    in_commit: int = 0
    believed: dict[int, bool] = field(default_factory=dict)
    states: dict[int, TransactionState] = field(default_factory=dict)
    backends: set[int] = field(default_factory=set)


@pytest.mark.parametrize(
    ("loop_name", "kind"),
    [(loop, kind) for loop in ("asyncio", "uvloop") for kind in KINDS] + [("trio", "scope")],
)
async def test_no_cancelled_client_is_told_a_lie_or_loses_its_connection(
    proxy: FaultProxy, dsn: str, kind: str, figures: Figures
) -> None:
    rng = random.Random(f"{kind}")
    tally = Tally()
    with psycopg.connect(dsn, autocommit=True) as admin:
        admin.execute("create table t (id int)")
        proxy.inject(Delay(LATE), command_complete("COMMIT"))

        async def client(conn: AsyncConnection[Any]) -> None:
            tally.backends.add(conn.info.backend_pid)
            while tally.tried < CANCELLATIONS:
                tally.tried += 1
                await one_transfer(conn, tally.tried, rng.uniform(0, SPAN))
            await conn.close()

        async def one_transfer(conn: AsyncConnection[Any], id: int, delay: float) -> None:
            tx: Transaction[Any] | None = None
            tally.believed[id] = False

            async def work() -> None:
                nonlocal tx
                async with conn.transaction() as tx:
                    tx.on_commit(tally.believed.__setitem__, id, True)
                    await tx.execute("insert into t values (%s)", (id,))

            def in_commit() -> bool:
                return tx is not None and tx.state is TransactionState.COMMITTING

            loop_time = anyio.current_time()
            async with anyio.create_task_group() as group:

                async def note() -> None:
                    await anyio.sleep_until(loop_time + delay)
                    tally.in_commit += in_commit()

                group.start_soon(note)
                await KINDS[kind](work, delay)
            tally.states[id] = tx.state if tx is not None else TransactionState.PENDING
            assert not conn.closed

        async with anyio.create_task_group() as group:
            for _ in range(CONNECTIONS):
                group.start_soon(client, await AsyncConnection.connect(proxy.dsn))

        truth = {id for (id,) in admin.execute("select id from t")}
    lies = [id for id, believed in tally.believed.items() if believed != (id in truth)]
    wrong = [id for id, s in tally.states.items() if (s.name == "COMMITTED") != (id in truth)]
    assert (lies, wrong) == ([], [])
    # No connection was replaced: the proxy saw as many as were opened.
    assert proxy.stats.connections == CONNECTIONS == len(tally.backends)
    assert tally.in_commit > CANCELLATIONS // 10
    figures(cancelled=tally.tried, in_commit=tally.in_commit, lies=0, connections_lost=0)
