"""Cursors of sync connections."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

import psycopg
from psycopg import errors
from psycopg.rows import Row, RowFactory

from ._query import CachingQuery
from ._rider import RidingCursor
from ._statements import ENDS

if TYPE_CHECKING:
    from psycopg.abc import Params, Query

__all__ = ["Cursor", "SyncRider"]


class SyncRider(RidingCursor[Row]):
    """What cursors of `Connection` have in common: BEGIN and the like ride on what they execute."""

    __slots__ = ()

    def __init__(
        self,
        connection: psycopg.Connection[Any],
        *,
        row_factory: RowFactory[Row] | None = None,
    ) -> None:
        self._set_up(connection, row_factory)

    def execute(
        self,
        query: Query,
        params: Params | None = None,
        *,
        prepare: bool | None = None,
        binary: bool | None = None,
    ) -> Self:
        """Execute a query, as `psycopg.Cursor.execute()` does."""
        conn = self._conn
        with conn.lock:
            conn._rider = self
            self._traits = 0
            if conn.pgconn.pipeline_status and conn._pipeline is None:
                conn._come_to_rest()  # psycopg was torn as it began one: no Sync would come
            try:
                conn._wait(self._execute_gen(query, params, prepare=prepare, binary=binary))
            except BaseException as exc:
                if self._traits & ENDS:
                    conn._ended_by_statement(exc)
                if conn._begin_waits is not None and not conn._blocks:
                    # Parameters that can't be adapted: nothing was sent, nothing has begun.
                    conn._forget_queue()
                    conn._unit = None
                if isinstance(exc, errors._NO_TRACEBACK):
                    raise exc.with_traceback(None)  # noqa: B904
                raise
            finally:
                conn._rider = None
            if self._traits & ENDS:
                conn._ended_by_statement(None)
        return self


class Cursor(SyncRider[Row], psycopg.Cursor[Row]):
    """psycopg's. BEGIN and the like ride on what it executes (`_riding`)."""

    __module__ = "aiopgsafe"
    __slots__ = ("_traits",)

    _query_cls = CachingQuery
