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
from threading import Thread, current_thread, main_thread
from types import FrameType
from typing import Any

from ._backends import Backend, LoopHandler
from ._shield import GATE, unhooked

__all__ = ["Arrival", "watching"]


class Arrival:
    """One arrival of a signal, and what became of it with those who took it."""

    def __init__(self, signum: int) -> None:
        self.signum = signum
        self._takers = 0
        self._hit = False
        self._to_go_on = False

    def taken(self) -> None:
        self._takers += 1

    def hit(self) -> None:
        """A taker has done what the signal asked for."""
        self._hit = True
        self._leave()

    def missed(self) -> None:
        """A taker found nothing to do after all. If all did, the signal is the program's."""
        self._leave()

    def go_on(self) -> None:
        """A taker has done its part, and the signal is the program's when the others have."""
        self._to_go_on = True
        self._leave()

    def _leave(self) -> None:
        self._takers -= 1
        if not self._takers and (self._to_go_on or not self._hit):
            self._send_again()

    def _send_again(self) -> None:
        """As from outside: a handler that raises would otherwise end whatever task this is."""
        args = (os.getpid(), self.signum)
        Thread(target=os.kill, args=args, name=f"signal again {self.signum}").start()


Watch = Callable[[Arrival], bool]
"""Called in the signal handler, between any two bytecodes. True: this arrival is taken."""


_UNCATCHABLE = {signal.SIGKILL, signal.SIGSTOP}


class _Stand:
    """Stands before the program's handler of one signal while anybody watches."""

    def __init__(self, signum: int) -> None:
        self.signum = signum
        self.watches: list[Watch] = []
        self.instead: list[Callable[[], object]] = []
        self._own: Any = None
        self._of_loop: LoopHandler | None = None

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        arrival = Arrival(self.signum)
        taken = False
        for watch in reversed(self.watches):  # all are asked: all that runs is stopped
            if watch(arrival):
                arrival.taken()
                taken = True
        if not taken:
            self._pass_on(frame)

    def _pass_on(self, frame: FrameType | None) -> None:
        if self._of_loop is not None:
            self._of_loop.run()
        elif callable(self._own):
            self._own(self.signum, frame)
        elif self._own is signal.SIG_DFL and self.instead:
            instead, self.instead = self.instead, []
            for call in instead:
                self._backend.run_sync_soon(call)
        elif self._own is signal.SIG_DFL:
            # Stop, die, or nothing: what the system does.
            signal.signal(self.signum, signal.SIG_DFL)
            os.kill(os.getpid(), self.signum)
            signal.signal(self.signum, self)  # if we still live

    @property
    def installed(self) -> bool:
        """Whether it, or a hook of the gate's that stands for it, is the handler now."""
        return unhooked(signal.getsignal(self.signum)) is self

    def install(self, backend: Backend) -> None:
        self._backend = backend
        self._own = signal.getsignal(self.signum)
        if self.signum in _UNCATCHABLE:
            raise ValueError(f"{signal.Signals(self.signum).name} can't be caught")
        if self._own is None:
            raise RuntimeError(
                f"the handler of {self.signum} was not set by Python:"
                " it could not be called, nor put back"
            )
        own = unhooked(self._own)
        self._of_loop = backend.take_signal(self.signum, own)
        backend.when_reset(own, self._on_reset)
        signal.signal(self.signum, self)

    def _on_reset(self) -> None:
        """asyncio.run looks for its handler to reset it, and doesn't find it."""
        if self.installed:
            self._own = signal.default_int_handler

    def remove(self) -> None:
        here: Any = signal.getsignal(self.signum)
        if unhooked(here) is self:
            if here is not self:  # a transaction ends: the gate puts back what it hooked
                GATE.retarget(self, unhooked(self._own))
            else:
                signal.signal(self.signum, self._own)
        # If not, the program has set another handler meanwhile: it stays.
        if self._of_loop is not None:
            self._of_loop.put_back()


_stands: dict[int, list[_Stand]] = {}
"""By signal; more than one where the program has set a handler of its own in between."""


def ends_the_program(signum: int) -> bool:
    """Whether the program has no handler, and what the system does is to end it."""
    if signum in _HARMLESS:
        return False
    return unhooked(signal.getsignal(signum)) is signal.SIG_DFL or any(
        stand.instead for stand in _stands.get(signum, ())
    )


def handled_here(signum: int) -> bool:
    """Whether a handler of Python's can stand before that of the program, in this thread.

    A signal that is ignored asks for nothing.
    """
    if current_thread() is not main_thread():
        return False
    return unhooked(signal.getsignal(signum)) not in (None, signal.SIG_IGN)


_HARMLESS = {signal.SIGCHLD, signal.SIGCONT, signal.SIGURG, signal.SIGWINCH}


@contextmanager
def watching(
    signals: Sequence[int],
    backend: Backend,
    watch: Watch,
    instead: Callable[[], object] | None = None,
) -> Iterator[None]:
    """Ask `watch` at every arrival of one of `signals` during the block.

    :param instead: called once, in the event loop, in place of what the system does for
        a program without a handler of its own.

    Raises RuntimeError outside of the main thread, where Python handles no signals,
    and for a handler that can't be stood before; ValueError for what is no signal.
    """
    if signals and current_thread() is not main_thread():
        raise RuntimeError("signals are handled in the main thread only: this is another one")
    with ExitStack() as stack:
        for signum in dict.fromkeys(map(signal.Signals, signals)):
            stack.enter_context(_watched(signum, backend, watch, instead))
        yield


@contextmanager
def _watched(
    signum: int, backend: Backend, watch: Watch, instead: Callable[[], object] | None
) -> Iterator[None]:
    stands = _stands.setdefault(signum, [])
    if not stands or not stands[-1].installed:
        stand = _Stand(signum)
        stand.install(backend)
        stands.append(stand)
    stand = stands[-1]
    stand.watches.append(watch)
    if instead is not None:
        stand.instead.append(instead)
    try:
        yield
    finally:
        stand.watches.remove(watch)
        if instead in stand.instead:
            stand.instead.remove(instead)
        if not stand.watches:
            stands.remove(stand)
            stand.remove()


def _after_fork() -> None:
    """In the child nobody watches: the connections are the parent's."""
    for stands in _stands.values():
        for stand in reversed(stands):
            stand.remove()
    _stands.clear()


os.register_at_fork(after_in_child=_after_fork)
