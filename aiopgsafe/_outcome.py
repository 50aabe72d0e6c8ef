"""Did it commit? The server's answer decides, not the absence of an error.

PostgreSQL answers COMMIT in one of these ways (documentation, "Message Flow"):

- a command tag, ``COMMIT``: committed, and durable as far as configured;
- a command tag, ``ROLLBACK``: the transaction had failed before; no error comes;
- an ERROR: COMMIT itself failed (a deferred constraint or trigger, a serialization
  failure, a cancelled wait for a lock of theirs) and the transaction is aborted;
- a FATAL error, or the end of the connection: the session has ended, before or
  after the commit record was written. Only the server's log and tables know.

A cancelled wait for synchronous replication comes as the tag ``COMMIT`` with a
warning: it is committed, here.
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

import psycopg

from ._errors import CommitRolledBack, CommitUnknown, mark_retry

__all__ = [
    "ACTIVE",
    "COMMITTED",
    "COMMITTING",
    "IS_COMMITTED",
    "PENDING",
    "ROLLED_BACK",
    "UNKNOWN",
    "TransactionState",
    "Verdict",
    "check_tag",
    "ended_by_statement",
    "looked_up",
    "unknown",
    "verdict_of_error",
]


class TransactionState(Enum):
    """What is known of a transaction. Exposed as `Transaction.state`."""

    __module__ = "aiopgsafe"

    PENDING = "pending"
    """The block has not been entered."""
    ACTIVE = "active"
    """The block runs: its statements are part of the transaction."""
    COMMITTING = "committing"
    """COMMIT has been sent, the answer is not there yet."""
    COMMITTED = "committed"
    """The server said that it is committed; or nothing was executed, so nobody was asked."""
    ROLLED_BACK = "rolled back"
    """Nothing of it is or will be committed."""
    UNKNOWN = "unknown"
    """COMMIT was sent and the outcome can't be known (`CommitUnknown`)."""

    # Enum's own is Python code, and each transaction looks up its state five times.
    __hash__ = object.__hash__


PENDING, ACTIVE, COMMITTING, COMMITTED, ROLLED_BACK, UNKNOWN = TransactionState


class Verdict(NamedTuple):
    """The outcome of a COMMIT, and the exception that says so if it isn't committed."""

    state: TransactionState
    error: Exception | None = None


def check_tag(tag: bytes | None) -> None:
    """Raise unless COMMIT was answered by the tag COMMIT."""
    if tag == b"ROLLBACK":
        raise CommitRolledBack(
            "the server answered COMMIT with ROLLBACK: a statement of the transaction"
            " had failed before, nothing is committed"
        )
    if tag != b"COMMIT":
        raise CommitUnknown(f"the server answered COMMIT with {tag!r}")


def verdict_of_error(error: Exception, *, prepared: bool = False) -> Verdict:
    """The outcome by the exception that came instead of the tag, once COMMIT had been sent.

    :param prepared: it was COMMIT PREPARED: refused, the transaction is still there.
    """
    if prepared and _is_answer(error):
        return Verdict(UNKNOWN, error)
    if isinstance(error, CommitUnknown):
        return Verdict(UNKNOWN, error)
    if isinstance(error, CommitRolledBack) or _is_answer(error):
        return Verdict(ROLLED_BACK, error)
    return unknown(error, "the connection was lost while COMMIT was in flight")


IS_COMMITTED = Verdict(COMMITTED)


def ended_by_statement() -> CommitUnknown:
    return CommitUnknown(
        "a statement inside the block ended its transaction (COMMIT or ROLLBACK):"
        " the block can't know which"
    )


def unknown(cause: Exception | None, what: str) -> Verdict:
    """The outcome can't be known, because of `cause`."""
    reason = f" ({cause})" if cause is not None else ""
    error = CommitUnknown(f"{what}{reason}: the transaction may be committed or rolled back")
    error.__cause__ = cause
    return Verdict(UNKNOWN, error)


def looked_up(verdict: Verdict, state: TransactionState, xid: int | None, what: str) -> Verdict:
    """The outcome after the server was asked for it, `verdict` having been UNKNOWN."""
    lost = verdict.error
    if state is COMMITTED:
        return IS_COMMITTED
    if state is ROLLED_BACK:
        error = lost.__cause__ if lost is not None else None
        if not isinstance(error, psycopg.OperationalError):
            error = psycopg.OperationalError(str(lost).partition(":")[0])
        error.add_note("aiopgsafe: the server was asked: the transaction is rolled back")
        mark_retry(error, safe=True)
        return Verdict(state, error)
    error = CommitUnknown(f"{lost}; {what}")
    error.__cause__ = lost.__cause__ if lost is not None else None
    error.xid = xid
    return Verdict(state, error)


def _is_answer(error: Exception) -> bool:
    """Whether `error` is the server's own answer to COMMIT: an ERROR of a session that goes on.

    Class 08 is said by poolers about a server that they lost, class 57P by a
    session that ends, 40003 means "statement completion unknown".
    """
    if not isinstance(error, psycopg.Error) or error.diag.severity_nonlocalized != "ERROR":
        return False
    sqlstate = error.sqlstate or ""
    return not sqlstate.startswith(("08", "57P")) and sqlstate != "40003"
