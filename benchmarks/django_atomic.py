"""`python -m benchmarks.django_atomic`: an ``atomic`` block on Django's backend, and on ours.

One INSERT and one `on_commit` callback; the two take turns in one process, on one server, with
synchronous_commit on and off. Another one: the same on a bare connection, psycopg's and ours.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
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


def bare(conn: psycopg.Connection[Any]) -> Callable[[], None]:
    def work() -> None:
        with conn.transaction():
            conn.execute("insert into t values (%s)", (1,))

    return work


def measure(works: dict[str, Callable[[], None]], turns: int) -> dict[str, float]:
    """Medians in µs per operation. They take turns at going first, which costs where disks sync."""
    took: dict[str, list[float]] = {name: [] for name in works}
    order = [*works.items()]
    for _ in range(turns):
        order.reverse()
        for name, work in order:
            began = perf_counter()
            for _ in range(OPERATIONS):
                work()
            took[name].append((perf_counter() - began) / OPERATIONS)
    return {name: 1e6 * statistics.median(times[turns // 10 :]) for name, times in took.items()}


def report(title: str, medians: dict[str, float]) -> None:
    (ours, first), (other, second) = medians.items()
    print(f"{title:36} {ours} {first:7.1f}  {other} {second:7.1f}  {first / second:.3f} of it")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.django_atomic", description=__doc__)
    parser.add_argument("--turns", type=int, default=100, help=f"of {OPERATIONS} operations each")
    turns = parser.parse_args().turns
    for commit in ("on", "off"):
        with TemporaryServer(settings={"synchronous_commit": commit, "fsync": True}) as server:
            with psycopg.connect(server.dsn, autocommit=True) as admin:
                admin.execute("create table t (i int)")
            blocks = {name: atomic_on(server.dsn, engine) for engine, name in ENGINES.items()}
            report(f"atomic, synchronous_commit {commit}", measure(blocks, turns))
            for alias in blocks:
                connections[alias].close()
            with Connection.connect(server.dsn) as ours, psycopg.connect(server.dsn) as theirs:
                works = {"ours": bare(ours), "psycopg's": bare(theirs)}
                report(f"transaction(), synchronous_commit {commit}", measure(works, turns))


if __name__ == "__main__":
    main()
