"""The seam to the event loop: what the rest of the package needs of it, and no more.

`current()` picks the backend of the running loop; asyncio (uvloop is asyncio to
us) and trio are imported when first met. Nothing outside this folder imports
either.

A `Channel` is one connection's place in the event loop. It drives psycopg's
generators, which yield the readiness they wait for (`psycopg.waiting.Wait`) and
are sent the readiness that came (`psycopg.waiting.Ready`): 1 to read, 2 to
write, 3 either.
"""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable, Generator
from time import monotonic
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from psycopg import InterfaceError

from .._shield import EventLoop, Expired, Handler, Job

if TYPE_CHECKING:
    from psycopg.abc import PQGen
    from psycopg.pq.abc import PGconn

__all__ = [
    "Backend",
    "Background",
    "Channel",
    "Connecting",
    "Expired",
    "Handler",
    "Job",
    "LoopHandler",
    "Waiter",
    "current",
    "other_loop",
    "running",
    "sleep",
]

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

MAX_BUSY = 0.005
"""Seconds for which one connection may keep the loop to itself while nothing blocks."""

CONNECTION_BAD = 1
"""`psycopg.pq.ConnStatus.BAD`."""


def other_loop() -> InterfaceError:
    """The connection is used in another event loop than the one that it was made in."""
    return InterfaceError("the connection belongs to another event loop: connect in this one")


class Told(Protocol):
    """What a channel tells of what happens on its connection, from the loop's callbacks."""

    listening: bool
    """Whether notifications may come."""

    def drain(self, pgconn: PGconn) -> None:
        """Take what libpq has read behind a result: nothing more makes the socket readable."""

    def idle_input(self, pgconn: PGconn) -> bool:
        """Something has arrived while nothing runs.

        It takes the input and returns True, or False if the input belongs to a
        statement in progress (a `stream()` between two rows), which will ask.
        """

    def lost(self, error: BaseException | None) -> None:
        """The connection is lost, and the channel closed. Called once.

        :param error: that showed it, if one did.
        """


class Channel(Job[Any], Protocol):
    """One connection's place in the event loop: a job at a time, and a watch in between.

    :param pgconn: the connected libpq connection.
    :param told: what is told of what happens on it.
    """

    def __init__(self, pgconn: PGconn, told: Told) -> None: ...

    def check(self) -> None:
        """Raise `other_loop()` in another event loop than its own."""

    def start(self, gen: PQGen[Any], limit: float | None = None) -> None:
        """Begin to drive `gen`; `wait()` then gives its result. `other_loop()` in another one."""

    def ended(self) -> bool:
        """Whether it has ended without any waiting, and nobody else needs the loop for long."""

    def outcome(self) -> Any:
        """Then: its result. Raises what it raised."""

    def extend(self, when: float) -> None:
        """After `Expired`: let the same generator have until `when` instead."""

    def abandon(self) -> None:
        """Drive the current generator no further."""

    def watch(self, on: bool) -> None:
        """Whether what arrives while nothing runs is to be seen at once.

        asyncio sees it in any case; trio pays for it.
        """

    def look(self) -> bool:
        """Take what has arrived and nobody has seen yet; whether the connection lives."""

    def close(self, error: BaseException) -> None:
        """Leave the event loop, before libpq closes the socket. Who waits gets `error`.

        A closed descriptor that is still registered would give the events of
        whatever gets the same number next.
        """

    def discard(self) -> None:
        """Leave the event loop when the connection is garbage collected, in any thread."""

    @property
    def generator(self) -> PQGen[Any] | None:
        """The one that has been started and has not ended."""

    @property
    def closed(self) -> bool:
        """Whether the channel has left the event loop, by `close()` or with a lost connection."""


class LoopHandler(Protocol):
    """A signal handler of the event loop's own, taken out of its hands (`Backend.take_signal`)."""

    def run(self) -> None:
        """Have the loop call it."""

    def put_back(self) -> None:
        """Give it back."""


class Waiter(Job[None], Protocol):
    """One task waits, one `wake()` ends it."""

    def wake(self) -> None:
        """End the waiting; before `wait()` too. From the loop's thread."""


class Connecting(Job[T_co], Protocol):
    """A connection on its way."""

    def abandon(self) -> None:
        """It is waited for no more: leave nothing of it in the loop."""


class Background(Job[T_co], Protocol):
    """Something that runs beside all tasks."""

    def cancel(self) -> None:
        """Interrupt it where it waits."""


class Backend(EventLoop, Protocol):
    """The running event loop: what a shield needs of it, and what connections do."""

    def channel(self, pgconn: PGconn, told: Told) -> Channel:
        """Bring a connection into the loop."""

    def waiter(self) -> Waiter:
        """A new one."""

    def connecting(self, gen: Generator[tuple[int, int], int, T]) -> Connecting[T]:
        """Drive `gen`, which yields (descriptor, readiness): connecting and cancelling.

        The descriptor may change from step to step, and is not watched between them.
        """

    def in_thread(self, fn: Callable[[], T]) -> Job[T]:
        """Run a blocking `fn` in a thread; an abandoned one runs on to its end."""

    def background(self, fn: Callable[[], Awaitable[T]]) -> Background[T]:
        """Run `fn` beside all tasks, to its end even if nobody waits for it.

        Where the loop is torn down before, it is cancelled. Nobody sees what it
        raises but who waits.
        """

    def is_current(self) -> bool:
        """Whether we are in this loop."""

    def current_task(self) -> object:
        """What tells the running task from others."""

    def take_signal(self, signum: int, handler: object) -> LoopHandler | None:
        """Take a handler from the loop (`loop.add_signal_handler()`) that it calls by itself.

        :param handler: the one that Python calls.

        None if the loop has none; RuntimeError if it doesn't let go of it.
        """

    def interrupted(self, exc: BaseException) -> bool:
        """Whether `exc`, just caught, interrupts the running task. Else somebody raised it."""

    async def checkpoint(self) -> None:
        """Let the other tasks run, and be interrupted if that is due."""

    def time_left(self) -> float:
        """Seconds until the running task's deadline, as far as the loop knows it; else infinity."""

    def cancelled_now(self) -> bool:
        """Whether the next `checkpoint()` would be interrupted, where the loop can tell.

        asyncio delivers a cancellation at the next real wait, and can't be asked before.
        """


async def sleep(backend: Backend, seconds: float) -> None:
    """Wait for so long."""
    waiter = backend.waiter()
    waiter.limit(monotonic() + seconds)
    try:
        await waiter.wait()
    except Expired:
        pass


def running() -> bool:
    """Whether an event loop runs in this thread."""
    try:
        current()
    except RuntimeError:
        return False
    return True


def current() -> Backend:
    """The backend of the running event loop. RuntimeError outside one."""
    # trio first: in its guest mode an asyncio loop runs as well.
    trio = sys.modules.get("trio")
    if trio is not None and trio.lowlevel.in_trio_task():
        from . import _trio

        return _trio.backend()
    from . import _asyncio

    return _asyncio.backend()
