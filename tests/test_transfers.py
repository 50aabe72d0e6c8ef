"""The service among the examples: money moves once for each key, and the page is there."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from time import monotonic
from typing import Any

import psycopg
import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
Admin = psycopg.Connection[Any]


@pytest.fixture
def base(dsn: str) -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = {**os.environ, "TRANSFERS_DSN": dsn, "PYTHONPATH": str(EXAMPLES)}
    prepare = (
        "import anyio; from transfers.service import db, create_schema\n"
        "async def main():\n    async with db: await create_schema(db)\n"
        "anyio.run(main)"
    )
    subprocess.run([sys.executable, "-c", prepare], env=environment, check=True)
    command = ["uvicorn", "--port", str(port), "--log-level", "warning", "transfers.service:app"]
    process = subprocess.Popen([sys.executable, "-m", *command], env=environment)
    base = f"http://127.0.0.1:{port}"
    try:
        deadline = monotonic() + 20
        while not answers(base):
            assert monotonic() < deadline
        yield base
    finally:
        process.terminate()
        process.wait()


def answers(base: str) -> bool:
    try:
        return bool(get(base, "readyz") == {"status": "ready"})
    except OSError:
        return False


def get(base: str, path: str) -> Any:
    with urllib.request.urlopen(f"{base}/{path}", timeout=10) as response:
        return json.load(response)


def post(base: str, **transfer: Any) -> int:
    request = urllib.request.Request(
        f"{base}/transfers", json.dumps(transfer).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=10) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        with error:
            return int(error.code)


def balances(base: str) -> list[int]:
    return [account["balance"] for account in get(base, "accounts")]


def test_money_moves_once_for_each_key(base: str, admin: Admin) -> None:
    assert post(base, key="a", source=1, target=2, amount=10) == 201
    assert post(base, key="a", source=1, target=2, amount=10) == 200
    assert post(base, key="a", source=1, target=2, amount=11) == 409
    assert post(base, key="b", source=1, target=2, amount=5000) == 422
    assert post(base, key="b", source=1, target=99, amount=1) in (422, 500)
    assert balances(base) == [990, 1010, *[1000] * 6]
    assert admin.execute("select count(*) from transfer").fetchone() == (1,)
    # Many at once, each key sent twice.
    clients = [
        threading.Thread(target=post, args=(base,), kwargs={**transfer, "amount": 1})
        for number in range(20)
        for transfer in [{"key": str(number), "source": 1 + number % 8, "target": 8 - number % 8}]
        * 2
        if transfer["source"] != transfer["target"]
    ]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    assert sum(balances(base)) == 8000
    assert admin.execute("select count(*) from transfer").fetchone() == (1 + len(clients) // 2,)


def test_the_feed_tells_of_transfers_and_of_gaps(base: str, admin: Admin) -> None:
    with urllib.request.urlopen(f"{base}/events", timeout=10) as feed:
        lines = (line.decode().rstrip() for line in feed)
        assert next(line for line in lines if line.startswith("event")) == "event: ready"
        assert post(base, key="a", source=1, target=2, amount=10) == 201
        assert next(line for line in lines if line.startswith("event")) == "event: transfer"
        assert json.loads(next(lines).removeprefix("data: "))["amount"] == 10
        admin.execute(
            "select pg_terminate_backend(pid) from pg_stat_activity where query like 'LISTEN%'"
        )
        assert next(line for line in lines if line.startswith("event")) == "event: gap"
        assert post(base, key="b", source=1, target=2, amount=20) == 201
        assert next(line for line in lines if line.startswith("event")) == "event: transfer"


def test_the_page_and_what_it_needs_are_there(base: str) -> None:
    for path in ("", "static/page.js", "static/style.css", "static/uPlot.iife.min.js"):
        with urllib.request.urlopen(f"{base}/{path}", timeout=10) as response:
            assert response.status == 200
            assert response.read()
