"""Transactions of a database: a block inside another one of the same task is a savepoint."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from types import TracebackType
from typing import Any, Generic, NoReturn, TypeAlias, TypeVar, cast

from psycopg.rows import Row

from ._connection import AsyncConnection
from ._outcome import TransactionState
from ._pool import AsyncConnectionPool
from ._pool._lease import Lease
from ._transaction import Transaction

__all__ = ["Attempt", "Block", "ambient"]

T = TypeVar("T")

Pool: TypeAlias = AsyncConnectionPool[AsyncConnection[Row]]
Options = dict[str, Any]


class Frame:
    """A transaction that a task is in, and the one around it.

    Blocks in generators are left in another order than they were entered, and in other
    tasks: a frame that was left counts for nothing, wherever it stands.
    """

    __slots__ = ("around", "left", "options", "pool", "task", "tx")

    def __init__(
        self, pool: Pool[Any], tx: Transaction[Any], options: Options, around: Frame | None
    ) -> None:
        self.pool = pool
        self.options = options
        self.task = pool._own_backend().current_task()
        self.tx = tx
        self.around = around
        self.left = False


_frame: ContextVar[Frame | None] = ContextVar("aiopgsafe_frame", default=None)
"""Inherited by child tasks, in which it counts for nothing: see `Frame.task`."""


def ambient(pool: Pool[Row]) -> Transaction[Row] | None:
    """The running task's innermost transaction on `pool`, if it is in one."""
    frame = ambient_frame(pool)
    return None if frame is None else frame.tx


def ambient_frame(pool: Pool[Any]) -> Frame | None:
    frame = _frame.get()
    if frame is None:
        return None
    pool._check_loop()
    task = pool._own_backend().current_task()
    while frame is not None:
        if frame.pool is pool and frame.task is task and not frame.left:
            return frame
        frame = frame.around
    return None


class Block(Generic[Row]):
    """``async with`` it: what `Database.transaction()` returns."""

    __slots__ = ("_entered", "_frame", "_lease", "_options", "_pool", "_timeout", "_tx")

    def __init__(self, pool: Pool[Row], timeout: float | None, options: Options) -> None:
        self._pool = pool
        self._timeout = timeout
        self._options = options
        self._entered = False
        self._lease: Lease[AsyncConnection[Row]] | None = None
        self._tx: Transaction[Row] | None = None
        self._frame: Frame | None = None

    @property
    def state(self) -> TransactionState:
        """What is known of its transaction."""
        return TransactionState.PENDING if self._tx is None else self._tx.state

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(
            f"{name!r} is the transaction's: `async with db.transaction() as tx` gives it"
        )

    async def __aenter__(self) -> Transaction[Row]:
        if self._entered:
            raise TypeError("transaction blocks can be used only once")
        self._entered = True
        outer = ambient_frame(self._pool)
        if outer is not None:
            outer.tx._check_active("transaction()")
            conn = cast("AsyncConnection[Row]", outer.tx.connection)
            # A savepoint has none of its own: those of its transaction are fine.
            options = {} if self._options == outer.options else self._options
            self._tx = await conn.transaction(**options).__aenter__()
        else:
            self._lease = lease = self._pool.connection(self._timeout)
            conn = await lease.__aenter__()
            try:
                self._tx = await conn.transaction(**self._options).__aenter__()
            except BaseException as exc:
                await lease.__aexit__(type(exc), exc, exc.__traceback__)
                raise
            self._tx._unit.give_back = lease.give_back
        begun = self._options if outer is None else outer.options
        self._frame = Frame(self._pool, self._tx, begun, _frame.get())
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


class Attempt(Generic[T]):
    """A function's run in a transaction, each time it is called."""

    def __init__(
        self, new_block: Callable[[], Block[Any]], work: Callable[[], Awaitable[T]]
    ) -> None:
        self._new_block = new_block
        self._work = work
        self._block = new_block()

    @property
    def state(self) -> TransactionState:
        return self._block.state

    async def __call__(self) -> T:
        self._block = self._new_block()
        async with self._block:
            return await self._work()
        return cast("T", None)  # psycopg.Rollback ended it
