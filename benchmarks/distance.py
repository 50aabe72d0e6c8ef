"""A server a millisecond away: a proxy in a process of its own that holds each message."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from aiopgsafe.testing import Delay, FaultProxy, Message

ONE_WAY = 0.0005
"""Seconds that a message is on its way, in each direction."""


@contextmanager
def distant(dsn: str) -> Iterator[str]:
    """The connection string of the same server, farther away."""
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.distance", dsn],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
    finally:
        process.communicate()  # the end of its input ends it


def every(message: Message) -> bool:
    return True


def main() -> None:
    with FaultProxy(sys.argv[1]) as proxy:
        proxy.inject(Delay(ONE_WAY), every)
        print(proxy.dsn, flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
