"""What has ended is gone at once: nothing is left to the garbage collector."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import psycopg
import pytest
from django.db import transaction

from aiopgsafe import Connection, Database
from tests.test_django import OURS, STOCK, connect, insert

Admin = psycopg.Connection[Any]

TIMES = 20


@pytest.fixture(autouse=True)
def table(admin: Admin) -> None:
    admin.execute("create table t (i int)")


def in_block(conn: Connection[Any]) -> None:
    with conn.transaction() as tx:
        tx.execute("insert into t values (1)")
        tx.on_commit(bool)


def in_savepoint(conn: Connection[Any]) -> None:
    with conn.transaction(), conn.transaction() as tx:
        tx.execute("insert into t values (1)")


def by_hand(conn: Connection[Any]) -> None:
    conn.execute("insert into t values (1)")
    conn.commit()


def undone(conn: Connection[Any]) -> None:
    with conn.transaction(force_rollback=True) as tx:
        tx.execute("insert into t values (1)")
        tx.on_rollback(bool)


def garbage_of(work: Callable[[], object]) -> int:
    work()
    gc.collect()
    gc.disable()
    try:
        for _ in range(TIMES):
            work()
        return gc.collect()
    finally:
        gc.enable()


@pytest.mark.parametrize("work", [in_block, in_savepoint, by_hand, undone])
def test_sync_transactions_leave_no_cycles(
    dsn: str, work: Callable[[Connection[Any]], None]
) -> None:
    with Connection.connect(dsn) as conn:
        assert garbage_of(lambda: work(conn)) == 0


@pytest.mark.parametrize("engine", [OURS, STOCK])
def test_djangos_blocks_leave_no_cycles(dsn: str, engine: str) -> None:
    def work() -> None:
        with transaction.atomic():
            insert(1)
            transaction.on_commit(bool)

    wrapper = connect(dsn, engine)
    assert garbage_of(work) == 0
    wrapper.close()


@pytest.mark.anyio
async def test_transactions_of_a_database_leave_no_cycles(dsn: str) -> None:
    async def work() -> None:
        async with db.transaction() as tx:
            await tx.execute("insert into t values (1)")
            tx.on_commit(bool)
            async with db.transaction():
                await tx.execute("insert into t values (2)")

    async with Database(dsn, min_size=1, max_size=1) as db:
        await work()
        gc.collect()
        gc.disable()
        try:
            for _ in range(TIMES):
                await work()
            assert gc.collect() == 0
        finally:
            gc.enable()
