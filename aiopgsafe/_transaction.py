"""The transaction block: savepoints, callbacks, and what is known of it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar, cast, overload

import psycopg
from psycopg import pq
from psycopg.rows import AsyncRowFactory, Row
from psycopg.transaction import OutOfOrderTransactionNesting

from ._backends import Expired
from ._ending import Section, commit, no_answer, roll_back, run
from ._entering import Entering
from ._outcome import (
    ACTIVE,
    COMMITTED,
    ROLLED_BACK,
    UNKNOWN,
    TransactionState,
    ended_by_statement,
)
from ._shield import Shield
from ._unit import Callback

if TYPE_CHECKING:
    from psycopg.abc import Params, Query

__all__ = ["Transaction"]

OK = pq.ConnStatus.OK
IDLE = pq.TransactionStatus.IDLE
INTRANS = pq.TransactionStatus.INTRANS


CursorRow = TypeVar("CursorRow")


class Transaction(Entering[Row]):
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
    def xid(self) -> int | None:
        """The transaction's number on the server (`xid8`); None while it isn't known.

        It is read in one round trip with the first INSERT, UPDATE, DELETE or MERGE.
        """
        return self._unit.xid

    def ticket(self) -> str:
        """By which `resolve_commit()` can find out what became of the transaction, later.

        To be kept, in a file or elsewhere, before the block ends: for a program that may be
        killed in COMMIT. It is known after the first INSERT, UPDATE, DELETE or MERGE; with
        ``commit_token=True`` from the beginning.

        With a token it is the block's end (or `AsyncConnection.commit()`) that makes it true:
        a statement that is COMMIT itself is refused from then on.

        Raises `psycopg.NotSupportedError` where outcomes can't be asked for (`aiopgsafe doctor`
        tells why), in a two-phase transaction (its coordinator knows), and with a token in one
        that only reads; `psycopg.ProgrammingError` before the first such statement.
        """
        return str(self._session._ticket(self._unit))

    @property
    def savepoint_name(self) -> str | None:
        """The name of the savepoint; empty for a block that has none."""
        return self._name

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

    def on_commit(self, fn: Callable[..., object], *args: Any, **kwargs: Any) -> None:
        """Call ``fn(*args, **kwargs)`` once the transaction is committed, and only then.

        `fn` may be a function or an async function. Callbacks run one after the
        other in the order of their registration, shielded from cancellation and
        signals, before the block is left; an async one has ``commit_timeout``
        seconds. One that raises doesn't keep the others from running: the errors
        come out together as an ExceptionGroup. Those of a savepoint run with the
        outermost COMMIT, or never if it is rolled back.

        Raises `TypeError` if `fn` is not callable, `psycopg.ProgrammingError`
        outside the block.
        """
        self._register(COMMITTED, "on_commit()", fn, args, kwargs)

    def on_rollback(self, fn: Callable[..., object], *args: Any, **kwargs: Any) -> None:
        """Call ``fn(*args, **kwargs)`` once the block, or one around it, is rolled back.

        Otherwise as `on_commit()`. An exception that goes through the block stays
        what it is: the callbacks' errors are logged, and noted on it.
        """
        self._register(ROLLED_BACK, "on_rollback()", fn, args, kwargs)

    def _register(
        self,
        when: TransactionState,
        what: str,
        fn: Callable[..., object],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        if not callable(fn):
            raise TypeError(f"{what} takes a function, not {type(fn).__name__}")
        self._check_active(what)
        if args or kwargs:
            fn = partial(fn, *args, **kwargs)
        self._unit.callbacks.append(Callback(self, when, fn))

    def _check_active(self, what: str) -> None:
        if self.state is not ACTIVE or self._released:
            raise psycopg.ProgrammingError(
                f"{what} is for use inside the block: its transaction is {self.state.value}"
            )

    # Leaving

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> bool:
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
                self.status = _STATUS.get(unit.state, self.Status.FAILED)
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

    def _become_part(self) -> None:
        """Released: what is around the savepoint decides."""
        self._leave()
        self._released = True
        self.status = self.Status.COMMITTED
        for callback in self._unit.callbacks:
            if callback.owner is self:
                callback.owner = self._outer

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

    def _nesting_error(self) -> OutOfOrderTransactionNesting | None:
        blocks = self._session._blocks
        if not blocks or blocks[-1] is self:
            return None
        return OutOfOrderTransactionNesting(
            f"the block is left before one that was entered inside it: {self}"
        )


_STATUS = {
    COMMITTED: psycopg.AsyncTransaction.Status.COMMITTED,
    ROLLED_BACK: psycopg.AsyncTransaction.Status.ROLLED_BACK_WITH_ERROR,
    UNKNOWN: psycopg.AsyncTransaction.Status.FAILED,
}
