"""`aiopgsafe tokens`: the table of `commit_token=True`, and its old rows."""

from __future__ import annotations

from functools import partial

import typer

from .. import AsyncConnection
from .running import OK, run

CREATE = b"""
    create schema if not exists aiopgsafe;
    create table if not exists aiopgsafe.token (
        token uuid primary key,
        resolved boolean not null default false,
        created timestamptz not null default now()
    )
"""

NIL = "00000000-0000-0000-0000-000000000000"

KEEP = b"""
    insert into aiopgsafe.token (token, created) values (%s, now() - make_interval(secs => %s))
    on conflict (token) do update set created = greatest(token.created, excluded.created)
"""
"""Up to when tokens were deleted: who asks for an older one is not told that it was never there."""

PRUNE = b"""
    delete from aiopgsafe.token where token in (
        select token from aiopgsafe.token
        where created < now() - make_interval(secs => %s) and token <> %s
        limit %s for update skip locked
    )
"""

BATCH = 10_000
"""Rows that are deleted in one transaction."""


def create_tokens(dsn: str, loop: str) -> int:
    """Create the table, and return the command's exit status."""
    return run("tokens create", partial(_create, dsn), loop)


def prune_tokens(dsn: str, older_than: float, loop: str) -> int:
    """Delete tokens older than so many seconds, and return the command's exit status."""
    return run("tokens prune", partial(_prune, dsn, older_than), loop)


async def _create(dsn: str) -> int:
    async with await AsyncConnection.connect(dsn, autocommit=True) as conn:
        await conn.execute(CREATE)
    typer.echo("table aiopgsafe.token is there")
    return OK


async def _prune(dsn: str, older_than: float) -> int:
    deleted = 0
    async with await AsyncConnection.connect(dsn, autocommit=True) as conn:
        await conn.execute(KEEP, (NIL, older_than))
        while True:
            cur = await conn.execute(PRUNE, (older_than, NIL, BATCH))
            deleted += cur.rowcount
            if cur.rowcount < BATCH:
                break
    typer.echo(f"{deleted} tokens deleted")
    return OK
