"""Ending transactions without a block: `commit()`, `rollback()`, and two-phase commit."""

from __future__ import annotations

from typing import TYPE_CHECKING

import psycopg
from psycopg import pq
from psycopg.rows import Row

from .._backends import Expired
from .._ending import Section, commit, rollback, run
from .._outcome import TransactionState
from .._resolver import Origin
from .._shield import Shield
from .._unit import Unit
from ._asking import Reach, look_up
from ._events import ConnectionEvents

if TYPE_CHECKING:
    from psycopg import Xid

    from .._resolver import Ticket, Token

IDLE = pq.TransactionStatus.IDLE


class Endings(ConnectionEvents[Row]):
    """The part of `AsyncConnection` that ends transactions."""

    _section: Section | None
    _reach: Reach

    async def _look_up(self, ticket: Ticket | Token, until: float) -> tuple[TransactionState, str]:
        """What became of a transaction whose COMMIT was lost, and what was tried to know it."""
        origin = self._origin if isinstance(self._origin, Origin) else None
        return await look_up(ticket, self._reach, self._backend, until, origin)

    async def commit(self) -> None:
        """Commit the current transaction; nothing happens if there is none.

        Once COMMIT has been sent, cancellations and signals wait until its outcome
        is known, and carry a note that says it.

        Raises `CommitRolledBack`, `CommitUnknown`, or the server's error.
        """
        unit = self._unit or Unit(TransactionState.ACTIVE)
        try:
            await commit(self, unit, self._commit_unit_gen(unit))
        finally:
            self._settled(unit)

    async def rollback(self) -> None:
        """Roll back the current transaction; nothing happens if there is none. Shielded."""
        unit = self._unit
        try:
            await rollback(self, unit, self._rollback_gen())
        finally:
            self._settled(unit)

    async def tpc_commit(self, xid: Xid | str | None = None) -> None:
        """Commit a two-phase transaction, prepared or not. Shielded as `commit()`."""
        unit = self._unit or Unit(TransactionState.ACTIVE)
        limit: bytes | None = None
        if self._limited and self.pgconn.transaction_status == IDLE and not self._pipeline:
            async with self.lock:
                limit = await self.wait(self._unlimit_gen())
        try:
            await commit(self, unit, self._tpc_commit_gen(unit, xid))
        finally:
            self._settled(unit)
            if limit is not None and not self.closed:
                await self._limit_again(limit)

    async def _limit_again(self, limit: bytes) -> None:
        """Put a timeout back; the outcome is known already, whatever becomes of this."""
        shield = Shield(self._backend, grace=self.cancel_timeout)
        try:
            command = b"SET statement_timeout TO '%s'" % limit
            await run(self, shield, self._commands_gen([command]))
        except (Expired, psycopg.Error) as exc:
            self._drop(f"its statement_timeout could not be put back: {exc}")
        if shield.held is not None:
            raise shield.held

    async def tpc_rollback(self, xid: Xid | str | None = None) -> None:
        """Roll back a two-phase transaction, prepared or not. Shielded."""
        unit = self._unit
        try:
            await rollback(self, unit, self._tpc_finish_gen("ROLLBACK", xid))
        finally:
            self._settled(unit)

    async def _settle_at_close(self) -> None:
        unit, self._unit = self._unit, None
        if unit is not None and unit.state is TransactionState.ACTIVE:
            prepared = self._tpc is not None and self._tpc[1]
            async with Section(self) as section:
                unit.advance(TransactionState.UNKNOWN if prepared else TransactionState.ROLLED_BACK)
                section.outcome = unit.state
                section.callbacks = unit.take()
