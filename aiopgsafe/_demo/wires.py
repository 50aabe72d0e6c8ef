"""The wires: each connection's way to the server, where one sees what really went over it.

Every connection gets a proxy of its own: what passes there is this connection's. So "COMMIT had
been sent" is read off the wire, in the same way for every client library.
"""

from __future__ import annotations

import re
from random import Random
from threading import Lock
from typing import Any, Self

import psycopg
from psycopg.conninfo import make_conninfo

from ..testing import Delay, FaultProxy, Message, command_complete, query
from .bank import Bank

COMMIT_DELAY = 0.02
"""Seconds by which the answer to COMMIT comes late."""

_TRANSFER = re.compile(rb"transfer-\d+-\d+")
_begin = query("BEGIN")
_commit = query("COMMIT")
_committed = command_complete("COMMIT")
_CANCEL_REQUEST = (80877102).to_bytes(4, "big")


class Wire:
    """One connection's way through a proxy. The proxy's thread writes the attributes.

    :ivar pid: of the server process, once the session has begun.
    :ivar left: the client has said goodbye, or its server process was killed.
    :ivar asks: it was opened to ask for the outcome of a COMMIT, not for transfers.
    :ivar committing: the transfer whose COMMIT has passed and whose answer has not.
    """

    def __init__(self, dsn: str, commit_sent: set[str]) -> None:
        self.pid: int | None = None
        self.left = False
        self.asks = False
        self.committing: str | None = None
        self._commit_sent = commit_sent
        self._transfer: str | None = None
        self.proxy = FaultProxy(dsn)
        self.proxy.start()
        self.proxy.inject(Delay(COMMIT_DELAY), self._see)

    @property
    def counts(self) -> bool:
        """Whether it was one of the sessions for transfers."""
        return self.pid is not None and not self.asks

    def _see(self, message: Message) -> bool:
        """Look at each message before it is passed on. True: it is the answer to COMMIT."""
        if message.direction == "frontend":
            if message.type == "B":  # Bind: a statement's parameters
                if found := _TRANSFER.search(message.payload):
                    self._transfer = found[0].decode()
            elif message.type == "P" and b"pg_xact_status" in message.payload:
                self.asks = True
            elif message.type == "X":
                self.left = True
            elif _begin(message):
                self._transfer = None
            elif _commit(message) and self._transfer is not None:
                self.committing = self._transfer
                self._commit_sent.add(self._transfer)
        elif message.type == "K":  # BackendKeyData
            self.pid = int.from_bytes(message.payload[:4], "big")
        elif message.type == "Z":  # ReadyForQuery
            self.committing = None
        else:
            return _committed(message)
        return False


class Wires:
    """All wires of one side of the demo.

    :param dsn: the server, as the proxies reach it.
    :ivar commit_sent: transfers whose COMMIT has passed to the server.
    :ivar answer_lost: those of them whose answer was lost when their server process was killed.
    :ivar killed: sessions that were killed.
    """

    def __init__(self, dsn: str, bank: Bank) -> None:
        self.commit_sent: set[str] = set()  # the proxies' threads add to it: that is atomic
        self.answer_lost: set[str] = set()
        self.killed = 0
        self._dsn = make_conninfo(dsn, application_name=bank.schema)
        self._bank = bank
        self._wires: list[Wire] = []
        self._opened = 0  # by wires that are closed
        self._lock = Lock()  # kill() is called in a thread

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        for wire in self._wires:
            wire.proxy.close()

    def new(self) -> str:
        """Lay a new wire and return its connection string."""
        with self._lock:
            self._close_unused()
            wire = Wire(self._dsn, self.commit_sent)
            self._wires.append(wire)
        return wire.proxy.dsn

    @property
    def opened(self) -> int:
        """How many sessions have been opened for transfers."""
        with self._lock:
            return self._opened + sum(wire.counts for wire in self._wires)

    def kill(self, conn: psycopg.Connection[Any], random: Random) -> None:
        """Kill the server process of any session; what it has on its way is lost.

        Only cutting its wire as well does so: the kernel would deliver what the dead had sent.
        """
        with self._lock:
            alive = [wire for wire in self._wires if wire.pid is not None and not wire.left]
        if not alive:
            return
        wire = random.choice(alive)
        assert wire.pid is not None
        if not self._bank.kill(conn, wire.pid):
            return  # the client was quicker
        with self._lock:
            self.killed += 1
            if wire not in self._wires:
                return  # both at once
            wire.proxy.cut()
            # From here on nothing passes that could change what we look at.
            if wire.committing is not None and not wire.left:
                self.answer_lost.add(wire.committing)
            wire.left = True

    def _close_unused(self) -> None:
        """Close the proxies of connections that have ended: each is a thread and some sockets."""
        for wire in self._wires[:]:
            # Not before the server has ended it, too: what was sent to it must arrive.
            if wire.left and not wire.proxy.stats.open_connections:
                wire.proxy.close()
                self._wires.remove(wire)
                self._opened += wire.counts
