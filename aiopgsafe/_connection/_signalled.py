"""A statement that somebody beside its task cancels: a signal, a database that drains."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager
from signal import SIGINT
from time import monotonic
from typing import Any

from psycopg import errors, pq
from psycopg.rows import Row

from .._backends import Expired
from .._shield import Shield
from .._signals import Arrival, watching
from ._statements import ending_statement, name_of
from ._stopping import FIRST_PAUSE, MAX_PAUSE, StatementStopping

logger = logging.getLogger("aiopgsafe")

ACTIVE = pq.TransactionStatus.ACTIVE


class SignalWatch:
    """Asked when the signal arrives: takes the first one that finds a statement to cancel."""

    def __init__(self, conn: StatementStopping[Any]) -> None:
        self._conn = conn
        self._taken = False

    def __call__(self, arrival: Arrival) -> bool:
        # Between any two bytecodes: look and note, the rest is for the event loop.
        if self._taken or not cancellable(self._conn):
            return False
        self._taken = True
        self._conn._backend.run_sync_soon(self._begin, arrival)
        return True

    def _begin(self, arrival: Arrival) -> None:
        conn = self._conn
        if cancellable(conn):
            conn._signalled = SignalledCancel(conn, arrival)
        else:
            arrival.missed()  # it has ended meanwhile


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
    return ending_statement(gen, conn._pipeline) is None


class SignalledCancel:
    """Cancels on the server, beside the task that waits for the statement.

    A statement lasts as long as its task has the connection's lock: a COPY and a
    `stream()` take many steps. Nothing else is sent on the connection before all
    requests have been dealt with (`settle`): one that is still on its way would hit it.
    If the statement was over before any of them hit it, the signal is the program's.
    """

    def __init__(self, conn: StatementStopping[Any], arrival: Arrival | None = None) -> None:
        self._conn = conn
        self._arrival = arrival
        self._turn = conn.lock.turn
        self._hit = False
        self._ended = False
        self._over = conn._backend.waiter()
        self._sent = conn._backend.waiter()
        self._job = conn._backend.background(self._run)

    @property
    def over(self) -> bool:
        """Whether the statement has ended."""
        conn = self._conn
        if conn._channel.generator is not None:
            return False
        return conn.lock.turn != self._turn or conn.pgconn.transaction_status != ACTIVE

    def saw(self, error: BaseException) -> None:
        """The statement has ended with `error`."""
        if isinstance(error, errors.QueryCanceled):
            self._hit = True

    async def _run(self) -> None:
        conn = self._conn
        shield = Shield(conn._backend)
        deadline = monotonic() + conn.cancel_timeout
        pause = FIRST_PAUSE
        while not self._ended and not conn.closed:
            # Before the request: the statement may end while it is on its way.
            over = self._over = conn._backend.waiter()
            try:
                await conn._send_cancel(shield, deadline)
            except Expired:
                # It may still get there.
                conn._drop("a cancel request was not dealt with")
                return
            finally:
                self._sent.wake()
            over.limit(min(monotonic() + pause, deadline))
            try:
                await over.wait()
            except Expired:
                pause = min(2 * pause, MAX_PAUSE)
                if monotonic() >= deadline:
                    logger.warning("%s does not end the cancelled statement", conn)
                    return

    async def before_next(self, shield: Shield) -> None:
        """The statement goes on (a COPY), or another begins: wait for what is on its way."""
        if self.over:
            await self.settle(shield)
        else:
            await shield.hold(self._sent)

    async def settle(self, shield: Shield) -> None:
        """The statement is over, or shall not be cancelled any more: wait for the last request."""
        self._ended = True
        self._over.wake()
        try:
            await shield.hold(self._job)
        finally:
            if self._conn._signalled is self:
                self._conn._signalled = None
                if self._arrival is not None:
                    if self._hit or self._conn.closed:
                        self._arrival.hit()
                    else:
                        self._arrival.missed()

    def abandon(self) -> None:
        """The connection is closed: there is nothing left to hit."""
        self._ended = True
        self._job.cancel()
        self._conn._signalled = None
        if self._arrival is not None:
            self._arrival.hit()


class Cancellable(StatementStopping[Row]):
    """The part of `AsyncConnection` whose statements may be cancelled from elsewhere."""

    def cancel_on_signal(self, *signals: int) -> AbstractContextManager[None]:
        """Let the first of `signals` cancel the statement that runs, during a ``with`` block.

        Like Ctrl-C in psql: the server is asked to cancel the statement, and
        `psycopg.errors.QueryCanceled` is raised where it runs. The next arrival, or
        one that comes while nothing runs on the connection, does what the program's
        own handler does. A COMMIT is never cancelled: the signal is the program's
        then, once the outcome is known.

        Blocks may be nested, also of several connections: what runs on any of them
        is cancelled. The program's handlers are put back at the end.

        :param signals: as in `signal`; SIGINT if none is given.

        Entering raises `RuntimeError` outside of the main thread, where Python
        handles no signals.
        """
        return watching(signals or (SIGINT,), self._backend, SignalWatch(self))

    def _is_ending(self) -> bool:
        """Whether COMMIT, or what ends a transaction otherwise, is on its way."""
        gen = self._channel.generator
        if gen is None:
            return False
        return gen is self._uncancellable or ending_statement(gen, self._pipeline) is not None

    def _cancel_statement(self) -> bool:
        """Cancel what runs, beside its task: QueryCanceled is raised there. False: nothing does."""
        if not cancellable(self):
            return False
        self._signalled = SignalledCancel(self)
        return True

    async def _settle_signalled(self, interruption: BaseException | None = None) -> None:
        """Nobody beside our task cancels any more what is sent from now on."""
        shield = Shield(self._backend)
        if interruption is not None and not isinstance(interruption, Exception):
            shield.hold_back(interruption)
        if interruption is None:
            await self._signalled.before_next(shield)
        else:
            await self._signalled.settle(shield)
        if shield.held is not None and shield.held is not interruption:
            raise shield.held
