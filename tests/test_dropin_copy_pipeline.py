"""COPY and pipeline mode: each scenario as psycopg's own class plays it."""

from __future__ import annotations

from contextlib import suppress
from io import BytesIO
from typing import Any

import anyio
import psycopg
import pytest
from psycopg import Rollback
from psycopg.copy import AsyncLibpqWriter, AsyncQueuedLibpqWriter, AsyncWriter
from psycopg.pq import PipelineStatus

from aiopgsafe import AsyncConnection
from tests.dropin import Scene, compared

CREATE = "create table t (i int primary key, s text)"
IN = "copy t from stdin"
OUT = "copy (select i, repeat('x', i) from generate_series(1, 5) i) to stdout"


# COPY


@compared
async def test_copy_in_takes_rows_and_blocks_text_and_binary(s: Scene) -> None:
    await s.conn.execute(CREATE)
    cur = s.conn.cursor()
    async with cur.copy(IN) as copy:
        await copy.write("1\tone\n2\t")
        await copy.write(b"two\n")
    s.note(cur.rowcount, cur.statusmessage)
    async with cur.copy("copy t (i, s) from stdin where i > %s", (3,)) as copy:
        await copy.write_row((3, "tab\t"))
        await copy.write_row((4, "back\\slash\n"))
        await copy.write_row([5, None])
    async with cur.copy(IN + " (format binary)") as copy:
        copy.set_types(["int4", "text"])
        await copy.write_row((6, "six"))
        await copy.write_row((7, None))
    async with cur.copy(IN) as copy:
        pass
    s.note(cur.rowcount, await s.fetch("select * from t order by i"))


@compared
async def test_copy_out_gives_rows_and_blocks_text_and_binary(s: Scene) -> None:
    cur = s.conn.cursor()
    async with cur.copy(OUT) as copy:
        s.note([bytes(block) async for block in copy])
    s.note(cur.rowcount, cur.statusmessage)
    async with cur.copy(OUT) as copy:
        s.note(bytes(await copy.read()), await copy.read_row())
        copy.set_types(["int4", "text"])
        s.note([row async for row in copy.rows()], await copy.read_row(), await copy.read())
    async with cur.copy(OUT + " (format binary)") as copy:
        copy.set_types(["int4", "text"])
        s.note([row async for row in copy.rows()])
    async with cur.copy("copy (select 1 where false) to stdout") as copy:
        s.note([row async for row in copy.rows()])


@compared
async def test_copy_in_that_fails_leaves_nothing_and_a_usable_connection(s: Scene) -> None:
    await s.conn.execute(CREATE)
    await s.conn.commit()
    with s.fails():
        async with s.conn.cursor().copy(IN) as copy:
            await copy.write("1\tone\n")
            raise ZeroDivisionError("from Python")
    s.status()
    await s.conn.rollback()
    for block in ("x\tnot a number\n", "1\ta\n1\tduplicate\n", "1\n"):
        with s.fails():
            async with s.conn.cursor().copy(IN) as copy:
                await copy.write(block)
        s.status()
        await s.conn.rollback()
    for statement in ("select 1", "", "insert into t values (1)", "copy no_such from stdin"):
        with s.fails():
            async with s.conn.cursor().copy(statement.encode()) as copy:
                await copy.write("1\n")
        s.status()
        await s.conn.rollback()
    with s.fails():
        async with s.conn.cursor().copy(IN) as copy:
            await copy.write_row((1, object()))
    await s.conn.rollback()
    with s.fails():
        async with s.conn.cursor().copy(IN) as copy:
            s.note(await copy.read())
    await s.conn.rollback()
    s.note(await s.fetch("select count(*) from t"))


@compared
async def test_copy_out_left_early_leaves_a_usable_connection(s: Scene) -> None:
    many = "copy (select repeat('x', 1000) from generate_series(1, 100000)) to stdout"
    with s.fails():
        async with s.conn.cursor().copy(many) as copy:
            await copy.read()
            raise ZeroDivisionError("had enough")
    await s.conn.rollback()
    s.status()
    with s.fails():
        async with s.conn.cursor().copy(OUT) as copy:
            await copy.write("no")
    await s.conn.rollback()
    with s.fails():
        async with s.conn.cursor().copy(
            "copy (select 1/(3-i) from generate_series(1, 5) i) to stdout"
        ) as copy:
            s.note([row async for row in copy.rows()])
    s.status()


@compared
async def test_large_copy_passes_a_socket_that_is_full_in_both_directions(s: Scene) -> None:
    await s.conn.execute(CREATE)
    line = "ü" * 500
    cur = s.conn.cursor()
    async with cur.copy(IN) as copy:
        for i in range(5_000):
            await copy.write_row((i, line))
        await copy.write("".join(f"{i}\t{line}\n" for i in range(5_000, 10_000)))
    s.note(cur.rowcount)
    size = 0
    async with cur.copy("copy t to stdout") as copy:
        async for block in copy:
            size += len(block)
    s.note(size, await s.fetch("select count(*), sum(length(s)) from t"))
    async with cur.copy("copy t to stdout (format binary)") as copy:
        copy.set_types(["int4", "text"])
        s.note(sum([row[0] async for row in copy.rows()]))


@compared
async def test_copy_writers_write_elsewhere_or_flush_at_every_block(s: Scene) -> None:
    await s.conn.execute(CREATE)
    cur = s.conn.cursor()
    file = BytesIO()

    class ToFile(AsyncWriter):
        async def write(self, data: Any) -> None:
            file.write(data)

    async with cur.copy(IN, writer=AsyncLibpqWriter(cur, flush_threshold=0)) as copy:
        for i in range(100):
            await copy.write_row((i, "x"))
    s.note(cur.rowcount, await s.fetch("select count(*) from t"))
    async with psycopg.AsyncCopy(s.conn.cursor(), writer=ToFile()) as copy:
        await copy.write_row((1, "x"))
    s.note(file.getvalue())


@pytest.mark.anyio
@pytest.mark.parametrize("loop_name", ["asyncio", "uvloop"])
async def test_the_queued_copy_writer_which_is_asyncios_works_there(
    conn: AsyncConnection[Any],
) -> None:
    await conn.execute(CREATE)
    cur = conn.cursor()
    async with cur.copy(IN, writer=AsyncQueuedLibpqWriter(cur)) as copy:
        for i in range(3000):
            await copy.write_row((i, "x" * 1000))
    assert cur.rowcount == 3000


@compared
async def test_rows_are_copied_from_one_connection_to_another(s: Scene) -> None:
    await s.conn.execute(CREATE)
    async with (
        s.another() as source,
        source.cursor().copy(OUT) as reading,
        s.conn.cursor().copy(IN) as writing,
    ):
        async for block in reading:
            await writing.write(block)
    s.note(await s.fetch("select i, length(s) from t order by i"))


# Pipelines


async def drain(pipeline: psycopg.AsyncPipeline) -> None:
    """sync() raises an error as soon as it is read: how much is left depends on the timing."""
    with suppress(psycopg.Error):
        await pipeline.sync()


@compared
async def test_pipeline_gives_the_results_in_order(s: Scene) -> None:
    await s.conn.set_autocommit(True)
    async with s.conn.pipeline() as pipeline:
        s.note(pipeline.status.name)
        first = await s.conn.execute("select 1")
        second = await s.conn.execute("select %s", ("two",))
        many = s.conn.cursor()
        await many.executemany("select %s::int", [(i,) for i in range(3)], returning=True)
        s.note(await second.fetchone())
        await pipeline.sync()
        s.note(await first.fetchall(), [await c.fetchall() async for c in many.results()])
        async with s.conn.pipeline() as nested:
            s.note(nested is pipeline, pipeline.level)
            third = await s.conn.execute("select 3")
        s.note(await third.fetchone(), pipeline.level)
        for _ in range(7):
            cur = await s.conn.execute("select %s::int", (7,), prepare=True)
        s.note(await cur.fetchone())
        with s.fails():
            await s.conn.execute("select 1; select 2")
            await pipeline.sync()
    s.note(PipelineStatus(s.conn.pgconn.pipeline_status).name)
    async with s.conn.pipeline():
        pass


@compared
async def test_pipeline_refuses_what_cannot_be_done_in_it(s: Scene) -> None:
    async def stream() -> None:
        async for _ in s.conn.cursor().stream("select 1"):
            pass

    async def copy() -> None:
        async with s.conn.cursor().copy(OUT):
            pass

    async def server_cursor() -> None:
        async with s.conn.cursor("named") as cur:
            await cur.execute("select 1")

    await s.conn.set_autocommit(True)
    for work in (stream, copy, server_cursor):
        with s.fails():
            async with s.conn.pipeline():
                await work()
        s.status()


@compared
async def test_an_error_in_a_pipeline_aborts_what_follows_up_to_the_sync(s: Scene) -> None:
    await s.conn.execute(CREATE)
    await s.conn.commit()
    await s.conn.set_autocommit(True)
    with s.fails():
        async with s.conn.pipeline() as pipeline:
            with s.fails():
                await s.conn.execute("insert into t values (1)")
                await s.conn.execute("select 1/0")
                await s.conn.execute("insert into t values (2)")
                await pipeline.sync()
            await drain(pipeline)
            await s.conn.execute("insert into t values (3)")
    s.note(await s.fetch("select i from t order by i"))
    with s.fails():
        async with s.conn.pipeline():
            await s.conn.execute("selec 1")
            await s.conn.execute("insert into t values (4)")
    with s.fails():
        async with s.conn.pipeline():
            await s.conn.execute("insert into t values (5)")
            raise ZeroDivisionError("in the block")
    with s.fails():
        async with s.conn.pipeline():
            await s.conn.cursor().executemany("insert into t values (%s)", [(6,), (5,), (7,)])
    s.note(await s.fetch("select i from t order by i"))


@compared
async def test_pipeline_without_autocommit_commits_and_rolls_back(s: Scene) -> None:
    await s.conn.execute(CREATE)
    await s.conn.commit()
    async with s.conn.pipeline() as pipeline:
        await s.conn.execute("insert into t values (1)")
        await s.conn.commit()
        await s.conn.execute("insert into t values (2)")
        await s.conn.rollback()
        s.status()
        with s.fails():
            await s.conn.execute("select 1/0")
            await pipeline.sync()
        await drain(pipeline)
        s.status()
        await s.conn.rollback()
        await s.conn.execute("insert into t values (3)")
        await s.conn.commit()
        s.note(await s.elsewhere("select i from t order by i"))
        await s.conn.execute("insert into t values (4)")
    s.status()
    await s.conn.rollback()
    await s.conn.commit()
    s.note(await s.fetch("select i from t order by i"))


@compared
async def test_transactions_and_savepoints_nest_inside_a_pipeline(s: Scene) -> None:
    await s.conn.set_autocommit(True)
    await s.conn.execute(CREATE)
    async with s.conn.pipeline():
        await s.conn.execute("insert into t values (0)")
        async with s.conn.transaction():
            await s.conn.execute("insert into t values (1)")
            with s.fails():
                async with s.conn.transaction():
                    await s.conn.execute("insert into t values (2)")
                    await s.conn.execute("select 1/0")
            async with s.conn.transaction("named") as tx:
                s.note(tx.savepoint_name)
                await s.conn.execute("insert into t values (3)")
                raise Rollback
        s.note(await s.elsewhere("select i from t order by i"))
        with s.fails():
            async with s.conn.transaction():
                await s.conn.execute("insert into t values (4)")
                await s.conn.execute("insert into t values (4)")
        async with s.conn.transaction(force_rollback=True):
            cur = await s.conn.execute("insert into t values (5) returning i")
            s.note(await cur.fetchone())
        s.status()
    s.note(await s.fetch("select i from t order by i"))


@compared
async def test_a_forced_rollback_in_a_pipeline_does_not_hide_a_statements_error(s: Scene) -> None:
    await s.conn.set_autocommit(True)
    async with s.conn.pipeline():
        with s.fails():
            async with s.conn.transaction(force_rollback=True) as tx:
                await s.conn.execute("select 1/0")
        s.note(tx.status.value)
        async with s.conn.transaction():
            with s.fails():
                async with s.conn.transaction(force_rollback=True) as tx:
                    await s.conn.execute("select 1/0")
            s.note(tx.status.value)
            with s.fails():
                async with s.conn.transaction():
                    await s.conn.execute("select 1/0")
                    raise Rollback
            cur = await s.conn.execute("select 'goes on'")
            s.note(await cur.fetchone())
    s.status()


@compared
async def test_an_earlier_error_in_a_pipeline_shows_where_a_block_begins(s: Scene) -> None:
    await s.conn.set_autocommit(True)
    async with s.conn.pipeline():
        with s.fails():
            await s.conn.execute("select 1/0")
            async with s.conn.transaction():
                s.note("not reached")
        async with s.conn.transaction():
            with s.fails():
                await s.conn.execute("select 1/0")
                async with s.conn.transaction():
                    s.note("not reached")
            raise Rollback
        s.note(s.conn._num_transactions)
    s.status()


@compared
async def test_pipelines_nest_inside_a_transaction(s: Scene) -> None:
    await s.conn.set_autocommit(True)
    await s.conn.execute(CREATE)
    async with s.conn.transaction(), s.conn.pipeline():
        await s.conn.execute("insert into t values (1)")
        async with s.conn.transaction():
            await s.conn.execute("insert into t values (2)")
    with s.fails():
        async with s.conn.transaction(), s.conn.pipeline():
            await s.conn.execute("insert into t values (3)")
            await s.conn.execute("insert into t values (3)")
    s.note(await s.fetch("select i from t order by i"))


@compared
async def test_a_large_pipeline_reads_while_it_writes(s: Scene) -> None:
    await s.conn.execute(CREATE)
    text = "x" * 10_000
    async with s.conn.pipeline():
        cursors = [
            await s.conn.execute("insert into t values (%s, %s) returning i, s", (i, text))
            for i in range(1000)
        ]
    s.note(sum([len((await cur.fetchall())[0][1]) for cur in cursors]))
    cur = s.conn.cursor()
    await cur.executemany(
        "update t set s = %s where i = %s returning s",
        [(text, i) for i in range(1000)],
        returning=True,
    )
    s.note(cur.rowcount, sum([len((await c.fetchall())[0][0]) async for c in cur.results()]))


@pytest.mark.anyio
async def test_a_pipeline_of_a_connection_that_died_raises_and_ends(
    conn: AsyncConnection[Any],
) -> None:
    with anyio.fail_after(10), pytest.raises(psycopg.OperationalError):
        async with conn.pipeline() as pipeline:
            await conn.execute("select pg_terminate_backend(pg_backend_pid())")
            with pytest.raises(psycopg.OperationalError):
                await pipeline.sync()
            await conn.execute("select 1")
            await pipeline.sync()
    assert conn._pipeline is None
    assert conn.broken
    with pytest.raises(psycopg.OperationalError, match="the connection is closed"):
        async with conn.pipeline():
            pass


@compared
async def test_two_tasks_share_a_pipeline(s: Scene) -> None:
    results: dict[int, Any] = {}

    async def work(n: int) -> None:
        cur = await s.conn.execute("select %s::int", (n,))
        results[n] = await cur.fetchone()

    async with s.conn.pipeline(), anyio.create_task_group() as tasks:
        for n in range(20):
            tasks.start_soon(work, n)
    s.note(sorted(results.items()))
