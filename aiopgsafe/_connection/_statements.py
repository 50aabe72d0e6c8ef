"""Which statement is in flight, when it matters."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import TYPE_CHECKING, Any, cast

import psycopg
from psycopg import sql

if TYPE_CHECKING:
    from psycopg.abc import PQGen, Query

_ENDS_TRANSACTION = re.compile(
    rb"(?:\s|--[^\n]*\n|/\*.*?\*/)*(?:COMMIT|END|ROLLBACK|ABORT|PREPARE\s+TRANSACTION)\b",
    re.IGNORECASE | re.DOTALL,
)


def listens(query: Query) -> bool:
    """Whether it may contain LISTEN: asked for each statement, may err on the safe side."""
    if query.__class__ is str or query.__class__ is bytes:
        return _listens(query)
    return "listen" in repr(query).lower()


@lru_cache(1024)
def _listens(query: str | bytes) -> bool:
    return (b"listen" if isinstance(query, bytes) else "listen") in query.lower()  # type: ignore[operator]


def name_of(gen: PQGen[Any]) -> str:
    """The name of the function that made the generator."""
    return getattr(gen, "__name__", "")


def ending_statement(gen: PQGen[Any]) -> psycopg.AsyncCursor[Any] | None:
    """The cursor if `gen` executes a statement that ends a transaction, as text of the user's.

    Looked for in the generator's own frame: it has to work with any cursor class,
    and cost nothing where nobody interrupts.
    """
    frame = getattr(gen, "gi_frame", None)
    if frame is None or frame.f_code.co_name != "_execute_gen":
        return None
    cursor = cast("psycopg.AsyncCursor[Any]", frame.f_locals["self"])
    query: Query = frame.f_locals["query"]
    if isinstance(query, str):
        text = query.encode()
    elif isinstance(query, bytes):
        text = query
    elif isinstance(query, sql.Composable):
        text = query.as_bytes(cursor)
    else:
        return None
    return cursor if _ENDS_TRANSACTION.match(text) else None
