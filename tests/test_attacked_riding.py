"""What an adversary found in riding and in outcomes: each must stay mended."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import psycopg
import pytest

from aiopgsafe import AsyncConnection, CommitUnknown, IsolationLevel, TransactionState
from aiopgsafe._connection import _riding
from aiopgsafe._tools.tokens import CREATE
from aiopgsafe.testing import Cut, FaultProxy, Freeze, TemporaryServer, command_complete
from tests.dropin import Scene, compared
from tests.standby import PRIMARY, Standby
from tests.test_outcomes import is_commit

Admin = psycopg.Connection[Any]
COMMITTED, ROLLED_BACK = TransactionState.COMMITTED, TransactionState.ROLLED_BACK


async def table(s: Scene) -> None:
    await s.conn.set_autocommit(True)
    await s.conn.execute("create table t (id int)")


async def rows(s: Scene) -> None:
    s.note(await s.elsewhere("select id from t order by id"))


async def add(s: Scene, id: int) -> None:
    await s.conn.execute("insert into t values (%s)", (id,))


# The same as psycopg's


@compared
async def test_savepoints_may_share_a_name(s: Scene) -> None:
    await table(s)
    for statements in (1, 0):
        async with s.conn.transaction():
            async with s.conn.transaction("sp"):
                await add(s, 1)
                async with s.conn.transaction("sp"):
                    for _ in range(statements):
                        await add(s, 2)
                await add(s, 3)
                raise psycopg.Rollback
            await add(s, 4)
        await rows(s)
    async with s.conn.transaction(), s.conn.transaction("sp"):
        async with s.conn.transaction("sp"):
            pass
        await add(s, 5)
    await rows(s)


@compared
async def test_fetching_from_a_cursor_on_the_server_is_part_of_the_savepoint(s: Scene) -> None:
    await table(s)
    await s.conn.execute(
        "create function f(i int) returns int language plpgsql as"
        " 'begin insert into t values (10 / i); return i; end'"
    )
    async with s.conn.transaction(), s.conn.cursor("c") as cur:
        await cur.execute("select f(i) from generate_series(2, 9) i")
        async with s.conn.transaction():
            s.note(await cur.fetchmany(2))
            raise psycopg.Rollback
    await rows(s)
    async with s.conn.transaction():
        async with s.conn.cursor("c") as cur:
            await cur.execute("select f(i) from generate_series(1, -1, -1) i")
            with s.fails():
                async with s.conn.transaction():
                    await cur.fetchmany(3)
        await add(s, 3)
    await rows(s)


@compared
async def test_a_statement_that_libpq_refuses_leaves_the_block_usable(s: Scene) -> None:
    await table(s)
    query = "insert into t values " + ",".join(["(%s)"] * 70_000)
    for _ in range(2):
        async with s.conn.transaction():
            with s.fails():
                await s.conn.execute(query, [1] * 70_000)
            await add(s, 2)
    await rows(s)


@compared
async def test_a_rollback_that_is_refused_changes_nothing(s: Scene) -> None:
    await table(s)
    async with s.conn.transaction():
        with s.fails():
            await s.conn.rollback()
        await add(s, 1)
        async with s.conn.transaction():
            with s.fails():
                await s.conn.rollback()
            await add(s, 2)
            raise psycopg.Rollback
        await add(s, 3)
    await rows(s)


@compared
async def test_savepoints_that_the_program_treats_itself_are_seen(s: Scene) -> None:
    await table(s)
    async with s.conn.transaction():
        await s.conn.execute("savepoint a")
        with s.fails():
            async with s.conn.transaction():
                await add(s, 1)
                await s.conn.execute("rollback to a")
        raise psycopg.Rollback
    await rows(s)


@compared
async def test_text_that_depends_on_a_setting_goes_as_psycopg_sends_it(s: Scene) -> None:
    await table(s)
    await s.conn.execute("set standard_conforming_strings = off")
    await s.conn.execute("set escape_string_warning = off")
    async with s.conn.transaction():
        s.note(await s.fetch(r"select '\'; select '"))
    s.note("end")


@compared
async def test_a_conversion_error_leaves_a_transaction_that_can_be_used(s: Scene) -> None:
    await table(s)
    await s.conn.set_autocommit(False)
    with s.fails():
        await s.conn.execute("select %s", (object(),))
    s.status()
    async with s.conn.transaction():
        s.status()
    await s.conn.commit()
    s.status()


@compared
async def test_a_failed_statement_leaves_nothing_prepared_that_is_not(s: Scene) -> None:
    await table(s)
    for _ in range(2):
        with s.fails():
            async with s.conn.transaction(), s.conn.transaction("sp"):
                await s.conn.execute("release sp")
                await s.conn.execute("insert into nowhere values (1)", prepare=True)
        async with s.conn.transaction():
            await s.conn.execute("insert into t values (%s)", (1,), prepare=True)
    await rows(s)


# Our own

pytest_anyio = pytest.mark.anyio


@pytest_anyio
async def test_callbacks_of_a_transaction_that_was_never_sent_run(
    dsn: str, anyio_backend: object
) -> None:
    called: list[str] = []
    async with await AsyncConnection.connect(dsn) as conn:
        with pytest.raises(psycopg.ProgrammingError):
            await conn.execute("select %s", (object(),))
        async with conn.transaction() as tx:
            tx.on_commit(called.append, "committed")
        await conn.commit()
    assert (tx.state, called) == (COMMITTED, ["committed"])


@pytest_anyio
async def test_a_number_that_is_in_no_wal_yet_is_no_proof(anyio_backend: object) -> None:
    """The first statement writes to a temporary table; another one's commit flushes past it."""
    with TemporaryServer(settings=PRIMARY) as server, FaultProxy(server.dsn) as proxy:
        server.psql("create table t (id int)")
        called: list[str] = []
        conn = await AsyncConnection.connect(proxy.dsn, autocommit=True)
        await conn.execute("create temp table tmp (id int)")
        frozen = proxy.inject(Freeze(), is_commit)

        def crash() -> None:
            frozen.wait()
            server.kill()
            server.start()
            server.psql("insert into t values (2)")  # is given the number, if it was lost
            frozen.release()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(anyio.to_thread.run_sync, crash)
            with psycopg.connect(server.dsn) as lower:
                lower.execute("insert into t values (0)")
                with pytest.raises(psycopg.OperationalError):
                    async with conn.transaction() as tx:
                        tx.on_commit(called.append, "committed")
                        await conn.execute("insert into tmp values (1)")
                        lower.commit()
                        await conn.execute("insert into t values (1)")
        assert tx.state is ROLLED_BACK
        assert called == []
        assert server.psql("select id from t order by id") == "0\n2"


@pytest_anyio
async def test_a_search_path_changes_neither_tokens_nor_numbers(
    proxy: FaultProxy, admin: Admin, anyio_backend: object
) -> None:
    admin.execute("create table t (id int)")
    admin.execute(CREATE)
    admin.execute(
        "create function pg_current_xact_id_if_assigned() returns xid8 language sql as"
        " $$select '3'::xid8$$"
    )
    for token in (True, False):
        proxy.clear()
        conn = await AsyncConnection.connect(proxy.dsn, autocommit=True, commit_token=token)
        await conn.execute("set search_path to public, pg_catalog")
        proxy.inject(Cut("rst"), command_complete("COMMIT"))
        async with conn.transaction() as tx:
            await conn.execute("insert into t values (1)")
        assert tx.state is COMMITTED
        assert tx.xid != 3


@pytest_anyio
async def test_a_role_that_may_not_write_the_wal_has_no_numbers(
    dsn: str, admin: Admin, anyio_backend: object
) -> None:
    _riding._answering.clear()
    admin.execute("create table t (id int)")
    admin.execute("drop role if exists small")
    admin.execute("create role small login")
    admin.execute("grant usage on schema public to small")
    admin.execute("grant all on t to small")
    (functions,) = admin.execute(
        "select string_agg(oid::regprocedure::text, ', ') from pg_proc"
        " where proname = 'pg_logical_emit_message'"
    ).fetchone() or ("",)
    admin.execute(f"revoke execute on function {functions} from public")
    try:
        async with await AsyncConnection.connect(f"{dsn} user=small", autocommit=True) as conn:
            for _ in range(2):
                async with conn.transaction() as tx:
                    await tx.execute("insert into t values (1)")
                assert tx.xid is None
    finally:
        admin.execute(f"grant execute on function {functions} to public")
        admin.execute("drop owned by small")
        admin.execute("drop role small")


@pytest_anyio
async def test_a_begin_that_fails_lets_nothing_run_and_says_so(
    anyio_backend: object,
) -> None:
    with TemporaryServer(settings=PRIMARY) as server, Standby(server) as standby:
        for pipelined in (False, True):
            conn = await AsyncConnection.connect(standby.dsn, autocommit=True)
            block = conn.transaction(isolation_level=IsolationLevel.SERIALIZABLE)
            with pytest.raises(psycopg.OperationalError, match="BEGIN failed") as caught:
                async with block:
                    for _ in range(3):
                        with pytest.raises(psycopg.Error):
                            if pipelined:
                                async with conn.pipeline():
                                    await conn.execute("select pg_advisory_lock(7)")
                            else:
                                await conn.execute("select pg_advisory_lock(7)")
            assert not isinstance(caught.value, CommitUnknown)
            assert block.state is ROLLED_BACK
            cur = await conn.execute("select count(*) from pg_locks where locktype = 'advisory'")
            assert await cur.fetchone() == (0,)
            async with conn.transaction():
                await conn.execute("select 1")
            # Nothing is prepared that isn't: psycopg's names neither.
            await conn.set_isolation_level(IsolationLevel.SERIALIZABLE)
            await conn.set_autocommit(False)
            with pytest.raises(psycopg.errors.FeatureNotSupported):
                await conn.execute("select 2", prepare=True)
            await conn.rollback()
            await conn.set_isolation_level(None)
            await conn.execute("select 2", prepare=True)
            await conn.close()
        # A token can't be inserted there, and need not be.
        async with await AsyncConnection.connect(standby.dsn, commit_token=True) as conn:
            await conn.execute("select 1")


@pytest_anyio
async def test_what_only_reads_needs_no_token(
    dsn: str, admin: Admin, anyio_backend: object
) -> None:
    admin.execute(CREATE)
    async with await AsyncConnection.connect(dsn, autocommit=True, commit_token=True) as conn:
        async with conn.transaction(read_only=True) as tx:
            await tx.execute("select 1")
        assert tx.state is COMMITTED
        async with conn.transaction() as tx:
            await tx.execute("select 1")
    assert admin.execute("select count(*) from aiopgsafe.token").fetchone() == (1,)


@pytest_anyio
async def test_a_replication_connection_takes_simple_queries(anyio_backend: object) -> None:
    with TemporaryServer(settings=PRIMARY) as server:
        async with await AsyncConnection.connect(f"{server.dsn} replication=database") as conn:
            cur = await conn.execute("select 1")
            assert await cur.fetchall() == [(1,)]


class Text(str):
    """A query of a class of its own."""

    __slots__ = ()


@pytest_anyio
async def test_a_query_of_a_class_of_its_own_is_read_as_well(
    dsn: str, anyio_backend: object
) -> None:
    async with await AsyncConnection.connect(dsn, autocommit=True) as conn:
        with pytest.raises(CommitUnknown):
            async with conn.transaction():
                await conn.execute(Text("select 1"))
                await conn.execute(Text("commit"))


def test_ctrl_c_wherever_it_hits_leaves_no_pipeline(dsn: str) -> None:
    """On trio KeyboardInterrupt comes out of any bytecode of the main task."""
    program = Path(__file__).parent / "programs" / "interrupted.py"
    result = subprocess.run(
        [sys.executable, program, dsn], capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "usable" in result.stdout
    assert "pipeline" not in result.stdout, result.stdout


def test_the_trait_of_a_single_command() -> None:
    single = [b"select 1", b" -- copy\nselect 1;", b"/* ; */ select ';' ;", b"( select 1 )"]
    others = [
        b"copy t from stdin",
        b" /* x */ copy t to stdout",
        b"select 1; select 2",
        rb"select '\'",
    ]
    assert [_rides(text) for text in single + others] == [True] * 4 + [False] * 4


def _rides(text: bytes) -> bool:
    from aiopgsafe._connection._statements import rides

    return rides(text)
