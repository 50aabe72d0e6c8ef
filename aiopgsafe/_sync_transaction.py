"""The transaction block of sync code."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from inspect import iscoroutinefunction
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, Self, TypeVar, cast, overload
from weakref import ref

import psycopg
from psycopg import pq
from psycopg.rows import Row, RowFactory

from ._base_block import STATUS, BaseBlock
from ._errors import goes_on
from ._outcome import ACTIVE, PENDING, ROLLED_BACK, UNKNOWN, TransactionState, ended_by_statement
from ._shield import GATE, Shield
from ._sync_ending import Ending, call_back
from ._sync_section import NO_LOOP, Calls, came_through, see_through

if TYPE_CHECKING:
    from psycopg.abc import Params, Query

__all__ = ["Block", "SyncTransaction"]

CursorRow = TypeVar("CursorRow")
P = ParamSpec("P")
T = TypeVar("T")

OK = pq.ConnStatus.OK


class Block(Generic[Row]):
    """What `Connection.transaction()` returns: a context manager, or decorator, of a transaction.

    An exception from nowhere may come at the first bytecode of `__exit__()`, and nobody leaves the
    block then. But the ``with`` lets go of it, and that ends it: as with psycopg's, a generator.

    It is a weak reference that sees it, which is gone where the block was left: a finaliser would
    run each time, and what a signal's handler raises in one, Python can only print.
    """

    __module__ = "aiopgsafe"
    __slots__ = ("__weakref__", "_tx")

    def __init__(self, tx: SyncTransaction[Row]) -> None:
        self._tx = tx

    def __enter__(self) -> SyncTransaction[Row]:
        tx = self._tx
        if tx._unit.state is not PENDING or tx._entered:
            raise TypeError("transaction blocks can be used only once")
        try:
            tx._held = ref(self, tx._let_go)
            tx.__enter__()
        except BaseException:
            try:
                tx._abandon()  # it may have been entered already
            except BaseException:
                tx._abandon()
                raise
            raise
        return tx

    def __copy__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> bool:
        return self._tx.__exit__(exc_type, exc, tb)

    def __call__(self, fn: Callable[P, T]) -> Callable[P, T]:
        """Decorate a function: each of its calls runs in a block of its own."""

        @wraps(fn)
        def in_block(*args: P.args, **kwargs: P.kwargs) -> T:
            with Block(self._tx._another()):
                return fn(*args, **kwargs)
            return cast("T", None)  # a Rollback that the block has swallowed

        return in_block


class SyncTransaction(BaseBlock[Row], psycopg.Transaction):
    """A transaction block of `Connection.transaction()`: `Transaction`, for ``with``.

    Callbacks are plain functions here.
    """

    __module__ = "aiopgsafe"

    _sent = False  # BEGIN or SAVEPOINT was, or is about to be
    _undone = False  # on the server; of a savepoint
    _releasing = b""  # that may wait already
    _calls: Calls | None = None  # of those for a rollback; of a savepoint
    _held: ref[Block[Any]] | None = None  # of the ``with`` that is to leave it

    @property
    def connection(self) -> psycopg.Connection[Any]:
        """The connection that the block runs on."""
        return cast("psycopg.Connection[Any]", self._session)

    # Entering

    def __enter__(self) -> Self:
        session: Any = self._session
        if self._unit.state is not PENDING or self._entered:
            raise TypeError("transaction blocks can be used only once")
        try:
            with session.lock:
                if self.pgconn.status == OK and self._can_wait():
                    self._enter()
                else:
                    self._enter_now()
            return self
        except BaseException:
            try:
                self._enter_torn()
            except BaseException:
                self._enter_torn()  # that was torn, too
                raise
            raise

    def _enter_torn(self) -> None:
        """Nobody will leave it."""
        session = self._session
        if self in session._blocks:
            if self._sent:
                self._undo_now()
            elif not self._is_savepoint:
                session._forget_queue()
            elif session._waits(self._savepoint):
                session._drop_from(self._savepoint)
            self._leave()
            self._end_as(ROLLED_BACK, self.Status.FAILED)

    def _enter_now(self) -> None:
        session: Any = self._session
        self._sent = True
        try:
            session._wait(self._enter_gen())
        except BaseException as exc:
            if self._entered or (session._failed and not self._is_savepoint):
                self._undo_now()
            self._leave()
            self._end_as(ROLLED_BACK, self.Status.FAILED)
            self._mark(exc, session.closed)
            raise

    # Inside the block

    def execute(
        self,
        query: Query,
        params: Params | None = None,
        *,
        prepare: bool | None = None,
        binary: bool | None = None,
    ) -> psycopg.Cursor[Row]:
        """Execute a statement of the transaction, as `Connection.execute()` does.

        Raises `psycopg.ProgrammingError` outside the block.
        """
        self._check_active("execute()")
        cur = cast("psycopg.Cursor[Row]", self.connection.cursor())
        return cur.execute(query, params, prepare=prepare, binary=binary)  # type: ignore[arg-type,misc]

    @overload
    def cursor(self, *, binary: bool = False) -> psycopg.Cursor[Row]: ...
    @overload
    def cursor(
        self, *, binary: bool = False, row_factory: RowFactory[CursorRow]
    ) -> psycopg.Cursor[CursorRow]: ...
    @overload
    def cursor(
        self,
        name: str,
        *,
        binary: bool = False,
        scrollable: bool | None = None,
        withhold: bool = False,
    ) -> psycopg.ServerCursor[Row]: ...
    @overload
    def cursor(
        self,
        name: str,
        *,
        binary: bool = False,
        row_factory: RowFactory[CursorRow],
        scrollable: bool | None = None,
        withhold: bool = False,
    ) -> psycopg.ServerCursor[CursorRow]: ...

    def cursor(self, name: str = "", **kwargs: Any) -> Any:
        """A cursor for statements of the transaction, as `Connection.cursor()` makes it.

        Raises `psycopg.ProgrammingError` outside the block.
        """
        self._check_active("cursor()")
        return self.connection.cursor(name, **kwargs)

    def _register(
        self,
        when: TransactionState,
        what: str,
        fn: Callable[..., object],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        if iscoroutinefunction(fn):
            raise TypeError(f"{what} takes a plain function here: nobody would await {fn!r}")
        if self._session._tpc is not None:
            raise psycopg.NotSupportedError(
                f"{what} in a two-phase transaction is for AsyncConnection: here nobody would call"
                " it, tpc_commit() and tpc_rollback() are psycopg's own"
            )
        super()._register(when, what, fn, args, kwargs)

    # Leaving

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> bool:
        try:
            try:
                if self._is_anothers(exc):
                    return False
                session: Any = self._session
                session._end_pipeline()
                return self._exit_savepoint(exc) if self._is_savepoint else self._exit(exc)
            except BaseException as raised:
                self._exit_torn(raised)
                raise
        except BaseException as raised:
            self._exit_torn(raised)  # that was torn, too
            if goes_on(exc, raised):
                return False
            raise

    def _abandon(self) -> None:
        """Nobody will leave it, if it was entered and not left."""
        if self in self._session._blocks:
            self._exit_torn(None)
        self._held = None

    def _let_go(self, _: object) -> None:
        try:
            self._abandon()
        except BaseException:
            self._abandon()  # that was torn, too
            raise

    def _leave(self) -> None:
        super()._leave()
        self._held = None

    def _exit_torn(self, exc: BaseException | None) -> None:
        """If `exc` came before the end had begun, nothing is left, either."""
        if self._left or not self._entered:
            return
        if self._is_savepoint:
            self._undo_now()
            self._end_as(ROLLED_BACK, self.Status.ROLLED_BACK_WITH_ERROR)
            try:
                self._call_back_undone(exc)
            finally:
                self._leave()
        else:
            self._roll_back(None)

    def _leave_torn(self, exc: BaseException) -> None:
        """Blocks inside, whose exit or entry `exc` has torn, are still there."""
        blocks = self._session._blocks
        through = came_through(exc, Block.__enter__.__code__, Block.__exit__.__code__)
        torn = [frame.f_locals["self"]._tx for frame in through]
        while self in blocks and blocks[-1] is not self and blocks[-1] in torn:
            inner = blocks[-1]
            inner._end_as(ROLLED_BACK, self.Status.ROLLED_BACK_WITH_ERROR)
            inner._leave()

    def _exit(self, exc: BaseException | None) -> bool:
        session, unit = self._session, self._unit
        swallowed = isinstance(exc, psycopg.Rollback) and exc.transaction in (None, self)
        if exc is not None:
            self._leave_torn(exc)
        error = self._nesting_error()
        lost = session.closed
        if exc is not None or self.force_rollback or error is not None or unit.state is not ACTIVE:
            try:
                self._roll_back(exc, going_through=None if swallowed else exc)
            finally:
                self._mark(exc, lost)
            if error is not None:
                raise error
            if exc is None and unit.state is UNKNOWN:
                raise ended_by_statement()
            return swallowed
        ending = Ending(session, unit, commit=True, undo=True, on_ended=self._on_ended)
        torn = see_through(ending)
        try:
            ending.finish(torn)
        except BaseException as raised:
            self._mark(raised, lost)
            raise
        return False

    def _roll_back(
        self, exc: BaseException | None, going_through: BaseException | None = None
    ) -> None:
        session, unit = self._session, self._unit
        if unit.state is ACTIVE and session._ended_elsewhere:
            unit.advance(UNKNOWN)
        explicitly = isinstance(exc, psycopg.Rollback) or self.force_rollback
        if explicitly:
            self.status = self.Status.ROLLED_BACK_EXPLICITLY
        ending = Ending(session, unit, commit=False, undo=True, on_ended=self._on_ended)
        ending.going_through = going_through
        ending.finish(see_through(ending))

    def _on_ended(self) -> None:
        self._leave()
        if self.status is self.Status.ACTIVE:
            self.status = STATUS.get(self._unit.state, self.Status.FAILED)

    # Savepoints: torn, they leave a transaction that is rolled back around them.

    def _exit_savepoint(self, exc: BaseException | None) -> bool:
        session: Any = self._session
        swallowed = isinstance(exc, psycopg.Rollback) and exc.transaction in (None, self)
        going_through = None if swallowed else exc
        if exc is not None:
            self._leave_torn(exc)
        error = self._nesting_error()
        lost = session.closed
        try:
            if error is not None:
                raise error
            if exc is None and not self.force_rollback:
                self._release()
            else:
                self._undo_now()
                explicitly = isinstance(exc, psycopg.Rollback) or self.force_rollback
                self._end_as(
                    ROLLED_BACK,
                    self.Status.ROLLED_BACK_EXPLICITLY
                    if explicitly
                    else self.Status.ROLLED_BACK_WITH_ERROR,
                )
        except BaseException as raised:
            going_through = raised
            if not self._released and self._state is ACTIVE:
                self._undo_now()
                self._end_as(ROLLED_BACK, self.Status.ROLLED_BACK_WITH_ERROR)
            self._mark(raised, lost)
            raise
        finally:
            try:
                self._call_back_undone(going_through)
            finally:
                self._leave()
                self._mark(exc, lost)
        return swallowed

    def _release(self) -> None:
        session: Any = self._session
        if session.closed or self._unit.state is not ACTIVE:
            raise psycopg.OperationalError("the transaction around the block has ended before it")
        self._releasing = release = self._sql("RELEASE")
        if self._can_wait() and not session._by_hand:
            if session._waits(self._savepoint):
                session._drop_from(self._savepoint)  # nothing was executed inside it
            else:
                session._queue.append(release)
        else:
            with session.lock:
                session._queue.append(release)
                session._wait(session._flush_gen())
        self._become_part()

    def _undo_now(self) -> None:
        """Undo on the server, or let the connection go: nothing stays. Signals wait for it."""
        shield = Shield(NO_LOOP)
        GATE.enter(shield, at_once=True)
        try:
            if not self._undone:
                self._undo_on_server()
                self._undone = True
        finally:
            if (signalled := GATE.leave(shield)) is not None:
                raise signalled

    def _undo_on_server(self) -> None:
        session: Any = self._session
        if self._is_savepoint and session._waits(self._savepoint):
            session._drop_from(self._savepoint)
        elif not session.closed and session._in_transaction:
            session._queue = [c for c in session._queue if c is not self._releasing]
            before: list[bytes] = []
            if self._is_savepoint and self._sql("RELEASE") in session._queue:
                before = [c for c in session._queue if not c.startswith(b"DEALLOCATE")]
            session._clear_queue()
            try:
                session._come_to_rest()
                session._wait(session._commands_gen([*before, *self._undo()]))
                session._forget_prepared()
            except psycopg.Error as exc:
                if not (self._is_savepoint and session._failed):  # what failed is never committed
                    session._drop(f"its rollback failed: {exc}")

    def _call_back_undone(self, going_through: BaseException | None) -> None:
        if self._state is ROLLED_BACK:
            # Torn before they are taken, it is called again.
            if self._calls is None:
                self._calls = Calls(cb.fn for cb in self._unit.undone(self))
            self._unit.take(self)
            call_back("savepoint", ROLLED_BACK, self._calls, going_through)
