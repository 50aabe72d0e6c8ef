"""asyncio and uvloop: one persistent reader per connection.

psycopg adds and removes a reader at every wait. Here the reader stays: it serves
the statement that runs and, between statements, sees what the server says
unasked. The generator is driven from the reader's callback, not from the task,
so that the socket is drained before the loop polls it again, an answer in many
packets wakes the task once, and what happens to the task (a cancellation) does
not disturb the protocol.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Generator
from contextlib import suppress
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakKeyDictionary, ref

import anyio
from psycopg import OperationalError

from . import CONNECTION_BAD, MAX_BUSY, Expired, Handler, Job, Told, other_loop
from ._asyncio_answer import CANCELLED, DONE, PENDING, Answer
from ._asyncio_jobs import Connecting, LoopHandler, Task, Thread, Waiter, loop_time
from ._readiness import READ, WRITE, Readiness

if TYPE_CHECKING:
    from psycopg.abc import PQGen
    from psycopg.pq.abc import PGconn

T = TypeVar("T")


class Channel:
    """See `_backends.Channel`."""

    __slots__ = (
        "_answer",
        "_error",
        "_expired",
        "_fd",
        "_gen",
        "_last_yield",
        "_limit",
        "_loop",
        "_pgconn",
        "_readiness",
        "_reading",
        "_reads",
        "_tells_once",
        "_timer",
        "_timer_when",
        "_told",
        "_value",
        "_writing",
        "closed",
    )

    def __init__(self, pgconn: PGconn, told: Told) -> None:
        self._loop = asyncio.get_running_loop()
        self._pgconn = pgconn
        self._told = told
        self._fd = pgconn.socket
        self._gen: PQGen[Any] | None = None
        self._answer: Answer | None = None
        self._value: Any = None
        self._error: BaseException | None = None
        self._limit: float | None = None
        self._expired = False
        self._timer: asyncio.TimerHandle | None = None
        self._timer_when = 0.0
        self._readiness = Readiness(self._fd)
        self._writing = False
        self._reads = False  # in the reader's callback, which resumes the task at its end
        self._last_yield = 0.0
        # asyncio's own loops tell of an error until it is gone.
        self._tells_once = not isinstance(self._loop, asyncio.BaseEventLoop)
        self.closed = False
        # Should somebody have closed a descriptor of this number behind its
        # reader's back, its stale registration would be modified, not renewed,
        # and this one never be polled.
        self._loop.remove_reader(self._fd)
        self._loop.add_reader(self._fd, self._on_readable)
        self._reading = True

    def check(self) -> None:
        if asyncio._get_running_loop() is not self._loop:
            raise other_loop()

    def start(self, gen: PQGen[Any], limit: float | None = None) -> None:
        if asyncio._get_running_loop() is not self._loop:
            raise other_loop()
        if self._gen is not None:
            raise RuntimeError("the channel drives another generator")
        self._answer = None
        self._gen = gen
        self._limit = None
        self._expired = False
        if limit is not None:
            self.limit(limit)
        self._advance(None)

    def ended(self) -> bool:
        return self._gen is None and (self._error is not None or not self._busy_too_long())

    def outcome(self) -> Any:
        if self._error is not None:
            raise self._error
        value, self._value = self._value, None
        return value

    def wait(self) -> Awaitable[Any]:
        answer = self._answer
        if answer is None or answer.state == CANCELLED:
            # The first one; or the one before went with a cancellation, and the generator
            # has been driven on meanwhile.
            answer = self._answer = Answer(self._loop)
            if self._expired:
                answer.set(None, Expired())
            elif self._gen is None:
                if self._error is None and self._busy_too_long():
                    # A COPY of many small rows never waits: let the others run.
                    self._last_yield = 0.0
                    self._loop.call_soon(self._settle, answer)
                else:
                    answer.set(self._value, self._error)
        return answer

    def limit(self, when: float) -> None:
        if self._limit is not None and self._limit <= when:
            return
        self._limit = when
        # The timer is not cancelled when a job ends in time, as nearly all do: it
        # stays for the next job's limit and moves on when it fires. One timer in
        # `commit_timeout` seconds instead of one a COMMIT.
        if self._timer is not None:
            if self._timer_when <= when:
                return
            self._timer.cancel()
        self._timer = self._loop.call_at(loop_time(self._loop, when), self._on_timer)
        self._timer_when = when

    def _on_timer(self) -> None:
        self._timer = None
        if self._gen is None or self._limit is None:
            return
        if self._limit > monotonic():
            when, self._limit = self._limit, None
            self.limit(when)
            return
        # What has arrived counts, however late it is looked at.
        if self._readiness(READ):
            self._advance(READ)
        if self._gen is not None:
            self._expired = True
            if self._answer is not None and self._answer.state == PENDING:
                self._answer.set(None, Expired())
                self._answer.resume_soon()

    def extend(self, when: float) -> None:
        if self._expired:
            self._expired = False
            self._answer = None
        self._limit = None
        self.limit(when)

    def abandon(self) -> None:
        self._gen = None
        self._answer = None

    def watch(self, on: bool) -> None:
        pass

    def look(self) -> bool:
        if not self.closed and not self._readiness.quiet() and self._gen is None:
            self._on_unasked()
        return not self.closed

    def close(self, error: BaseException) -> None:
        self._leave()
        if self._gen is not None:
            self._end(None, error)

    def discard(self) -> None:
        """Leave the loop from wherever the connection is collected, another thread included."""
        if self._loop.is_closed():
            self.closed = True
            return
        try:
            here = asyncio.get_running_loop() is self._loop
        except RuntimeError:
            here = not self._loop.is_running()
        if here:
            self._leave()
        else:
            # The handle keeps libpq's connection, and the descriptor, until then.
            self._loop.call_soon_threadsafe(self._leave)

    def ended_with(self, exc: BaseException) -> bool:
        return self._gen is None and self._error is exc

    @property
    def generator(self) -> PQGen[Any] | None:
        return self._gen

    def _leave(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if not self.closed:
            self.closed = True
            if not self._loop.is_closed():
                # libpq may have closed it already. Where both are registered, asyncio
                # then fails to modify the registration, and has forgotten all of it.
                with suppress(OSError):
                    if self._reading:
                        self._loop.remove_reader(self._fd)
                    if self._writing:
                        self._loop.remove_writer(self._fd)
            self._reading = self._writing = False

    def _lost(self, error: BaseException | None) -> None:
        self._leave()
        self._told.lost(error)

    # In the loop's callbacks

    def _on_readable(self) -> None:
        self._last_yield = 0.0
        if self._gen is None:
            self._on_unasked()
            return
        self._reads = True
        try:
            self._advance(READ)
            # At an error of the socket uvloop calls back once and watches no more: what is
            # behind the input that has been read, an answer even, is then for us to find.
            while self._gen is not None and self._readiness.failed():
                self._advance(READ)
        finally:
            self._reads = False
        answer = self._answer
        if answer is not None and answer.state == DONE:
            answer.resume()  # the task may begin the next statement here, and sees an error itself
        if self._tells_once and self._gen is None and not self.closed and self._readiness.failed():
            self._on_unasked()

    def _on_unasked(self) -> None:
        while self._told.idle_input(self._pgconn):
            if self.closed:  # by a handler
                return
            if self._pgconn.status == CONNECTION_BAD:
                self._lost(None)
                return
            if not self._readiness.failed():
                return
        # For a statement that is in progress but doesn't wait just now: the kernel
        # keeps it. Left registered, the loop would spin on it.
        self._loop.remove_reader(self._fd)
        self._reading = False

    def _on_writable(self) -> None:
        self._last_yield = 0.0
        self._loop.remove_writer(self._fd)
        self._writing = False
        if self._gen is not None:
            self._advance(self._readiness(READ | WRITE))

    def _advance(self, ready: int | None) -> None:
        """Drive the generator until it waits for something that isn't there yet."""
        gen = self._gen
        assert gen is not None
        try:
            want: int = gen.send(ready)  # type: ignore[arg-type]
            while self._pgconn.status == CONNECTION_BAD:
                # It would wait for a descriptor that libpq has closed.
                want = gen.throw(OperationalError("the connection is lost"))
            while want & WRITE:
                # Nearly always writable, and a poll is much cheaper than a cycle
                # of the loop, which pipelines and COPY would pay at every step.
                if self._busy_too_long() or not (ready := self._readiness(want)):
                    if not self._writing:
                        self._loop.add_writer(self._fd, self._on_writable)
                        self._writing = True
                    break
                want = gen.send(ready)
            if not self._reading:
                self._watch()
        except StopIteration as stop:
            self._end(stop.value, None)
        except BaseException as exc:
            self._end(None, exc)

    def _end(self, value: Any, error: BaseException | None) -> None:
        self._gen = None
        self._value, self._error = value, error
        if not self.closed:
            if self._pgconn.status == CONNECTION_BAD:
                # libpq has just closed the socket: out of the loop before anything
                # else runs that may get a descriptor of the same number.
                self._lost(error)
            else:
                if not self._reading:
                    self._watch()
                if self._told.listening:
                    self._told.drain(self._pgconn)
        answer = self._answer
        if answer is None or answer.state != PENDING:
            return
        if self._reads:
            answer.set(value, error)  # the task goes on at the callback's end
        else:
            self._settle(answer)

    def _settle(self, answer: Answer) -> None:
        # In a later turn than its generator ended, it may have been forgotten: the
        # next one's outcome is not for it.
        if answer is self._answer and answer.state == PENDING:
            answer.set(self._value, self._error)
            answer.resume_soon()

    def _watch(self) -> None:
        if not self.closed:
            self._loop.add_reader(self._fd, self._on_readable)
            self._reading = True

    def _busy_too_long(self) -> bool:
        now = monotonic()
        if not self._last_yield:
            self._last_yield = now
        return now - self._last_yield > MAX_BUSY


class Backend:
    """See `_backends.Backend`; one for each loop."""

    interruptions = (asyncio.CancelledError,)

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        # Weakly: the table of backends must not keep loops alive.
        self._loop = ref(loop)

    @property
    def running(self) -> bool:
        loop = self._loop()
        return loop is not None and loop.is_running()

    def channel(self, pgconn: PGconn, told: Told) -> Channel:
        return Channel(pgconn, told)

    def waiter(self) -> Waiter:
        return Waiter()

    def run_sync_soon(self, fn: Callable[..., object], *args: Any) -> None:
        loop = self._loop()
        if loop is not None:
            loop.call_soon_threadsafe(fn, *args)

    def spawn(self, fn: Callable[[], Awaitable[T]]) -> Job[T]:
        return Task(fn)

    def background(self, fn: Callable[[], Awaitable[T]]) -> Task[T]:
        return Task(fn, registered=True)

    def is_current(self) -> bool:
        return asyncio._get_running_loop() is self._loop()

    def current_task(self) -> object:
        return asyncio.current_task()

    def connecting(self, gen: Generator[tuple[int, int], int, T]) -> Connecting[T]:
        return Connecting(gen)

    def in_thread(self, fn: Callable[[], T]) -> Job[T]:
        return Thread(fn)

    def when_reset(self, handler: Handler, call: Callable[[], object]) -> bool:
        """asyncio.run resets its SIGINT handler when its main task has ended.

        Callbacks of the task run before: in the last cycle of the loop.
        """
        if isinstance(handler, partial) and handler.func.__name__ == "_on_sigint":
            main_task = handler.keywords.get("main_task")
            if isinstance(main_task, asyncio.Future) and not main_task.done():
                main_task.add_done_callback(lambda _: call())
                return True
        return False

    def take_signal(self, signum: int, handler: object) -> LoopHandler | None:
        loop = asyncio.get_running_loop()
        handlers: dict[int, asyncio.Handle] | None = getattr(loop, "_signal_handlers", None)
        if handlers is not None:
            return LoopHandler(loop, handlers, signum) if signum in handlers else None
        if getattr(handler, "__self__", None) is loop:
            # uvloop is written in C, and gives out no handler.
            raise RuntimeError(
                f"signal {signum} has a handler that was set by loop.add_signal_handler():"
                " use signal.signal(), or remove it for the time"
            )
        return None

    def interrupted(self, exc: BaseException) -> bool:
        if isinstance(exc, asyncio.CancelledError):
            task = asyncio.current_task()
            return task is None or task.cancelling() > 0
        return not isinstance(exc, Exception)

    async def checkpoint(self) -> None:
        await asyncio.sleep(0)

    def time_left(self) -> float:
        # Of anyio's scopes. Nobody but its own timer knows of an asyncio.timeout().
        return anyio.current_effective_deadline() - asyncio.get_running_loop().time()

    def cancelled_now(self) -> bool:
        return False


_backends: WeakKeyDictionary[asyncio.AbstractEventLoop, Backend] = WeakKeyDictionary()


def backend() -> Backend:
    loop = asyncio.get_running_loop()
    found = _backends.get(loop)
    if found is None:
        found = _backends[loop] = Backend(loop)
    return found
