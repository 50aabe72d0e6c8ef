"""`aiopgsafe doctor`: what matters for the promises, and what to do about it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from functools import partial
from secrets import token_hex
from time import perf_counter
from typing import Any, Literal

import anyio
import psycopg
from psycopg import pq
from rich.table import Table
from rich.text import Text

from .. import AsyncConnection, Database
from .running import FAULTY, OK, Screen, run, until_nobody_reads

Level = Literal["good", "advice", "bad"]

MARKS: dict[Level, tuple[str, str]] = {
    "good": ("✓", "green"),
    "advice": ("!", "yellow"),
    "bad": ("✗", "red"),
}

KEEPALIVE = {
    "keepalives_idle": "10",
    "keepalives_interval": "5",
    "keepalives_count": "3",
    "tcp_user_timeout": "20000",
}
"""libpq's parameters, and what we would set them to."""

ALTER = "alter role ... set"
"""How a setting is made for the application's role; it needs a new connection only."""

ANSWER_TIMEOUT = 5.0
"""Seconds for each question to be answered."""

OUTCOME = {
    "the transaction's number": "select pg_current_xact_id_if_assigned(), pg_xact_status('3')",
    "a place in the WAL": "select pg_logical_emit_message(false, 'aiopgsafe', '')",
    "the system's number": "select system_identifier from pg_control_system()",
    "the timeline": "select pg_walfile_name(pg_current_wal_lsn()), pg_current_wal_lsn()",
    "the last recovery": "select stats_reset from pg_stat_bgwriter",
}
"""What has to be asked to find out what became of a COMMIT: see the docs, "promises"."""

SETTINGS = """
    select name, setting, unit from pg_settings where name in (
        'client_connection_check_interval', 'default_transaction_read_only', 'fsync',
        'full_page_writes', 'idle_in_transaction_session_timeout', 'max_connections',
        'statement_timeout', 'superuser_reserved_connections', 'synchronous_commit',
        'synchronous_standby_names', 'tcp_keepalives_idle', 'transaction_timeout'
    )
"""


@dataclass
class Finding:
    """A row of the table.

    :ivar subject: what was looked at.
    :ivar found: what was found.
    :ivar level: "bad": a promise doesn't hold.
    :ivar advice: what to do.
    """

    subject: str
    found: str
    level: Level = "good"
    advice: str = ""


def doctor(dsn: str, loop: str) -> int:
    """Print the table, and return the command's exit status."""
    return run("doctor", partial(_doctor, dsn), loop)


async def _doctor(dsn: str) -> int:
    async with await AsyncConnection.connect(dsn, autocommit=True, cancel_timeout=1) as conn:
        findings = [finding async for finding in examine(conn, dsn)]
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column()
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in findings:
        mark, color = MARKS[finding.level]
        table.add_row(Text(mark, color), finding.subject, finding.found)
        if finding.advice:
            table.add_row("", "", Text(finding.advice, color))
    with until_nobody_reads():
        Screen().print(table)
    return FAULTY if any(finding.level == "bad" for finding in findings) else OK


async def examine(conn: AsyncConnection[Any], dsn: str) -> AsyncIterator[Finding]:
    for finding in client(conn):
        yield finding
    between = await pooler(conn)
    yield between
    yield await notifications(dsn)
    settings = {name: (value, unit) for name, value, unit in await ask(conn, SETTINGS)}
    for finding in server_settings(settings):
        yield finding
    yield await recovery(conn)
    yield await outcomes(conn, pooled=between.level != "good")
    yield await token_table(conn)
    yield await connections(conn, settings)


async def ask(conn: AsyncConnection[Any], query: str) -> list[tuple[Any, ...]]:
    with anyio.fail_after(ANSWER_TIMEOUT):
        cur = await conn.execute(query.encode())
        return await cur.fetchall()


def client(conn: AsyncConnection[Any]) -> list[Finding]:
    """What the client's side knows by itself."""
    info, version = conn.info, pq.version()
    findings = [
        Finding("PostgreSQL", f"{version_text(info.server_version)} at {info.host}:{info.port}"),
        Finding("libpq", f"{version_text(version)} ({pq.__impl__})")
        if version >= 170000
        else Finding(
            *("libpq", f"{version_text(version)} ({pq.__impl__})", "advice"),
            advice="from 17 on a query is cancelled without a thread",
        ),
    ]
    local = info.host.startswith("/") or info.hostaddr in ("127.0.0.1", "::1")
    if conn.pgconn.ssl_in_use:
        findings.append(Finding("TLS", "yes"))
    elif local:
        findings.append(Finding("TLS", "no, and none is needed on this machine"))
    else:
        findings.append(Finding("TLS", "no", "advice", "sslmode=verify-full"))
    parameters = info.get_parameters()
    keepalive = {k: v for k, v in parameters.items() if k in KEEPALIVE}
    if info.host.startswith("/"):
        findings.append(Finding("TCP keepalive", "not needed: a unix socket"))
    elif keepalive:
        findings.append(Finding("TCP keepalive", joined(keepalive)))
    else:
        findings.append(
            Finding(
                *("TCP keepalive", "the system's: a dead peer is noticed after hours", "advice"),
                advice=f"in the connection string: {joined(KEEPALIVE)}",
            )
        )
    return findings


async def pooler(conn: AsyncConnection[Any]) -> Finding:
    ((pid,),) = await ask(conn, "select pg_backend_pid()")
    if pid == conn.info.backend_pid:
        return Finding("connection pooler", "none: the server itself answers")
    return Finding(
        *("connection pooler", "something stands between (PgBouncer?)", "advice"),
        advice="prepare_threshold=None, unless it keeps track of prepared statements",
    )


async def notifications(dsn: str) -> Finding:
    channel = f"aiopgsafe_doctor_{token_hex(4)}"
    subject = "notifications"
    db = Database(dsn, min_size=0, max_size=1)
    try:
        with anyio.fail_after(ANSWER_TIMEOUT):
            async with db, db.listen(channel) as subscription:
                await db.execute("select 1")
                start = perf_counter()
                await db.notify(channel)
                await anext(subscription)
                return Finding(subject, f"arrive, after {(perf_counter() - start) * 1000:.1f} ms")
    except TimeoutError:
        return Finding(subject, f"none arrived in {ANSWER_TIMEOUT:g} s", "bad")
    except psycopg.NotSupportedError:
        return Finding(
            *(subject, "never arrive: a pooler in transaction mode stands between", "bad"),
            advice="Database(..., listen_conninfo=) that leads past it",
        )
    except psycopg.Error as error:
        return Finding(subject, str(error).strip(), "bad")


def server_settings(settings: dict[str, tuple[str, str | None]]) -> list[Finding]:
    """What the server is set to, as far as it bears on what a client may rely on."""
    shown = {name: f"{value} {unit or ''}".strip() for name, (value, unit) in settings.items()}

    def value(name: str) -> str:
        return settings.get(name, ("", None))[0]

    findings: list[Finding] = []
    for name, why in (
        ("fsync", "a crash may lose or damage what was committed"),
        ("full_page_writes", "a crash may damage what was committed"),
    ):
        if value(name) == "off":
            findings.append(Finding(name, "off", "bad", why))
    if value("synchronous_commit") == "off":
        advice = "a crash loses the last commits, though they were acknowledged"
        findings.append(Finding("synchronous_commit", "off", "advice", advice))
    else:
        findings.append(Finding("synchronous_commit", value("synchronous_commit")))
    if value("synchronous_standby_names"):
        advice = "COMMIT waits for a standby, commit_timeout seconds at most: then its outcome"
        advice += " is unknown"
        found = value("synchronous_standby_names")
        findings.append(Finding("synchronous_standby_names", found, "advice", advice))
    for name, advice in (
        ("client_connection_check_interval", f"{ALTER} = '10s': a query ends with its client"),
        ("idle_in_transaction_session_timeout", f"{ALTER} = '60s': a lost client's locks end"),
        ("transaction_timeout", f"{ALTER} = '10min': bounds what a transaction can hold up"),
        ("statement_timeout", "connect(..., statement_timeout=30) bounds a query"),
    ):
        if name not in settings:
            continue
        if value(name) in ("0", "-1"):
            findings.append(
                Finding(name, "off", "advice", advice.replace(ALTER, f"{ALTER} {name}"))
            )
        else:
            findings.append(Finding(name, shown[name]))
    if value("default_transaction_read_only") == "on":
        findings.append(Finding("default_transaction_read_only", "on", "advice", "no writes"))
    return findings


async def recovery(conn: AsyncConnection[Any]) -> Finding:
    ((standby,),) = await ask(conn, "select pg_is_in_recovery()")
    if standby:
        advice = "no writes, no LISTEN: target_session_attrs=read-write with all hosts"
        return Finding("role of the server", "a standby", "advice", advice)
    return Finding("role of the server", "primary")


async def outcomes(conn: AsyncConnection[Any], *, pooled: bool) -> Finding:
    """Whether this role may ask what one has to, to know what became of a COMMIT."""
    refused = ["the session behind the pooler is not ours"] if pooled else []
    for what, query in OUTCOME.items():
        try:
            await ask(conn, query)
        except psycopg.Error as error:
            refused.append(f"{what} ({error.diag.message_primary or error})")
    subject = "outcome of a lost COMMIT"
    if not refused:
        return Finding(subject, "can be asked for by this role")
    return Finding(
        *(subject, f"can't be asked for: {', '.join(refused)}", "advice"),
        advice="commit_token=True, or a COMMIT whose connection is lost raises CommitUnknown",
    )


async def token_table(conn: AsyncConnection[Any]) -> Finding:
    query = (
        "select exists (select from pg_class join pg_namespace n on n.oid = relnamespace"
        " where nspname = 'aiopgsafe' and relname = 'token')"
    )
    ((there,),) = await ask(conn, query)
    found = "there" if there else "not there; only commit_token=True needs it"
    return Finding("table of tokens", found)


async def connections(
    conn: AsyncConnection[Any], settings: dict[str, tuple[str, str | None]]
) -> Finding:
    query = "select count(*) from pg_stat_activity where backend_type = 'client backend'"
    ((used,),) = await ask(conn, query)
    allowed = int(settings["max_connections"][0])
    allowed -= int(settings["superuser_reserved_connections"][0])
    if used > 0.8 * allowed:
        advice = "the sum of all pools' max_size must stay below"
        return Finding("connections", f"{used} of {allowed} in use", "advice", advice)
    return Finding("connections", f"{used} of {allowed} in use")


def joined(parameters: dict[str, str]) -> str:
    return " ".join(f"{name}={value}" for name, value in parameters.items())


def version_text(number: int) -> str:
    return f"{number // 10000}.{number % 10000}"
