"""Shows Ctrl-C as in psql: the first one cancels the statement, the program goes on.

    python examples/ctrl_c.py [DSN]

The example presses Ctrl-C for you, after half a second.
"""

from __future__ import annotations

import asyncio
import os
import signal

import psycopg
from _server import database

from aiopgsafe import AsyncConnection


async def main(dsn: str) -> None:
    loop = asyncio.get_running_loop()
    async with await AsyncConnection.connect(dsn, autocommit=True) as conn:
        with conn.cancel_on_signal():
            loop.call_later(0.5, os.kill, os.getpid(), signal.SIGINT)
            try:
                await conn.execute("select pg_sleep(60)")
            except psycopg.errors.QueryCanceled as exc:
                print("the statement was cancelled:", exc)
            cur = await conn.execute("select 'the connection is usable'")
            print((await cur.fetchone() or ("",))[0])


if __name__ == "__main__":
    with database() as dsn:
        asyncio.run(main(dsn))
