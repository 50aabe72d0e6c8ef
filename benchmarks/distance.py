"""A server a millisecond away: a relay in a process of its own holds what passes for half of it."""

from __future__ import annotations

import select
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any

from psycopg.conninfo import conninfo_to_dict, make_conninfo

ONE_WAY = 0.0005
"""Seconds that bytes are on their way, in each direction."""


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


def relay(listener: socket.socket, address: tuple[str, int]) -> None:
    """Until the standard input ends. `select()`: its timeouts are finer than epoll's."""
    other: dict[socket.socket, socket.socket] = {}
    ended: set[socket.socket] = set()
    waiting: deque[tuple[float, socket.socket, bytes]] = deque()
    while True:
        now = perf_counter()
        while waiting and waiting[0][0] <= now:
            _, to, data = waiting.popleft()
            if to not in other:
                continue
            if data:
                to.sendall(data)
            else:
                for end in (other.pop(to), to):
                    other.pop(end, None)
                    ended.discard(end)
                    end.close()
        timeout = max(0.0, waiting[0][0] - perf_counter()) if waiting else None
        ready: list[Any] = select.select(
            [sys.stdin, listener, *(other.keys() - ended)], [], [], timeout
        )[0]
        due = perf_counter() + ONE_WAY
        if sys.stdin in ready:
            return
        for source in ready:
            if source is listener:
                client, _ = listener.accept()
                server = socket.create_connection(address)
                other[client], other[server] = server, client
                for end in (client, server):
                    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            else:
                try:
                    data = source.recv(1 << 16)
                except OSError:
                    data = b""
                if not data:
                    ended.add(source)
                waiting.append((due, other[source], data))


def main() -> None:
    parts = conninfo_to_dict(sys.argv[1])
    with socket.create_server(("127.0.0.1", 0)) as listener:
        parts.update(host="127.0.0.1", port=listener.getsockname()[1])
        print(make_conninfo("", **parts), flush=True)
        relay(listener, ("127.0.0.1", int(conninfo_to_dict(sys.argv[1])["port"] or 5432)))


if __name__ == "__main__":
    main()
