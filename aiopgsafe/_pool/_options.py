"""What a pool was told: psycopg_pool's parameters, checked at once."""

from __future__ import annotations

import warnings
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from inspect import isawaitable
from typing import Any, TypeAlias, cast

import psycopg
from psycopg.conninfo import conninfo_to_dict

from .._connection import AsyncConnection
from .._connection._async import reach_primary
from .._connection._released import prepare

Callback: TypeAlias = Callable[[Any], Awaitable[None]]
"""Is given a connection."""

Given: TypeAlias = Any
"""A value, or a function that gives it, synchronous or not."""


def check_sizes(min_size: int, max_size: int | None) -> tuple[int, int]:
    """As psycopg_pool has it: `max_size` is `min_size` if it isn't given."""
    if max_size is None:
        max_size = min_size
    for name, size in (("min_size", min_size), ("max_size", max_size)):
        check_count(name, size)
    if min_size < 0:
        raise ValueError("min_size cannot be negative")
    if max_size < min_size:
        raise ValueError(
            f"max_size must be greater or equal than min_size: {max_size} < {min_size}"
            " (4 if it isn't given)"
        )
    if min_size == max_size == 0:
        raise ValueError("if min_size is 0 max_size must be greater than 0")
    return min_size, max_size


def check_seconds(**values: float) -> None:
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name} is a number of seconds, not {type(value).__name__}")
        if not value >= 0:
            raise ValueError(f"{name} must be a number of seconds, not negative: {value}")


def check_count(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is an int, not {type(value).__name__}")


def check_options(
    connection_class: type[Any], num_workers: int, max_waiting: int, **seconds: float
) -> None:
    """Whether they are possible, and the class one of ours: we must clean it, and watch it."""
    check_seconds(**seconds)
    check_count("num_workers", num_workers)
    check_count("max_waiting", max_waiting)
    if max_waiting < 0:
        raise ValueError("max_waiting cannot be negative; 0: any number may wait")
    if num_workers < 1:
        raise ValueError("num_workers must be at least 1")
    if not issubclass(connection_class, AsyncConnection):
        raise TypeError(
            "connection_class must be aiopgsafe.AsyncConnection or a subclass of it,"
            f" not {connection_class.__module__}.{connection_class.__qualname__}"
        )
    prepare(connection_class)


def warn_of_constructor(name: str, stacklevel: int) -> None:
    """psycopg_pool's warning."""
    warnings.warn(
        f"opening the async pool {name} in the constructor is deprecated and will not be"
        " supported anymore in a future release. Please use `await pool.open()`, or use the"
        f" pool as context manager using: `async with {name}(...) as pool: `...",
        RuntimeWarning,
        stacklevel=stacklevel + 1,
    )


KEEPALIVE = {
    "connect_timeout": 10,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 20_000,
}
"""libpq's parameters, in seconds but the last one (ms), for a connection that only waits."""

LIBPQ = frozenset(option.keyword.decode() for option in psycopg.pq.Conninfo.get_defaults())


async def given_conninfo(given: Given) -> str:
    return await _given(given) or ""


async def given_kwargs(given: Given) -> dict[str, Any]:
    """A copy."""
    return dict(await _given(given) or {})


@dataclass(frozen=True, slots=True)
class ConnectOptions:
    """How to connect."""

    connection_class: type[AsyncConnection[Any]]
    conninfo: Given
    kwargs: Given
    configure: Callback | None

    async def connect(self) -> AsyncConnection[Any]:
        """A new connection, configured. Raises what connecting and `configure` raise."""
        kwargs = await given_kwargs(self.kwargs)
        conninfo = await given_conninfo(self.conninfo)
        conn = await self.connection_class.connect(conninfo, **kwargs)
        if callable(self.conninfo) or callable(self.kwargs):
            conn._reach = self._reach
        return conn

    async def _reach(self) -> AsyncConnection[Any]:
        """Where an outcome is asked for: what was given at connect may be of no use any more."""
        kwargs = await given_kwargs(self.kwargs)
        conninfo = await given_conninfo(self.conninfo)
        params = conninfo_to_dict(conninfo, **{k: v for k, v in kwargs.items() if k in LIBPQ})
        return await reach_primary("", **cast("dict[str, Any]", params))

    async def connect_to_listen(self, conninfo: str | None) -> AsyncConnection[Any]:
        """A connection of a listener's own, which finds out by itself that it is dead.

        :param conninfo: instead of the pool's.
        """
        kwargs = await given_kwargs(self.kwargs)
        conninfo = await given_conninfo(self.conninfo) if conninfo is None else conninfo
        given = conninfo_to_dict(conninfo, **{k: v for k, v in kwargs.items() if k in LIBPQ})
        kwargs |= {name: value for name, value in KEEPALIVE.items() if name not in given}
        return await self.connection_class.connect(conninfo, **{**kwargs, "autocommit": True})

    async def configured(self, conn: AsyncConnection[Any]) -> None:
        if self.configure is None:
            return
        await self.configure(conn)
        check_idle(conn, "configure", self.configure)


def check_idle(conn: AsyncConnection[Any], what: str, callback: object) -> None:
    """Raise unless a callback has left the connection idle."""
    status = conn.info.transaction_status
    if status is not psycopg.pq.TransactionStatus.IDLE:
        raise psycopg.ProgrammingError(
            f"connection left in status {status.name} by {what} function {callback}: discarded"
        )


async def _given(value: Given) -> Any:
    if callable(value):
        value = value()
        if isawaitable(value):
            value = await value
    return value
