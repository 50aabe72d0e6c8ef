"""Draining: what runs may end, nothing new begins, and then everything is closed."""

from __future__ import annotations

import logging
from time import monotonic
from typing import Any

from ._backends import Backend, Background, Expired, Waiter
from ._connection import AsyncConnection
from ._pool import AsyncConnectionPool

logger = logging.getLogger("aiopgsafe")


class Drain:
    """Runs in the background from the beginning to the end, whoever waits for it."""

    def __init__(self, pool: AsyncConnectionPool[Any], grace: float) -> None:
        self._pool = pool
        self._backend: Backend = pool._own_backend()
        self._grace_until = monotonic() + grace
        self._in_grace = True
        self._bell: Waiter | None = None
        self._over = False
        self._waiting: list[Waiter] = []
        pool._refuse("the database drains: it begins nothing new")
        self._job: Background[None] = self._backend.background(self._run)

    def shorten(self, grace: float) -> None:
        """Let `grace` count from now, if that is earlier."""
        self._grace_until = min(self._grace_until, monotonic() + grace)
        if self._bell is not None and self._in_grace:
            self._bell.limit(self._grace_until)

    async def wait(self) -> None:
        """Until it is over. Interrupted, it goes on."""
        if not self._over:
            waiter = self._backend.waiter()
            self._waiting.append(waiter)
            try:
                await waiter.wait()
            finally:
                self._waiting.remove(waiter)

    async def _run(self) -> None:
        try:
            if not await self._unused(self._grace_until):
                self._in_grace = False
                await self._stop_what_runs()
        finally:
            try:
                await self._pool.close()
            finally:
                self._over = True
                for waiter in self._waiting:
                    waiter.wake()

    async def _unused(self, until: float) -> bool:
        """Wait until no connection is in use, or `until`. Whether none is."""
        while self._pool._in_use():
            self._bell = waiter = self._backend.waiter()
            waiter.limit(self._grace_until if self._in_grace else until)
            self._pool._when_given_back(waiter.wake)
            try:
                await waiter.wait()
            except Expired:
                return False
            finally:
                self._bell = None
        return True

    async def _stop_what_runs(self) -> None:
        """The grace is over: cancel statements, close what is idle, let COMMITs end."""
        pool = self._pool
        for conn in pool._in_use():
            if not conn._cancel_statement():
                self._drop(conn)
        if await self._unused(monotonic() + longest(pool._in_use(), "cancel_timeout")):
            return
        # Whose statement was cancelled, and who has begun another one.
        for conn in pool._in_use():
            self._drop(conn)
        while not await self._unused(monotonic() + longest(pool._in_use(), "commit_timeout")):
            if not any(conn._section is not None for conn in pool._in_use()):
                return  # nobody but who keeps it in spite of all

    def _drop(self, conn: AsyncConnection[Any]) -> None:
        """Close it, unless it ends a transaction: that has its own limit."""
        if conn._section is None and not conn._is_ending():
            conn._drop("the database drains")


def longest(conns: list[AsyncConnection[Any]], name: str) -> float:
    """The longest of their timeouts, in seconds."""
    return max((getattr(conn, name) for conn in conns), default=0.0)
