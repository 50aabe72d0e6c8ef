"""How transactions end in sync code: COMMIT or ROLLBACK, the callbacks, the connection's lock.

Whether COMMIT is in flight, and its results that nobody has taken, libpq knows; what was taken
is stored by the very C call that took it. That holds with psycopg's C implementation ("binary",
"c"): the Python one has bytecodes of its own between the two.
"""

from __future__ import annotations

import logging
import select
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from math import inf
from operator import call
from threading import get_ident
from time import monotonic
from typing import TYPE_CHECKING, Any

import psycopg
from psycopg import errors, pq

from . import _outcome
from ._ending import let_through, no_answer_in_time
from ._errors import foremost, let_out
from ._outcome import (
    ACTIVE,
    COMMITTING,
    IS_COMMITTED,
    ROLLED_BACK,
    UNKNOWN,
    TransactionState,
    Verdict,
    check_tag,
    unknown,
    verdict_of_error,
)
from ._shield import Expired, Shield
from ._sync_section import SLICE, Calls, Section, Thinking

if TYPE_CHECKING:
    from psycopg.pq.abc import PGresult

    from ._unit import Unit

__all__ = ["Ending", "call_back"]

logger = logging.getLogger("aiopgsafe")

OK = pq.ConnStatus.OK
IDLE = pq.TransactionStatus.IDLE
IN_FLIGHT = pq.TransactionStatus.ACTIVE
OPEN = (pq.TransactionStatus.INTRANS, pq.TransactionStatus.INERROR)
FATAL_ERROR = pq.ExecStatus.FATAL_ERROR
AT_ONCE = (False,)
"""The argument of a lock's `acquire()` that doesn't wait."""


class Exchange:
    """A command that is sent to the server, and all of its results.

    :ivar loss: what kept the results from coming.
    """

    loss: Exception | None = None
    _sending = False

    def __init__(self, conn: Any, commands: Sequence[bytes]) -> None:
        self.results: list[PGresult] = []
        self.until = monotonic() + conn.commit_timeout
        self._conn = conn
        self._pgconn = conn.pgconn
        self._commands = commands

    @property
    def sent(self) -> bool:
        """Whether the server may have it: libpq says so, and nobody else."""
        if not self._sending:
            return False
        return bool(self.results) or self._pgconn.transaction_status not in OPEN

    def go_on(self, shield: Shield, note: Callable[[BaseException], object]) -> None:
        """Send it, and wait for all results. Each step may be torn, and is taken again.

        :param note: takes what handlers of notifications raise, which come with the results.
        """
        try:
            if self._pgconn.pipeline_status:
                self._in_pipeline()
                return
            if self.loss is None and not self.sent:
                self._sending = True
                self._pgconn.send_query(b";".join(self._commands))
            self._collect(shield, note)
        except (psycopg.Error, Expired) as exc:
            self.loss = exc

    def _in_pipeline(self) -> None:
        """In one of the program's: by psycopg's means, which can't go on where they were torn."""
        if self._sending and not self.results:
            raise psycopg.OperationalError("interrupted in a pipeline")
        self._sending = True
        if not self.results:
            self.results.append(self._conn._wait(self._conn._commands_gen(self._commands)))

    def _collect(self, shield: Shield, note: Callable[[BaseException], object]) -> None:
        pgconn, results = self._pgconn, self.results
        flushing = True
        while pgconn.status == OK:
            flushing = flushing and bool(pgconn.flush())
            if flushing or pgconn.is_busy():
                self._wait(shield, flushing)
                pgconn.consume_input()
                continue
            before = len(results)
            # Taken from libpq and kept, in one C call.
            results.extend(islice(iter(pgconn.get_result, None), 1))
            if len(results) == before:
                break
        while pgconn.notify_handler is not None:
            try:
                deque(map(pgconn.notify_handler, iter(pgconn.notifies, None)), 0)
                return
            except BaseException as exc:  # one of many: the others have to be told
                note(exc)

    def _wait(self, shield: Shield, flushing: bool) -> None:
        left = min(self.until, shield.until) - monotonic()
        if left <= 0:
            raise Expired
        poll = select.poll()
        poll.register(self._pgconn.socket, select.POLLIN | (select.POLLOUT if flushing else 0))
        poll.poll(1000 * min(left, SLICE))


class Ending(Section):
    """The end of a transaction: COMMIT or ROLLBACK, the callbacks, the connection's lock.

    :param conn: an `aiopgsafe.Connection`.
    :param unit: what ends; a new one if nobody has callbacks.
    :param commit: COMMIT; if it can't be sent, or an exception comes before it is:
    :param undo: then ROLLBACK; otherwise the transaction is left as it is.
    :param on_ended: called when the outcome is known, before the callbacks. May be called again.

    :ivar going_through: an exception that goes on by itself.
    :ivar loss: of the connection, at or before a ROLLBACK: the server has rolled back.
    """

    going_through: BaseException | None = None
    loss: Exception | None = None
    _came: BaseException | None = None  # before COMMIT was sent
    _error: Exception | None = None
    _ended = False
    _unlockable = False
    _committing: Exchange | None = None
    _rolling: Exchange | None = None
    _asked: Thinking[tuple[TransactionState, str]] | None = None
    _calls: Calls | None = None

    def __init__(
        self,
        conn: Any,
        unit: Unit,
        *,
        commit: bool,
        undo: bool = False,
        on_ended: Callable[[], None] | None = None,
    ) -> None:
        super().__init__()
        self._conn = conn
        self._unit = unit
        self._commit = commit
        self._undo = undo
        self._on_ended = on_ended
        self._locked: list[bool] = []

    def _step(self) -> None:
        if not self._ended:
            self._lock()
            self._end()
        self._unlock()
        self._call_back()

    def torn(self, exc: BaseException) -> None:
        """An exception came out of `go_on()`: it will be called again."""
        sent = self._committing is not None and self._committing.sent
        if self._commit and not self._ended and not sent:
            # It never will be.
            self._came = foremost(self._came, exc)
            self._ended = not self._undo
            self._commit = False

    def give_up(self) -> None:
        """The connection is closed, and the outcome what can be known without it."""
        unit = self._unit
        sent = self._committing is not None and self._committing.sent
        self._unlock()
        self._conn._drop("its transaction can't be ended")
        if sent:
            self._settle(COMMITTING)
        self._settle(UNKNOWN if unit.state is COMMITTING else ROLLED_BACK)
        if self.tore is not None:
            self.tore.add_note(f"aiopgsafe: the transaction is {unit.state.value}")
        if self._on_ended is not None:
            self._on_ended()
        self._conn._settled(unit)
        calls = self._calls or Calls(cb.fn for cb in unit.take())
        call_back("transaction", unit.state, calls, self.tore)

    def finish(self, torn: BaseException | None) -> None:
        """Raise what is to be raised.

        :param torn: what `see_through()` returned.
        """
        try:
            self._finish(torn)
        except BaseException as exc:
            first = foremost(exc, self.signalled)  # this may be torn, too
            if first is not None and first is not exc:
                let_out(first)
            raise

    def _finish(self, torn: BaseException | None) -> None:
        signalled, calls = self.signalled, self._calls
        if calls is None:
            if signalled is torn is self._came is self._error is None:
                return  # as nearly always
            calls = Calls(())
        held = foremost(self._came, torn, calls.stopping, signalled)
        if signalled is not None and isinstance(self._came, psycopg.Error):
            held, self._error = signalled, self._came
        errors, outcome = calls.errors, self._unit.state
        if held is None and self._error is None and not errors:
            return
        if held is not None and held is self._came and outcome in (ACTIVE, ROLLED_BACK):
            let_out(held)  # as it came: nothing was held back
        error = None if self._error is held else self._error
        let_through("transaction", outcome, held, error, errors, self.going_through)

    # The lock

    def _lock(self) -> None:
        """Another thread may have it for as long as its statement takes, as with psycopg."""
        conn = self._conn
        if not self._locked:
            self._locked.extend(map(conn.lock.acquire, AT_ONCE))
        if not any(self._locked):
            self._wait_for_lock()
        conn._driver = get_ident()

    def _wait_for_lock(self) -> None:
        conn = self._conn
        acquire = partial(conn.lock.acquire, True, SLICE)
        until = monotonic() + conn.commit_timeout
        while not (self._unlockable or any(self._locked)):
            working = conn.pgconn.transaction_status == IN_FLIGHT
            late = monotonic() > min(until, self.shield.until)
            # In this thread it is a stream() that nobody reads on, nor closes.
            ours = working and conn._driver == get_ident() and conn.lock.locked()
            if ours or (late and not (working and self.shield.until == inf)):
                self._unlockable = True
                conn._drop("the connection was busy when its transaction had to end")
                return
            self._locked.extend(map(call, (acquire,)))

    def _unlock(self) -> None:
        if any(self._locked):
            deque(map(call, (self._locked.clear, self._conn.lock.release)), 0)

    # What the server decides

    def _end(self) -> None:
        conn, unit = self._conn, self._unit
        if self._commit:
            if self._committing is None:
                commands = conn._before_commit(unit, self._undo)  # may raise: see `torn()`
                self._committing = Exchange(conn, commands) if commands else None
            if self._committing is not None:
                self._committing.go_on(self.shield, self.note)
                verdict = self._verdict(self._committing)
                self._settle(COMMITTING)
                self._settle(verdict.state)
                self._error = verdict.error
                if verdict.state is UNKNOWN:
                    conn._drop("nobody knows what became of its transaction")
        if conn._failed if self._commit else (unit.state is ACTIVE or conn._in_transaction):
            self._roll_back()
        if self._on_ended is not None:
            self._on_ended()
        conn._settled(unit)
        self._ended = True

    def _settle(self, state: TransactionState) -> None:
        """Advance the unit, unless it was already before this was torn."""
        was = self._unit.state
        if was is ACTIVE or (was is COMMITTING and state is not COMMITTING):
            self._unit.advance(state)

    def _verdict(self, committing: Exchange) -> Verdict:
        """By what has come; asked for where that doesn't tell. Again the same, if it is torn."""
        verdict = self._told(committing)
        if verdict is IS_COMMITTED:
            return verdict
        ticket = self._unit.sent_ticket if verdict.state is UNKNOWN else None
        if ticket is None or self._unit.prepared or self.shield.insisted:
            return verdict
        until = max(committing.until, monotonic() + self._conn.cancel_timeout)
        if self._asked is None:
            self._conn._drop("it was lost while COMMIT was in flight")
            asked = Thinking(partial(self._conn._look_up, ticket, until))
            asked.start()
            self._asked = asked
        try:
            state, why = self._asked.result(min(until, self.shield.until))
        except Expired:
            state, why = UNKNOWN, "the server did not say so in time"
        except psycopg.Error as exc:
            state, why = UNKNOWN, repr(exc)
        return _outcome.looked_up(verdict, state, ticket.xid, f"{ticket.where}: {why}")

    def _told(self, committing: Exchange) -> Verdict:
        results, loss = committing.results, committing.loss
        if loss is None and results and results[-1].command_status == b"COMMIT":
            return IS_COMMITTED
        for result in results:
            if result.status == FATAL_ERROR:
                encoding = self._conn.pgconn._encoding
                return verdict_of_error(errors.error_from_result(result, encoding=encoding))
        if isinstance(loss, Expired):
            return unknown(None, no_answer_in_time(self._conn, self.shield))
        if not results:
            return verdict_of_error(loss or psycopg.OperationalError("the connection is lost"))
        try:
            check_tag(results[-1].command_status)
        except psycopg.Error as exc:
            return verdict_of_error(exc)
        return IS_COMMITTED

    def _roll_back(self) -> None:
        conn = self._conn
        conn._forget_queue()  # BEGIN, if nothing was executed; RELEASE, which it makes superfluous
        if self._rolling is None:
            conn._come_to_rest()
            self._rolling = Exchange(conn, [b"ROLLBACK"])
        if conn.closed:
            self.loss = self.loss or psycopg.OperationalError("the connection is closed")
        elif conn._in_transaction or self._rolling.sent:
            self._rolling.go_on(self.shield, self.note)
            if self._rolling.loss is not None:
                self.loss = self._rolling.loss
                conn._drop(f"no answer to ROLLBACK: {self._rolling.loss!r}")
            elif conn._in_transaction:
                conn._drop("its ROLLBACK failed")
            conn._forget_prepared()
        self._settle(ROLLED_BACK)

    # Callbacks

    def _call_back(self) -> None:
        state, callbacks = self._unit.state, self._unit.callbacks
        if self._calls is None:
            if not callbacks or state is ACTIVE:
                return
            self._calls = Calls(cb.fn for cb in callbacks if cb.when is state)
        callbacks.clear()
        self._calls.call_all()


def call_back(
    what: str,
    outcome: TransactionState,
    calls: Calls,
    going_through: BaseException | None = None,
) -> None:
    """Call what is left of `calls`, and raise what is to be raised: see `let_through()`."""
    torn: BaseException | None = None
    try:
        calls.call_all()
    except BaseException as exc:  # between two of them
        torn = exc
        calls.call_all()
    held = foremost(torn, calls.stopping)
    if held is not None or calls.errors:
        let_through(what, outcome, held, None, calls.errors, going_through)
