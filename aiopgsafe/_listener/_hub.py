"""One connection that listens for all subscribers, made again whenever it is lost."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable
from math import inf
from random import uniform
from secrets import token_hex
from time import monotonic
from typing import Any

import psycopg
from psycopg import Notify, sql
from psycopg_pool import PoolClosed

from .._backends import Backend, Background, Expired, Waiter
from .._connection import AsyncConnection
from .._errors import brief
from .._health import Health
from ._subscription import Subscription

__all__ = ["Hub"]

logger = logging.getLogger("aiopgsafe.listener")

FIRST_DELAY = 0.1
"""Seconds between a loss and the first attempt to connect, at the most; doubled for each other."""

MAX_DELAY = 10.0
"""Seconds between two attempts at the most."""

GRACE = 1.0
"""Seconds that a subscriber has to take out what is too much for its buffer.

Thousands may come in one piece, and nobody can take any before they have all come.
"""

EXCESS = 10_000
"""Notifications that may be too many meanwhile: memory is bounded."""

PROOF_TIMEOUT = 1.0
"""Seconds for a notification that is to prove that they arrive at all."""

Connect = Callable[[], Awaitable[AsyncConnection[Any]]]


class Hub:
    """Subscribers come and go in synchronous code; a job of its own does what that entails.

    The job alone uses the connection. It makes it when somebody subscribes, LISTENs to
    what is wanted and no more, asks the server every `heartbeat` seconds whether it is
    there, and connects again after a loss. What a subscriber may have missed meanwhile
    stands as a `Gap` in its buffer before anything that came later: told when the server
    has confirmed that we listen again, or by the first notification if that is earlier.

    :param connect: makes a connection, in autocommit mode.
    :param health: is looked at when the connection is lost, or can't be made.
    :param on_silence: called when the server doesn't answer.
    :param heartbeat: seconds between two questions.
    :param timeout: seconds for each answer.
    """

    def __init__(
        self,
        connect: Connect,
        backend: Backend,
        health: Health,
        on_silence: Callable[[], object],
        heartbeat: float,
        timeout: float,
    ) -> None:
        self.backend = backend
        self._connect = connect
        self._health = health
        self._on_silence = on_silence
        self._heartbeat = heartbeat
        self._timeout = timeout
        self._closed = False
        self._silent = False  # since the last loss
        self._subscribers: dict[str, list[Subscription]] = {}
        self._listening: set[str] = set()
        self._overfull: dict[Subscription, float] = {}
        self._answered = 0.0
        self._delay = FIRST_DELAY
        self._proof: str | None = None
        self._conn: AsyncConnection[Any] | None = None
        self._job: Background[None] | None = None
        self._bell: Waiter | None = None
        self._rung = False
        health.add(self.alive)

    def alive(self) -> bool:
        """Whether we have a connection, as far as is known."""
        return self._conn is not None and not self._conn.closed

    # Subscribers

    async def enter(self, subscription: Subscription) -> None:
        """Subscribe. When it returns, the server has confirmed that we listen."""
        if self._closed:
            raise PoolClosed("the database is closed: nobody listens any more")
        for channel in subscription.channels:
            self._subscribers.setdefault(channel, []).append(subscription)
        if self._listening.issuperset(subscription.channels):
            subscription.confirmed = True
            return
        if self._job is None:
            self._job = self.backend.background(self._run)
        self._ring()
        try:
            while not subscription.confirmed and subscription.error is None:
                await subscription.wait(self)
        except BaseException:
            self.leave(subscription)
            raise
        if subscription.error is not None:
            raise subscription.error

    def leave(self, subscription: Subscription) -> None:
        """Subscribe no more."""
        for channel in subscription.channels:
            others = self._subscribers.get(channel, [])
            if subscription in others:
                others.remove(subscription)
                if not others:
                    del self._subscribers[channel]
        self._overfull.pop(subscription, None)
        self._ring()

    def _everybody(self) -> list[Subscription]:
        return list({id(s): s for some in self._subscribers.values() for s in some}.values())

    def _fail(self, subscription: Subscription, error: BaseException) -> None:
        self.leave(subscription)
        subscription.fail(error)

    def _fail_newcomers(self, error: BaseException) -> None:
        """Who isn't in yet gets the error at once; the others wait for better times."""
        for subscription in self._everybody():
            if not subscription.confirmed:
                self._fail(subscription, error)

    def abandon(self) -> None:
        """Its event loop runs no more: nobody else will close its connection."""
        if self._conn is not None:
            self._conn._channel.discard()
            self._conn.pgconn.finish()

    async def close(self, deadline: float) -> None:
        """End all subscriptions, after what is in their buffers, and the connection."""
        self._closed = True
        for subscription in self._everybody():
            self.leave(subscription)
            subscription.end()
            if not subscription.confirmed:
                subscription.fail(PoolClosed("the database was closed meanwhile"))
        if self._conn is not None and not self._conn.closed:
            self._conn._close_now()  # nobody waits for what it still does
        if (job := self._job) is not None:
            job.cancel()
            job.limit(deadline)
            try:
                await job.wait()
            except Expired:
                logger.warning("the listener has not ended in time")
            except BaseException as exc:
                if not job.ended_with(exc):
                    raise

    # Notifications, from the event loop's callbacks

    def _on_notify(self, notify: Notify) -> None:
        if notify.channel == self._proof:
            self._proof = None
            self._ring()
            return
        for subscription in tuple(self._subscribers.get(notify.channel, ())):
            subscription.push(notify)
            excess = subscription.excess
            if excess > EXCESS:
                self._fail(subscription, too_slow(subscription))
            elif excess > 0 and subscription not in self._overfull:
                self._overfull[subscription] = monotonic() + GRACE
                self._ring()

    def _look_at_the_slow(self) -> float:
        """End those whose grace is over and whose buffers are too full still; the next time."""
        now, soonest = monotonic(), inf
        for subscription, until in tuple(self._overfull.items()):
            if subscription.excess <= 0:
                del self._overfull[subscription]
            elif until <= now:
                self._fail(subscription, too_slow(subscription))
            else:
                soonest = min(soonest, until)
        return soonest

    def _on_lost(self, error: psycopg.OperationalError) -> None:
        self._listening.clear()
        for subscription in self._everybody():
            if subscription.confirmed and subscription.missing_since is None:
                subscription.missing_since = self._answered
        self._ring()

    # The job

    async def _run(self) -> None:
        try:
            while self._subscribers:
                try:
                    await self._serve()
                    continue
                except Exception as exc:
                    if self._closed:
                        return
                    logger.warning(
                        "the listener has lost its connection, or gets none: %s", brief(exc)
                    )
                    self._silent = True
                    self._health.look()
                    self._fail_newcomers(exc)
                await self._pause()
        except BaseException as exc:
            for subscription in self._everybody():
                self._fail(subscription, psycopg.OperationalError(f"the listener ended: {exc!r}"))
            raise
        finally:
            self._job = None

    async def _pause(self) -> None:
        """Before the next attempt. A newcomer needn't wait for long, nor can it hurry us much."""
        began = monotonic()
        until = began + self._delay * uniform(0.0, 1.0)
        self._delay = min(2 * self._delay, MAX_DELAY)
        while self._subscribers:
            newcomers = any(not subscription.confirmed for subscription in self._everybody())
            when = min(until, began + FIRST_DELAY) if newcomers else until
            self._look_at_the_slow()
            if monotonic() >= when:
                return
            self._rung = False
            await self._wait(when)

    async def _serve(self) -> None:
        """Connect, and listen until the connection is lost or nobody wants it any more."""
        self._conn = conn = await self._connect()
        try:
            if self._closed:
                return
            self._health.up()
            conn.add_notify_handler(self._on_notify)
            conn.add_disconnect_handler(self._on_lost)
            await self._prove(conn)
            beat = monotonic() + self._heartbeat
            while self._subscribers:
                await self._listen(conn)
                if await self._wait(min(beat, self._look_at_the_slow())) and monotonic() >= beat:
                    await self._ask(conn, b"")
                    beat = monotonic() + self._heartbeat
                if conn.closed:
                    raise await conn.wait_disconnected()
        except Expired:
            self._on_silence()
            raise psycopg.OperationalError(
                f"no answer to the listener within {self._timeout:g} seconds"
            ) from None
        finally:
            if not conn.closed:
                conn._close_now()
            self._conn = None
            if self._listening:
                self._on_lost(psycopg.OperationalError("the connection is closed"))

    async def _listen(self, conn: AsyncConnection[Any]) -> None:
        """LISTEN to what is wanted, and confirm it."""
        while (wanted := self._subscribers.keys()) != self._listening and not conn.closed:
            new, old = wanted - self._listening, self._listening - wanted
            self._listening -= old  # who wants it from now on waits until it is there again
            commands = []
            for verb, names in ((b"LISTEN ", tuple(new)), (b"UNLISTEN ", tuple(old))):
                for name in names:
                    try:
                        commands.append(verb + quoted(name, conn))
                    except UnicodeError as exc:  # not in the client's encoding
                        new.discard(name)
                        for subscription in tuple(self._subscribers[name]):
                            self._fail(subscription, exc)
            if commands:
                await self._ask(conn, b"; ".join(commands))
            if conn.closed:
                return
            self._listening |= new
            self._confirm()

    def _confirm(self) -> None:
        self._delay = FIRST_DELAY
        if self._silent:
            self._silent = False
            logger.info("the listener listens again")
        for subscription in self._everybody():
            if not self._listening.issuperset(subscription.channels):
                continue
            subscription.tell_gap()
            if not subscription.confirmed:
                subscription.confirmed = True
                subscription.wake()

    async def _ask(self, conn: AsyncConnection[Any], query: bytes) -> list[tuple[Any, ...]]:
        """Raises `Expired` without an answer in time.

        Whatever was committed before we asked is delivered before the answer.
        """
        asked = time.time()
        rows = await conn._ask(query, self._timeout)
        self._answered = asked
        return rows

    async def _prove(self, conn: AsyncConnection[Any]) -> None:
        """Behind a pooler in transaction mode LISTEN succeeds, and nothing ever arrives.

        The session's number tells whether the server itself speaks to us. Otherwise a
        notification from another session has to arrive, while ours does nothing.
        """
        ((pid,),) = await self._ask(conn, b"select pg_backend_pid()")
        if pid == conn.info.backend_pid:
            return
        self._proof = name = f"aiopgsafe_{token_hex(8)}"
        channel = quoted(name, conn)
        await self._ask(conn, b"LISTEN " + channel)
        try:
            await self._prove_delivery(conn, channel)
        finally:
            if not conn.closed:  # a pooler keeps the session
                await self._ask(conn, b"UNLISTEN " + channel)

    async def _prove_delivery(self, conn: AsyncConnection[Any], channel: bytes) -> None:
        other = await self._connect()
        try:
            await other._ask(b"NOTIFY " + channel, self._timeout)
        finally:
            other._close_now()
        until = monotonic() + PROOF_TIMEOUT
        while self._proof is not None and not conn.closed:
            if await self._wait(until):
                # Late, or never: with the answer it would have come.
                await self._ask(conn, b"")
                break
        if self._proof is not None:
            raise psycopg.NotSupportedError(
                "LISTEN delivers nothing on this connection: a connection pooler in transaction"
                " mode (PgBouncer) stands before the server. Listen past it: listen_conninfo="
            )

    # Waiting

    def _ring(self) -> None:
        self._rung = True
        if self._bell is not None:
            self._bell.wake()

    async def _wait(self, until: float) -> bool:
        """Wait until somebody rings, or `until`; whether it is so late."""
        if not self._rung:
            self._bell = self.backend.waiter()
            self._bell.limit(until)
            try:
                await self._bell.wait()
            except Expired:
                return True
            finally:
                self._bell = None
        self._rung = False
        return False


def quoted(channel: str, conn: AsyncConnection[Any]) -> bytes:
    return sql.Identifier(channel).as_bytes(conn)


def too_slow(subscription: Subscription) -> psycopg.OperationalError:
    return psycopg.OperationalError(
        f"the subscriber is too slow: {subscription.max_buffer} notifications wait for it"
        " and another one came; it gets no more"
    )
