"""P1: real programs get real signals while COMMIT is in flight."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest

from aiopgsafe.testing import Delay, FaultProxy, Freeze, command_complete

PROGRAM = Path(__file__).parent / "programs" / "under_signal.py"


@pytest.fixture
def admin(dsn: str) -> Iterator[psycopg.Connection[tuple[int]]]:
    with psycopg.connect(dsn, autocommit=True) as admin:
        admin.execute("create table t (id int)")
        yield admin


@contextmanager
def program(loop: str, scenario: str, proxy: FaultProxy) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-W", "error", PROGRAM, loop, scenario, proxy.dsn],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_until_handled(process: subprocess.Popen[str]) -> None:
    """Until the process has taken its signals and sleeps again: Python's handlers have run."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        status = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
        pending = int(status["SigPnd"], 16) | int(status["ShdPnd"], 16)
        if not pending and status["State"].startswith("S"):
            return
        time.sleep(0.002)
    raise TimeoutError("the process does not take its signals")


def rows(admin: psycopg.Connection[tuple[int]]) -> int:
    row = admin.execute("select count(*) from t").fetchone()
    assert row is not None
    return row[0]


@pytest.mark.parametrize("times", [1, 2, 3])
def test_ctrl_c_in_commit_waits_for_the_outcome_and_the_callbacks(
    loop_name: str, times: int, proxy: FaultProxy, admin: psycopg.Connection[tuple[int]]
) -> None:
    in_commit = proxy.inject(Delay(0.4), command_complete("COMMIT"))
    with program(loop_name, "in_main_task", proxy) as process:
        in_commit.wait()
        for _ in range(times):
            process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    assert rows(admin) == 1
    assert "callback\nslow callback\n" in out
    assert "state COMMITTED closed False\nidle True\n" in out
    assert "the transaction is committed" in out
    assert process.returncode == -signal.SIGINT, err
    assert "KeyboardInterrupt" in err


def test_second_ctrl_c_ends_a_program_whose_commit_is_not_answered_and_says_unknown(
    loop_name: str, proxy: FaultProxy, admin: psycopg.Connection[tuple[int]]
) -> None:
    in_commit = proxy.inject(Freeze(), command_complete("COMMIT"))
    with program(loop_name, "unanswered", proxy) as process:
        in_commit.wait()
        # Two that come together may be one to the process.
        process.send_signal(signal.SIGINT)
        wait_until_handled(process)
        process.send_signal(signal.SIGINT)
        # commit_timeout is 20 s: the second one ends it earlier.
        out, err = process.communicate(timeout=15)
    assert "state UNKNOWN closed True" in out
    assert "the transaction is unknown" in out
    assert "callback" not in out
    assert process.returncode == -signal.SIGINT, err
    assert "CommitUnknown" in err


def test_a_handler_that_raises_system_exit_is_obeyed_after_the_commit(
    loop_name: str, proxy: FaultProxy, admin: psycopg.Connection[tuple[int]]
) -> None:
    in_commit = proxy.inject(Delay(0.4), command_complete("COMMIT"))
    with program(loop_name, "handler_raises", proxy) as process:
        in_commit.wait()
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=20)
    assert rows(admin) == 1
    assert "callback\nslow callback\n" in out
    assert "state COMMITTED closed False\nidle True\n" in out
    assert "raised SystemExit aiopgsafe: the transaction is committed" in out
    assert process.returncode == 7, err


def test_ctrl_c_in_rollback_waits_for_it(
    loop_name: str, proxy: FaultProxy, admin: psycopg.Connection[tuple[int]]
) -> None:
    in_rollback = proxy.inject(Delay(0.4), command_complete("ROLLBACK"))
    with program(loop_name, "in_rollback", proxy) as process:
        in_rollback.wait()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    assert rows(admin) == 0
    assert "rollback callback" in out
    assert "state ROLLED_BACK closed False\nidle True\n" in out
    assert process.returncode == -signal.SIGINT, err


def test_a_task_that_commits_while_the_loop_is_torn_down_learns_the_outcome(
    loop_name: str, proxy: FaultProxy, admin: psycopg.Connection[tuple[int]]
) -> None:
    in_commit = proxy.inject(Delay(0.4), command_complete("COMMIT"))
    with program(loop_name, "in_another_task", proxy) as process:
        in_commit.wait()
        out, err = process.communicate("end\n", timeout=20)
    assert rows(admin) == 1
    assert "callback\nslow callback\n" in out
    assert "the transaction is committed" in out
    assert "state COMMITTED closed False\nidle True\n" in out
    assert "handlers True" in out
    assert process.returncode == 0, err


def test_a_signal_gets_through_while_others_always_commit(
    loop_name: str, proxy: FaultProxy, admin: psycopg.Connection[tuple[int]]
) -> None:
    committing = proxy.inject(Delay(0.01), command_complete("COMMIT"))
    with program(loop_name, "many", proxy) as process:
        for _ in range(50):
            committing.wait()
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=20)
    # trio wraps it in the nursery's exception group.
    assert process.returncode == (1 if loop_name == "trio" else 7), err
    assert loop_name != "trio" or "SystemExit: 7" in err
    called = {int(line.split()[1]) for line in out.splitlines() if line.startswith("id ")}
    committed = {id for (id,) in admin.execute("select id from t")}
    assert called == committed
    assert len(committed) >= 50
