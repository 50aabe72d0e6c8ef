"""What a connection tells unasked: notifications, and its own end."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncGenerator, Callable
from time import monotonic
from typing import TYPE_CHECKING

import psycopg
from psycopg import Notify, errors, generators, pq
from psycopg.rows import Row

from ._messages import call_handler
from ._signalled import Cancellable

if TYPE_CHECKING:
    from psycopg._connection_base import NotifyHandler

OK = pq.ConnStatus.OK
BAD = pq.ConnStatus.BAD


class ConnectionEvents(Cancellable[Row]):
    """The part of `AsyncConnection` that tells."""

    _disconnect_handlers: list[Callable[[psycopg.Error], object]]
    _fatal: psycopg.Error | None
    _listened: bool
    _notifies_listening: deque[Notify] | None

    def add_notify_handler(self, callback: NotifyHandler) -> None:
        """Call `callback` with each notification (`Notify`) when it arrives."""
        self._listened = True
        super().add_notify_handler(callback)

    def _forget_listening(self) -> None:
        """For its next holder: nothing of the last one's."""
        self._listened = False
        self._notify_handlers.clear()
        if self._notifies_backlog is not None:
            self._notifies_backlog.clear()

    def _on_lost(self, error: psycopg.Error) -> None:
        for handler in tuple(self._disconnect_handlers):
            call_handler(handler, error)

    def _check_connection_ok(self) -> None:
        if self.pgconn.status == OK:
            return
        if self._fatal is not None and self.pgconn.status == BAD:
            # What the server said when it ended the session, idle: psycopg's
            # users get it (AdminShutdown, ...) with the next statement.
            fatal, self._fatal = self._fatal, None
            raise fatal
        super()._check_connection_ok()

    async def notifies(
        self, *, timeout: float | None = None, stop_after: int | None = None
    ) -> AsyncGenerator[Notify]:
        """Yield notifications as they arrive, as `psycopg.AsyncConnection.notifies()` does.

        :param timeout: seconds for which to wait; None: no limit.
        :param stop_after: stop after so many; more that came together are kept.
        """
        deadline = monotonic() + timeout if timeout is not None else None
        received = 0
        self._listened = True
        async with self.lock:
            # Between two rounds the consumer has the loop and the channel watches
            # the socket: what it takes goes here too (`_on_notify`).
            queue = self._notifies_listening = self._notifies_backlog or deque()
            self._notifies_backlog = deque()
            try:
                while stop_after is None or received < stop_after:
                    if not queue:
                        remaining = None if deadline is None else max(0.0, deadline - monotonic())
                        try:
                            await self.wait(generators.notifies(self.pgconn), timeout=remaining)
                        except errors._WaitTimeout:
                            break
                        except errors._NO_TRACEBACK as exc:
                            raise exc.with_traceback(None)  # noqa: B904
                    while queue:
                        received += 1
                        yield queue.popleft()
                    if deadline is not None and monotonic() > deadline:
                        break
            finally:
                self._notifies_listening = None
                self._notifies_backlog = queue
