"""Ctrl-C at random moments of transactions on trio: what becomes of the pool's only connection."""

import os
import random
import signal
import sys
import threading
from collections import Counter

import trio

from aiopgsafe import Database

became: Counter[str] = Counter()


async def main(dsn: str, delay: float) -> None:
    async with Database(dsn, min_size=1, max_size=1, timeout=1) as db:
        await db.execute("create table if not exists t (id int)")
        timer = threading.Timer(delay, os.kill, (os.getpid(), signal.SIGINT))
        try:
            timer.start()
            while True:
                async with db.transaction() as tx:
                    await tx.execute("insert into t values (%s)", (1,))
        except KeyboardInterrupt:
            pass
        try:
            with trio.fail_after(1):
                for _ in range(3):
                    async with db.transaction() as tx:
                        await tx.execute("insert into t values (%s)", (1,))
            became["usable"] += 1
        except Exception as exc:
            became[repr(exc)] += 1


signal.signal(signal.SIGINT, signal.default_int_handler)
for _ in range(30):
    try:
        trio.run(main, sys.argv[1], random.random() * 0.01)
    except BaseException as exc:
        became[repr(exc)] += 1
print(became)
