"""What a statement's text says of it, where that matters."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache
from itertools import islice
from typing import TYPE_CHECKING, Any, cast

import psycopg
from psycopg import sql

if TYPE_CHECKING:
    from psycopg.abc import PQGen, Query

LISTENS, ENDS, WRITES, FORGETS, RIDES, BY_HAND, ACCESS, STREAMS = 1, 2, 4, 8, 16, 32, 64, 128
"""Traits: it may contain LISTEN; one of its commands ends the transaction; it is a single
INSERT, UPDATE, DELETE or MERGE; it may forget prepared statements; it may go in one pipeline
with others; it may treat savepoints; it may change whether its transaction may write; its rows
come one by one."""

NOTED = LISTENS | ENDS | FORGETS | BY_HAND | ACCESS
"""Traits that the connection must know of."""

_WORDS = (b"commit", b"end", b"rollback", b"abort", b"prepare")
_NOTED_WORDS = (b"listen", b"deallocate", b"discard", b"savepoint", b"release", b"read")
_ACCESS = re.compile(rb"read[\s_]+(?:only|write)")
_ENDING = re.compile(
    rb"(?:COMMIT|END|ABORT|PREPARE\s+TRANSACTION"
    rb"|ROLLBACK(?!\s+(?:(?:WORK|TRANSACTION)\s+)?TO\b))\b",  # to a savepoint
    re.IGNORECASE,
)
_TOKEN = re.compile(
    rb"""[eE]'(?:[^'\\]|\\.|'')*+(?:'|\Z)
    | '(?:[^']|'')*+(?:'|\Z)
    | "(?:[^"]|"")*+(?:"|\Z)
    | \$(?P<tag>(?:[^\W\d]\w*)?)\$.*?(?:\$(?P=tag)\$|\Z)
    | --[^\n\r]*+
    | /\*
    | ;
    | [A-Za-z_\x80-\xff][\w$\x80-\xff]*+
    """,
    re.VERBOSE | re.DOTALL,
)
_DML = re.compile(
    rb"insert|update|delete|merge|with\b(?=.*\b(?:insert|update|delete|merge)\b)", re.DOTALL
)
_COMMENT = re.compile(rb"/\*|\*/")


def traits(query: Query, cursor: psycopg.AsyncCursor[Any]) -> int:
    """What is known of a statement. Asked for each; of LISTEN it errs on the safe side."""
    if isinstance(query, (str, bytes)):
        return traits_of_text(query)
    text = repr(query).lower().encode()
    if not any(word in text for word in _WORDS + _NOTED_WORDS):
        return 0
    return traits_of_text(query.as_bytes(cursor) if isinstance(query, sql.Composable) else text)


@lru_cache(1024)
def traits_of_text(query: str | bytes) -> int:
    """`traits()` of a statement as it is sent."""
    text = query.encode() if isinstance(query, str) else query
    lower = text.lower()
    found = LISTENS if b"listen" in lower else 0
    if b"deallocate" in lower or b"discard" in lower:
        found |= FORGETS
    if b"savepoint" in lower or b"release" in lower or b"rollback" in lower:
        found |= BY_HAND
    if any(word in lower for word in _WORDS) and ends_transaction(text):
        found |= ENDS
    if _DML.match(lower.lstrip()) and b";" not in lower:
        found |= WRITES
    if _ACCESS.search(lower):
        found |= ACCESS
    if not found & (ENDS | FORGETS | ACCESS) and rides(lower):
        found |= RIDES
    return found


def rides(text: bytes) -> bool:
    """Whether `text`, in lower case, is a single command and no COPY, which no pipeline takes."""
    if b"\\" in text:  # what it means depends on standard_conforming_strings
        return False
    if b";" not in text and text[:1].isalpha():
        return not text.startswith(b"copy")
    firsts = [first.group() for first in islice(_firsts(text), 2)]
    return len(firsts) < 2 and firsts != [b"copy"]


def ends_transaction(text: bytes) -> bool:
    """Whether any command of `text` is COMMIT, ROLLBACK or the like."""
    return any(_ENDING.match(text, first.start()) for first in _firsts(text))


def _firsts(text: bytes) -> Iterator[re.Match[bytes]]:
    """The first token of each command. A function's body in SQL (BEGIN ATOMIC) is part of one."""
    at, first, depth, before, creates = 0, True, 0, b"", False
    while (token := _TOKEN.search(text, at)) is not None:
        at = token.end()
        word = token.group().lower()
        if word == b"/*":
            at = _end_of_comment(text, token.start())
        elif word.startswith(b"--"):
            pass
        elif depth:
            depth += (word == b"case") - (word == b"end")
        elif word == b";":
            first = True
        elif word == b"atomic" and before == b"begin" and creates:
            depth = 1
        elif first:
            yield token
            first, creates = False, word == b"create"
        before = word


def _end_of_comment(text: bytes, start: int) -> int:
    depth = 0  # they nest, in PostgreSQL
    for mark in _COMMENT.finditer(text, start):
        depth += 1 if mark.group() == b"/*" else -1
        if depth == 0:
            return mark.end()
    return len(text)


_STATEMENTS = {
    "_execute_gen": "query",
    "_executemany_gen_pipeline": "query",
    "_executemany_gen_no_pipeline": "query",
    "_stream_send_gen": "query",
    "_start_copy_gen": "statement",
}
"""psycopg's generators that are given a query, of any class of cursor; and what they call it."""


def traits_of(gen: PQGen[Any]) -> int:
    """`traits()` of what a generator sends, if it is one that sends a query."""
    name = getattr(gen, "__name__", "")
    if name not in _STATEMENTS:
        return 0
    frame = getattr(gen, "gi_frame", None)
    if frame is None:
        return 0
    found = traits(frame.f_locals[_STATEMENTS[name]], frame.f_locals["self"])
    return found | STREAMS if name == "_stream_send_gen" else found


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
        if sent is not None and traits_of_text(sent.query) & ENDS:
            return cast("psycopg.AsyncCursor[Any]", queued[0])  # type: ignore[index]
    if traits_of(gen) & ENDS:
        return cast("psycopg.AsyncCursor[Any]", cast("Any", gen).gi_frame.f_locals["self"])
    return None
