"""Asks what became of a lost COMMIT, over a connection of its own, until it is known."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from time import monotonic
from typing import TYPE_CHECKING, Any

import psycopg
from psycopg import errors

from .._backends import Backend, Expired, sleep
from .._errors import brief
from .._outcome import TransactionState
from .._resolver import ASK, EVICT, STATUS, Answer, Origin, Ticket, Token, judge

if TYPE_CHECKING:
    from psycopg.abc import Params

    from ._async import AsyncConnection

__all__ = ["Reach", "look_up"]

logger = logging.getLogger("aiopgsafe")

COMMITTED = TransactionState.COMMITTED
ROLLED_BACK = TransactionState.ROLLED_BACK
UNKNOWN = TransactionState.UNKNOWN

Reach = Callable[[], Awaitable["AsyncConnection[Any]"]]
"""Makes a connection to the primary, wherever it is now."""

FIRST_PAUSE = 0.02
MAX_PAUSE = 0.5
"""Seconds between two questions; doubled each time."""

PATIENCE = 2
"""Questions that find the session idle before it is ended: its COMMIT may just be arriving."""

MAY_WRITE = b"set default_transaction_read_only to off"
ADD_TOKEN = b"""
    insert into aiopgsafe.token (token, resolved) values (%(token)s::uuid, true)
    on conflict do nothing
"""
READ_TOKEN = b"""
    select resolved, (
        select extract(epoch from created) from aiopgsafe.token
        where token = '00000000-0000-0000-0000-000000000000'::uuid
    )
    from aiopgsafe.token where token = %(token)s::uuid
"""
"""Also up to when tokens have been deleted: by the row that `aiopgsafe tokens prune` keeps."""

CLOCKS_APART = 3600.0
"""Seconds that the clocks of client and server may differ by: a token may be that much older."""


async def look_up(
    ticket: Ticket | Token,
    reach: Reach,
    backend: Backend,
    until: float,
    origin: Origin | None = None,
) -> tuple[TransactionState, str]:
    """The outcome, UNKNOWN if it can't be known by `until`; and what kept it from being known.

    :param origin: the session whose COMMIT it was, if a `Token` doesn't say.
    """
    pause, asked = FIRST_PAUSE, 0
    why = "nothing could be asked"
    conn: AsyncConnection[Any] | None = None
    try:
        while True:
            try:
                if conn is None:
                    conn = await reach()
                left = max(until - monotonic(), 0.1)
                if isinstance(ticket, Token):
                    return await _redeem(conn, ticket, left, origin)
                asked += 1
                state, why = await _ask(conn, ticket, left, evict=asked > PATIENCE)
                if state is not None:
                    return state, why
            except (psycopg.Error, Expired) as exc:
                logger.info("asking for %s: %s", ticket.where, brief(exc))
                why = f"the server can't be asked: {brief(exc)}"
                if conn is not None:
                    conn._close_now()
                    conn = None
            if monotonic() + pause >= until:
                return UNKNOWN, why
            await sleep(backend, pause)
            pause = min(2 * pause, MAX_PAUSE)
    finally:
        if conn is not None:
            conn._close_now()


async def _ask(
    conn: AsyncConnection[Any], ticket: Ticket, left: float, *, evict: bool
) -> tuple[TransactionState | None, str]:
    """One question: the outcome, None if it is open yet; and what stands in the way."""
    values: Params = {**ticket.origin.session, "xid": str(ticket.xid)}
    (row,) = await conn._ask(ASK.encode(), left, values)
    answer = Answer(*row)
    if answer.in_recovery:
        return None, "the server is in recovery"
    try:
        ((status,),) = await conn._ask(STATUS.encode(), left, values)
        answer = answer._replace(status=status)
    except errors.InvalidParameterValue:
        answer = answer._replace(given_out=False)
    state = judge(ticket, answer)
    if state is None and answer.prepared:
        return None, "it is prepared (PREPARE TRANSACTION) and open"
    if state is None and evict:
        await conn._ask(EVICT.encode(), left, values)
    if state is UNKNOWN:
        return state, f"the server's history does not tell: {answer}, {ticket}"
    return state, f"the session is still {answer.session or 'about to end'}"


async def _redeem(
    conn: AsyncConnection[Any], token: Token, left: float, origin: Origin | None
) -> tuple[TransactionState, str]:
    """Insert the transaction's own row: then it never can, or it has, and it is committed.

    An open transaction that has inserted it is waited for. That the answer of our own
    COMMIT may get lost is no harm: who asks again finds the row marked.
    """
    if token.database not in (None, conn.info.dbname):
        return UNKNOWN, f"its token is in another database: {token.database}"
    values: Params = {"token": token.token}
    await conn._ask(MAY_WRITE, left)
    await conn._ask(ADD_TOKEN, left, values)
    ((resolved, deleted_until),) = await conn._ask(READ_TOKEN, left, values)
    if not resolved:
        return COMMITTED, ""
    if origin is not None:
        # It may wait for its client for ever, and others for its locks.
        await conn._ask(EVICT.encode(), left, origin.session)
    if deleted_until is not None and token.made < float(deleted_until) + CLOCKS_APART:
        return UNKNOWN, "tokens as old as its have been deleted"
    return ROLLED_BACK, ""
