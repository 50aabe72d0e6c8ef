"""Ctrl-C while there is something to be cleaned up."""

from __future__ import annotations

from signal import SIGINT, SIGTERM, default_int_handler, signal
from types import FrameType
from typing import Any, Self


class Interrupts:
    """Notes SIGINT and SIGTERM while it is entered, for someone to look at.

    KeyboardInterrupt comes out of any line, those that clean up included, and out of the event
    loop's own while it is made or closed.

    :ivar arrived: one has come.
    """

    def __init__(self) -> None:
        self.arrived = False
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for signum in (SIGINT, SIGTERM):
            self._handlers[signum] = signal(signum, self._note)
        return self

    def __exit__(self, *exc_info: object) -> None:
        for signum, handler in self._handlers.items():
            signal(signum, handler)

    def raise_if_arrived(self) -> None:
        """:raises KeyboardInterrupt: one has come."""
        if self.arrived:
            raise KeyboardInterrupt

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.arrived = True


def obey_sigterm() -> None:
    """SIGTERM is another Ctrl-C from now on: a server is to be stopped, a schema to be dropped."""
    signal(SIGTERM, default_int_handler)
