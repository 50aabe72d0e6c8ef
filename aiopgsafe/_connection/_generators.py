"""The protocol side of ending transactions: psycopg's generators, with the answers believed."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import psycopg
from psycopg import IsolationLevel, errors, generators, pq
from psycopg._connection_base import BaseConnection
from psycopg.rows import Row

from .._errors import CommitRolledBack
from .._outcome import TransactionState, check_tag, ended_by_statement
from .._unit import Unit
from ._held import Blocks
from ._riding import POSITION_QUERY
from ._statements import ACCESS, BY_HAND, ENDS, FORGETS, LISTENS
from ._together import check, collect_gen, leave_pipeline_mode

if TYPE_CHECKING:
    from psycopg import Xid
    from psycopg.abc import PQGen
    from psycopg.pq.abc import PGresult

    from .._resolver import Ticket, Token

logger = logging.getLogger("aiopgsafe")

NO_TIMEOUT = b"SET LOCAL statement_timeout TO 0"

OK = pq.ConnStatus.OK
COMMAND_OK = pq.ExecStatus.COMMAND_OK
EMPTY_QUERY = pq.ExecStatus.EMPTY_QUERY
IDLE = pq.TransactionStatus.IDLE
INTRANS = pq.TransactionStatus.INTRANS
INERROR = pq.TransactionStatus.INERROR


class EndingGenerators(Blocks[Row]):
    """The part of a connection that speaks to the server (see `_session.Session`)."""

    commit_token: bool

    def _start_query(self) -> PQGen[None]:
        """psycopg's implicit BEGIN. The unit of a transaction that has ended ends here.

        What waits goes before the statement, if it can't ride on it.
        """
        if (blocks := self._blocks) and (self._unbegun or blocks[-1]._orphaned):
            raise not_begun() if self._unbegun else orphaned()
        if self._prepared._to_flush and not self._failed:
            # psycopg does it behind the statement: what that prepares would be gone, and
            # psycopg believe that it is there.
            yield from self._prepared.maintain_gen(self)
        if self.pgconn.transaction_status == IDLE and self._begin_waits is None:
            if self._unit is not None:
                self._forget_unit()
            self._writes = None  # if the program begins one itself
            if self._blocks:
                pass
            elif not self._autocommit:
                self._begin_waits = b""
                self._unit = Unit(TransactionState.ACTIVE, self.commit_token)
        if (self._rider is None or self._pipeline) and self._queued:
            yield from self._flush_gen()
        if self._rider is None:
            self._others = True

    def _expect_notifies(self) -> None:
        """A LISTEN is about to be sent."""

    def _note(self, found: int) -> None:
        """Note what a statement's traits say of the session, before it is sent."""
        unit = self._current_unit if found & ENDS else None
        if unit is not None and unit.token is not None and unit.ticketed:
            raise psycopg.ProgrammingError(
                "somebody has the transaction's ticket, whose token goes with the COMMIT of its"
                " block or of AsyncConnection.commit(): end it by these"
            )
        if found & ACCESS:
            self._writes = None
        if found & LISTENS:
            self._expect_notifies()
        if found & FORGETS:
            self._names.clear()
        if found & BY_HAND:
            self._by_hand = True

    def _ended_by_statement(self, error: BaseException | None) -> None:
        """A statement of the program's own was to end the transaction, COMMIT or ROLLBACK.

        What became of the transaction the program may know; its block doesn't. Where
        the server, or psycopg, has refused the statement, the transaction goes on.

        :param error: that the statement ended with.
        """
        status = self.pgconn.transaction_status
        if isinstance(error, psycopg.Error) and status in (INTRANS, INERROR):
            return
        if self._blocks:
            lose_sight_of(self._blocks[-1]._unit)
        if self._tpc is None:
            self._forget_unit()
        elif self._unit is not None:
            lose_sight_of(self._unit)

    def _forget_unit(self) -> None:
        """A statement ended the transaction (COMMIT or ROLLBACK): which, we don't know."""
        unit, self._unit = self._unit, None
        if unit is not None:
            lose_sight_of(unit)

    def _sync_gen(self) -> PQGen[None]:
        self._check_connection_ok()
        if self._pipeline:
            yield from self._pipeline._sync_gen()

    def _send_commit_gen(self, unit: Unit) -> PQGen[bool]:
        if self._undoing or unit.token is not None:
            yield from self._before_commit_gen(unit)
        numbers = self._lacks_number(unit)
        if numbers and self._streamed and not self._pipeline:
            yield from self._end_streaming_gen()
        commands = self._commit_commands(unit)
        # From here on only the server knows.
        unit.advance(TransactionState.COMMITTING)
        if numbers:
            result = yield from self._numbered_commit_gen(unit, commands)
        else:
            result = yield from self._commands_gen(commands)
        if (tag := result.command_status) != b"COMMIT":
            try:
                yield from self._forget_prepared_gen()
            except psycopg.Error as exc:
                logger.warning("error ignored after the rollback of %s: %s", self, exc)
            check_tag(tag)
        return True

    def _before_commit_gen(self, unit: Unit) -> PQGen[None]:
        """What must be done, or known, before COMMIT is sent, where there is anything."""
        if self._undoing:
            yield from self._flush_gen()
        lives = self.pgconn.transaction_status == INTRANS
        if lives and unit.token is not None and not unit.ticketed:
            if self._writes is None:
                self._writes = yield from self._ask_access_gen()
            if not self._writes:
                unit.token = None

    def _lacks_number(self, unit: Unit) -> bool:
        """Whether the transaction may have written, and nobody knows its number."""
        unnumbered = unit.origin is None and unit.token is None and self._writes is not False
        lives = self.pgconn.transaction_status == INTRANS
        return bool(unnumbered and lives and self._origin)

    def _commit_commands(self, unit: Unit) -> list[bytes]:
        """COMMIT, and what goes with it."""
        self._clear_queue()  # RELEASE
        commands = [b"COMMIT"]
        lives = self.pgconn.transaction_status == INTRANS
        if lives and unit.token is not None:
            # In one message with COMMIT: a session that has inserted it never waits.
            commands.insert(0, unit.token.insert)
            unit.token_sent = True
        if lives and self._limited:
            # A timeout cancels even the wait for synchronous replication: committed
            # here, and not there.
            commands.insert(0, NO_TIMEOUT)
        return commands

    def _numbered_commit_gen(self, unit: Unit, commands: Sequence[bytes]) -> PQGen[PGresult]:
        """COMMIT of a transaction whose number isn't known yet: it comes back just before it."""
        if self._pipeline:
            position, *results = yield from self._pipelined_gen([POSITION_QUERY, *commands])
            self._numbered(unit, position)
            return results[-1]
        pgconn = self.pgconn
        pgconn.enter_pipeline_mode()
        try:
            place = self._send(POSITION_QUERY, 0) - 1
            pgconn.send_flush_request()  # what is lost with COMMIT's answer is no help
            for command in commands:
                pgconn.send_query_params(command, None)
            pgconn.pipeline_sync()
            results = yield from collect_gen(pgconn, seen={place: partial(self._numbered, unit)})
        finally:
            leave_pipeline_mode(pgconn)
        self._prepared_now(results)
        check(results, pgconn)
        return results[-1]

    def _deallocate(self, name: bytes | None) -> PQGen[None]:
        if name is None:
            self._names.clear()  # DEALLOCATE ALL
        yield from super()._deallocate(name)

    def _commit_unit_gen(self, unit: Unit) -> PQGen[bool]:
        """For `commit()`."""
        ended = yield from self._commits_unit_gen(unit)
        return (yield from self._send_commit_gen(unit)) if ended is None else ended

    def _commits_unit_gen(self, unit: Unit) -> PQGen[bool | None]:
        """psycopg's guards. None: there is something to commit. True: nothing was executed."""
        if self._num_transactions:
            raise psycopg.ProgrammingError(
                "Explicit commit() forbidden within a Transaction context."
                " (Transaction will be automatically committed on successful exit from context.)"
            )
        if self._tpc:
            raise psycopg.ProgrammingError("commit() cannot be used during a two-phase transaction")
        yield from self._sync_gen()
        if self._begin_waits is not None:
            self._forget_queue()
            unit.advance(TransactionState.COMMITTING)
            return True
        if self.pgconn.transaction_status == IDLE:
            self._forget_unit()
            return False
        self._check_not_active()
        return None

    def _block_commit_gen(self, unit: Unit) -> PQGen[bool]:
        """For the end of the outermost block."""
        if self._pipeline or self.pgconn.status != OK:
            yield from self._sync_gen()
        if self._ends_empty(unit):
            return True
        return (yield from self._send_commit_gen(unit))

    def _ends_empty(self, unit: Unit) -> bool:
        """Whether nothing was executed in the outermost block. Raises if COMMIT can't be sent."""
        if self._begin_waits is not None:
            self._forget_queue()
            unit.advance(TransactionState.COMMITTING)
            return True
        if self._unbegun:
            raise not_begun()
        if self.pgconn.transaction_status == IDLE:
            unit.advance(TransactionState.COMMITTING)
            raise ended_by_statement()
        if self.pgconn.transaction_status != INTRANS:
            self._check_not_active()
        return False

    def _number_gen(self, unit: Unit) -> PQGen[None]:
        """Ask for the transaction's number, in a round trip of its own."""
        self.pgconn.send_query_params(POSITION_QUERY, None)
        results = yield from generators.execute(self.pgconn)
        check(results, self.pgconn)
        self._numbered(unit, results[-1])

    def _ask_access_gen(self) -> PQGen[bool]:
        """Whether the transaction may write: one that the program began, or changed, itself."""
        query = b"SHOW transaction_read_only"
        if self._pipeline:
            (result,) = yield from self._pipelined_gen([query])
        else:
            self.pgconn.send_query(query)
            result = (yield from generators.execute(self.pgconn))[-1]
        check([result], self.pgconn)
        return result.get_value(0, 0) == b"off"

    def _rollback_gen(self) -> PQGen[None]:
        if not self._num_transactions:  # refused inside a block
            self._forget_queue()
        yield from super()._rollback_gen()

    def _check_intrans_gen(self, attribute: str) -> PQGen[None]:
        if self._begin_waits is not None:
            raise psycopg.ProgrammingError(
                f"can't change {attribute!r} now: the connection is in a transaction"
            )
        yield from super()._check_intrans_gen(attribute)

    def _tpc_begin_gen(self, xid: Xid | str) -> PQGen[None]:
        if self._begin_waits is not None:
            raise psycopg.ProgrammingError(
                "can't start two-phase transaction: the connection is in a transaction"
            )
        yield from super()._tpc_begin_gen(xid)
        self._writes, self._others = None, True
        self._unit = Unit(TransactionState.ACTIVE, self.commit_token)

    def _tpc_prepare_gen(self) -> PQGen[None]:
        """psycopg's. Refused, or cancelled in time, nothing is prepared: `_tpc` says so."""
        before, failed = self._tpc, self._failed
        try:
            yield from super()._tpc_prepare_gen()
            if failed:  # answered with the tag ROLLBACK, and no error
                raise CommitRolledBack(
                    "the transaction can't be prepared: a statement of it had failed before,"
                    " it is rolled back"
                )
        except psycopg.Error:
            if self.pgconn.status == OK:
                self._tpc = before
            raise

    def _tpc_commit_gen(self, unit: Unit, xid: Xid | str | None) -> PQGen[bool]:
        if self._tpc and xid is None and not self._tpc[1]:
            self._check_connection_ok()
            self._tpc = None
            if self.pgconn.transaction_status == IDLE:  # COMMIT would be answered COMMIT
                if unit.state is not TransactionState.ACTIVE:
                    raise ended_by_statement()
                unit.advance(TransactionState.COMMITTING)
                raise CommitRolledBack("the transaction could not be prepared: it is rolled back")
            return (yield from self._send_commit_gen(unit))
        if (xid is None) == (self._tpc is None):  # psycopg refuses before it sends
            yield from self._tpc_finish_gen("COMMIT", xid)
        self._check_connection_ok()
        unit.prepared = True
        unit.advance(TransactionState.COMMITTING)
        yield from self._tpc_finish_gen("COMMIT", xid)
        return True

    def _unlimit_gen(self) -> PQGen[bytes]:
        """Take a timeout off that COMMIT PREPARED, in no transaction, would be under: what it was.

        In the simple protocol, for the value: a round trip.
        """
        self._check_connection_ok()
        self.pgconn.send_query(b"SHOW statement_timeout; SET statement_timeout TO 0")
        results: list[PGresult] = yield from generators.execute(self.pgconn)
        if results[-1].status != COMMAND_OK:
            raise errors.error_from_result(results[-1], encoding=self.pgconn._encoding)
        return results[0].get_value(0, 0) or b"0"

    def _ticket(self, unit: Unit) -> Ticket | Token:
        """See `Transaction.ticket()`."""
        if self._tpc is not None:
            raise psycopg.NotSupportedError("in two phases the coordinator knows the outcome")
        if unit.token is not None:
            if self._may_write() is False:
                raise psycopg.NotSupportedError("a transaction that only reads has no token")
            unit.ticketed = True
            return unit.token.of_database(self.info.dbname)
        if (ticket := unit.number_ticket) is not None:
            return ticket
        if self._origin is False:
            raise psycopg.NotSupportedError(
                "outcomes can't be asked for on this connection: use commit_token=True"
            )
        raise psycopg.ProgrammingError("the transaction has not written anything yet")

    def _settled(self, unit: Unit | None) -> None:
        # Asked for like that: a callback may have given the connection back.
        ours = self.__dict__.get("_unit")
        if unit is not None and unit.state is not TransactionState.ACTIVE and unit is ours:
            self._unit = None

    @property
    def _in_transaction(self) -> bool:
        return self.pgconn.transaction_status in (INTRANS, INERROR)

    @property
    def _ended_elsewhere(self) -> bool:
        begun = self._begin_waits is None and not self._unbegun
        return begun and self.pgconn.transaction_status == IDLE

    @property
    def _failed(self) -> bool:
        return self.pgconn.transaction_status == INERROR and not self._undoing

    def _check_not_active(self) -> None:
        if self.pgconn.transaction_status not in (INTRANS, INERROR):
            raise psycopg.OperationalError(
                "the transaction can't be committed: another statement is in progress"
                " on the connection (a stream() or copy() that was not finished?)"
            )

    def _forget_prepared_gen(self) -> PQGen[None]:
        self._prepared.clear()
        yield from self._prepared.maintain_gen(self)


def lose_sight_of(unit: Unit) -> None:
    """Somebody else has ended the transaction: how, the program may know; we don't."""
    if unit.state is TransactionState.ACTIVE:
        unit.advance(TransactionState.UNKNOWN)
        unit.take()


def orphaned() -> psycopg.OperationalError:
    """In autocommit mode it would be committed, whatever becomes of the block."""
    return psycopg.OperationalError("the transaction around the block has ended before it")


def not_begun() -> psycopg.OperationalError:
    """Inside a block whose BEGIN has failed nothing may run: it would be on its own."""
    return psycopg.OperationalError("the block's transaction has not begun: BEGIN failed")


def isolation(level: IsolationLevel | int) -> IsolationLevel:
    """Raises `ValueError` for what is no isolation level."""
    try:
        return IsolationLevel(level)
    except ValueError:
        names = ", ".join(f"IsolationLevel.{known.name}" for known in IsolationLevel)
        raise ValueError(f"isolation_level is one of {names}, not {level!r}") from None


def begin_as(
    conn: BaseConnection[Any],
    level: IsolationLevel | int | None,
    read_only: bool | None,
    deferrable: bool | None,
) -> bytes | None:
    """The BEGIN of a block; what isn't given is as of the connection. None: all of it is."""
    if (level, read_only, deferrable) == (None, None, None):
        return None
    level = conn.isolation_level if level is None else level
    return begin_command(
        None if level is None else isolation(level),
        conn.read_only if read_only is None else read_only,
        conn.deferrable if deferrable is None else deferrable,
    )


def begin_command(
    level: IsolationLevel | None, read_only: bool | None, deferrable: bool | None
) -> bytes:
    parts = ["BEGIN"]
    if level is not None:
        parts.append("ISOLATION LEVEL " + level.name.replace("_", " "))
    if read_only is not None:
        parts.append("READ ONLY" if read_only else "READ WRITE")
    if deferrable is not None:
        parts.append("DEFERRABLE" if deferrable else "NOT DEFERRABLE")
    return " ".join(parts).encode()
