"""Draining: what runs may end, nothing new begins, and then everything is closed."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from time import monotonic
from typing import Any

import anyio

from ._backends import Backend, Background, Expired, Waiter
from ._connection import AsyncConnection
from ._pool import AsyncConnectionPool
from ._signals import Arrival, ends_the_program, handled_here, watching


class Drain:
    """Runs in the background from the beginning to the end, whoever waits for it.

    :param first: what is to be ended before all else.
    """

    def __init__(
        self, pool: AsyncConnectionPool[Any], grace: float, first: Callable[[], Awaitable[None]]
    ) -> None:
        self._pool = pool
        self._first = first
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
            await self._first()
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
        """Wait until nothing runs, or `until`. Whether nothing does."""
        while self._pool._in_use() or self._pool._calls:
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
        # What ends a transaction, and callbacks, have limits of their own.
        while not await self._unused(monotonic() + longest(pool._in_use(), "commit_timeout")):
            if not pool._calls and not any(conn._section for conn in pool._in_use()):
                return  # nobody but who keeps a connection in spite of all

    def _drop(self, conn: AsyncConnection[Any]) -> None:
        """Close it, unless it ends a transaction: that has its own limit."""
        if conn._section is None and not conn._is_ending():
            conn._drop("the database drains")


def longest(conns: list[AsyncConnection[Any]], name: str) -> float:
    """The longest of their timeouts, in seconds."""
    return max((getattr(conn, name) for conn in conns), default=1.0)


@contextmanager
def draining_on(
    signals: Sequence[int],
    backend: Backend,
    drain: Callable[[float], Awaitable[None]],
    grace: float,
) -> Iterator[None]:
    """Let the first of `signals` drain, during the block: see `Database.drain_on_signal()`.

    :param drain: `Database.drain()`.
    """
    watch = DrainWatch(backend, drain, grace)
    if not any(ends_the_program(signum) for signum in signals):
        with watching(signals, backend, watch):
            yield
        return
    # Nobody has said what is to become of the program: it goes on behind the block.
    with anyio.CancelScope() as scope, watching(signals, backend, watch, scope.cancel):
        try:
            yield
        finally:
            watch.left = True


class DrainWatch:
    """Asked when the signal arrives: the first drains, the second cuts the grace short.

    :ivar left: the block was left meanwhile, by a program that has no handler: it needn't
        be told any more.
    """

    def __init__(
        self, backend: Backend, drain: Callable[[float], Awaitable[None]], grace: float
    ) -> None:
        self.left = False
        self._backend = backend
        self._drain = drain
        self._grace = grace
        self._arrivals = 0
        self._drained = False
        self._jobs: list[Background[None]] = []

    def __call__(self, arrival: Arrival) -> bool:
        if self._drained or self._arrivals == 2:
            return False
        self._arrivals += 1
        run = self._first if self._arrivals == 1 else self._second
        self._backend.run_sync_soon(self._begin, run, arrival)
        return True

    def _begin(self, run: Callable[[Arrival], Awaitable[None]], arrival: Arrival) -> None:
        self._jobs.append(self._backend.background(partial(run, arrival)))

    async def _first(self, arrival: Arrival) -> None:
        try:
            await self._drain(self._grace)
        finally:
            # Of several databases the last one passes it on.
            self._drained = True
            if self.left:
                arrival.hit()
            else:
                arrival.go_on()

    async def _second(self, arrival: Arrival) -> None:
        arrival.hit()
        await self._drain(0.0)


class StopWatch:
    """Asked when a server is told to stop. The signal stays the server's, which lets requests end.

    Some would never: a stream of notifications, a query on a server that doesn't answer. The
    streams are ended at once; what runs when the grace is over is cancelled. It is asked during
    a ``with`` block, in the main thread: in another one nobody is told by a signal.

    :param first: ends the streams.
    :param drain: `Database.drain()`.
    :param signals: that tell the server to stop.
    """

    def __init__(
        self,
        backend: Backend,
        first: Callable[[], Awaitable[None]],
        drain: Callable[[float], Awaitable[None]],
        grace: float,
        signals: Sequence[int],
    ) -> None:
        self._signals = signals
        self._backend = backend
        self._first = first
        self._drain = drain
        self._grace = grace
        self._until: float | None = None
        self._job: Background[None] | None = None
        self._left = False
        self._watching = ExitStack()

    def __enter__(self) -> None:
        here = [signum for signum in self._signals if handled_here(signum)]
        self._watching.enter_context(watching(here, self._backend, self))

    def __exit__(self, *exc_info: object) -> None:
        self._watching.close()

    def __call__(self, arrival: Arrival) -> bool:
        if self._until is None:
            self._until = monotonic() + self._grace
            self._backend.run_sync_soon(self._begin)
        return False

    def _begin(self) -> None:
        if not self._left:
            self._job = self._backend.background(self._run)

    async def _run(self) -> None:
        await self._first()
        waiter = self._backend.waiter()
        waiter.limit(self._until or 0.0)
        try:
            await waiter.wait()
        except Expired:
            await self._drain(0.0)

    def leave(self) -> float:
        """The server has let all requests end. Seconds that are left for what else runs."""
        self._left = True
        if self._job is not None:
            self._job.cancel()
        return self._grace if self._until is None else max(self._until - monotonic(), 0.0)
