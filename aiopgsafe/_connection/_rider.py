"""What cursors of ours have in common: their statements carry what rides on them."""

from __future__ import annotations

from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING, Any
from weakref import ref

import psycopg
from psycopg import pq
from psycopg._cursor_base import BaseCursor
from psycopg._preparing import Prepare
from psycopg.adapt import AdaptersMap, Transformer
from psycopg.rows import Row

from ._riding import POSITION_QUERY, is_undefined_name
from ._statements import NOTED, WRITES, traits_of_text
from ._together import check, collect_gen, leave_pipeline_mode, rest_gen

if TYPE_CHECKING:
    from psycopg._queries import PostgresQuery
    from psycopg.abc import Params, PQGen, Query

    from .._unit import Unit

__all__ = ["RidingCursor"]

OK = pq.ConnStatus.OK
COMMAND_OK = pq.ExecStatus.COMMAND_OK
STATUS = attrgetter("status")
GOOD = frozenset(map(int, (COMMAND_OK, pq.ExecStatus.TUPLES_OK, pq.ExecStatus.EMPTY_QUERY)))


class RidingCursor(BaseCursor[Any, Row]):
    """The part of a cursor that speaks to the server. BEGIN and the like ride (`_riding`).

    :ivar _traits: of the statement that it executes.
    """

    __slots__ = ()

    _traits: int
    _prepares = True
    """Whether it prepares statements: those that merge parameters into them don't."""

    def _set_up(self, connection: Any, row_factory: Any) -> None:
        """As psycopg's __init__() does it, but for a copy of the adapters: see `adapters`."""
        self._conn = connection
        self._pgconn = connection.pgconn
        self._adapters: AdaptersMap = None  # type: ignore[assignment]  # a cast would be a call
        self._row_factory = row_factory or connection.row_factory
        self._last_query = None
        self.format = pq.Format.TEXT
        self.arraysize = 1
        self._closed = False
        self._reset()

    @property
    def adapters(self) -> AdaptersMap:
        """The cursor's own adapters, copied from the connection's when they are asked for."""
        if self._adapters is None:
            self._adapters = adapters = AdaptersMap(self._conn.adapters)
            changed = partial(self._loaders_changed, ref(self))
            adapters._register_loader_callback = changed
            self._last_query = None  # what was kept for it knows the connection's only
        return self._adapters

    def _execute_gen(
        self,
        query: Query,
        params: Params | None = None,
        *,
        prepare: bool | None = None,
        binary: bool | None = None,
    ) -> PQGen[None]:
        """psycopg's, with fewer generators and calls."""
        yield from self._start_query(query)
        pgq = self._query_cls(self._tx)
        pgq.convert(query, params)
        yield from self._maybe_prepare_gen(pgq, prepare=prepare, binary=binary)
        conn: Any = self._conn
        if conn._pipeline:
            yield from conn._pipeline._communicate_gen()
        self._last_query = query
        if conn._prepared._to_flush:
            yield from conn._prepared.maintain_gen(conn)

    def _start_query(self, query: Query | None = None) -> PQGen[None]:
        if self._closed:
            raise psycopg.InterfaceError("the cursor is closed")
        if self._last_query is None or self._last_query is not query:
            self._last_query = None
            self._tx = Transformer(self._conn if self._adapters is None else self)
        if self._query or self.pgresult or self._execmany_returning is not None:  # used before
            self._reset()
        start: PQGen[None] = self._conn._start_query()
        return start

    def _maybe_prepare_gen(
        self, pgq: PostgresQuery, *, prepare: bool | None = None, binary: bool | None = None
    ) -> PQGen[None]:
        """psycopg's. BEGIN and SAVEPOINT ride before the statement, the number behind it."""
        conn: Any = self._conn
        self._traits = found = traits_of_text(pgq.query)
        queued = conn._begin_waits is not None or conn._queue
        if found & NOTED and not queued:
            conn._note(found)
        if conn._pipeline is not None or not (queued or found & WRITES):
            conn._streamed = conn._streamed and conn._pipeline is not None
            return super()._maybe_prepare_gen(pgq, prepare=prepare, binary=binary)
        if queued and not (found & conn._rides and conn._may_ride()):
            return self._flushed_gen(pgq, prepare, binary)
        if found & NOTED and queued:  # of the transaction that begins now
            conn._note(found)
        unit = conn._unnumbered() if found & WRITES else None
        if queued or unit is not None:
            return self._together_gen(pgq, unit, prepare, binary)
        return super()._maybe_prepare_gen(pgq, prepare=prepare, binary=binary)

    def _flushed_gen(
        self, pgq: PostgresQuery, prepare: bool | None, binary: bool | None
    ) -> PQGen[None]:
        """A statement on which what waits can't ride: it goes before it."""
        yield from self._conn._flush_gen()
        yield from self._maybe_prepare_gen(pgq, prepare=prepare, binary=binary)

    def _together_gen(
        self, pgq: PostgresQuery, unit: Unit | None, prepare: bool | None, binary: bool | None
    ) -> PQGen[None]:
        """The statement, and what rides on it. Results come `before`, for `ours`, and `behind`."""
        conn: Any = self._conn
        pgconn = self._pgconn
        if conn._streamed:
            yield from conn._end_streaming_gen()
        if self._prepares:
            prep, name = conn._prepared.get(pgq, prepare)
        else:
            prep, name = Prepare.NO, b""
        asks = conn._origin is None and conn._asks()
        waiting = (conn._begin_waits, conn._queue)
        try:
            pgconn.enter_pipeline_mode()
            if asks:
                conn._send_history()
            before = conn._send_queue()
            ours = self._send_own(pgq, prep, name, binary)
            behind = conn._send(POSITION_QUERY, before + ours) if unit is not None else 0
            pgconn.pipeline_sync()
            results = yield from collect_gen(pgconn, 2 if asks else 1)
        except psycopg.Error:
            if pgconn.status == OK:  # libpq has refused it: too many parameters
                conn._forget_interrupted()
                yield from rest_gen(pgconn)
                conn._unbegun = False  # BEGIN has gone before it
            raise
        finally:
            leave_pipeline_mode(pgconn)
        if asks:
            conn._came_from(results.pop(0))
        good = GOOD.issuperset(map(STATUS, results))
        if not good or conn._preparing:
            conn._prepared_now(results)
        if good and len(results) != before + ours + behind:
            conn._drop(f"{len(results)} results came instead of {before + ours + behind}")
            raise psycopg.InternalError("the server's answers don't belong to what was sent")
        own = [results[before + ours - 1]]
        # Only now: interrupted before, it would be believed to be prepared.
        key = conn._prepared.maybe_add_to_cache(pgq, prep, name)
        if prep is Prepare.SHOULD and results[before].status != COMMAND_OK:
            conn._prepared._names.pop(conn._prepared.key(pgq), None)
        elif key is not None:
            conn._prepared.validate(key, prep, name, own)
        if not good:
            if waiting[0] is not None and is_undefined_name(results[0]):
                # A DEALLOCATE inside a function. Nothing has been executed: once more, without.
                conn._begin_waits, conn._queue = waiting
                yield from self._together_gen(pgq, unit, prepare, binary)
                return
            check(results[:before], pgconn)
        conn._unbegun = False
        if unit is not None:
            conn._numbered(unit, results[-1])
        if not good:
            check(results, pgconn)
            self._check_results(own)
        self._set_results(own)

    def _send_own(self, pgq: PostgresQuery, prep: Prepare, name: bytes, binary: bool | None) -> int:
        """The statement itself. How many results come: two if it is prepared only now."""
        if prep is Prepare.NO:
            self._execute_send(pgq, binary=binary, force_extended=True)
            return 1
        if prep is Prepare.SHOULD:
            self._send_prepare(name, pgq)
        self._send_query_prepared(name, pgq, binary=binary)
        return 2 if prep is Prepare.SHOULD else 1
