"""The service among the examples: money moves once for each key, and the page is there."""

from __future__ import annotations

import json
import shutil
import socket
import threading
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from time import monotonic
from typing import Any

import anyio
import psycopg
import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright
from transfers.service import create_schema

from aiopgsafe import Database
from aiopgsafe.testing import Delay, FaultProxy, command_complete
from tests.serving import SERVERS, Service

Admin = psycopg.Connection[Any]


async def create_tables(dsn: str) -> None:
    async with Database(dsn) as db:
        await create_schema(db)


@pytest.fixture(params=SERVERS)
def base(request: pytest.FixtureRequest, proxy: FaultProxy) -> Iterator[str]:
    dsn = proxy.dsn
    with ThreadPoolExecutor() as pool:  # in this thread Playwright's event loop may run
        pool.submit(anyio.run, create_tables, dsn).result()
    service = Service(request.param, "transfers.service:app", TRANSFERS_DSN=dsn)
    try:
        service.wait_until_ready()
        yield service.base
    finally:
        service.end()


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


def test_a_cancellation_that_the_commit_holds_back_is_counted(
    base: str, proxy: FaultProxy, admin: Admin
) -> None:
    answer = proxy.inject(Delay(0.2), command_complete("COMMIT"), times=1)
    host, port = base.removeprefix("http://").split(":")
    body = json.dumps({"key": "a", "source": 1, "target": 2, "amount": 10})
    with socket.create_connection((host, int(port))) as client:
        client.sendall(
            f"POST /transfers HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n{body}".encode()
        )
        answer.wait()
    deadline = monotonic() + 10
    while get(base, "status")["held_back"] != 1:
        assert monotonic() < deadline
    assert balances(base)[:2] == [990, 1010]


# The page, in a browser


@pytest.fixture(scope="module")  # no longer: its event loop counts as running meanwhile
def chromium() -> Iterator[Any]:
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    if program is None:
        pytest.skip("Chromium is not installed (Debian: apt-get install chromium)")
    with sync_playwright() as playwright:
        # Its sandbox refuses to run as root; all it sees is our own page.
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(base: str, chromium: Browser) -> Iterator[Page]:
    """The service's page, of which nothing may fail."""
    failures: list[str] = []
    page = chromium.new_page(viewport={"width": 1100, "height": 760})
    page.on("pageerror", lambda error: failures.append(str(error)))
    page.on("requestfailed", lambda request: failures.append(request.url))
    page.on(
        "console",
        lambda message: failures.append(message.text) if message.type != "log" else None,
    )
    page.goto(base)
    expect(page.locator("#link")).to_have_text("live")
    yield page
    assert failures == []
    page.close()


def test_the_page_shows_by_itself_what_others_transfer(base: str, page: Page, admin: Admin) -> None:
    accounts = page.locator("#accounts li")
    expect(accounts).to_have_count(8)
    expect(accounts.first).to_contain_text("1,000")
    assert post(base, key="a", source=1, target=2, amount=10) == 201
    expect(accounts.first).to_contain_text("990")
    expect(accounts.nth(1)).to_contain_text("1,010")
    expect(page.locator("#latest li").first).to_have_text("Ada → Barbara10")
    expect(page.locator("#total")).to_have_text("1")
    expect(page.locator("#pool")).to_contain_text("of")
    expect(page.locator("#chart canvas")).to_be_visible()


def test_the_page_shows_a_gap_and_goes_on(base: str, page: Page, admin: Admin) -> None:
    expect(page.locator("#gap")).to_be_hidden()
    admin.execute(
        "select pg_terminate_backend(pid) from pg_stat_activity where query like 'LISTEN%'"
    )
    expect(page.locator("#gap")).to_be_visible()
    expect(page.locator("#gaps")).to_have_text("1")
    assert post(base, key="a", source=1, target=2, amount=10) == 201
    expect(page.locator("#latest li").first).to_have_text("Ada → Barbara10")
    expect(page.locator("#link")).to_have_text("live")
