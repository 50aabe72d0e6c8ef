"""One side of the demo: psycopg's clients, or ours, from the empty tables to the figures."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import Any

import anyio
import anyio.to_thread
import psycopg

from .bank import Bank, open_bank, plan
from .cancelling import ways_of
from .clients import Book, open_library, run_client
from .figures import Figures, figures_of
from .interrupts import Interrupts
from .wires import Wires

KILL_EVERY = 0.5
"""Seconds between two killed server processes."""

LAST_WORDS = 4.0
"""Seconds for the clients to finish what they have begun, after which they are stuck."""


LEFT_RUNNING_AFTER = 1.0
"""Seconds after the last cancellation: what runs then was not cancelled on the server."""


@dataclass(frozen=True)
class Side:
    """What is to be run.

    :ivar loop: "asyncio", "uvloop" or "trio".
    :ivar dsn: the server, directly.
    :ivar proxied_dsn: the server as the proxies reach it.
    :ivar seconds: for how long transfers are begun.
    """

    name: str
    loop: str
    dsn: str
    proxied_dsn: str
    seconds: float
    seed: int
    clients: int

    def run(self, on_progress: Callable[[Book], None]) -> Figures:
        """Run it, and return its figures.

        :param on_progress: called several times a second.
        :raises KeyboardInterrupt: Ctrl-C.
        """
        book = Book()
        backend = "trio" if self.loop == "trio" else "asyncio"
        options = {"use_uvloop": True} if self.loop == "uvloop" else {}
        with (
            Interrupts() as interrupts,
            open_bank(self.dsn) as bank,
            Wires(self.proxied_dsn, bank) as wires,
        ):

            async def run() -> tuple[int, int]:
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(_watch, interrupts, tasks.cancel_scope, on_progress, book)
                    lost = await self._run(bank, wires, book)
                    tasks.cancel_scope.cancel()
                    return lost
                return 0, 0  # cancelled

            places_lost, left_running = anyio.run(run, backend=backend, backend_options=options)
            interrupts.raise_if_arrived()
            on_progress(book)
            truth = bank.truth()
            return figures_of(
                *(bank, truth, book, wires),
                kinds=ways_of(self.loop),
                size=self.clients,
                places_lost=places_lost,
                left_running=left_running,
            )

    async def _run(self, bank: Bank, wires: Wires, book: Book) -> tuple[int, int]:
        """Return how many places of the pool were lost, how many reports were left running."""
        ways = ways_of(self.loop)
        async with open_library(self.name, wires, self.clients) as library:
            book.started = time.monotonic()
            until = book.started + self.seconds
            random = Random(f"{self.seed}/kills")
            with psycopg.connect(self.dsn, autocommit=True) as direct:
                with anyio.move_on_after(self.seconds + LAST_WORDS):
                    async with anyio.create_task_group() as tasks:
                        tasks.start_soon(_kill_backends, wires, direct, random, until)
                        for number in range(self.clients):
                            transfers = plan(self.seed, number, list(ways))
                            tasks.start_soon(
                                partial(run_client, library, transfers, ways, bank, book, until)
                            )
                await anyio.sleep(LEFT_RUNNING_AFTER)
                running = await anyio.to_thread.run_sync(bank.end_reports, direct)
            return await library.settle(), running


async def _watch(
    interrupts: Interrupts,
    scope: anyio.CancelScope,
    on_progress: Callable[[Book], None],
    book: Book,
) -> None:
    while not interrupts.arrived:
        on_progress(book)
        await anyio.sleep(0.1)
    scope.cancel()


async def _kill_backends(
    wires: Wires, direct: psycopg.Connection[Any], random: Random, until: float
) -> None:
    while time.monotonic() + KILL_EVERY < until:
        await anyio.sleep(KILL_EVERY)
        await anyio.to_thread.run_sync(wires.kill, direct, random)
