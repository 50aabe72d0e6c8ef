"""What the server says unasked: notices, notifications, the end of the session."""

from __future__ import annotations

import logging
from collections import deque
from typing import TYPE_CHECKING, Any, cast
from weakref import ref

import psycopg
from psycopg import Notify, errors, pq

if TYPE_CHECKING:
    from psycopg.pq.abc import PGconn, PGresult

logger = logging.getLogger("aiopgsafe")

ACTIVE = pq.TransactionStatus.ACTIVE
BAD = pq.ConnStatus.BAD


class Listening(psycopg.AsyncConnection[Any]):
    """What these handlers see of `AsyncConnection`."""

    _fatal: psycopg.Error | None
    _notifies_listening: deque[Notify] | None


def take_idle_input(pgconn: PGconn) -> bool:
    """What came while no statement waits. False if it belongs to one that is in progress."""
    if pgconn.transaction_status == ACTIVE:
        return False
    try:
        pgconn.consume_input()
        # Parses all that has come: notices and parameter changes go their way.
        while notify := pgconn.notifies():
            if pgconn.notify_handler:
                pgconn.notify_handler(notify)
    except psycopg.Error as exc:
        logger.info("connection lost while idle: %s", exc)
        return pgconn.status == BAD
    return True


def on_notice(wself: ref[Listening], result: PGresult) -> None:
    conn = wself()
    if conn is None:
        return
    notice = errors.Diagnostic(result, conn.pgconn._encoding)
    if notice.severity_nonlocalized in ("FATAL", "PANIC"):
        conn._fatal = errors.error_from_result(result, encoding=conn.pgconn._encoding)
    psycopg.AsyncConnection._notice_handler(cast("Any", wself), result)


def on_notify(wself: ref[Listening], pgnotify: pq.PGnotify) -> None:
    conn = wself()
    if conn is None:
        return
    encoding = conn.pgconn._encoding
    notify = Notify(
        pgnotify.relname.decode(encoding), pgnotify.extra.decode(encoding), pgnotify.be_pid
    )
    for handler in tuple(conn._notify_handlers):
        try:
            handler(notify)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as exc:  # a CancelledError of its own is no interruption of ours
            logger.exception("error processing notify callback %r: %s", handler, exc)
    if conn._notifies_listening is not None:
        conn._notifies_listening.append(notify)
    elif not conn._notify_handlers and conn._notifies_backlog is not None:
        conn._notifies_backlog.append(notify)
