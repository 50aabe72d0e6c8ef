"""asyncio's jobs: waits that outlive the cancellation of who waits."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Awaitable, Callable, Generator
from time import monotonic
from typing import Generic, TypeVar

from . import Expired
from ._readiness import READ, WRITE

T = TypeVar("T")

LAST_WORDS = 1.0
"""Seconds that a task has to end once it has been cancelled at its limit."""


class Waiter:
    """A wait that outlives the cancellation of who waits, and has a limit."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._future: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._done = False
        self._expired = False

    def wake(self) -> None:
        self._done = True
        if self._timer is not None:
            self._timer.cancel()
        self._poke()

    async def wait(self) -> None:
        while not self._done:
            await self._park()

    def limit(self, when: float) -> None:
        if self._timer is not None:
            if self._timer.when() <= loop_time(self._loop, when):
                return
            self._timer.cancel()
        self._timer = self._loop.call_at(loop_time(self._loop, when), self._expire)

    def ended_with(self, exc: BaseException) -> bool:
        return False

    def _expire(self) -> None:
        self._expired = True
        self._poke()

    def _poke(self) -> None:
        if self._future is not None and not self._future.done():
            self._future.set_result(None)

    async def _park(self) -> None:
        """Until the next `_poke()`. asyncio cancels what a task awaits: a new future each time."""
        if not self._expired:
            self._future = self._loop.create_future()
            await self._future
        if self._expired and not self._done:
            raise Expired


class Connecting(Waiter, Generic[T]):
    def __init__(self, gen: Generator[tuple[int, int], int, T]) -> None:
        super().__init__()
        self._gen = gen
        self._step: tuple[int, int] | None = None
        self._ready = 0

    async def wait(self) -> T:  # type: ignore[override]  # a Waiter with a result
        try:
            if self._step is None:
                self._step = next(self._gen)
            while True:
                await self._wait_ready(*self._step)
                ready, self._ready = self._ready, 0
                self._step = self._gen.send(ready)
        except StopIteration as stop:
            if self._timer is not None:
                self._timer.cancel()
            return stop.value  # type: ignore[no-any-return]
        except Exception:
            if self._timer is not None:
                self._timer.cancel()
            raise

    def abandon(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    async def _wait_ready(self, fd: int, want: int) -> None:
        """Out of the loop at every exit: libpq may close the descriptor at the next step."""
        if want & READ:
            self._loop.add_reader(fd, self._on_ready, READ)
        if want & WRITE:
            self._loop.add_writer(fd, self._on_ready, WRITE)
        try:
            while not self._ready:
                await self._park()
        finally:
            if want & READ:
                self._loop.remove_reader(fd)
            if want & WRITE:
                self._loop.remove_writer(fd)

    def _on_ready(self, ready: int) -> None:
        self._ready |= ready
        self._poke()


class Task(Generic[T]):
    """A coroutine in a task of its own.

    :param registered: whether the loop's teardown knows of it, and cancels it.
    """

    def __init__(self, fn: Callable[[], Awaitable[T]], *, registered: bool = False) -> None:
        loop = asyncio.get_running_loop()
        self._task: asyncio.Task[tuple[T | None, BaseException | None]] = asyncio.Task(
            _outcome(fn), loop=loop, context=contextvars.copy_context()
        )
        # asyncio.run's teardown cancels all_tasks(): not this one. Documented for
        # those who write task implementations ("Extending asyncio").
        if not registered:
            asyncio.tasks._unregister_task(self._task)
        self._waiter = Waiter()
        self._task.add_done_callback(lambda _: self._waiter.wake())
        self._timer: asyncio.TimerHandle | None = None
        self._expired = False
        self._error: BaseException | None = None

    def ended_with(self, exc: BaseException) -> bool:
        return self._error is exc

    async def wait(self) -> T:
        await self._waiter.wait()  # Expired: it doesn't let itself be cancelled, and runs on
        if self._timer is not None:
            self._timer.cancel()
        if self._task.cancelled():  # before it began
            self._error = asyncio.CancelledError()
            raise self._error
        value, error = self._task.result()
        self._error = error
        if error is not None:
            if self._expired and isinstance(error, asyncio.CancelledError):
                raise Expired from None
            raise error
        return value  # type: ignore[return-value]

    def limit(self, when: float) -> None:
        if self._timer is not None:
            if self._timer.when() <= when:
                return
            self._timer.cancel()
        loop = self._task.get_loop()
        self._timer = loop.call_at(loop_time(loop, when), self._cancel)

    def cancel(self) -> None:
        self._task.cancel()

    def _cancel(self) -> None:
        self._expired = True
        self._task.cancel()
        self._waiter.limit(monotonic() + LAST_WORDS)


async def _outcome(fn: Callable[[], Awaitable[T]]) -> tuple[T | None, BaseException | None]:
    """A task that raises SystemExit or KeyboardInterrupt takes the loop down with it: ours not."""
    try:
        return await fn(), None
    except BaseException as exc:
        return None, exc


class Thread(Generic[T]):
    def __init__(self, fn: Callable[[], T]) -> None:
        self._waiter = Waiter()
        self._future = asyncio.get_running_loop().run_in_executor(None, fn)
        self._future.add_done_callback(lambda _: self._waiter.wake())

    async def wait(self) -> T:
        await self._waiter.wait()
        return self._future.result()

    def limit(self, when: float) -> None:
        self._waiter.limit(when)

    def ended_with(self, exc: BaseException) -> bool:
        return False


class LoopHandler:
    """One of asyncio's: the loop calls it for a byte in its wakeup pipe, whatever Python calls."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, handlers: dict[int, asyncio.Handle], signum: int
    ) -> None:
        self._loop = loop
        self._handlers = handlers
        self._signum = signum
        self._own = handlers[signum]
        self._nothing = handlers[signum] = asyncio.Handle(lambda: None, (), loop)

    def run(self) -> None:
        self._loop.call_soon_threadsafe(self._own._run)

    def put_back(self) -> None:
        if self._handlers.get(self._signum) is self._nothing:
            self._handlers[self._signum] = self._own


def loop_time(loop: asyncio.AbstractEventLoop, when: float) -> float:
    # uvloop's clock stands still within a cycle: not the same as monotonic().
    return loop.time() + max(0.0, when - monotonic())
