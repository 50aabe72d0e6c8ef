"""A PgBouncer of the tests' own, in transaction mode."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path
from time import monotonic, sleep
from typing import ClassVar, Self

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo


class PgBouncer:
    """Entered, it serves at `dsn` what is at `dsn` given.

    :param settings: of its section [pgbouncer].
    """

    program: ClassVar[str | None] = shutil.which("pgbouncer") or shutil.which(
        "pgbouncer", path="/usr/sbin:/usr/local/sbin"
    )

    def __init__(self, dsn: str, **settings: object) -> None:
        self._server = conninfo_to_dict(dsn)
        self._settings = settings
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        self.dsn = make_conninfo(dsn, host="127.0.0.1", port=self._port)

    def __enter__(self) -> Self:
        assert self.program is not None
        self._directory = Path(tempfile.mkdtemp(prefix="pgbouncer-"))
        server = " ".join(f"{k}={self._server[k]}" for k in ("host", "port", "user", "dbname"))
        settings = {
            "listen_addr": "127.0.0.1",
            "listen_port": self._port,
            "unix_socket_dir": "",
            "auth_type": "any",
            "pool_mode": "transaction",
            "default_pool_size": 5,
            "logfile": self._directory / "log",
            **self._settings,
        }
        config = self._directory / "pgbouncer.ini"
        lines = [f"{name} = {value}" for name, value in settings.items()]
        config.write_text("\n".join(["[databases]", f"* = {server}", "[pgbouncer]", *lines, ""]))
        # It refuses to be root.
        user = []
        if os.geteuid() == 0:
            user = ["-u", "nobody"]
            shutil.chown(self._directory, "nobody")
        self._process = subprocess.Popen(
            [self.program, "-q", *user, str(config)], stderr=subprocess.DEVNULL
        )
        deadline = monotonic() + 10
        while True:
            try:
                psycopg.connect(self.dsn).close()
                return self
            except psycopg.OperationalError:
                if monotonic() > deadline or self._process.poll() is not None:
                    self.__exit__()
                    raise
                sleep(0.01)

    def __exit__(self, *exc_info: object) -> None:
        self._process.kill()
        self._process.wait()
        shutil.rmtree(self._directory)
