"""Shows a Celery worker that is stopped while COMMIT is in flight: with Django's backend, and ours.

python examples/django_celery/show.py [--rounds 3]
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg

from aiopgsafe.testing import Delay, FaultProxy, TemporaryServer, command_complete

HERE = Path(__file__).parent
ENGINES = {
    "Django's backend": "django.db.backends.postgresql",
    "aiopgsafe.django": "aiopgsafe.django",
}
TABLES = """
    drop table if exists shop_order, shop_followed;
    create table shop_order (id bigint generated always as identity primary key, name text unique);
    create table shop_followed (like shop_order including all);
"""
LATE = 0.6
"""Seconds that the server's answer to COMMIT takes."""


@contextmanager
def worker(environment: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """A Celery worker, a process group of its own."""
    command = [sys.executable, "-m", "celery", "-A", "worker", "worker", "--pool", "prefork"]
    command += ["--concurrency", "1", "--loglevel", "CRITICAL", "--without-gossip"]
    command += ["--without-mingle", "--without-heartbeat"]
    process = subprocess.Popen(
        command,
        cwd=HERE,
        env=environment,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def by_soft_limit(process: subprocess.Popen[bytes]) -> None:
    """As billiard does it when the limit is over: SoftTimeLimitExceeded out of a handler."""
    os.killpg(process.pid, signal.SIGUSR1)


def by_sigquit(process: subprocess.Popen[bytes]) -> None:
    """Ctrl-\\ at the terminal, or a supervisor: SystemExit out of the handler of the child."""
    os.killpg(process.pid, signal.SIGQUIT)


def by_sigterm_twice(process: subprocess.Popen[bytes]) -> None:
    """A warm shutdown that somebody won't wait for."""
    for _ in range(2):
        os.killpg(process.pid, signal.SIGTERM)
        time.sleep(0.1)


WAYS = {"soft time limit": by_soft_limit, "SIGQUIT": by_sigquit, "SIGTERM twice": by_sigterm_twice}


def stop_in_commit(
    admin: psycopg.Connection[tuple[int]],
    proxy: FaultProxy,
    environment: dict[str, str],
    stop: Callable[[subprocess.Popen[bytes]], None],
    rounds: int,
) -> int:
    """How many orders were committed whose callback never ran."""
    from worker import app

    answer = proxy.inject(Delay(LATE), command_complete("COMMIT"))
    for number in range(rounds):
        # Another worker each time: stock Django's connection is of no use afterwards.
        with worker(environment) as process:
            before = answer.hits
            app.send_task("order", [f"order {number}"], soft_time_limit=60)
            while answer.hits == before:
                assert process.poll() is None, "the worker has ended by itself"
                time.sleep(0.001)
            stop(process)
            wait_until_over(admin, process, number + 1, stop is by_soft_limit)
    answer.remove()
    missing = "select count(*) from shop_order where name not in (select name from shop_followed)"
    row = admin.execute(missing).fetchone()
    assert row is not None
    return row[0]


def wait_until_over(
    admin: psycopg.Connection[tuple[int]],
    process: subprocess.Popen[bytes],
    sent: int,
    worker_lives: bool,
) -> None:
    """Until the worker has ended, or the order is there and its session does nothing more."""
    if not worker_lives:
        try:
            process.wait(timeout=15)
        except subprocess.TimeoutExpired:  # a deadlock: in the lock that was torn
            os.killpg(process.pid, signal.SIGKILL)
    orders = "select count(*) from shop_order"
    busy = "select count(*) from pg_stat_activity where state <> 'idle' and pid <> pg_backend_pid()"
    while admin.execute(orders).fetchone() != (sent,) or admin.execute(busy).fetchone() != (0,):
        time.sleep(0.01)
    if worker_lives:
        time.sleep(2 * LATE)  # the answer, and the callback, if there is one


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="of each way to stop it")
    parser.add_argument("--engine", choices=[*ENGINES.values()], help="this one only")
    options = parser.parse_args()
    print(f"{'':18}" + "".join(f"{way:>18}" for way in WAYS))
    with TemporaryServer() as server, FaultProxy(server.dsn) as proxy:
        for name, engine in ENGINES.items():
            if options.engine not in (None, engine):
                continue
            lost = []
            for stop in WAYS.values():
                with (
                    psycopg.connect(server.dsn, autocommit=True) as admin,
                    tempfile.TemporaryDirectory() as broker,
                ):
                    admin.execute(TABLES.encode())
                    environment = {
                        **os.environ,
                        "SHOP_DSN": proxy.dsn,
                        "SHOP_ENGINE": engine,
                        "SHOP_BROKER": broker,
                    }
                    lost.append(send_and_stop(environment, admin, proxy, stop, options.rounds))
            print(f"{name:18}" + "".join(f"{n:>8} of {options.rounds} lost" for n in lost))


def send_and_stop(
    environment: dict[str, str],
    admin: psycopg.Connection[tuple[int]],
    proxy: FaultProxy,
    stop: Callable[[subprocess.Popen[bytes]], None],
    rounds: int,
) -> int:
    os.environ.update(environment)
    sys.path.insert(0, str(HERE))
    sys.modules.pop("worker", None)  # its broker is another one
    return stop_in_commit(admin, proxy, environment, stop, rounds)


if __name__ == "__main__":
    main()
