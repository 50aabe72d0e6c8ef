"""What a subscriber holds: its channels, its buffer, and what it is told."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

import psycopg
from psycopg import Notify

from .._backends import Waiter

if TYPE_CHECKING:
    from ._hub import Hub

__all__ = ["Gap", "Subscription", "check_channel", "check_payload"]

MAX_CHANNEL = 63
"""Bytes. PostgreSQL (NAMEDATALEN) would cut longer ones off, with a notice only."""

MAX_PAYLOAD = 7999
"""Bytes: less than 8000 (PostgreSQL documentation, NOTIFY)."""


@dataclass(frozen=True, slots=True)
class Gap:
    """Notifications may have been missed here: the listener had lost its connection.

    It listens again when this is told. Who now reads from the database what the
    notifications are about has missed nothing.

    :ivar channels: those of the subscription.
    :ivar since: seconds since the epoch (`time.time()`): what was committed before
        had been delivered.
    """

    channels: tuple[str, ...]
    since: float


Gap.__module__ = "aiopgsafe"


class Subscriptions(Protocol):
    """Where a `Subscription` finds its hub, when it is entered."""

    def __call__(self) -> Hub: ...


class Subscription:
    """``async with`` it, and iterate: notifications (`Notify`), and a `Gap` after each loss.

    Iteration ends when the database drains or is closed.
    """

    __module__ = "aiopgsafe"

    def __init__(self, hub: Subscriptions, channels: tuple[str, ...], max_buffer: int) -> None:
        if not channels:
            raise ValueError("listen() takes at least one channel")
        for channel in channels:
            check_channel(channel)
        if isinstance(max_buffer, bool) or not isinstance(max_buffer, int):
            raise TypeError(f"max_buffer is an int, not {type(max_buffer).__name__}")
        if max_buffer < 1:
            raise ValueError(f"max_buffer must be at least 1: {max_buffer}")
        self.channels = tuple(dict.fromkeys(channels))
        self.max_buffer = max_buffer
        self.confirmed = False
        """Whether the server has confirmed that we listen, since when nothing may get lost."""
        self.missing_since: float | None = None
        """A gap that hasn't been told yet."""
        self._find_hub = hub
        self._hub: Hub | None = None
        self._items: deque[Notify | Gap] = deque()
        self._gaps = 0  # among them
        self._error: BaseException | None = None
        self._ended = False
        self._waiter: Waiter | None = None

    def __repr__(self) -> str:
        return f"<aiopgsafe.Subscription {', '.join(self.channels)} at 0x{id(self):x}>"

    async def __aenter__(self) -> Self:
        if self._hub is not None:
            raise RuntimeError("the subscription is entered already: call listen() for another one")
        self._hub = self._find_hub()
        await self._hub.enter(self)
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        assert self._hub is not None
        self._hub.leave(self)
        self.end()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Notify | Gap:
        if self._hub is None:
            raise psycopg.InterfaceError("the subscription is not entered: use `async with`")
        if not self._hub.backend.is_current():
            raise psycopg.InterfaceError("the subscription belongs to another event loop")
        while not self._items:
            if self._error is not None:
                raise self._error
            if self._ended:
                raise StopAsyncIteration
            await self.wait(self._hub)
        item = self._items.popleft()
        self._gaps -= isinstance(item, Gap)
        return item

    async def wait(self, hub: Hub) -> None:
        """Wait until there is something to look at."""
        if self._waiter is not None:
            raise RuntimeError("another task waits for this subscription already")
        self._waiter = waiter = hub.backend.waiter()
        try:
            await waiter.wait()
        finally:
            self._waiter = None

    # From the hub

    @property
    def excess(self) -> int:
        """How many more notifications wait than should."""
        return len(self._items) - self._gaps - self.max_buffer

    @property
    def error(self) -> BaseException | None:
        """Why it has ended."""
        return self._error

    def push(self, notify: Notify) -> None:
        self.tell_gap()
        self._items.append(notify)
        self.wake()

    def tell_gap(self) -> None:
        """Before anything that comes after it."""
        since, self.missing_since = self.missing_since, None
        if since is None or (self._items and isinstance(self._items[-1], Gap)):
            return  # one that nobody has read yet says it all
        self._items.append(Gap(self.channels, since))
        self._gaps += 1
        self.wake()

    def fail(self, error: BaseException) -> None:
        """After what is in the buffer, and fits into it, raise `error`."""
        while self.excess > 0:
            self._gaps -= isinstance(self._items.pop(), Gap)
        self._error = error
        self.wake()

    def end(self) -> None:
        """After what is in the buffer, stop."""
        self._ended = True
        self.wake()

    def wake(self) -> None:
        if self._waiter is not None:
            self._waiter.wake()


def check_channel(channel: object) -> None:
    """Raise TypeError or ValueError for what PostgreSQL doesn't take as a channel's name."""
    if not isinstance(channel, str):
        raise TypeError(f"a channel is a str, not {type(channel).__name__}")
    if not channel:
        raise ValueError("a channel's name can't be empty")
    if "\0" in channel:
        raise ValueError("a channel's name can't contain NUL")
    if len(channel.encode()) > MAX_CHANNEL:
        raise ValueError(f"a channel's name has at most {MAX_CHANNEL} bytes: {channel!r}")


def check_payload(payload: object) -> None:
    """Raise TypeError or ValueError for what PostgreSQL doesn't take as a payload."""
    if not isinstance(payload, str):
        raise TypeError(f"a payload is a str, not {type(payload).__name__}")
    if "\0" in payload:
        raise ValueError("a payload can't contain NUL")
    if (size := len(payload.encode())) > MAX_PAYLOAD:
        raise ValueError(f"a payload has less than 8000 bytes: this one has {size}")
