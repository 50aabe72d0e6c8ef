"""Callbacks that a section sees through: what runs in them knows that it does."""

from __future__ import annotations

from contextvars import ContextVar

__all__ = ["CALL", "Call", "running_call"]


class Call:
    """A callback that runs. Tasks that it has started inherit it, and may outlive it."""

    __slots__ = ("over",)

    def __init__(self) -> None:
        self.over = False


CALL: ContextVar[Call | None] = ContextVar("aiopgsafe_call", default=None)


def running_call() -> Call | None:
    """The callback that we are in, of a transaction that ends or of a pool."""
    call = CALL.get()
    return None if call is None or call.over else call
