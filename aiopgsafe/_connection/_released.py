"""What is left of a connection with whoever has given it back to the pool."""

from __future__ import annotations

from typing import Any, NoReturn, TypeVar
from weakref import ref

import psycopg

from .._errors import ConnectionReleased

ConnectionT = TypeVar("ConnectionT", bound=psycopg.AsyncConnection[Any])


def renewed(conn: ConnectionT) -> ConnectionT:
    """Move a connection to a new object; the old one refuses everything from now on.

    Whoever kept the old one, or a cursor or a transaction of it, would otherwise work
    on a connection that somebody else holds now.
    """
    cls = conn.__class__
    refusing = _classes.get(cls)
    if refusing is None:
        refusing = _classes[cls] = _refusing(cls)
    new = cls.__new__(cls)
    new.__dict__ = state = conn.__dict__
    state["_told"].owner = ref(new)
    conn.__dict__ = {}
    conn.__class__ = refusing
    return new


_classes: dict[type, Any] = {}


def _refusing(cls: type[ConnectionT]) -> Any:
    """The subclass of `cls` that refuses everything."""

    def refuse(self: object, *args: Any) -> NoReturn:
        raise ConnectionReleased(
            "the connection was given back to its pool: it may be somebody else's now"
        )

    def get(self: object, name: str) -> Any:
        # Python's own names are asked for by type(), repr() and debuggers.
        if name.startswith("__"):
            return object.__getattribute__(self, name)
        return refuse(self)

    return type(
        cls.__name__,
        (cls,),
        {
            "__module__": cls.__module__,
            "__doc__": "A connection that was given back to its pool.",
            "__getattribute__": get,
            "__setattr__": refuse,
            "__aenter__": refuse,
            "__repr__": lambda self: f"<{cls.__module__}.{cls.__name__} [released]>",
            "__del__": lambda self: None,
        },
    )
