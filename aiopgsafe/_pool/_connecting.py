"""Connects in the background, as many as are lacking, again and again while it fails."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Awaitable, Callable
from functools import partial
from random import uniform
from time import monotonic
from typing import Any

from .._backends import Backend, Background, Expired, Waiter
from .._connection import AsyncConnection
from .._errors import brief
from ._options import ConnectOptions
from ._places import Places

logger = logging.getLogger("aiopgsafe.pool")

FIRST_DELAY = 0.1
"""Seconds before the second attempt; doubled for each further one, with jitter."""

MAX_DELAY = 10.0
"""Seconds between two attempts at the most."""


class Connector:
    """Some jobs, each of which makes connections while any are lacking.

    A connection on its way is counted in `Places.connecting`, from before its job
    begins to connect until the place is in the pool or the job has given up.

    :param add: gives a new connection to the pool.
    :param on_error: called at each attempt that fails.
    :param on_failed: called when connecting has failed for so long.
    """

    def __init__(
        self,
        name: str,
        options: Callable[[], ConnectOptions],
        places: Places,
        stats: Callable[[], Counter[str]],
        add: Callable[[AsyncConnection[Any]], None],
        *,
        workers: int,
        reconnect_timeout: float,
        on_error: Callable[[], object],
        on_failed: Callable[[], Awaitable[None]],
    ) -> None:
        self.last_error: BaseException | None = None
        """Why connecting fails, while it does."""
        self._name = name
        self._options = options
        self._places = places
        self._stats = stats
        self._add = add
        self._workers = workers
        self._reconnect_timeout = reconnect_timeout
        self._on_error = on_error
        self._on_failed = on_failed
        self._backend: Backend | None = None
        self._jobs: dict[object, Background[None]] = {}
        self._begun: set[object] = set()
        self._sleepers: set[Waiter] = set()
        self._failing_since: float | None = None

    def start(self, backend: Backend) -> None:
        self._backend = backend
        self.grow()

    def grow(self) -> None:
        """Begin to connect what is lacking."""
        if self._backend is None:
            return
        while len(self._jobs) < self._workers and self._places.lacking() > 0:
            self._places.connecting += 1
            key = object()
            self._jobs[key] = self._backend.background(partial(self._work, key))
        for sleeper in tuple(self._sleepers):
            if self._places.lacking() < 0:  # it has nothing to wait for any more
                sleeper.wake()

    def stop(self) -> list[Background[None]]:
        """Begin nothing more; the jobs that still run have been told to end."""
        self._backend = None
        jobs = list(self._jobs.values())
        for job in jobs:
            job.cancel()
        # Cancelled before they began, they would never say that they have ended.
        self._places.connecting -= len(self._jobs.keys() - self._begun)
        return jobs

    async def connect_to_listen(self, conninfo: str | None) -> AsyncConnection[Any]:
        """A connection for a listener: see `ConnectOptions`."""
        return await self._options().connect_to_listen(conninfo)

    async def connect(self) -> AsyncConnection[Any]:
        """A new connection, configured. Raises what connecting and `configure` raise."""
        options = self._options()
        conn = await options.connect()
        conn._pool = self  # `async with conn` in the callback doesn't close it
        try:
            await options.configured(conn)
        except BaseException:
            conn._close_now()
            raise
        conn._pool = None
        return conn

    async def _work(self, key: object) -> None:
        if self._backend is None:
            return  # stopped before it began
        self._begun.add(key)
        places = self._places
        counted = True
        delay = FIRST_DELAY
        try:
            while self._backend is not None:
                conn = await self._attempt()
                if conn is None:
                    if not await self._wait(delay):
                        break
                    delay = min(2 * delay, MAX_DELAY)
                    continue
                delay = FIRST_DELAY
                places.connecting -= 1
                counted = False
                self._add(conn)
                if self._backend is None or places.lacking() <= 0:
                    break
                places.connecting += 1
                counted = True
        finally:
            if counted:
                places.connecting -= 1
            del self._jobs[key]
            self._begun.discard(key)
        if self._failing_since is not None and not self._jobs:
            await self._give_up()

    async def _attempt(self) -> AsyncConnection[Any] | None:
        backend = self._backend
        self._stats()["connections_num"] += 1
        started = monotonic()
        try:
            conn = await self.connect()
        except BaseException as exc:
            self._stats()["connections_errors"] += 1
            # A CancelledError of its own that `configure` raises is an error like others.
            if not isinstance(exc, Exception) and (backend is None or backend.interrupted(exc)):
                raise
            self.last_error = exc
            logger.warning("error connecting in %r: %s", self._name, brief(exc))
            self._on_error()
            return None
        self._stats()["connections_ms"] += int((monotonic() - started) * 1000)
        self.last_error = self._failing_since = None
        return conn

    async def _wait(self, delay: float) -> bool:
        """After a failure: wait before the next attempt. False: there shall be none."""
        backend, now = self._backend, monotonic()
        if backend is None:
            return False
        if self._failing_since is None:
            self._failing_since = now
        give_up = self._failing_since + self._reconnect_timeout
        if now >= give_up:
            if not self._places.queue:
                return False
            await self._give_up()  # but for those who wait
            self._failing_since, give_up = now, now + self._reconnect_timeout
        waiter = backend.waiter()
        waiter.limit(min(now + delay * uniform(0.75, 1.25), give_up))
        self._sleepers.add(waiter)
        try:
            await waiter.wait()
        except Expired:
            pass
        finally:
            self._sleepers.discard(waiter)
        # Those who waited for it may have gone.
        return self._places.lacking() >= 0

    async def _give_up(self) -> None:
        since, self._failing_since = self._failing_since, None
        if since is None or monotonic() < since + self._reconnect_timeout:
            return
        logger.warning("%r could not connect for %s seconds", self._name, self._reconnect_timeout)
        try:
            await self._on_failed()
        except Exception as exc:
            logger.exception("error in reconnect_failed of %r: %s", self._name, exc)
