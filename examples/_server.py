"""Where the examples find PostgreSQL: at a DSN, the first argument, or in a server of their own."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from aiopgsafe.testing import TemporaryServer


@contextmanager
def database() -> Iterator[str]:
    """The connection string."""
    if len(sys.argv) > 1:
        yield sys.argv[1]
    else:
        with TemporaryServer() as server:
            yield server.dsn
