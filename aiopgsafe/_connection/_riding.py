"""What rides on the program's own statements, in one round trip with them.

BEGIN, SAVEPOINT and RELEASE wait in a queue and go before the next statement, and so does
ROLLBACK TO of a savepoint that the server has undone already. What can't be
sent in one pipeline with them (COPY, several commands in one string, a stream, a server-side
cursor, whatever isn't a cursor of ours) has the queue sent before it: `_flush_gen()`.
COMMIT makes RELEASE superfluous; a block that executes nothing sends nothing.

Where a COMMIT is lost, the server is asked by the transaction's number (`_resolver`). That
must be known before COMMIT is sent: it is read behind the transaction's first statement that
writes, and the server's history with the connection's first BEGIN. libpq's pipeline mode
carries all this; psycopg's own pipelines are not involved.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from math import inf
from typing import TYPE_CHECKING, Any, cast

import psycopg
from psycopg import ConnectionInfo, errors, generators, pq
from psycopg._connection_base import BaseConnection
from psycopg.rows import Row

from .._backends import Backend
from .._resolver import HISTORY, POSITION, Origin
from ._statements import RIDES
from ._together import KeptResults, check, together_gen

if TYPE_CHECKING:
    from psycopg.abc import PQGen
    from psycopg.pq.abc import PGresult

    from .._unit import Unit
    from ._rider import RidingCursor
    from ._together import Results

logger = logging.getLogger("aiopgsafe")

OK = pq.ConnStatus.OK
INTRANS = pq.TransactionStatus.INTRANS
INERROR = pq.TransactionStatus.INERROR
COMMAND_OK = pq.ExecStatus.COMMAND_OK
EMPTY_QUERY = pq.ExecStatus.EMPTY_QUERY
SQLSTATE = pq.DiagnosticField.SQLSTATE
QUERY_CANCELED = b"57014"
UNDEFINED_NAME = b"26000"
FATAL_ERROR = pq.ExecStatus.FATAL_ERROR
TUPLES_OK = pq.ExecStatus.TUPLES_OK

HISTORY_QUERY = " ".join(HISTORY.split()).encode()
POSITION_QUERY = POSITION.encode()
DEALLOCATE = b"DEALLOCATE ALL"


class Riding(BaseConnection[Row]):
    """The part of a connection that lets commands ride, and knows whom it can ask.

    :ivar _origin: None: not asked yet; False: outcomes can't be asked for. The role or the
        server doesn't answer, or a pooler stands between: the session isn't ours.
    :ivar _names: of what we have prepared: BEGIN, SAVEPOINT, RELEASE, and the query for the
        number.
    :ivar _begin_waits: the BEGIN that goes before the next statement; empty: as the
        connection's attributes say.
    :ivar _queue: SAVEPOINT and RELEASE that go there, behind it.
    :ivar _rider: the cursor whose statement begins, and may have them in its pipeline.
    """

    cancel_timeout: float
    send_deadline: bool = False
    _backend: Backend
    _statement_timeout: float | None
    _limited: bool  # whether COMMIT has a timeout to be rid of

    _begin_waits: bytes | None
    _queue: list[bytes]
    _rider: RidingCursor[Any] | None
    _undoing: bool  # the queue begins with ROLLBACK TO: see `_undo_later()`
    _streamed: bool  # `stream()` was the last: libpq would go on row by row in a pipeline
    _unbegun: bool  # BEGIN was taken from the queue, and has not succeeded
    _by_hand: bool  # the program's own statements treat savepoints: RELEASE doesn't wait
    _rides: int  # `RIDES`, or 0: a replication connection takes simple queries only

    _origin: Origin | bool | None
    _names: dict[bytes, bytes]
    _preparing: list[tuple[int, bytes]]
    _numbers: int
    _writes: bool | None  # whether the transaction may write; None: the server has to say
    _others: bool  # whether other cursors than ours have been used in it
    _blocks: list[Any]  # `Transaction`s, or `SyncTransaction`s
    _unit: Unit | None

    def _set_up_riding(self) -> None:
        self._statement_timeout = None
        self._limited = False
        self._blocks = []
        self._unit = None
        self._origin = None
        self._names = {}
        self._preparing = []
        self._numbers = 0
        self._writes = None
        self._others = False
        self._begin_waits = None
        self._queue = []
        self._rider = None
        self._unbegun = self._by_hand = self._undoing = self._streamed = False
        self._rides = RIDES

    @property
    def _current_unit(self) -> Unit | None:
        """Of the transaction that the session is in."""
        return self._blocks[-1]._unit if self._blocks else self._unit

    def _unnumbered(self) -> Unit | None:
        """The transaction whose number is to be read behind what writes next, if any is."""
        if (
            (self._origin or self._will_ask())
            and (unit := self._blocks[-1]._unit if self._blocks else self._unit) is not None
            and unit.origin is None
            and unit.token is None
            and (
                self._begin_waits is not None
                or self.pgconn.transaction_status == INTRANS
                or self._undoing
            )
            and self._rides
        ):
            return unit
        return None

    # The queue

    @property
    def info(self) -> ConnectionInfo:
        """psycopg's, in a transaction from the moment that it was asked for."""
        waits = self._begin_waits is not None or self._undoing
        return Info(self.pgconn) if waits else super().info

    @property
    def _queued(self) -> bool:
        return self._begin_waits is not None or bool(self._queue)

    def _may_ride(self) -> bool:
        """Whether BEGIN, if it waits, needs no round trip of its own to ask for the history."""
        return self._origin is not None or not self._asks() or self._will_ask()

    def _take_queue(self, time_left: float | None = None) -> list[bytes]:
        """Whoever takes it sends it at once: without BEGIN statements would be on their own."""
        queue, self._queue = self._queue, []
        self._undoing = False
        if self._begin_waits is None:
            return queue
        if time_left is None:
            time_left = self._time_left() if self.send_deadline else inf
        begin = self._begin_commands(time_left, self._begin_waits or None)
        self._begin_waits, self._unbegun = None, True
        self._writes, self._others = self._begun_to_write(begin[0]), False
        return begin + queue

    def _begun_to_write(self, begin: bytes) -> bool | None:
        """Whether a transaction that begins like this may write, if that is known."""
        if b"READ ONLY" in begin or self.pgconn.parameter_status(b"in_hot_standby") == b"on":
            return False
        if b"READ WRITE" in begin:
            return True
        by_default = self.pgconn.parameter_status(b"default_transaction_read_only")
        return None if by_default is None else by_default == b"off"

    def _may_write(self) -> bool | None:
        """Whether the transaction may, that was begun or is to be; None: that isn't known."""
        if self._begin_waits is None:
            return self._writes
        return self._begun_to_write(self._begin_waits or self._get_tx_start_command())

    def _flush_gen(self, time_left: float | None = None) -> PQGen[None]:
        """Send what waits, in a round trip of its own."""
        begins = self._begin_waits is not None
        if DEALLOCATE in self._queue:
            self._names.clear()
        if commands := self._take_queue(time_left):
            yield from self._begin_gen(commands) if begins else self._commands_gen(commands)
            self._unbegun = False

    def _end_streaming_gen(self) -> PQGen[None]:
        """Before a pipeline: libpq forgets the mode of a `stream()` only outside of one."""
        self._streamed = False
        if self._queued:
            yield from self._commands_gen(self._take_queue())
            self._unbegun = False
        else:
            yield from self._ping_gen()

    def _forget_queue(self) -> None:
        self._begin_waits, self._unbegun = None, False
        self._clear_queue()

    def _clear_queue(self) -> None:
        if DEALLOCATE in self._queue:
            self._prepared._to_flush.append(None)  # it is still to be done
        self._queue.clear()
        self._undoing = False

    def _undo_later(self, commands: Sequence[bytes]) -> bool:
        """Let ROLLBACK TO and RELEASE wait, if the server has undone the savepoint by itself.

        It does when a statement fails: what the savepoint has locked is free at once, and
        ROLLBACK TO only lets the transaction go on. Any other savepoint keeps its locks until
        then, and somebody may wait for them.
        """
        failed = self.pgconn.transaction_status == INERROR
        if not failed or self._queue or self._by_hand or self._others or self._pipeline:
            return False
        self._queue += commands
        if self._prepared.clear():  # as psycopg does: they may refer to what is gone
            self._prepared._to_flush.clear()
            self._queue.append(DEALLOCATE)
        self._undoing = True
        return True

    def _exec_command(self, command: Any, result_format: pq.Format = pq.Format.TEXT) -> Any:
        """psycopg's, by which FETCH goes, too: what waits goes before it."""
        if self._queued:
            yield from self._flush_gen()
        return (yield from super()._exec_command(command, result_format))

    def _waits(self, savepoint: bytes) -> bool:
        """Whether this very SAVEPOINT waits: blocks inside one another may share a name."""
        return any(command is savepoint for command in self._queue)

    def _drop_from(self, savepoint: bytes) -> None:
        """Drop a SAVEPOINT that waits, and what waits behind it."""
        while self._queue.pop() is not savepoint:
            continue

    # The number

    def _send_queue(self) -> int:
        """What waits, into a pipeline. How many results come."""
        if self._begin_waits is None and not self._queue:
            return 0
        commands = self._take_queue()
        if DEALLOCATE in commands:  # of ours, too
            for command in commands:
                self.pgconn.send_query_params(command, None)
            self._names.clear()
            return len(commands)
        before = 0
        for command in commands:
            before += self._send(command, before)
        return before

    def _send_history(self) -> None:
        """The question for it, into a pipeline: it may fail, and BEGIN not with it."""
        self.pgconn.send_query_params(HISTORY_QUERY, None)
        self.pgconn.pipeline_sync()

    def _asks(self) -> bool:
        """Whether the history comes with the statement that begins: it is the first BEGIN."""
        return self._begin_waits is not None and self._origin is None

    def _will_ask(self) -> bool:
        """Whether it comes, and another connection has had an answer there."""
        return self._asks() and bool(self._rides) and _answering.get(self._where, False)

    @property
    def _where(self) -> tuple[bytes, ...]:
        pgconn = self.pgconn
        return pgconn.host, pgconn.port, pgconn.user, pgconn.db

    def _send(self, command: bytes, at: int) -> int:
        """Into a pipeline, prepared. How many results come: two if it is prepared only now.

        :param at: how many come before it.
        """
        name = self._names.get(command)
        if name is not None:
            self.pgconn.send_query_prepared(name, None)
            return 1
        if not self._origin or len(self._names) >= MAX_NAMES:  # a pooler, or nothing is known
            self.pgconn.send_query_params(command, None)
            return 1
        # A new name each time: a DEALLOCATE of the program's own may have spared the old one.
        self._numbers += 1
        name = b"_aiopgsafe_%d" % self._numbers
        self._preparing.append((at, command))  # first: see `_forget_interrupted()`
        self._names[command] = name
        self.pgconn.send_prepare(name, command)
        self.pgconn.send_query_prepared(name, None)
        return 2

    def _prepared_now(self, results: Results) -> None:
        """Forget what could not be prepared, or is no more: behind an error nothing is."""
        for at, command in self._preparing:
            if at >= len(results) or results[at].status != COMMAND_OK:
                self._names.pop(command, None)
        self._preparing.clear()
        if any(map(is_undefined_name, results)):
            self._names.clear()

    def _forget_interrupted(self) -> None:
        """Nobody has seen what was prepared; whether it has begun the session says."""
        for _, command in self._preparing:
            self._names.pop(command, None)
        self._preparing.clear()
        if self.pgconn.transaction_status in (INTRANS, INERROR):
            self._unbegun = False

    def _numbered(self, unit: Unit, result: PGresult) -> None:
        """Note the number of the unit's transaction, if it has one."""
        if result.status != TUPLES_OK:
            return
        xid, lsn = result.get_value(0, 0), result.get_value(0, 1)
        if xid is not None and lsn is not None and isinstance(self._origin, Origin):
            unit.number(self._origin, xid, lsn)

    def _begin_gen(self, commands: Sequence[bytes]) -> PQGen[None]:
        """BEGIN. The connection's first one asks for the server's history, in the same trip."""
        if self._origin is not None or self._pipeline:
            yield from self._commands_gen(commands)
            return
        self._check_connection_ok()
        if self._streamed:
            self._streamed = False
            yield from self._ping_gen()
        pgconn = self.pgconn
        sends: list[Callable[[], None]] = [
            self._send_history,
            *(partial(pgconn.send_query_params, command, None) for command in commands),
        ]
        history, *begun = yield from together_gen(pgconn, sends, syncs=2)
        self._came_from(history)
        check(begun, pgconn)

    def _came_from(self, history: PGresult) -> None:
        """Note where the session's transactions can be asked for, if they can."""
        if history.error_field(SQLSTATE) == QUERY_CANCELED:
            return  # ask once more
        if len(_answering) > MAX_SERVERS:
            _answering.clear()
        self._origin = _answering[self._where] = False
        if history.status == TUPLES_OK and history.ntuples == 1:
            values = [history.get_value(0, column) for column in range(history.nfields)]
            row = [None if value is None else value.decode() for value in values]
            origin = Origin.of(row)
            knows = row[0] and row[2] and row[-1] == "true"
            if origin.pid == self.pgconn.backend_pid and knows:
                self._origin = origin
                _answering[self._where] = True
        elif history.status == FATAL_ERROR:
            logger.info("outcomes of %s can't be asked for: %s", self, history.error_message)

    # Commands of ours

    def _time_left(self) -> float:
        """For the server; asked for in the task, before its generator waits elsewhere."""
        if not self.send_deadline:
            return inf
        # The client's own cancellation comes first: this one is for a client that died.
        left = self._backend.time_left() + self.cancel_timeout
        limit = self._statement_timeout or MAX_TIMEOUT
        return left if left < limit else inf

    def _begin_commands(self, time_left: float, begin: bytes | None = None) -> list[bytes]:
        begin = begin or self._get_tx_start_command()
        self._limited = self._statement_timeout is not None or time_left < inf
        return [begin, set_timeout(time_left)] if time_left < inf else [begin]

    def _commands_gen(self, commands: Sequence[bytes]) -> PQGen[PGresult]:
        self._check_connection_ok()
        if self._pipeline:
            return (yield from self._pipelined_gen(commands))[-1]
        # The simple protocol: poolers know it, and it takes several commands at once.
        self.pgconn.send_query(b";".join(commands))
        result: PGresult = (yield from generators.execute(self.pgconn))[-1]
        if result.status != COMMAND_OK:
            raise errors.error_from_result(result, encoding=self.pgconn._encoding)
        return result

    def _ping_gen(self) -> PQGen[None]:
        """An empty query, which begins no transaction."""
        self._check_connection_ok()
        self.pgconn.send_query(b"")
        result: PGresult = (yield from generators.execute(self.pgconn))[-1]
        if result.status != EMPTY_QUERY:
            raise errors.error_from_result(result, encoding=self.pgconn._encoding)

    def _pipelined_gen(self, commands: Sequence[bytes]) -> PQGen[list[PGresult]]:
        """Send commands in pipeline mode and have their results at once.

        psycopg checks the results of its own commands and drops them. Ours goes
        through the queue in the place of a cursor that keeps it. An error of an
        earlier statement of the pipeline aborts everything up to the next Sync:
        it has been raised where its Sync was awaited, or is raised here.
        """
        pipeline = self._pipeline
        assert pipeline is not None
        while pipeline.result_queue or pipeline.command_queue:
            try:
                yield from pipeline._sync_gen()
            except psycopg.Error as exc:
                if self.pgconn.status != OK:
                    raise
                logger.debug("earlier error in pipeline on %s: %s", self, exc)
        kept = KeptResults(self.pgconn)
        for command in commands:
            pipeline.command_queue.append(partial(self.pgconn.send_query_params, command, None))
            pipeline.result_queue.append(cast("Any", (kept, None)))
        yield from pipeline._sync_gen()
        return kept.results


MAX_SERVERS = 100
MAX_NAMES = 20
MAX_TIMEOUT = 86_400.0
"""Seconds after which a deadline is none: PostgreSQL's limit is 24 days."""

_answering: dict[tuple[bytes, ...], bool] = {}
"""Whether outcomes can be asked for, by address, user and database.

Of the first connection there nothing is known: a query of ours that fails would take the
program's transaction with it. So its first BEGIN has a round trip of its own.
"""


def is_undefined_name(result: PGresult) -> bool:
    """Whether a prepared statement was not there."""
    return result.status == FATAL_ERROR and result.error_field(SQLSTATE) == UNDEFINED_NAME


class Info(ConnectionInfo):
    """While BEGIN waits, or ROLLBACK TO."""

    @property
    def transaction_status(self) -> pq.TransactionStatus:
        """In a transaction."""
        return INTRANS


def set_timeout(seconds: float) -> bytes:
    return b"SET LOCAL statement_timeout TO %d" % max(1, seconds * 1000)
