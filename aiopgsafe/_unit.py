"""One transaction of the server, and the table of its states."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from ._outcome import (
    ACTIVE,
    COMMITTED,
    COMMITTING,
    PENDING,
    ROLLED_BACK,
    UNKNOWN,
    TransactionState,
)
from ._resolver import Origin, Ticket, Token

__all__ = ["TRANSITIONS", "Callback", "Unit"]


TRANSITIONS: dict[TransactionState, tuple[TransactionState, ...]] = {
    # ROLLED_BACK: BEGIN failed, or was undone.
    PENDING: (ACTIVE, ROLLED_BACK),
    # UNKNOWN: a statement inside the block was COMMIT or ROLLBACK itself.
    ACTIVE: (COMMITTING, ROLLED_BACK, UNKNOWN),
    COMMITTING: (COMMITTED, ROLLED_BACK, UNKNOWN),
    COMMITTED: (),
    ROLLED_BACK: (),
    UNKNOWN: (),
}
"""The states that may follow each state. There is no way back."""


@dataclass(slots=True)
class Callback:
    owner: object
    when: TransactionState
    fn: Callable[[], object]


class Unit:
    """One transaction of the server: what a COMMIT decides about.

    The outermost block has one and its savepoints share it. Savepoints inside a
    transaction that no block began (psycopg's implicit BEGIN) share one that
    belongs to the connection and is settled by its `commit()` or `rollback()`.
    """

    __slots__ = (
        "_lsn",
        "_xid",
        "callbacks",
        "give_back",
        "origin",
        "prepared",
        "state",
        "ticketed",
        "token",
        "token_sent",
    )

    def __init__(self, state: TransactionState = PENDING, with_token: bool = False) -> None:
        self.state = state
        self.give_back: Callable[[], Awaitable[None]] | None = None
        """Gives the connection back to its pool before callbacks run, where nobody needs it more.

        Were they to wait for another one while their block keeps its own, as many
        blocks as the pool has places would wait for each other.
        """
        self.prepared = False
        """In two phases, and through the first: it outlives its session."""
        self.callbacks: list[Callback] = []
        self.token: Token | None = Token.new() if with_token else None
        """Goes with COMMIT, if it is wanted and the transaction may write."""
        self.token_sent = False
        self.ticketed = False
        """Whether somebody has the ticket: then COMMIT keeps what the ticket promises, or fails."""
        self.origin: Origin | None = None
        """Of the session: where its number is, if that is known."""
        self._xid = self._lsn = b""

    def number(self, origin: Origin, xid: bytes, lsn: bytes) -> None:
        """Note the transaction's number, and a position in the WAL behind it, as they came.

        Hardly any is ever read: only where a COMMIT is lost.
        """
        self.origin, self._xid, self._lsn = origin, xid, lsn

    @property
    def xid(self) -> int | None:
        """The transaction's number, as soon as it is known."""
        return int(self._xid) if self._xid else None

    @property
    def number_ticket(self) -> Ticket | None:
        """What it takes to ask for the outcome by the number; None while it isn't known."""
        if self.origin is None:
            return None
        return Ticket(int(self._xid), self._lsn.decode(), self.origin)

    @property
    def sent_ticket(self) -> Ticket | Token | None:
        """What it takes to ask now. A token that was never sent tells nothing."""
        return self.token if self.token_sent else self.number_ticket

    def advance(self, state: TransactionState) -> None:
        if state not in TRANSITIONS[self.state]:
            raise AssertionError(f"a transaction went from {self.state} to {state}")
        self.state = state

    def take(self, savepoint: object = None) -> list[Callback]:
        """The callbacks that are to run now; those that never will are dropped with them.

        :param savepoint: one that was rolled back: only its own; None: all, by
            what became of the transaction.
        """
        # Sync code may be torn here: `callbacks` is as it was, or as it is to be.
        taken = self.callbacks
        if savepoint is None:
            run = [cb for cb in taken if cb.when is self.state]
            self.callbacks = []
            return run
        run = self.undone(savepoint)
        self.callbacks = [cb for cb in taken if cb.owner is not savepoint]
        return run

    def undone(self, savepoint: object) -> list[Callback]:
        """The callbacks of a savepoint that are for its rollback."""
        return [cb for cb in self.callbacks if cb.owner is savepoint and cb.when is ROLLED_BACK]
