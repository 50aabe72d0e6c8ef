"""Signals that mean something else for a while, and what the program's own handlers then are.

A `Watch` is asked when its signal arrives whether it has something to do about it. If
no watch has, the program's own handler is called as if nobody stood before it. All of
them share one handler for each signal, so they may be entered and left in any order.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from threading import current_thread, main_thread
from types import FrameType
from typing import Any

from ._backends import Backend, LoopHandler
from ._shield import unhooked

__all__ = ["watching"]

Watch = Callable[[int], bool]
"""Called in the signal handler, between any two bytecodes. True: this arrival is taken."""


class _Stand:
    """Stands before the program's handler of one signal while anybody watches."""

    def __init__(self, signum: int) -> None:
        self.signum = signum
        self.watches: list[Watch] = []
        self._own: Any = None
        self._of_loop: LoopHandler | None = None

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        taken = False
        for watch in reversed(self.watches):  # all are asked: all that runs is stopped
            taken = watch(self.signum) or taken
        if not taken:
            self._pass_on(frame)

    def _pass_on(self, frame: FrameType | None) -> None:
        if self._of_loop is not None:
            self._of_loop.run()
        elif callable(self._own):
            self._own(self.signum, frame)
        elif self._own is signal.SIG_DFL:
            # Stop, die, or nothing: what the system does.
            signal.signal(self.signum, signal.SIG_DFL)
            os.kill(os.getpid(), self.signum)
            signal.signal(self.signum, self)  # if we still live

    def install(self, backend: Backend) -> None:
        self._own = signal.getsignal(self.signum)
        if self._own is None:
            raise RuntimeError(
                f"the handler of {_name(self.signum)} was not set by Python:"
                " it could not be called, nor put back"
            )
        self._of_loop = backend.take_signal(self.signum, unhooked(self._own))
        signal.signal(self.signum, self)

    def remove(self) -> None:
        # If not, the program has set another handler meanwhile: it stays.
        here: object = signal.getsignal(self.signum)
        if here is self:
            signal.signal(self.signum, self._own)
            if self._of_loop is not None:
                self._of_loop.put_back()


_stands: dict[int, _Stand] = {}


@contextmanager
def watching(signals: Sequence[int], backend: Backend, watch: Watch) -> Iterator[None]:
    """Ask `watch` at every arrival of one of `signals` during the block.

    Raises RuntimeError outside of the main thread, where Python handles no signals,
    and for a handler that can't be stood before; ValueError for what is no signal.
    """
    if current_thread() is not main_thread():
        raise RuntimeError("signals are handled in the main thread only: this is another one")
    with ExitStack() as stack:
        for signum in dict.fromkeys(map(signal.Signals, signals)):
            stack.enter_context(_watched(signum, backend, watch))
        yield


@contextmanager
def _watched(signum: int, backend: Backend, watch: Watch) -> Iterator[None]:
    stand = _stands.get(signum)
    if stand is None:
        stand = _Stand(signum)
        stand.install(backend)
        _stands[signum] = stand
    stand.watches.append(watch)
    try:
        yield
    finally:
        stand.watches.remove(watch)
        if not stand.watches:
            del _stands[signum]
            stand.remove()


def _name(signum: int) -> str:
    return signal.Signals(signum).name
