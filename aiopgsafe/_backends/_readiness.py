"""What both backends ask a socket without the event loop."""

from __future__ import annotations

import select
from collections.abc import Callable

READ, WRITE = 1, 2
"""`psycopg.waiting.Wait` and `Ready`, as numbers: an enum's `&` costs a microsecond."""


class Readiness:
    """Tells what a descriptor is ready for right now, in one system call that doesn't wait."""

    __slots__ = ("_poll",)

    def __init__(self, fd: int) -> None:
        poll = select.poll()
        poll.register(fd, select.POLLIN | select.POLLOUT)
        self._poll: Callable[[int], list[tuple[int, int]]] = poll.poll

    def __call__(self, want: int) -> int:
        ready = 0
        for _, events in self._poll(0):
            if events & ~select.POLLOUT:  # errors and hang-ups are for reading
                ready |= READ
            if events & select.POLLOUT:
                ready |= WRITE
        return ready & want

    def quiet(self) -> bool:
        """Whether there is nothing to read, nor an error."""
        events = self._poll(0)
        return not events or (len(events) == 1 and events[0][1] == select.POLLOUT)

    def failed(self) -> bool:
        """Whether the socket is in error or has been hung up."""
        return any(events & (select.POLLERR | select.POLLHUP) for _, events in self._poll(0))
