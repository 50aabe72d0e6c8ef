"""What an application opens once: a pool, transactions that know each other, an orderly end."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import AbstractContextManager
from functools import partial, wraps
from inspect import iscoroutinefunction
from itertools import count
from signal import SIGTERM
from time import monotonic
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, Self, TypeAlias, TypeVar, cast, overload

import psycopg
from psycopg import IsolationLevel
from psycopg.rows import AsyncRowFactory, Row
from psycopg_pool import PoolClosed

from ._blocks import Attempt, Block, ambient
from ._connection import AsyncConnection
from ._connection._connecting import check_timeout
from ._connection._generators import isolation
from ._draining import Drain, StopWatch, draining_on
from ._listener import Hub, Subscription, check_channel, check_payload
from ._pool import AsyncConnectionPool
from ._pool._lease import Lease
from ._pool._options import check_seconds
from ._retry import Retry, retrying
from ._transaction import Transaction

if TYPE_CHECKING:
    from psycopg.abc import Params, Query

__all__ = ["Database"]

P = ParamSpec("P")
T = TypeVar("T")

Pool: TypeAlias = AsyncConnectionPool[AsyncConnection[Row]]

_numbers = count(1)

STOP_TIMEOUT = 5.0
"""Seconds for the listener to end when the database is closed."""


class Database(Generic[Row]):
    """A database, as an application opens it once.

    ::

        async with Database("dbname=app", max_size=20) as db:
            async with db.transaction() as tx:
                await tx.execute("insert into job values (%s)", (1,))
                tx.on_commit(print, "committed")

    The parameters of `AsyncConnectionPool`, and those of `AsyncConnection.connect()`
    for its connections. Usable in the event loop that opened it.

    :param listen_conninfo: where `listen()` connects to, if not where the pool does: past
        a connection pooler in transaction mode, through which no notification comes.
    :param heartbeat: seconds between two questions of the listener to the server,
    :param heartbeat_timeout: and seconds for each answer, after which it connects anew.
    """

    __module__ = "aiopgsafe"

    def __init__(
        self,
        conninfo: str | Callable[[], str] | Callable[[], Awaitable[str]] = "",
        *,
        connection_class: type[AsyncConnection[Row]] | None = None,
        min_size: int = 4,
        max_size: int | None = None,
        configure: Callable[[AsyncConnection[Row]], Awaitable[None]] | None = None,
        check: Callable[[AsyncConnection[Row]], Awaitable[None]] | None = None,
        reset: Callable[[AsyncConnection[Row]], Awaitable[None]] | None = None,
        name: str | None = None,
        timeout: float = 30.0,
        max_waiting: int = 0,
        max_lifetime: float = 60 * 60.0,
        max_idle: float = 10 * 60.0,
        reconnect_timeout: float = 5 * 60.0,
        reconnect_failed: Callable[[Any], object] | None = None,
        num_workers: int = 3,
        row_factory: AsyncRowFactory[Row] | None = None,
        listen_conninfo: str | None = None,
        heartbeat: float = 10.0,
        heartbeat_timeout: float = 5.0,
        **kwargs: Any,
    ) -> None:
        check_timeout("heartbeat", heartbeat)
        check_timeout("heartbeat_timeout", heartbeat_timeout)
        if row_factory is not None:
            kwargs["row_factory"] = row_factory
        self._new_pool: Callable[[], Pool[Row]] = partial(
            AsyncConnectionPool,
            conninfo,
            connection_class=connection_class or AsyncConnection,
            kwargs=kwargs,
            min_size=min_size,
            max_size=max_size,
            open=False,
            configure=configure,
            check=check,
            reset=reset,
            name=name or f"database-{next(_numbers)}",
            timeout=timeout,
            max_waiting=max_waiting,
            max_lifetime=max_lifetime,
            max_idle=max_idle,
            reconnect_timeout=reconnect_timeout,
            reconnect_failed=reconnect_failed,
            num_workers=num_workers,
        )
        self.pool: Pool[Row] = self._new_pool()
        """Its pool; another one each time it is opened."""
        self._listen_conninfo = listen_conninfo
        self._heartbeat = heartbeat, heartbeat_timeout
        self._hub: Hub | None = None
        self._drain: Drain | None = None

    def __repr__(self) -> str:
        return f"<aiopgsafe.Database {self.pool.name!r} at 0x{id(self):x}>"

    # Opening and closing

    async def open(self, wait: bool = True) -> None:
        """Open it, in the running event loop.

        :param wait: make the first connection before anything else, and raise why that
            isn't possible, at once. False: open in any case, and connect in the background.

        It may be closed and opened again, in another event loop, too.

        Raises what `AsyncConnection.connect()` does, `psycopg.InterfaceError` if it is open
        already; `PoolClosed` if it is closed meanwhile.
        """
        if self.pool._used_up:
            if not self.pool.closed:
                self.pool._abandon()
                if self._hub is not None:
                    self._hub.abandon()
            self.pool = self._new_pool()
            self._hub = self._drain = None
        if not self.pool.closed:
            raise psycopg.InterfaceError(f"{self!r} is open already")
        if wait:
            await self.pool._open_with_first()
        else:
            await self.pool.open()

    async def close(self) -> None:
        """Close it. What still runs may end; its connections are closed when it has."""
        try:
            await self._stop_listening()
        finally:
            await self.pool.close()

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        await self.close()

    # Work

    def connection(self, timeout: float | None = None) -> Lease[AsyncConnection[Row]]:
        """A connection for a block: `AsyncConnectionPool.connection()`."""
        return self.pool.connection(timeout)

    def transaction(
        self,
        *,
        isolation_level: IsolationLevel | int | None = None,
        read_only: bool | None = None,
        deferrable: bool | None = None,
        commit_token: bool | None = None,
        timeout: float | None = None,
    ) -> Block[Row]:
        """A transaction for a block: ``async with db.transaction() as tx``.

        Inside another one of the same task it is a savepoint of that. A task that was
        started inside one gets a transaction, and a connection, of its own.

        :param isolation_level: and
        :param read_only: and
        :param deferrable: and
        :param commit_token: as in `AsyncConnection.transaction()`.
        :param timeout: seconds to wait for a connection; None: the pool's.

        Inside another one they must be as that one's, or not given.

        Raises `ValueError` for an unknown isolation level. Entering raises what
        `connection()` and `AsyncConnection.transaction()` do.
        """
        if isolation_level is not None:
            isolation_level = isolation(isolation_level)
        options: dict[str, Any] = {}
        if (isolation_level, read_only, deferrable) != (None, None, None):
            options = {
                "isolation_level": isolation_level,
                "read_only": read_only,
                "deferrable": deferrable,
            }
        if commit_token is not None:
            options["commit_token"] = commit_token
        return Block(self.pool, timeout, options)

    @overload
    def atomic(
        self, fn: Callable[P, Coroutine[Any, Any, T]], /
    ) -> Callable[P, Coroutine[Any, Any, T]]: ...
    @overload
    def atomic(
        self,
        /,
        *,
        isolation_level: IsolationLevel | int | None = None,
        read_only: bool | None = None,
        deferrable: bool | None = None,
        commit_token: bool | None = None,
        timeout: float | None = None,
        retry: Retry | None = None,
    ) -> Callable[[Callable[P, Coroutine[Any, Any, T]]], Callable[P, Coroutine[Any, Any, T]]]: ...

    def atomic(
        self,
        fn: Any = None,
        /,
        *,
        isolation_level: IsolationLevel | int | None = None,
        read_only: bool | None = None,
        deferrable: bool | None = None,
        commit_token: bool | None = None,
        timeout: float | None = None,
        retry: Retry | None = None,
    ) -> Any:
        """Decorate an async function: each call of it is a `transaction()`, with these options.

        ``@db.atomic`` or ``@db.atomic(isolation_level=...)``. What it calls through the
        database (`execute()`, `transaction()`, other atomic functions) belongs to it.

        :param retry: run it again, in a fresh transaction, after serialization failures,
            deadlocks and lost connections: see `Retry`. Not within another transaction,
            of which it is a part then: only the outermost can be run again.

        Raises `TypeError` for what is no async function.
        """
        if retry is not None and not isinstance(retry, Retry):
            raise TypeError(f"retry is a Retry, not {type(retry).__name__}")
        options: dict[str, Any] = {
            "isolation_level": isolation_level,
            "read_only": read_only,
            "deferrable": deferrable,
            "commit_token": commit_token,
            "timeout": timeout,
        }
        self.transaction(**options)  # what is wrong with them is wrong now
        decorate: Callable[[Any], Any] = partial(self._atomic, retry=retry, **options)
        return decorate if fn is None else decorate(fn)

    def _atomic(self, fn: Callable[..., Any], retry: Retry | None, **options: Any) -> Any:
        if not iscoroutinefunction(fn):
            raise TypeError(f"atomic() takes an async function, not {fn!r}")

        @wraps(fn)
        async def in_transaction(*args: Any, **kwargs: Any) -> Any:
            attempt = Attempt(partial(self.transaction, **options), partial(fn, *args, **kwargs))
            if retry is None or ambient(self.pool) is not None:
                return await attempt()
            backend = self.pool._check_usable()
            return await retrying(retry, backend, fn.__qualname__, attempt)

        return in_transaction

    def on_commit(self, fn: Callable[..., object], *args: Any, **kwargs: Any) -> None:
        """`Transaction.on_commit()` of the transaction that the running task is in.

        Raises `psycopg.ProgrammingError` if it is in none.
        """
        self._ambient("on_commit()").on_commit(fn, *args, **kwargs)

    def on_rollback(self, fn: Callable[..., object], *args: Any, **kwargs: Any) -> None:
        """`Transaction.on_rollback()` of the transaction that the running task is in.

        Raises `psycopg.ProgrammingError` if it is in none.
        """
        self._ambient("on_rollback()").on_rollback(fn, *args, **kwargs)

    def _ambient(self, what: str) -> Transaction[Row]:
        tx = ambient(self.pool)
        if tx is None:
            raise psycopg.ProgrammingError(f"{what} is for use inside a transaction()")
        return tx

    async def execute(self, query: Query, params: Params | None = None) -> psycopg.AsyncCursor[Row]:
        """Execute one statement; its result is in the cursor that is returned.

        Inside a `transaction()` of the same task it belongs to that. Otherwise it is a
        transaction of its own, in autocommit mode: a cancellation that arrives while it
        runs doesn't say whether it was committed. Use a transaction where that matters.
        """
        tx = ambient(self.pool)
        if tx is not None:
            return await tx.execute(query, params)
        async with self.connection() as conn:
            autocommit, conn._autocommit = conn._autocommit, True
            try:
                return await conn.execute(cast("Any", query), params)
            finally:
                conn._autocommit = autocommit

    # What the watchers see

    def listen(self, *channels: str, max_buffer: int = 1000) -> Subscription:
        """Subscribe to notifications: ``async with db.listen("a", "b") as subscription``.

        Iterate over it (``async for``): it yields `Notify`, and `Gap` where some may have
        been missed because the connection was lost. All subscribers share one connection
        beside the pool's; the server has confirmed the LISTEN when the block is entered.

        :param channels: the names, at least one, exactly as NOTIFY gives them.
        :param max_buffer: notifications that may wait for this subscriber. When there are
            more for a second it gets those, and then a `psycopg.OperationalError`; others
            don't notice.

        Raises `ValueError` or `TypeError` for a bad name or `max_buffer`. Entering raises
        what connecting does; `psycopg.NotSupportedError` where a connection pooler in
        transaction mode keeps notifications from arriving; `Draining`, `PoolClosed`.
        """
        return Subscription(self._find_hub, channels, max_buffer)

    def _find_hub(self) -> Hub:
        backend = self.pool._check_usable()
        if self._hub is None:
            connect = partial(self.pool._connector.connect_to_listen, self._listen_conninfo)
            health = self.pool._health
            # What is silent on another way says nothing about the pool's.
            on_silence = health.down if self._listen_conninfo is None else health.look
            self._hub = Hub(connect, backend, health, on_silence, *self._heartbeat)
        return self._hub

    async def _stop_listening(self) -> None:
        if self._hub is not None:
            await self._hub.close(monotonic() + STOP_TIMEOUT)

    async def notify(self, channel: str, payload: str = "") -> None:
        """Send a notification. In a `transaction()` of the same task it goes with its COMMIT.

        :param payload: less than 8000 bytes (PostgreSQL documentation, NOTIFY).

        Raises `ValueError` or `TypeError` for a bad channel or payload, before anything
        is sent.
        """
        check_channel(channel)
        check_payload(payload)
        await self.execute("select pg_notify(%s, %s)", (channel, payload))

    @property
    def available(self) -> bool:
        """Whether the database can be reached, as far as its connections' watchers know."""
        return self.pool._health.available

    async def wait_unavailable(self) -> None:
        """Wait until it is not `available`; at once if it isn't."""
        backend = self.pool._own_backend()
        self.pool._check_loop()
        while self.available:
            await self.pool._health.change(backend)

    async def wait_available(self) -> None:
        """Wait until it is `available`; at once if it is. Raises `PoolClosed`."""
        pool, backend = self.pool, self.pool._own_backend()
        pool._check_loop()
        pool._places.probing += 1
        try:
            while not self.available:
                if pool.closed:
                    raise PoolClosed("the database is closed")
                pool._connector.grow()
                await pool._health.change(backend)
        finally:
            pool._places.probing -= 1

    # An orderly end

    @property
    def draining(self) -> bool:
        """Whether nothing new is begun any more."""
        return self._drain is not None

    async def drain(self, grace: float = 30.0) -> None:
        """Finish what runs, begin nothing new, and close.

        From now on new connections and transactions raise `Draining`; what runs has
        `grace` seconds to end, nested blocks and callbacks included. After that running
        statements are cancelled on the server and their transactions rolled back.
        COMMITs that have been sent are waited for in any case.

        Called again while it drains, a shorter `grace` counts; both return at the end.

        :param grace: seconds.

        Raises `ValueError` for a negative `grace`.
        """
        check_seconds(grace=grace)
        self.pool._check_loop()
        if self._drain is None:
            self._drain = Drain(self.pool, grace, self._stop_listening)
        else:
            self._drain.shorten(grace)
        await self._drain.wait()

    def _stop_watch(self, grace: float, signals: Sequence[int]) -> StopWatch:
        """For a server that this is part of: see `fastapi.lifespan()`."""
        backend = self.pool._check_usable()
        return StopWatch(backend, self._stop_listening, self.drain, grace, signals)

    def drain_on_signal(self, *signals: int, grace: float = 30.0) -> AbstractContextManager[None]:
        """Let the first of `signals` drain the database, during a ``with`` block.

        A second one cuts the grace short. When everything is closed, the program's own
        handler gets the signal. Without one the block is left then: its body is cancelled
        (as by a cancel scope) if it still waits, and the program goes on behind it. Every
        further signal is the program's.

        :param signals: as in `signal`; SIGTERM if none is given.
        :param grace: seconds, as in `drain()`.

        Entering raises `RuntimeError` outside of the main thread, `ValueError` for a signal
        that can't be caught.
        """
        check_seconds(grace=grace)
        backend = self.pool._check_usable()
        return draining_on(signals or (SIGTERM,), backend, self.drain, grace)
