"""Test suites of our users: pytest-asyncio and anyio's plugin give each test an event loop."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HEADER = """
import os
import psycopg, pytest
from aiopgsafe import AsyncConnection, AsyncConnectionPool, Database
DSN = os.environ["TEST_DSN"]
"""

ASYNCIO = """
def mark(test):
    return pytest.mark.asyncio(test)
"""

ANYIO = """
@pytest.fixture
def anyio_backend():
    return os.environ["TEST_LOOP"]

def mark(test):
    return pytest.mark.anyio(test)
"""

OWN = """
@mark
async def test_block():
    async with Database(DSN, min_size=1) as db, db.transaction() as tx:
        assert await (await tx.execute("select 1")).fetchone() == (1,)

@mark
async def test_again():
    await test_block()
"""
"""Each test opens what it needs."""

FIXTURE = """
@pytest.fixture
async def db():
    async with Database(DSN, min_size=1) as db:
        yield db

@mark
async def test_one(db):
    await db.execute("select 1")

@mark
async def test_two(db):
    async with db.listen("a") as subscription:
        await db.notify("a", "x")
        assert (await anext(subscription)).payload == "x"
"""
"""A fixture opens it for each test."""

FOREIGN = """
db = Database(DSN, min_size=1, timeout=2)
pool = AsyncConnectionPool(DSN, min_size=1, timeout=2, open=False)
left = []

@mark
async def test_opens_and_forgets_to_close():
    await db.open()
    await db.execute("select 1")
    await pool.open()
    await pool.wait()
    conn = await AsyncConnection.connect(DSN)
    await conn.execute("select 1")
    left.append(conn)

@mark
async def test_uses_it_in_its_own_loop():
    async def listen():
        async with db.listen("a"):
            pass

    async def transaction():
        async with db.transaction() as tx:
            await tx.execute("select 1")

    async def lease():
        async with pool.connection():
            pass

    for use in (
        lambda: db.execute("select 1"), listen, transaction, lease, db.close, db.drain,
        pool.getconn, pool.open, pool.close, pool.check,
        lambda: left[0].execute("select 1"), left[0].commit,
    ):
        with pytest.raises(psycopg.InterfaceError, match="another event loop"):
            await use()
    await left[0].close()
    await db.open()  # the loop that it was left open in runs no more
    await transaction()
    await listen()
    await db.close()
"""
"""Opened in one loop, used in another one."""


@pytest.mark.parametrize("uses", [OWN, FIXTURE, FOREIGN], ids=["own", "fixture", "foreign"])
@pytest.mark.parametrize("plugin", ["pytest-asyncio", "anyio-asyncio", "anyio-trio"])
def test_a_suite_with_a_loop_for_each_test_works_or_is_told_why_not(
    plugin: str, uses: str, dsn: str, tmp_path: Path
) -> None:
    suite = tmp_path / "test_suite.py"
    suite.write_text(HEADER + (ASYNCIO if plugin == "pytest-asyncio" else ANYIO) + uses)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += [f"--rootdir={tmp_path}", str(suite)]
    command += ["-o", "asyncio_mode=auto"] if plugin == "pytest-asyncio" else ["-p", "no:asyncio"]
    result = subprocess.run(
        command,
        env={**os.environ, "TEST_DSN": dsn, "TEST_LOOP": plugin.partition("-")[2]},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout
