"""aiopgsafe: PostgreSQL for asyncio and trio, with COMMITs that nothing can tear."""

from psycopg import IsolationLevel, Notify, Rollback

from ._connection import AsyncConnection, Connection, resolve_commit
from ._database import Database
from ._errors import (
    CommitRolledBack,
    CommitUnknown,
    ConnectionReleased,
    Draining,
    safe_to_retry,
)
from ._listener import Gap, Subscription
from ._outcome import TransactionState
from ._pool import AsyncConnectionPool
from ._retry import Retry
from ._sync_transaction import SyncTransaction
from ._transaction import Transaction

__all__ = [
    "AsyncConnection",
    "AsyncConnectionPool",
    "CommitRolledBack",
    "CommitUnknown",
    "Connection",
    "ConnectionReleased",
    "Database",
    "Draining",
    "Gap",
    "IsolationLevel",
    "Notify",
    "Retry",
    "Rollback",
    "Subscription",
    "SyncTransaction",
    "Transaction",
    "TransactionState",
    "resolve_commit",
    "safe_to_retry",
]

__version__ = "0.1.0"
