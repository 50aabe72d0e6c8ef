"""Clients take turns, so that whatever else the machine does hits all of them."""

from __future__ import annotations

import random
import statistics
from collections.abc import Awaitable, Callable
from time import perf_counter

Operation = Callable[[], Awaitable[object]]
Workload = dict[str, Operation]
"""What is measured, by each client's name; ours is "aiopgsafe"."""

TURN = 25
"""Operations in a turn."""


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


def print_row(loop: str, title: str, figures: dict[str, float], unit: str = "µs") -> None:
    """Everybody's figure, and how many times ours the others' are."""
    ours = figures["aiopgsafe"]
    cells = [f"{name} {figure:6.1f} {unit}" for name, figure in figures.items()]
    ratios = [f"{figure / ours:.3f} {name}" for name, figure in figures.items() if figure != ours]
    print(f"{loop:8} {title:32} {', '.join(cells)}")
    print(f"{'':41} the others' to ours: {', '.join(ratios)}")
