"""Shows that the loss of an idle connection is seen at once, by nobody who asks.

python examples/watch_disconnect.py [DSN]
"""

from __future__ import annotations

import sys
from time import perf_counter

import anyio
from _server import database

from aiopgsafe import AsyncConnection


async def main(dsn: str) -> None:
    async with await AsyncConnection.connect(dsn, autocommit=True) as other:
        conn = await AsyncConnection.connect(dsn)
        conn.add_disconnect_handler(lambda error: print("the handler is told:", error))
        before = perf_counter()
        await other.execute("select pg_terminate_backend(%s)", (conn.info.backend_pid,))
        error = await conn.wait_disconnected()
        took = (perf_counter() - before) * 1000
        print(
            f"so is who waits, after {took:.1f} ms: {type(error).__name__}; closed: {conn.closed}"
        )


if __name__ == "__main__":
    with database() as dsn:
        for backend in ("asyncio", "trio"):
            print(f"{backend}:", flush=True)
            anyio.run(main, dsn, backend=backend)
    sys.stdout.flush()
