"""Every exception that aiopgsafe adds to psycopg's.

::

    psycopg.Error
    ├── psycopg.DatabaseError
    │   └── psycopg.OperationalError
    │       ├── psycopg.errors.TransactionResolutionUnknown   (08007)
    │       │   └── CommitUnknown       COMMIT was sent, its outcome can't be known
    │       ├── psycopg.errors.TransactionRollback            (40000)
    │       │   └── CommitRolledBack    COMMIT was sent, the server answered ROLLBACK
    │       ├── Draining                no new work: the database drains
    │       └── psycopg_pool's PoolTimeout, PoolClosed, TooManyRequests
    └── psycopg.InterfaceError
        └── ConnectionReleased          use after the connection went back to its pool

A server error in answer to COMMIT (a deferred constraint, a serialization
failure) stays what psycopg makes of it: `UniqueViolation`,
`SerializationFailure`, ... The transaction is rolled back then, and known to be.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import NoReturn

import psycopg
from psycopg import errors

__all__ = [
    "CommitRolledBack",
    "CommitUnknown",
    "ConnectionReleased",
    "Draining",
    "brief",
    "chain_of",
    "foremost",
    "goes_on",
    "let_out",
    "mark_retry",
    "rank",
    "safe_to_retry",
]


class CommitUnknown(errors.TransactionResolutionUnknown):
    """COMMIT was sent and whether the transaction is committed can't be known.

    The connection was lost, or the server did not answer within ``commit_timeout``, and
    asking it over another connection did not help. Running the work again may do it
    twice: look for its effects first. The connection is closed; `__cause__` is the error
    that took the answer away, where there was one. A `psycopg.OperationalError` with
    SQLSTATE 08007.
    """

    __module__ = "aiopgsafe"

    xid: int | None = None
    """The transaction's id on the server, or None where it isn't known."""


class CommitRolledBack(errors.TransactionRollback):
    """COMMIT was sent and the server answered ROLLBACK: nothing is committed.

    PostgreSQL does so without an error when a statement of the transaction had
    failed and the program went on regardless (PostgreSQL documentation, part VI,
    COMMIT). psycopg and asyncpg end such a block as if it were committed. A
    `psycopg.OperationalError` with SQLSTATE 40000.
    """

    __module__ = "aiopgsafe"


class ConnectionReleased(psycopg.InterfaceError):
    """The connection was given back to its pool and is used by who had it before.

    Raised by everything on that connection, its cursors and its transactions, also
    while somebody else holds it: nothing is sent. A `psycopg.InterfaceError`.
    """

    __module__ = "aiopgsafe"


class Draining(psycopg.OperationalError):
    """The database drains: it finishes what runs and begins nothing new.

    A `psycopg.OperationalError`; nothing was sent, another instance may do the work.
    """

    __module__ = "aiopgsafe"


def brief(exc: BaseException) -> str:
    """An error in one line of a log: libpq's texts have hints for people in further ones."""
    text = str(exc).strip()
    return text.splitlines()[0] if text else repr(exc)


def foremost(*raised: BaseException | None) -> BaseException | None:
    """Which of several exceptions goes on: see `rank()`; of equals the first.

    The others are its context, as if each had come in handling the next: none is forgotten.
    """
    came = [exc for exc in raised if exc is not None]
    if not came:
        return None
    first = min(came, key=rank)
    for other in came:
        put_behind(first, other)
    return first


def put_behind(first: BaseException, other: BaseException) -> None:
    """Put `other` at the end of the contexts of `first`, if it isn't among them."""
    chain = {id(exc): exc for exc in chain_of(first)}
    if id(other) in chain:
        return
    for exc in chain_of(other):  # no circle: both may have come in the handling of a third
        if id(exc.__context__) in chain:
            exc.__context__ = None
    [*chain.values()][-1].__context__ = other


def let_out(exc: BaseException) -> NoReturn:
    """Raise it with all of its contexts.

    A plain ``raise`` puts in their place what is handled around it, by a ``with`` for example.
    """
    if (handled := sys.exc_info()[1]) is not None:
        put_behind(exc, handled)
    context = exc.__context__
    try:
        raise exc
    finally:
        exc.__context__ = context


def rank(exc: BaseException) -> int:
    """What stops the program goes before what stops its task, and that before errors.

    Who closes a generator hears of nothing but errors.
    """
    if isinstance(exc, (SystemExit, KeyboardInterrupt)):
        return 0
    return 2 if isinstance(exc, (Exception, GeneratorExit)) else 1


def goes_on(going_through: BaseException | None, raised: BaseException) -> bool:
    """Whether what goes through a block goes before what its end has `raised`, which must not be.

    It is the other one's context then.
    """
    if going_through is None or raised is going_through:
        return False
    return foremost(raised, going_through) is going_through


def chain_of(exc: BaseException) -> Iterator[BaseException]:
    """An exception and its contexts, each in the handling of which the one before it came."""
    seen: set[int] = set()
    before: BaseException | None = exc
    while before is not None and id(before) not in seen:
        seen.add(id(before))
        yield before
        before = before.__context__


_SAFE = "_aiopgsafe_safe_to_retry"


def mark_retry(exc: BaseException, *, safe: bool) -> None:
    """Note on an exception what its class doesn't tell: see `safe_to_retry()`.

    :param safe: True: the transaction is not committed and never will be. False: what became
        of it isn't known.
    """
    setattr(exc, _SAFE, safe)


_LOST = "_aiopgsafe_lost"


def mark_lost(exc: BaseException, session: object) -> None:
    """Note whose end an exception tells."""
    setattr(exc, _LOST, session)


def may_be_loss_of(exc: BaseException, session: object) -> bool:
    """Whether `exc` may tell of this session's end: not of another's, or of more than that."""
    other = getattr(exc, _LOST, session) is not session
    return not other and not isinstance(exc, CommitUnknown) and not hasattr(exc, _SAFE)


def safe_to_retry(exc: BaseException) -> bool:
    """Whether the transaction that `exc` ended may be run again, as a whole.

    It is known not to be committed, and never will be, and running it again may succeed:
    a serialization failure (SQLSTATE 40001), a deadlock (40P01; PostgreSQL documentation,
    "Serialization Failure Handling"), a connection that was lost before COMMIT was sent, or
    in it and the server, asked over another one, says that it is rolled back.

    False for `CommitUnknown`, for other errors, and for a lost connection of which it
    isn't known what the server has done: of a single statement in autocommit mode.
    """
    marked: bool | None = getattr(exc, _SAFE, None)
    if marked is not None:
        return marked
    return isinstance(exc, (errors.SerializationFailure, errors.DeadlockDetected))


safe_to_retry.__module__ = "aiopgsafe"
