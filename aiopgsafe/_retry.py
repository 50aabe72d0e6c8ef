"""Transactions that are run again as a whole, where it is known that nothing was committed."""

from __future__ import annotations

import logging
from random import uniform
from typing import Protocol, TypeVar

from ._backends import Backend, sleep
from ._errors import CommitUnknown, safe_to_retry
from ._outcome import TransactionState

__all__ = ["Attempt", "Retry", "retrying"]

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

COMMITTED, UNKNOWN = TransactionState.COMMITTED, TransactionState.UNKNOWN

logger = logging.getLogger("aiopgsafe.retry")


class Attempt(Protocol[T_co]):
    """One go at the work, in a transaction of its own each time it is called."""

    @property
    def state(self) -> TransactionState:
        """What is known of the last one's transaction."""

    async def __call__(self) -> T_co: ...


class Retry:
    """How often, and after which pauses, a transaction is run again: ``db.atomic(retry=Retry())``.

    For serialization failures, deadlocks, and connections that were lost before COMMIT was
    sent (`safe_to_retry()`). Each attempt is a fresh transaction, as a rule on another
    connection. An outcome that can't be known (`CommitUnknown`) is never retried, unless the
    work is declared idempotent.

    :param attempts: at the most, the first one included.
    :param backoff: seconds before the second attempt; doubled before each further one.
    :param jitter: by which part of it a pause may be shorter or longer: 0 to 1. Without it
        those who have collided would collide again.
    :param max_backoff: seconds that a pause lasts at the most.
    :param idempotent: whether the work may be done twice: then `CommitUnknown` is retried.

    Raises `ValueError` or `TypeError` for values out of range.

    :ivar retries: attempts beyond the first, of all that use this object.
    :ivar given_up: calls that ended with an error after their last attempt.
    """

    __module__ = "aiopgsafe"

    def __init__(
        self,
        attempts: int = 5,
        backoff: float = 0.02,
        jitter: float = 0.5,
        *,
        max_backoff: float = 1.0,
        idempotent: bool = False,
    ) -> None:
        if isinstance(attempts, bool) or not isinstance(attempts, int):
            raise TypeError(f"attempts is an int, not {type(attempts).__name__}")
        if attempts < 1:
            raise ValueError(f"attempts must be at least 1: {attempts}")
        for name, value in (("backoff", backoff), ("max_backoff", max_backoff)):
            if not 0 <= value < float("inf"):
                raise ValueError(f"{name} is a number of seconds, not negative: {value}")
        if not 0 <= jitter <= 1:
            raise ValueError(f"jitter is between 0 and 1: {jitter}")
        if not isinstance(idempotent, bool):
            raise TypeError(f"idempotent is a bool, not {type(idempotent).__name__}")
        self.attempts = attempts
        self.backoff = backoff
        self.jitter = jitter
        self.max_backoff = max_backoff
        self.idempotent = idempotent
        self.retries = 0
        self.given_up = 0

    def __repr__(self) -> str:
        return f"Retry(attempts={self.attempts}, backoff={self.backoff}, jitter={self.jitter})"

    def pause(self, attempt: int) -> float:
        """Seconds between an attempt (the first is 1) and the next one."""
        backoff = min(self.backoff * 2.0 ** (attempt - 1), self.max_backoff)
        return backoff * uniform(1 - self.jitter, 1 + self.jitter)

    def wanted_after(self, error: Exception) -> bool:
        """Whether an attempt that ended with `error` may be followed by another one."""
        if isinstance(error, CommitUnknown):
            return self.idempotent
        return safe_to_retry(error)


async def retrying(retry: Retry, backend: Backend, what: str, attempt: Attempt[T]) -> T:
    """Call `attempt` until it succeeds, or should not be called again.

    A pause that would outlast the task's deadline isn't begun: who waits learns the
    error, not that the time is over.
    """
    number = 1
    while True:
        try:
            return await attempt()
        except Exception as error:
            # What the work raises may be about something else than its transaction.
            if attempt.state is COMMITTED or not retry.wanted_after(error):
                raise
            if attempt.state is UNKNOWN and not retry.idempotent:
                raise
            pause = retry.pause(number)
            late = pause >= backend.time_left()
            if number >= retry.attempts or late:
                retry.given_up += 1
                if late:
                    error.add_note("aiopgsafe: not run again: the pause would outlast the deadline")
                if number > 1:
                    error.add_note(f"aiopgsafe: given up after {number} attempts")
                raise
            logger.info("attempt %d at %s: %s; again in %.3f s", number, what, error, pause)
            last = error
        number += 1
        retry.retries += 1
        try:
            await sleep(backend, pause)
        except BaseException as interruption:
            interruption.add_note(f"aiopgsafe: while it was to be run again, after {last!r}")
            raise
