"""A pool that opens and closes, and who may use it meanwhile."""

from __future__ import annotations

import logging
import warnings
from time import monotonic
from types import TracebackType
from typing import Any, Self

import psycopg
from psycopg_pool import PoolClosed, PoolTimeout

from .. import _backends
from .._backends import Backend, Background, Expired
from .._calls import running_call
from .._connection import AsyncConnection
from .._errors import Draining, brief
from ._keeping import Keeping
from ._options import warn_of_constructor

logger = logging.getLogger("aiopgsafe.pool")


class Opening(Keeping):
    """The part of `AsyncConnectionPool` that opens and closes it."""

    _maintenance: Background[None] | None
    _open_implicitly: bool  # at first use, where psycopg_pool does
    _opened_by: object
    _opening: Backend | None  # in whose loop it is being opened
    _refusal: str

    @property
    def closed(self) -> bool:
        """Whether the pool is closed, or not open yet."""
        return self._closed

    async def open(self, wait: bool = False, timeout: float = 30.0) -> None:
        """Open the pool: it begins to connect, in the background.

        Nothing happens if it is open.

        :param wait: wait until there are `min_size` connections, as `wait()` does.
        :param timeout: seconds for that.

        Raises `PoolClosed` if it has been closed, `PoolTimeout`.
        """
        self._open()
        if wait:
            await self.wait(timeout)

    @property
    def _used_up(self) -> bool:
        """Whether it was closed, or left behind in an event loop that runs no more."""
        return self._backend is not None and (self._closed or not self._backend.running)

    async def _open_with_first(self) -> None:
        """Open it with a connection; raise why that can't be made."""
        self._check_unopened()
        if self._opening is not None and self._opening.running:
            raise psycopg.InterfaceError(f"{self!r} is being opened already")
        self._opening = _backends.current()
        self._opened_by = turn = object()
        try:
            conn = await self._connector.connect()
            if self._opened_by is not turn:  # closed meanwhile
                conn._close_now()
                raise PoolClosed(f"the pool {self.name!r} was closed while it was opened")
            self._open(conn)
        finally:
            if self._opened_by is turn:
                self._opening = None

    def _abandon(self) -> None:
        """Its event loop runs no more: nobody else will close its connections."""
        self._closed = True
        for place in (*self._places.idle, *self._places.used):
            place.conn._channel.discard()
            place.conn.pgconn.finish()

    def _check_unopened(self) -> None:
        if self._backend is not None:
            raise PoolClosed("pool has already been opened/closed and cannot be reused")

    def _open(self, first: AsyncConnection[Any] | None = None) -> None:
        if not self._closed:
            self._check_loop()
            return
        self._check_unopened()
        self._backend = _backends.current()
        self._closed = False
        if first is not None:
            self._stats["connections_num"] += 1
            self._add(first)
        self._connector.start(self._backend)
        self._maintenance = self._backend.background(self._maintain)

    async def wait(self, timeout: float = 30.0) -> None:
        """Wait until there are `min_size` connections.

        :param timeout: seconds; then the pool is closed and `PoolTimeout` raised.
        """
        backend = self._check_usable()
        if self._filled():
            return
        waiter = backend.waiter()
        waiter.limit(monotonic() + timeout)
        self._filling.append(waiter)
        try:
            await waiter.wait()
        except Expired:
            await self.close()
            why = self._connector.last_error
            text = f"pool initialization incomplete after {timeout} sec"
            raise PoolTimeout(f"{text}: {brief(why)}" if why else text) from why
        finally:
            if waiter in self._filling:
                self._filling.remove(waiter)
        self._check_usable()

    async def close(self, timeout: float = 5.0) -> None:
        """Close the pool. Who waits for a connection, or asks for one, gets `PoolClosed`.

        Connections in use are closed when they are given back.

        :param timeout: seconds to wait for what runs in the background to end.
        """
        self._opening = self._opened_by = None
        self._open_implicitly = False
        if self._closed:
            return
        self._check_loop()
        self._closed = True
        self._health.down()
        self._health.wake_all()
        self._places.fail_all(lambda: PoolClosed(f"the pool {self.name!r} is closed"))
        for place in tuple(self._places.idle):
            self._retire(place)
        jobs = self._connector.stop()
        if self._maintenance is not None:
            self._maintenance.cancel()
            jobs.append(self._maintenance)
        for waiter in self._filling:
            waiter.wake()
        deadline = monotonic() + timeout
        for job in jobs:
            job.limit(deadline)
            try:
                await job.wait()
            except Expired:
                logger.warning("%r: what runs in its background has not ended in time", self)
                return
            except BaseException as exc:
                # The job's own end by our cancel(), or somebody's cancelling us.
                if not job.ended_with(exc):
                    raise

    def __del__(self) -> None:
        if getattr(self, "_backend", None) is not None and not self._closed:
            warnings.warn(f"{self!r} was deleted while still open", ResourceWarning, stacklevel=1)

    async def __aenter__(self) -> Self:
        self._open_implicitly = False
        await self.open()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        await self.close()

    def _check_usable(self) -> Backend:
        backend = self._backend
        if self._refusal and running_call() is None:
            raise Draining(self._refusal)
        if self._closed or backend is None:
            if backend is not None:
                raise PoolClosed(f"the pool {self.name!r} is already closed")
            if not self._open_implicitly:
                raise PoolClosed(f"the pool {self.name!r} is not open yet: `async with` it")
            self._open()
            return self._check_usable()
        if self._open_implicitly:
            self._open_implicitly = False
            warn_of_constructor(type(self).__name__, stacklevel=4)
        if not backend.is_current():
            self._check_loop()
        return backend

    def _own_backend(self) -> Backend:
        if self._backend is None:
            raise PoolClosed(f"the pool {self.name!r} is not open yet")
        return self._backend

    def _refuse(self, why: str) -> None:
        """Give connections to nobody any more but to callbacks of what still runs."""
        self._refusal = why
        self._places.fail_all(lambda: Draining(why))

    def _check_loop(self) -> None:
        if self._backend is not None and not self._backend.is_current():
            raise psycopg.InterfaceError(
                f"the pool {self.name!r} was opened in another event loop (or thread):"
                " open one in this loop"
            )
