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
import sys
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from typing import Any

import asyncpg
import psycopg
import psycopg_pool
import trio
import uvloop

from aiopgsafe.testing import TemporaryServer
from benchmarks import connections, notifying, outcomes, pools, transactions
from benchmarks.distance import distant
from benchmarks.turns import TURN, measure, print_row


async def report(loop: str, dsn: str, turns: int) -> None:
    async with AsyncExitStack() as stack:
        for title, workload in (await connections.workloads(dsn, stack)).items():
            await measure(workload, 10)  # caches, prepared statements
            print_row(loop, title, await measure(workload, turns))
    await report_transactions(loop, dsn, turns)
    async with AsyncExitStack() as stack:
        clients = await pools.pools(dsn, stack)
        workload = pools.acquiring(clients)
        await measure(workload, 10)
        print_row(loop, "pool: acquire + release", await measure(workload, turns))
        costs, waits = await pools.contention(clients, max(1, turns // 20))
        print_row(loop, f"{pools.TASKS:,} tasks on {pools.SIZE}", costs)
        print_row(loop, "  p99 of their waits", waits, "ms")
    await report_notifying(loop, dsn, turns)


async def report_transactions(loop: str, dsn: str, turns: int, where: str = "") -> None:
    async with AsyncExitStack() as stack:
        clients = await transactions.clients(dsn, stack)
        for title, workload in transactions.workloads(clients).items():
            await measure(workload, 1 + turns // 30)
            print_row(loop, title + where, await measure(workload, turns))


async def report_notifying(loop: str, dsn: str, turns: int) -> None:
    print_row(loop, "NOTIFY to handler", await notifying.latencies(dsn, turns))


async def report_outcomes(loop: str, dsn: str, turns: int) -> None:
    async with AsyncExitStack() as stack:
        workload = await outcomes.workload(dsn, stack)
        await measure(workload, 10)
        print_row(loop, "INSERT, durable", await measure(workload, turns))


def pin(server: TemporaryServer) -> None:
    postmaster = int((server.data_directory / "postmaster.pid").read_text().split()[0])
    core = {min(os.sched_getaffinity(0))}
    os.sched_setaffinity(postmaster, core)  # its children inherit it
    os.sched_setaffinity(0, core)


def run_on(loop: str, report: Callable[..., Coroutine[Any, Any, None]], *args: Any) -> None:
    if loop == "trio":
        trio.run(report, loop, *args)
    else:
        (uvloop if loop == "uvloop" else asyncio).run(report(loop, *args))


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
            f" psycopg {psycopg.__version__}, psycopg_pool {psycopg_pool.__version__},"
            f" asyncpg {asyncpg.__version__};"
            " medians; ratios: above 1 is better for us"
        )
        dsn = server.socket_dsn if options.unix else server.dsn
        for loop in ("asyncio", "uvloop"):
            run_on(loop, report, dsn, options.turns)
            with distant(dsn) as far:
                run_on(loop, report_transactions, far, max(1, options.turns // 30), ", 1 ms away")
        run_on("trio", report_notifying, dsn, options.turns)
    durable: dict[str, str | int | bool] = {
        "synchronous_commit": "on",
        "fsync": True,
        "full_page_writes": True,
    }
    with TemporaryServer(settings=durable) as server:
        dsn = server.socket_dsn if options.unix else server.dsn
        turns = max(1, options.turns // 5)
        for loop in ("asyncio", "uvloop", "trio"):
            run_on(loop, report_outcomes, dsn, turns)


main()
