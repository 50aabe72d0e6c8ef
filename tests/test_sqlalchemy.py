"""SQLAlchemy's async engine and session on connections of ours: `async_creator`."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
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
INSERT = text("insert into t values (:id)")


@pytest.fixture(params=["asyncio", "uvloop"])
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    return "asyncio", {"use_uvloop": request.param == "uvloop"}


@pytest.fixture
def connection_class(request: pytest.FixtureRequest) -> type[psycopg.AsyncConnection[Any]]:
    chosen: type[psycopg.AsyncConnection[Any]] = getattr(request, "param", AsyncConnection)
    return chosen


@pytest.fixture
async def engine(
    proxy: FaultProxy,
    admin: Admin,
    connection_class: type[psycopg.AsyncConnection[Any]],
    anyio_backend: object,
) -> AsyncIterator[AsyncEngine]:
    admin.execute("create table t (id int primary key)")
    engine = create_async_engine(
        "postgresql+psycopg://",
        async_creator=partial(connection_class.connect, proxy.dsn),
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


Work = Callable[[AsyncEngine, int, set[int]], Awaitable[None]]


def notes(exc: BaseException | None) -> Iterator[str]:
    """Also of what it came after: a scope interrupts SQLAlchemy once more while it closes."""
    while exc is not None:
        yield from getattr(exc, "__notes__", ())
        exc = exc.__context__


class Interrupted:
    """Work that is interrupted in one of the ways that there are."""

    def __init__(self, kind: str, work: Callable[[], Awaitable[None]]) -> None:
        self._kind = kind
        self._work = work
        self._timeout = asyncio.timeout(None)
        self._scope = anyio.CancelScope()
        self.told_committed = False
        self.task = asyncio.ensure_future(self._run())

    async def _run(self) -> None:
        try:
            if self._kind == "timeout":
                async with self._timeout:
                    await self._see()
            else:
                with self._scope:
                    await self._see()
        except (TimeoutError, asyncio.CancelledError):
            pass

    async def _see(self) -> None:
        try:
            await self._work()
        except asyncio.CancelledError as exc:
            self.told_committed = any("is committed" in note for note in notes(exc))
            raise

    def interrupt(self) -> None:
        if self.task.done():
            return
        if self._kind == "timeout":
            self._timeout.reschedule(0)
        elif self._kind == "scope":
            self._scope.cancel()
        else:
            self.task.cancel()


async def cancel_at_random(
    engine: AsyncEngine, proxy: FaultProxy, work: Work, kind: str, cancels: int
) -> tuple[set[int], int]:
    """What is known to be committed, and how many knew it by the cancellation's note."""
    answer = proxy.inject(Delay(0.02), command_complete("COMMIT"))
    chance = random.Random(0)
    known: set[int] = set()
    held_back = 0
    for id in range(cancels):
        interrupted = Interrupted(kind, partial(work, engine, id, known))
        if id % 2:
            await asyncio.sleep(chance.random() * 0.04)
        else:
            before = answer.hits
            while answer.hits == before:
                await anyio.lowlevel.checkpoint()
        interrupted.interrupt()
        await interrupted.task
        if interrupted.told_committed:
            known.add(id)
            held_back += 1
    return known, held_back


def ids(admin: Admin) -> set[int]:
    return {id for (id,) in admin.execute("select id from t")}


@pytest.mark.anyio
@pytest.mark.parametrize("kind", ["cancel", "scope", "timeout"])
@pytest.mark.parametrize("work", [by_commit, by_session_begin, by_connection_begin])
async def test_a_cancellation_tells_what_became_of_the_commit(
    engine: AsyncEngine,
    proxy: FaultProxy,
    admin: Admin,
    work: Work,
    kind: str,
    figures: Figures,
    long: bool,
) -> None:
    cancels = 300 if long else 10
    known, held_back = await cancel_at_random(engine, proxy, work, kind, cancels)
    there = ids(admin)
    figures(cancels=cancels, committed=len(there), held_back=held_back, lies=len(there ^ known))
    assert there == known
    assert held_back >= cancels // 2
    left = "select count(*) from pg_stat_activity where state like 'idle in transaction%'"
    deadline = monotonic() + 5  # SQLAlchemy closes in tasks of its own
    while admin.execute(left).fetchone() != (0,):
        assert monotonic() < deadline
        await asyncio.sleep(0)


@pytest.mark.anyio
@pytest.mark.parametrize("connection_class", [psycopg.AsyncConnection], indirect=True)
async def test_without_ours_it_lies(
    engine: AsyncEngine, proxy: FaultProxy, admin: Admin, figures: Figures, long: bool
) -> None:
    """Else the test above would show nothing."""
    cancels = 300 if long else 10
    known, held_back = await cancel_at_random(engine, proxy, by_commit, "cancel", cancels)
    figures(cancels=cancels, committed=len(ids(admin)), lies=len(ids(admin) - known))
    assert held_back == 0
    assert len(ids(admin) - known) >= cancels // 2


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
    assert ids(admin) == {1, 2, 3, 4, 6}
