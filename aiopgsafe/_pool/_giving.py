"""Who gets a connection: at once, in turn, or not in time."""

from __future__ import annotations

import logging
from time import monotonic

from psycopg_pool import PoolTimeout, TooManyRequests

from .._backends import Backend, Expired
from ._connecting import FIRST_DELAY
from ._keeping import Keeping
from ._options import Callback
from ._places import Place, Request

logger = logging.getLogger("aiopgsafe.pool")


class Giving(Keeping):
    """The part of `AsyncConnectionPool` that gives connections to clients."""

    name: str
    max_waiting: int

    def _take(self) -> Place | None:
        """An idle connection that lives, if there is one."""
        while (place := self._places.take()) is not None:
            channel = place.conn._channel
            channel.watch(False)
            # One look at the socket: its end may have come since the loop last looked.
            if channel.look():
                return place
            self._lose(place)
        return None

    async def _wait_for_place(self, backend: Backend, timeout: float) -> Place:
        if timeout <= 0:
            raise self._timed_out(timeout)
        queue = self._places.queue
        if self.max_waiting and len(queue) >= self.max_waiting:
            self._stats["requests_errors"] += 1
            raise TooManyRequests(
                f"the pool {self.name!r} has already {len(queue)} requests waiting"
            )
        self._stats["requests_queued"] += 1
        started = monotonic()
        request = Request(backend.waiter())
        queue.append(request)
        self._connector.grow()
        request.waiter.limit(started + timeout)
        try:
            await request.waiter.wait()
            if request.error is not None:
                raise request.error
            assert request.place is not None
            return request.place
        except BaseException as exc:
            # We are still in the queue, or what was handed to us is ours to give back.
            self._stats["requests_errors"] += 1
            if request.place is not None:
                self._return(request.place)
            elif request in queue:
                queue.remove(request)
            if isinstance(exc, Expired):
                raise self._timed_out(timeout) from self._connector.last_error
            raise
        finally:
            self._stats["requests_wait_ms"] += int((monotonic() - started) * 1000)

    def _timed_out(self, timeout: float) -> PoolTimeout:
        return PoolTimeout(f"couldn't get a connection after {timeout:.2f} sec")

    async def _checked(
        self, check: Callback, backend: Backend, place: Place, timeout: float
    ) -> Place:
        """Only a connection that passes `check`; others are replaced."""
        deadline = monotonic() + timeout
        delay = FIRST_DELAY
        while True:
            try:
                await check(place.conn)
                return place
            except BaseException as exc:
                logger.info("connection failed check: %s", exc)
                if not isinstance(exc, Exception):
                    self._return_unchecked(place)
                    raise
                self._lose(place)
            if monotonic() + delay >= deadline:
                raise self._timed_out(timeout)
            waiter = backend.waiter()
            waiter.limit(monotonic() + delay)
            delay *= 2
            try:
                await waiter.wait()
            except Expired:
                pass
            place = self._take() or await self._wait_for_place(backend, deadline - monotonic())
