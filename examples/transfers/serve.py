"""`make serve`: the service on a PostgreSQL of its own, with some clients that move money.

A third of them hang up before they are answered, as clients do.
"""

from __future__ import annotations

import argparse
import os
import random
import threading
import time
import urllib.request
from contextlib import suppress

import anyio
import uvicorn

from aiopgsafe import Database
from aiopgsafe.testing import TemporaryServer


def client(base: str, number: int) -> None:
    """Moves money now and then, and sometimes doesn't wait for the answer."""
    chance = random.Random(number)
    for turn in range(1_000_000):
        time.sleep(chance.expovariate(4))
        source, target = chance.sample(range(1, 9), 2)
        body = (
            f'{{"key": "{number}-{turn}", "source": {source}, "target": {target},'
            f' "amount": {chance.randint(1, 40)}}}'
        )
        request = urllib.request.Request(
            f"{base}/transfers", body.encode(), {"Content-Type": "application/json"}
        )
        timeout = chance.choice((5.0, 5.0, chance.random() * 0.02 + 0.001))
        with suppress(OSError):  # refused, or not waited for
            urllib.request.urlopen(request, timeout=timeout).read()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m transfers.serve", description=__doc__)
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--clients", type=int, default=4)
    options = parser.parse_args()
    with TemporaryServer() as server:
        os.environ["TRANSFERS_DSN"] = server.dsn
        from transfers.service import app, create_schema

        async def prepare() -> None:
            async with Database(server.dsn) as db:
                await create_schema(db)

        anyio.run(prepare)
        base = f"http://127.0.0.1:{options.port}"
        for number in range(options.clients):
            threading.Thread(target=client, args=(base, number), daemon=True).start()
        uvicorn.run(app, port=options.port, log_level="warning", timeout_graceful_shutdown=3)


if __name__ == "__main__":
    main()
