"""The end of a connection: that it comes, why, and who is told."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import psycopg
from psycopg import pq
from psycopg.rows import Row

from .._backends import Channel, Waiter
from ._generators import EndingGenerators
from ._messages import call_handler, check_handler

logger = logging.getLogger("aiopgsafe")

OK = pq.ConnStatus.OK
BAD = pq.ConnStatus.BAD

DisconnectHandler = Callable[[psycopg.OperationalError], object]


class Losing(EndingGenerators[Row], psycopg.AsyncConnection[Row]):
    """The part of `AsyncConnection` that ends."""

    _channel: Channel
    _disconnect_handlers: list[DisconnectHandler]
    _fatal: psycopg.Error | None  # what the server said last
    _handlers_changed: bool  # since a pool has looked
    _in_libpq: bool  # in a callback of its own
    _keeper: DisconnectHandler | None  # the pool's
    _loss: psycopg.OperationalError | None
    _signalled: Any  # a `SignalledCancel`, or None
    _waiting_for_loss: list[Waiter]

    def add_disconnect_handler(self, callback: DisconnectHandler) -> None:
        """Call `callback` with an `OperationalError` when the connection is lost.

        At once, from the event loop, while the connection is idle, too: the server
        ended the session, the connection was cut, or we gave it up because the server
        didn't answer in time. Not when the program itself closes it.

        Raises `psycopg.OperationalError` if it is closed or lost already.
        """
        check_handler(callback)
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
        """See at once what comes while nothing runs: somebody is to be told (trio pays for it)."""
        self._handlers_changed = True
        self._channel.watch(True)

    def _drop(self, reason: str) -> None:
        # One that is lost already is no news.
        level = logging.DEBUG if self.closed else logging.WARNING
        logger.log(level, "closing %s: %s", self, reason)
        error = psycopg.OperationalError(f"the connection is closed: {reason}")
        self._channel.close(error)
        self.pgconn.finish()
        if self._signalled is not None:
            self._signalled.abandon()
        self._on_lost(error)

    def _close_now(self) -> None:
        self._closed = True
        if self._signalled is not None:
            self._signalled.abandon()
        self._channel.close(psycopg.OperationalError("the connection is closed"))
        if self._in_libpq:  # called by a notice handler
            self._backend.run_sync_soon(self.pgconn.finish)
        else:
            self.pgconn.finish()
        self._wake_who_waits()

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
