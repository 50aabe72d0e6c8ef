"""P2: what became of a COMMIT is known by asking, or it is not known. Never a wrong answer."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psycopg
import pytest

from aiopgsafe import TransactionState
from aiopgsafe._resolver import (
    ASK,
    HISTORY,
    POSITION,
    STATUS,
    Answer,
    History,
    Origin,
    Ticket,
    judge,
    parse_ticket,
)
from aiopgsafe.testing import TemporaryServer
from tests.conftest import Figures

COMMITTED, ROLLED_BACK, UNKNOWN = (
    TransactionState.COMMITTED,
    TransactionState.ROLLED_BACK,
    TransactionState.UNKNOWN,
)

HERE = History("7", "00000001", "1767225600.000001", "1767000000.000001", None)
TICKET = Ticket(100, "0/2000", Origin(HERE, 1, "1767312000.5"))
SAME = Answer("7", "00000001", "1767225600.000001", "1767000000.000001", None, None)
RECOVERED = Answer("7", "00000001", "1767398400.000001", "1767000000.000001", "0/3000", None)


@pytest.mark.parametrize(
    ("answer", "state"),
    [
        (SAME._replace(status="committed"), COMMITTED),
        (SAME._replace(status="aborted"), ROLLED_BACK),
        (SAME._replace(status="in progress"), None),
        (SAME._replace(status=None), UNKNOWN),
        (SAME._replace(given_out=False), UNKNOWN),
        (SAME._replace(system="8", status="committed"), UNKNOWN),
        (SAME._replace(system=None, timeline=None, status="committed"), None),
        # After a crash, or on a promoted standby.
        (RECOVERED._replace(status="committed"), COMMITTED),
        (RECOVERED._replace(status="committed", replayed="0/1FFF"), ROLLED_BACK),
        (RECOVERED._replace(status="committed", replayed=None, started="1798761600"), UNKNOWN),
        # Somebody has reset the statistics by hand: no recovery, the same history.
        (RECOVERED._replace(status="committed", replayed=None), COMMITTED),
        (RECOVERED._replace(status="in progress", replayed=None), None),
        (RECOVERED._replace(status="aborted"), ROLLED_BACK),
        (RECOVERED._replace(status="in progress"), ROLLED_BACK),
        (RECOVERED._replace(given_out=False), ROLLED_BACK),
        # PREPARE TRANSACTION outlives a crash.
        (SAME._replace(status="in progress", prepared=True), None),
        (RECOVERED._replace(status="in progress", prepared=True), None),
        (RECOVERED._replace(status=None), UNKNOWN),
        (RECOVERED._replace(status="committed", timeline="00000002"), COMMITTED),
        (RECOVERED._replace(status="committed", timeline="00000003"), UNKNOWN),
        (RECOVERED._replace(status="committed", replayed="1/0"), COMMITTED),
    ],
)
def test_the_table(answer: Answer, state: TransactionState | None) -> None:
    assert judge(TICKET, answer) is state


BY_LOCAL_TIME = str(
    replace(TICKET, origin=replace(TICKET.origin, backend_start="2026-01-02 03:04"))
)


def test_a_ticket_is_written_and_read() -> None:
    assert parse_ticket(str(TICKET)) == TICKET


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[]",
        "1",
        "x",
        str(TICKET)[:-1],
        str(replace(TICKET, lsn="nowhere")),
        BY_LOCAL_TIME,
    ],
)
def test_what_is_no_ticket_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="no ticket"):
        parse_ticket(text)


Conn = psycopg.Connection[Any]


def begin(conn: Conn, id: int) -> Ticket:
    """Write a row, and take the ticket as a client of ours does."""
    history = conn.execute(HISTORY.encode()).fetchone()
    conn.commit()
    conn.execute("insert into t values (%s)", (id,))
    position = conn.execute(POSITION.encode()).fetchone()
    assert history is not None
    assert position is not None
    origin = Origin.of(history)
    assert origin.pid == conn.info.backend_pid
    return Ticket(int(position[0]), position[1], origin)


def ask(dsn: str, ticket: Ticket) -> Answer:
    values = {**ticket.origin.session, "xid": str(ticket.xid)}
    with psycopg.connect(dsn, autocommit=True) as conn:
        row = conn.execute(ASK.encode(), values).fetchone()
        assert row is not None
        answer = Answer(*row)
        try:
            status = conn.execute(STATUS.encode(), values).fetchone()
        except psycopg.errors.InvalidParameterValue:
            return answer._replace(given_out=False)
        assert status is not None
        return answer._replace(status=status[0])


@pytest.fixture(scope="module")
def crashing(bindir: Path) -> Iterator[TemporaryServer]:
    # Numbers are handed out again only where WAL gets lost: it is flushed late here.
    settings: dict[str, str | int | bool] = {"wal_writer_delay": "10s", "autovacuum": False}
    with TemporaryServer(bindir=bindir, settings=settings) as server:
        server.psql("create table t (id int primary key)")
        yield server


def test_without_a_fault_the_session_itself_is_seen(crashing: TemporaryServer) -> None:
    with psycopg.connect(crashing.dsn) as conn:
        ticket = begin(conn, -1)
        answer = ask(crashing.dsn, ticket)
        assert (answer.status, answer.session) == ("in progress", "idle in transaction")
        assert judge(ticket, answer) is None
        conn.commit()
        assert judge(ticket, ask(crashing.dsn, ticket)) is COMMITTED
        ticket = begin(conn, -2)
        conn.rollback()
        assert judge(ticket, ask(crashing.dsn, ticket)) is ROLLED_BACK


@pytest.mark.parametrize("fault", ["backend", "server", "immediate stop"])
def test_after_a_crash_no_answer_is_wrong(
    crashing: TemporaryServer, fault: str, figures: Figures, long: bool
) -> None:
    trials = 100 if long else 6
    rng = random.Random(fault)
    counts = dict.fromkeys((COMMITTED, ROLLED_BACK, UNKNOWN), 0)
    naive = 0
    for trial in range(trials):
        tickets: dict[int, Ticket] = {}
        conns: list[Conn] = []
        for number in range(8):
            conn = psycopg.connect(crashing.dsn)
            conns.append(conn)
            synchronous = "on" if rng.random() < 0.3 else "off"
            conn.execute(f"set synchronous_commit = {synchronous}".encode())
            conn.commit()
            id = hash((fault, trial, number)) & 0x7FFFFFFF
            tickets[id] = begin(conn, id)
            if rng.random() < 0.7:
                conn.commit()
        if fault == "backend":
            crashing.kill_backend(conns[0].info.backend_pid, wait=True)
        elif fault == "server":
            crashing.kill()
            crashing.start()
        else:
            crashing.restart("immediate")
        for conn in conns:
            conn.close()
        # Others work on meanwhile, and are given the numbers that were lost.
        with psycopg.connect(crashing.dsn, autocommit=True) as other:
            for _ in range(rng.randrange(12)):
                other.execute("insert into t values (-1 - (random() * 2000000000)::int)")
            truth = {
                id for (id,) in other.execute("select id from t where id = any(%s)", ([*tickets],))
            }
        for id, ticket in tickets.items():
            answer = ask(crashing.dsn, ticket)
            state = judge(ticket, answer)
            assert state is not None
            counts[state] += 1
            naive += (answer.status == "committed") != (id in truth)
            if state is not UNKNOWN:
                assert (state is COMMITTED) == (id in truth), (ticket, answer)
    figures(
        fault=fault,
        doubts=sum(counts.values()),
        **{state.value.replace(" ", "_"): count for state, count in counts.items()},
        wrong=0,
        wrong_by_the_status_alone=naive,
    )
