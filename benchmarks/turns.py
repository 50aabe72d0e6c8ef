"""Clients take turns, so that whatever else the machine does hits all of them."""

from __future__ import annotations

import random
import statistics
from collections.abc import Awaitable, Callable
from pathlib import Path
from time import perf_counter, process_time
from typing import NamedTuple

Operation = Callable[[], Awaitable[object]]
Workload = dict[str, Operation]
"""What is measured, by each client's name; ours is "aiopgsafe"."""

TURN = 25
"""Operations in a turn."""


class Figures(NamedTuple):
    """Of one operation of one client, in µs; p99: of the single operations.

    :ivar server: CPU of the server's processes; 0 where it can't be read.
    """

    median: float
    p99: float
    client: float
    server: float


class ServerClock:
    """The CPU time that a server's processes have used."""

    def __init__(self, postmaster: int) -> None:
        self._children = Path(f"/proc/{postmaster}/task/{postmaster}/children")

    def __call__(self) -> float:
        """In seconds; of those that run now."""
        total = 0
        try:
            for pid in self._children.read_text().split():
                total += int(Path(f"/proc/{pid}/schedstat").read_text().split()[0])
        except (FileNotFoundError, ProcessLookupError):  # not Linux, or one has just ended
            pass
        return total / 1e9


def no_clock() -> float:
    return 0.0


async def measure(
    workload: Workload,
    turns: int,
    operations: int = TURN,
    server: Callable[[], float] = no_clock,
) -> dict[str, Figures]:
    """The clients take turns of so many operations each."""
    samples: dict[str, list[float]] = {name: [] for name in workload}
    client_time = dict.fromkeys(workload, 0.0)
    server_time = dict.fromkeys(workload, 0.0)
    order = random.Random(0)
    for _ in range(turns):
        # Who comes after whom matters: each finds the caches as the last one left them.
        for name, operation in order.sample(list(workload.items()), len(workload)):
            times = samples[name]
            server_before, before = server(), process_time()
            for _ in range(operations):
                start = perf_counter()
                await operation()
                times.append(perf_counter() - start)
            client_time[name] += process_time() - before
            server_time[name] += server() - server_before
    count = turns * operations
    return {
        name: Figures(
            statistics.median(times) * 1e6,
            statistics.quantiles(times, n=100)[-1] * 1e6 if count > 1 else times[0] * 1e6,
            client_time[name] / count * 1e6,
            server_time[name] / count * 1e6,
        )
        for name, times in samples.items()
    }
