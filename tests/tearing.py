"""Raises at a chosen bytecode: what signal handlers and asynchronous exceptions do by chance."""

from __future__ import annotations

import dis
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import CodeType, FrameType
from typing import Any

TOOL = 3  # of sys.monitoring, used by nobody


class Stop(SystemExit):
    """As a supervisor's handler raises it."""


class TimeLimit(Exception):
    """As Celery's SoftTimeLimitExceeded, dramatiq's TimeLimitExceeded."""


def lies(there: bool, called: list[str], raised: BaseException | None) -> list[str]:
    """What the program was told wrongly: whether the row is `there`, and its callbacks "a", "b"."""
    found = []
    if there and called != ["a", "b"]:
        found.append(f"committed, and called {called}")
    if not there and called:
        found.append("not committed, and called")
    if not there and raised is None:
        found.append("not committed, and nobody told")
    return found


class Tear:
    """Something happens at the bytecode number `at`, and once more `again` bytecodes later.

    Bytecodes are those that run in this thread between `start()` and `stop()`, of whatever
    module but `ignored` ones.

    :param looks: only where Python looks for signals and asynchronous exceptions: at the beginning
        of functions and of each turn of a loop, and after calls. A ``with`` can't be torn between
        `__enter__()` and its body, nor between the body's end and `__exit__()`.
    :ivar where: it has happened: functions and lines.
    """

    def __init__(
        self,
        at: int,
        happens: Callable[[], object],
        again: int | None = None,
        *ignored: str,
        looks: bool = False,
    ) -> None:
        self.where: list[str] = []
        self.count = 0
        self._at = {at} if again is None else {at, at + again}
        self._happens = happens
        self._ident = threading.get_ident()
        self._ignored = {__file__, *ignored}
        self._looks = looks

    def see(self, code: CodeType, offset: int) -> None:
        if code.co_filename in self._ignored or threading.get_ident() != self._ident:
            return
        if code.co_name in ("__del__", "_let_go"):  # Python would ignore what is raised there
            return
        if offset in accounts(code) or (self._looks and offset not in places(code)):
            return
        self.count += 1
        if self.count in self._at:
            self.where.append(f"{code.co_qualname}, {offset}")
            self._happens()

    # Python calls it at each bytecode. A trace function that raises isn't called any more (in 3.11
    # `start()` has to be called again); one of sys.monitoring is.

    def start(self) -> None:
        if sys.version_info >= (3, 12):
            instruction = sys.monitoring.events.INSTRUCTION
            sys.monitoring.use_tool_id(TOOL, "tear")
            sys.monitoring.register_callback(TOOL, instruction, self.see)
            sys.monitoring.set_events(TOOL, instruction)
        else:
            sys.settrace(self._trace)

    def stop(self) -> None:
        if sys.version_info >= (3, 12):
            sys.monitoring.set_events(TOOL, 0)
            sys.monitoring.free_tool_id(TOOL)
        else:
            sys.settrace(None)

    def start_again(self) -> None:
        """Also for the functions that run already, where that is needed."""
        if sys.version_info >= (3, 12):
            return
        frame = sys._getframe(1)
        while frame is not None:
            frame.f_trace = self._trace
            frame.f_trace_opcodes, frame.f_trace_lines = True, False
            frame = frame.f_back  # type: ignore[assignment]
        sys.settrace(self._trace)

    def _trace(self, frame: FrameType, event: str, arg: object) -> Any:
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event == "opcode":
            self.see(frame.f_code, frame.f_lasti)
        return self._trace


def ignore_unraisable(unraisable: object) -> None:
    """For `sys.unraisablehook`: what is raised in a finaliser Python can only tell of.

    pytest's hook would be torn itself.
    """


def see_calls(see: Callable[[FrameType], None]) -> Callable[[], None]:
    """`see` the frame of each function that begins, until what is returned is called."""
    if sys.version_info >= (3, 12):
        start = sys.monitoring.events.PY_START
        sys.monitoring.use_tool_id(TOOL, "tear")
        sys.monitoring.register_callback(TOOL, start, lambda code, offset: see(sys._getframe(1)))
        sys.monitoring.set_events(TOOL, start)

        def stop() -> None:
            if sys.monitoring.get_tool(TOOL):
                sys.monitoring.set_events(TOOL, 0)
                sys.monitoring.free_tool_id(TOOL)

        return stop

    def trace(frame: FrameType, event: str, arg: object) -> None:
        if event == "call":
            see(frame)

    sys.settrace(trace)
    return lambda: sys.settrace(None)


@cache
def places(code: CodeType) -> frozenset[int]:
    """Where Python looks, in this code."""
    found = set()
    called = False
    for instruction in dis.get_instructions(code):
        if called or instruction.opname in ("RESUME", "JUMP_BACKWARD"):
            found.add(instruction.offset)
        called = instruction.opname.startswith("CALL")
    return frozenset(found)


@cache
def accounts(code: CodeType) -> frozenset[int]:
    """Where Python keeps account of which exception is being handled, in this code.

    These can't raise, so Python is not prepared: the exception of a handler that is torn there
    counts as being handled for the rest of the thread, and each later one has it as its context.
    """
    found = set()
    before = None
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("PUSH_EXC_INFO", "POP_EXCEPT"):
            found.add(instruction.offset)
            if before is not None and before.opname == "COPY":
                found.add(before.offset)  # of what is handled, on its way out
        before = instruction
    return frozenset(found)


@contextmanager
def handling(exc: type[BaseException]) -> Iterator[Callable[[], None]]:
    """A signal whose handler raises `exc`; yields what sends it. It must be in place afterwards."""

    def handler(signum: int, frame: FrameType | None) -> None:
        raise exc("from a handler")

    before = signal.signal(signal.SIGTERM, handler)
    try:
        yield lambda: signal.raise_signal(signal.SIGTERM)
    finally:
        found = signal.signal(signal.SIGTERM, before)
        assert found is handler, f"SIGTERM's handler was left as {found}"


@contextmanager
def raising(exc: type[BaseException]) -> Iterator[Callable[[], None]]:
    """An asynchronous exception."""

    def happens() -> None:
        raise exc("from nowhere")

    yield happens


WAYS = {"signal": handling, "exception": raising}
