"""The only place that shields, always with a deadline.

Three things can tear a COMMIT from the code that waits for it:

- *cancellation*: asyncio's edge (`task.cancel()`: one exception at one await),
  anyio's and trio's level (an exception at every await until the scope ends);
- *signals* whose Python handler raises: Ctrl-C's KeyboardInterrupt, the
  SystemExit of Celery's and many supervisors' handlers. They come out of
  whichever bytecode the main thread happens to run, the event loop's own
  included, where they drop wakeups;
- *time*: a server that doesn't answer.

`Shield` holds the first kind back and lets it through at the end, unchanged. It
absorbs a cancellation where the task waits and waits on: a helper task would not
do, `asyncio.run` cancels that one too when it tears down. `SignalGate` holds the
second kind back: while a section runs, the program's handlers are replaced by one
that only notes the arrival, and are called at the section's end. Absorbing alone
hangs (an exception inside the loop's machinery loses a wakeup), deferring alone
loses to cancellation: both together. Deadlines stand in `Job.limit`.
"""

from __future__ import annotations

import os
import signal
from _signal import getsignal  # type: ignore[import-not-found]  # see SignalGate
from _signal import signal as set_handler
from collections import deque
from collections.abc import Awaitable, Callable
from functools import partial
from itertools import islice, starmap
from math import inf
from operator import call
from threading import get_ident, main_thread
from time import monotonic
from types import FrameType
from typing import Any, Protocol, TypeAlias, TypeVar

import anyio

from ._calls import CALL, Call, running_call
from ._errors import foremost, rank

__all__ = ["GATE", "EventLoop", "Expired", "Handler", "Job", "Shield", "Waiting", "unhooked"]

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

Handler: TypeAlias = Callable[[int, "FrameType | None"], object]
"""A signal handler, as `signal.signal` takes it."""

INSIST_GRACE = 1.0
"""Seconds after a signal's first arrival before a second one is obeyed.

A terminal or a supervisor may send two at once: only one that is repeated by
somebody who has waited means "now, whatever becomes of the COMMIT".
"""

DEFERRED_SIGNALS = tuple(
    int(getattr(signal, name))
    for name in (
        *("SIGINT", "SIGTERM", "SIGQUIT", "SIGHUP", "SIGABRT", "SIGUSR1", "SIGUSR2"),
        *("SIGALRM", "SIGVTALRM", "SIGPROF", "SIGXCPU"),
    )
    if hasattr(signal, name)
)
"""Signals whose Python handlers are known to raise: terminals, supervisors, time limits."""

INSISTING_SIGNALS = frozenset(
    int(getattr(signal, name))
    for name in ("SIGINT", "SIGTERM", "SIGQUIT", "SIGHUP")
    if hasattr(signal, name)
)
"""Those that somebody sends once more because nothing has happened."""


class Expired(Exception):
    """A `Job` did not end by its limit. It goes on regardless: stop it or close what it uses."""


class Job(Protocol[T_co]):
    """Something under way: one can wait for it, be interrupted, and wait for it again."""

    def wait(self) -> Awaitable[T_co]:
        """Wait for the result. Raises what the job raised, `Expired` after its limit."""

    def limit(self, when: float) -> None:
        """Let the waiting end at `when` (`time.monotonic()`), unless an earlier limit is set."""

    def ended_with(self, exc: BaseException) -> bool:
        """Whether `exc` is what the job itself ended with: no interruption of who waits."""


class Waiting(Protocol):
    """What a shield needs of how its section waits: in an event loop, or in none."""

    @property
    def running(self) -> bool:
        """Whether the loop runs: tasks of one that was stopped wait for nothing."""

    @property
    def interruptions(self) -> tuple[type[BaseException], ...]:
        """The exceptions by which this loop interrupts a task that waits."""

    def run_sync_soon(self, fn: Callable[..., object], *args: Any) -> None:
        """Call `fn` in the loop; may be called from a signal handler."""

    def when_reset(self, handler: Handler, call: Callable[[], object]) -> bool:
        """If `handler` is a SIGINT handler of the loop's own, `call` just before it resets it."""


class EventLoop(Waiting, Protocol):
    """What a section needs of the running event loop (see `_backends`)."""

    def spawn(self, fn: Callable[[], Awaitable[T]]) -> Job[T]:
        """Run `fn` where neither the caller's cancellation nor the loop's teardown reaches it.

        At its limit it is cancelled.
        """


class Shield:
    """Waits for jobs whatever interrupts, and knows what is to be let through afterwards.

    :param loop: the running event loop, or what stands for it in sync code.
    :param grace: seconds that remain once something has been held back; None:
        each job's own limit is all there is.
    """

    __slots__ = ("_grace", "_job", "_until", "held", "insisted", "loop")

    def __init__(self, loop: Waiting, *, grace: float | None = None) -> None:
        self.held: BaseException | None = None
        """The interruption that was held back. Whoever ends the section raises it."""
        self.insisted = False
        """Whether a signal was repeated by somebody who would not wait."""
        self.loop = loop
        self._grace = grace
        self._job: Job[Any] | None = None
        self._until: float | None = None

    @property
    def until(self) -> float:
        """When all waiting ends (`time.monotonic()`); infinity if each job's own limit counts."""
        return inf if self._until is None else self._until

    async def hold(self, job: Job[T]) -> T:
        """Wait until `job` has ended or its limit has passed, deaf to all interruptions.

        asyncio's cancellations are counted by the task: we never call
        `uncancel()`, and raise the first CancelledError itself in the end, so
        that `asyncio.timeout()`, TaskGroup and anyio still know theirs.
        """
        self._job = job
        if self._until is not None:
            job.limit(self._until)
        if self.held is None:
            try:
                return await job.wait()
            except self.loop.interruptions as exc:
                if job.ended_with(exc):
                    raise
                self.hold_back(exc)
        # Who is interrupted once may be so at every await from now on: anyio
        # re-cancels at each cycle of the loop, and deafness alone would spin.
        # Inside a shielded scope it holds still; a native cancel() comes through
        # even here and is absorbed. Entered only now: a scope costs more than the
        # rest of the shield, and nearly nobody is interrupted.
        with anyio.CancelScope(shield=True):
            while True:
                try:
                    return await job.wait()
                except self.loop.interruptions as exc:
                    if job.ended_with(exc):
                        raise
                    self.hold_back(exc)
        raise AssertionError("the scope swallows nothing")

    def hold_back(self, exc: BaseException) -> None:
        """Note an interruption; from now on `grace` limits what is waited for."""
        if self.held is None:
            self.held = exc
            if self._grace is not None:
                self._limit(monotonic() + self._grace)
        elif rank(exc) < rank(self.held):  # trio's Ctrl-C: a scope cancels again, it doesn't
            self.held = foremost(self.held, exc)

    def insist(self, when: float) -> None:
        """Let all waiting end at `when`. Called by a signal handler, between any two bytecodes."""
        self.insisted = True
        self.loop.run_sync_soon(self._limit, when)

    def _limit(self, when: float) -> None:
        self._until = when if self._until is None else min(when, self._until)
        if self._job is not None:  # one that has ended doesn't mind
            self._job.limit(self._until)

    async def call(self, loop: EventLoop, fn: Callable[[], object], timeout: float) -> None:
        """Call `fn` and, if it returns an awaitable, see that through, `timeout` seconds at most.

        Raises what `fn` raises; TimeoutError if it had to be cancelled.
        """
        result = fn()
        if not isinstance(result, Awaitable):
            return

        async def see_through() -> None:
            await result

        call = Call()
        token = CALL.set(call)
        try:
            job = loop.spawn(see_through)
            job.limit(monotonic() + timeout)
            await self.hold(job)
        except Expired:
            raise TimeoutError(f"cancelled: it did not end within {timeout} seconds") from None
        finally:
            CALL.reset(token)
            call.over = True


class Hook:
    """Stands for one handler of the program while sections run, and knows which.

    The program may take it for its own handler, save it and set it again later: it
    then calls what it stands for.
    """

    __slots__ = ("_gate", "handler")

    def __init__(self, gate: SignalGate, handler: Handler) -> None:
        self._gate = gate
        self.handler = handler

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        if self._gate.note(signum, self.handler, frame):
            return
        self.handler(signum, frame)


def system_does(signum: int, frame: FrameType | None) -> None:
    """For a program that has no handler any more."""
    os.kill(os.getpid(), signum)


def unhooked(handler: Any) -> Any:
    """The handler of the program's that `handler` stands for, or is."""
    while isinstance(handler, Hook):
        handler = handler.handler
    return handler


class SignalGate:
    """Defers signal handlers while any section of the main thread runs.

    Python calls signal handlers in the main thread, between any two bytecodes.
    A section in another thread can't be hit by them and needs no gate.

    Between `enter()` and `leave()` of the last section no handler of the program
    runs. A second arrival of the same signal is the user who insists: it limits
    the sections' waiting (`Shield.insist`), so that the program can be ended
    while a server doesn't answer.

    It uses the C functions below the `signal` module: the module's own convert
    every handler to an enum and back, 2 µs a call on Python 3.11, and four of
    them would be a tenth of a transaction.
    """

    def __init__(self) -> None:
        self.delivered = False
        # Whether a section runs is whether this is empty: nothing can come apart.
        self._shields: set[Shield] = set()
        # What is replaced for each section, and what stays so until its loop resets it.
        self._plan: list[tuple[int, Hook]] = []
        self._staying: dict[int, Hook] = {}
        self._reset_due = False
        self._seen: list[Any] = []
        self._pending: list[tuple[Handler, int, FrameType | None]] = []
        self._first: dict[int, float] = {}
        self._insisted: dict[int, float] = {}
        self._waiting: list[Callable[[], object]] = []
        self._main = main_thread().ident

    def enter(self, shield: Shield, *, at_once: bool = False) -> bool:
        """Begin a section; False if a signal is pending and a new one must not begin.

        A busy server always has some COMMIT in flight: if new ones went on to
        begin, a signal would never get through.

        :param at_once: begin all the same; who had to wait has waited long enough.
        """
        if get_ident() != self._main:
            return True
        shields = self._shields
        if shields:
            # One loop runs in the main thread: sections of another were stranded
            # in it when it was stopped.
            for other in tuple(shields):
                if not other.loop.running:
                    shields.discard(other)
        if self._pending and shields and not at_once and running_call() is None:
            return False
        if not shields:
            handlers = [*map(getsignal, DEFERRED_SIGNALS)]
            if handlers != self._seen:
                self._look_at(handlers, shield.loop)
            # Torn in here, a hook stays in place that passes everything on.
            for signum, hook in self._plan:
                set_handler(signum, hook)
        shields.add(shield)
        return True

    def _look_at(self, handlers: list[Any], loop: Waiting) -> None:
        """The program has changed its handlers since the last section: which are Python's?

        The one that `asyncio.run` sets is seen by nobody but it. Its hook stays in
        place, passing everything on while no section runs, until the loop is about
        to look for it: two system calls less at each COMMIT.
        """
        plan = []
        for signum, handler in zip(DEFERRED_SIGNALS, handlers, strict=True):
            if handler is self._staying.get(signum):
                continue
            handler = unhooked(handler)  # torn, or set again by the program
            if callable(handler):  # not SIG_DFL, SIG_IGN, or one set by other than Python
                hook = Hook(self, handler)
                if loop.when_reset(handler, self._on_reset):
                    self._staying[signum] = hook
                    set_handler(signum, hook)
                else:
                    plan.append((signum, hook))
        self._plan, self._seen = plan, [*map(getsignal, DEFERRED_SIGNALS)]

    def _on_reset(self) -> None:
        """The loop is about to reset its handler, if it finds it."""
        self._reset_due = True
        if not self._shields:
            self._put_back(reset=False)

    def _put_back(self, *, reset: bool) -> None:
        for signum, hook in self._staying.items():
            if getsignal(signum) is hook:
                # Looked for and not found while a section ran: we reset it ourselves.
                set_handler(signum, signal.default_int_handler if reset else hook.handler)
        self._staying.clear()
        self._reset_due = False

    def retarget(self, old: Handler, new: Any) -> None:
        """Let hooks, and what is pending, stand for `new` instead of `old`.

        For whoever would put a handler back while hooks are in place.
        """
        if not callable(new):
            new = int(new)  # the C function knows no enum
        hooks = [(signum, hook) for signum, hook in self._plan if hook.handler is old]
        hooks += [(signum, hook) for signum, hook in self._staying.items() if hook.handler is old]
        for signum, hook in hooks:
            hook.handler = new
            if not callable(new):  # nothing to defer
                set_handler(signum, new)
        due = new if callable(new) else system_does
        self._pending = [
            (due if handler is old else handler, signum, frame)
            for handler, signum, frame in self._pending
            if handler is not old or new != signal.SIG_IGN
        ]

    def when_open(self, wake: Callable[[], object]) -> None:
        """Call `wake` when the pending signals have been delivered."""
        self._waiting.append(wake)

    def leave(self, shield: Shield) -> BaseException | None:
        """End a section. The last one out calls the handlers of what has arrived.

        Returns what a handler raised, for the caller to raise when its own
        affairs are in order. A handler may also have cancelled the very task that
        calls it, as the one of `asyncio.run` does: `delivered` says that some ran.
        """
        self.delivered = False
        shields = self._shields
        if shield not in shields:
            return None
        if len(shields) > 1:
            shields.remove(shield)
            return None
        raised: BaseException | None = None
        while True:
            # A handler that is back in place may raise between any two bytecodes
            # of this loop: it goes on where it was torn.
            try:
                for signum, hook in self._plan:
                    # If not, the program has set another handler meanwhile.
                    if getsignal(signum) is hook:
                        set_handler(signum, hook.handler)
                if self._reset_due:
                    self._put_back(reset=True)
                if self._pending:
                    self._deliver()
                shields.discard(shield)
                break
            except BaseException as exc:
                raised = foremost(raised, exc)
        if self._waiting:
            waiting, self._waiting = self._waiting, []
            for wake in waiting:
                wake()
        return raised

    def _deliver(self) -> None:
        self._first.clear()
        self._insisted.clear()
        while self._pending:
            self.delivered = True
            # Taken, and the handler entered, in one C call: nothing tears it in between.
            deque(islice(starmap(call, iter(partial(self._pending.pop, 0), ())), 1), 0)

    def note(self, signum: int, handler: Handler, frame: FrameType | None) -> bool:
        """Called by a hook. False: nothing is to be waited for, the handler is to be called now."""
        # Without a section, or with all of them stranded in a loop that stands
        # still, there is nothing to wait for.
        if not any(shield.loop.running for shield in self._shields):
            return False
        now = monotonic()
        if signum not in self._first:
            self._first[signum] = now
        elif signum not in INSISTING_SIGNALS:
            pass  # a timer, a watchdog: nobody who waits
        elif signum not in self._insisted:
            self._insisted[signum] = max(now, self._first[signum] + INSIST_GRACE)
            for shield in tuple(self._shields):
                shield.insist(self._insisted[signum])
        elif now > self._insisted[signum] + INSIST_GRACE:
            # The loop has not even ended the waiting: something blocks it.
            return False
        self._pending.append((handler, signum, frame))
        return True

    def after_fork(self) -> None:
        """In the child: the sections go on in the parent, its handlers are ours again."""
        for signum, hook in (*self._plan, *self._staying.items()):
            if getsignal(signum) is hook:
                set_handler(signum, hook.handler)
        self.__init__()  # type: ignore[misc]  # as new


GATE = SignalGate()
"""The process has one set of signal handlers, hence one gate."""

os.register_at_fork(after_in_child=GATE.after_fork)
