"""Cursors: psycopg's, with what the connection must know and must shield."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self, cast

import psycopg
from psycopg import errors
from psycopg.rows import Row

from .._backends import Expired
from .._backends._lock import Lock
from .._ending import acquire_shielded, run
from .._shield import Shield
from ._statements import ENDS, LISTENS, traits

if TYPE_CHECKING:
    from psycopg.abc import Params, Query

    from .._ending import Session

__all__ = ["AsyncCursor", "AsyncServerCursor"]


class AsyncCursor(psycopg.AsyncCursor[Row]):
    """psycopg's, which notes that its session listens: a pool ends that."""

    __module__ = "aiopgsafe"
    __slots__ = ()

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
        found = traits(query, self)
        if found & LISTENS:
            conn._told.listening = True
        # Not `async with`: two coroutines less, at each statement.
        lock: Lock = conn.lock
        if not lock.try_acquire():
            await lock.acquire()
        try:
            await conn._drive(self._execute_gen(query, params, prepare=prepare, binary=binary))
        except BaseException as exc:
            if found & ENDS:
                conn._ended_by_statement(exc)
            if isinstance(exc, errors._NO_TRACEBACK):
                raise exc.with_traceback(None)  # noqa: B904
            raise
        finally:
            lock.release()
        if found & ENDS:
            conn._ended_by_statement(None)
        return self


class AsyncServerCursor(psycopg.AsyncServerCursor[Row]):
    """psycopg's, with a `close()` that an interruption waits for: CLOSE takes no time."""

    __module__ = "aiopgsafe"

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
        finally:
            cast("Any", self)._close()
            if locked:
                conn.lock.release()
        if shield.held is not None:
            raise shield.held
