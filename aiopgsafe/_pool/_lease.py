"""`AsyncConnectionPool.connection()`: a connection for a block."""

from __future__ import annotations

from time import monotonic
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from psycopg import pq

from .._connection import AsyncConnection

if TYPE_CHECKING:
    from ._pool import AsyncConnectionPool

ConnectionT = TypeVar("ConnectionT", bound=AsyncConnection[Any])

IDLE = pq.TransactionStatus.IDLE


class Lease(Generic[ConnectionT]):
    """``async with`` it: a connection of the pool's, given back at the end."""

    __slots__ = ("_conn", "_pool", "_since", "_timeout")

    def __init__(self, pool: AsyncConnectionPool[ConnectionT], timeout: float | None) -> None:
        self._pool = pool
        self._timeout = timeout
        self._conn: ConnectionT | None = None
        self._since = 0.0

    async def __aenter__(self) -> ConnectionT:
        if self._conn is not None:
            raise RuntimeError("the block is entered already: call connection() for another one")
        pool = self._pool
        self._conn = conn = pool._get_idle() or await pool._get(self._timeout)
        self._since = monotonic()
        return conn

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        conn, self._conn = self._conn, None
        assert conn is not None
        pool = self._pool
        if conn._pool is not pool:  # closed in the block, with close_returns
            return
        try:
            # Nearly always there is nothing to end.
            if conn.pgconn.transaction_status != IDLE or conn._unit is not None:
                await conn.__aexit__(exc_type, exc, tb)
        finally:
            pool._used_for(monotonic() - self._since)
            if exc is not None:
                pool._look_at_error(conn, exc)
            if not pool._put_back(conn):
                await pool._clean(conn)
