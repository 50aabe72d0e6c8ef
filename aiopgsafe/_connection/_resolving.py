"""`resolve_commit()`: what became of a transaction, for a program that was restarted."""

from __future__ import annotations

from functools import partial
from time import monotonic
from typing import Any

from psycopg.conninfo import conninfo_to_dict

from .. import _backends
from .._outcome import TransactionState
from .._resolver import parse_ticket
from ._asking import look_up
from ._async import reach_primary
from ._connecting import check_timeout

__all__ = ["resolve_commit"]


async def resolve_commit(
    ticket: str, conninfo: str = "", *, timeout: float = 30.0, **kwargs: Any
) -> TransactionState:
    """What became of a transaction: COMMITTED or ROLLED_BACK, or UNKNOWN if it can't be known.

    Asked for again and again for `timeout` seconds, while the server starts, a standby is
    promoted, or the transaction is still open. A session of it that waits idle is ended: once
    ROLLED_BACK is the answer, the transaction will never commit. Asking twice gives the
    same answer, as long as the server remembers: hundreds of millions of transactions.

    :param ticket: from `Transaction.ticket()`, kept from before the COMMIT.
    :param conninfo: a connection string; name all hosts of which one may be the primary.
    :param timeout: seconds.
    :param kwargs: more connection parameters, as in `AsyncConnection.connect()`.

    Raises `ValueError` for what is no ticket or no timeout, `psycopg.ProgrammingError`
    for a bad connection string.
    """
    parsed = parse_ticket(ticket)
    check_timeout("timeout", timeout)
    conninfo_to_dict(conninfo, **kwargs)
    reach = partial(reach_primary, conninfo, **kwargs)
    until = monotonic() + timeout
    state, _ = await look_up(parsed, reach, _backends.current(), until)
    return state


resolve_commit.__module__ = "aiopgsafe"
