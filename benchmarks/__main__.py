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
import subprocess
import sys
import tempfile
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import asyncpg
import psycopg
import psycopg_pool
import sqlalchemy
import trio
import uvloop

from aiopgsafe.testing import TemporaryServer
from benchmarks import notifying, outcomes, unshielded
from benchmarks.clients import SETUP, pooled, single
from benchmarks.distance import distant
from benchmarks.report import Report
from benchmarks.turns import ServerClock, measure
from benchmarks.workloads import POOL_SIZE, TASKS, connecting, contend, on_a_pool, on_one_connection

LOOPS = ("asyncio", "uvloop", "trio")


class Bench:
    """What is asked for, and where the server is."""

    def __init__(self, options: argparse.Namespace, server: TemporaryServer) -> None:
        self.dsn: str = server.socket_dsn if options.unix else server.dsn
        self.turns: int = options.turns
        self.only: list[str] = options.only
        self.report = Report()
        self.clock = ServerClock(postmaster(server))

    def wanted(self, title: str) -> bool:
        return not self.only or any(word.lower() in title.lower() for word in self.only)

    async def measure(self, loop: str, title: str, workload: Any, operations: int = 25) -> None:
        if not self.wanted(title):
            return
        turns = max(2, self.turns if operations > 1 else self.turns // 5)
        await measure(workload, 1 + turns // 10, operations)  # caches, prepared statements
        figures = await measure(workload, turns, operations, self.clock)
        self.report.add(loop, title, figures)

    async def here(self, loop: str) -> None:
        peers = loop != "trio"
        async with AsyncExitStack() as stack:
            clients = await single(self.dsn, stack, peers=peers)
            workloads = await on_one_connection(clients, stack)
            for title, (workload, operations) in workloads.items():
                await self.measure(loop, title, workload, operations)
        if peers:
            async with AsyncExitStack() as stack:
                shields = await unshielded.workload(self.dsn, stack)
                await self.measure(loop, "what the shield costs", shields)
        async with AsyncExitStack() as stack:
            for title, workload in on_a_pool(await pooled(self.dsn, stack, peers=peers)).items():
                await self.measure(loop, title, workload)
        if peers:
            await self.contention(loop)
            await self.measure(loop, "connect", connecting(self.dsn), 2)
        if self.wanted("NOTIFY to handler"):
            self.report.add(
                loop, "NOTIFY to handler", await notifying.latencies(self.dsn, self.turns)
            )

    async def contention(self, loop: str) -> None:
        """Many tasks: the clients take turns, and have as many transactions in each."""
        for tasks in TASKS:
            title = f"{tasks:,} tasks on a pool of {POOL_SIZE}"
            if not self.wanted(title):
                continue
            async with AsyncExitStack() as stack:
                clients = await pooled(self.dsn, stack, POOL_SIZE, peers=True)
                rates: dict[str, list[float]] = {name: [] for name in clients}
                waits: dict[str, list[float]] = {name: [] for name in clients}
                order = random.Random(0)
                for turn in range(2 + self.turns // 20):
                    for name, client in order.sample(list(clients.items()), len(clients)):
                        rate, p99 = await contend(client, tasks, max(1, 1000 // tasks))
                        if turn:  # the first one fills caches
                            rates[name].append(rate)
                            waits[name].append(p99)
            medians = {name: statistics.median(values) for name, values in rates.items()}
            self.report.add_rates(loop, title, medians)
            medians = {name: statistics.median(values) for name, values in waits.items()}
            self.report.add_waits(loop, title, medians)

    async def far(self, loop: str, dsn: str) -> None:
        async with AsyncExitStack() as stack:
            for title, workload in on_a_pool(await pooled(dsn, stack, peers=True)).items():
                if "INSERT" in title:
                    await self.measure(loop, f"{title}, 1 ms away", workload, 5)

    async def durable(self, loop: str) -> None:
        async with AsyncExitStack() as stack:
            workload = await outcomes.workload(self.dsn, stack)
            await self.measure(loop, "what asking costs, durable INSERT", workload)


def postmaster(server: TemporaryServer) -> int:
    return int((server.data_directory / "postmaster.pid").read_text().split()[0])


def pin(server: TemporaryServer) -> None:
    core = {min(os.sched_getaffinity(0))}
    os.sched_setaffinity(postmaster(server), core)  # its children inherit it
    os.sched_setaffinity(0, core)


def run_on(loop: str, report: Callable[..., Coroutine[Any, Any, None]], *args: Any) -> None:
    if loop == "trio":
        trio.run(report, loop, *args)
    else:
        (uvloop if loop == "uvloop" else asyncio).run(report(loop, *args))


def pgbench(server: TemporaryServer) -> None:
    """The one-INSERT transaction by a client in C: the server's share, and the kernel's."""
    with tempfile.TemporaryDirectory() as directory:
        script = Path(directory) / "transaction.sql"
        script.write_text("begin;\ninsert into bench values (1, 'one');\ncommit;\n")
        command = [server.bindir / "pgbench", "-n", "-M", "prepared", "-T", "3", "-f", script]
        result = subprocess.run(
            [*map(str, command), server.dsn], capture_output=True, text=True, check=True
        )
    for line in result.stdout.splitlines():
        if line.startswith("latency average"):
            print(f"pgbench, one INSERT in three round trips: {line}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--turns", type=int, default=200, help="of 25 operations each, or fewer")
    parser.add_argument("--only", nargs="+", default=[], help="words of the workloads' titles")
    parser.add_argument("--loops", nargs="+", default=LOOPS, choices=LOOPS)
    parser.add_argument("--spread", action="store_true", help="do not pin to one core")
    parser.add_argument("--unix", action="store_true", help="unix socket instead of loopback")
    parser.add_argument("--plots", type=Path, help="write an SVG for each workload here")
    options = parser.parse_args()
    print(
        f"Python {platform.python_version()}, psycopg {psycopg.__version__},"
        f" psycopg_pool {psycopg_pool.__version__}, asyncpg {asyncpg.__version__},"
        f" SQLAlchemy {sqlalchemy.__version__}; µs per operation; ratios: above 1 is better for us"
    )
    with TemporaryServer(settings={"synchronous_commit": "off"}) as server:
        print(f"PostgreSQL {server.version}, synchronous_commit off")
        if not options.spread and sys.platform == "linux":
            pin(server)
        with psycopg.connect(server.dsn, autocommit=True) as conn:
            conn.execute(SETUP.encode())
        bench = Bench(options, server)
        for loop in options.loops:
            run_on(loop, bench.here)
        if bench.wanted("pgbench"):
            pgbench(server)
        if bench.wanted("1 ms away"):
            os.sched_setaffinity(0, range(os.cpu_count() or 1))
            for loop in options.loops:
                if loop != "trio":
                    with distant(bench.dsn) as far:
                        run_on(loop, bench.far, far)
    durable: dict[str, str | int | bool] = {
        "synchronous_commit": "on",
        "fsync": True,
        "full_page_writes": True,
    }
    if bench.wanted("durable"):
        with TemporaryServer(settings=durable) as server:
            bench.dsn, bench.clock = server.dsn, ServerClock(postmaster(server))
            for loop in options.loops:
                run_on(loop, bench.durable)
    if options.plots is not None:
        from benchmarks.plots import plot

        plot(bench.report, options.plots)


main()
