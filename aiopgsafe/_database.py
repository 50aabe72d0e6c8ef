"""What an application opens once: a pool, transactions that know each other, an orderly end."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine
from contextlib import AbstractContextManager
from contextvars import ContextVar
from functools import partial, wraps
from inspect import iscoroutinefunction
from signal import SIGTERM
from types import TracebackType
from typing import TYPE_CHECKING, Any, ParamSpec, Self, TypeVar, cast, overload

import psycopg
from psycopg import IsolationLevel
from psycopg.rows import TupleRow

from ._backends import Background
from ._connection import AsyncConnection
from ._draining import Drain
from ._outcome import TransactionState
from ._pool import AsyncConnectionPool
from ._pool._lease import Lease
from ._pool._options import check_seconds
from ._signals import Arrival, watching
from ._transaction import Transaction

if TYPE_CHECKING:
    from psycopg.abc import Params, Query

__all__ = ["Database"]

P = ParamSpec("P")
T = TypeVar("T")

ACTIVE = TransactionState.ACTIVE

Conn = AsyncConnection[TupleRow]
Tx = Transaction[TupleRow]


class Database:
    """A database, as an application opens it once.

    ::

        async with Database("dbname=app", max_size=20) as db:
            async with db.transaction() as tx:
                await tx.execute("insert into job values (%s)", (1,))
                tx.on_commit(print, "committed")

    The parameters of `AsyncConnectionPool`, and those of `AsyncConnection.connect()`
    for its connections. Usable in the event loop that opened it.
    """

    __module__ = "aiopgsafe"

    def __init__(
        self,
        conninfo: str | Callable[[], str] | Callable[[], Awaitable[str]] = "",
        *,
        connection_class: type[Conn] = AsyncConnection,
        min_size: int = 4,
        max_size: int | None = None,
        configure: Callable[[Conn], Awaitable[None]] | None = None,
        check: Callable[[Conn], Awaitable[None]] | None = None,
        reset: Callable[[Conn], Awaitable[None]] | None = None,
        name: str | None = None,
        timeout: float = 30.0,
        max_waiting: int = 0,
        max_lifetime: float = 60 * 60.0,
        max_idle: float = 10 * 60.0,
        reconnect_timeout: float = 5 * 60.0,
        reconnect_failed: Callable[[Any], object] | None = None,
        num_workers: int = 3,
        **kwargs: Any,
    ) -> None:
        self.pool: AsyncConnectionPool[Conn] = AsyncConnectionPool(
            conninfo,
            connection_class=connection_class,
            kwargs=kwargs,
            min_size=min_size,
            max_size=max_size,
            open=False,
            configure=configure,
            check=check,
            reset=reset,
            name=name,
            timeout=timeout,
            max_waiting=max_waiting,
            max_lifetime=max_lifetime,
            max_idle=max_idle,
            reconnect_timeout=reconnect_timeout,
            reconnect_failed=reconnect_failed,
            num_workers=num_workers,
        )
        self._drain: Drain | None = None

    def __repr__(self) -> str:
        return f"<aiopgsafe.Database {self.pool.name!r} at 0x{id(self):x}>"

    # Opening and closing

    async def open(self, wait: bool = True) -> None:
        """Open it, in the running event loop.

        :param wait: make the first connection before anything else, and raise why that
            isn't possible, at once. False: open in any case, and connect in the background.

        Raises what `AsyncConnection.connect()` does, `psycopg.InterfaceError` if it is open
        already, `PoolClosed` if it has been closed.
        """
        if not self.pool.closed:
            raise psycopg.InterfaceError(f"{self!r} is open already")
        if wait:
            await self.pool._open_with_first()
        else:
            await self.pool.open()

    async def close(self) -> None:
        """Close it. What still runs may end; its connections are closed when it has."""
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

    def connection(self, timeout: float | None = None) -> Lease[Conn]:
        """A connection for a block: `AsyncConnectionPool.connection()`."""
        return self.pool.connection(timeout)

    def transaction(
        self,
        *,
        isolation_level: IsolationLevel | int | None = None,
        read_only: bool | None = None,
        deferrable: bool | None = None,
        timeout: float | None = None,
    ) -> Block:
        """A transaction for a block: ``async with db.transaction() as tx``.

        Inside another one of the same task it is a savepoint of that. A task that was
        started inside one gets a transaction, and a connection, of its own.

        :param isolation_level: and
        :param read_only: and
        :param deferrable: as in `AsyncConnection.transaction()`.
        :param timeout: seconds to wait for a connection; None: the pool's.

        Entering raises what `connection()` and `AsyncConnection.transaction()` do.
        """
        options = {}
        if (isolation_level, read_only, deferrable) != (None, None, None):
            options = {
                "isolation_level": isolation_level,
                "read_only": read_only,
                "deferrable": deferrable,
            }
        return Block(self, timeout, options)

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
        timeout: float | None = None,
    ) -> Callable[[Callable[P, Coroutine[Any, Any, T]]], Callable[P, Coroutine[Any, Any, T]]]: ...

    def atomic(self, fn: Any = None, /, **options: Any) -> Any:
        """Decorate an async function: each call of it is a `transaction()`, with these options.

        ``@db.atomic`` or ``@db.atomic(isolation_level=...)``. What it calls through the
        database (`execute()`, `transaction()`, other atomic functions) belongs to it.

        Raises `TypeError` for what is no async function.
        """
        if fn is None:
            return partial(self._atomic, **options)
        return self._atomic(fn)

    def _atomic(self, fn: Callable[..., Any], **options: Any) -> Any:
        if not iscoroutinefunction(fn):
            raise TypeError(f"atomic() takes an async function, not {fn!r}")
        self.transaction(**options)  # what is wrong with them is wrong now

        @wraps(fn)
        async def in_transaction(*args: Any, **kwargs: Any) -> Any:
            async with self.transaction(**options):
                return await fn(*args, **kwargs)

        return in_transaction

    async def execute(
        self, query: Query, params: Params | None = None
    ) -> psycopg.AsyncCursor[TupleRow]:
        """Execute one statement; its result is in the cursor that is returned.

        Inside a `transaction()` of the same task it belongs to that. Otherwise it is a
        transaction of its own, in autocommit mode: a cancellation that arrives while it
        runs doesn't say whether it was committed. Use a transaction where that matters.
        """
        tx = ambient(self)
        if tx is not None:
            return await tx.execute(query, params)
        async with self.connection() as conn:
            autocommit, conn._autocommit = conn._autocommit, True
            try:
                return await conn.execute(cast("Any", query), params)
            finally:
                conn._autocommit = autocommit

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
            self._drain = Drain(self.pool, grace)
        else:
            self._drain.shorten(grace)
        await self._drain.wait()

    def drain_on_signal(self, *signals: int, grace: float = 30.0) -> AbstractContextManager[None]:
        """Let the first of `signals` drain the database, during a ``with`` block.

        A second one cuts the grace short. When everything is closed, the program's own
        handler gets the signal; as well every further one.

        :param signals: as in `signal`; SIGTERM if none is given.
        :param grace: seconds, as in `drain()`.

        Entering raises `RuntimeError` outside of the main thread.
        """
        check_seconds(grace=grace)
        backend = self.pool._check_usable()
        return watching(signals or (SIGTERM,), backend, DrainWatch(self, grace))


class DrainWatch:
    """Asked when the signal arrives: the first drains, the second cuts the grace short."""

    def __init__(self, db: Database, grace: float) -> None:
        self._db = db
        self._grace = grace
        self._arrivals = 0
        self._drained = False
        self._job: Background[None] | None = None

    def __call__(self, arrival: Arrival) -> bool:
        if self._drained or self._arrivals == 2:
            return False
        self._arrivals += 1
        backend = self._db.pool._own_backend()
        backend.run_sync_soon(self._begin if self._arrivals == 1 else self._hurry, arrival)
        return True

    def _begin(self, arrival: Arrival) -> None:
        backend = self._db.pool._own_backend()
        self._job = backend.background(partial(self._run, arrival))

    def _hurry(self, arrival: Arrival) -> None:
        if self._db._drain is not None:
            self._db._drain.shorten(0)
        arrival.hit()

    async def _run(self, arrival: Arrival) -> None:
        try:
            await self._db.drain(self._grace)
        finally:
            # Of several databases the last one passes it on.
            self._drained = True
            arrival.go_on()


class Frame:
    """A transaction that a task is in, and the one around it.

    Blocks in generators are left in another order than they were entered, and in other
    tasks: a frame that was left counts for nothing, wherever it stands.
    """

    __slots__ = ("around", "db", "left", "task", "tx")

    def __init__(self, db: Database, tx: Tx, around: Frame | None) -> None:
        self.db = db
        self.task = db.pool._own_backend().current_task()
        self.tx = tx
        self.around = around
        self.left = False


_frame: ContextVar[Frame | None] = ContextVar("aiopgsafe_frame", default=None)
"""Inherited by child tasks, in which it counts for nothing: see `Frame.task`."""


def ambient(db: Database) -> Tx | None:
    """The running task's innermost transaction on `db`, if it is in one."""
    frame = _frame.get()
    if frame is None:
        return None
    db.pool._check_loop()
    task = db.pool._own_backend().current_task()
    while frame is not None:
        if frame.db is db and frame.task is task and frame.tx.state is ACTIVE and not frame.left:
            return frame.tx
        frame = frame.around
    return None


class Block:
    """``async with`` it: what `Database.transaction()` returns."""

    __slots__ = ("_db", "_entered", "_frame", "_lease", "_options", "_timeout", "_tx")

    def __init__(self, db: Database, timeout: float | None, options: dict[str, Any]) -> None:
        self._db = db
        self._timeout = timeout
        self._options = options
        self._entered = False
        self._lease: Lease[Conn] | None = None
        self._tx: Tx | None = None
        self._frame: Frame | None = None

    async def __aenter__(self) -> Tx:
        if self._entered:
            raise TypeError("transaction blocks can be used only once")
        self._entered = True
        db = self._db
        outer = ambient(db)
        if outer is not None:
            conn = cast("Conn", outer.connection)
            self._tx = await conn.transaction(**self._options).__aenter__()
        else:
            self._lease = lease = db.connection(self._timeout)
            conn = await lease.__aenter__()
            try:
                self._tx = await conn.transaction(**self._options).__aenter__()
            except BaseException as exc:
                await lease.__aexit__(type(exc), exc, exc.__traceback__)
                raise
        self._frame = Frame(db, self._tx, _frame.get())
        _frame.set(self._frame)
        return self._tx

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> bool:
        assert self._tx is not None
        assert self._frame is not None
        # Not `reset()`: a fixture's end may run in another context than its beginning.
        self._frame.left = True
        innermost = _frame.get()
        while innermost is not None and innermost.left:
            innermost = innermost.around
        _frame.set(innermost)
        lease = self._lease
        try:
            swallowed = await self._tx.__aexit__(exc_type, exc, tb)
        except BaseException as error:
            if lease is not None:
                await lease.__aexit__(type(error), error, error.__traceback__)
            raise
        if lease is not None:
            await lease.__aexit__(None if swallowed else exc_type, exc, tb)
        return swallowed
