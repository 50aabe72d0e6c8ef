"""What a transaction block is, in async code and in sync: a transaction, or a savepoint."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, Self

import psycopg
from psycopg import pq, sql
from psycopg.rows import Row
from psycopg.transaction import BaseTransaction, OutOfOrderTransactionNesting

from ._errors import ConnectionReleased, mark_retry, may_be_loss_of
from ._outcome import (
    ACTIVE,
    COMMITTED,
    COMMITTING,
    PENDING,
    ROLLED_BACK,
    UNKNOWN,
    TransactionState,
)
from ._session import Session
from ._unit import Callback, Unit

if TYPE_CHECKING:
    from psycopg.abc import PQGen

__all__ = ["STATUS", "BaseBlock"]

OK = pq.ConnStatus.OK
IDLE = pq.TransactionStatus.IDLE
INTRANS = pq.TransactionStatus.INTRANS


class BaseBlock(BaseTransaction[Any], Generic[Row]):
    """The part of a transaction block that waits for nothing."""

    def __init__(
        self,
        connection: Any,
        savepoint_name: str | None = None,
        force_rollback: bool = False,
        *,
        begin: bytes | None = None,
        commit_token: bool | None = None,
    ) -> None:
        super().__init__(connection, savepoint_name, force_rollback)
        self._session: Session = connection
        self._begin = begin
        self._name = savepoint_name or ""
        with_token = self._session.commit_token if commit_token is None else commit_token
        self._unit = Unit(with_token=with_token)
        self._outer: Any = None  # the `Transaction` around a savepoint
        self._is_savepoint = False
        self._savepoint = b""
        self._entered = False
        self._left = False
        self._orphaned = False  # what is around it was left before it
        # Of a savepoint; the outermost block's state is its unit's.
        self._state = PENDING
        self._released = False

    @property
    def state(self) -> TransactionState:
        """What is known of the transaction.

        A savepoint that was released is part of what is around it and shares its
        fate from then on.
        """
        if not self._is_savepoint:
            return self._unit.state
        if not self._released:
            ended = self._unit.state not in (ACTIVE, COMMITTING)
            return self._unit.state if ended and self._state is ACTIVE else self._state
        return self._outer.state if self._outer is not None else self._unit.state

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

    def _another(self) -> Self:
        """One like this, which isn't entered: each call of a decorated function has its own."""
        return type(self)(
            self._session,
            self._name or None,
            self.force_rollback,
            begin=self._begin,
            commit_token=self._unit.token is not None,
        )

    # Inside the block

    def on_commit(self, fn: Callable[..., object], *args: Any, **kwargs: Any) -> None:
        """Call ``fn(*args, **kwargs)`` once the transaction is committed, and only then.

        `fn` may be a function or an async function. Callbacks run one after the
        other in the order of their registration, shielded from cancellation and
        signals, before the block is left; an async one has ``commit_timeout``
        seconds. One that raises doesn't keep the others from running: the errors
        come out together as an ExceptionGroup, whose `outcome` is the transaction's
        `TransactionState`. Those of a savepoint run with the
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

    # Entering

    def _can_wait(self) -> bool:
        """Whether BEGIN, SAVEPOINT or RELEASE can ride on the next statement."""
        if self.pgconn.transaction_status not in (IDLE, INTRANS) and not self._session._undoing:
            return False
        name = self._name
        if not name:
            return True
        # One of a name that a block around it has, too, must be known to be there: ROLLBACK TO
        # would hit the other one.
        blocks = self._session._blocks
        return "\0" not in name and all(b is self or b._name != name for b in blocks)

    def _enter(self) -> None:
        """Queue BEGIN, or SAVEPOINT."""
        session = self._session
        blocks = session._blocks
        in_transaction = session._begin_waits is not None
        if blocks and not in_transaction and self.pgconn.transaction_status == IDLE:
            # As the outermost block it would be committed, whatever becomes of them.
            what = "has not begun: BEGIN failed" if session._unbegun else "has ended before it"
            raise psycopg.OperationalError(f"the transaction around the block {what}")
        self._is_savepoint = in_transaction or self.pgconn.transaction_status != IDLE
        if self._is_savepoint:
            if self._begin is not None:
                raise psycopg.ProgrammingError(
                    "isolation_level, read_only and deferrable are for the outermost block:"
                    " this one is a savepoint in a transaction that has begun"
                )
            self._name = self._name or f"_pg3_{len(blocks) + 1}"
            if blocks:
                self._outer = blocks[-1]
                self._unit = self._outer._unit
            else:
                # In a transaction that no block began: conn.commit() settles it.
                self._unit = session._unit = session._unit or Unit(ACTIVE, session.commit_token)
        else:
            session._unit = None  # of a transaction that ended without our commit()
            if session._queue or session._unbegun:
                session._forget_queue()
        if self._name:
            self._savepoint = self._sql("SAVEPOINT")
        # Before anything waits: torn in between, it is found there (`_enter_torn()`).
        session._push_block(self)
        if not self._is_savepoint:
            session._begin_waits = self._begin or b""
            session._by_hand = False
        if self._savepoint:
            session._queue.append(self._savepoint)
        self._entered = True
        self.status = self.Status.ACTIVE
        self._advance(ACTIVE)

    def _enter_gen(self) -> PQGen[None]:
        session = self._session
        time_left = session._time_left()  # in the task, before its generator waits elsewhere
        if self.pgconn.pipeline_status or self.pgconn.status != OK:
            yield from session._sync_gen()
        self._enter()
        self._entered = False
        yield from session._flush_gen(time_left)
        self._entered = True

    def _mark(self, exc: BaseException | None, lost: bool) -> None:
        """Note on what goes through the block whether its transaction may be run again.

        :param lost: whether the connection is. COMMIT was never sent: who sees the loss
            may begin anew.
        """
        if exc is not None and self._unit.state is UNKNOWN:
            mark_retry(exc, safe=False)
        elif (
            lost and isinstance(exc, psycopg.OperationalError) and may_be_loss_of(exc, self.pgconn)
        ):
            mark_retry(exc, safe=True)

    def _is_anothers(self, exc: BaseException | None) -> bool:
        """Whether the connection isn't in this block (any more), which `exc` goes through.

        Raises `ConnectionReleased` if none does, `psycopg.ProgrammingError` if it never was.
        """
        if self._entered and not self._left:
            return False
        if exc is None:
            if not self._entered:
                raise psycopg.ProgrammingError("the block was not entered")
            raise ConnectionReleased("the connection was given back inside the block")
        return True

    def _leave(self) -> None:
        """The connection is in this block no more: from here on it may be another's."""
        if not self._left:
            blocks = self._session._blocks
            if blocks and blocks[-1] is not self and self in blocks:
                # Left out of order: those inside are without it.
                for inner in blocks[blocks.index(self) + 1 :]:
                    inner._orphaned = True
            # In this order: torn between the two, it is done again.
            self._session._remove_block(self)
            self._left = True

    def _undo(self) -> list[bytes]:
        if self._is_savepoint:
            return [self._sql("ROLLBACK TO"), self._sql("RELEASE")]
        return [b"ROLLBACK"]

    def _sql(self, command: str) -> bytes:
        name = sql.Identifier(self._name).as_bytes(self._conn)
        return command.encode() + b" " + name

    def _advance(self, state: TransactionState) -> None:
        if self._is_savepoint:
            self._state = state
        elif self._unit.state is not state:
            self._unit.advance(state)

    def _end_as(self, state: TransactionState, status: psycopg.AsyncTransaction.Status) -> None:
        if self._is_savepoint or self._unit.state in (PENDING, ACTIVE):
            self._advance(state)
        self.status = status

    def _become_part(self) -> None:
        """Released: what is around the savepoint decides."""
        self._leave()
        self._released = True
        self.status = self.Status.COMMITTED
        for callback in self._unit.callbacks:
            if callback.owner is self:
                callback.owner = self._outer

    def _nesting_error(self) -> OutOfOrderTransactionNesting | None:
        blocks = self._session._blocks
        if not blocks or blocks[-1] is self:
            return None
        return OutOfOrderTransactionNesting(
            f"the block is left before one that was entered inside it: {self}"
        )


STATUS = {
    COMMITTED: psycopg.AsyncTransaction.Status.COMMITTED,
    ROLLED_BACK: psycopg.AsyncTransaction.Status.ROLLED_BACK_WITH_ERROR,
    UNKNOWN: psycopg.AsyncTransaction.Status.FAILED,
}
