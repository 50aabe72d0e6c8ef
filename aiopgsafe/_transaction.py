"""The transaction block: savepoints, callbacks, and what is known of it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine
from functools import wraps
from types import TracebackType
from typing import TYPE_CHECKING, Any, ParamSpec, Self, TypeVar, cast, overload

import psycopg
from psycopg import pq
from psycopg.rows import AsyncRowFactory, Row

from ._backends import Expired
from ._base_block import STATUS, BaseBlock
from ._ending import Section, commit, no_answer, roll_back, run
from ._outcome import ACTIVE, PENDING, ROLLED_BACK, UNKNOWN, ended_by_statement
from ._shield import Shield

if TYPE_CHECKING:
    from psycopg.abc import Params, Query

__all__ = ["Transaction"]

OK = pq.ConnStatus.OK

CursorRow = TypeVar("CursorRow")
P = ParamSpec("P")
T = TypeVar("T")


class Transaction(BaseBlock[Row], psycopg.AsyncTransaction):
    """A transaction block: what `AsyncConnection.transaction()` returns.

    ``async with`` it. A block that ends normally is committed. A block that
    raises is not committed, except where the exception is a cancellation (or a
    signal's exception) that arrived while COMMIT was in flight and was held back
    until the outcome was known: `state` and the exception's note then say
    COMMITTED.

    Inside another block (or a transaction begun otherwise) it is a savepoint.
    """

    __module__ = "aiopgsafe"

    @property
    def connection(self) -> psycopg.AsyncConnection[Any]:
        """The connection that the block runs on."""
        return cast("psycopg.AsyncConnection[Any]", self._session)

    def __call__(self, fn: Callable[P, Awaitable[T]]) -> Callable[P, Coroutine[Any, Any, T]]:
        """Decorate a function: each of its calls runs in a block of its own, as with psycopg's."""

        @wraps(fn)
        async def in_block(*args: P.args, **kwargs: P.kwargs) -> T:
            async with self._another():
                return await fn(*args, **kwargs)
            return cast("T", None)  # a Rollback that the block has swallowed

        return in_block

    # Entering

    async def __aenter__(self) -> Self:
        session, pgconn = self._session, self.pgconn
        lock = session.lock
        if not lock.try_acquire():
            await lock.acquire()
        try:
            if self._unit.state is not PENDING:
                raise TypeError("transaction blocks can be used only once")
            if pgconn.status == OK and not pgconn.pipeline_status and self._can_wait():
                session._channel.check()
                self._enter()
            else:
                await self._enter_now()
        finally:
            lock.release()
        return self

    async def _enter_now(self) -> None:
        """In a pipeline; or where the server has to say why not."""
        session = self._session
        # BEGIN and SAVEPOINT take no time: an interruption waits for the answer
        # and then undoes it, instead of racing a cancel request against it.
        shield = Shield(session._backend, grace=session.cancel_timeout)
        try:
            await run(session, shield, self._enter_gen())
            if shield.held is not None:
                raise shield.held
        except GeneratorExit:  # the coroutine is destroyed, its loop is gone
            raise
        except BaseException as error:
            exc: BaseException = error
            if isinstance(exc, Expired):
                session._drop("no answer to BEGIN")
            elif self._entered or (session._failed and not self._is_savepoint):
                await roll_back(session, shield, self._undo())
            elif not isinstance(exc, Exception):
                # It hit the generator itself: what the server makes of it is open.
                session._drop("interrupted in BEGIN")
            self._leave()
            self._end_as(ROLLED_BACK, self.Status.FAILED)
            if isinstance(exc, Expired):
                exc = no_answer("BEGIN", session.commit_timeout)
            self._mark(exc, session.closed)
            if shield.held is not None and shield.held is not exc:
                raise shield.held from exc
            raise exc from None

    # Inside the block

    async def execute(
        self,
        query: Query,
        params: Params | None = None,
        *,
        prepare: bool | None = None,
        binary: bool | None = None,
    ) -> psycopg.AsyncCursor[Row]:
        """Execute a statement of the transaction, as `AsyncConnection.execute()` does.

        Raises `psycopg.ProgrammingError` outside the block.
        """
        self._check_active("execute()")
        cur = cast("psycopg.AsyncCursor[Row]", self.connection.cursor())
        return await cur.execute(query, params, prepare=prepare, binary=binary)  # type: ignore[arg-type,misc]

    @overload
    def cursor(self, *, binary: bool = False) -> psycopg.AsyncCursor[Row]: ...
    @overload
    def cursor(
        self, *, binary: bool = False, row_factory: AsyncRowFactory[CursorRow]
    ) -> psycopg.AsyncCursor[CursorRow]: ...
    @overload
    def cursor(
        self,
        name: str,
        *,
        binary: bool = False,
        scrollable: bool | None = None,
        withhold: bool = False,
    ) -> psycopg.AsyncServerCursor[Row]: ...
    @overload
    def cursor(
        self,
        name: str,
        *,
        binary: bool = False,
        row_factory: AsyncRowFactory[CursorRow],
        scrollable: bool | None = None,
        withhold: bool = False,
    ) -> psycopg.AsyncServerCursor[CursorRow]: ...

    def cursor(self, name: str = "", **kwargs: Any) -> Any:
        """A cursor for statements of the transaction, as `AsyncConnection.cursor()` makes it.

        Raises `psycopg.ProgrammingError` outside the block.
        """
        self._check_active("cursor()")
        return self.connection.cursor(name, **kwargs)

    # Leaving

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> bool:
        if self._is_anothers(exc):
            return False
        if exc is not None or (self.force_rollback and not self.pgconn.pipeline_status):
            swallowed = isinstance(exc, psycopg.Rollback) and exc.transaction in (None, self)
            lost = self._session.closed
            try:
                await self._roll_back(exc, going_through=None if swallowed else exc)
            finally:
                self._mark(exc, lost)
            return swallowed
        session, unit = self._session, self._unit
        try:
            if self.pgconn.pipeline_status:
                # What its statements say counts as raised in the block.
                async with session.lock:
                    await self.connection.wait(session._sync_gen())
            if (error := self._nesting_error()) is not None:
                raise error
            if self.force_rollback:
                await self._roll_back(None, going_through=None)
            elif self._is_savepoint:
                await self._release()
            elif unit.state is UNKNOWN:
                await self._roll_back(None, going_through=None)
                raise ended_by_statement()
            else:
                await commit(session, unit, session._block_commit_gen(unit), self)
        except BaseException as exc:
            if unit.state is ACTIVE and not self._released:
                # COMMIT was not sent: interrupted, or refused, before.
                lost = session.closed
                await self._roll_back(exc, going_through=exc)
                self._mark(exc, lost)
            raise
        finally:
            self._leave()
            if self.status is self.Status.ACTIVE:
                self.status = STATUS.get(unit.state, self.Status.FAILED)
            if self._state is ACTIVE and not self._released:
                # What is around the savepoint ended before it, out of order.
                self._state = unit.state
        return False

    async def _release(self) -> None:
        """RELEASE SAVEPOINT. If the server refuses, the caller rolls back to it."""
        session = self._session
        if session.closed or self._unit.state is not ACTIVE:
            raise psycopg.OperationalError("the transaction around the block has ended before it")
        release = self._sql("RELEASE")
        if not self.pgconn.pipeline_status and self._can_wait() and not session._by_hand:
            if session._waits(self._savepoint):
                session._drop_from(self._savepoint)  # nothing was executed inside it
            else:
                session._queue.append(release)
            self._become_part()
            return
        async with Section(session) as section:
            try:
                session._queue.append(release)
                await run(session, section.shield, session._flush_gen())
            except Expired:
                session._drop("no answer to RELEASE")
                section.error = no_answer("RELEASE", session.commit_timeout)
            except psycopg.Error as exc:
                section.error = exc
            else:
                self._become_part()
            section.what = "savepoint"
            section.outcome = "part of its transaction" if self._released else "not released"

    async def _undo_on_server(self, shield: Shield, *, later: bool) -> None:
        """As far as it knows of the block.

        :param later: whether it may wait for the next statement, where nothing waits for it.
        """
        session = self._session
        queue = session._queue
        if not self._is_savepoint and session._begin_waits is not None:
            session._forget_queue()
        elif self._is_savepoint and session._waits(self._savepoint):
            session._drop_from(self._savepoint)
        elif not (self._is_savepoint and later and session._undo_later(self._undo())):
            # RELEASE of blocks inside it: superfluous, unless one of them has our name.
            before: list[bytes] = []
            if self._is_savepoint and self._sql("RELEASE") in queue:
                before = [command for command in queue if not command.startswith(b"DEALLOCATE")]
            session._clear_queue()
            await roll_back(session, shield, [*before, *self._undo()])
            if not self._is_savepoint:
                session._forget_queue()

    async def _roll_back(
        self, exc: BaseException | None, going_through: BaseException | None
    ) -> None:
        session, unit = self._session, self._unit
        async with Section(session) as section:
            if isinstance(exc, session._backend.interruptions):
                section.shield.hold_back(exc)
            section.going_through = going_through
            section.error = self._nesting_error()
            self._leave()
            if unit.state is ACTIVE and session._ended_elsewhere:
                unit.advance(UNKNOWN)
            if unit.state is ACTIVE:
                later = exc is None or isinstance(exc, Exception)
                await self._undo_on_server(section.shield, later=later)
            elif not self._is_savepoint and session._in_transaction:
                # Begun by who has ended ours (COMMIT AND CHAIN): nobody else will end it.
                await roll_back(session, section.shield, [b"ROLLBACK"])
            explicitly = isinstance(exc, psycopg.Rollback) or self.force_rollback
            self._end_as(
                ROLLED_BACK,
                self.Status.ROLLED_BACK_EXPLICITLY
                if explicitly
                else self.Status.ROLLED_BACK_WITH_ERROR,
            )
            section.what = "savepoint" if self._is_savepoint else "transaction"
            section.outcome = self.state
            section.callbacks = unit.take(self if self._is_savepoint else None)
            if not self._is_savepoint:
                section.unit = unit
