"""Cursors: psycopg's, with what the connection must know and must shield."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Self, cast

import psycopg
from psycopg import errors
from psycopg.rows import AsyncRowFactory, Row

from .._backends import Expired
from .._backends._lock import Lock
from .._ending import acquire_shielded, run
from .._errors import goes_on
from .._shield import Shield
from ._copy import AsyncCopy
from ._query import CachingQuery
from ._rider import RidingCursor
from ._statements import ENDS

if TYPE_CHECKING:
    from types import TracebackType

    from psycopg._copy_async import AsyncWriter
    from psycopg.abc import Params, PQGen, Query

    from .._session import Session

__all__ = ["AsyncCursor", "AsyncServerCursor"]

logger = logging.getLogger("aiopgsafe")


class AsyncCursor(RidingCursor[Row], psycopg.AsyncCursor[Row]):
    """psycopg's. BEGIN and the like ride on what it executes (`_riding`)."""

    __module__ = "aiopgsafe"
    __slots__ = ("_traits",)

    _query_cls = CachingQuery

    def __init__(
        self,
        connection: psycopg.AsyncConnection[Any],
        *,
        row_factory: AsyncRowFactory[Row] | None = None,
    ) -> None:
        self._set_up(connection, row_factory)

    @asynccontextmanager
    async def copy(
        self,
        statement: Query,
        params: Params | None = None,
        *,
        writer: AsyncWriter | None = None,
    ) -> AsyncIterator[AsyncCopy]:
        """Execute a COPY and return an object to read or write by, as psycopg's does."""
        try:
            async with self._conn.lock:
                await self._conn.wait(self._start_copy_gen(statement, params))
                async with AsyncCopy(self, writer=writer) as copy:
                    yield copy
        except errors._NO_TRACEBACK as exc:
            raise exc.with_traceback(None)  # noqa: B904
        self._select_current_result(0)  # its row count

    async def execute(
        self,
        query: Query,
        params: Params | None = None,
        *,
        prepare: bool | None = None,
        binary: bool | None = None,
    ) -> Self:
        """Execute a query, as `psycopg.AsyncCursor.execute()` does."""
        conn: Any = self._conn
        # Not `async with`: two coroutines less, at each statement.
        lock: Lock = conn.lock
        if not lock.try_acquire():
            await lock.acquire()
        conn._rider = self
        self._traits = 0
        try:
            await conn._drive(self._execute_gen(query, params, prepare=prepare, binary=binary))
        except BaseException as exc:
            if self._traits & ENDS:
                conn._ended_by_statement(exc)
            if isinstance(exc, errors._NO_TRACEBACK):
                raise exc.with_traceback(None)  # noqa: B904
            raise
        finally:
            conn._rider = None
            lock.release()
        if self._traits & ENDS:
            conn._ended_by_statement(None)
        return self


class AsyncServerCursor(psycopg.AsyncServerCursor[Row]):
    """psycopg's, with a `close()` that an interruption waits for: CLOSE takes no time."""

    __module__ = "aiopgsafe"

    def _close_gen(self) -> PQGen[None]:
        conn: Any = self._conn
        if conn._undoing:  # psycopg's closes nothing in a failed transaction
            yield from conn._flush_gen()
        yield from super()._close_gen()

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_val: BaseException | None,
        exc_tb: TracebackType | None,
    ) -> None:
        try:
            await self.close()
        except BaseException as raised:
            if exc_val is None or not (
                isinstance(raised, psycopg.Error) or goes_on(exc_val, raised)
            ):
                raise
            logger.warning("error ignored closing %s: %r", self, raised)

    async def close(self) -> None:
        """Close the cursor and free its resources on the server. Shielded."""
        conn = cast("Session", self._conn)
        if self.closed:
            return
        shield = Shield(conn._backend, grace=conn.cancel_timeout)
        locked = await acquire_shielded(conn, shield)
        try:
            if not self.closed and not conn.closed:
                await run(conn, shield, self._close_gen())
        except Expired:
            conn._drop("no answer to CLOSE")
        except psycopg.Error as exc:
            if shield.held is None:
                raise
            logger.warning("error ignored closing %s: %s", self, exc)  # nor must it hide that
        finally:
            cast("Any", self)._close()
            if locked:
                conn.lock.release()
        if shield.held is not None:
            raise shield.held
