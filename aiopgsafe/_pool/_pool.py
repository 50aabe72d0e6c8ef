"""`AsyncConnectionPool`: psycopg_pool's, on any event loop."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from inspect import isawaitable
from itertools import count
from time import monotonic
from typing import Any, cast

import psycopg_pool
from psycopg import pq

from .. import _backends
from .._backends import Backend, Background, Waiter
from .._connection import AsyncConnection
from .._errors import brief
from .._health import Health
from ._cleaning import clean
from ._connecting import Connector
from ._giving import Deadline, Giving
from ._lease import ConnectionT, Lease
from ._options import (
    Callback,
    ConnectOptions,
    Given,
    check_options,
    check_sizes,
    given_conninfo,
    given_kwargs,
)
from ._options import warn_of_constructor as warn
from ._places import Place, Places

__all__ = ["AsyncConnectionPool"]

logger = logging.getLogger("aiopgsafe.pool")

IDLE = pq.TransactionStatus.IDLE

_numbers = count(1)


class AsyncConnectionPool(Giving, psycopg_pool.AsyncConnectionPool[ConnectionT]):
    """A pool of connections, on asyncio, uvloop and trio.

    The parameters, methods, statistics and errors of `psycopg_pool.AsyncConnectionPool`,
    with the same meanings, and these promises more: wherever a client is cancelled, no
    connection, no place, no waiting client and no cancellation is lost. Idle connections
    are watched: one that the server ends is replaced at once, and nobody gets it. What
    comes back is made clean; whoever uses it after that gets `ConnectionReleased`.

    ``async with`` it, or call `open()` and `close()`.

    :param connection_class: `AsyncConnection` or a subclass.
    :param num_workers: how many connections may be made at the same time.
    """

    __module__ = "aiopgsafe"

    def __init__(
        self,
        conninfo: Given = "",
        *,
        connection_class: type[ConnectionT] = cast("type[ConnectionT]", AsyncConnection),  # noqa: B008
        kwargs: Given = None,
        min_size: int = 4,
        max_size: int | None = None,
        open: bool | None = None,
        configure: Callback | None = None,
        check: Callback | None = None,
        reset: Callback | None = None,
        name: str | None = None,
        close_returns: bool = False,
        timeout: float = 30.0,
        max_waiting: int = 0,
        max_lifetime: float = 60 * 60.0,
        max_idle: float = 10 * 60.0,
        reconnect_timeout: float = 5 * 60.0,
        reconnect_failed: Any = None,
        num_workers: int = 3,
    ) -> None:
        check_options(
            *(connection_class, num_workers, max_waiting),
            timeout=timeout,
            max_lifetime=max_lifetime,
            max_idle=max_idle,
            reconnect_timeout=reconnect_timeout,
        )
        self._places = Places(*check_sizes(min_size, max_size))
        self.name = name or f"pool-{next(_numbers)}"
        self.conninfo = conninfo
        self.kwargs = kwargs
        self.connection_class = connection_class
        self.close_returns = close_returns
        self.timeout = timeout
        self.max_waiting = max_waiting
        self.max_lifetime = max_lifetime
        self.max_idle = max_idle
        self.reconnect_timeout = reconnect_timeout
        self.num_workers = num_workers
        self._check = check
        self._reset = reset
        self._reconnect_failed = reconnect_failed
        self._stats: Counter[str] = Counter()
        self._health = Health()
        self._health.add(self._lives)
        self._connector = Connector(
            self.name,
            lambda: ConnectOptions(self.connection_class, self.conninfo, self.kwargs, configure),
            self._places,
            lambda: self._stats,
            self._add,
            workers=num_workers,
            reconnect_timeout=reconnect_timeout,
            on_error=self._health.look,
            on_failed=self.reconnect_failed,
        )
        self._backend: Backend | None = None
        self._closed = True
        self._opening = None
        self._opened_by: object = None
        self._open_implicitly = open is None
        self._calls = 0
        self._drained_at = 0.0
        self._refusal = ""
        self._on_return: Callable[[], object] | None = None
        self._filling: list[Waiter] = []
        self._maintenance: Background[None] | None = None
        self._bell: Waiter | None = None
        if open:
            warn(type(self).__name__, stacklevel=3)
        if open or (open is None and _backends.running()):
            self._open()

    def __repr__(self) -> str:
        return f"<aiopgsafe.{type(self).__name__} {self.name!r} at 0x{id(self):x}>"

    @property
    def min_size(self) -> int:
        """Connections that are kept in any case."""
        return self._places.min_size

    @property
    def max_size(self) -> int:
        """Connections that there may be."""
        return self._places.max_size

    # By these names libraries that are made for psycopg_pool ask (procrastinate).

    async def _resolve_conninfo(self) -> str:
        return await given_conninfo(self.conninfo)

    async def _resolve_kwargs(self) -> dict[str, Any]:
        return await given_kwargs(self.kwargs)

    # Getting a connection

    def connection(  # type: ignore[override]  # psycopg_pool's is a generator around a block
        self, timeout: float | None = None
    ) -> Lease[ConnectionT]:
        """A connection for a block: ``async with pool.connection() as conn``.

        At its end an open transaction is committed, or rolled back if the block
        raises, and the connection is given back, wherever the task is cancelled.

        :param timeout: seconds to wait for one; None: the pool's.

        Entering raises `PoolTimeout`, `PoolClosed`, `TooManyRequests`.
        """
        return Lease(self, timeout)

    async def getconn(self, timeout: float | None = None) -> ConnectionT:
        """A connection, to be given back by `putconn()`. `connection()` is safer.

        :param timeout: seconds to wait for one; None: the pool's.

        Raises `PoolTimeout`, `PoolClosed`, `TooManyRequests`.
        """
        return self._get_idle() or await self._get(timeout)

    def _get_idle(self) -> ConnectionT | None:
        """A connection that needn't be waited for; nearly always there is one."""
        backend = self._backend
        if backend is None or self._closed or self._refusal or self._open_implicitly:
            self._check_usable()
        elif not backend.is_current():
            self._check_loop()
        if self._check is not None or (place := self._take()) is None:
            return None
        self._stats["requests_num"] += 1
        conn: ConnectionT = place.conn  # type: ignore[assignment]  # the pool's class; no call for it here
        conn._pool = self
        return conn

    async def _get(self, timeout: float | None) -> ConnectionT:
        if timeout is None:
            timeout = self.timeout
        backend = self._check_usable()
        self._stats["requests_num"] += 1
        deadline = Deadline(monotonic() + timeout, timeout)
        place = await self._place(backend, deadline)
        if self._check is not None:
            place = await self._checked(self._check, backend, place, deadline)
        conn = cast("ConnectionT", place.conn)
        conn._pool = self
        return conn

    # Giving it back

    async def putconn(self, conn: ConnectionT) -> None:
        """Give a connection back that came from `getconn()`.

        An open transaction is rolled back. Raises `ValueError` for a connection that is
        not of this pool's, `ConnectionReleased` for one that was given back already.
        """
        pool = getattr(conn, "_pool", None)
        if pool is not self:
            where = f"it comes from pool {pool.name!r}" if pool else "it doesn't come from any pool"
            raise ValueError(f"can't return connection to pool {self.name!r}, {where}: {conn}")
        self._check_loop()
        if not self._put_back(conn):
            await self._clean(conn)

    def _put_back(self, conn: ConnectionT) -> bool:
        """Give back a connection that is clean, or gone. False: it has to be cleaned first."""
        if conn._channel.closed and conn._unit is None:
            self._stats["returns_bad"] += 1
            self._retire(conn._place)
        elif (
            conn.pgconn.transaction_status != IDLE
            or conn._told.listening
            or conn._unit is not None
            or self._reset is not None
            or conn.lock.locked()
            or conn.pgconn.pipeline_status
            or conn._pipeline is not None
            or conn._blocks
            or conn._tpc is not None
        ):
            return False
        else:
            self._return(conn._place)
        return True

    async def _clean(self, conn: ConnectionT) -> None:
        place: Place = conn._place
        held: BaseException | None = None
        try:
            held = await clean(conn, self._reset)
        finally:
            if conn.closed:
                self._stats["returns_bad"] += 1
                self._retire(place)
            else:
                self._return(place)
        if held is not None:
            raise held

    # Connections that come and go

    async def drain(self) -> None:
        """Replace all connections: those in use when they are given back."""
        self._check_usable()
        self._drain()

    async def check(self) -> None:
        """Ask each idle connection whether it works, and replace those that don't."""
        self._check_usable()
        places = self._places.take_idle()
        try:
            while places:
                place = places[-1]
                place.conn._channel.watch(False)
                try:
                    await self.check_connection(cast("ConnectionT", place.conn))
                except Exception as exc:
                    logger.warning("%r discards a broken connection: %s", self.name, brief(exc))
                    self._lose(places.pop())
                else:
                    self._return(places.pop())
        finally:
            for place in places:
                self._return_unchecked(place)

    @staticmethod
    async def check_connection(conn: AsyncConnection[Any]) -> None:
        """Ask the server for nothing, to see whether it answers. Raises if it doesn't.

        To be used as `check`, too; it doesn't begin a transaction.
        """
        async with conn.lock:
            await conn.wait(conn._ping_gen())

    async def reconnect_failed(self) -> None:
        """Called when connecting has failed for ``reconnect_timeout``: calls what was given."""
        if self._reconnect_failed is not None:
            result = self._reconnect_failed(self)
            if isawaitable(result):
                await result

    async def resize(self, min_size: int, max_size: int | None = None) -> None:
        """Change the pool's sizes. Raises `ValueError` for bad ones."""
        sizes = check_sizes(min_size, max_size)
        self._check_loop()
        self._places.min_size, self._places.max_size = sizes
        if not self._closed:
            for place in self._places.beyond_max_size():
                self._retire(place)
            self._connector.grow()
            self._look_whether_filled()
            self._ring()
