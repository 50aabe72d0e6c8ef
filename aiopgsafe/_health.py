"""Whether the database can be reached, as far as the watchers know."""

from __future__ import annotations

from collections.abc import Callable

from ._backends import Backend, Waiter

__all__ = ["Health"]


class Health:
    """Up when a connection is made, down when the last one is lost or doesn't answer.

    Nobody is asked: a server that freezes while nothing runs is down when the
    listener's heartbeat, or TCP keepalive, has found it out.
    """

    def __init__(self) -> None:
        self.available = False
        self._alive: list[Callable[[], bool]] = []
        self._looking = False
        self._waiting: list[Waiter] = []

    def add(self, alive: Callable[[], bool]) -> None:
        """Somebody who has connections, and knows whether one of them lives."""
        self._alive.append(alive)

    def look(self) -> None:
        """A connection is lost, or couldn't be made: does any other one live?"""
        if self._looking:
            return  # one more was found lost by looking
        self._looking = True
        try:
            if not any(alive() for alive in self._alive):
                self.down()
        finally:
            self._looking = False

    def up(self) -> None:
        self._set(True)

    def down(self) -> None:
        self._set(False)

    def _set(self, available: bool) -> None:
        if available is not self.available:
            self.available = available
            self.wake_all()

    def wake_all(self) -> None:
        """Let who waits look again."""
        waiting, self._waiting = self._waiting, []
        for waiter in waiting:
            waiter.wake()

    async def change(self, backend: Backend) -> None:
        """Wait until it has changed, or `wake_all()`."""
        waiter = backend.waiter()
        self._waiting.append(waiter)
        try:
            await waiter.wait()
        finally:
            if waiter in self._waiting:
                self._waiting.remove(waiter)
