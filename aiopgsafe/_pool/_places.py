"""Who has which connection: the pool's state, changed by synchronous code only.

Each connection has a `Place`, and each place exactly one owner at every instant: the
pool (`idle`), a client (`used`) or a client that waits and to which it was handed
(`Request.place`), which counts as used. A cancellation finds the state before or
after a change, never between.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from .._backends import Waiter
from .._connection import AsyncConnection
from .._connection._events import Handlers

__all__ = ["Place", "Places", "Request"]


@dataclass(slots=True, eq=False)
class Place:
    """One connection's place in the pool. Times are `time.monotonic()`."""

    conn: AsyncConnection[Any]
    created_at: float
    expires_at: float
    idle_since: float
    handlers: Handlers = Handlers()  # noqa: RUF009  # immutable
    """Those that `configure` has set, whom every holder has."""
    watched: bool = False
    """Whether there are any: then its holder's connection is watched, too."""
    born_read_only: bool = False
    """Whether its transactions can't write by default since it was made."""


@dataclass(slots=True, eq=False)
class Request:
    """A client that waits in the queue.

    Whoever takes it out of the queue sets `place` or `error` and wakes it, at once.
    A client that is interrupted finds itself in the queue, or the owner of `place`,
    and gives that back.
    """

    waiter: Waiter
    place: Place | None = None
    error: Exception | None = None


@dataclass(slots=True, eq=False)
class Places:
    """All places, and the queue of those that want one."""

    min_size: int
    max_size: int
    idle: list[Place] = field(default_factory=list)
    """The last one given back is the first one taken: it is warm, and the others may go."""
    used: set[Place] = field(default_factory=set)
    connecting: int = 0
    """Connections on their way."""
    queue: deque[Request] = field(default_factory=deque)
    probing: int = 0
    """Who waits until the database can be reached: somebody must try."""

    @property
    def size(self) -> int:
        """Connections that there are or are to be."""
        return len(self.idle) + len(self.used) + self.connecting

    def lacking(self) -> int:
        """How many more connections should be on their way."""
        wanted = len(self.idle) + len(self.used) + len(self.queue)
        least = max(self.min_size, 1 if self.probing else 0)
        return min(self.max_size, max(least, wanted)) - self.size

    def take(self) -> Place | None:
        """An idle place, used from now on."""
        if not self.idle:
            return None
        place = self.idle.pop()
        self.used.add(place)
        return place

    def put(self, place: Place) -> bool:
        """Give a place to who has waited longest, or else keep it idle. True: it is idle."""
        if self.queue:
            self.used.add(place)
            request = self.queue.popleft()
            request.place = place
            request.waiter.wake()
            return False
        self.used.discard(place)
        self.idle.append(place)
        return True

    def remove(self, place: Place) -> None:
        """The place's connection is gone, or leaves the pool."""
        if place in self.used:
            self.used.remove(place)
        elif place in self.idle:
            self.idle.remove(place)

    def take_idle(self) -> list[Place]:
        """All that are idle, used from now on: for the pool's own work on them."""
        places, self.idle = self.idle, []
        self.used.update(places)
        return places

    def fail_all(self, error: Callable[[], Exception]) -> None:
        """Nobody in the queue will get a place. Each gets an error of its own."""
        while self.queue:
            request = self.queue.popleft()
            request.error = error()
            request.waiter.wake()

    def beyond_max_size(self) -> Iterable[Place]:
        """Idle places that are too many since the pool was made smaller."""
        return self.idle[: max(0, self.size - self.max_size)]

    def superfluous(self, now: float, max_idle: float) -> Iterable[Place]:
        """Idle places beyond `min_size` that nobody has needed for so long, and expired ones."""
        spare = self.size - self.min_size
        for place in tuple(self.idle):  # the longest idle first
            if spare > 0 and place.idle_since + max_idle <= now:
                spare -= 1
                yield place
            elif place.expires_at <= now:
                yield place
