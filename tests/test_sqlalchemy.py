"""SQLAlchemy's async engine and session on connections of ours: `async_creator`."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from time import monotonic
from typing import Any

import anyio
import psycopg
import pytest
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine

from aiopgsafe import AsyncConnection
from aiopgsafe.testing import Delay, FaultProxy, command_complete
from tests.conftest import Figures

Admin = psycopg.Connection[Any]
CANCELS = 60
INSERT = text("insert into t values (:id)")


@pytest.fixture(params=["asyncio", "uvloop"])
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    return "asyncio", {"use_uvloop": request.param == "uvloop"}


@pytest.fixture
async def engine(
    proxy: FaultProxy, admin: Admin, anyio_backend: object
) -> AsyncIterator[AsyncEngine]:
    admin.execute("create table t (id int primary key)")
    engine = create_async_engine(
        "postgresql+psycopg://",
        async_creator=partial(AsyncConnection.connect, proxy.dsn),
        pool_size=5,
    )
    yield engine
    await engine.dispose()


# Each notes what it knows to be committed: a cancellation may come after that, while SQLAlchemy
# closes the session.


async def by_commit(engine: AsyncEngine, id: int, known: set[int]) -> None:
    async with AsyncSession(engine) as session:
        await session.execute(INSERT, {"id": id})
        await session.commit()
        known.add(id)


async def by_session_begin(engine: AsyncEngine, id: int, known: set[int]) -> None:
    async with AsyncSession(engine) as session:
        async with session.begin():
            await session.execute(INSERT, {"id": id})
        known.add(id)


async def by_connection_begin(engine: AsyncEngine, id: int, known: set[int]) -> None:
    async with engine.connect() as conn:
        async with conn.begin():
            await conn.execute(INSERT, {"id": id})
        known.add(id)


@pytest.mark.anyio
@pytest.mark.parametrize("work", [by_commit, by_session_begin, by_connection_begin])
async def test_a_cancellation_tells_what_became_of_the_commit(
    engine: AsyncEngine,
    proxy: FaultProxy,
    admin: Admin,
    work: Callable[[AsyncEngine, int, set[int]], Awaitable[None]],
    figures: Figures,
) -> None:
    answer = proxy.inject(Delay(0.02), command_complete("COMMIT"))
    chance = random.Random(0)
    known: set[int] = set()
    held_back = 0
    for id in range(CANCELS):
        task = asyncio.ensure_future(work(engine, id, known))
        if id % 2:
            await asyncio.sleep(chance.random() * 0.04)
        else:
            before = answer.hits
            while answer.hits == before:
                await anyio.lowlevel.checkpoint()
        task.cancel()
        try:
            await task
        except asyncio.CancelledError as exc:
            if any("is committed" in note for note in getattr(exc, "__notes__", ())):
                known.add(id)
                held_back += 1
    there = {id for (id,) in admin.execute("select id from t")}
    figures(cancels=CANCELS, committed=len(there), held_back=held_back, lies=len(there ^ known))
    assert there == known
    assert held_back >= CANCELS // 2
    left = "select count(*) from pg_stat_activity where state like 'idle in transaction%'"
    deadline = monotonic() + 5  # SQLAlchemy closes in tasks of its own
    while admin.execute(left).fetchone() != (0,):
        assert monotonic() < deadline
        await asyncio.sleep(0)


@pytest.mark.anyio
async def test_its_patterns_work(engine: AsyncEngine, admin: Admin) -> None:
    async with engine.connect() as conn:
        await conn.execute(INSERT, [{"id": 1}, {"id": 2}])
        await conn.commit()
        with pytest.raises(IntegrityError):
            async with conn.begin_nested():
                await conn.execute(INSERT, {"id": 1})
        await conn.execute(INSERT, {"id": 3})
        await conn.commit()
        async with conn.stream(text("select id from t order by id")) as result:
            assert [row.id async for row in result] == [1, 2, 3]
        await conn.rollback()
    serializable = engine.execution_options(isolation_level="SERIALIZABLE")
    async with serializable.begin() as conn:
        shown = await conn.execute(text("show transaction_isolation"))
        assert shown.scalar_one() == "serializable"
    autocommit = engine.execution_options(isolation_level="AUTOCOMMIT")
    async with autocommit.connect() as conn:
        await conn.execute(INSERT, {"id": 4})
    async with AsyncSession(engine) as session:
        await session.run_sync(lambda sync: sync.execute(INSERT, {"id": 6}))
        await session.commit()
    assert [id for (id,) in admin.execute("select id from t order by id")] == [1, 2, 3, 4, 6]
