"""What becomes of a statement whose task is interrupted: cancelled on the server, nothing left."""

from __future__ import annotations

import logging
from time import monotonic
from typing import TYPE_CHECKING, Any, cast

import psycopg
from psycopg import errors, generators, pq
from psycopg._capabilities import capabilities
from psycopg.rows import Row

from .._backends import Expired, Job
from .._backends._lock import Lock
from .._shield import Shield
from ._losing import Losing
from ._statements import ending_statement, name_of
from ._together import leave_pipeline_mode, left_gen, left_in_cursor_gen

if TYPE_CHECKING:
    from psycopg.abc import PQGen, PQGenConn

logger = logging.getLogger("aiopgsafe")

AWAITING_RESPONSE = pq.ConnStatus.AWAITING_RESPONSE
ACTIVE = pq.TransactionStatus.ACTIVE

FIRST_PAUSE = 0.05
MAX_PAUSE = 0.5
"""Seconds to wait for a cancelled statement to end before cancelling again; doubled each time.

A cancel request comes on a connection of its own and may overtake the statement:
the server then finds nothing to cancel and the statement runs on.
"""


class LateCancel(psycopg.OperationalError):
    """A cancel request was sent, and whether it has been dealt with can't be known."""


class StatementStopping(Losing[Row]):
    """The part of `AsyncConnection` that cancels statements."""

    commit_timeout: float
    lock: Lock  # type: ignore[assignment]
    _uncancellable: object

    async def _stop_statement(self, interruption: BaseException, gen: PQGen[Any]) -> None:
        """Leave nothing of an interrupted statement: on the server, in libpq, in `gen`.

        The generator is driven to its end, so that psycopg's own state (prepared
        statements, results) stays true. The cancel request has been dealt with by
        the server before the result counts: a late one would hit the next
        statement.
        """
        shield = Shield(self._backend)
        shield.hold_back(interruption)
        if (cursor := ending_statement(gen, self._pipeline)) is not None:
            # The user's own COMMIT: cancelling it could separate what the server
            # decides from what it says.
            await self._finish_ending(shield, interruption, cursor)
            if shield.held is not None and shield.held is not interruption:
                raise shield.held
            return
        name = name_of(gen)
        if not self._pipeline:
            leave_pipeline_mode(self.pgconn)  # a statement that rides: nothing was sent yet
        asked = self.pgconn.transaction_status == ACTIVE or self.pgconn.pipeline_status
        if name == "notifies" or not asked:
            # Nothing was asked of the server. In a pipeline that can't be told:
            # commands, the Sync above all, may still be queued here.
            self._channel.abandon()
            self._forget_interrupted()
            return
        deadline = monotonic() + self.cancel_timeout
        try:
            await self._cancel_until_ended(shield, deadline)
            if self._pipeline:
                # What was to be prepared may not have been; psycopg believes it was.
                self._prepared.clear()
            if (rest := self._rest_gen(name)) is not None:
                self._channel.start(rest)
                await self._cancel_until_ended(shield, deadline)
                self._forget_interrupted()
        except Expired:
            self._drop(f"a cancelled statement did not end within {self.cancel_timeout:g} seconds")
        if shield.held is not None and shield.held is not interruption:
            raise shield.held

    async def _cancel_until_ended(self, shield: Shield, deadline: float) -> None:
        """Cancel on the server what the channel drives, again and again until it has ended."""
        pause = FIRST_PAUSE
        ended = False
        if self._channel.generator is None:  # it has just ended: nobody asks for its result
            self._channel.abandon()
            return
        while not ended:
            await self._send_cancel(shield, deadline)
            self._channel.extend(min(monotonic() + pause, deadline))
            try:
                await shield.hold(self._channel)
                ended = True
            except Expired:
                pause = min(2 * pause, MAX_PAUSE)
                if monotonic() >= deadline:
                    raise
            except Exception as exc:
                # QueryCanceled, mostly. The interruption is what counts.
                logger.debug("interrupted statement on %s: %r", self, exc)
                ended = True

    def _rest_gen(self, interrupted: str) -> PQGen[None] | None:
        """Takes what is still to come of a statement whose generator has ended before it.

        The generator wanted one row only (`stream()`), or an exception of a signal
        handler hit it. A COPY that has just begun has no block yet that would end
        it; one that has, and pipelines, have endings of their own.

        :param interrupted: the generator's name.
        """
        if self.closed or self._pipeline:
            return None
        return left_gen(self.pgconn, interrupted)

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

    async def _send_cancel(self, shield: Shield, deadline: float) -> None:
        """Have the server take a cancel request, or fail to: both are for the caller's loop."""
        job = self._cancel_job()
        job.limit(deadline)
        try:
            await shield.hold(job)
        except LateCancel as exc:
            self._drop(f"a cancel request may still reach the server ({exc})")
        except psycopg.Error as exc:
            logger.warning("query cancellation failed: %s", exc)

    def _cancel_job(self) -> Job[None]:
        if capabilities.has_cancel_safe():
            return self._backend.connecting(cast("Any", self._cancel_gen()))
        return self._backend.in_thread(self.pgconn.get_cancel().cancel)

    def _cancel_gen(self) -> PQGenConn[None]:
        """psycopg's, which sees whether the request had been sent when it fails.

        The server closes the connection of a request once it has signalled the
        session (PostgreSQL documentation, "Canceling Requests in Progress").
        """
        cancel_conn = self.pgconn.cancel_conn()
        cancel_conn.start()
        gen = generators.cancel(cancel_conn)
        sent = False
        try:
            wanted = next(gen)
            while True:
                sent = cancel_conn.status == AWAITING_RESPONSE
                wanted = gen.send((yield wanted))
        except StopIteration:
            return
        except psycopg.Error as exc:
            if sent:
                raise LateCancel(str(exc)) from exc
            raise

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
        """psycopg calls it on its way out of COPY and `stream()`, and then takes what is left.

        Interrupted meanwhile, we take it ourselves: psycopg would not get to it.
        """
        shield = Shield(self._backend)
        deadline = monotonic() + timeout
        try:
            await self._send_cancel(shield, deadline)
            if shield.held is None:
                return
            if self.pgconn.transaction_status == ACTIVE:
                self._channel.start(left_in_cursor_gen(self.pgconn), deadline)
                await shield.hold(self._channel)
        except Expired:
            logger.warning("query cancellation failed: no answer within %g seconds", timeout)
            if shield.held is not None:
                self._drop(f"a cancelled statement did not end within {timeout:g} seconds")
        if shield.held is not None:
            raise shield.held
