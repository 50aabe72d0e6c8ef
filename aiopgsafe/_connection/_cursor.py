"""Server-side cursors that are closed wherever their block is left."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import psycopg
from psycopg.rows import Row

from .._backends import Expired
from .._ending import run
from .._shield import Shield

if TYPE_CHECKING:
    from .._ending import Session

__all__ = ["AsyncServerCursor"]


class AsyncServerCursor(psycopg.AsyncServerCursor[Row]):
    """psycopg's, with a `close()` that an interruption waits for: CLOSE takes no time."""

    __module__ = "aiopgsafe"

    async def close(self) -> None:
        """Close the cursor and free its resources on the server. Shielded."""
        conn = cast("Session", self._conn)
        async with conn.lock:
            if self.closed:
                return
            shield = Shield(conn._backend, grace=conn.cancel_timeout)
            try:
                if not conn.closed:
                    await run(conn, shield, self._close_gen())
            except Expired:
                conn._drop("no answer to CLOSE")
            finally:
                cast("Any", self)._close()
            if shield.held is not None:
                raise shield.held
