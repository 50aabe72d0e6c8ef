"""How a transaction block begins, and what it is: a transaction of the server, or a savepoint."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Generic, Self, cast

import psycopg
from psycopg import pq, sql
from psycopg.rows import Row

from ._backends import Expired
from ._ending import no_answer, roll_back, run
from ._errors import mark_retry, may_be_loss_of
from ._outcome import ACTIVE, COMMITTING, PENDING, ROLLED_BACK, UNKNOWN, TransactionState
from ._session import Session
from ._shield import Shield
from ._unit import Unit

if TYPE_CHECKING:
    from psycopg.abc import PQGen

__all__ = ["Entering"]

OK = pq.ConnStatus.OK
IDLE = pq.TransactionStatus.IDLE
INTRANS = pq.TransactionStatus.INTRANS


class Entering(psycopg.AsyncTransaction, Generic[Row]):
    """The part of `Transaction` up to its body."""

    def __init__(
        self,
        connection: psycopg.AsyncConnection[Row],
        savepoint_name: str | None = None,
        force_rollback: bool = False,
        *,
        begin: bytes | None = None,
        commit_token: bool | None = None,
    ) -> None:
        super().__init__(connection, savepoint_name, force_rollback)
        self._session: Session = connection  # type: ignore[assignment]  # a cast would be a call
        self._begin = begin
        self._name = savepoint_name or ""
        with_token = self._session.commit_token if commit_token is None else commit_token
        self._unit = Unit(with_token=with_token)
        self._outer: Any = None  # the `Transaction` around a savepoint
        self._is_savepoint = False
        self._savepoint = b""
        self._entered = False
        self._left = False
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
    def connection(self) -> psycopg.AsyncConnection[Any]:
        """The connection that the block runs on."""
        return cast("psycopg.AsyncConnection[Any]", self._session)

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
            session._begin_waits = self._begin or b""
            session._by_hand = False
        if self._name:
            self._savepoint = self._sql("SAVEPOINT")
            session._queue.append(self._savepoint)
        session._push_block(self)
        self._entered = True
        self.status = self.Status.ACTIVE
        self._advance(ACTIVE)

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

    def _leave(self) -> None:
        """The connection is in this block no more: from here on it may be another's."""
        if not self._left:
            self._left = True
            self._session._remove_block(self)

    def _undo(self) -> list[bytes]:
        if self._is_savepoint:
            return [self._sql("ROLLBACK TO"), self._sql("RELEASE")]
        return [b"ROLLBACK"]

    def _sql(self, command: str) -> bytes:
        name = sql.Identifier(self._name).as_bytes(self.connection)
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
