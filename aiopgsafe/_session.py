"""What transactions need of their connection."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from ._backends import Backend, Channel
from ._backends._lock import Lock
from ._outcome import TransactionState
from ._unit import Unit

if TYPE_CHECKING:
    from psycopg.abc import PQGen
    from psycopg.pq.abc import PGresult

    from ._resolver import Ticket, Token

__all__ = ["Session"]


class Session(Protocol):
    """What a transaction needs of its connection (`_connection.AsyncConnection`)."""

    lock: Lock
    commit_timeout: float
    cancel_timeout: float
    commit_token: bool
    _origin: Any  # `_connection._riding.Riding`
    _backend: Backend
    _channel: Channel
    _blocks: list[Any]
    _unit: Unit | None
    _signalled: Any  # `_connection._signalled.SignalledCancel`, or None
    _section: Any  # in which a transaction of it ends
    _uncancellable: object  # the generator that no signal may cancel

    @property
    def closed(self) -> bool: ...

    @property
    def _in_transaction(self) -> bool:
        """Whether the session is in a transaction, failed or not."""

    @property
    def _failed(self) -> bool:
        """Whether the session is in a failed transaction."""

    @property
    def _ended_elsewhere(self) -> bool:
        """Whether the transaction has been ended, and not by us: nobody saw how."""

    def _check_connection_ok(self) -> None: ...

    def _sync_gen(self) -> PQGen[None]:
        """Have the results of all that a pipeline has sent, so that the status is true."""

    def _commands_gen(self, commands: Sequence[bytes]) -> PQGen[PGresult]:
        """Send `commands` together, in or out of a pipeline; the last one's result."""

    def _time_left(self) -> float:
        """Seconds until the deadline that the server is to know of; infinity if none."""

    _begin_waits: bytes | None  # BEGIN, SAVEPOINT and RELEASE ride: `_connection._riding`
    _queue: list[bytes]

    def _flush_gen(self, time_left: float | None = None) -> PQGen[None]:
        """Send what waits."""

    _tpc: Any
    _by_hand: bool
    _unbegun: bool
    _undoing: bool

    def _undo_later(self, commands: Sequence[bytes]) -> bool:
        """Let a savepoint's ROLLBACK TO wait, if it can."""

    def _forget_queue(self) -> None:
        """Nothing waits any more."""

    def _clear_queue(self) -> None:
        """Nothing but BEGIN, if it does."""

    def _waits(self, savepoint: bytes) -> bool:
        """Whether this very SAVEPOINT waits."""

    def _drop_from(self, savepoint: bytes) -> None:
        """Drop a SAVEPOINT that waits, and what waits behind it."""

    def _ticket(self, unit: Unit) -> Ticket | Token:
        """For a program that will ask itself. Raises if there can be none."""

    async def _look_up(self, ticket: Ticket | Token, until: float) -> tuple[TransactionState, str]:
        """What became of the transaction, and why it can't be known."""

    def _begin_commands(self, time_left: float, begin: bytes | None = None) -> list[bytes]:
        """BEGIN, by default as the connection's attributes want it, and what belongs to it."""

    def _block_commit_gen(self, unit: Unit) -> PQGen[bool]:
        """COMMIT of a block; see `commit()`."""

    def _forget_prepared_gen(self) -> PQGen[None]:
        """After a rollback: prepared statements may refer to what is gone."""

    def _push_block(self, tx: Any) -> None: ...

    def _remove_block(self, tx: Any) -> None: ...

    def _drop(self, reason: str) -> None:
        """Close the connection at once: the state of its session can't be known."""
