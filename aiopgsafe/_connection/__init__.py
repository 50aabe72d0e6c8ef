"""`AsyncConnection`: psycopg's, on any event loop, with endings that nothing can tear.

This folder alone knows psycopg's private parts. psycopg's asynchronous code
touches the event loop in five places: `lock`, `wait`, `connect`, `cancel_safe`
and name resolution. All are overridden here; its generators, cursors and
adapters are used as they are. `tests/test_house.py` pins the private names and
signatures that this folder relies on.
"""

from ._async import AsyncConnection
from ._resolving import resolve_commit
from ._sync import Connection

__all__ = ["AsyncConnection", "Connection", "resolve_commit"]
