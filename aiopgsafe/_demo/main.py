"""The demo from its options to its exit status."""

from __future__ import annotations

import json
import platform
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from rich.console import Console

from .. import __version__
from ..testing import FaultProxy, TemporaryServer
from .display import Report, progress_of
from .figures import Figures
from .interrupts import obey_sigterm
from .logs import CountWarnings
from .side import KILL_EVERY, Side
from .wires import COMMIT_DELAY

TOLD_THE_TRUTH, FAULTY, COULD_NOT_RUN, INTERRUPTED = 0, 1, 2, 130
"""Exit statuses. The last is a shell's for Ctrl-C."""

CONNECT_TIMEOUT = 10
"""Seconds for the server of the user's own to answer."""


class CouldNotRunError(Exception):
    """The demo can't be run as asked. The message is for the user."""


@dataclass(frozen=True)
class Options:
    """What the user asked for: see the command's help."""

    loop: str
    seconds: float
    seed: int | None
    clients: int
    dsn: str | None


@dataclass(frozen=True)
class Server:
    """The server, and the ways to it.

    :ivar dsn: directly.
    :ivar proxied_dsn: the same for a proxy in front of it, which reaches one address only.
    :ivar version: "18.1".
    """

    dsn: str
    proxied_dsn: str
    version: str


def main(options: Options, json_file: Path | None) -> int:
    """Run the demo and return the command's exit status.

    :param json_file: where all figures go as well; "-": to standard output, and nothing else.
    """
    silent = json_file == Path("-")
    console = Console(quiet=silent, width=None if sys.stdout.isatty() else 100, highlight=False)
    status = COULD_NOT_RUN
    obey_sigterm()
    try:
        _check(options, json_file)
        figures = _run(options, console)
        text = json.dumps(figures, indent=2)
        if silent:
            print(text)
        elif json_file is not None:
            json_file.write_text(text + "\n")
        status = TOLD_THE_TRUTH if figures["ok"] else FAULTY
    except* (CouldNotRunError, psycopg.Error, OSError) as group:
        print(f"aiopgsafe demo: {str(_first(group)).strip()}", file=sys.stderr)
    except* KeyboardInterrupt:
        print("aiopgsafe demo: interrupted, and cleaned up", file=sys.stderr)
        status = INTERRUPTED
    return status


def _check(options: Options, json_file: Path | None) -> None:
    """Find out early what would be a pity to find out late.

    :raises CouldNotRunError: the loop is not installed.
    :raises OSError: the file can't be written.
    """
    if options.loop in ("uvloop", "trio") and find_spec(options.loop) is None:
        raise CouldNotRunError(
            f"--loop {options.loop} needs {options.loop}: pip install 'aiopgsafe[{options.loop}]'"
        )
    if json_file not in (None, Path("-")):
        assert json_file is not None
        with json_file.open("a"):
            pass


def _run(options: Options, console: Console) -> dict[str, Any]:
    """Both sides, one after the other; all that is known of them."""
    seed = secrets.randbelow(1_000_000) if options.seed is None else options.seed
    # psycopg's pool is asyncio's alone.
    loops = {
        "psycopg": "asyncio" if options.loop == "trio" else options.loop,
        "aiopgsafe": options.loop,
    }
    sides: dict[str, Figures] = {}
    logs: dict[str, dict[str, int]] = {}
    with _server(options.dsn) as server:
        console.print(
            f"[bold]{options.clients} clients move money, {options.seconds:g} s on each side."
            " Every transfer is cancelled at a random moment.\n[/]"
            f"COMMIT's answers come {COMMIT_DELAY * 1000:g} ms late; a server process is killed"
            f" every {KILL_EVERY:g} s.\n"
            f"[dim]PostgreSQL {server.version}, Python {platform.python_version()},"
            f" psycopg {version('psycopg')}, psycopg_pool {version('psycopg-pool')},"
            f" {options.loop}, --seed {seed}[/]\n"
        )
        for name, loop in loops.items():
            side = Side(
                name=name,
                loop=loop,
                dsn=server.dsn,
                proxied_dsn=server.proxied_dsn,
                seconds=options.seconds,
                seed=seed,
                clients=options.clients,
            )
            with CountWarnings() as log, progress_of(console, name, options.seconds) as update:
                sides[name] = side.run(update)
            logs[name] = log.counts
    report = Report(
        sides["psycopg"],
        sides["aiopgsafe"],
        peer_label=loops["psycopg"],
        ours_label=loops["aiopgsafe"],
        plain=console.options.ascii_only,
    )
    console.print()
    console.print(report.render())
    if loops["psycopg"] != options.loop:
        console.print("[dim]psycopg and its pool don't run on trio: shown on asyncio.[/]")
    ours = sides["aiopgsafe"]
    return {
        "ok": not ours.faults() and ours.cancelled_in_commit > 0,
        "faults": ours.faults(),
        "loop": options.loop,
        "seed": seed,
        "seconds": options.seconds,
        "clients": options.clients,
        "commit_delay": COMMIT_DELAY,
        "versions": {
            "aiopgsafe": __version__,
            "psycopg": version("psycopg"),
            "psycopg_pool": version("psycopg-pool"),
            "postgresql": server.version,
            "python": platform.python_version(),
        },
        "sides": {
            name: {"loop": loops[name], **asdict(figures), "log": logs[name]}
            for name, figures in sides.items()
        },
    }


@contextmanager
def _server(dsn: str | None) -> Iterator[Server]:
    if dsn is not None:
        yield _look_at(dsn)
        return
    try:
        # The peer leaves sessions behind that end a little later than their clients.
        server = TemporaryServer(settings={"max_connections": 300})
    except RuntimeError as error:
        raise CouldNotRunError(error) from error
    with server:
        yield _look_at(server.dsn)


def _look_at(dsn: str) -> Server:
    """Connect, directly and through a proxy, so that later everything can be expected to work.

    :raises CouldNotRunError: one of them is impossible.
    """
    try:
        if "connect_timeout" not in conninfo_to_dict(dsn):
            dsn = make_conninfo(dsn, connect_timeout=CONNECT_TIMEOUT)
        with psycopg.connect(dsn) as conn:
            info = conn.info
            # What the environment, a service or a password file contributed, and which of
            # several hosts it is: the proxy's address would find none of it.
            proxied_dsn = make_conninfo(
                dsn,
                host=info.host,
                hostaddr=info.hostaddr or None,
                port=info.port,
                user=info.user,
                dbname=info.dbname,
                password=info.password or None,
            )
            number = info.server_version
    except psycopg.Error as error:
        raise CouldNotRunError(f"can't connect to the server: {error}") from error
    try:
        with FaultProxy(proxied_dsn) as proxy, psycopg.connect(proxy.dsn):
            pass
    except psycopg.Error as error:
        raise CouldNotRunError(
            "can't connect to the server through the demo's proxy, which watches the COMMITs and"
            f" therefore speaks clear text, without TLS: {error}"
        ) from error
    return Server(dsn, proxied_dsn, f"{number // 10000}.{number % 10000}")


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    leaf: BaseException = group
    while isinstance(leaf, BaseExceptionGroup):
        leaf = leaf.exceptions[0]
    return leaf
