"""What becomes of a statement whose task is interrupted: cancelled on the server, nothing left."""

from __future__ import annotations

import logging
from time import monotonic
from typing import TYPE_CHECKING, Any, cast

import psycopg
from psycopg import errors, generators, pq
from psycopg._capabilities import capabilities
from psycopg.rows import Row

from .._backends import Backend, Channel, Expired, Job
from .._shield import Shield
from ._generators import EndingGenerators
from ._statements import ending_statement

if TYPE_CHECKING:
    from psycopg.abc import PQGen

logger = logging.getLogger("aiopgsafe")

ACTIVE = pq.TransactionStatus.ACTIVE
COPYING = (pq.ExecStatus.COPY_IN, pq.ExecStatus.COPY_OUT, pq.ExecStatus.COPY_BOTH)

FIRST_PAUSE = 0.05
"""Seconds to wait for a cancelled statement to end before cancelling again; doubled each time.

A cancel request comes on a connection of its own and may overtake the statement:
the server then finds nothing to cancel and the statement runs on.
"""


class StatementStopping(EndingGenerators[Row]):
    """The part of `AsyncConnection` that cancels statements."""

    commit_timeout: float
    cancel_timeout: float
    _backend: Backend
    _channel: Channel

    def _drop(self, reason: str) -> None:
        logger.warning("closing %s: %s", self, reason)
        self._channel.close(psycopg.OperationalError(f"the connection is closed: {reason}"))
        self.pgconn.finish()

    async def _stop_statement(self, interruption: BaseException, gen: PQGen[Any]) -> None:
        """Leave nothing of an interrupted statement: on the server, in libpq, in `gen`.

        The generator is driven to its end, so that psycopg's own state (prepared
        statements, results) stays true. The cancel request has been dealt with by
        the server before the result counts: a late one would hit the next
        statement.
        """
        shield = Shield(self._backend)
        shield.hold_back(interruption)
        if (cursor := ending_statement(gen)) is not None:
            # The user's own COMMIT: cancelling it could separate what the server
            # decides from what it says.
            await self._finish_ending(shield, interruption, cursor)
            return
        deadline = monotonic() + self.cancel_timeout
        pause = FIRST_PAUSE
        try:
            while self._in_progress():
                await self._send_cancel(shield, deadline)
                self._channel.extend(min(monotonic() + pause, deadline))
                try:
                    await shield.hold(self._channel)
                except Expired:
                    pause *= 2
                    if monotonic() >= deadline:
                        raise
                except psycopg.Error as exc:
                    logger.debug("interrupted statement on %s: %s", self, exc)
        except Expired:
            self._drop(f"a cancelled statement did not end within {self.cancel_timeout:g} seconds")

    async def _finish_ending(
        self, shield: Shield, interruption: BaseException, cursor: psycopg.AsyncCursor[Any]
    ) -> None:
        self._channel.extend(monotonic() + self.commit_timeout)
        try:
            await shield.hold(self._channel)
            said = cursor.statusmessage
        except Expired:
            said = f"nothing within {self.commit_timeout:g} seconds"
            self._drop("no answer to COMMIT")
        except psycopg.Error as exc:
            said = str(exc)
        interruption.add_note(f"aiopgsafe: the statement was waited for, the server said: {said}")

    def _in_progress(self) -> bool:
        """Whether something of a statement is still to come. Starts to take it if nobody does."""
        if self.closed:
            return False
        if self._channel.driving:
            return True
        # Its generator is gone (a KeyboardInterrupt hit it) or wanted one row
        # only (stream()). COPY and pipelines have endings of their own.
        if self._pipeline is None and self.pgconn.transaction_status == ACTIVE:
            self._channel.start(self._drain_gen())
            return self._channel.driving
        return False

    def _drain_gen(self) -> PQGen[None]:
        while (result := (yield from generators.fetch(self.pgconn))) is not None:
            if result.status in COPYING:
                return

    async def _send_cancel(self, shield: Shield, deadline: float) -> None:
        """Have the server take a cancel request, or fail to: both are for the caller's loop."""
        job = self._cancel_job()
        job.limit(deadline)
        try:
            await shield.hold(job)
        except psycopg.Error as exc:
            logger.warning("query cancellation failed: %s", exc)

    def _cancel_job(self) -> Job[None]:
        if capabilities.has_cancel_safe():
            return self._backend.connecting(cast("Any", self._cancel_gen()))
        return self._backend.in_thread(self.pgconn.get_cancel().cancel)

    async def cancel_safe(self, *, timeout: float = 30.0) -> None:
        """Ask the server to cancel what runs on the connection.

        :param timeout: seconds, 0 for no limit, until `CancellationTimeout` is raised.
        """
        if not self._should_cancel():
            return
        job = self._cancel_job()
        if timeout:
            job.limit(monotonic() + timeout)
        try:
            await job.wait()
        except Expired:
            raise errors.CancellationTimeout("cancellation timeout expired") from None

    async def _try_cancel(self, *, timeout: float = 5.0) -> None:
        # psycopg calls it on its way out of COPY and stream(): cleaning up is shielded.
        try:
            await self._send_cancel(Shield(self._backend), monotonic() + timeout)
        except Expired:
            logger.warning("query cancellation failed: no answer within %g seconds", timeout)
