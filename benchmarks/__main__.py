"""Run the benchmarks and print medians and their ratios.

Clients take turns of a few milliseconds in one process on one server, so that
whatever else the machine does hits all of them. The client and the server are
pinned to one core, where that is possible: on two, the time for waking the other
core (tens of µs in a virtual machine) hides what the client costs. `--spread`
leaves them where the system puts them.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import random
import statistics
import sys
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from time import perf_counter

import asyncpg
import psycopg
import uvloop

import aiopgsafe
from aiopgsafe.testing import TemporaryServer
from benchmarks.unshielded import unshielded_copy

Operation = Callable[[], Awaitable[object]]
Workload = dict[str, Operation]

UNSHIELDED: type[psycopg.AsyncConnection] = unshielded_copy().AsyncConnection

TURN = 25
"""Operations in a turn."""


async def workloads(dsn: str, stack: AsyncExitStack) -> dict[str, Workload]:
    theirs, ours, bare = [
        await cls.connect(dsn, autocommit=True)
        for cls in (psycopg.AsyncConnection, aiopgsafe.AsyncConnection, UNSHIELDED)
    ]
    for conn in (theirs, ours, bare):
        stack.push_async_callback(conn.close)
    info = theirs.info
    fast = await asyncpg.connect(
        host=info.host, port=info.port, user=info.user, database=info.dbname
    )
    stack.push_async_callback(fast.close)
    await theirs.execute("create unlogged table if not exists bench (id int, what text)")
    insert = "insert into bench values (%s, %s)"

    def select(conn: psycopg.AsyncConnection) -> Operation:
        async def run() -> None:
            await (await conn.execute("select 1")).fetchone()

        return run

    async def select_asyncpg() -> None:
        await fast.fetchrow("select 1")

    def transaction(conn: psycopg.AsyncConnection) -> Operation:
        async def run() -> None:
            async with conn.transaction():
                await conn.execute(insert, (1, "one"))

        return run

    async def transaction_asyncpg() -> None:
        async with fast.transaction():
            await fast.execute("insert into bench values ($1, $2)", 1, "one")

    return {
        "SELECT 1": {
            "aiopgsafe": select(ours),
            "psycopg": select(theirs),
            "asyncpg": select_asyncpg,
        },
        "one-INSERT transaction": {
            "aiopgsafe": transaction(ours),
            "psycopg": transaction(theirs),
            "asyncpg": transaction_asyncpg,
            "aiopgsafe, unshielded": transaction(bare),
        },
    }


async def measure(workload: Workload, turns: int) -> dict[str, float]:
    """Median µs per operation of each client."""
    samples: dict[str, list[float]] = {name: [] for name in workload}
    order = random.Random(0)
    for _ in range(turns):
        # Who comes after whom matters: each finds the caches as the last one left them.
        for name, operation in order.sample(list(workload.items()), len(workload)):
            start = perf_counter()
            for _ in range(TURN):
                await operation()
            samples[name].append((perf_counter() - start) / TURN * 1e6)
    return {name: statistics.median(values) for name, values in samples.items()}


async def report(loop: str, dsn: str, turns: int) -> None:
    async with AsyncExitStack() as stack:
        for title, workload in (await workloads(dsn, stack)).items():
            await measure(workload, 10)  # caches, prepared statements
            medians = await measure(workload, turns)
            ours = medians["aiopgsafe"]
            cells = [f"{name} {µs:6.1f} µs" for name, µs in medians.items()]
            ratios = [f"{µs / ours:.3f} {name}" for name, µs in medians.items() if µs != ours]
            print(f"{loop:8} {title:24} {', '.join(cells)}")
            print(f"{'':33} as fast as: {', '.join(ratios)}")


def pin(server: TemporaryServer) -> None:
    postmaster = int((server.data_directory / "postmaster.pid").read_text().split()[0])
    core = {min(os.sched_getaffinity(0))}
    os.sched_setaffinity(postmaster, core)  # its children inherit it
    os.sched_setaffinity(0, core)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--turns", type=int, default=300, help=f"of {TURN} operations each")
    parser.add_argument("--spread", action="store_true", help="do not pin to one core")
    parser.add_argument("--unix", action="store_true", help="unix socket instead of loopback")
    options = parser.parse_args()
    with TemporaryServer(settings={"synchronous_commit": "off"}) as server:
        if not options.spread and sys.platform == "linux":
            pin(server)
        print(
            f"PostgreSQL {server.version}, Python {platform.python_version()},"
            f" psycopg {psycopg.__version__}, asyncpg {asyncpg.__version__};"
            " medians; ratios: the other's time to ours, higher is better for us"
        )
        dsn = server.socket_dsn if options.unix else server.dsn
        for loop, run in (("asyncio", asyncio.run), ("uvloop", uvloop.run)):
            run(report(loop, dsn, options.turns))


main()
