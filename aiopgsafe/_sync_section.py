"""What sync code does undisturbed: exceptions from nowhere tear it, and it goes on.

A signal handler that raises (Celery's time limits, a supervisor's SystemExit) and
`PyThreadState_SetAsyncExc` (time limits of dramatiq's and RQ's threads) hit between any two
bytecodes. Signals are deferred while a `Section` runs (`SignalGate`); nothing defers the
other kind. So a section may be torn anywhere and is called again (`see_through()`), and goes on
where it was: what it must not forget is somebody else's (libpq's, Django's), or was stored by the
very C call that produced it.

Who tears, and who wins: `tests/test_torn.py` raises at every bytecode.
"""

from __future__ import annotations

from _thread import allocate_lock
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator
from itertools import islice
from operator import call
from sys import getrecursionlimit, setrecursionlimit
from threading import Thread
from time import monotonic
from types import CodeType, FrameType
from typing import Any, Generic, TypeVar, cast

import anyio

from ._errors import chain_of, foremost, let_out
from ._shield import GATE, Expired, Shield

__all__ = ["NO_LOOP", "SLICE", "Calls", "Section", "Thinking", "came_through", "see_through"]

T = TypeVar("T")

SLICE = 0.1
"""Seconds that the socket is waited for at once: a handler that was deferred shortens the whole."""


class Thinking(Thread, Generic[T]):
    """An async function of ours, run to its end in a thread that nothing interrupts."""

    def __init__(self, fn: Callable[[], Awaitable[T]]) -> None:
        super().__init__(name="aiopgsafe", daemon=True)
        self.results: list[T] = []
        self.errors: list[Exception] = []
        self._fn = fn
        self._ends = allocate_lock()
        self._ends.acquire()

    def run(self) -> None:
        try:
            self.results.append(anyio.run(cast("Any", self._fn)))
        except Exception as exc:
            self.errors.append(exc)
        finally:
            self._ends.release()

    def result(self, until: float) -> T:
        """Wait for it. May be torn, and called again. Raises `Expired`, and what it raised."""
        while not self.results and not self.errors:
            if monotonic() > until:
                raise Expired
            self._ends.acquire(True, SLICE)
        if self.errors:
            raise self.errors[0]
        return self.results[0]


class NoLoop:
    """What a `Shield` needs of an event loop, where there is none."""

    running = True
    interruptions = (BaseException,)

    def run_sync_soon(self, fn: Callable[..., object], *args: Any) -> None:
        fn(*args)

    def when_reset(self, handler: object, call: Callable[[], object]) -> bool:
        return False


NO_LOOP = NoLoop()


class Section(ABC):
    """What may be torn anywhere and is called again; signals are deferred meanwhile.

    A subclass has `_step()`, which goes on from wherever it was torn.

    :ivar tore: what has torn it (see `foremost()`).
    """

    # What hardly any instance ever sets costs none of them anything.
    tore: BaseException | None = None
    _over = False

    def __init__(self) -> None:
        self.shield = Shield(NO_LOOP)
        self._signalled: list[BaseException | None] = []

    def go_on(self) -> None:
        """From wherever it was torn to the end."""
        if not self._over:
            GATE.enter(self.shield, at_once=True)
            self._step()
            self._over = True
        self._signalled.append(GATE.leave(self.shield))

    @property
    def over(self) -> bool:
        """Whether all of it is done."""
        return self._over

    @abstractmethod
    def _step(self) -> None: ...

    def note(self, exc: BaseException) -> None:
        """`exc` came out of `go_on()`."""
        self.torn(exc)
        self.tore = foremost(self.tore, exc)

    @abstractmethod
    def torn(self, exc: BaseException) -> None:
        """`exc` came out of `go_on()`: it will be called again."""

    @abstractmethod
    def give_up(self) -> None:
        """It will not: something of ours fails each time. Nothing that is open may stay so."""

    @property
    def signalled(self) -> BaseException | None:
        """What a handler raised that was deferred."""
        for exc in self._signalled:
            if exc is not None:
                return exc
        return None


class Calls:
    """Functions that are called each once, and none never, wherever this is torn.

    :ivar left: that have not been called.
    :ivar called: what the others have returned, or raised.
    :ivar raised: what they have raised.
    """

    def __init__(self, fns: Iterable[Callable[[], object]]) -> None:
        self.left = deque(fns)
        self.called: list[object] = []
        self.raised: list[BaseException] = []
        self._all = len(self.left)

    def call_next(self) -> None:
        """Call one. Raises what it raises: see `note()`."""
        # Taken from the queue, entered, and noted when it has returned, in one C call.
        number = len(self.called)
        self.called.extend(islice(map(call, iter(self.left.popleft, None)), 1))
        if len(self.called) == number:
            raise StopIteration  # of the function's own, which ends such a call

    def note(self, exc: BaseException) -> int:
        """Note what a function raised; its number. Raised again if it was no function's."""
        number = len(self.called)
        if len(self.left) + number == self._all:
            raise exc  # between two of them
        self.raised.append(exc)
        self.called.append(exc)
        return number

    def call_all(self) -> None:
        """Call all that are left, whatever one of them raises."""
        while self.left:
            try:
                self.call_next()
            except BaseException as exc:
                self.note(exc)

    @property
    def stopping(self) -> BaseException | None:
        """What was raised that is no error: it stops the program."""
        return next((exc for exc in self.raised if not isinstance(exc, Exception)), None)

    @property
    def errors(self) -> list[BaseException]:
        """The errors among what was raised."""
        return [exc for exc in self.raised if isinstance(exc, Exception)]


def came_through(exc: BaseException | None, *codes: CodeType) -> Iterator[FrameType]:
    """The frames of those functions that `exc` has come through, or what it was raised in."""
    for before in chain_of(exc) if exc is not None else ():
        tb = before.__traceback__
        while tb is not None:
            if tb.tb_frame.f_code in codes:
                yield tb.tb_frame
            tb = tb.tb_next


MAX_TEARS = 50
"""Exceptions that an end survives: an error of ours would come again and again."""

FRAMES = 200
"""Of its own for an end that begins where Python's recursion limit is near."""


def see_through(section: Section) -> BaseException | None:
    """Have it come to its end, however often it is torn; what tore it.

    Raises that if it can't come to its end, when it has given up.
    """
    try:
        try:
            section.go_on()
            return section.tore
        except RecursionError:
            raise
        except BaseException as exc:
            section.note(exc)
            whole = _go_on(section)
    except BaseException as exc:
        # Between two lines of this; or it needs more of the stack than is left.
        # Another thread that does the same meanwhile may leave the limit as much higher.
        limit = getrecursionlimit()
        setrecursionlimit(limit + FRAMES)
        try:
            section.note(exc)
            whole = _go_on(section, deep=True)
        finally:
            setrecursionlimit(limit)
    tore = section.tore
    if not whole and tore is not None:
        try:
            section.give_up()
        finally:
            raised = foremost(GATE.leave(section.shield), tore)
        let_out(raised or tore)
    return tore


def _go_on(section: Section, *, deep: bool = False) -> bool:
    """Whether it has come to its end."""
    for _ in range(MAX_TEARS):
        try:
            section.go_on()
            return True
        except BaseException as exc:
            if isinstance(exc, RecursionError) and not deep:
                raise
            section.note(exc)
    return False
