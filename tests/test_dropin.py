"""Cursors, statements and settings: each scenario as psycopg's own class plays it."""

from __future__ import annotations

from contextlib import aclosing
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, cast

import psycopg
import pytest
from psycopg import IsolationLevel, rows, sql
from psycopg.adapt import Dumper, Loader
from psycopg.types import TypeInfo
from psycopg.types.composite import CompositeInfo, register_composite
from psycopg.types.enum import EnumInfo, register_enum
from psycopg.types.json import Jsonb
from psycopg.types.range import Range

from aiopgsafe import AsyncConnection
from tests.dropin import Scene, compared

CHUNKS = (3, 100) if psycopg.capabilities.has_stream_chunked() else ()
"""Sizes for stream(): more than one row at a time needs libpq 17."""


@dataclass
class Point:
    x: int
    y: int


@compared
async def test_rows_are_fetched_one_many_all_and_by_iteration(s: Scene) -> None:
    cur = s.conn.cursor()
    with s.fails():
        await cur.fetchone()
    assert await cur.execute("select i, i::text from generate_series(1, 10) i") is cur
    s.note(cur.rowcount, cur.statusmessage, cur.rownumber, cur.arraysize)
    assert cur.description is not None
    s.note([(d.name, d.type_code, d.internal_size) for d in cur.description])
    s.note(await cur.fetchone(), await cur.fetchmany(2), await cur.fetchmany(), cur.rownumber)
    s.note([row async for row in cur], await cur.fetchone(), await cur.fetchall())
    await cur.scroll(-3)
    s.note(await cur.fetchone())
    await cur.scroll(0, mode="absolute")
    s.note(await cur.fetchmany(3))
    for value, mode in ((-9, "relative"), (11, "absolute"), (1, "sideways")):
        with s.fails():
            await cur.scroll(value, mode)
    await cur.close()
    s.note(cur.closed)
    with s.fails():
        await cur.execute("select 1")
    with s.fails():
        await cur.fetchone()


@compared
async def test_several_results_of_one_execute_can_be_visited(s: Scene) -> None:
    cur = await s.conn.execute("select 1; create table t (i int); select i from t; select 'a', 2")
    s.note(await cur.fetchall(), cur.nextset(), cur.statusmessage)
    with s.fails():
        await cur.fetchall()
    s.note(cur.nextset(), await cur.fetchall(), cur.nextset(), await cur.fetchone(), cur.nextset())
    s.note(await (await cur.set_result(0)).fetchall(), await (await cur.set_result(-1)).fetchall())
    with s.fails():
        await cur.set_result(4)
    await cur.set_result(0)
    s.note([c.statusmessage async for c in cur.results()])
    with s.fails():
        await s.conn.execute("select 1; select 1/0; select 2")
    with s.fails():
        await s.conn.execute("select 1; select %s", (1,))
    s.status()


@compared
async def test_row_factories_of_connection_and_cursor_make_the_rows(s: Scene) -> None:
    query = "select 1 as x, 2 as y"
    for factory in (
        rows.tuple_row,
        rows.dict_row,
        rows.namedtuple_row,
        rows.scalar_row,
        rows.class_row(Point),
        rows.args_row(Point),
        rows.kwargs_row(lambda x, y: (y, x)),
    ):
        cur = s.conn.cursor(row_factory=cast("Any", factory))
        s.note(await (await cur.execute(query)).fetchone())
    cur = await s.conn.execute(query)
    cur.row_factory = rows.dict_row
    s.note(await cur.fetchone())
    s.conn.row_factory = rows.dict_row
    s.note(await s.fetch(query))
    async with s.another(row_factory=rows.class_row(Point)) as conn:
        s.note(await (await conn.execute(query)).fetchone())
    with s.fails():
        await s.conn.cursor(row_factory=rows.scalar_row).execute("create table t ()")


class _Loud(Loader):
    def load(self, data: Any) -> str:
        return bytes(data).decode().upper()


class _PointDumper(Dumper):
    def dump(self, obj: Point) -> bytes:
        return f"({obj.x},{obj.y})".encode()


@compared
async def test_adapters_hold_for_their_connection_or_cursor_only(s: Scene) -> None:
    cur = s.conn.cursor()
    cur.adapters.register_loader("text", _Loud)
    s.note(await (await cur.execute("select 'a'::text")).fetchone())
    s.note(await s.fetch("select 'a'::text"))
    s.conn.adapters.register_loader("text", _Loud)
    s.conn.adapters.register_dumper(Point, _PointDumper)
    s.note(await s.fetch("select 'a'::text, %s::point <-> point '(0,0)'", Point(3, 4)))
    async with s.another(context=s.conn) as conn:
        s.note(await (await conn.execute("select 'b'::text")).fetchone())
    async with s.another() as conn:
        s.note(await (await conn.execute("select 'b'::text")).fetchone())
        with s.fails():
            await conn.execute("select %s", (Point(1, 2),))


@compared
async def test_adapters_of_a_cursor_that_has_been_used(s: Scene) -> None:
    query = "select 'a'::text, %s::point <-> point '(0,0)'"
    cur = s.conn.cursor()
    with s.fails():
        await cur.execute(query, (Point(3, 4),))
    await s.conn.rollback()
    cur.adapters.register_dumper(Point, _PointDumper)
    s.note(await (await cur.execute(query, (Point(3, 4),))).fetchone())
    cur.adapters.register_loader("text", _Loud)
    s.note(await (await cur.execute(query, (Point(3, 4),))).fetchone())
    cur = await s.conn.execute("select 'a'::text from generate_series(1, 2)")
    s.note(await cur.fetchone())
    cur.adapters.register_loader("text", _Loud)  # of results that are there already
    s.note(await cur.fetchone())
    s.note(await s.fetch("select 'a'::text"))
    async with s.conn.cursor().copy("copy (select 'a', 1) to stdout") as copy:
        copy.set_types(["text", "int4"])
        s.note([row async for row in copy.rows()])


@compared
async def test_parameters_that_do_not_fit_their_query_are_refused(s: Scene) -> None:
    await s.conn.set_autocommit(True)
    refused: list[tuple[Any, Any]] = [
        ("select %s, %s", (1,)),
        ("select %s", [1, 2]),
        ("select 1", (1,)),
        ("select %(a)s", (1,)),
        ("select %s", {"a": 1}),
        ("select %(a)s", {"b": 1}),
        ("select %s", "a"),
        ("select %s", 1),
        ("select %", (1,)),
        ("select %(a)s, %s", (1,)),
        ("select %x", (1,)),
    ]
    for query, params in refused:
        for _ in range(2):
            with s.fails():
                await s.conn.execute(query, params)
    for query, params in (
        ("select 1", ()),
        ("select '%'", None),
        ("select '%%'", ()),
        ("select %(a)s, %(b)s, %(a)s", {"a": 1, "b": 2}),
        ("select %s::int[]", ([1, 2],)),
        ("select %t::text, %b::int", ["x", 2]),
        ("select %s" + " " * 5000, (1,)),
        ("select " + ",".join(["%s"] * 60), tuple(range(60))),
    ):
        for _ in range(7):  # prepared in the end
            s.note(await (await s.conn.execute(query, params)).fetchone())
    await s.conn.execute("set client_encoding to latin1")
    s.note(await (await s.conn.execute("select 'ü', %s", ("ü",))).fetchone())
    with s.fails():
        await s.conn.execute("select '\u2603', %s", ("ü",))


@compared
async def test_binary_and_text_results_and_parameters_give_the_same_values(s: Scene) -> None:
    values: tuple[Any, ...] = (
        *(1, 2**40, "ü\u2603", b"\0\xff", 1.5, Decimal("1.10"), True, None),
        *([1, None, 3], Jsonb({"a": [1]}), Range(1, 5)),
    )
    query = "select " + ", ".join(["%s"] * len(values))
    for binary in (False, True):
        cur = await s.conn.execute(query.encode(), values, binary=binary)
        s.note(repr(await cur.fetchone()), cur.pgresult and cur.pgresult.fformat(0))
        cur = await s.conn.cursor(binary=binary).execute(query.replace("%s", "%b").encode(), values)
        s.note(repr(await cur.fetchone()))
    s.note(await (await s.conn.execute("select %(a)s || 'x%%'", {"a": "v"})).fetchone())


@compared
async def test_a_bad_query_raises_the_servers_error_and_a_good_one_follows(s: Scene) -> None:
    await s.conn.set_autocommit(True)
    for query, params in (
        ("selec 1", None),
        ("select 1/%s", (0,)),
        ("select %s", ()),
        ("select %s", (object(),)),
        ("select %(a)s", (1,)),
        ("select %s, %s", (1, 2, 3)),
        ("select %s::int", ("x",)),
        ("select %s", ("\0",)),
        ("", None),
        ("select %q", (1,)),
    ):
        with s.fails():
            cur = await s.conn.execute(query.encode(), params)
            s.note(cur.statusmessage, cur.rowcount)
        s.status()
    try:
        await s.conn.execute("select no_such_column")
    except psycopg.errors.UndefinedColumn as exc:
        s.note(exc.diag.severity, exc.diag.statement_position, exc.pgresult is not None)
    s.note(await s.fetch("select 'alive'"))


@compared
async def test_executemany_runs_all_and_returns_all_if_asked(s: Scene) -> None:
    await s.conn.execute("create table t (i int primary key, s text)")
    cur = s.conn.cursor()
    await cur.executemany("insert into t values (%s, %s)", [(i, str(i)) for i in range(300)])
    s.note(cur.rowcount, cur.statusmessage)
    with s.fails():
        await cur.fetchone()
    await cur.executemany(
        "insert into t values (%s, 'r') returning i",
        [(i,) for i in (500, 501, 502)],
        returning=True,
    )
    s.note(cur.rowcount, [await c.fetchall() async for c in cur.results()])
    await cur.executemany("insert into t values (%s)", [])
    s.note(cur.rowcount)
    await s.conn.commit()
    with s.fails():
        await cur.executemany("insert into t values (%s)", [(1000,), (1,), (1001,)])
    s.status()
    await s.conn.rollback()
    with s.fails():
        await cur.executemany("insert into t values (%s)", [(1000,), (1, 2)])
    s.status()
    await s.conn.rollback()

    def torn() -> Any:
        yield (2000,)
        raise ZeroDivisionError("from the caller's generator")

    with s.fails():
        await cur.executemany("insert into t values (%s)", torn())
    s.status()
    await s.conn.rollback()
    s.note(await s.fetch("select count(*) from t"))


@compared
async def test_stream_gives_rows_as_they_come(s: Scene) -> None:
    query = "select i from generate_series(1, %s) i"
    for size in (1, *CHUNKS):
        s.note([row async for row in s.conn.cursor().stream(query, (7,), size=size)])
    s.note([row async for row in s.conn.cursor(binary=True).stream(query, (2,))])
    s.note([row async for row in s.conn.cursor().stream(query, (0,))])
    for bad in ("create table t ()", "selec 1", "select 1; select 2"):
        with s.fails():
            s.note([row async for row in s.conn.cursor().stream(bad.encode())])
        s.status()
        await s.conn.rollback()
    with s.fails():
        s.note([row async for row in s.conn.cursor().stream(query, (7,), size=0)])
    await s.conn.rollback()  # the query was cancelled, or had ended before
    with s.fails():
        async for row in s.conn.cursor().stream("select 1/(3-i) from generate_series(1, 9) i"):
            s.note(row)
    s.status()


@compared
async def test_stream_left_early_leaves_a_usable_connection(s: Scene) -> None:
    for size in (1, *CHUNKS[:1]):
        stream = s.conn.cursor().stream("select generate_series(1, 200000)", size=size)
        async with aclosing(cast("Any", stream)):
            async for row in stream:
                s.note(row)
                if row[0] == 3:
                    break
        # (Cancelled, or at its end before the request got there.)
        s.note(s.conn.info.transaction_status.name in ("INERROR", "INTRANS"))
        await s.conn.rollback()
    with s.fails():
        async with aclosing(
            cast("Any", s.conn.cursor().stream("select 1 union select 2"))
        ) as rows_:
            async for _ in rows_:
                raise ZeroDivisionError("in the consumer")
    await s.conn.rollback()
    s.note(await s.fetch("select 'alive'"))


@compared
async def test_a_copy_that_execute_began_makes_the_connection_useless_as_it_does_psycopgs(
    s: Scene,
) -> None:
    with s.fails():
        await s.conn.execute("copy (select 1) to stdout")
    s.status()


@compared
async def test_server_cursors_fetch_scroll_iterate_and_outlive_a_commit(s: Scene) -> None:
    async with s.conn.cursor("c1") as cur:
        with s.fails():
            await cur.fetchone()
        await s.conn.rollback()
        await cur.execute("select generate_series(1, %s) as i", (25,))
        cur.itersize = 4
        s.note(cur.name, cur.scrollable, cur.withhold, cur.description and cur.description[0].name)
        s.note(await cur.fetchone(), await cur.fetchmany(3), cur.rownumber)
        s.note([row async for row in cur][-2:], await cur.fetchone(), cur.rownumber)
        with s.fails():
            await cur.scroll(-5)
        with s.fails():
            await cur.executemany("select %s", [(1,)])
    await s.conn.rollback()
    cur = s.conn.cursor("c 2", scrollable=True, withhold=True, row_factory=rows.dict_row)
    await cur.execute("select generate_series(1, 9) as i", binary=True)
    await s.conn.commit()
    await cur.scroll(5)
    s.note(await cur.fetchone())
    await cur.scroll(0, mode="absolute")
    s.note(await cur.fetchmany(2))
    with s.fails():
        await cur.scroll(1, mode="sideways")
    with s.fails():
        await cur.execute("select 1/0")
    s.status()
    with s.fails():
        await cur.close()
    await s.conn.rollback()
    await cur.close()
    await cur.close()
    s.note(cur.closed)
    cur = s.conn.cursor("c3")
    await cur.execute("select 1")
    await s.conn.commit()
    with s.fails():
        await cur.fetchone()
    await s.conn.rollback()
    with s.fails():
        await cur.close()
    s.status()


@compared
async def test_client_and_raw_cursors_bind_their_own_way(s: Scene) -> None:
    cur = psycopg.AsyncClientCursor(s.conn)
    s.note(cur.mogrify("select %s, %s", ("it's", [1, 2])))
    s.note(await (await cur.execute("select 1; select %s", ("it's",))).fetchall(), cur.nextset())
    raw = psycopg.AsyncRawCursor(s.conn)
    s.note(await (await raw.execute("select $1 || '%', $1", ["a"])).fetchall())
    await raw.executemany("select $1::int", [(i,) for i in range(3)], returning=True)
    s.note([await c.fetchall() async for c in raw.results()])
    async with psycopg.AsyncRawServerCursor(s.conn, "r") as named:
        s.note(await (await named.execute("select $1::int + 1", [4])).fetchall())
    async with s.another(cursor_factory=psycopg.AsyncClientCursor) as conn:
        cur2 = await conn.execute("select %s; select %s", (1, 2))
        s.note(type(cur2).__name__, [await c.fetchall() async for c in cur2.results()])


@compared
async def test_prepared_statements_come_by_threshold_and_go_by_rollback(s: Scene) -> None:
    async def prepared() -> list[Any]:
        query = "select statement from pg_prepared_statements where name like '_pg3%' order by 1"
        return await (await s.conn.execute(query, prepare=False)).fetchall()

    s.note(s.conn.prepare_threshold, s.conn.prepared_max)
    for _ in range(7):
        await s.conn.execute("select %s", ("threshold",))
        s.note(len(await prepared()))
    await s.conn.execute("select %s", (1,), prepare=True)
    await s.conn.execute("select %s", (1,), prepare=False)
    s.note(await prepared())
    await s.conn.execute("create table t (i int)")
    await s.conn.execute("select * from t", prepare=True)
    await s.conn.rollback()
    s.note(await prepared())
    s.conn.prepared_max, s.conn.prepare_threshold = 2, 0
    for n in range(4):
        await s.conn.execute(f"select {n}".encode())
    s.note(await prepared())
    s.conn.prepare_threshold = None
    await s.conn.execute("select 'never'")
    s.note(await prepared())
    await s.conn.commit()
    s.conn.prepare_threshold = 0
    with s.fails():
        async with s.conn.transaction():
            await s.conn.execute("create table u (i int)")
            await s.conn.execute("select * from u")
            raise ZeroDivisionError
    await s.conn.execute("create table u (s text)")
    s.note(await s.fetch("select * from u"), await prepared())


@compared
async def test_types_are_looked_up_and_registered(s: Scene) -> None:
    await s.conn.execute("create type mood as enum ('sad', 'ok')")
    await s.conn.execute("create type pair as (x int, y int)")
    s.note((await TypeInfo.fetch(s.conn, "text")) is not None, await TypeInfo.fetch(s.conn, "no"))
    mood = await EnumInfo.fetch(s.conn, "mood")
    pair = await CompositeInfo.fetch(s.conn, sql.Identifier("public", "pair"))
    assert mood is not None
    assert pair is not None
    register_enum(mood, s.conn)
    register_composite(pair, s.conn, factory=Point)
    s.note([m.name for m in (await s.fetch("select 'ok'::mood"))[0]])
    s.note(await s.fetch("select row(1, 2)::pair, array[row(3, 4)::pair]"))
    s.status()


@compared
async def test_large_parameters_and_results_pass_a_socket_that_is_full(s: Scene) -> None:
    text, data = "ü" * 3_000_000, bytes(range(256)) * 20_000
    cur = await s.conn.execute("select %s, %b, length(%s)", (text, data, text))
    row = await cur.fetchone()
    s.note(row == (text, data, len(text)))
    cur = await s.conn.execute("select repeat('x', 1000) from generate_series(1, 10000)")
    s.note(sum([len(row[0]) async for row in cur]))
    composed = sql.SQL("select {} as {}").format(sql.Literal(text), sql.Identifier("a b"))
    s.note(len((await (await s.conn.execute(composed)).fetchall())[0][0]))


@compared
async def test_settings_of_transactions_are_guarded_and_take_effect(s: Scene) -> None:
    show = (
        "select current_setting('transaction_isolation'), current_setting('transaction_read_only'),"
        " current_setting('transaction_deferrable')"
    )
    s.note(s.conn.isolation_level, s.conn.read_only, s.conn.deferrable, s.conn.autocommit)
    await s.conn.set_isolation_level(IsolationLevel.SERIALIZABLE)
    await s.conn.set_read_only(True)
    await s.conn.set_deferrable(True)
    s.note(await s.fetch(show), s.conn.isolation_level, s.conn.read_only, s.conn.deferrable)
    setters: tuple[tuple[Any, Any], ...] = (
        (s.conn.set_isolation_level, None),
        (s.conn.set_read_only, None),
        (s.conn.set_deferrable, None),
        (s.conn.set_autocommit, True),
    )
    for setter, value in setters:
        with s.fails():
            await setter(value)
    await s.conn.rollback()
    async with s.conn.transaction():
        s.note(await s.fetch(show))
        for setter, value in setters:
            with s.fails():
                await setter(value)
    for setter, value in setters:
        await setter(value)
    s.note(await s.fetch(show), s.conn.isolation_level, s.conn.autocommit)
    await s.conn.execute("begin")
    with s.fails():
        await s.conn.set_autocommit(False)
    await s.conn.execute("rollback")
    with s.fails():
        await s.conn.set_isolation_level(cast("Any", 99))
    for name in ("autocommit", "isolation_level", "read_only", "deferrable"):
        with s.fails():
            setattr(s.conn, name, None)


class _Counting(psycopg.AsyncCursor[Any]):
    async def execute(self, query: Any, *args: Any, **kwargs: Any) -> Any:
        await super().execute(query, *args, **kwargs)
        return self

    async def count(self) -> int:
        return len(await self.fetchall())


class _Mine(AsyncConnection[Any]):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.row_factory = rows.dict_row
        self.cursor_factory = _Counting
        self.mine = True


@pytest.mark.anyio
async def test_a_subclass_has_its_own_cursors_and_rows(dsn: str) -> None:
    async with await _Mine.connect(dsn, autocommit=True) as conn:
        assert type(conn) is _Mine
        assert conn.mine
        cur = await conn.execute("select 1 as a")
        assert isinstance(cur, _Counting)
        assert await cur.fetchone() == {"a": 1}
        assert await cur.execute("select generate_series(1, 3)") is cur
        assert await cur.count() == 3
        assert "._Mine [IDLE]" in repr(conn)
    assert conn.closed
