"""psycopg's conversion of a query and its parameters, with the common case in one call."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

from psycopg._queries import (
    MAX_CACHED_STATEMENT_LENGTH,
    MAX_CACHED_STATEMENT_PARAMS,
    PostgresQuery,
    _query2pg_nocache,
)

if TYPE_CHECKING:
    from psycopg.abc import Params, Query

__all__ = ["CachingQuery"]


@lru_cache
def _converted(query: str, encoding: str) -> tuple[bytes, Any, Any, Any]:
    """For the server: the query, formats of its parameters, their order, and its parts."""
    return _query2pg_nocache(query.encode(encoding), encoding)


class CachingQuery(PostgresQuery):
    """psycopg's: the text that was converted once is found by the text itself."""

    __slots__ = ()

    def convert(self, query: Query, params: Params | None) -> None:
        """Set up the query, and convert its parameters."""
        if (
            not isinstance(params, (tuple, list))
            or not isinstance(query, str)
            or len(query) > MAX_CACHED_STATEMENT_LENGTH
            or len(params) > MAX_CACHED_STATEMENT_PARAMS
        ):
            super().convert(query, params)
            return
        tx = self._tx
        self.query, formats, self._order, self._parts = _converted(query, tx.encoding)
        self._want_formats = formats
        if len(params) != len(formats) or self._order is not None:
            self.dump(params)  # which says what is wrong
            return
        self.params = tx.dump_sequence(params, formats)
        self.types = tx.types or ()
        self.formats = tx.formats
