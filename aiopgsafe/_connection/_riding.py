"""What rides on the program's own statements, in one round trip with them.

BEGIN, SAVEPOINT and RELEASE wait in a queue and go before the next statement. What can't be
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
from typing import TYPE_CHECKING, Any

import psycopg
from psycopg import ConnectionInfo, errors, generators, pq
from psycopg.rows import Row

from .._resolver import HISTORY, POSITION, Origin
from ._statements import WRITES, traits_of_text

if TYPE_CHECKING:
    from psycopg.abc import PQGen
    from psycopg.pq.abc import PGconn, PGresult

    from .._transaction import Transaction
    from .._unit import Unit

logger = logging.getLogger("aiopgsafe")

OK = pq.ConnStatus.OK
INTRANS = pq.TransactionStatus.INTRANS
COMMAND_OK = pq.ExecStatus.COMMAND_OK
SQLSTATE = pq.DiagnosticField.SQLSTATE
QUERY_CANCELED = b"57014"
UNDEFINED_NAME = b"26000"
SYNC = pq.ExecStatus.PIPELINE_SYNC
ABORTED = pq.ExecStatus.PIPELINE_ABORTED
FATAL_ERROR = pq.ExecStatus.FATAL_ERROR
TUPLES_OK = pq.ExecStatus.TUPLES_OK

HISTORY_QUERY = " ".join(HISTORY.split()).encode()
POSITION_QUERY = POSITION.encode()

Results = list["PGresult"]


class Riding(psycopg.AsyncConnection[Row]):
    """The part of `AsyncConnection` that lets commands ride, and knows whom it can ask.

    :ivar _origin: None: not asked yet; False: outcomes can't be asked for. The role or the
        server doesn't answer, or a pooler stands between: the session isn't ours.
    :ivar _names: of what we have prepared: BEGIN, SAVEPOINT, RELEASE, and the query for the
        number.
    :ivar _begin_waits: the BEGIN that goes before the next statement; empty: as the
        connection's attributes say.
    :ivar _queue: SAVEPOINT and RELEASE that go there, behind it.
    :ivar _may_ride: whether the statement that begins may have them in its pipeline.
    """

    _begin_waits: bytes | None
    _queue: list[bytes]
    _may_ride: int
    _unbegun: bool  # BEGIN was taken from the queue, and has not succeeded
    _by_hand: bool  # the program's own statements treat savepoints: RELEASE doesn't wait
    _rides: int  # `RIDES`, or 0: a replication connection takes simple queries only

    _origin: Origin | bool | None
    _names: dict[bytes, bytes]
    _preparing: list[tuple[int, bytes]]
    _numbers: int
    _reads_only: bool  # what the transaction was begun as
    _blocks: list[Transaction[Any]]
    _unit: Unit | None

    @property
    def _current_unit(self) -> Unit | None:
        """Of the transaction that the session is in."""
        return self._blocks[-1]._unit if self._blocks else self._unit

    def _unnumbered(self, query: bytes) -> Unit | None:
        """The transaction whose number is to be read behind this statement, if any is."""
        if (
            (self._origin or self._will_ask())
            and self._pipeline is None
            and (unit := self._current_unit) is not None
            and unit.xid is None
            and unit.token is None
            and traits_of_text(query) & WRITES
            and (self._begin_waits is not None or self.pgconn.transaction_status == INTRANS)
            and self._rides
        ):
            return unit
        return None

    # The queue

    @property
    def info(self) -> ConnectionInfo:
        """psycopg's, in a transaction from the moment that it was asked for."""
        return Info(self.pgconn) if self._begin_waits is not None else super().info

    @property
    def _queued(self) -> bool:
        return self._begin_waits is not None or bool(self._queue)

    def _take_queue(self, time_left: float | None = None) -> list[bytes]:
        """Whoever takes it sends it at once: without BEGIN statements would be on their own."""
        commands, self._queue = self._queue, []
        if self._begin_waits is not None:
            time_left = self._time_left() if time_left is None else time_left
            commands[:0] = self._begin_commands(time_left, self._begin_waits or None)
            self._begin_waits, self._unbegun = None, True
            self._reads_only = b"READ ONLY" in commands[0]
        return commands

    def _flush_gen(self, time_left: float | None = None) -> PQGen[None]:
        """Send what waits, in a round trip of its own."""
        begins = self._begin_waits is not None
        if commands := self._take_queue(time_left):
            yield from self._begin_gen(commands) if begins else self._commands_gen(commands)
            self._unbegun = False

    def _forget_queue(self) -> None:
        self._begin_waits, self._unbegun = None, False
        self._queue.clear()

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
        name = self._names[command] = b"_aiopgsafe_%d" % self._numbers
        self._preparing.append((at, command))
        self.pgconn.send_prepare(name, command)
        self.pgconn.send_query_prepared(name, None)
        return 2

    def _prepared_now(self, results: Results) -> None:
        """Forget what could not be prepared: behind an error nothing is.

        What the server has forgotten without our seeing it (a DEALLOCATE inside a function)
        is prepared anew, too: InvalidSqlStatementName tells of it.
        """
        for at, command in self._preparing:
            if at >= len(results) or results[at].status != COMMAND_OK:
                self._names.pop(command, None)
        self._preparing.clear()
        for result in results:
            if result.status == FATAL_ERROR and result.error_field(SQLSTATE) == UNDEFINED_NAME:
                self._names.clear()

    def _numbered(self, unit: Unit, result: PGresult) -> None:
        """Note the number of the unit's transaction, if it has one."""
        if result.status != TUPLES_OK:
            return
        xid, lsn = result.get_value(0, 0), result.get_value(0, 1)
        if xid is not None and lsn is not None and isinstance(self._origin, Origin):
            unit.number(self._origin, int(xid), lsn.decode())

    def _begin_gen(self, commands: Sequence[bytes]) -> PQGen[None]:
        """BEGIN. The connection's first one asks for the server's history, in the same trip."""
        if self._origin is not None or self._pipeline:
            yield from self._commands_gen(commands)
            return
        self._check_connection_ok()
        pgconn = self.pgconn
        sends: list[Callable[[], None]] = [
            partial(pgconn.send_query_params, HISTORY_QUERY, None),
            pgconn.pipeline_sync,  # it may fail, and BEGIN not with it
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

    # Of `_generators`

    def _commands_gen(self, commands: Sequence[bytes]) -> PQGen[PGresult]:
        raise NotImplementedError

    def _begin_commands(self, time_left: float, begin: bytes | None = None) -> list[bytes]:
        raise NotImplementedError

    def _time_left(self) -> float:
        raise NotImplementedError


MAX_SERVERS = 100
MAX_NAMES = 20

_answering: dict[tuple[bytes, ...], bool] = {}
"""Whether outcomes can be asked for, by address, user and database.

Of the first connection there nothing is known: a query of ours that fails would take the
program's transaction with it. So its first BEGIN has a round trip of its own.
"""


class Info(ConnectionInfo):
    """While BEGIN waits."""

    @property
    def transaction_status(self) -> pq.TransactionStatus:
        """In a transaction."""
        return INTRANS


def together_gen(
    pgconn: PGconn, sends: Sequence[Callable[[], None]], syncs: int = 1
) -> PQGen[Results]:
    """Send all in one pipeline; the result of each, errors too, but not of the Syncs.

    :param syncs: that come back, the one at the end included.
    """
    try:
        pgconn.enter_pipeline_mode()
        for send in sends:
            send()
        pgconn.pipeline_sync()
        return (yield from collect_gen(pgconn, syncs))
    finally:
        leave_pipeline_mode(pgconn)


def collect_gen(
    pgconn: PGconn, syncs: int = 1, seen: dict[int, Callable[[PGresult], None]] | None = None
) -> PQGen[Results]:
    """Send what is queued, and take all results up to the last Sync.

    :param seen: called with the result at that place as soon as it is there: those behind
        it may never come.
    """
    results: Results = []
    try:
        some = yield from generators.execute(pgconn)
        while True:
            if some and some[0].status == SYNC:
                syncs -= 1
                if not syncs:
                    return results
            else:
                results += some
                if seen is not None and (call := seen.get(len(results) - 1)) is not None:
                    call(results[-1])
            some = yield from generators.fetch_many(pgconn)
    except psycopg.Error:
        # A session that ends says why before its connection does.
        check(results, pgconn)
        raise


def leave_pipeline_mode(pgconn: PGconn) -> None:
    """At the end. Where an exception has hit before, `rest_gen()` takes what is left."""
    if pgconn.pipeline_status:
        try:
            pgconn.exit_pipeline_mode()
        except psycopg.Error as exc:
            logger.debug("pipeline mode goes on: %s", exc)


def rest_gen(pgconn: PGconn) -> PQGen[None]:
    """Take all that is still to come of a pipeline, wherever an exception has hit, and leave it.

    What was sent may have no Sync yet: ours ends it, and one too many does no harm.
    """
    pgconn.pipeline_sync()
    results = yield from generators.execute(pgconn)
    while pgconn.pipeline_status:
        if results and results[0].status == SYNC:
            leave_pipeline_mode(pgconn)
            if not pgconn.pipeline_status:
                return
        results = yield from generators.fetch_many(pgconn)


def check(results: Results, pgconn: PGconn) -> None:
    """Raise the first error among results."""
    for result in results:
        if result.status == FATAL_ERROR:
            raise errors.error_from_result(result, encoding=pgconn._encoding)
        if result.status == ABORTED:
            raise errors.PipelineAborted("pipeline aborted")
