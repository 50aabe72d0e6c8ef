"""What is measured, in the words of each client."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import Any, NamedTuple

import asyncpg
import psycopg
import psycopg_pool
from psycopg.conninfo import conninfo_to_dict
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

import aiopgsafe

ROWS = [(i, f"row {i}") for i in range(1000)]
"""For executemany()."""
COPY_ROWS = 100_000
COPY_DATA = "".join(f"{i}\trow {i}\n" for i in range(COPY_ROWS)).encode()
FETCHED_ROWS = 10_000
KEY = 7

SETUP = f"""
    create unlogged table if not exists bench (id int, what text);
    create unlogged table if not exists bench_copy (id int, what text);
    create table if not exists bench_key (id int primary key, what text);
    insert into bench_key select i, 'row ' || i from generate_series(1, {FETCHED_ROWS}) i
        on conflict do nothing;
    analyze bench_key
"""

Do = Callable[[Any], Awaitable[object]]
"""Something on a connection."""


class Client(NamedTuple):
    """How a client takes a connection out of its pool, and what it does on one."""

    connection: Callable[[], AbstractAsyncContextManager[Any]]
    transaction: Callable[[Any], AbstractAsyncContextManager[Any]]
    select: Do
    by_key: Do
    insert: Do
    fetch: Do | None = None
    insert_many: Do | None = None
    copy_in: Do | None = None
    copy_out: Do | None = None


async def _psycopg_select(conn: Any) -> None:
    await (await conn.execute("select 1")).fetchone()


async def _psycopg_by_key(conn: Any) -> None:
    await (await conn.execute("select id, what from bench_key where id = %s", (KEY,))).fetchone()


async def _psycopg_insert(conn: Any) -> None:
    await conn.execute("insert into bench values (%s, %s)", (1, "one"))


async def _psycopg_fetch(conn: Any) -> None:
    rows = await (await conn.execute("select id, what from bench_key")).fetchall()
    assert len(rows) == FETCHED_ROWS


async def _psycopg_insert_many(conn: Any) -> None:
    await conn.cursor().executemany("insert into bench values (%s, %s)", ROWS)


async def _psycopg_copy_in(conn: Any) -> None:
    await conn.execute("truncate bench_copy")
    async with conn.cursor().copy("copy bench_copy from stdin") as copy:
        for start in range(0, len(COPY_DATA), 65536):
            await copy.write(COPY_DATA[start : start + 65536])


async def _psycopg_copy_out(conn: Any) -> None:
    async with conn.cursor().copy("copy bench_copy to stdout") as copy:
        async for _ in copy:
            pass


def _transaction(conn: Any) -> Any:
    return conn.transaction()


def _psycopg(connection: Callable[[], AbstractAsyncContextManager[Any]]) -> Client:
    return Client(
        connection=connection,
        transaction=_transaction,
        select=_psycopg_select,
        by_key=_psycopg_by_key,
        insert=_psycopg_insert,
        fetch=_psycopg_fetch,
        insert_many=_psycopg_insert_many,
        copy_in=_psycopg_copy_in,
        copy_out=_psycopg_copy_out,
    )


async def _asyncpg_select(conn: Any) -> None:
    await conn.fetchrow("select 1")


async def _asyncpg_by_key(conn: Any) -> None:
    await conn.fetchrow("select id, what from bench_key where id = $1", KEY)


async def _asyncpg_insert(conn: Any) -> None:
    await conn.execute("insert into bench values ($1, $2)", 1, "one")


async def _asyncpg_fetch(conn: Any) -> None:
    assert len(await conn.fetch("select id, what from bench_key")) == FETCHED_ROWS


async def _asyncpg_insert_many(conn: Any) -> None:
    await conn.executemany("insert into bench values ($1, $2)", ROWS)


async def _asyncpg_copy_in(conn: Any) -> None:
    async def data() -> AsyncIterator[bytes]:
        for start in range(0, len(COPY_DATA), 65536):
            yield COPY_DATA[start : start + 65536]

    await conn.execute("truncate bench_copy")
    await conn.copy_to_table("bench_copy", source=data())


async def _asyncpg_copy_out(conn: Any) -> None:
    async def take(data: bytes) -> None:
        pass

    await conn.copy_from_table("bench_copy", output=take)


def _asyncpg(connection: Callable[[], AbstractAsyncContextManager[Any]]) -> Client:
    return Client(
        connection=connection,
        transaction=_transaction,
        select=_asyncpg_select,
        by_key=_asyncpg_by_key,
        insert=_asyncpg_insert,
        fetch=_asyncpg_fetch,
        insert_many=_asyncpg_insert_many,
        copy_in=_asyncpg_copy_in,
        copy_out=_asyncpg_copy_out,
    )


INSERT = text("insert into bench values (:id, :what)")
BY_KEY = text("select id, what from bench_key where id = :id")
SELECT = text("select 1")


def _sqlalchemy(engine: Any) -> Client:
    async def select(conn: Any) -> None:
        (await conn.execute(SELECT)).one()

    async def by_key(conn: Any) -> None:
        (await conn.execute(BY_KEY, {"id": KEY})).one()

    async def insert(conn: Any) -> None:
        await conn.execute(INSERT, {"id": 1, "what": "one"})

    @asynccontextmanager
    async def transaction(conn: Any) -> AsyncIterator[None]:
        # A savepoint inside of another one.
        async with conn.begin_nested() if conn.in_transaction() else conn.begin():
            yield

    return Client(engine.connect, transaction, select, by_key, insert)


def asyncpg_options(dsn: str) -> dict[str, Any]:
    parts = conninfo_to_dict(dsn)
    return {
        "host": parts["host"],
        "port": parts.get("port"),
        "user": parts["user"],
        "database": parts["dbname"],
    }


def kept(conn: Any) -> Callable[[], AbstractAsyncContextManager[Any]]:
    """A connection of one's own, to be taken like one of a pool's."""

    @asynccontextmanager
    async def connection() -> AsyncIterator[Any]:
        yield conn

    return connection


async def single(dsn: str, stack: AsyncExitStack, *, peers: bool) -> dict[str, Client]:
    """Clients with a connection of their own each, in autocommit mode."""
    classes: dict[str, Any] = {"aiopgsafe": aiopgsafe.AsyncConnection}
    if peers:
        classes["psycopg"] = psycopg.AsyncConnection
    clients = {}
    for name, cls in classes.items():
        conn = await cls.connect(dsn, autocommit=True)
        stack.push_async_callback(conn.close)
        clients[name] = _psycopg(kept(conn))
    if peers:
        fast = await asyncpg.connect(**asyncpg_options(dsn))
        stack.push_async_callback(fast.close)
        clients["asyncpg"] = _asyncpg(kept(fast))
    return clients


async def pooled(
    dsn: str, stack: AsyncExitStack, size: int = 1, *, peers: bool
) -> dict[str, Client]:
    """Clients with a pool of `size` connections each, all of them made."""
    options: dict[str, Any] = {"min_size": size, "max_size": size, "open": False}
    options["kwargs"] = {"autocommit": True}
    ours = await stack.enter_async_context(aiopgsafe.AsyncConnectionPool(dsn, **options))
    await ours.wait()
    clients = {"aiopgsafe": _psycopg(ours.connection)}
    if peers:
        theirs = await stack.enter_async_context(psycopg_pool.AsyncConnectionPool(dsn, **options))
        await theirs.wait()
        clients["psycopg_pool"] = _psycopg(theirs.connection)
        parts = asyncpg_options(dsn)
        fast = await stack.enter_async_context(
            asyncpg.create_pool(**parts, min_size=size, max_size=size)
        )
        clients["asyncpg"] = _asyncpg(fast.acquire)
        url = f"postgresql+asyncpg://{parts['user']}@{parts['host']}:{parts['port']}"
        engine = create_async_engine(f"{url}/{parts['database']}", pool_size=size, max_overflow=0)
        stack.push_async_callback(engine.dispose)
        clients["SQLAlchemy"] = _sqlalchemy(engine)
    return clients
