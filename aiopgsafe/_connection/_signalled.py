"""A statement that a signal cancels: `AsyncConnection.cancel_on_signal()`."""

from __future__ import annotations

import logging
from time import monotonic
from typing import TYPE_CHECKING, Any

from psycopg import pq

from .._backends import Expired
from .._shield import Shield
from ._statements import ending_statement, name_of
from ._stopping import FIRST_PAUSE, StatementStopping

if TYPE_CHECKING:
    from psycopg.abc import PQGen

logger = logging.getLogger("aiopgsafe")

ACTIVE = pq.TransactionStatus.ACTIVE


class SignalWatch:
    """Asked when the signal arrives: takes the first one that finds a statement to cancel."""

    def __init__(self, conn: StatementStopping[Any]) -> None:
        self._conn = conn
        self._taken = False

    def __call__(self, signum: int) -> bool:
        # Between any two bytecodes: look and note, the rest is for the event loop.
        conn = self._conn
        if self._taken or not cancellable(conn):
            return False
        self._taken = True
        conn._backend.run_sync_soon(self._begin, conn._channel.generator)
        return True

    def _begin(self, gen: PQGen[Any] | None) -> None:
        conn = self._conn
        if conn._channel.generator is gen and cancellable(conn):
            conn._signalled = SignalledCancel(conn, gen)


def cancellable(conn: StatementStopping[Any]) -> bool:
    """Whether a statement runs that somebody beside its task may cancel."""
    if conn.closed or conn._signalled is not None:
        return False
    gen = conn._channel.generator
    if gen is None:
        # A COPY or a stream() between two of its steps is running, too.
        return conn.pgconn.transaction_status == ACTIVE
    if gen is conn._uncancellable or name_of(gen) == "notifies":
        return False
    return ending_statement(gen) is None


class SignalledCancel:
    """Cancels on the server, beside the task that waits for the statement.

    Who waits sees the statement end, and then waits for us (`dealt_with`): a request
    that is still on its way would hit the next statement.
    """

    def __init__(self, conn: StatementStopping[Any], gen: PQGen[Any] | None) -> None:
        self._conn = conn
        self._gen = gen
        self._over = conn._backend.waiter()
        self._deadline = monotonic() + conn.cancel_timeout
        self._job = conn._backend.background(self._run)

    async def _run(self) -> None:
        conn = self._conn
        shield = Shield(conn._backend)
        pause = FIRST_PAUSE
        while not conn.closed and (self._gen is None or conn._channel.generator is self._gen):
            try:
                await conn._send_cancel(shield, self._deadline)
            except Expired:
                # It may still get there.
                conn._drop("a cancel request was not dealt with")
                return
            if self._gen is None:
                return
            self._over = conn._backend.waiter()
            self._over.limit(min(monotonic() + pause, self._deadline))
            try:
                await self._over.wait()
            except Expired:
                pause *= 2
                if monotonic() >= self._deadline:
                    logger.warning("%s does not end the cancelled statement", conn)
                    return

    async def dealt_with(self) -> None:
        """The statement has ended: wait until no request is on its way any more."""
        self._over.wake()
        shield = Shield(self._conn._backend)
        await shield.hold(self._job)
        if shield.held is not None:
            raise shield.held
