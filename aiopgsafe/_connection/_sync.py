"""The drop-in for `psycopg.Connection`: sync code, whose COMMIT no signal can tear."""

from __future__ import annotations

import logging
from functools import partial
from threading import get_ident
from time import monotonic
from typing import TYPE_CHECKING, Any, Self, TypeVar, cast

import psycopg
from psycopg import IsolationLevel, errors, pq, waiting
from psycopg.abc import ConnParam
from psycopg.rows import Row, RowFactory, tuple_row

from .. import _backends
from .._errors import goes_on, mark_lost
from .._outcome import COMMITTED, COMMITTING, UNKNOWN, TransactionState
from .._resolver import Origin
from .._shield import GATE, Shield
from .._sync_ending import Ending, call_back
from .._sync_section import NO_LOOP, Calls, see_through
from .._sync_transaction import Block, SyncTransaction
from .._unit import Unit
from ._asking import Reach, look_up
from ._async import reach_primary
from ._connecting import add_option, check_timeout
from ._generators import EndingGenerators, begin_as
from ._statements import ENDS, NOTED, STREAMS, ending_statement, name_of, traits_of
from ._sync_cursor import Cursor
from ._together import drain_gen, over_gen, rest_gen

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

    from psycopg.abc import AdaptContext, PQGen
    from psycopg.pq.abc import PGconn

    from .._resolver import Ticket, Token

__all__ = ["Connection"]

logger = logging.getLogger("aiopgsafe")

RV = TypeVar("RV")

OK = pq.ConnStatus.OK
ACTIVE = pq.TransactionStatus.ACTIVE
IDLE = pq.TransactionStatus.IDLE
INTRANS = pq.TransactionStatus.INTRANS
ONLY_COMMIT = (b"COMMIT",)
OF_COPY = ("copy_from", "copy_to", "copy_end")
"""Generators of a COPY that has begun."""

INTERVAL = 0.1
"""Seconds after which psycopg looks whether a signal has come."""


class Connection(EndingGenerators[Row], psycopg.Connection[Row]):
    """A connection to the server: `psycopg.Connection`, with endings that nothing can tear.

    The same methods with the same meanings, and these promises more: a COMMIT that has been
    sent is waited for whatever exception a signal handler raises, or another thread
    (`PyThreadState_SetAsyncExc`); its outcome is what the server said, the callbacks of the
    transaction have run, and only then the exception goes on, unchanged. A statement that such an
    exception interrupts is cancelled on the server, and leaves the connection usable.

    A signal that is sent once more by somebody who would not wait (a second after the first one)
    ends the waiting: the outcome is unknown then, and said to be.

    :param commit_timeout: seconds that the server has to answer COMMIT or ROLLBACK; after that
        the connection is closed.
    :param cancel_timeout: seconds that it has to end a cancelled statement.
    :param commit_token: see `AsyncConnection`.

    Exact with psycopg's C implementation (``psycopg[binary]`` or ``psycopg[c]``).
    """

    __module__ = "aiopgsafe"

    commit_timeout: float = 30.0
    cancel_timeout: float = 5.0
    commit_token: bool = False

    _reach: Reach
    _driver = 0  # the thread whose statement was sent last

    def __init__(
        self,
        pgconn: PGconn,
        row_factory: RowFactory[Row] = cast("RowFactory[Row]", tuple_row),  # noqa: B008
    ) -> None:
        super().__init__(pgconn, row_factory)
        self._set_up_riding()
        self.cursor_factory = Cursor

    @classmethod
    def connect(  # type: ignore[override]  # more keywords, of our own
        cls,
        conninfo: str = "",
        *,
        autocommit: bool = False,
        prepare_threshold: int | None = 5,
        context: AdaptContext | None = None,
        row_factory: RowFactory[Row] | None = None,
        cursor_factory: type[psycopg.Cursor[Row]] | None = None,
        commit_timeout: float = 30.0,
        cancel_timeout: float = 5.0,
        statement_timeout: float | None = None,
        commit_token: bool = False,
        **kwargs: ConnParam,
    ) -> Self:
        """Connect to the server, as `psycopg.Connection.connect()` does.

        :param commit_timeout: see the class; seconds, positive and finite.
        :param cancel_timeout: see the class; seconds, positive and finite.
        :param statement_timeout: seconds that the server lets a statement run; COMMIT is exempt.
        :param commit_token: see the class.

        Raises `ValueError` or `TypeError` for a bad timeout, and what psycopg's does.
        """
        check_timeout("commit_timeout", commit_timeout)
        check_timeout("cancel_timeout", cancel_timeout)
        params = cls._get_connection_params(conninfo, **kwargs)
        reach = partial(reach_primary, "", **cast("dict[str, Any]", params))
        if statement_timeout is not None:
            check_timeout("statement_timeout", statement_timeout)
            add_option(params, f"-c statement_timeout={max(1, round(statement_timeout * 1000))}")
        conn = super().connect(
            "",
            autocommit=autocommit,
            prepare_threshold=prepare_threshold,
            context=context,
            row_factory=row_factory,
            cursor_factory=cursor_factory,
            **params,
        )
        conn.commit_timeout = commit_timeout
        conn.cancel_timeout = cancel_timeout
        conn.commit_token = commit_token
        conn._reach = reach
        conn._statement_timeout = statement_timeout
        conn._limited = statement_timeout is not None
        if str(params.get("replication", "off")).lower() not in ("off", "false", "no", "0"):
            conn._rides, conn._origin = 0, False
        return conn

    # Waiting

    def wait(self, gen: PQGen[RV], interval: float = INTERVAL, timeout: float | None = None) -> RV:
        """Drive a generator that operates on the connection to its end.

        Interrupted by an exception from elsewhere, it cancels the statement on the server and
        takes what the server still says.
        """
        found = traits_of(gen)
        if found & NOTED:
            self._note(found)
        if not found & (ENDS | STREAMS):
            return self._wait(gen, interval, timeout)
        try:
            result = self._wait(gen, interval, timeout)
        except BaseException as exc:
            if found & ENDS:
                self._ended_by_statement(exc)
            raise
        finally:
            if found & STREAMS:  # BEGIN may have gone before it, and knows of those before that
                self._streamed = True
        if found & ENDS:
            self._ended_by_statement(None)
        return result

    def _wait(self, gen: PQGen[RV], interval: float = INTERVAL, timeout: float | None = None) -> RV:
        self._driver = get_ident()
        try:
            return waiting.wait(gen, self.pgconn.socket, interval=interval, timeout=timeout)
        except errors._WaitTimeout:
            raise
        except psycopg.Error as exc:
            if isinstance(exc, psycopg.OperationalError) and self.pgconn.status != OK:
                mark_lost(exc, self.pgconn)
            raise
        except BaseException as exc:
            self._stop_statement(gen, exc)
            raise

    def _stop_statement(self, gen: PQGen[Any], exc: BaseException) -> None:
        """Leave nothing of a statement that `exc` interrupts, on the server or in libpq.

        Raises what the handlers raise of signals that have come meanwhile.
        """
        shield = Shield(NO_LOOP)
        GATE.enter(shield, at_once=True)
        try:
            if not self._busy:
                self._forget_interrupted()
            elif ending_statement(gen) is not None:
                # The program's own COMMIT: what the server decides must not be hidden.
                self._take_rest(drain_gen(self.pgconn), monotonic() + self.commit_timeout)
                exc.add_note("aiopgsafe: the statement was COMMIT or ROLLBACK; it was waited for")
            elif name_of(gen) not in OF_COPY:  # Copy's own exit ends it: psycopg knows more
                self._come_to_rest()
        finally:
            signalled = GATE.leave(shield)
            if signalled is not None and not goes_on(exc, signalled):
                raise signalled

    @property
    def _busy(self) -> bool:
        """Whether something is in flight that no pipeline of the program's will end."""
        pipelined = self.pgconn.pipeline_status and not self._pipeline
        return bool(pipelined) or self.pgconn.transaction_status == ACTIVE

    def _come_to_rest(self) -> None:
        """Cancel what is in flight, if anything is, and take what is left of it.

        A COPY or a stream that nobody has ended, too.
        """
        deadline = monotonic() + self.cancel_timeout
        while self._busy and self.pgconn.status == OK:
            if monotonic() > deadline:
                self._drop(f"a statement did not end within {self.cancel_timeout:g} seconds")
                return
            if self.pgconn.transaction_status == ACTIVE:
                self._try_cancel(timeout=self.cancel_timeout)
            gen = rest_gen if self.pgconn.pipeline_status else over_gen
            self._take_rest(gen(self.pgconn), deadline)
        self._forget_interrupted()

    def _end_pipeline(self) -> None:
        """One that was begun inside a block, and torn: nobody will leave it."""
        if self._pipeline is not None:
            self._pipeline = None
            self._come_to_rest()

    def _try_cancel(self, *, timeout: float = 5.0) -> None:
        """psycopg's, which keeps no time limit of the program's to itself."""
        try:
            self.cancel_safe(timeout=timeout)
        except psycopg.Error as exc:
            logger.warning("query cancellation failed: %s", exc)

    def _take_rest(self, rest: PQGen[None], deadline: float) -> None:
        left = max(deadline - monotonic(), 0)
        try:
            waiting.wait(rest, self.pgconn.socket, interval=INTERVAL, timeout=left)
        except errors._WaitTimeout:
            self._drop("an interrupted statement did not end in time")
        except psycopg.Error as exc:
            logger.debug("interrupted statement on %s: %r", self, exc)

    def _drop(self, reason: str) -> None:
        """Close the connection at once: the state of its session can't be known."""
        if not self.closed:
            logger.warning("closing %s: %s", self, reason)
            self.pgconn.finish()

    def set_autocommit(self, value: bool) -> None:
        """Method version of the `autocommit` setter: psycopg's."""
        with self.lock:
            idle = self.pgconn.transaction_status == IDLE and self._begin_waits is None
            if idle and not self._pipeline:
                self._autocommit = bool(value)
            else:
                self.wait(self._set_autocommit_gen(value))  # which tells why not

    # Ending transactions

    def _forget_prepared(self) -> None:
        """After a rollback: prepared statements may refer to what is gone."""
        if self._prepared.clear() and self.pgconn.status == OK:
            try:
                self._wait(self._prepared.maintain_gen(self))
            except psycopg.Error as exc:
                logger.warning("error ignored after the rollback of %s: %s", self, exc)

    def _before_commit(self, unit: Unit, of_block: bool) -> Sequence[bytes]:
        """What COMMIT is sent by; nothing if nothing was executed."""
        if self._only_commits(unit, of_block):
            self._clear_queue()  # RELEASE
            return ONLY_COMMIT
        try:
            return self._wait(self._before_ending_gen(unit, of_block))
        except errors.TransactionResolutionUnknown:
            if unit.state is COMMITTING:
                unit.advance(UNKNOWN)
            raise

    def _only_commits(self, unit: Unit, of_block: bool) -> bool:
        """Whether there is nothing to ask before COMMIT, nor to send with it, nor to refuse.

        As nearly always; `_before_ending_gen()` would come to the same, more slowly.
        """
        return (
            self.pgconn.transaction_status == INTRANS
            and unit.token is None
            and (unit.origin is not None or self._writes is False or not self._origin)
            and not (self._limited or self._undoing or self._unbegun or self._pipeline)
            and self._begin_waits is None
            and (of_block or not (self._blocks or self._num_transactions or self._tpc))
        )

    def _before_ending_gen(self, unit: Unit, of_block: bool) -> PQGen[list[bytes]]:
        if of_block:
            yield from self._sync_gen()
            empty = self._ends_empty(unit)
            ended: bool | None = True if empty else None
        else:
            ended = yield from self._commits_unit_gen(unit)
        if ended is not None:
            if ended:
                unit.advance(COMMITTED)
            return []
        yield from self._before_commit_gen(unit)
        if self._lacks_number(unit) and not self._pipeline:
            yield from self._number_gen(unit)
        return self._commit_commands(unit)

    def _begin_unit(self) -> Unit:
        return self._unit or Unit(TransactionState.ACTIVE)

    def commit(self) -> None:
        """Commit the current transaction; nothing happens if there is none.

        Once COMMIT has been sent, exceptions from elsewhere wait until its outcome is known, and
        carry a note that says it.

        Raises `CommitRolledBack`, `CommitUnknown`, or the server's error.
        """
        ending = Ending(self, self._begin_unit(), commit=True)
        ending.finish(see_through(ending))

    def rollback(self) -> None:
        """Roll back the current transaction; nothing happens if there is none.

        Raises `psycopg.OperationalError` if the connection is closed, or lost.
        """
        if self._num_transactions or self._tpc or self._pipeline:
            super().rollback()  # which refuses; or, in a pipeline, can't be torn so exactly
            if not self._num_transactions:
                self._rolled_back(TransactionState.ROLLED_BACK)
            return
        unit = self._begin_unit()
        ending = Ending(self, unit, commit=False, undo=True)
        torn = see_through(ending)
        ending.finish(torn)
        if ending.loss is not None:
            raise ending.loss

    def transaction(  # type: ignore[override]  # psycopg's is a generator around a block
        self,
        savepoint_name: str | None = None,
        force_rollback: bool = False,
        *,
        isolation_level: IsolationLevel | int | None = None,
        read_only: bool | None = None,
        deferrable: bool | None = None,
        commit_token: bool | None = None,
    ) -> Block[Row]:
        """A transaction block, or a savepoint inside one: ``with conn.transaction() as tx``.

        Parameters and errors as of `AsyncConnection.transaction()`. In a pipeline it is
        psycopg's own: a `psycopg.Transaction`, without callbacks and without our promises.
        """
        if self._pipeline is not None:
            if self._queued:  # psycopg's must see that there is a transaction
                with self.lock:
                    self._wait(self._flush_gen())
            theirs = super().transaction(savepoint_name, force_rollback)
            return cast("Block[Row]", theirs)
        begin = begin_as(self, isolation_level, read_only, deferrable)
        tx: SyncTransaction[Row] = SyncTransaction(
            *(self, savepoint_name, force_rollback), begin=begin, commit_token=commit_token
        )
        return Block(tx)

    async def _look_up(self, ticket: Ticket | Token, until: float) -> tuple[TransactionState, str]:
        """What became of a transaction whose COMMIT was lost; in a thread of its own."""
        origin = self._origin if isinstance(self._origin, Origin) else None
        return await look_up(ticket, self._reach, _backends.current(), until, origin)

    def close(self) -> None:
        """Close the connection. A transaction in progress is rolled back by the server."""
        was_closed = self.closed
        super().close()
        if not was_closed:
            prepared = self._tpc is not None and self._tpc[1]
            self._rolled_back(UNKNOWN if prepared else TransactionState.ROLLED_BACK)

    def _rolled_back(self, state: TransactionState) -> None:
        """Not by an `Ending`. The callbacks are called."""
        unit, self._unit = self._unit, None
        if unit is not None and unit.state is TransactionState.ACTIVE:
            unit.advance(state)
            call_back("transaction", state, Calls(cb.fn for cb in unit.take()))

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_val: BaseException | None,
        exc_tb: TracebackType | None,
    ) -> None:
        if self.closed:
            return
        try:
            if exc_val is None:
                self.commit()
            else:
                # Problems of a rollback must not hide the exception that goes through.
                try:
                    self.rollback()
                except (psycopg.Error, ExceptionGroup) as exc:
                    logger.warning("error ignored in rollback on %s: %s", self, exc)
                except BaseException as raised:
                    if not goes_on(exc_val, raised):
                        raise
        finally:
            # Unlike psycopg also when COMMIT failed, or a signal came: nobody else will.
            if not self.closed and not getattr(self, "_pool", None):
                self.close()
