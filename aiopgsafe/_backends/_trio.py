"""trio: the task that runs a statement waits for the socket itself.

`trio.lowlevel.wait_readable` belongs to the task that awaits it, so the generator
is driven there. Between two waits nothing is registered with trio.
"""

from __future__ import annotations

import logging
import selectors
from collections.abc import Awaitable, Callable, Generator
from contextlib import suppress
from contextvars import copy_context
from functools import partial
from math import inf
from time import monotonic
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import trio
from psycopg import OperationalError

from . import CONNECTION_BAD, MAX_BUSY, Expired, Handler, Job, Told, other_loop
from ._readiness import READ, WRITE, Readiness
from ._trio_watcher import watcher

if TYPE_CHECKING:
    from psycopg.abc import PQGen
    from psycopg.pq.abc import PGconn

T = TypeVar("T")

logger = logging.getLogger("aiopgsafe")


class _Limited:
    """A wait that can be cut short while it lasts. trio's clock is not `time.monotonic()`."""

    def __init__(self) -> None:
        self._limit: float | None = None
        self._scope: trio.CancelScope | None = None

    def limit(self, when: float) -> None:
        if self._limit is None or when < self._limit:
            self._limit = when
            if self._scope is not None:
                self._scope.deadline = _trio_time(when)

    def ended_with(self, exc: BaseException) -> bool:
        return False

    async def _limited(self, wait: Callable[..., Awaitable[None]], *args: Any) -> None:
        try:
            with trio.CancelScope() as scope:
                self._scope = scope
                if self._limit is not None:
                    scope.deadline = _trio_time(self._limit)
                await wait(*args)
        finally:
            self._scope = None
        if scope.cancelled_caught:
            raise Expired


class Waiter(_Limited):
    def __init__(self) -> None:
        super().__init__()
        self._event = trio.Event()

    def wake(self) -> None:
        self._event.set()

    async def wait(self) -> None:
        if not self._event.is_set():
            await self._limited(self._event.wait)


class Channel(_Limited):
    """See `_backends.Channel`."""

    def __init__(self, pgconn: PGconn, told: Told) -> None:
        super().__init__()
        self._told = told
        self._watching = False  # whether it should be seen at once
        self._watched = False  # whether the watcher has it
        self._token = trio.lowlevel.current_trio_token()
        self._pgconn = pgconn
        self._fd = pgconn.socket
        self._gen: PQGen[Any] | None = None
        self._want = 0
        self._value: Any = None
        self._error: BaseException | None = None
        self._both: selectors.BaseSelector | None = None
        self._readiness = Readiness(self._fd)
        self._last_yield = monotonic()
        self.closed = False

    def check(self) -> None:
        if trio.lowlevel.current_trio_token() is not self._token:
            raise other_loop()

    def start(self, gen: PQGen[Any], limit: float | None = None) -> None:
        self.check()
        if self._gen is not None:
            raise RuntimeError("the channel drives another generator")
        if self._watched:
            self._unwatch()
        self._gen = gen
        self._limit = limit
        self._advance(None)

    def ended(self) -> bool:
        return self._gen is None and (self._error is not None or not self._busy_too_long())

    def outcome(self) -> Any:
        if self._error is not None:
            raise self._error
        return self._value

    async def wait(self) -> Any:
        while self._gen is not None:
            want = self._want
            if want & WRITE and not self._busy_too_long() and (ready := self._readiness(want)):
                self._advance(ready)
                continue
            wait = self._wait_both
            if want == READ:
                wait = trio.lowlevel.wait_readable
            elif want == WRITE:
                wait = trio.lowlevel.wait_writable
            try:
                if self._limit is None and want == READ:
                    await wait(self._fd)
                else:
                    await self._limited(wait, self._fd)
            except trio.ClosedResourceError:
                # `close()` says why it ended, `limit()` that there is a limit now.
                if self._gen is None:
                    break
                continue
            except Expired:
                # What has arrived counts, however late it is looked at.
                if self._readiness(READ):
                    self._advance(READ)
                if self._gen is not None:
                    raise
                break
            self._last_yield = monotonic()
            if self._gen is not None:
                self._advance(want if want != READ | WRITE else self._readiness(want))
        if self._error is not None:
            raise self._error
        if self._busy_too_long():
            # A COPY of many small rows never waits: let the others run.
            await trio.lowlevel.checkpoint()
            self._last_yield = monotonic()
        return self._value

    def limit(self, when: float) -> None:
        unlimited = self._limit is None
        super().limit(when)
        if unlimited and self._gen is not None:
            trio.lowlevel.notify_closing(self._fd)

    def extend(self, when: float) -> None:
        self._limit = when

    def abandon(self) -> None:
        self._gen = None
        if self._watching:
            self.watch(True)

    def watch(self, on: bool) -> None:
        self._watching = on
        if on and self._gen is None and not self._watched and not self.closed:
            watcher().add(self._fd, self._on_unasked)
            self._watched = True
        elif not on and self._watched:
            self._unwatch()

    def _unwatch(self) -> None:
        self._watched = False
        watcher().remove(self._fd)

    def _on_unasked(self) -> None:
        if not self._told.idle_input(self._pgconn):
            self._unwatch()  # for a statement in progress: it would be seen again and again
        elif self._pgconn.status == CONNECTION_BAD and not self.closed:
            self._lost(None)

    def _lost(self, error: BaseException | None) -> None:
        self._leave()
        self._told.lost(error)

    def look(self) -> bool:
        if not self.closed and not self._readiness.quiet() and self._gen is None:
            self._on_unasked()
        return not self.closed

    def close(self, error: BaseException) -> None:
        self._leave()
        if self._gen is not None:
            self._end(None, error)

    def discard(self) -> None:
        self.closed = True
        if self._watched:  # else nothing of it is in the loop while nobody waits
            with suppress(trio.RunFinishedError):
                self._token.run_sync_soon(self._unwatch)

    def ended_with(self, exc: BaseException) -> bool:
        return self._gen is None and self._error is exc

    @property
    def generator(self) -> PQGen[Any] | None:
        return self._gen

    def _leave(self) -> None:
        if not self.closed:
            self.closed = True
            if self._watched:
                self._unwatch()
            if trio.lowlevel.in_trio_run():
                trio.lowlevel.notify_closing(self._fd)
            if self._both is not None:
                if trio.lowlevel.in_trio_run():
                    trio.lowlevel.notify_closing(self._both.fileno())  # type: ignore[attr-defined]
                self._both.close()

    def _advance(self, ready: int | None) -> None:
        assert self._gen is not None
        try:
            self._want = self._gen.send(ready)  # type: ignore[arg-type]
            while self._pgconn.status == CONNECTION_BAD:
                # It would wait for a descriptor that libpq has closed.
                self._want = self._gen.throw(OperationalError("the connection is lost"))
        except StopIteration as stop:
            self._end(stop.value, None)
        except BaseException as exc:
            self._end(None, exc)

    def _end(self, value: Any, error: BaseException | None) -> None:
        self._gen = None
        self._value, self._error = value, error
        if self.closed:
            return
        if self._pgconn.status == CONNECTION_BAD:
            self._lost(error)
            return
        if self._watching:
            self.watch(True)
        if self._told.listening:
            self._told.drain(self._pgconn)

    async def _wait_both(self, fd: int) -> None:
        # trio waits for one direction at a time; an epoll or kqueue is itself
        # readable when either has come.
        if self._both is None:
            self._both = selectors.DefaultSelector()
            self._both.register(fd, selectors.EVENT_READ | selectors.EVENT_WRITE)
        await trio.lowlevel.wait_readable(self._both.fileno())  # type: ignore[attr-defined]

    def _busy_too_long(self) -> bool:
        return monotonic() - self._last_yield > MAX_BUSY


class _Connecting(_Limited, Generic[T]):
    def __init__(self, gen: Generator[tuple[int, int], int, T]) -> None:
        super().__init__()
        self._gen = gen
        self._step: tuple[int, int] | None = None

    async def wait(self) -> T:
        try:
            if self._step is None:
                self._step = next(self._gen)
            while True:
                fd, want = self._step
                wait = trio.lowlevel.wait_readable if want == READ else trio.lowlevel.wait_writable
                await self._limited(wait, fd)
                self._step = self._gen.send(want)
        except StopIteration as stop:
            return stop.value  # type: ignore[no-any-return]

    def abandon(self) -> None:
        pass  # nothing of it is in the loop while nobody waits


class _Inline(_Limited, Generic[T]):
    """Run in the task itself: a shielded scope is all the protection that trio needs."""

    def __init__(self, fn: Callable[[], Awaitable[T]]) -> None:
        super().__init__()
        self._fn: Callable[[], Awaitable[T]] | None = fn
        self._value: T | None = None

    async def wait(self) -> T:
        fn, self._fn = self._fn, None
        if fn is not None:
            with trio.CancelScope(shield=True):
                await self._limited(self._run, fn)
        return self._value  # type: ignore[return-value]

    async def _run(self, fn: Callable[[], Awaitable[T]]) -> None:
        self._value = await fn()


class _SystemTask(Generic[T]):
    """trio cancels it when the main task has ended."""

    def __init__(self, fn: Callable[[], Awaitable[T]]) -> None:
        self._waiter = Waiter()
        self._value: T | None = None
        self._error: BaseException | None = None
        self._scope = trio.CancelScope()
        trio.lowlevel.spawn_system_task(self._run, fn, context=copy_context())

    def cancel(self) -> None:
        self._scope.cancel()

    async def _run(self, fn: Callable[[], Awaitable[T]]) -> None:
        try:
            with self._scope:
                self._value = await fn()
        except BaseException as exc:  # it would take trio down with it
            self._error = exc
        finally:
            self._waiter.wake()

    async def wait(self) -> T:
        await self._waiter.wait()
        if self._error is not None:
            raise self._error
        return self._value  # type: ignore[return-value]

    def limit(self, when: float) -> None:
        self._waiter.limit(when)

    def ended_with(self, exc: BaseException) -> bool:
        return False


class Backend:
    """See `_backends.Backend`; one for each `trio.run`."""

    interruptions = (trio.Cancelled, KeyboardInterrupt)

    def __init__(self) -> None:
        self._token = trio.lowlevel.current_trio_token()

    @property
    def running(self) -> bool:
        if self.is_current():
            return True
        try:  # of another thread's run, or one that has ended, the token alone knows
            self._token.run_sync_soon(object)
        except trio.RunFinishedError:
            return False
        return True

    def channel(self, pgconn: PGconn, told: Told) -> Channel:
        return Channel(pgconn, told)

    def waiter(self) -> Waiter:
        return Waiter()

    def run_sync_soon(self, fn: Callable[..., object], *args: Any) -> None:
        self._token.run_sync_soon(fn, *args)

    def spawn(self, fn: Callable[[], Awaitable[T]]) -> Job[T]:
        return _Inline(fn)

    def connecting(self, gen: Generator[tuple[int, int], int, T]) -> _Connecting[T]:
        return _Connecting(gen)

    def background(self, fn: Callable[[], Awaitable[T]]) -> _SystemTask[T]:
        return _SystemTask(fn)

    def is_current(self) -> bool:
        return trio.lowlevel.in_trio_run() and trio.lowlevel.current_trio_token() is self._token

    def current_task(self) -> object:
        return trio.lowlevel.current_task()

    def in_thread(self, fn: Callable[[], T]) -> Job[T]:
        # Its own task waits for the thread, so that our waiting can be given up.
        return _SystemTask(partial(trio.to_thread.run_sync, fn, abandon_on_cancel=True))

    def when_reset(self, handler: Handler, call: Callable[[], object]) -> bool:
        return False

    def take_signal(self, signum: int, handler: object) -> None:
        return None

    def interrupted(self, exc: BaseException) -> bool:
        return not isinstance(exc, Exception)  # nobody else can make a trio.Cancelled

    async def checkpoint(self) -> None:
        await trio.lowlevel.checkpoint()

    def time_left(self) -> float:
        return trio.current_effective_deadline() - trio.current_time()

    def cancelled_now(self) -> bool:
        return trio.current_effective_deadline() == -inf


def _trio_time(when: float) -> float:
    return trio.current_time() + (when - monotonic())


_backend: trio.lowlevel.RunVar[Backend] = trio.lowlevel.RunVar("aiopgsafe_backend")


def backend() -> Backend:
    try:
        return _backend.get()
    except LookupError:
        found = Backend()
        _backend.set(found)
        return found
