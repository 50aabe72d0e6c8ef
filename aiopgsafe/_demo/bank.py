"""The bank: accounts and transfers in a schema of their own, and the truth about them."""

from __future__ import annotations

import gc
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from random import Random
from typing import Any

import psycopg
from psycopg import sql

from .. import Transaction

ACCOUNTS = 200
BALANCE = 10_000
"""Of each account at the start, in euros."""

REPORT_EVERY = 15
"""Of so many transfers one comes after a report."""

REPORT = b"SELECT pg_sleep(60) AS report"

SETTLE_TIMEOUT = 10.0
"""Seconds for the server to end the sessions whose clients have left."""

DROP_TIMEOUT = 10
"""Seconds for each step of dropping the schema."""


@dataclass(frozen=True)
class Transfer:
    """Money that a client is to move, and what is to interrupt it.

    :ivar id: unique, and found again in what goes over the wire.
    :ivar amount: euros.
    :ivar kind: the name of the way in which it is cancelled.
    :ivar moment: when: as a part of the time that a transfer usually takes.
    :ivar report: before it the client begins a query that takes a minute, and is cancelled.
    """

    id: str
    source: int
    target: int
    amount: int
    kind: str
    moment: float
    report: bool = False


def plan(seed: int, client: int, kinds: list[str]) -> Iterator[Transfer]:
    """All that one client is to do: the same for the same seed, on either side."""
    random = Random(f"{seed}/{client}")
    number = 0
    while True:
        number += 1
        source, target = random.sample(range(ACCOUNTS), 2)
        # Up to a bit more than the usual time, so that some are cancelled too late.
        moment = random.uniform(0.0, 1.1)
        amount = random.randint(1, 100)
        kind = random.choice(kinds)
        name = f"transfer-{client}-{number}"
        report = number % REPORT_EVERY == 0
        yield Transfer(name, source, target, amount, kind, moment, report)


@dataclass(frozen=True)
class Truth:
    """What is in the tables.

    :ivar committed: the ids of the transfers.
    :ivar balances: the sum of all accounts, in euros.
    """

    committed: frozenset[str]
    balances: int


class Bank:
    """The tables, and the statements of a transfer. `open_bank` makes one."""

    def __init__(self, dsn: str) -> None:
        self.schema = f"aiopgsafe_demo_{secrets.token_hex(4)}"
        """Also the application name of the clients."""
        self.start = ACCOUNTS * BALANCE
        """The sum of all accounts at the start, in euros."""
        self._dsn = dsn
        account, transfer = (
            sql.Identifier(self.schema, table).as_string() for table in ("account", "transfer")
        )
        self._create = (
            f"CREATE SCHEMA {self.schema}",
            f"CREATE TABLE {account} (id int PRIMARY KEY, balance bigint NOT NULL)",
            f"CREATE TABLE {transfer} (id text PRIMARY KEY, source int, target int, amount int)",
            f"INSERT INTO {account} SELECT n, {BALANCE} FROM generate_series(0, {ACCOUNTS - 1}) n",
        )
        self._insert = f"INSERT INTO {transfer} VALUES (%s, %s, %s, %s)".encode()
        self._update = f"UPDATE {account} SET balance = balance + %s WHERE id = %s".encode()
        self._sum = f"SELECT sum(balance)::bigint FROM {account}".encode()
        self._ids = f"SELECT id FROM {transfer}".encode()

    async def move(
        self, conn: psycopg.AsyncConnection[Any] | Transaction[Any], transfer: Transfer
    ) -> None:
        """The statements of one transfer; the caller has begun a transaction."""
        await conn.execute(
            self._insert, (transfer.id, transfer.source, transfer.target, transfer.amount)
        )
        changes = [(-transfer.amount, transfer.source), (transfer.amount, transfer.target)]
        # Always in the same order, so that no two clients wait for each other.
        for change in sorted(changes, key=lambda change: change[1]):
            await conn.execute(self._update, change)

    def end_reports(self, conn: psycopg.Connection[Any]) -> int:
        """How many reports still run on the server; they are ended."""
        query = (
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE application_name = %s AND state = 'active' AND query = %s"
        )
        return len(conn.execute(query, (self.schema, REPORT.decode())).fetchall())

    def truth(self) -> Truth:
        """Read the tables, over a connection of its own, once the clients' sessions have ended.

        :raises TimeoutError: they don't end.
        """
        with psycopg.connect(self._dsn, autocommit=True) as conn:
            self._await_end_of_sessions(conn)
            committed = frozenset(row[0] for row in conn.execute(self._ids))
            ((balances,),) = conn.execute(self._sum)
        return Truth(committed, balances)

    def kill(self, conn: psycopg.Connection[Any], pid: int) -> bool:
        """End a client's session on the server; False if it isn't there, or isn't a client's."""
        query = (
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE pid = %s AND application_name = %s"
        )
        # A pooler before the server would have told us a pid of its own making.
        row = conn.execute(query, (pid, self.schema)).fetchone()
        return bool(row and row[0])

    def create(self) -> None:
        with psycopg.connect(self._dsn) as conn:
            for command in self._create:
                conn.execute(command.encode())

    def drop(self) -> None:
        with psycopg.connect(self._dsn, autocommit=True, connect_timeout=DROP_TIMEOUT) as conn:
            conn.execute(f"SET statement_timeout = '{DROP_TIMEOUT}s'".encode())
            # Nobody needs them any more, and one in a transaction would keep us waiting.
            conn.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE application_name = %s",
                (self.schema,),
            )
            conn.execute(f"DROP SCHEMA IF EXISTS {self.schema} CASCADE".encode())

    def _await_end_of_sessions(self, conn: psycopg.Connection[Any]) -> None:
        """A session that is idle in the end, of a client that never closed it, changes nothing."""
        gc.collect()  # which closes what a client has left in a reference cycle
        query = (
            "SELECT count(*), count(*) FILTER (WHERE state IS DISTINCT FROM 'idle')"
            " FROM pg_stat_activity WHERE application_name = %s"
        )
        deadline = time.monotonic() + SETTLE_TIMEOUT
        while (row := conn.execute(query, (self.schema,)).fetchone()) and row[0]:
            if time.monotonic() > deadline:
                if not row[1]:
                    return
                raise TimeoutError(f"{row[1]} sessions of clients that have left still run")
            time.sleep(0.01)


@contextmanager
def open_bank(dsn: str) -> Iterator[Bank]:
    """A bank, whose schema is dropped at the end, whatever that end is.

    :raises psycopg.OperationalError: the schema can't be dropped.
    """
    bank = Bank(dsn)
    try:
        bank.create()
        yield bank
    finally:
        try:
            bank.drop()
        except psycopg.Error as error:
            raise psycopg.OperationalError(
                f"the schema {bank.schema} could not be dropped: {error}"
            ) from error
