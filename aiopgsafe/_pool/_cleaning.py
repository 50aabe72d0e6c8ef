"""Makes a connection clean that comes back: bounded in time, deaf to interruptions."""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import psycopg
from psycopg import pq

from .._backends import Expired
from .._connection import AsyncConnection
from .._ending import run
from .._shield import Shield
from ._options import Callback, check_idle

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from .._session import Session

logger = logging.getLogger("aiopgsafe.pool")

Status = pq.TransactionStatus


async def clean(conn: AsyncConnection[Any], reset: Callback | None) -> BaseException | None:
    """Leave the connection idle and deaf to notifications, or closed.

    Returns the interruption that was held back meanwhile, for the caller to raise.
    """
    session = cast("Session", conn)
    shield = Shield(session._backend, grace=conn.cancel_timeout)
    try:
        await _clean(conn, session, shield, reset)
    except BaseException as exc:
        if not conn.closed:
            conn._drop(f"it could not be made clean for its pool: {exc!r}")
        # An interruption of ours is held back: a CancelledError here is `reset`'s own.
        if isinstance(exc, (KeyboardInterrupt, SystemExit, GeneratorExit)):
            raise
    return shield.held


async def _clean(
    conn: AsyncConnection[Any], session: Session, shield: Shield, reset: Callback | None
) -> None:
    if conn.closed:
        await _ended(conn._settle_at_close(), session, shield)  # its callbacks
        return
    status = conn.pgconn.transaction_status
    piped = conn._pipeline is not None or conn.pgconn.pipeline_status
    if conn.lock.locked() or status == Status.ACTIVE or piped:
        # Another task waits on it, or a stream() or COPY was left in the middle.
        conn._drop("it was given back to its pool during an operation")
        return
    if conn._unit is not None or status in (Status.INTRANS, Status.INERROR):
        logger.warning("rolling back returned connection: %s", conn)
        await _ended(conn.rollback(), session, shield)
    conn._forget_blocks()
    if conn._told.listening and not conn.closed:
        try:
            await run(session, shield, session._commands_gen([b"UNLISTEN *"]))
        except Expired:
            conn._drop("no answer to UNLISTEN")
        conn._forget_listening()
    if reset is not None and not conn.closed:
        await shield.call(session._backend, partial(reset, conn), conn.commit_timeout)
        if not conn.closed:
            check_idle(conn, "reset", reset)


async def _ended(ending: Awaitable[None], session: Session, shield: Shield) -> None:
    """See a transaction's end through; what comes out of it that isn't its own is held back."""
    try:
        await ending
    except psycopg.Error:
        raise
    except ExceptionGroup as exc:
        logger.error("%s", exc, exc_info=exc)  # its callbacks': nobody is there who would hear
    except session._backend.interruptions as exc:
        shield.hold_back(exc)
    except Exception as exc:  # of a signal's handler
        shield.hold_back(exc)


def is_standby(conn: AsyncConnection[Any]) -> bool:
    """Whether the server is in recovery, as it reports itself from version 14 on.

    PostgreSQL documentation, "Asynchronous Operations".
    """
    return conn.pgconn.parameter_status(b"in_hot_standby") == b"on"


def is_read_only(conn: AsyncConnection[Any]) -> bool:
    """Whether transactions of the session can't write by default."""
    setting = conn.pgconn.parameter_status(b"default_transaction_read_only")
    return setting == b"on" or (setting is None and not conn.read_only)
