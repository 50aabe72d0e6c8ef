"""Connecting: by every way to name a server, with bad input, and cancelled half-way."""

from __future__ import annotations

import gc
import os
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anyio
import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from aiopgsafe import AsyncConnection
from aiopgsafe.testing import CancelSweep, Cut, Delay, FaultProxy, TemporaryServer
from tests.conftest import sweeps

pytestmark = pytest.mark.anyio


def descriptors() -> dict[str, str]:
    found = {}
    for entry in Path("/proc/self/fd").iterdir():
        try:
            found[entry.name] = str(entry.readlink())
        except FileNotFoundError:  # the one that lists them
            continue
    return found


@contextmanager
def nothing_left_behind() -> Iterator[None]:
    """No descriptor more than before; what warns when it is collected warns here."""
    before = descriptors()
    yield
    gc.collect()
    left = {k: v for k, v in descriptors().items() if before.get(k) != v and "socket" in v}
    assert not left


async def answer(*args: Any, **kwargs: Any) -> Any:
    async with await AsyncConnection.connect(*args, **kwargs) as conn:
        cur = await conn.execute("select 42")
        assert await cur.fetchone() == (42,)
        return conn.info.get_parameters(), conn.info.host, conn.info.hostaddr


@pytest.fixture
def refused() -> Iterator[int]:
    """A port that refuses: taken, so that nobody else gets it, and not listened on."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


@pytest.fixture
def silent() -> Iterator[int]:
    """A port that accepts and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


# Where the server is


async def test_connects_by_name_address_and_socket_directory(
    server: TemporaryServer, dsn: str
) -> None:
    with nothing_left_behind():
        _, host, _ = await answer(dsn, host="localhost")
        assert host == "localhost"
        await answer(dsn, host="127.0.0.1")
        await answer(server.socket_dsn)
        _, host, address = await answer(dsn, host="no.such.host.invalid", hostaddr="127.0.0.1")
        assert (host, address) == ("no.such.host.invalid", "127.0.0.1")


async def test_connects_to_an_ipv6_address(server: TemporaryServer) -> None:
    # A proxy of the tests listens on IPv4. That the right address is dialled is enough.
    try:
        listener = socket.create_server(("::1", 0), family=socket.AF_INET6)
    except OSError:
        pytest.skip("no IPv6 here")
    with listener, nothing_left_behind():
        async with anyio.create_task_group() as tasks:
            hang_up = lambda: listener.accept()[0].close()  # noqa: E731
            tasks.start_soon(anyio.to_thread.run_sync, hang_up)
            message = 'connection to server at "::1", port .* failed'
            with pytest.raises(psycopg.OperationalError, match=message):
                await AsyncConnection.connect(
                    server.dsn, host="::1", port=listener.getsockname()[1]
                )


async def test_several_hosts_are_tried_in_order(
    server: TemporaryServer, dsn: str, refused: int
) -> None:
    with nothing_left_behind():
        hosts = {"host": "127.0.0.1,localhost", "port": f"{refused},{server.port}"}
        parameters, host, _ = await answer(dsn, **hosts)
        assert host == "localhost"
        assert parameters["port"] == str(server.port)


async def test_a_host_that_hangs_costs_connect_timeout(
    server: TemporaryServer, dsn: str, silent: int, refused: int
) -> None:
    async def third_host_answers() -> None:
        await answer(
            dsn,
            host="127.0.0.1,127.0.0.1,localhost",
            port=f"{refused},{silent},{server.port}",
            connect_timeout=2,
        )

    async def all_fail() -> None:
        with pytest.raises(psycopg.errors.ConnectionTimeout) as failed:
            await AsyncConnection.connect(
                dsn, host="127.0.0.1,127.0.0.1", port=f"{refused},{silent}", connect_timeout=2
            )
        text = str(failed.value)
        assert "Multiple connection attempts failed" in text
        assert f"port: '{refused}'" in text
        assert "refused" in text
        assert "connection timeout expired" in text

    # At the same time: the two seconds are spent once.
    with nothing_left_behind(), anyio.fail_after(5):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(third_host_answers)
            tasks.start_soon(all_fail)


async def test_target_session_attrs_chooses_the_server(server: TemporaryServer, dsn: str) -> None:
    with nothing_left_behind():
        await answer(dsn, target_session_attrs="read-write")
        for wanted in ("standby", "read-only"):
            with pytest.raises(psycopg.OperationalError):
                await AsyncConnection.connect(dsn, target_session_attrs=wanted)


async def test_the_environment_says_where(
    server: TemporaryServer, dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {
        "PGHOST": "localhost",
        "PGPORT": str(server.port),
        "PGUSER": "postgres",
        "PGDATABASE": "postgres",
        "PGAPPNAME": "from the environment",
    }.items():
        monkeypatch.setenv(name, value)
    with nothing_left_behind():
        parameters, _, _ = await answer()
        assert parameters["application_name"] == "from the environment"
        await answer("", options="-c search_path=public")
        parameters, _, _ = await answer("application_name=x", application_name="y")
        assert parameters["application_name"] == "y"


# TLS


def openssl(directory: Path, *args: str) -> None:
    subprocess.run(["openssl", *args], cwd=directory, check=True, capture_output=True)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Self-signed, for localhost; a directory with cert.pem, key.pem and another.pem."""
    directory = tmp_path_factory.mktemp("tls")
    for name in ("cert", "another"):
        openssl(
            directory,
            *("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"),
            *("-keyout", f"{name}-key.pem", "-out", f"{name}.pem"),
            *("-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"),
        )
    return directory


@pytest.fixture
def tls_proxy(dsn: str, certificate: Path) -> Iterator[FaultProxy]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate / "cert.pem", certificate / "cert-key.pem")
    with FaultProxy(dsn, tls=context) as proxy:
        yield proxy


async def test_tls_carries_large_results_cancels_and_commits(tls_proxy: FaultProxy) -> None:
    async with await AsyncConnection.connect(tls_proxy.dsn, sslmode="require") as conn:
        assert conn.pgconn.ssl_in_use
        text = "x" * 3_000_000
        cur = await conn.execute("select %s || 'y'", (text,))
        row = await cur.fetchone()
        assert row is not None
        assert len(row[0]) == len(text) + 1
        with anyio.move_on_after(0.1) as scope:
            await conn.execute("select pg_sleep(20)")
        assert scope.cancelled_caught
        await conn.rollback()
        async with conn.transaction():
            await conn.execute("create table t (s text)")
            async with conn.cursor().copy("copy t from stdin") as copy:
                for _ in range(1000):
                    await copy.write_row(("z" * 3000,))
        cur = await conn.execute("select sum(length(s)) from t")
        assert await cur.fetchone() == (3_000_000,)
        async with conn.cursor().copy("copy t to stdout") as copy:
            assert sum([len(block) async for block in copy]) == 3_001_000


async def test_the_certificate_is_verified(tls_proxy: FaultProxy, certificate: Path) -> None:
    good, bad = str(certificate / "cert.pem"), str(certificate / "another.pem")
    with nothing_left_behind():
        await answer(tls_proxy.dsn, host="localhost", sslmode="verify-full", sslrootcert=good)
        with pytest.raises(psycopg.OperationalError, match="certificate"):
            await AsyncConnection.connect(
                tls_proxy.dsn, host="localhost", sslmode="verify-full", sslrootcert=bad
            )
        with pytest.raises(psycopg.OperationalError, match="certificate"):
            await AsyncConnection.connect(
                tls_proxy.dsn, host="127.0.0.1", sslmode="verify-full", sslrootcert=good
            )
        tls_proxy.close()  # its sockets are this process's too


# Bad input


async def refusal(cls: Any, *args: Any, **kwargs: Any) -> tuple[str, str]:
    try:
        await (await cls.connect(*args, **kwargs)).close()
    except Exception as exc:
        return type(exc).__name__, str(exc)
    return "", "connected"


async def test_what_psycopg_refuses_is_refused_alike(
    dsn: str, refused: int, loop_name: str
) -> None:
    bad: tuple[tuple[str, dict[str, Any]], ...] = (
        ("not a dsn", {}),
        ("postgresql://[::1", {}),
        (dsn, {"no_such_option": 1}),
        (dsn, {"port": refused}),
        (dsn, {"port": "0"}),
        (dsn, {"port": "many"}),
        (dsn, {"host": "no.such.host.invalid"}),
        (dsn, {"host": "no.such.host.invalid,127.0.0.1", "port": f"1,{refused}"}),
        (dsn, {"host": "127.0.0.1,127.0.0.1", "port": "1,2,3"}),
        (dsn, {"host": "/nowhere"}),
        (dsn, {"hostaddr": "not-an-address"}),
        (dsn, {"dbname": "no_such_database"}),
        (dsn, {"user": "no_such_user"}),
        (dsn, {"options": "-c no_such_setting=1"}),
        (dsn, {"connect_timeout": "soon"}),
        (dsn, {"sslmode": "require"}),
        (dsn, {"sslmode": "perhaps"}),
        (dsn, {"client_encoding": "klingon"}),
        (dsn, {"target_session_attrs": "any-old"}),
    )
    with nothing_left_behind():
        for conninfo, kwargs in bad:
            ours = await refusal(AsyncConnection, conninfo, **kwargs)
            theirs = await anyio.to_thread.run_sync(
                lambda c, k: anyio.run(lambda: refusal(psycopg.AsyncConnection, c, **k)),
                conninfo,
                kwargs,
            )
            assert ours == theirs, (conninfo, kwargs)


@pytest.mark.parametrize("name", ["commit_timeout", "cancel_timeout"])
async def test_bad_timeouts_are_refused_before_anything_is_tried(
    proxy: FaultProxy, name: str
) -> None:
    connect: Any = AsyncConnection.connect
    with nothing_left_behind():
        for value in (0, -1, -0.5, float("nan"), float("inf"), float("-inf")):
            with pytest.raises(ValueError, match=f"^{name} must be a positive, finite number"):
                await connect(proxy.dsn, **{name: value})
        for wrong in ("5", True, None, b"1", [1]):
            with pytest.raises(TypeError, match=f"^{name} is a number of seconds, not "):
                await connect(proxy.dsn, **{name: wrong})
    assert proxy.stats.connections == 0
    async with await connect(proxy.dsn, **{name: 1}) as conn:
        assert getattr(conn, name) == 1


async def test_a_server_that_hangs_up_while_connecting_is_an_operational_error(
    proxy: FaultProxy,
) -> None:
    with nothing_left_behind():
        for how in ("rst", "fin"):
            fault = proxy.inject(Cut(how), "R")
            with pytest.raises(psycopg.OperationalError, match="connection failed"):
                await AsyncConnection.connect(proxy.dsn)
            fault.remove()
        proxy.refuse = True
        with pytest.raises(psycopg.OperationalError, match="connection failed"):
            await AsyncConnection.connect(proxy.dsn)
        proxy.close()  # its sockets are this process's too


@pytest.fixture(scope="module")
def guarded(server: TemporaryServer) -> Iterator[TemporaryServer]:
    """A server of its own, which wants a password over TCP."""
    with TemporaryServer(bindir=server.bindir) as guarded:
        guarded.psql("create role me login superuser password 'secret'")
        hba = guarded.data_directory / "pg_hba.conf"
        hba.write_text("local all all trust\nhost all all all scram-sha-256\n")
        guarded.psql("select pg_reload_conf()")
        yield guarded


async def test_passwords_are_checked(guarded: TemporaryServer) -> None:
    dsn = make_conninfo(guarded.dsn, user="me")
    with nothing_left_behind():
        await answer(dsn, password="secret")
        with pytest.raises(psycopg.errors.OperationalError, match="password authentication failed"):
            await AsyncConnection.connect(dsn, password="wrong")
        with pytest.raises(psycopg.OperationalError, match="no password supplied"):
            await AsyncConnection.connect(dsn)


# Cancelled half-way


async def wait_for_no_session(dsn: str, name: str) -> None:
    """Until the server has noticed that the socket is closed: its word, asked again."""
    async with await AsyncConnection.connect(dsn, autocommit=True) as admin:
        with anyio.fail_after(10):
            while True:
                cur = await admin.execute(
                    "select pid, state, query from pg_stat_activity where application_name = %s",
                    (name,),
                )
                if not await cur.fetchall():
                    return


@pytest.mark.parametrize(("loop_name", "how"), sweeps())
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
async def test_a_connect_cancelled_anywhere_leaves_nothing(
    server: TemporaryServer, dsn: str, how: Any, host: str
) -> None:
    async def work() -> None:
        conn = await AsyncConnection.connect(dsn, host=host, application_name="cancelled")
        await conn.close()

    points = 0
    # The first connection by name starts the thread that resolves names.
    await work()
    with nothing_left_behind():
        async for trial in CancelSweep(work, how=how):
            # (A level cancellation that comes with the last answer finds nobody waiting.)
            assert not isinstance(trial.exception, Exception) or how == "timeout", trial
            points = trial.point - 1
    assert points >= 3
    await wait_for_no_session(dsn, "cancelled")


async def test_a_connect_cancelled_while_the_server_is_slow_ends_at_once(proxy: FaultProxy) -> None:
    proxy.inject(Delay(30), "Z")
    with nothing_left_behind(), anyio.fail_after(5):
        with anyio.move_on_after(0.1) as scope:
            await AsyncConnection.connect(proxy.dsn)
        assert scope.cancelled_caught
        proxy.close()  # its sockets are this process's too


# Another libpq

PROGRAM = """
import sys, anyio, psycopg, aiopgsafe

async def main(dsn):
    assert psycopg.pq.__impl__ == "python", psycopg.pq.__impl__
    async with await aiopgsafe.AsyncConnection.connect(dsn) as conn:
        await conn.execute("create table t (i int)")
        async with conn.transaction():
            await conn.execute("insert into t values (1)")
        with anyio.move_on_after(0.1) as scope:
            await conn.execute("select pg_sleep(20)")
        assert scope.cancelled_caught
        assert not conn.closed
        await conn.rollback()
        async with anyio.create_task_group() as tasks:
            async def cancel():
                # (A cancel request that overtakes its statement finds nothing to cancel.)
                running = "select from pg_stat_activity where pid = %s and query like '%%sleep(20)'"
                async with await aiopgsafe.AsyncConnection.connect(dsn, autocommit=True) as other:
                    while True:
                        cur = await other.execute(running, (conn.info.backend_pid,))
                        if cur.rowcount:
                            break
                await conn.cancel_safe()
            tasks.start_soon(cancel)
            try:
                await conn.execute("select pg_sleep(20)")
            except psycopg.errors.QueryCanceled:
                pass
            else:
                raise AssertionError("not cancelled")
        await conn.rollback()
        await conn.execute("create table u ()")
        await conn.commit()
        cur = await conn.execute("select to_regclass('u')::text")
        assert await cur.fetchone() == ("u",)
        with anyio.fail_after(10):
            async with conn.cursor().copy("copy (select generate_series(1, 5000)) to stdout") as c:
                n = 0
                async for block in c:
                    n += len(block)
        assert n == 23893, n
    print("done", psycopg.capabilities.has_cancel_safe())

name, use_uvloop, dsn = sys.argv[1:]
options = {"use_uvloop": use_uvloop == "True"} if name == "asyncio" else {}
anyio.run(main, dsn, backend=name, backend_options=options)
"""


async def test_it_works_with_the_systems_libpq_and_no_c(
    dsn: str, anyio_backend: tuple[str, dict[str, Any]]
) -> None:
    name, options = anyio_backend
    result = await anyio.run_process(
        [
            *(sys.executable, "-X", "dev", "-W", "error", "-c", PROGRAM),
            *(name, str(options.get("use_uvloop", False)), dsn),
        ],
        env={**os.environ, "PSYCOPG_IMPL": "python"},
        check=False,
    )
    if b"no pq wrapper available" in result.stderr:
        pytest.skip("no libpq on this system")
    assert result.returncode == 0, result.stderr.decode()
    assert result.stderr == b""
    assert result.stdout.startswith(b"done")
