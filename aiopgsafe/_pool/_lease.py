"""`AsyncConnectionPool.connection()`: a connection for a block."""

from __future__ import annotations

from time import monotonic
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

from psycopg import pq

from .._calls import CALL, Call
from .._connection import AsyncConnection
from .._errors import ConnectionReleased

if TYPE_CHECKING:
    from ._pool import AsyncConnectionPool

ConnectionT = TypeVar("ConnectionT", bound=AsyncConnection[Any])

IDLE = pq.TransactionStatus.IDLE


class Lease(Generic[ConnectionT]):
    """``async with`` it: a connection of the pool's, given back at the end."""

    __slots__ = ("_call", "_conn", "_entered", "_pool", "_since", "_timeout")

    def __init__(self, pool: AsyncConnectionPool[ConnectionT], timeout: float | None) -> None:
        self._pool = pool
        self._timeout = timeout
        self._entered = False
        self._conn: ConnectionT | None = None
        self._call: Call | None = None
        self._since = 0.0

    async def __aenter__(self) -> ConnectionT:
        if self._entered:
            raise RuntimeError("the block is entered already: call connection() for another one")
        self._entered = True
        pool = self._pool
        try:
            conn = None
            if (call := CALL.get()) is not None:
                conn = self._borrow(call)
            if conn is None:
                conn = pool._get_idle() or await pool._get(self._timeout)
        except BaseException:
            self._entered = False
            raise
        self._conn = conn
        self._since = monotonic()
        return conn

    def _borrow(self, call: Call) -> ConnectionT | None:
        """In a callback of a transaction: the connection that has just ended it.

        Its block keeps it until the callbacks have run. A second one for each of them
        would let as many blocks as the pool has places wait for each other.
        """
        if not isinstance(conn := call.lent, AsyncConnection):
            return None
        if (
            call.task is not conn._backend.current_task()
            or conn._pool is not self._pool
            or conn.closed
            or conn.pgconn.transaction_status != IDLE
            or conn.lock.locked()
        ):
            return None
        self._call = call
        call.lent = None
        return cast("ConnectionT", conn)

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        conn, self._conn = self._conn, None
        assert conn is not None
        self._entered = False
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
            if self._call is not None:
                # Its block gives it back, and cleans it: here it is only lent on.
                if not self._call.over:
                    self._call.lent = conn
                self._call = None
            else:
                pool._stats["usage_ms"] += int((monotonic() - self._since) * 1000)
                if not pool._put_back(conn):
                    await pool._clean(conn)
