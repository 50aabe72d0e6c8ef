"""The same scenario on psycopg's class and on ours: what it returns and raises must be the same."""

from __future__ import annotations

import gc
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from difflib import unified_diff
from typing import Any, TypeAlias

import anyio
import psycopg
import pytest
from psycopg.pq import PipelineStatus, TransactionStatus

from aiopgsafe import AsyncConnection

Connection: TypeAlias = psycopg.AsyncConnection[Any]
Scenario: TypeAlias = Callable[["Scene"], Awaitable[None]]

PATIENCE = 20.0
"""Seconds that a scenario may take; the slowest takes about one."""


class Scene:
    """What a scenario has at hand, and the record of what it has seen."""

    def __init__(self, cls: type[Connection], dsn: str, conn: Connection) -> None:
        self.cls = cls
        self.dsn = dsn
        self.conn = conn
        self.seen: list[object] = []

    def note(self, *values: object) -> None:
        self.seen.append(values if len(values) != 1 else values[0])

    def error(self, exc: BaseException) -> None:
        """Note an exception as its class, SQLSTATE and message, without addresses."""
        text = re.sub(r" at 0x[0-9a-f]+|psycopg\.|aiopgsafe\.|Async", "", str(exc))
        # psycopg has two words for the same thing, by the place where it finds out.
        text = text.replace("the connection is lost", "the connection is closed")
        self.note(type(exc).__name__, getattr(exc, "sqlstate", None), text)

    @contextmanager
    def fails(self) -> Iterator[None]:
        """The block raises (or doesn't): note which."""
        try:
            yield
        except Exception as exc:
            self.error(exc)
        else:
            self.note("no error")

    @asynccontextmanager
    async def another(self, **kwargs: Any) -> AsyncIterator[Connection]:
        """Another connection of the same class, in autocommit mode."""
        conn = await self.cls.connect(self.dsn, autocommit=True, **kwargs)
        try:
            yield conn
        finally:
            await conn.close()

    async def fetch(self, query: str, *params: Any) -> list[Any]:
        """The rows of a query on the scene's own connection."""
        return await (await self.conn.execute(query.encode(), params or None)).fetchall()

    async def elsewhere(self, query: str) -> list[Any]:
        """The rows of a query as another session sees them."""
        async with self.another() as conn:
            cur = await conn.execute(query.encode())
            return await cur.fetchall() if cur.description else []

    def status(self) -> None:
        """Note the state that the connection is in."""
        info = self.conn.info
        self.note(
            "closed" if self.conn.closed else "open",
            TransactionStatus(info.transaction_status).name,
            # Of a dead connection it tells how it died: with us in the middle of a pipeline.
            PipelineStatus(info.pipeline_status).name if not self.conn.closed else None,
        )


async def _play(cls: type[Connection], dsn: str, scenario: Scenario) -> list[object]:
    conn = await cls.connect(dsn)
    scene = Scene(cls, dsn, conn)
    try:
        with anyio.fail_after(PATIENCE):
            await scenario(scene)
        scene.status()
        if not conn.closed:
            # Whatever happened: can it still be used?
            with scene.fails():
                await conn.rollback()
                cur = await conn.execute("select 'usable'")
                scene.note(await cur.fetchone())
    finally:
        await conn.close()
    return scene.seen


def _empty(dsn: str) -> None:
    with psycopg.connect(dsn, autocommit=True) as admin:
        admin.execute("drop schema if exists public cascade")
        admin.execute("create schema public")


_expected: dict[tuple[Scenario, str], list[object]] = {}


def compared(scenario: Scenario) -> Callable[..., None]:
    """Make a test of a scenario: psycopg plays it on asyncio, ours on each loop."""

    def test(dsn: str, anyio_backend: tuple[str, dict[str, Any]]) -> None:
        key = (scenario, dsn)
        if key not in _expected:
            _expected[key] = anyio.run(_play, psycopg.AsyncConnection, dsn, scenario)
            _empty(dsn)
        name, options = anyio_backend
        seen = anyio.run(
            _play, AsyncConnection, dsn, scenario, backend=name, backend_options=options
        )
        gc.collect()  # what was forgotten warns now
        if seen != _expected[key]:
            theirs, ours = [*map(str, _expected[key])], [*map(str, seen)]
            difference = unified_diff(theirs, ours, "psycopg", "aiopgsafe", lineterm="")
            pytest.fail("\n".join(difference))

    test.__name__ = scenario.__name__
    test.__doc__ = scenario.__doc__
    return test
