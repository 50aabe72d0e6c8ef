"""The lock of a connection: one statement at a time, first come, first served."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from . import Waiter


class Lock:
    """A lock without an owner: psycopg's generators may end in another task than they began in.

    Taking a free one costs no turn of the event loop. `release()` hands a
    contended one to the first in the queue, which owns it from that moment, even
    if it is cancelled before it runs: then it hands it on (`withdraw`).
    """

    __slots__ = ("_locked", "_make_waiter", "_queue", "turn")

    def __init__(self, make_waiter: Callable[[], Waiter]) -> None:
        self._make_waiter = make_waiter
        self._locked = False
        self.turn = 0
        """Counts how often it was released: the same number, the same holder."""
        self._queue: deque[Waiter] = deque()

    def locked(self) -> bool:
        return self._locked

    def try_acquire(self) -> bool:
        if self._locked:
            return False
        self._locked = True
        return True

    def enqueue(self) -> Waiter:
        """Queue up for a lock that is taken. The waiter's end means: it is yours."""
        waiter = self._make_waiter()
        self._queue.append(waiter)
        return waiter

    def withdraw(self, waiter: Waiter) -> None:
        """Leave the queue; hand the lock on if it was ours already."""
        if waiter in self._queue:
            self._queue.remove(waiter)
        else:
            self.release()

    def release(self) -> None:
        self.turn += 1
        if self._queue:
            self._queue.popleft().wake()
        else:
            self._locked = False

    async def acquire(self) -> bool:
        if self._locked:
            waiter = self.enqueue()
            try:
                await waiter.wait()
            except BaseException:
                self.withdraw(waiter)
                raise
        else:
            self._locked = True
        return True

    async def __aenter__(self) -> None:
        if self._locked:
            await self.acquire()
        else:
            self._locked = True

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.release()
