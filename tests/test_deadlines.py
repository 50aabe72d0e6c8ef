"""The server has a timeout of its own, so that a client that dies leaves no query running."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import AsyncIterator
from typing import Any

import anyio
import psycopg
import pytest

from aiopgsafe import AsyncConnection
from aiopgsafe.testing import FaultProxy

pytestmark = pytest.mark.anyio

Conn = AsyncConnection[Any]


@pytest.fixture
async def sends(dsn: str, anyio_backend: object) -> AsyncIterator[Conn]:
    conn = await AsyncConnection.connect(dsn, send_deadline=True, cancel_timeout=1, autocommit=True)
    yield conn
    await conn.close()


async def timeout_of(conn: Conn) -> str:
    cur = await conn.execute("select setting from pg_settings where name = 'statement_timeout'")
    row = await cur.fetchone()
    assert row is not None
    return str(row[0])


async def test_the_deadline_of_the_task_goes_with_begin(sends: Conn) -> None:
    with anyio.fail_after(60):
        async with sends.transaction():
            assert 55_000 < int(await timeout_of(sends)) <= 61_000
        assert await timeout_of(sends) == "0"
        await sends.set_autocommit(False)
        assert 55_000 < int(await timeout_of(sends)) <= 61_000  # psycopg's implicit BEGIN
        await sends.commit()
    assert await timeout_of(sends) == "0"
    await sends.rollback()


async def test_in_a_pipeline_too(sends: Conn) -> None:
    with anyio.fail_after(60):
        async with sends.pipeline(), sends.transaction():
            assert 55_000 < int(await timeout_of(sends)) <= 61_000
    assert await timeout_of(sends) == "0"


async def test_without_a_deadline_there_is_no_timeout(sends: Conn) -> None:
    async with sends.transaction(read_only=True):
        assert await timeout_of(sends) == "0"


async def test_the_clients_own_cancellation_comes_first(sends: Conn) -> None:
    with anyio.move_on_after(0.1) as scope:
        async with sends.transaction():
            await sends.execute("select pg_sleep(10)")
    assert scope.cancelled_caught
    assert not sends.closed


async def test_statement_timeout_is_the_servers(dsn: str, anyio_backend: object) -> None:
    conn = await AsyncConnection.connect(
        dsn, autocommit=True, statement_timeout=0.2, options="-c search_path=pg_catalog"
    )
    cur = await conn.execute("show search_path")
    assert await cur.fetchone() == ("pg_catalog",)
    with pytest.raises(psycopg.errors.QueryCanceled, match="statement timeout"):
        await conn.execute("select pg_sleep(10)")
    await conn.close()


@pytest.mark.parametrize("pipelined", [False, True])
async def test_commit_is_never_under_a_timeout(
    proxy: FaultProxy, admin: psycopg.Connection[Any], anyio_backend: object, pipelined: bool
) -> None:
    """A deferred trigger takes longer than any statement may: COMMIT ends all the same."""
    admin.execute("create table t (id int)")
    admin.execute(
        "create function slow() returns trigger language plpgsql as"
        " 'begin perform pg_sleep(0.3); return null; end'"
    )
    admin.execute(
        "create constraint trigger slow after insert on t deferrable initially deferred"
        " for each row execute function slow()"
    )
    conn = await AsyncConnection.connect(proxy.dsn, autocommit=True, statement_timeout=0.1)
    async with conn.transaction():  # the first one asks for the server's history
        await conn.execute("select 1")
    before = proxy.stats.round_trips
    if pipelined:
        async with conn.pipeline(), conn.transaction():
            await conn.execute("insert into t values (1)")
    else:
        async with conn.transaction():
            await conn.execute("insert into t values (1)")
        assert proxy.stats.round_trips - before == 2
    assert admin.execute("select count(*) from t").fetchone() == (1,)
    assert await timeout_of(conn) == "100"
    await conn.close()


async def test_commit_of_a_failed_transaction_is_still_what_the_server_says(
    dsn: str, anyio_backend: object
) -> None:
    conn = await AsyncConnection.connect(dsn, autocommit=True, statement_timeout=10)
    tx = conn.transaction()
    with pytest.raises(psycopg.errors.TransactionRollback, match="ROLLBACK"):
        async with tx:
            with pytest.raises(psycopg.errors.DivisionByZero):
                await conn.execute("select 1/0")
    await conn.close()


async def test_commit_prepared_is_exempt_too(
    proxy: FaultProxy, admin: psycopg.Connection[Any], anyio_backend: object
) -> None:
    admin.execute("create table t (id int)")
    conn = await AsyncConnection.connect(proxy.dsn, statement_timeout=10)
    await conn.tpc_begin("x")
    await conn.execute("insert into t values (1)")
    await conn.tpc_prepare()
    await conn.tpc_commit()
    assert await timeout_of(conn) == "10000"
    assert admin.execute("select count(*) from t").fetchone() == (1,)
    await conn.close()


@pytest.mark.parametrize("seconds", [0, -1, float("inf"), float("nan"), "1", True])
async def test_a_bad_timeout_is_refused_at_once(dsn: str, seconds: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="statement_timeout"):
        await AsyncConnection.connect(dsn, statement_timeout=seconds)


def test_a_killed_client_leaves_no_query_running(
    loop_name: str, dsn: str, admin: psycopg.Connection[Any]
) -> None:
    program = (
        "import anyio, sys, aiopgsafe\n"
        "async def main():\n"
        "    conn = await aiopgsafe.AsyncConnection.connect(\n"
        "        sys.argv[1], send_deadline=True, cancel_timeout=0.5, autocommit=True)\n"
        "    with anyio.fail_after(1):\n"
        "        async with conn.transaction():\n"
        "            await conn.execute('select pg_sleep(60)')\n"
        "anyio.run(main, backend=sys.argv[2])\n"
    )
    backend = "trio" if loop_name == "trio" else "asyncio"
    sleeping = "select count(*) from pg_stat_activity where wait_event = 'PgSleep'"
    with subprocess.Popen([sys.executable, "-c", program, dsn, backend]) as process:
        while admin.execute(sleeping).fetchone() != (1,):
            pass
        process.kill()
    while admin.execute(sleeping).fetchone() != (0,):
        pass  # pytest-timeout is the limit; without a timeout it sleeps for a minute
