"""Callbacks that a section sees through: what runs in them knows that it does."""

from __future__ import annotations

from contextvars import ContextVar

__all__ = ["CALL", "Call", "running_call"]


class Call:
    """A callback that runs. Tasks that it has started inherit it, and may outlive it.

    :ivar lent: a connection that the callback may use, and nobody whom it has started.
        Were it to wait for another one of the same pool, as many blocks as that has
        places would wait for each other.
    :ivar task: in which it runs.
    """

    __slots__ = ("lent", "over", "task")

    def __init__(self, lent: object) -> None:
        self.lent = lent
        self.over = False
        self.task: object = None

    def end(self) -> None:
        self.over = True
        self.lent = None


CALL: ContextVar[Call | None] = ContextVar("aiopgsafe_call", default=None)


def running_call() -> Call | None:
    """The callback that we are in, of a transaction that ends or of a pool."""
    call = CALL.get()
    return None if call is None or call.over else call
