"""`python -m benchmarks.django_atomic`: an ``atomic`` block on Django's backend, and on ours.

One INSERT and one `on_commit` callback; the two take turns in one process, on one server, with
synchronous_commit on and off. Another one: the same on a bare connection, psycopg's and ours.

Each has new connections after every ten turns: where the system has placed a server process
decides about up to 100 µs of each transaction of it, whoever asks for it.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Generator
from itertools import islice
from time import perf_counter
from typing import Any

import django
import psycopg
from django.conf import settings

from aiopgsafe import Connection
from aiopgsafe.testing import TemporaryServer

if not settings.configured:
    settings.configure(USE_TZ=True, DATABASES={})
    django.setup()

from django.db import connections, transaction
from django.db.utils import ConnectionHandler, load_backend

ENGINES = {"aiopgsafe.django": "ours", "django.db.backends.postgresql": "Django's"}
OPERATIONS = 20
TURNS = 10
"""On the same connections."""

Connected = Generator[dict[str, Callable[[], None]], None, None]


def atomic_on(dsn: str, engine: str) -> Callable[[], None]:
    params = psycopg.conninfo.conninfo_to_dict(dsn)
    names = {"NAME": "dbname", "USER": "user", "HOST": "host", "PORT": "port"}
    database: dict[str, Any] = {name: params[key] for name, key in names.items()}
    database["ENGINE"] = engine
    config = ConnectionHandler().configure_settings({"default": database})["default"]
    alias = ENGINES[engine]
    connections.settings[alias] = config
    connections[alias] = load_backend(engine).DatabaseWrapper(config, alias)

    def work() -> None:
        with transaction.atomic(using=alias):
            with connections[alias].cursor() as cur:
                cur.execute("insert into t values (%s)", [1])
            transaction.on_commit(bool, using=alias)

    return work


def blocks(dsn: str) -> Connected:
    """Django's blocks, on new connections each time."""
    works = {name: atomic_on(dsn, engine) for engine, name in ENGINES.items()}
    while True:
        try:
            yield works
        finally:
            for alias in works:
                connections[alias].close()


def bare(conn: psycopg.Connection[Any]) -> Callable[[], None]:
    def work() -> None:
        with conn.transaction():
            conn.execute("insert into t values (%s)", (1,))

    return work


def transactions(dsn: str) -> Connected:
    """psycopg's blocks, on new connections each time."""
    while True:
        with Connection.connect(dsn) as ours, psycopg.connect(dsn) as theirs:
            yield {"ours": bare(ours), "psycopg's": bare(theirs)}


def measure(connected: Connected, turns: int) -> dict[str, float]:
    """Medians in µs per operation. They take turns at going first, which costs where disks sync."""
    took: dict[str, list[float]] = {}
    for works in islice(connected, turns // TURNS):
        order = [*works.items()]
        for turn in range(1 + TURNS):
            for name, work in order[:: 1 if turn % 2 else -1]:
                began = perf_counter()
                for _ in range(OPERATIONS):
                    work()
                if turn:  # the first one connects
                    took.setdefault(name, []).append((perf_counter() - began) / OPERATIONS)
    return {name: 1e6 * statistics.median(took[name]) for name in works}


def report(title: str, medians: dict[str, float]) -> None:
    (ours, first), (other, second) = medians.items()
    print(f"{title:36} {ours} {first:7.1f}  {other} {second:7.1f}  {first / second:.3f} of it")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.django_atomic", description=__doc__)
    parser.add_argument("--turns", type=int, default=200, help=f"of {OPERATIONS} operations each")
    turns = parser.parse_args().turns
    for commit in ("on", "off"):
        with TemporaryServer(settings={"synchronous_commit": commit, "fsync": True}) as server:
            with psycopg.connect(server.dsn, autocommit=True) as admin:
                admin.execute("create table t (i int)")
            for title, connected in (
                ("atomic", blocks(server.dsn)),
                ("transaction()", transactions(server.dsn)),
            ):
                report(f"{title}, synchronous_commit {commit}", measure(connected, turns))
                connected.close()


if __name__ == "__main__":
    main()
