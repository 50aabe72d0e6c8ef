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
from ._connecting import Connector
from ._places import Place, Places

logger = logging.getLogger("aiopgsafe.pool")

IDLE = pq.TransactionStatus.IDLE


class Keeping:
    """The part of `AsyncConnectionPool` that keeps the connections."""

    max_idle: float
    max_lifetime: float
    _backend: Backend | None
    _bell: Waiter | None
    _closed: bool
    _connector: Connector
    _drained_at: float
    _filling: list[Waiter]
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
        if self._places.put(place):
            place.conn._channel.watch(True)
        if self._filling and self._filled():
            for waiter in self._filling:
                waiter.wake()

    def _add(self, conn: AsyncConnection[Any]) -> None:
        now = monotonic()
        # With some randomness, so that not all expire together.
        place = Place(conn, now, now + self.max_lifetime * uniform(0.95, 1.0))
        conn._place = place
        conn._disconnect_handlers.append(partial(self._on_lost, place))
        if self._closed:
            conn._close_now()
        else:
            self._offer(place)

    def _on_lost(self, place: Place, error: psycopg.Error) -> None:
        """A watcher has seen its end. One in use is found out when it is given back."""
        if place not in self._places.used:
            logger.info("discarding lost connection: %s", error)
            self._lose(place)

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
            self._bell.limit(max(min(due, default=0.0), now + min(self.max_idle, 1.0)))
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
            or len(places.used) > places.max_size  # it has been made smaller
        ):
            self._retire(place)
            return
        place.conn = place.conn._renewed()
        place.idle_since = now
        self._offer(place)

    def _return_unchecked(self, place: Place) -> None:
        """Give back what a check was interrupted on: in a transaction it is of no use."""
        if place.conn.closed or place.conn.pgconn.transaction_status != IDLE:
            self._retire(place)
        else:
            self._return(place)

    def _in_use(self) -> list[AsyncConnection[Any]]:
        return [place.conn for place in self._places.used if not place.conn.closed]

    def _when_given_back(self, wake: Callable[[], object]) -> None:
        """Call `wake` once, when a connection comes back."""
        self._on_return = wake

    def _used_for(self, seconds: float) -> None:
        self._stats["usage_ms"] += int(seconds * 1000)

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
