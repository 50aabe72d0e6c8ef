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
    refusing, slots = _classes.get(cls) or prepare(cls)
    new = cls.__new__(cls)
    for name in slots:
        if hasattr(conn, name):
            setattr(new, name, getattr(conn, name))
    new.__dict__ = state = conn.__dict__
    state["_told"].owner = ref(new)
    conn.__dict__ = {}
    conn.__class__ = refusing
    return new


def prepare(cls: type[psycopg.AsyncConnection[Any]]) -> tuple[Any, tuple[str, ...]]:
    """Make the class that refuses beforehand: what it raises is the programmer's."""
    if cls not in _classes:
        refusing = _refusing(cls)
        slots = [vars(base).get("__slots__", ()) for base in cls.__mro__]
        names = [name for some in slots for name in ([some] if isinstance(some, str) else some)]
        _classes[cls] = refusing, tuple(n for n in names if n not in ("__dict__", "__weakref__"))
    return _classes[cls]


_classes: dict[type, tuple[Any, tuple[str, ...]]] = {}


def _refusing(cls: type[ConnectionT]) -> Any:
    """The subclass of `cls` that refuses everything."""

    def refuse(self: object, *args: Any) -> NoReturn:
        raise ConnectionReleased(
            "the connection was given back to its pool: it may be somebody else's now"
        )

    async def close(self: object) -> None:
        """Its holder has no connection any more: there is nothing to close."""

    def get(self: object, name: str) -> Any:
        # Python's own names are asked for by type(), repr() and debuggers.
        if name.startswith("__") or name == "close":
            return object.__getattribute__(self, name)
        return True if name == "closed" else refuse(self)

    return type(
        cls.__name__,
        (cls,),
        {
            "__module__": cls.__module__,
            "__doc__": "A connection that was given back to its pool.",
            "__getattribute__": get,
            "__setattr__": refuse,
            "__aenter__": refuse,
            "close": close,
            "__repr__": lambda self: f"<{cls.__module__}.{cls.__name__} [released]>",
            "__del__": lambda self: None,
        },
    )
