"""Who gets a connection: at once, in turn, or not in time."""

from __future__ import annotations

import logging
from time import monotonic
from typing import NamedTuple

from psycopg import pq
from psycopg_pool import PoolTimeout, TooManyRequests

from .._backends import Backend, Expired, sleep
from .._errors import brief
from ._cleaning import clean
from ._connecting import FIRST_DELAY
from ._opening import Opening
from ._options import Callback
from ._places import Place, Request

logger = logging.getLogger("aiopgsafe.pool")


IDLE = pq.TransactionStatus.IDLE

MAX_CHECK_DELAY = 1.0
"""Seconds between two checks at the most."""


class Deadline(NamedTuple):
    """Until when a client waits, and how long that was meant to be, in seconds."""

    when: float
    timeout: float

    @property
    def left(self) -> float:
        return self.when - monotonic()


class Giving(Opening):
    """The part of `AsyncConnectionPool` that gives connections to clients."""

    max_waiting: int

    def _take(self) -> Place | None:
        """An idle connection that lives, if there is one."""
        while (place := self._places.take()) is not None:
            channel = place.conn._channel
            channel.watch(place.watched)
            # One look at the socket: its end may have come since the loop last looked.
            if channel.look():
                return place
            self._lose(place)
        return None

    async def _place(self, backend: Backend, deadline: Deadline) -> Place:
        """An idle one, or one in turn."""
        place = self._take() or await self._wait_for_place(backend, deadline)
        # It may have died on the way to us: then we are the next ones again.
        while not place.conn._channel.look():
            self._lose(place)
            place = self._take() or await self._wait_for_place(backend, deadline, ahead=True)
        return place

    async def _wait_for_place(
        self, backend: Backend, deadline: Deadline, *, ahead: bool = False
    ) -> Place:
        if deadline.left <= 0:
            raise self._timed_out(deadline)
        queue = self._places.queue
        if self.max_waiting and len(queue) >= self.max_waiting and not ahead:
            self._stats["requests_errors"] += 1
            raise TooManyRequests(
                f"the pool {self.name!r} has already {len(queue)} requests waiting"
            )
        self._stats["requests_queued"] += 1
        started = monotonic()
        request = Request(backend.waiter())
        if ahead:
            queue.appendleft(request)
        else:
            queue.append(request)
        self._connector.grow()
        request.waiter.limit(deadline.when)
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
                raise self._timed_out(deadline) from self._connector.last_error
            raise
        finally:
            self._stats["requests_wait_ms"] += int((monotonic() - started) * 1000)

    def _timed_out(self, deadline: Deadline) -> PoolTimeout:
        text = f"couldn't get a connection after {deadline.timeout:.2f} sec"
        if (why := self._connector.last_error) is not None:
            text += f": {brief(why)}"
        return PoolTimeout(text)

    async def _checked(
        self, check: Callback, backend: Backend, place: Place, deadline: Deadline
    ) -> Place:
        """Only a connection that passes `check`; others are replaced."""
        delay = FIRST_DELAY
        while not await self._passes(check, place):
            if deadline.left <= delay:
                raise self._timed_out(deadline)
            await sleep(backend, delay)
            delay = min(2 * delay, MAX_CHECK_DELAY)
            self._check_usable()  # it may have been closed meanwhile
            place = await self._place(backend, deadline)
        return place

    async def _passes(self, check: Callback, place: Place) -> bool:
        conn = place.conn
        conn._pool = self._connector  # `async with conn` in the callback doesn't close it
        try:
            await check(conn)
            held = None
            if not conn.closed and conn.pgconn.transaction_status != IDLE:
                held = await clean(conn, None)  # nobody gets a connection in a transaction
            if held is not None:
                raise held
        except Exception as exc:
            logger.info("connection failed check: %s", exc)
        except BaseException:
            self._return_unchecked(place)
            raise
        else:
            if not conn.closed:
                return True
        self._lose(place)
        return False
