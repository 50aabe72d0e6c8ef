"""`aiopgsafe listen` and `aiopgsafe doctor`, run as their users run them."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

import psycopg
import pytest

from aiopgsafe._tools.tokens import NIL
from aiopgsafe.testing import FaultProxy, Freeze, query

Admin = psycopg.Connection[Any]

COMMAND = [sys.executable, "-m", "aiopgsafe"]


@contextmanager
def listening(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """The command, once it listens."""
    # Where the tests themselves run in the background, a shell has SIGINT ignored.
    ours = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        process = subprocess.Popen(
            [*COMMAND, "listen", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    finally:
        signal.signal(signal.SIGINT, ours)
    try:
        assert process.stderr is not None
        assert "Ctrl-C ends it" in process.stderr.readline()
        yield process
    finally:
        process.kill()
        process.communicate()


def line(stream: IO[str] | None) -> str:
    assert stream is not None
    return stream.readline()


def end_listeners(admin: Admin) -> None:
    admin.execute(
        "select pg_terminate_backend(pid) from pg_stat_activity"
        " where query like '%LISTEN%' and pid <> pg_backend_pid()"
    )


@pytest.mark.parametrize("loop", ["asyncio", "uvloop", "trio"])
def test_listen_prints_notifications_and_gaps_until_ctrl_c(
    dsn: str, admin: Admin, loop: str
) -> None:
    with listening(dsn, "a", "B c", "--json", "--loop", loop) as process:
        admin.execute("""notify a, '1'; notify "B c", '[bold]'""")
        for channel, payload in (("a", "1"), ("B c", "[bold]")):
            found = json.loads(line(process.stdout))
            pid = admin.info.backend_pid
            assert found == {"channel": channel, "payload": payload, "pid": pid}
        end_listeners(admin)
        found = json.loads(line(process.stdout))
        assert found["gap"] == ["a", "B c"]
        admin.execute("notify a, '2'")
        assert json.loads(line(process.stdout))["payload"] == "2"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=10)
        assert process.returncode == 0
        assert "Traceback" not in errors


def test_listen_prints_text_for_people(dsn: str, admin: Admin) -> None:
    with listening(dsn, "a") as process:
        admin.execute("notify a, '[bold]as it is'")
        assert "  a " in (text := line(process.stdout))
        assert text.endswith("  [bold]as it is\n")
        end_listeners(admin)
        assert "gap: what was sent since" in line(process.stdout)


def test_listen_ends_when_nobody_reads_any_more(dsn: str, admin: Admin) -> None:
    with listening(dsn, "a", "--json") as process:
        assert process.stdout is not None
        process.stdout.close()
        process.stdout = None
        admin.execute("notify a, '1'")
        _, errors = process.communicate(timeout=10)
        assert process.returncode == 0
        assert errors == ""


def test_text_from_elsewhere_is_one_line_as_it_is(dsn: str, admin: Admin) -> None:
    with listening(dsn, "a") as process:
        admin.execute(r"notify a, E'\033[31mred\n:smile: back\\'")
        assert line(process.stdout).endswith(r"  \x1b[31mred\n:smile: back" + "\\\n")


@pytest.mark.parametrize(
    "dsn",
    [
        "postgresql+asyncpg://u:s3cret@127.0.0.1:1/db",
        "postgres:s3cret@host/db",
        "postgresql://u:s3cret@[127.0.0.1/db",
        "postgresql://u:s3cret%zz@127.0.0.1/db",
        "postgresql://u:x@s3cret@127.0.0.1/db",
        'password="s3cret host=x',
    ],
)
def test_passwords_are_not_printed(dsn: str) -> None:
    for arguments in (["doctor", dsn], ["listen", dsn, "a"]):
        result = run(*arguments)
        assert result.returncode == 2
        assert result.stderr.startswith(f"aiopgsafe {arguments[0]}: ")
        assert "s3cret" not in result.stderr


def test_a_server_that_does_not_answer_is_said(proxy: FaultProxy) -> None:
    proxy.inject(Freeze(), query("select name, setting"))
    result = run("doctor", proxy.dsn)
    assert (result.returncode, result.stdout) == (2, "")
    assert "aiopgsafe doctor: the server does not answer\n" in result.stderr


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={"COLUMNS": "500", "PATH": "/usr/bin:/bin"},
    )


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["listen", "host=127.0.0.1 port=1", "a"], "port 1 failed"),
        (["listen", "nonsense", "a"], 'missing "="'),
        (["listen", "host=127.0.0.1 port=1", ""], "can't be empty"),
        (["listen", "host=127.0.0.1 port=1"], "Missing argument"),
        (["doctor", "host=127.0.0.1 port=1"], "port 1 failed"),
        (["doctor", "nonsense"], 'missing "="'),
    ],
)
def test_what_cannot_be_done_is_said_at_once(arguments: list[str], complaint: str) -> None:
    result = run(*arguments)
    assert result.returncode == 2
    assert complaint in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


def test_doctor_says_what_matters_with_advice(dsn: str) -> None:
    result = run("doctor", f"{dsn} keepalives_idle=10")
    assert result.stderr == ""
    for row in (
        "none: the server itself answers",
        "arrive, after",
        "keepalives_idle=10",
        "can be asked for by this role",
        "'10s': a query ends with its client",
    ):
        assert row in result.stdout
    # Servers of the tests' own don't sync.
    assert "✗  fsync" in result.stdout
    assert result.returncode == 1


def test_doctor_sees_a_role_that_may_not_ask_for_outcomes(dsn: str, admin: Admin) -> None:
    admin.execute("drop role if exists nobody_special")
    admin.execute("create role nobody_special login")
    admin.execute("revoke execute on function pg_control_system() from public")
    try:
        result = run("doctor", f"{dsn} user=nobody_special")
        assert "the system's number (permission denied for function pg_control_system)" in (
            result.stdout
        )
    finally:
        admin.execute("grant execute on function pg_control_system() to public")
        admin.execute("drop role nobody_special")


def test_doctor_sees_a_pooler_and_what_it_breaks(pgbouncer: str) -> None:
    result = run("doctor", pgbouncer)
    assert "something stands between (PgBouncer?)" in result.stdout
    assert "never arrive: a pooler in transaction mode" in result.stdout
    assert result.returncode == 1


def test_tokens_are_created_and_old_ones_are_pruned(dsn: str, admin: Admin) -> None:
    for _ in range(2):
        result = run("tokens", "create", dsn)
        assert (result.returncode, result.stderr) == (0, "")
    admin.execute(
        "insert into aiopgsafe.token select gen_random_uuid(), false,"
        " now() - i * interval '1 hour' + interval '1 minute' from generate_series(1, 48) i"
    )
    result = run("tokens", "prune", dsn)
    assert result.stdout == "24 tokens deleted\n"
    left = "select count(*), count(*) filter (where token = %s) from aiopgsafe.token"
    assert admin.execute(left, (NIL,)).fetchone() == (25, 1)
    assert run("tokens", "prune", dsn, "--older-than", "1").returncode == 2
    assert run("tokens", "create", "host=127.0.0.1 port=1").returncode == 2
