"""The clients: what they do, and what they are told about it."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, Protocol

import anyio
import psycopg
import psycopg_pool
from psycopg_pool import PoolTimeout

from .. import Database, Transaction, TransactionState
from .bank import REPORT, Bank, Transfer
from .cancelling import Way
from .wires import Wires

OPEN_TIMEOUT = 10.0
"""Seconds for a pool to open its connections."""

POOL_TIMEOUT = 2.0
"""Seconds for a client to get a connection."""

SETTLE_TIMEOUT = 2.0
"""Seconds for a pool to be complete again when its clients have finished."""

REPORT_CANCELLED_AFTER = 0.01
"""Seconds."""

CALM_START = 3
"""How many transfers of each client nobody cancels, so that we know what they take."""


@dataclass
class Note:
    """What a client knows of a transfer.

    :ivar ending: how the transaction's block ended: "" if it never began.
    :ivar told_committed: how many times the client was told that it is committed.
    :ivar state: of the transaction, if the library has such a thing.
    """

    transfer: Transfer
    ending: Literal["", "normal", "cancelled", "failed"] = ""
    told_committed: int = 0
    state: TransactionState | None = None


@dataclass
class Book:
    """The notes of all clients, by the transfers' ids.

    :ivar unexpected: exceptions that are no cancellation and no lost connection: how many.
    :ivar finished: clients that have come to their end.
    :ivar cancelled: transfers that ended with a cancellation.
    :ivar reports: that were begun, each of which is cancelled.
    :ivar usual_time: seconds that a transfer takes when nobody cancels it.
    :ivar started: `time.monotonic()` when the clients began; None: they haven't.
    """

    notes: dict[str, Note] = field(default_factory=dict)
    unexpected: dict[str, int] = field(default_factory=dict)
    finished: int = 0
    cancelled: int = 0
    reports: int = 0
    usual_time: float = 0.0
    started: float | None = None

    def note_committed(self, transfer_id: str) -> None:
        self.notes[transfer_id].told_committed += 1

    def note_error(self, error: Exception) -> None:
        if isinstance(error, psycopg.OperationalError) and not isinstance(error, PoolTimeout):
            return  # the server process was killed
        name = f"{type(error).__name__}: {error}"
        self.unexpected[name] = self.unexpected.get(name, 0) + 1

    def note_time(self, seconds: float) -> None:
        # A moving average: what a transfer takes changes with what the others do.
        self.usual_time += (seconds - self.usual_time) * (0.1 if self.usual_time else 1.0)


class Library(Protocol):
    """One side: connections to the bank, and how its users move money over them."""

    async def transfer(self, transfer: Transfer, bank: Bank, book: Book) -> None: ...

    async def report(self) -> None: ...

    async def settle(self) -> int:
        """Replace the connections that were killed; how many places remain without one."""


class Psycopg:
    """psycopg has no callbacks: what is to follow a COMMIT stands behind the block."""

    def __init__(self, pool: psycopg_pool.AsyncConnectionPool[Any]) -> None:
        self._pool = pool

    async def transfer(self, transfer: Transfer, bank: Bank, book: Book) -> None:
        async with self._pool.connection() as conn, conn.transaction():
            await bank.move(conn, transfer)
        book.note_committed(transfer.id)

    async def report(self) -> None:
        async with self._pool.connection() as conn:
            await conn.execute(REPORT)

    async def settle(self) -> int:
        return await _settle(self._pool)


class Aiopgsafe:
    def __init__(self, db: Database) -> None:
        self._db = db

    async def transfer(self, transfer: Transfer, bank: Bank, book: Book) -> None:
        tx: Transaction[Any] | None = None
        try:
            async with self._db.transaction() as tx:
                tx.on_commit(book.note_committed, transfer.id)
                await bank.move(tx, transfer)
        finally:
            if tx is not None:
                book.notes[transfer.id].state = tx.state

    async def report(self) -> None:
        await self._db.execute(REPORT)

    async def settle(self) -> int:
        return await _settle(self._db.pool)


async def _settle(pool: Any) -> int:
    deadline = time.monotonic() + SETTLE_TIMEOUT
    while True:
        await pool.check()
        available = int(pool.get_stats()["pool_available"])
        if available == pool.max_size or time.monotonic() > deadline:
            return int(pool.max_size) - available
        await anyio.sleep(0.01)


@asynccontextmanager
async def open_library(name: str, wires: Wires, size: int) -> AsyncIterator[Library]:
    """A side with a place for each client."""

    async def conninfo() -> str:
        return wires.new()

    library: Library
    pool: Any
    if name == "psycopg":
        pool = psycopg_pool.AsyncConnectionPool(
            conninfo, min_size=size, timeout=POOL_TIMEOUT, open=False
        )
        library = Psycopg(pool)
    else:
        db = Database(conninfo, min_size=size, timeout=POOL_TIMEOUT)
        pool = db.pool
        library = Aiopgsafe(db)
    # Interrupted, psycopg's would leave workers behind that let nobody cancel them.
    with anyio.CancelScope(shield=True):
        await pool.open(wait=True, timeout=OPEN_TIMEOUT)
    try:
        yield library
    finally:
        with anyio.CancelScope(shield=True):
            await pool.close()


async def run_client(
    library: Library,
    transfers: Iterator[Transfer],
    ways: dict[str, Way],
    bank: Bank,
    book: Book,
    until: float,
) -> None:
    """Move money until it is late.

    :param until: `time.monotonic()`.
    """

    async def work(note: Note) -> None:
        started = time.monotonic()
        try:
            await library.transfer(note.transfer, bank, book)
        except anyio.get_cancelled_exc_class():
            note.ending = "cancelled"
            book.cancelled += 1
            raise
        except Exception as error:
            note.ending = "failed"
            book.note_error(error)
        else:
            note.ending = "normal"
            book.note_time(time.monotonic() - started)

    async def report() -> None:
        try:
            await library.report()
        except psycopg.Error as error:  # here, not in a group: its server process was killed
            book.note_error(error)
        finally:
            book.reports += 1

    for count, transfer in enumerate(transfers):
        if time.monotonic() >= until:
            break
        note = book.notes[transfer.id] = Note(transfer)
        delay = None if count < CALM_START else transfer.moment * book.usual_time
        try:
            if transfer.report:
                await ways[transfer.kind](report, REPORT_CANCELLED_AFTER)
            await ways[transfer.kind](partial(work, note), delay)
        except Exception as error:
            book.note_error(error)
    book.finished += 1
