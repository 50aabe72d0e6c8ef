"""A standby of a temporary server, which can be promoted."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from aiopgsafe.testing import TemporaryServer
from aiopgsafe.testing._system import wait_for

PRIMARY: dict[str, str | int | bool] = {
    "wal_level": "replica",
    "max_wal_senders": 10,
    "wal_keep_size": "64MB",
    "hot_standby": True,
    # Numbers are handed out again only where WAL gets lost: it is flushed late here.
    "wal_writer_delay": "10s",
    "autovacuum": False,
}
"""Settings of a server that can have a standby."""


class Standby(TemporaryServer):
    """Made from a running server with the settings `PRIMARY`, by pg_basebackup."""

    def __init__(self, primary: TemporaryServer) -> None:
        super().__init__(bindir=primary.bindir, settings=PRIMARY)
        self._primary = primary
        self._stopped = 0

    def _initialize(self, directory: Path) -> None:
        primary = f"{self._primary.dsn} application_name=standby"
        code, output = self._account.run(
            *(self._programs / "pg_basebackup", "-D", self.data_directory, "-d", primary),
            *("--checkpoint=fast", "--no-sync", "--write-recovery-conf"),
            directory=directory,
        )
        if code:
            raise RuntimeError(f"pg_basebackup failed:\n{output}")

    def wait_streaming(self) -> None:
        """Until it receives from its primary."""
        query = "select count(*) from pg_stat_replication where state = 'streaming'"
        wait_for(lambda: self._primary.psql(query) == "1", "the standby to stream")

    def promote(self) -> None:
        """Make it the primary; returns when it takes writes."""
        if self._stopped:
            # What is in its socket already must not arrive after all.
            os.kill(self._stopped, signal.SIGTERM)
            os.kill(self._stopped, signal.SIGCONT)
        self.psql("select pg_promote(true, 60)")

    def stop_receiving(self) -> None:
        """Let its walreceiver stand still: what the primary sends from now on isn't there."""
        self._stopped = int(self.psql("select pid from pg_stat_wal_receiver"))
        os.kill(self._stopped, signal.SIGSTOP)

    def receive(self) -> None:
        """Go on after `stop_receiving()`."""
        os.kill(self._stopped, signal.SIGCONT)
        self._stopped = 0


def wait_for_standby(server: TemporaryServer, *, wanted: bool) -> None:
    """Let each COMMIT on `server` wait for the standby, or not."""
    server.configure(synchronous_standby_names="standby" if wanted else "")
