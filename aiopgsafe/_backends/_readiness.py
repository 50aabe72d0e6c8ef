"""What both backends ask a socket without the event loop."""

from __future__ import annotations

import select
from collections.abc import Callable

POLLOUT = select.POLLOUT

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
        found = self._poll(0)
        if not found:
            return 0
        events = found[0][1]
        ready = WRITE if events & POLLOUT else 0
        if events & ~POLLOUT:  # errors and hang-ups are for reading
            ready |= READ
        return ready & want

    def quiet(self) -> bool:
        """Whether there is nothing to read, nor an error."""
        events = self._poll(0)
        return not events or events[0][1] == POLLOUT

    def failed(self) -> bool:
        """Whether the socket is in error or has been hung up."""
        events = self._poll(0)
        return bool(events) and events[0][1] & (select.POLLERR | select.POLLHUP) != 0
