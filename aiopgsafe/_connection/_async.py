"""The drop-in for `psycopg.AsyncConnection`."""

from __future__ import annotations

import logging
import os
import warnings
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from time import monotonic
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar, cast

import psycopg
from psycopg import IsolationLevel, Notify, errors, pq
from psycopg._capabilities import capabilities
from psycopg._conninfo_utils import gssapi_requested
from psycopg.adapt import AdaptersMap
from psycopg.conninfo import make_conninfo, timeout_from_conninfo
from psycopg.rows import AsyncRowFactory, Row, TupleRow, tuple_row

from .. import _backends
from .._backends import Expired, Waiter
from .._backends._lock import Lock
from .._ending import Section
from .._errors import goes_on, mark_lost
from .._transaction import Transaction
from ._connecting import add_option, attempts, check_timeout, connect_error
from ._cursor import AsyncCursor, AsyncServerCursor
from ._endings import Endings
from ._generators import begin_as
from ._losing import DisconnectHandler
from ._messages import Told
from ._pipeline import Pipeline
from ._released import renewed
from ._statements import ENDS, NOTED, STREAMS, traits_of

if TYPE_CHECKING:
    from psycopg.abc import AdaptContext, ConnParam, Params, PQGen
    from psycopg.pq.abc import PGconn

logger = logging.getLogger("aiopgsafe")

RV = TypeVar("RV")

OK = pq.ConnStatus.OK
BAD = pq.ConnStatus.BAD
ACTIVE = pq.TransactionStatus.ACTIVE
IDLE = pq.TransactionStatus.IDLE
COPYING = (pq.ExecStatus.COPY_IN, pq.ExecStatus.COPY_OUT, pq.ExecStatus.COPY_BOTH)


class AsyncConnection(Endings[Row]):
    """A connection to the server: `psycopg.AsyncConnection` for asyncio, uvloop and trio.

    The same methods with the same meanings, and these promises more: a COMMIT
    that has been sent is waited for whatever interrupts the task, its outcome is
    what the server said, and an interrupted statement is cancelled on the server
    and leaves the connection usable.

    :param commit_timeout: seconds that the server has to answer COMMIT, ROLLBACK
        or BEGIN; after that the connection is closed.
    :param cancel_timeout: seconds that it has to end a cancelled statement.
    :param statement_timeout: seconds that the server lets a statement run, whatever
        becomes of the client: no query of a program that was killed runs for ever.
        Costs nothing but a longer COMMIT: that is exempt from it.
    :param send_deadline: whether BEGIN brings the server a ``statement_timeout``, up to the
        deadline (and ``cancel_timeout``) of the task that begins: of anyio's and trio's
        scopes. An `asyncio.timeout()` is known to nobody else. No round trip more, but a
        command more for the server: off by default.
    :param commit_token: whether each COMMIT inserts a row of its own, by which its outcome
        can be known in any case: see the docs, "promises". Off by default.
    """

    __module__ = "aiopgsafe"

    lock: Lock  # type: ignore[assignment]  # psycopg's is asyncio's, and knows its owner

    commit_timeout: float = 30.0
    cancel_timeout: float = 5.0
    send_deadline: bool = False
    commit_token: bool = False

    _place: Any

    def __init__(
        self,
        pgconn: PGconn,
        row_factory: AsyncRowFactory[Row] = cast("AsyncRowFactory[Row]", tuple_row),  # noqa: B008
    ) -> None:
        super().__init__(pgconn, row_factory)
        self._backend = _backends.current()
        self.lock = Lock(self._backend.waiter)
        self.cursor_factory = AsyncCursor
        self.server_cursor_factory = AsyncServerCursor
        self._told = Told(pgconn, cast("Any", self))
        self._channel = self._backend.channel(pgconn, self._told)
        self._disconnect_handlers: list[DisconnectHandler] = []
        self._waiting_for_loss: list[Waiter] = []
        self._loss: psycopg.OperationalError | None = None
        self._keeper: DisconnectHandler | None = None
        self._handlers_changed = False
        self._in_libpq = False
        self._write_refused = False
        self._fatal: psycopg.Error | None = None
        self._signalled = None
        self._uncancellable: object = None
        self._section: Section | None = None
        self._set_up_riding()
        self._notifies_listening: deque[Notify] | None = None

    # Connecting

    @classmethod
    async def connect(  # type: ignore[override]  # two more keywords, of our own
        cls,
        conninfo: str = "",
        *,
        autocommit: bool = False,
        prepare_threshold: int | None = 5,
        context: AdaptContext | None = None,
        row_factory: AsyncRowFactory[Row] | None = None,
        cursor_factory: type[psycopg.AsyncCursor[Row]] | None = None,
        commit_timeout: float = 30.0,
        cancel_timeout: float = 5.0,
        statement_timeout: float | None = None,
        send_deadline: bool = False,
        commit_token: bool = False,
        **kwargs: ConnParam,
    ) -> Self:
        """Connect to the server, as `psycopg.AsyncConnection.connect()` does.

        Host names are resolved in a thread; hosts and addresses are tried one
        after the other, each for ``connect_timeout`` seconds.

        :param commit_timeout: see the class; seconds, positive and finite.
        :param cancel_timeout: see the class; seconds, positive and finite.
        :param statement_timeout: see the class; seconds, positive and finite; None: no
            limit of ours. Sent in libpq's ``options``, which a PgBouncer refuses unless
            it is told to ignore them.
        :param send_deadline: see the class.
        :param commit_token: see the class; its table must be there.

        Raises `ValueError` or `TypeError` for a bad timeout,
        `psycopg.ProgrammingError` for a bad connection string, and
        `psycopg.OperationalError` if no host could be connected to
        (`ConnectionTimeout`: none in time).
        """
        check_timeout("commit_timeout", commit_timeout)
        check_timeout("cancel_timeout", cancel_timeout)
        if statement_timeout is not None:
            check_timeout("statement_timeout", statement_timeout)
        params = await cls._get_connection_params(conninfo, **kwargs)
        reach = partial(reach_primary, "", **cast("dict[str, Any]", params))
        service = params.get("service") or "PGSERVICE" in os.environ
        if statement_timeout is not None and not service:
            add_option(params, f"-c statement_timeout={max(1, round(statement_timeout * 1000))}")
        timeout = timeout_from_conninfo(params)
        backend = _backends.current()
        failures: list[tuple[psycopg.Error, str]] = []
        for attempt in await attempts(backend, params):
            where = ", ".join(f"{k}: {attempt.get(k)!r}" for k in ("host", "port", "hostaddr"))
            gen = cls._connect_gen(make_conninfo("", **attempt))
            job = backend.connecting(cast("Any", gen))
            job.limit(monotonic() + timeout)
            try:
                conn: Self = await job.wait()
                break
            except Expired:
                failures.append((errors.ConnectionTimeout("connection timeout expired"), where))
            except psycopg.Error as exc:
                failures.append((exc, where))
            finally:
                # Interrupted: a half-open socket goes now, not with some traceback.
                job.abandon()
                gen.close()
        else:
            raise connect_error(failures)

        if (
            capabilities.has_used_gssapi()
            and conn.pgconn.used_gssapi
            and not gssapi_requested(params)
        ):
            warnings.warn(
                "the connection uses GSSAPI because of libpq's default 'gssencmode=prefer';"
                " set 'gssencmode' or PGGSSENCMODE to 'prefer' or 'require' to rely on it",
                RuntimeWarning,
                stacklevel=2,
            )
        conn.commit_timeout = commit_timeout
        conn.cancel_timeout = cancel_timeout
        conn.send_deadline = send_deadline
        conn.commit_token = commit_token
        conn._reach = reach
        if str(params.get("replication", "off")).lower() not in ("off", "false", "no", "0"):
            conn._rides, conn._origin = 0, False
        conn._statement_timeout = statement_timeout
        conn._limited = statement_timeout is not None
        conn._autocommit = bool(autocommit)
        if row_factory:
            conn.row_factory = row_factory
        if cursor_factory:
            conn.cursor_factory = cursor_factory
        if context:
            conn._adapters = AdaptersMap(context.adapters)
        conn.prepare_threshold = prepare_threshold
        if statement_timeout is not None and service:
            # The service may have options of its own, which ours would replace.
            command = f"SET statement_timeout TO {max(1, round(statement_timeout * 1000))}"
            try:
                await conn.wait(conn._commands_gen([command.encode()]))
            except BaseException:
                conn._close_now()
                raise
        return conn

    # Waiting

    async def wait(self, gen: PQGen[RV], interval: float = 0.0, timeout: float | None = None) -> RV:
        """Drive a generator that operates on the connection to its end.

        Interrupted, it cancels the statement on the server, takes what the server
        still says, and only then lets the interruption through.

        :param interval: for compatibility; nothing is polled here.
        :param timeout: seconds after which psycopg's ``_WaitTimeout`` is raised.
        """
        found = traits_of(gen)
        if found & NOTED:
            self._note(found)
        if not found & (ENDS | STREAMS):
            return await self._drive(gen, timeout)
        try:
            result = await self._drive(gen, timeout)
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

    def _expect_notifies(self) -> None:
        self._told.listening = True

    async def _drive(self, gen: PQGen[RV], timeout: float | None = None) -> RV:
        channel = self._channel
        if channel.closed:
            self._check_connection_ok()
        if self._signalled is not None:
            await self._settle_signalled()
        try:
            channel.start(gen, None if timeout is None else monotonic() + timeout)
            result: RV = channel.outcome() if channel.ended() else await channel.wait()
        except Expired:
            channel.abandon()
            raise errors._WaitTimeout("wait timeout expired") from None
        except GeneratorExit:
            self._signalled = None
            raise
        except BaseException as exc:
            # A cancellation, or the exception of a signal handler.
            if not isinstance(exc, Exception):
                await self._stop_statement(exc, gen)
            if self._signalled is not None:
                self._signalled.saw(exc)
                await self._settle_signalled(exc)
            if isinstance(exc, errors.ReadOnlySqlTransaction):
                self._write_refused = True  # a pool asks why
            if isinstance(exc, psycopg.OperationalError) and self.pgconn.status != OK:
                mark_lost(exc, self.pgconn)
            raise
        if self._signalled is not None and self._signalled.over:
            try:
                await self._settle_signalled()
            except BaseException as exc:
                await self._stop_statement(exc, gen)
                raise
        return result

    @asynccontextmanager
    async def pipeline(self) -> AsyncIterator[psycopg.AsyncPipeline]:
        """Switch the connection into pipeline mode for a block."""
        self._check_connection_ok()
        if self._pipeline is None:
            self._pipeline = Pipeline(self)
        async with self._pipeline as pipeline:
            yield pipeline

    @asynccontextmanager
    async def _pipeline_nolock(self) -> AsyncIterator[psycopg.AsyncPipeline]:
        # psycopg's asserts that its pipeline was left; interrupted while it is
        # entered, that fails and takes the cancellation's place.
        self._pipeline = Pipeline(self, locked=True)
        async with self._pipeline as pipeline:
            yield pipeline

    async def _ask(
        self, query: bytes, timeout: float, params: Params | None = None
    ) -> list[TupleRow]:
        """Execute a query of ours. `Expired` without an answer in time, and the end."""
        cur = psycopg.AsyncCursor(self, row_factory=tuple_row)
        async with self.lock:
            try:
                await self._drive(cur._execute_gen(query, params, prepare=False), timeout)
            except errors._WaitTimeout:
                self._drop(f"no answer within {timeout:g} seconds")
                raise Expired from None
        return await cur.fetchall() if cur.description else []

    def transaction(  # type: ignore[override]  # psycopg's is a generator around a block
        self,
        savepoint_name: str | None = None,
        force_rollback: bool = False,
        *,
        isolation_level: IsolationLevel | int | None = None,
        read_only: bool | None = None,
        deferrable: bool | None = None,
        commit_token: bool | None = None,
    ) -> Transaction[Row]:
        """A transaction block, or a savepoint inside one. ``async with`` it.

        :param savepoint_name: name of the savepoint; chosen if not given.
        :param force_rollback: roll back at the end in any case.
        :param isolation_level: of the outermost block, in its BEGIN; so are
        :param read_only: and
        :param deferrable: ; None: as the connection's attributes say.
        :param commit_token: whether its COMMIT inserts a row of its own (see the class), of
            the outermost block; None: as the connection does.

        Raises `ValueError` for an unknown isolation level; entering raises
        `psycopg.ProgrammingError` if they are given for a savepoint.
        """
        begin = begin_as(self, isolation_level, read_only, deferrable)
        return Transaction(
            *(self, savepoint_name, force_rollback), begin=begin, commit_token=commit_token
        )

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_val: BaseException | None,
        exc_tb: TracebackType | None,
    ) -> None:
        if self.closed:
            await self._settle_at_close()
            return
        try:
            if exc_val is not None:
                # Problems of a rollback must not hide the exception that goes through.
                try:
                    await self.rollback()
                except (psycopg.Error, ExceptionGroup) as exc:
                    level = logging.DEBUG if self.closed else logging.WARNING
                    logger.log(level, "error ignored in rollback on %s: %s", self, exc)
                except BaseException as raised:
                    if not goes_on(exc_val, raised):
                        raise
            else:
                await self.commit()
        finally:
            # Unlike psycopg also when COMMIT failed or the task was interrupted:
            # nobody else will. Connections of a pool stay open.
            if not getattr(self, "_pool", None):
                await self.close()

    async def close(self) -> None:
        """Close the connection. What runs on it ends with an `OperationalError`.

        A transaction in progress is rolled back by the server.
        """
        if not self.closed:
            pool = getattr(self, "_pool", None)
            if pool and getattr(pool, "close_returns", False):
                await pool.putconn(self)
                return
            self._close_now()
        await self._settle_at_close()

    def _renewed(self) -> Self:
        """Move to a new object for the next holder; this one raises `ConnectionReleased`."""
        return renewed(self)

    def __del__(self) -> None:  # type: ignore[override]
        channel = getattr(self, "_channel", None)
        if channel is not None and not channel.closed:
            channel.discard()
        super().__del__()


CONNECT_TIMEOUT = 5
"""Seconds for a host to answer when an outcome is asked for, unless its parameters say less."""


async def reach_primary(conninfo: str = "", **params: Any) -> AsyncConnection[TupleRow]:
    """A connection to whichever of the hosts is the primary, to ask for an outcome there."""
    params["connect_timeout"] = min(
        int(params.get("connect_timeout") or CONNECT_TIMEOUT), CONNECT_TIMEOUT
    )
    params["target_session_attrs"] = "primary"
    return await AsyncConnection.connect(conninfo, autocommit=True, **params)
