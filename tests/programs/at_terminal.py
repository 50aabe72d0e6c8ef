"""A small program at a terminal, whose user presses Ctrl-C (see tests/test_cancel_on_signal.py).

Usage: at_terminal.py LOOP SCENARIO DSN. It says what it knows.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from typing import Any

import psycopg

import aiopgsafe

SLEEP = "select pg_sleep(60)"


def say(*what: object) -> None:
    print(*what, flush=True)


async def statement(conn: aiopgsafe.AsyncConnection[Any], query: str) -> None:
    try:
        await conn.execute(query.encode())
    except psycopg.errors.QueryCanceled:
        say("cancelled")
    except BaseException as exc:
        say("raised", type(exc).__name__)
        raise


async def once(conn: aiopgsafe.AsyncConnection[Any]) -> None:
    with conn.cancel_on_signal():
        await statement(conn, SLEEP)
        await statement(conn, "select 'the next statement'")
    say("goes on", conn.info.backend_pid)


async def twice(conn: aiopgsafe.AsyncConnection[Any]) -> None:
    with conn.cancel_on_signal():
        await statement(conn, SLEEP)
        await statement(conn, SLEEP)


async def commit(conn: aiopgsafe.AsyncConnection[Any]) -> None:
    tx: aiopgsafe.Transaction[Any] | None = None
    try:
        with conn.cancel_on_signal():
            async with conn.transaction() as tx:
                await tx.execute("insert into t values (1)")
                tx.on_commit(say, "callback")
    except BaseException as exc:
        say("raised", type(exc).__name__, *getattr(exc, "__notes__", []))
        raise
    finally:
        say("state", tx.state.name if tx else None)


async def main() -> None:
    conn = await aiopgsafe.AsyncConnection.connect(DSN, autocommit=True)
    handler = signal.getsignal(signal.SIGINT)
    try:
        await {"once": once, "twice": twice, "commit": commit}[SCENARIO](conn)
    finally:
        say("put back", signal.getsignal(signal.SIGINT) is handler)
        await conn.close()


LOOP, SCENARIO, DSN = sys.argv[1:]

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if LOOP == "asyncio":
        asyncio.run(main())
    elif LOOP == "uvloop":
        import uvloop

        uvloop.run(main())
    else:
        import trio

        trio.run(main)
    say("handlers", signal.getsignal(signal.SIGINT) is signal.default_int_handler)
