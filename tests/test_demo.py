"""`aiopgsafe demo`, run as its users run it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import psycopg
import pytest

from aiopgsafe import TransactionState, __main__
from aiopgsafe._demo.bank import Transfer, plan
from aiopgsafe._demo.clients import Note
from aiopgsafe._demo.figures import MUST_BE_ZERO, Figures
from aiopgsafe._demo.logs import CountWarnings
from aiopgsafe.testing import TemporaryServer

COMMAND = [sys.executable, "-m", "aiopgsafe", "demo"]


@pytest.fixture(scope="module")
def dsn() -> Iterator[str]:
    with TemporaryServer() as server:
        yield server.dsn


def run(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *options], capture_output=True, text=True, timeout=60, check=False
    )


def schemas(dsn: str) -> list[str]:
    with psycopg.connect(dsn) as conn:
        query = "SELECT nspname FROM pg_namespace WHERE nspname LIKE 'aiopgsafe%'"
        return [row[0] for row in conn.execute(query)]


def await_schema(dsn: str, process: subprocess.Popen[str], number: int) -> None:
    """Wait until money moves in the n-th schema that the demo makes."""
    seen: list[str] = []
    deadline = time.monotonic() + 30
    with psycopg.connect(dsn, autocommit=True) as conn:
        while process.poll() is None and time.monotonic() < deadline:
            seen += [name for name in schemas(dsn) if name not in seen]
            if len(seen) == number:
                try:
                    rows = conn.execute(f"SELECT FROM {seen[-1]}.transfer LIMIT 1".encode())
                except psycopg.errors.UndefinedTable:
                    continue
                if rows.rowcount:
                    return
            time.sleep(0.01)
    raise AssertionError(f"no money moves: {process.communicate()}")


@pytest.mark.parametrize("loop", ["asyncio", "uvloop", "trio"])
def test_our_clients_know_the_truth_and_the_peers_do_not(loop: str, tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    for seconds in ("1.5", "10"):
        result = run("--loop", loop, "--seconds", seconds, "--seed", "7", "--json", str(file))
        assert result.returncode == 0, result.stdout + result.stderr
        assert "Traceback" not in result.stderr
        assert "--seed 7" in result.stdout
        assert "psycopg" in result.stdout
        report = json.loads(file.read_text())
        ours, peer = report["sides"]["aiopgsafe"], report["sides"]["psycopg"]
        if all(side["cancelled_in_commit"] and side["killed"] for side in (ours, peer)):
            break  # else the machine was too busy for so short a time
    assert report["ok"]
    assert report["faults"] == []
    assert report["seed"] == 7
    assert {name: ours[name] for name in MUST_BE_ZERO if ours[name]} == {}
    assert [text for text in ours["log"] if text.startswith("finaliser")] == []
    assert ours["loop"] == loop
    assert peer["loop"] == ("asyncio" if loop == "trio" else loop)
    for side in (ours, peer):
        assert side["tried"] >= side["committed"] > 0
        assert side["cancelled"] >= side["cancelled_in_commit"] > 0
        assert side["killed"] > 0
        assert side["money_created"] == 0
    # The instrument sees a lie where there is one.
    assert peer["lies"] > 0
    assert peer["callbacks_lost"] == peer["lies"] + peer["lies_when_killed"]
    assert peer["money_astray"] > 0
    if loop != "trio":
        assert peer["by_kind"].keys() == ours["by_kind"].keys()


def test_a_server_of_the_users_own_is_left_as_it_was(dsn: str) -> None:
    result = run("--dsn", dsn, "--seconds", "1", "--json", "-")
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stderr == ""
    assert json.loads(result.stdout)["ok"]
    assert schemas(dsn) == []


@pytest.mark.parametrize(
    ("loop", "side", "signum"),
    [
        ("asyncio", 1, signal.SIGINT),
        ("asyncio", 2, signal.SIGTERM),
        ("uvloop", 2, signal.SIGINT),
        ("trio", 2, signal.SIGINT),
    ],
)
def test_a_signal_ends_it_and_leaves_nothing_behind(
    dsn: str, loop: str, side: int, signum: signal.Signals
) -> None:
    process = subprocess.Popen(
        [*COMMAND, "--dsn", dsn, "--loop", loop, "--seconds", "30" if side == 1 else "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        await_schema(dsn, process, side)
        process.send_signal(signum)
        _, errors = process.communicate(timeout=15)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130, errors
    assert errors == "aiopgsafe demo: interrupted, and cleaned up\n"
    assert schemas(dsn) == []


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--dsn", "host=127.0.0.1 port=1"], "can't connect to the server: connection"),
        (["--dsn", "nonsense"], "can't connect to the server: missing"),
        (["--loop", "curio"], "'curio' is not one of"),
        (["--seconds", "0"], "'--seconds'"),
        (["--clients", "0"], "'--clients'"),
        (["--json", "/nowhere/figures.json"], "No such file or directory: '/nowhere"),
    ],
)
def test_what_cannot_be_done_is_said_at_once(options: list[str], complaint: str) -> None:
    result = run(*options)
    assert result.returncode == 2
    assert complaint in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


def test_what_finalisers_complain_about_is_counted(capsys: pytest.CaptureFixture[str]) -> None:
    def query() -> Iterator[None]:
        try:
            yield
        finally:
            raise ValueError("already executing")

    class Abandoned:
        def __init__(self) -> None:
            self.cycle = self
            self.query = query()
            next(self.query)

    hook = sys.unraisablehook
    with CountWarnings() as log:
        Abandoned()
    assert sum(log.counts.values()) == 1
    assert "query: ValueError('already executing')" in next(iter(log.counts))
    assert sys.unraisablehook is hook
    assert capsys.readouterr().err == ""


def test_without_typer_or_rich_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(__main__, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"typer and rich: pip install 'aiopgsafe\[cli\]'"):
        __main__.main()


def test_the_same_seed_makes_the_same_choices() -> None:
    def choices(seed: int, client: int) -> list[Transfer]:
        return list(islice(plan(seed, client, ["a", "b"]), 50))

    assert choices(1, 0) == choices(1, 0)
    assert choices(1, 0) != choices(2, 0)
    assert [t.amount for t in choices(1, 0)] != [t.amount for t in choices(1, 1)]


COMMITTED, ROLLED_BACK, UNKNOWN = (
    TransactionState.COMMITTED,
    TransactionState.ROLLED_BACK,
    TransactionState.UNKNOWN,
)


@pytest.mark.parametrize(
    ("committed", "note", "counted"),
    [
        # The truth, in all of its forms.
        (True, {"ending": "normal", "told_committed": 1, "state": COMMITTED}, []),
        (True, {"ending": "cancelled", "told_committed": 1, "state": COMMITTED}, []),
        (False, {"ending": "cancelled", "state": ROLLED_BACK}, []),
        (True, {"ending": "failed", "state": UNKNOWN}, ["in_doubt"]),
        (False, {"ending": "failed", "state": UNKNOWN}, ["in_doubt"]),
        # What psycopg says.
        (True, {"ending": "cancelled"}, ["lies", "callbacks_lost", "money_astray"]),
        (False, {"ending": "cancelled"}, []),
        # What nobody should ever say.
        (True, {"ending": "cancelled", "state": COMMITTED}, ["lies", "callbacks_lost"]),
        (True, {"ending": "cancelled", "told_committed": 1, "state": ROLLED_BACK}, ["lies"]),
        (True, {"ending": "normal", "told_committed": 1, "state": UNKNOWN}, ["lies"]),
        (True, {"ending": "normal", "state": COMMITTED}, ["lies", "callbacks_lost"]),
        (True, {"told_committed": 2, "state": COMMITTED}, ["callbacks_doubled"]),
        (False, {"ending": "normal", "state": ROLLED_BACK}, ["false_commits"]),
        (False, {"ending": "failed", "told_committed": 1}, ["false_commits", "money_astray"]),
        (False, {"ending": "failed", "state": COMMITTED}, ["false_commits"]),
    ],
)
def test_every_contradiction_to_the_truth_is_counted(
    committed: bool, note: dict[str, Any], counted: list[str]
) -> None:
    transfer = Transfer("transfer-0-1", 1, 2, amount=100, kind="a", moment=0.5)
    figures = Figures(by_kind={"a": {"in_commit": 0, "lies": 0}})
    ids = {transfer.id} if committed else set()
    figures.count(Note(transfer, **note), ids, {transfer.id}, set())
    names = {*MUST_BE_ZERO, "in_doubt"}
    found = {name for name in names if getattr(figures, name)}
    assert found - {"money_astray"} == set(counted) - {"money_astray"}
    assert bool(figures.money_astray) == bool({"lies", "false_commits"} & found)
