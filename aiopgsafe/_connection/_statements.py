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
    rb"(?:COMMIT|END|ROLLBACK|ABORT|PREPARE\s+TRANSACTION)\b", re.IGNORECASE
)
_SPACE = re.compile(rb"(?:[\s;]|--[^\n]*(?:\n|\Z))*+")
_COMMENT = re.compile(rb"/\*|\*/")


def ends_transaction(text: bytes) -> bool:
    """Whether the first command of `text` is COMMIT, ROLLBACK or the like."""
    at = 0
    while True:
        at = _SPACE.match(text, at).end()  # type: ignore[union-attr]  # it matches nothing, too
        if not text.startswith(b"/*", at):
            return _ENDS_TRANSACTION.match(text, at) is not None
        depth = 0  # they nest, in PostgreSQL
        for mark in _COMMENT.finditer(text, at):
            depth += 1 if mark.group() == b"/*" else -1
            if depth == 0:
                at = mark.end()
                break
        else:
            return False


def listens(query: Query) -> bool:
    """Whether it may contain LISTEN: asked for each statement, may err on the safe side."""
    if query.__class__ is str or query.__class__ is bytes:
        return _listens(query)
    return "listen" in repr(query).lower()


@lru_cache(1024)
def _listens(query: str | bytes) -> bool:
    return (b"listen" if isinstance(query, bytes) else "listen") in query.lower()  # type: ignore[operator]


_STATEMENTS = (
    "_execute_gen",
    "_executemany_gen_pipeline",
    "_executemany_gen_no_pipeline",
    "_stream_send_gen",
)
"""psycopg's generators that are given a query, of any class of cursor."""


def statement_listens(gen: PQGen[Any]) -> bool:
    """Whether a generator that hasn't begun sends what may contain LISTEN."""
    if name_of(gen) not in _STATEMENTS:
        return False
    return listens(cast("Any", gen).gi_frame.f_locals["query"])


def name_of(gen: PQGen[Any]) -> str:
    """The name of the function that made the generator."""
    return getattr(gen, "__name__", "")


def ending_statement(
    gen: PQGen[Any], pipeline: psycopg.AsyncPipeline | None = None
) -> psycopg.AsyncCursor[Any] | None:
    """The cursor if a statement of the user's is in flight that ends a transaction, as text.

    Looked for in the generator's own frame: it has to work with any cursor class,
    and cost nothing where nobody interrupts.

    :param pipeline: in which others may be in flight, too.
    """
    for queued in pipeline.result_queue if pipeline is not None else ():
        sent = getattr(queued[0], "_query", None) if queued is not None else None
        if sent is not None and ends_transaction(sent.query):
            return cast("psycopg.AsyncCursor[Any]", queued[0])  # type: ignore[index]
    frame = getattr(gen, "gi_frame", None)
    if frame is None or frame.f_code.co_name != "_execute_gen":
        return None
    cursor = cast("psycopg.AsyncCursor[Any]", frame.f_locals["self"])
    return cursor if is_ending(frame.f_locals["query"], cursor) else None


def is_ending(query: Query, cursor: psycopg.AsyncCursor[Any]) -> bool:
    """Whether the query is a statement that ends a transaction."""
    if isinstance(query, str):
        text = query.encode()
    elif isinstance(query, bytes):
        text = query
    elif isinstance(query, sql.Composable):
        text = query.as_bytes(cursor)
    else:
        return False
    return ends_transaction(text)
