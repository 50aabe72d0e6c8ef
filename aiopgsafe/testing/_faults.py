"""What a proxy can do to a connection, and the faults that wait for their messages."""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import anyio.to_thread

from ._loop import Loop
from ._protocol import Direction, Matcher, Message, Piece

When = Literal["before", "after"]


@dataclass(frozen=True)
class Delay:
    """Hold the message, and all that follow it in this direction of this connection.

    It goes on `seconds` after it came in (with `when="after"`: those behind it go on `seconds`
    after it went on). So a Delay on every message is a longer way: it doesn't add up.
    """

    seconds: float


@dataclass(frozen=True)
class Freeze:
    """From here on nothing passes on this connection in either direction, not even its end.

    Both sockets stay open. `Fault.release` lets everything go on where it stopped.
    """


@dataclass(frozen=True)
class Cut:
    """Cut the connection.

    :ivar how: "rst": the client sees a reset; "fin": an end of file.
    :ivar server: cut the server's side in the same way. If False, it stays open until
        `Fault.release`: a network partition, in which the server goes on and finds nobody gone.
        (The proxy reads what it sends and throws that away.)
    """

    how: Literal["rst", "fin"] = "rst"
    server: bool = True


Action = Delay | Freeze | Cut


@dataclass
class Stats:
    """What a proxy has seen since its start or `reset_stats`.

    :ivar connections: client connections that sent a StartupMessage.
    :ivar open_connections: those of them that are open now.
    :ivar cancel_requests: CancelRequests.
    :ivar frontend_messages: messages passed on to the server, by type letter ("" for those of
        the startup phase, which have none).
    :ivar backend_messages: messages passed on to the client, likewise.
    :ivar round_trips: how many times a client spoke again after the server had spoken; its
        goodbye (Terminate) isn't counted.
    """

    connections: int = 0
    open_connections: int = 0
    cancel_requests: int = 0
    frontend_messages: Counter[str] = field(default_factory=Counter)
    backend_messages: Counter[str] = field(default_factory=Counter)
    round_trips: int = 0


class Fault:
    """An action that waits for its message; made by `FaultProxy.inject`.

    Its methods may be called from every thread. After the proxy was closed `release` and
    `remove` do nothing.

    :ivar action: what it does;
    :ivar when: "before" or "after" the message is passed on.
    """

    def __init__(
        self,
        faults: Faults,
        action: Action,
        matcher: Matcher,
        direction: Direction | None = None,
        when: When = "before",
        times: int | None = None,
    ) -> None:
        self.action = action
        self.when = when
        self._faults = faults
        self._matcher = matcher
        self._direction = direction
        self._left = math.inf if times is None else times
        self._condition = threading.Condition()  # guards what follows
        self._hits = 0
        self._waited = 0
        self._error: Exception | None = None

    def __repr__(self) -> str:
        return f"<Fault {self.action}, {self._hits} hits>"

    @property
    def hits(self) -> int:
        """How many times the action has begun."""
        return self._hits

    def wait(self, timeout: float = 10.0) -> None:
        """Block until the action has begun once more than waited for so far.

        Then a Cut is done, a Freeze in force, a Delay running.

        :param timeout: seconds.
        :raises TimeoutError: it hasn't.
        :raises RuntimeError: the predicate raised an exception (the cause); the fault is removed.
        """
        deadline = time.monotonic() + timeout
        while not self._take_hit():
            self._await_hit(deadline)

    async def reached(self, timeout: float = 10.0) -> None:
        """`wait` for asynchronous code, on asyncio and trio."""
        deadline = time.monotonic() + timeout
        # The thread only looks. If we are cancelled it is left behind, and must not take a hit
        # away from the next who waits.
        while not self._take_hit():
            await anyio.to_thread.run_sync(self._await_hit, deadline, abandon_on_cancel=True)

    def release(self) -> None:
        """Let go what the fault holds now. It still acts on the messages to come.

        Ends the Freezes and Delays that are on; closes the server's side of `Cut(server=False)`.
        """
        self._faults.loop.call_if_running(partial(self._faults.release, self))

    def remove(self) -> None:
        """No longer act on messages. What the fault holds now remains held until `release`."""
        self._faults.loop.call_if_running(partial(self._faults.disarm, self))

    def _take_hit(self) -> bool:
        with self._condition:
            if self._waited < self._hits:
                self._waited += 1
                return True
            if self._error is not None:
                raise RuntimeError(f"the predicate of {self} failed") from self._error
            return False

    def _await_hit(self, deadline: float) -> None:
        with self._condition:
            while self._waited >= self._hits and self._error is None:
                if not self._condition.wait(deadline - time.monotonic()):
                    raise TimeoutError(f"{self}: not reached in time")


class Faults:
    """The faults of one proxy: those that wait for messages, and what each of them holds.

    It belongs to the loop's thread.
    """

    def __init__(self, loop: Loop) -> None:
        self.loop = loop
        self._armed: list[Fault] = []
        # For what is held (anything) and each fault that holds it: to be called on release.
        self._held: dict[object, dict[Fault, Callable[[], object]]] = {}

    def arm(self, fault: Fault) -> None:
        self._armed.append(fault)

    def disarm(self, fault: Fault) -> None:
        if fault in self._armed:
            self._armed.remove(fault)

    def _concerned(self, direction: Direction, letter: str) -> list[Fault]:
        return [
            fault
            for fault in self._armed
            if fault._direction in (None, direction) and fault._matcher.may_match(direction, letter)
        ]

    def need_whole(self, direction: Direction, letter: str) -> bool:
        """Whether a long message must not go on in pieces."""
        return any(fault._matcher.needs_payload for fault in self._concerned(direction, letter))

    def meet(self, direction: Direction, piece: Piece) -> list[Fault]:
        """Return the faults that the message meets, and count down their `times`."""
        met = []
        for fault in self._concerned(direction, piece.type):
            if fault._matcher.needs_payload and not piece.last:
                continue  # injected when this long message was already on its way
            try:
                if not fault._matcher(Message(direction, piece.type, piece.payload)):
                    continue
            except Exception as error:
                self.disarm(fault)
                with fault._condition:
                    fault._error = error
                    fault._condition.notify_all()
                continue
            met.append(fault)
            fault._left -= 1
            if not fault._left:
                self.disarm(fault)
        return met

    def hit(self, fault: Fault) -> None:
        """Tell those who wait that the action has begun."""
        with fault._condition:
            fault._hits += 1
            fault._condition.notify_all()

    def hold(self, held: object, fault: Fault, on_release: Callable[[], object]) -> None:
        self._held.setdefault(held, {})[fault] = on_release

    def holds(self, held: object) -> bool:
        """Whether a fault holds it."""
        return held in self._held

    def forget(self, held: object) -> Iterable[Callable[[], object]]:
        """Hold it no longer, and return what was to be called on release."""
        return self._held.pop(held, {}).values()

    def release(self, fault: Fault) -> None:
        released = []
        for held, holders in list(self._held.items()):
            if fault in holders:
                released.append(holders.pop(fault))
                if not holders:
                    self.forget(held)
        for on_release in released:  # which may hold anew
            on_release()

    def clear(self) -> None:
        """Remove all faults, and release all that is held."""
        self._armed.clear()
        while self._held:
            for on_release in self.forget(next(iter(self._held))):
                on_release()
