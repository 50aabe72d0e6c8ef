"""What the server says unasked: notices, notifications, the end of the session."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from inspect import iscoroutinefunction
from typing import TYPE_CHECKING, Any
from weakref import ref

import psycopg
from psycopg import Notify, errors, pq

if TYPE_CHECKING:
    from psycopg.pq.abc import PGconn, PGresult

logger = logging.getLogger("aiopgsafe")

ACTIVE = pq.TransactionStatus.ACTIVE
BAD = pq.ConnStatus.BAD
SEVERITY = pq.DiagnosticField.SEVERITY_NONLOCALIZED


class Told:
    """Is told what arrives on a connection, and tells the connection, whose it is at the time.

    Neither the channel nor libpq's handlers refer to the connection itself: it stays
    collectable while the event loop knows its channel, and a pool may give what is
    below it to another object (`AsyncConnection._renewed`).
    """

    __slots__ = ("listening", "owner")

    def __init__(self, pgconn: PGconn, owner: Listening) -> None:
        self.listening = False
        self.owner = ref(owner)
        pgconn.notice_handler = self.notice
        pgconn.notify_handler = self.notify

    def idle_input(self, pgconn: PGconn) -> bool:
        """What came while no statement waits. False if it belongs to one that is in progress."""
        if pgconn.transaction_status == ACTIVE:
            return False
        try:
            pgconn.consume_input()
            while notify := pgconn.notifies():
                self.notify(notify)
        except psycopg.Error as exc:
            logger.debug("connection lost while idle: %s", exc)
            return pgconn.status == BAD
        return True

    def drain(self, pgconn: PGconn) -> None:
        """Parse all that has been read: notices and parameter changes go their way, too."""
        while notify := pgconn.notifies():
            self.notify(notify)

    def lost(self, error: BaseException | None) -> None:
        """The connection is lost, and out of the event loop."""
        conn = self.owner()
        if conn is not None:
            if not isinstance(error, psycopg.Error):
                error = psycopg.OperationalError("the connection is lost")
            conn._on_lost(conn._fatal or error)

    def notice(self, result: PGresult) -> None:
        conn = self.owner()
        if conn is None:
            return
        encoding = conn.pgconn._encoding
        if result.error_field(SEVERITY) in (b"FATAL", b"PANIC"):
            conn._fatal = errors.error_from_result(result, encoding=encoding)
        if conn._notice_handlers:
            # libpq frees the result when we return: psycopg's Diagnostic would be empty then.
            notice = errors.Diagnostic(errors._info_to_dict(result), encoding)
            conn._in_libpq = True  # which must not be freed under itself
            try:
                for handler in tuple(conn._notice_handlers):
                    call_handler(handler, notice)
            finally:
                conn._in_libpq = False

    def notify(self, pgnotify: pq.PGnotify) -> None:
        conn = self.owner()
        if conn is None:
            return
        encoding = conn.pgconn._encoding
        # Anybody may send anything where the server doesn't check it (SQL_ASCII): that must
        # not come out of the event loop's machinery, and nothing of it gets lost.
        notify = Notify(
            pgnotify.relname.decode(encoding, "surrogateescape"),
            pgnotify.extra.decode(encoding, "surrogateescape"),
            pgnotify.be_pid,
        )
        self.listening = True
        for handler in tuple(conn._notify_handlers):
            call_handler(handler, notify)
        if conn._notifies_listening is not None:
            conn._notifies_listening.append(notify)
        elif not conn._notify_handlers and conn._notifies_backlog is not None:
            conn._notifies_backlog.append(notify)


class Listening(psycopg.AsyncConnection[Any]):
    """What `Told` sees of `AsyncConnection`."""

    _fatal: psycopg.Error | None
    _in_libpq: bool
    _notifies_listening: deque[Notify] | None

    def _on_lost(self, error: psycopg.Error) -> None: ...


def check_handler(handler: object) -> None:
    """Raise `TypeError` for what can't be called from the event loop's machinery."""
    if not callable(handler):
        raise TypeError(f"a handler is a function, not {type(handler).__name__}")
    if iscoroutinefunction(handler):
        raise TypeError("a handler is a plain function: nobody would await what this one returns")


def call_handler(handler: Callable[[Any], object], what: object) -> None:
    """Call a handler of the program's from the event loop's machinery: its errors are logged."""
    try:
        handler(what)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as exc:  # a CancelledError of its own is no interruption of ours
        logger.exception("error in the callback %r: %s", handler, exc)
