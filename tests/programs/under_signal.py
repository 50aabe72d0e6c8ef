"""A small program that is sent signals while it commits (see tests/test_signals.py).

Usage: under_signal.py LOOP SCENARIO DSN. It says what it knows on stdout.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Awaitable, Callable
from typing import Any, NoReturn

import anyio
import psycopg

import aiopgsafe


def say(*what: object) -> None:
    print(*what, flush=True)


async def transfer(dsn: str, *, commit_timeout: float = 30.0, fail: bool = False) -> None:
    conn = await aiopgsafe.AsyncConnection.connect(dsn, commit_timeout=commit_timeout)
    tx: aiopgsafe.Transaction[Any] | None = None
    try:
        async with conn.transaction() as tx:
            tx.on_commit(say, "callback")
            tx.on_commit(slow_callback)
            tx.on_rollback(say, "rollback callback")
            await tx.execute("insert into t values (1)")
            if fail:
                raise LookupError
        say("committed")
    except BaseException as exc:
        say("raised", type(exc).__name__, *getattr(exc, "__notes__", []))
        raise
    finally:
        say("state", tx.state.name if tx else None, "closed", conn.closed)
        say("idle", conn.info.transaction_status is psycopg.pq.TransactionStatus.IDLE)
        await conn.close()


async def slow_callback() -> None:
    await anyio.sleep(0.05)
    say("slow callback")


async def in_main_task(dsn: str) -> None:
    await transfer(dsn)


async def unanswered(dsn: str) -> None:
    await transfer(dsn, commit_timeout=20)


async def in_rollback(dsn: str) -> None:
    try:
        await transfer(dsn, fail=True)
    except LookupError:
        say("lookup error")


async def handler_raises(dsn: str) -> None:
    def handler(signum: int, frame: object) -> NoReturn:
        raise SystemExit(7)

    signal.signal(signal.SIGTERM, handler)
    await transfer(dsn)


async def in_another_task(dsn: str) -> None:
    """The task that the loop tears down when the main one ends is in COMMIT."""
    say("teardown")
    if LOOP == "trio":
        async with anyio.create_task_group() as group:
            group.start_soon(transfer, dsn)
            await asyncio_stdin()
            group.cancel_scope.cancel()
    else:
        tasks.add(asyncio.create_task(transfer(dsn)))
        await asyncio_stdin()


async def many(dsn: str) -> None:
    """Always some COMMIT in flight: the signal has to get through all the same."""

    def handler(signum: int, frame: object) -> NoReturn:
        raise SystemExit(7)

    signal.signal(signal.SIGTERM, handler)

    async def client(first: int) -> None:
        async with await aiopgsafe.AsyncConnection.connect(dsn, autocommit=True) as conn:
            id = first
            while True:
                async with conn.transaction() as tx:
                    tx.on_commit(say, "id", id)
                    await tx.execute("insert into t values (%s)", (id,))
                id += 1

    async with anyio.create_task_group() as group:
        for n in range(10):
            group.start_soon(client, n * 1_000_000)


async def asyncio_stdin() -> None:
    await anyio.to_thread.run_sync(sys.stdin.readline)


tasks: set[asyncio.Task[None]] = set()
LOOP, SCENARIO, DSN = sys.argv[1:]
SCENARIOS: dict[str, Callable[[str], Awaitable[None]]] = {
    fn.__name__: fn
    for fn in (in_main_task, unanswered, in_rollback, handler_raises, in_another_task, many)
}


async def main() -> None:
    await SCENARIOS[SCENARIO](DSN)


if __name__ == "__main__":
    # Whoever runs the tests in the background may ignore it, and children inherit that.
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
