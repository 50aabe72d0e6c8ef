"""Connections that come and go: into the pool, back to it, and out of it."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from functools import partial
from random import uniform
from time import monotonic
from typing import Any

import psycopg
from psycopg import pq

from .._backends import Backend, Expired, Waiter
from .._connection import AsyncConnection
from .._errors import brief
from .._health import Health
from ._cleaning import is_read_only, is_standby
from ._connecting import Connector
from ._places import Place, Places

logger = logging.getLogger("aiopgsafe.pool")

IDLE = pq.TransactionStatus.IDLE

MIN_PAUSE = 0.05
"""Seconds between two looks for connections that have been idle for too long, at least."""

DRAIN_PAUSE = 5.0
"""Seconds: a pool that leads to a standby, whatever it does, doesn't reconnect all the time."""


class Keeping:
    """The part of `AsyncConnectionPool` that keeps the connections."""

    name: str
    max_idle: float
    max_lifetime: float
    _backend: Backend | None
    _bell: Waiter | None
    _calls: int  # blocks whose callbacks run
    _closed: bool
    _connector: Connector
    _drained_at: float
    _filling: list[Waiter]
    _health: Health
    _on_return: Callable[[], object] | None
    _places: Places
    _stats: Counter[str]

    def _filled(self) -> bool:
        return len(self._places.idle) + len(self._places.used) >= self._places.min_size

    def _given_back(self) -> None:
        wake, self._on_return = self._on_return, None
        if wake is not None:
            wake()

    def _offer(self, place: Place) -> None:
        # Nobody watches a connection in use on trio, and a busy loop sees late: one
        # more look before somebody who waits gets it.
        places, channel = self._places, place.conn._channel
        if places.queue and not channel.look():
            self._lose(place)
        elif places.put(place):
            channel.watch(True)
        if self._filling:
            self._look_whether_filled()

    def _look_whether_filled(self) -> None:
        if self._filled():
            for waiter in self._filling:
                waiter.wake()

    def _add(self, conn: AsyncConnection[Any]) -> None:
        now = monotonic()
        # With some randomness, so that not all expire together.
        place = Place(conn, now, now + self.max_lifetime * uniform(0.95, 1.0), now)
        place.born_read_only = is_read_only(conn)
        conn._place = place
        place.handlers = conn._handlers()
        place.watched = any(place.handlers)
        conn._keeper = partial(self._on_lost, place)
        conn._handlers_changed = False
        if self._closed:
            conn._close_now()
        else:
            self._health.up()
            self._offer(place)

    def _on_lost(self, place: Place, error: psycopg.Error) -> None:
        """A watcher has seen its end. One in use keeps its place until it is given back."""
        self._health.look()
        if place in self._places.used:
            self._given_back()  # who waits until nothing is in use looks again
        else:
            logger.info("%r discards a lost connection: %s", self.name, brief(error))
            self._lose(place)

    def _lives(self) -> bool:
        """Whether any connection lives. One in use is watched by nobody on trio: look."""
        places = self._places
        return any(p.conn._channel.look() for p in (*places.idle, *places.used))

    def _lose(self, place: Place) -> None:
        self._stats["connections_lost"] += 1
        self._retire(place)

    def _retire(self, place: Place) -> None:
        """Close a connection and let it go; another one takes its place if it is needed."""
        self._places.remove(place)
        place.conn._pool = None
        self._given_back()
        if not place.conn.closed:
            place.conn._close_now()
        if not self._closed:
            self._connector.grow()

    def _drain(self) -> None:
        self._drained_at = monotonic()
        for place in tuple(self._places.idle):
            self._retire(place)

    async def _maintain(self) -> None:
        """Close what has been idle or alive for too long."""
        while not self._closed and self._backend is not None:
            now = monotonic()
            for place in self._places.superfluous(now, self.max_idle):
                self._retire(place)
            due = [
                min(place.idle_since + self.max_idle, place.expires_at)
                for place in self._places.idle
            ]
            self._bell = self._backend.waiter()
            pause = max(MIN_PAUSE, min(self.max_idle, 1.0))
            self._bell.limit(max(min(due, default=0.0), now + pause))
            try:
                await self._bell.wait()
            except Expired:
                pass

    def _ring(self) -> None:
        if self._bell is not None:
            self._bell.wake()

    def _return(self, place: Place) -> None:
        places, now = self._places, monotonic()
        place.conn._pool = None
        if self._on_return is not None:
            self._given_back()
        if (
            self._closed
            or place.expires_at <= now
            or place.created_at <= self._drained_at
            or len(places.used) + len(places.idle) > places.max_size  # it has been made smaller
        ):
            self._retire(place)
            return
        if place.conn._write_refused:
            place.conn._write_refused = False
            if self._let_go_of_demoted(place):
                return
        if place.conn._handlers_changed:
            place.conn._restore_handlers(place.handlers)
        place.conn = place.conn._renewed()
        place.idle_since = now
        self._offer(place)

    def _let_go_of_demoted(self, place: Place) -> bool:
        """After a switchover the server refuses to write: reconnecting may lead to the new one.

        All connections lead to a standby. ``default_transaction_read_only`` may be the
        session's own setting: that costs this connection only.
        """
        conn, now = place.conn, monotonic()
        if is_standby(conn) and now >= self._drained_at + DRAIN_PAUSE:
            logger.warning("the server of %r is read-only now: reconnecting", self.name)
            self._drain()
        elif not is_read_only(conn) or place.born_read_only:
            return False
        self._retire(place)
        return True

    def _return_unchecked(self, place: Place) -> None:
        """Give back what a check was interrupted on: in a transaction it is of no use."""
        if place.conn.closed or place.conn.pgconn.transaction_status != IDLE:
            self._retire(place)
        else:
            self._return(place)

    def _calls_begin(self) -> None:
        """Callbacks of a block run that has given its connection back."""
        self._calls += 1

    def _calls_ended(self) -> None:
        self._calls -= 1
        self._given_back()

    def _in_use(self) -> list[AsyncConnection[Any]]:
        return [place.conn for place in self._places.used if not place.conn.closed]

    def _when_given_back(self, wake: Callable[[], object]) -> None:
        """Call `wake` once, when a connection comes back."""
        self._on_return = wake

    def get_stats(self) -> dict[str, int]:
        """What the pool has done and is doing, by psycopg_pool's names."""
        places = self._places
        return {
            **self._stats,
            "pool_min": self._places.min_size,
            "pool_max": self._places.max_size,
            "pool_size": places.size,
            "pool_available": len(places.idle),
            "requests_waiting": len(places.queue),
        }

    def pop_stats(self) -> dict[str, int]:
        """`get_stats()`, whose counters begin again at zero."""
        stats = self.get_stats()
        self._stats = Counter()
        return stats
