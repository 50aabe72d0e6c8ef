"""What a connection tells unasked: notifications, and its own end."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncGenerator, Callable
from time import monotonic
from typing import TYPE_CHECKING, NamedTuple

import psycopg
from psycopg import Notify, errors, generators, pq
from psycopg.rows import Row

from .._backends import Waiter
from ._messages import Told, call_handler
from ._signalled import Cancellable

if TYPE_CHECKING:
    from psycopg._connection_base import NoticeHandler, NotifyHandler

OK = pq.ConnStatus.OK
BAD = pq.ConnStatus.BAD


DisconnectHandler = Callable[[psycopg.OperationalError], object]


class Handlers(NamedTuple):
    """Whom a connection tells, at some time."""

    notify: tuple[NotifyHandler, ...] = ()
    notice: tuple[NoticeHandler, ...] = ()
    disconnect: tuple[DisconnectHandler, ...] = ()


class ConnectionEvents(Cancellable[Row]):
    """The part of `AsyncConnection` that tells."""

    _disconnect_handlers: list[DisconnectHandler]
    _waiting_for_loss: list[Waiter]
    _loss: psycopg.OperationalError | None
    _keeper: DisconnectHandler | None  # the pool's
    _handlers_changed: bool  # since a pool has looked
    _fatal: psycopg.Error | None
    _told: Told
    _notifies_listening: deque[Notify] | None

    # Whoever is told while nothing runs, the channel has to watch for (trio pays for it).

    def add_notify_handler(self, callback: NotifyHandler) -> None:
        """Call `callback` with each notification (`Notify`) when it arrives.

        From the event loop: while the connection is idle, too. `callback` is a plain
        function and must not block; an exception of its own is logged.
        """
        self._told.listening = True
        super().add_notify_handler(callback)
        self._watch()

    def add_notice_handler(self, callback: NoticeHandler) -> None:
        """Call `callback` with each notice (`psycopg.errors.Diagnostic`) when it arrives.

        As `add_notify_handler()`. The notice may be kept, unlike psycopg's.
        """
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

    def add_disconnect_handler(self, callback: DisconnectHandler) -> None:
        """Call `callback` with an `OperationalError` when the connection is lost.

        At once, from the event loop, while the connection is idle, too: the server
        ended the session, the connection was cut, or we gave it up because the server
        didn't answer in time. Not when the program itself closes it.

        Raises `psycopg.OperationalError` if it is closed or lost already.
        """
        self._check_connection_ok()
        self._disconnect_handlers.append(callback)
        self._watch()

    def remove_disconnect_handler(self, callback: DisconnectHandler) -> None:
        """Call `callback` no more. Raises `ValueError` if it is not registered."""
        self._disconnect_handlers.remove(callback)
        self._handlers_changed = True

    async def wait_disconnected(self) -> psycopg.OperationalError:
        """Wait until the connection is lost or closed, and return why.

        At once if it is. Other tasks may use the connection meanwhile.

        Raises `ConnectionReleased` if it is given back to its pool meanwhile.
        """
        while self._loss is None and not self.closed:
            waiter = self._backend.waiter()
            self._waiting_for_loss.append(waiter)
            self._watch()
            try:
                await waiter.wait()
            finally:
                if waiter in (waiting := self.__dict__.get("_waiting_for_loss", ())):
                    waiting.remove(waiter)
        return self._loss or psycopg.OperationalError("the connection is closed")

    def _watch(self) -> None:
        self._handlers_changed = True
        self._channel.watch(True)

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

    def _on_lost(self, error: psycopg.Error) -> None:
        """The connection is gone, and not because the program closed it."""
        if self._loss is not None:
            return
        if not isinstance(error, psycopg.OperationalError):
            cause, error = error, psycopg.OperationalError(str(error))
            error.__cause__ = cause
        self._loss = error
        if self._keeper is not None:
            self._keeper(error)
        self._wake_who_waits()
        for handler in tuple(self._disconnect_handlers):
            call_handler(handler, error)

    def _wake_who_waits(self) -> None:
        waiting, self._waiting_for_loss = self._waiting_for_loss, []
        for waiter in waiting:
            waiter.wake()

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
