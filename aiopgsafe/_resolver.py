"""What became of a COMMIT whose answer was lost: ask the server, never guess.

`pg_xact_status(xid)` alone lies. A transaction's number whose WAL was not flushed before
a crash, or had not reached the standby before a promotion, is handed out again: the
status is then another transaction's. So a `Ticket` also holds the server's `History`
and a position in the WAL behind the number, and `judge()` believes the status only
where both rule that out:

    in recovery, another system, status unknown (too old)     can't be known
    aborted                                                   rolled back
    prepared (PREPARE TRANSACTION): open, also after a crash  ask again
    the same history: committed                               committed
                      in progress                             ask again
    another history:  in progress, or a number of the future  rolled back: the number was lost
                      more than one promotion lies between    can't be known
                      recovery stopped before our position    rolled back: another's commit
                      else                                    committed

Two crashes before anybody asks remain a hole, and so does what writes without a number
(NOTIFY alone). A `Token` closes them: a row of the transaction's own, inserted together
with COMMIT. Who asks inserts the same row: where that succeeds the transaction can never
commit any more, and where it is there already the transaction has.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from time import time
from typing import Any, NamedTuple
from uuid import UUID, uuid4

from ._outcome import COMMITTED, ROLLED_BACK, UNKNOWN, TransactionState

__all__ = [
    "ASK",
    "EVICT",
    "HISTORY",
    "POSITION",
    "STATUS",
    "Answer",
    "History",
    "Origin",
    "Ticket",
    "Token",
    "judge",
    "parse_ticket",
]

HISTORY = """
    select (select system_identifier::text from pg_catalog.pg_control_system()),
        pg_catalog.substr(pg_catalog.pg_walfile_name(pg_catalog.pg_current_wal_lsn()), 1, 8),
        (select extract(epoch from stats_reset)::text from pg_catalog.pg_stat_bgwriter),
        extract(epoch from pg_catalog.pg_postmaster_start_time())::text,
        pg_catalog.pg_last_wal_replay_lsn()::text,
        pid::text, extract(epoch from backend_start)::text,
        pg_catalog.pg_current_xact_id_if_assigned()::text,
        (select pg_catalog.bool_or(pg_catalog.has_function_privilege(oid, 'execute'))::text
            from pg_catalog.pg_proc where proname = 'pg_logical_emit_message')
    from pg_catalog.pg_stat_get_activity(pg_catalog.pg_backend_pid())
"""
"""The server's history, this session's beginning, and whether `POSITION` may be asked for.

Any role may ask; not in recovery. ``stats_reset`` is renewed by every crash recovery and
survives clean restarts. Somebody may renew it by hand (``pg_stat_reset_shared``): the last two
columns of the history tell that from a crash, after which recovery has ended further on.
Times are seconds: how a session writes a timestamp depends on its TimeZone and DateStyle, and who
asks later may have others.
"""

POSITION = """
    select pg_catalog.pg_current_xact_id_if_assigned(),
        case when pg_catalog.pg_current_xact_id_if_assigned() is not null
        then pg_catalog.pg_logical_emit_message(true, 'aiopgsafe', '') end
"""
"""Behind a statement that writes: the transaction's number, and a position behind it in the WAL.

What is recovered up to there has seen the number, and hands it out to nobody else. That a
statement has written proves nothing: to a temporary or unlogged table it writes no WAL. So
a message of ours does, the smallest record that carries the number.
"""

ASK = """
    select case when recovering then null else
            (select system_identifier::text from pg_catalog.pg_control_system()) end,
        case when recovering then null else
            pg_catalog.substr(pg_catalog.pg_walfile_name(pg_catalog.pg_current_wal_lsn()), 1, 8)
            end,
        (select extract(epoch from stats_reset)::text from pg_catalog.pg_stat_bgwriter),
        extract(epoch from pg_catalog.pg_postmaster_start_time())::text,
        pg_catalog.pg_last_wal_replay_lsn()::text,
        (select state from pg_catalog.pg_stat_activity
            where pid = %(pid)s and extract(epoch from backend_start)::text = %(backend_start)s),
        exists (select from pg_catalog.pg_prepared_xacts
            where transaction = %(xid)s::text::pg_catalog.xid8::pg_catalog.xid)
    from pg_catalog.pg_is_in_recovery() recovering
"""
"""What the server is now, and what the session does whose COMMIT it was."""

STATUS = "select pg_catalog.pg_xact_status(%(xid)s::text::pg_catalog.xid8)"
"""Raises `InvalidParameterValue` for a number that hasn't been given out yet."""

EVICT = """
    select pg_catalog.pg_terminate_backend(pid) from pg_catalog.pg_stat_activity
    where pid = %(pid)s and extract(epoch from backend_start)::text = %(backend_start)s
        and state like 'idle in transaction%%'
"""
"""End a session that waits for a client that is gone: its COMMIT, arriving late, must find nothing.

Only while it is idle: one that waits for a synchronous standby has committed, and
terminating it would make that visible without the standby.
"""

INSERT_TOKEN = b"insert into aiopgsafe.token (token) values ('%s')"


@dataclass(frozen=True, slots=True)
class History:
    """Which life of which server: numbers of another one may mean something else.

    :ivar system: the database system identifier.
    :ivar timeline: hexadecimal, as in the names of WAL files.
    :ivar recovered: when the statistics were reset: by the last crash recovery. Seconds
        since 1970, as text; so is
    :ivar started: when the server was.
    :ivar replayed: where the last recovery since then has ended; None if there was none.
    """

    system: str
    timeline: str
    recovered: str
    started: str
    replayed: str | None

    def goes_on_in(self, other: History) -> bool:
        """Whether `other`, read later, is of the same server without a recovery in between.

        Each recovery ends further on in the WAL than the one before it.
        """
        if (self.system, self.timeline) != (other.system, other.timeline):
            return False
        unrecovered = (self.started, self.replayed) == (other.started, other.replayed)
        return self.recovered == other.recovered or unrecovered


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a session's transactions come from.

    :ivar pid: of the session's server process.
    :ivar backend_start: when that began: process numbers are used again.
    """

    history: History
    pid: int
    backend_start: str

    @property
    def session(self) -> dict[str, Any]:
        """Parameters of `ASK` and `EVICT`."""
        return {"pid": self.pid, "backend_start": self.backend_start}

    @classmethod
    def of(cls, row: Sequence[str | None]) -> Origin:
        """From the row that `HISTORY` gives."""
        *history, pid, backend_start = row[:7]
        return cls(History(*history), int(pid or 0), backend_start or "")  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class Ticket:
    """What it takes to ask for a transaction's outcome, later and from elsewhere.

    :ivar xid: the transaction's number (`xid8`: it doesn't wrap around).
    :ivar lsn: a position in the WAL behind a record with the number.
    """

    xid: int
    lsn: str
    origin: Origin

    def __str__(self) -> str:
        return json.dumps(asdict(self))

    @property
    def where(self) -> str:
        """For people: which transaction of which server."""
        history = self.origin.history
        return f"transaction {self.xid} of system {history.system}, timeline {history.timeline}"


@dataclass(frozen=True, slots=True)
class Token:
    """The row that a transaction inserts with its COMMIT: see `aiopgsafe tokens create`.

    :ivar made: when; seconds since 1970, by the client's clock.
    :ivar database: in which the row is; None: in the one that is asked.
    """

    token: str
    made: float
    database: str | None = None
    xid: None = None

    @classmethod
    def new(cls) -> Token:
        return cls(str(uuid4()), time())

    def of_database(self, name: str) -> Token:
        """For the ticket: who asks elsewhere finds no row, which tells nothing."""
        return replace(self, database=name)

    def __str__(self) -> str:
        return json.dumps({"token": self.token, "made": self.made, "database": self.database})

    @property
    def where(self) -> str:
        """For people."""
        return f"the transaction with token {self.token}"

    @property
    def insert(self) -> bytes:
        """The statement that goes with COMMIT."""
        return INSERT_TOKEN % self.token.encode()


def parse_ticket(text: str) -> Ticket | Token:
    """The ticket that was written with `str()`. Raises `ValueError` for anything else."""
    try:
        fields: dict[str, Any] = json.loads(text)
        if "token" in fields:
            return Token(str(UUID(fields["token"])), float(fields["made"]), str(fields["database"]))
        origin = fields["origin"]
        origin = Origin(**{**origin, "history": History(**origin["history"])})
        ticket = Ticket(**{**fields, "origin": origin})
        position(ticket.lsn)
        int(origin.history.timeline, 16)
        for seconds in (origin.history.recovered, origin.history.started, origin.backend_start):
            float(seconds)
        ints = isinstance(ticket.xid, int) and isinstance(origin.pid, int)
    except (TypeError, KeyError, AttributeError, ValueError) as exc:
        raise ValueError(f"this is no ticket of a transaction: {text!r}") from exc
    if not ints:
        raise ValueError(f"this is no ticket of a transaction: {text!r}")
    return ticket


class Answer(NamedTuple):
    """The row that `ASK` gives, and the status.

    :ivar system: None in recovery.
    :ivar session: its state, None if it has ended.
    :ivar prepared: whether it waits for COMMIT PREPARED, or ROLLBACK PREPARED, by anybody.
    :ivar status: None if it is too old to be known.
    :ivar given_out: whether there is such a transaction at all.
    """

    system: str | None
    timeline: str | None
    recovered: str | None
    started: str | None
    replayed: str | None
    session: str | None
    prepared: bool = False
    status: str | None = None
    given_out: bool = True

    @property
    def in_recovery(self) -> bool:
        return self.system is None

    @property
    def history(self) -> History:
        return History(
            *(self.system or "", self.timeline or "0", self.recovered or ""),
            *(self.started or "", self.replayed),
        )


def judge(ticket: Ticket, answer: Answer) -> TransactionState | None:
    """The outcome; None: not decided yet, ask again."""
    history = ticket.origin.history
    if answer.in_recovery:
        return None
    if answer.system != history.system:
        return UNKNOWN
    if answer.prepared:
        return None
    if answer.status == "aborted":
        return ROLLED_BACK
    if history.goes_on_in(answer.history):
        return {"committed": COMMITTED, "in progress": None}.get(answer.status or "", UNKNOWN)
    if answer.status == "in progress" or not answer.given_out:
        return ROLLED_BACK
    if answer.status != "committed" or answer.replayed is None:
        return UNKNOWN
    if int(answer.history.timeline, 16) > int(history.timeline, 16) + 1:
        return UNKNOWN
    if position(answer.replayed) < position(ticket.lsn):
        return ROLLED_BACK
    return COMMITTED


def position(lsn: str) -> int:
    """A WAL position as a number of bytes."""
    high, _, low = lsn.partition("/")
    return int(high, 16) << 32 | int(low, 16)
