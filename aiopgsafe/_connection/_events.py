"""What a connection tells unasked while it lives: notifications and notices."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncGenerator
from time import monotonic
from typing import TYPE_CHECKING, NamedTuple

from psycopg import Notify, errors, generators
from psycopg.rows import Row

from ._losing import DisconnectHandler
from ._messages import Told, check_handler
from ._signalled import Cancellable

if TYPE_CHECKING:
    from psycopg._connection_base import NoticeHandler, NotifyHandler


class Handlers(NamedTuple):
    """Whom a connection tells, at some time."""

    notify: tuple[NotifyHandler, ...] = ()
    notice: tuple[NoticeHandler, ...] = ()
    disconnect: tuple[DisconnectHandler, ...] = ()


class ConnectionEvents(Cancellable[Row]):
    """The part of `AsyncConnection` that tells."""

    _told: Told
    _notifies_listening: deque[Notify] | None

    def add_notify_handler(self, callback: NotifyHandler) -> None:
        """Call `callback` with each notification (`Notify`) when it arrives.

        From the event loop: while the connection is idle, too. `callback` is a plain
        function and must not block; an exception of its own is logged.
        """
        check_handler(callback)
        self._told.listening = True
        super().add_notify_handler(callback)
        self._watch()

    def add_notice_handler(self, callback: NoticeHandler) -> None:
        """Call `callback` with each notice (`psycopg.errors.Diagnostic`) when it arrives.

        As `add_notify_handler()`. The notice may be kept, unlike psycopg's.
        """
        check_handler(callback)
        super().add_notice_handler(callback)
        self._watch()

    def remove_notify_handler(self, callback: NotifyHandler) -> None:
        """Call `callback` no more. Raises `ValueError` if it is not registered."""
        super().remove_notify_handler(callback)
        self._handlers_changed = True

    def remove_notice_handler(self, callback: NoticeHandler) -> None:
        """Call `callback` no more. Raises `ValueError` if it is not registered."""
        super().remove_notice_handler(callback)
        self._handlers_changed = True

    def _handlers(self) -> Handlers:
        return Handlers(
            tuple(self._notify_handlers),
            tuple(self._notice_handlers),
            tuple(self._disconnect_handlers),
        )

    def _restore_handlers(self, handlers: Handlers) -> None:
        """For the next holder: nothing of the last one's, and what `configure` has set."""
        self._handlers_changed = False
        self._notify_handlers[:], self._notice_handlers[:], self._disconnect_handlers[:] = handlers
        self._wake_who_waits()

    def _forget_listening(self) -> None:
        """The session listens no more."""
        self._told.listening = False
        if self._notifies_backlog is not None:
            self._notifies_backlog.clear()

    async def notifies(
        self, *, timeout: float | None = None, stop_after: int | None = None
    ) -> AsyncGenerator[Notify]:
        """Yield notifications as they arrive, as `psycopg.AsyncConnection.notifies()` does.

        :param timeout: seconds for which to wait; None: no limit.
        :param stop_after: stop after so many; more that came together are kept.
        """
        deadline = monotonic() + timeout if timeout is not None else None
        received = 0
        self._told.listening = True
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
