"""`AsyncConnectionPool.connection()`: a connection for a block."""

from __future__ import annotations

from time import monotonic
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic

from psycopg import pq
from psycopg.rows import TupleRow
from typing_extensions import TypeVar

from .._connection import AsyncConnection
from .._errors import ConnectionReleased

if TYPE_CHECKING:
    from ._pool import AsyncConnectionPool

ConnectionT = TypeVar("ConnectionT", bound=AsyncConnection[Any], default=AsyncConnection[TupleRow])

IDLE = pq.TransactionStatus.IDLE


class Lease(Generic[ConnectionT]):
    """``async with`` it: a connection of the pool's, given back at the end."""

    __slots__ = ("_conn", "_entered", "_given_back", "_pool", "_since", "_timeout")

    def __init__(self, pool: AsyncConnectionPool[ConnectionT], timeout: float | None) -> None:
        self._pool = pool
        self._timeout = timeout
        self._entered = False
        self._given_back = False
        self._conn: ConnectionT | None = None
        self._since = 0.0

    async def __aenter__(self) -> ConnectionT:
        if self._entered:
            raise RuntimeError("the block is entered already: call connection() for another one")
        self._entered = True
        pool = self._pool
        try:
            conn = pool._get_idle() or await pool._get(self._timeout)
        except BaseException:
            self._entered = False
            raise
        self._conn = conn
        self._since = monotonic()
        return conn

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self._entered = False
        if self._given_back:
            self._given_back = False
            self._pool._calls_ended()
            return
        conn = self._conn
        assert conn is not None
        pool = self._pool
        try:
            if conn._pool is not pool:  # closed in the block
                return
        except ConnectionReleased:  # and thereby given back
            return
        try:
            # Nearly always there is nothing to end.
            if conn.pgconn.transaction_status != IDLE or conn._unit is not None:
                await conn.__aexit__(exc_type, exc, tb)
        finally:
            await self._give_back(conn)

    async def give_back(self) -> None:
        """Before the block is left: callbacks that still run don't need the connection."""
        conn = self._conn
        assert conn is not None
        self._given_back = True
        self._pool._calls_begin()
        await self._give_back(conn)

    async def _give_back(self, conn: ConnectionT) -> None:
        pool = self._pool
        self._conn = None
        pool._stats["usage_ms"] += int((monotonic() - self._since) * 1000)
        if not pool._put_back(conn):
            await pool._clean(conn)
