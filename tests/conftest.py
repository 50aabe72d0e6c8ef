"""Servers, event loops and connections for the tests. Each backend is a parameter."""

from __future__ import annotations

import gc
import os
import ssl
import subprocess
from collections.abc import AsyncIterator, Iterator
from math import inf, nan
from pathlib import Path
from typing import Any

import psycopg
import pytest

from aiopgsafe import AsyncConnection
from aiopgsafe._backends import _asyncio, _trio
from aiopgsafe.testing import FaultProxy, TemporaryServer, find_servers
from tests.pgbouncer import PgBouncer

LOOPS = {
    "asyncio": ("asyncio", {"use_uvloop": False}),
    "uvloop": ("asyncio", {"use_uvloop": True}),
    "trio": ("trio", {}),
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="the long runs: minutes, not seconds")
    parser.addoption("--one-server", choices=("newest", "oldest"), help="on this PostgreSQL only")


def pytest_collection_finish(session: pytest.Session) -> None:
    """Spare the collector what is there before the first test: most of it, and never garbage.

    Tests that look for what is left behind collect garbage, each by itself.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture
def long(request: pytest.FixtureRequest) -> bool:
    """Whether the figures of a long run are asked for (`make test ARGS=--long`)."""
    return bool(request.config.getoption("--long"))


def one_for_each_version(bindirs: list[Path]) -> list[Path]:
    """find_servers() lists the embedded server first: PostgreSQL 18, then what the system has."""
    found: dict[int, Path] = {}
    for bindir in bindirs:
        found.setdefault(TemporaryServer(bindir=bindir).version, bindir)
    return list(found.values())


BINDIRS = one_for_each_version(find_servers())


HOWS = {
    "asyncio": ("edge", "edge-late", "edge-repeated", "timeout", "level"),
    "uvloop": ("edge", "edge-late", "edge-repeated", "timeout", "level"),
    "trio": ("level",),
}
"""The ways in which each loop cancels, for `CancelSweep`."""


def sweeps(*hows: str) -> list[Any]:
    """Parameters ("loop_name", "how"): each loop with each way that it has, or those of `hows`."""
    return [
        pytest.param(loop, how)
        for loop, ways in HOWS.items()
        for how in ways
        if not hows or how in hows
    ]


@pytest.fixture(params=[inf, -1.0], ids=["no turns", "turns"])
def turns(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether a channel lets the others run before it hands over a result: never, or each time.

    By the clock, as it does outside of sweeps, suspension points would shift from trial to
    trial: some would be swept by chance only.
    """
    for backend in (_asyncio, _trio):
        monkeypatch.setattr(backend, "MAX_BUSY", request.param)
    return bool(request.param < 0)


@pytest.fixture(params=list(LOOPS))
def loop_name(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def anyio_backend(loop_name: str) -> tuple[str, dict[str, Any]]:
    return LOOPS[loop_name]


@pytest.fixture(
    scope="session",
    params=BINDIRS,
    ids=[f"pg{TemporaryServer(bindir=bindir).version}" for bindir in BINDIRS],
)
def bindir(request: pytest.FixtureRequest) -> Path:
    """The programs of each PostgreSQL; of one with ``--one-server``."""
    path: Path = request.param
    return path


@pytest.fixture(scope="session")
def server(bindir: Path) -> Iterator[TemporaryServer]:
    settings = {"max_prepared_transactions": 10, "max_connections": 200}
    with TemporaryServer(bindir=bindir, settings=settings) as server:
        yield server


@pytest.fixture
def dsn(server: TemporaryServer) -> str:
    """The server's, with an empty schema public, and nothing running that a test has left."""
    with psycopg.connect(server.dsn, autocommit=True) as admin:
        admin.execute(
            "select pg_terminate_backend(pid, 5000) from pg_stat_activity where state = 'active'"
            " and backend_type = 'client backend' and pid <> pg_backend_pid()"
        )
        admin.execute("drop schema if exists public, aiopgsafe cascade")
        admin.execute("create schema public")
    return server.dsn


@pytest.fixture
def proxy(dsn: str) -> Iterator[FaultProxy]:
    with FaultProxy(dsn) as proxy:
        yield proxy


@pytest.fixture(scope="session")
def tls(tmp_path_factory: pytest.TempPathFactory) -> ssl.SSLContext:
    """For a `FaultProxy` that speaks TLS: embedded servers are built without."""
    directory = tmp_path_factory.mktemp("tls")
    key, certificate = directory / "key.pem", directory / "certificate.pem"
    subprocess.run(
        [
            "openssl",
            "req",
            "-x509",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:P-256",
            "-nodes",
            "-subj",
            "/CN=localhost",
            "-keyout",
            key,
            "-out",
            certificate,
        ],
        check=True,
        capture_output=True,
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    return context


@pytest.fixture
async def conn(dsn: str, anyio_backend: object) -> AsyncIterator[AsyncConnection[Any]]:
    conn = await AsyncConnection.connect(dsn)
    yield conn
    await conn.close()


@pytest.fixture
def admin(dsn: str) -> Iterator[psycopg.Connection[Any]]:
    """A session of the tests' own, in autocommit mode."""
    with psycopg.connect(dsn, autocommit=True) as admin:
        yield admin


@pytest.fixture
def pgbouncer(dsn: str) -> Iterator[str]:
    """The connection string of a PgBouncer in transaction mode before the server."""
    if PgBouncer.program is None:
        pytest.skip("PgBouncer is not installed (Debian: apt-get install pgbouncer)")
    with PgBouncer(dsn) as bouncer:
        yield bouncer.dsn


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if which := config.getoption("--one-server"):
        others = set(BINDIRS[1:] if which == "newest" else BINDIRS[:-1])
        callspecs = [getattr(item, "callspec", None) for item in items]
        wanted = [spec is None or spec.params.get("bindir") not in others for spec in callspecs]
        config.hook.pytest_deselected(
            items=[item for item, keep in zip(items, wanted, strict=True) if not keep]
        )
        items[:] = [item for item, keep in zip(items, wanted, strict=True) if keep]


def resident() -> float:
    """MB of memory that this process has; where there is no /proc it isn't known."""
    statm = Path("/proc/self/statm")
    pages = int(statm.read_text().split()[1]) if statm.exists() else nan
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


class Figures:
    """What a test measured, printed at the end of the run."""

    def __init__(self, node: pytest.Item) -> None:
        self._node = node

    def __call__(self, **figures: object) -> None:
        row = ", ".join(f"{name} {value}" for name, value in figures.items())
        # Reports carry it here from whichever process the test ran in.
        self._node.user_properties.append(("figures", row))


@pytest.fixture
def figures(request: pytest.FixtureRequest) -> Figures:
    return Figures(request.node)


_measured: list[str] = []


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call":
        test = report.nodeid.partition("::")[2]
        rows = [row for name, row in report.user_properties if name == "figures"]
        _measured.extend(f"{test}: {row}" for row in rows)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _measured:
        terminalreporter.section("figures")
        for line in _measured:
            terminalreporter.line(line)
