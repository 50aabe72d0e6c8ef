"""The section in which a transaction ends: nothing gets between the server and the program."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Sequence
from functools import partial
from time import monotonic
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

import psycopg

from . import _outcome
from ._backends import Expired
from ._errors import brief, foremost, goes_on, let_out, mark_retry, rank
from ._outcome import (
    ACTIVE,
    COMMITTING,
    ROLLED_BACK,
    UNKNOWN,
    TransactionState,
    Verdict,
    unknown,
    verdict_of_error,
)
from ._session import Session
from ._shield import GATE, INSIST_GRACE, Shield
from ._unit import Callback, Unit

if TYPE_CHECKING:
    from psycopg.abc import PQGen

    from ._resolver import Ticket, Token

__all__ = [
    "Section",
    "acquire_shielded",
    "commit",
    "let_through",
    "no_answer",
    "no_answer_in_time",
    "roll_back",
    "rollback",
    "run",
]

logger = logging.getLogger("aiopgsafe")

T = TypeVar("T")


ROLLBACK_ATTEMPTS = 20
"""After which the session is given up: somebody cancels whatever it does."""


def run(session: Session, shield: Shield, gen: PQGen[T], *, settled: bool = False) -> Awaitable[T]:
    """Drive `gen` to its end, deaf; `Expired` if that takes longer than ``commit_timeout``.

    :param settled: whether a cancel request that a signal has sent was waited for.
    """
    if session._signalled is not None and not settled:
        return _settle_and_run(session, shield, gen)
    channel = session._channel
    session._uncancellable = gen
    channel.start(gen, monotonic() + session.commit_timeout)
    return shield.hold(channel)


async def _settle_and_run(session: Session, shield: Shield, gen: PQGen[T]) -> T:
    await session._signalled.settle(shield)  # it would hit ours
    return await run(session, shield, gen, settled=True)


async def acquire_shielded(session: Session, shield: Shield) -> bool:
    """Take the connection's lock, deaf, after whoever has it. False: closed instead.

    Who has it may never give it back: a `stream()` that is kept, half read. After
    ``commit_timeout`` (an interrupted task: ``cancel_timeout``) the connection is
    closed. Then there is nothing left that the lock would guard.
    """
    lock = session.lock
    if lock.try_acquire():
        return True
    waiter = lock.enqueue()
    waiter.limit(monotonic() + session.commit_timeout)
    try:
        await shield.hold(waiter)
    except Expired:
        lock.withdraw(waiter)
        session._drop("the connection was busy when its transaction had to end")
        return False
    except BaseException:
        lock.withdraw(waiter)
        raise
    return True


async def roll_back(session: Session, shield: Shield, commands: Sequence[bytes]) -> None:
    """Undo on the server, or let the connection go: either way nothing stays.

    ROLLBACK fails where the session is gone, and its transaction with it; and where
    somebody's cancel request hits it, after which it is sent again.
    """
    if session.closed:
        return
    try:
        for _ in range(ROLLBACK_ATTEMPTS):
            try:
                await run(session, shield, session._commands_gen(commands))
                break
            except psycopg.errors.QueryCanceled as exc:
                logger.debug("ROLLBACK was cancelled on %s: %s", session, exc)
        else:
            session._drop("its rollback was cancelled again and again")
            return
        await run(session, shield, session._forget_prepared_gen())
    except Expired:
        session._drop("no answer to ROLLBACK")
    except Exception as exc:
        level = logging.DEBUG if session.closed else logging.WARNING
        logger.log(level, "error ignored in rollback on %s: %s", session, exc)
        if not isinstance(exc, psycopg.Error):
            session._drop(f"its rollback failed: {exc!r}")


class Section:
    """``async with`` it to end a transaction: nothing gets in between.

    It holds the connection's lock and keeps signals and cancellations out, until
    the outcome is known and the callbacks have run. The body says what became of
    the transaction (`error`, `outcome`, `callbacks`); leaving lets through what
    was held back.

    :param committing: COMMIT will be sent. Until then an interruption is let
        through at once, and the section doesn't begin.
    :ivar unit: that was settled, if it may give back its connection before callbacks.
    """

    __slots__ = (
        "_backend",
        "_committing",
        "_locked",
        "_outer",
        "_session",
        "callbacks",
        "error",
        "going_through",
        "outcome",
        "shield",
        "unit",
        "what",
    )

    def __init__(self, session: Session, *, committing: bool = False) -> None:
        # ROLLBACK takes no time: a server that keeps an interrupted task waiting
        # for it doesn't answer. A COMMIT has all of its limit.
        grace = None if committing else session.cancel_timeout
        self.shield = Shield(session._backend, grace=grace)
        self.error: Exception | None = None
        self.outcome: TransactionState | str = ""
        self.what = "transaction"
        self.callbacks: list[Callback] = []
        self.going_through: BaseException | None = None
        self.unit: Unit | None = None
        self._session = session
        self._backend = session._backend
        self._committing = committing
        self._locked = False

    async def __aenter__(self) -> Self:
        session, shield = self._session, self.shield
        self._outer = session._section
        if self._committing and session._backend.cancelled_now():
            await session._backend.checkpoint()
        if not GATE.enter(shield):
            await self._wait_for_gate()
        if session.lock.try_acquire():
            self._locked = True
        else:
            await self._wait_for_lock()
        session._section = self
        return self

    async def _wait_for_gate(self) -> None:
        """A signal is pending and others' sections run: let it through first.

        Not for long: what runs may itself wait for us, in the server (a lock on a
        row that we have) or in a callback.
        """
        waiter = self._session._backend.waiter()
        waiter.limit(monotonic() + INSIST_GRACE)
        GATE.when_open(waiter.wake)
        try:
            if self._committing:
                await waiter.wait()
            else:
                await self.shield.hold(waiter)
        except Expired:
            pass
        GATE.enter(self.shield, at_once=True)

    async def _wait_for_lock(self) -> None:
        """Another task runs a statement on the connection."""
        if self._committing:
            # Not behind the gate: the statement may take long.
            if (signalled := GATE.leave(self.shield)) is not None:
                raise signalled
            await self._session.lock.acquire()
            self._locked = True
            try:
                if not GATE.enter(self.shield):
                    await self._wait_for_gate()
            except BaseException:
                self._session.lock.release()
                raise
            return
        try:
            self._locked = await acquire_shielded(self._session, self.shield)
        except BaseException as exc:
            if (signalled := GATE.leave(self.shield)) is not None:
                raise signalled from exc  # `__aexit__()` is never called: nobody else would
            raise

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        session, loop = self._session, self.shield.loop
        if self._locked:
            session.lock.release()
        session._section = self._outer
        errors: list[BaseException] = []
        try:
            if self.callbacks and exc is None:
                errors = await self._call_back(session.commit_timeout)
        finally:
            signalled = GATE.leave(self.shield)
        if exc is not None:
            # Nothing has been ended. What was held back must not be lost for that.
            held = foremost(signalled, self.shield.held)
            if held is not None and held is not exc:
                held.__cause__ = exc
                let_out(held)
            return
        if GATE.delivered and signalled is None:
            # The handler may have cancelled this task: here is where it belongs.
            try:
                await self._backend.checkpoint()
            except loop.interruptions as interruption:
                self.shield.hold_back(interruption)
        held = foremost(signalled, self.shield.held)
        if held is not None or self.error is not None or errors:
            let_through(self.what, self.outcome, held, self.error, errors, self.going_through)

    async def _call_back(self, timeout: float) -> list[BaseException]:
        """Call back, `timeout` seconds for each; from here on the session may be another's."""
        errors: list[BaseException] = []
        if (unit := self.unit) is not None and unit.give_back is not None:
            try:
                await unit.give_back()
            except self.shield.loop.interruptions as exc:
                self.shield.hold_back(exc)
        for callback in self.callbacks:
            try:
                await self.shield.call(self._backend, callback.fn, timeout)
            except GeneratorExit:  # the coroutine is destroyed, its loop is gone
                raise
            except BaseException as error:
                errors.append(error)
        return errors


def let_through(
    what: str,
    outcome: TransactionState | str,
    held: BaseException | None,
    error: Exception | None,
    errors: list[BaseException],
    going_through: BaseException | None,
) -> None:
    """Raise what is to be raised at the end: what was held back before our own errors.

    :param what: has ended, and with which `outcome`.
    :param error: of the end itself.
    :param errors: of callbacks.
    :param going_through: goes on by itself: nothing takes its place but what was held back.
    """
    said = outcome.value if isinstance(outcome, TransactionState) else outcome
    note = f"aiopgsafe: the {what} is {said}"
    held = foremost(held, *(exc for exc in errors if rank(exc) == 0))  # stops the program
    group = grouped(f"callbacks failed; {note}", outcome, errors)
    if going_through is not None and rank(going_through) < 2:
        if held is not None and goes_on(going_through, held):
            logger.warning("held back, and %r goes on: %r", going_through, held)
            held = None
        if held is None and error is not None and goes_on(going_through, error):
            logger.warning("%s (held back: %r)", error, going_through)
            error = None
    leading = held or error or going_through
    if group is not None and leading is not None:
        logger.error("%s", group, exc_info=group)
        leading.add_note(f"aiopgsafe: {len(errors)} callback(s) failed: {errors!r}")
    if held is not None:
        if note not in getattr(held, "__notes__", ()):  # of a block inside this one
            held.add_note(note)
        if error is not None:
            logger.warning("%s (held back: %r)", error, held)
            held.__cause__ = error
        if error is not None or held is not going_through:
            let_out(held)
    elif error is not None:
        raise error
    elif group is not None and going_through is None:
        raise group


def grouped(
    message: str, outcome: TransactionState | str, errors: list[BaseException]
) -> BaseExceptionGroup[BaseException] | None:
    """What callbacks have raised, with what became of their transaction: `outcome`."""
    errors = [exc for exc in errors if rank(exc) > 0]
    if not errors:
        return None
    group = BaseExceptionGroup(message, errors)
    group.outcome = outcome  # type: ignore[attr-defined]
    return group


async def commit(session: Session, unit: Unit, gen: PQGen[bool], block: Any = None) -> None:
    """End the transaction with COMMIT: send it, believe the answer, call back.

    Raises what interrupted it before COMMIT was sent: `unit` is still ACTIVE then.
    Otherwise `unit` is settled, and what was held back is raised, or what says
    that the transaction is not committed.

    :param gen: sends COMMIT, having moved `unit` to COMMITTING just before; False
        if there was no transaction to commit.
    :param block: the block that ends, if one does.
    """
    async with Section(session, committing=True) as section:
        until = monotonic() + session.commit_timeout
        try:
            sent = await run(session, section.shield, gen)
            verdict = _outcome.IS_COMMITTED
        except Expired:
            sent = True
            if unit.state is COMMITTING:
                verdict = unknown(None, no_answer_in_time(session, section.shield))
                session._drop("no answer to COMMIT")
            else:
                error = no_answer("ROLLBACK TO", session.commit_timeout)
                mark_retry(error, safe=True)
                verdict = Verdict(ROLLED_BACK, error)
                session._drop("no answer to what goes before COMMIT")
        except BaseException as exc:
            if unit.state is not COMMITTING:
                raise
            if not isinstance(exc, Exception):  # the coroutine is destroyed, its loop is gone
                unit.advance(UNKNOWN)
                session._drop("nobody waits for the answer to COMMIT")
                raise
            sent, verdict = True, verdict_of_error(exc, prepared=unit.prepared)
            if verdict.state is UNKNOWN and verdict.error is not exc:
                session._drop("it was lost while COMMIT was in flight")
        ticket = unit.sent_ticket if verdict.state is UNKNOWN and not unit.prepared else None
        if ticket is not None:
            until = max(until, monotonic() + session.cancel_timeout)
            verdict = await look_up(session, section.shield, ticket, verdict, until)
        if sent:
            unit.advance(verdict.state)
            if block is not None:
                block._leave()  # its callbacks may use the connection
            section.error = verdict.error
            if verdict.error is not None and session._failed:
                # COMMIT was refused before it began (a cancel request of somebody's, a
                # command of ours before it): the transaction is still there, failed.
                await roll_back(session, section.shield, [b"ROLLBACK"])
            if unit.callbacks:
                section.callbacks = unit.take()
                section.unit = unit
        section.outcome = unit.state


async def look_up(
    session: Session, shield: Shield, ticket: Ticket | Token, verdict: Verdict, until: float
) -> Verdict:
    """What the server says of a COMMIT that was lost; `verdict` if that can't be had by `until`."""
    if shield.insisted:
        return verdict
    logger.info("asking what became of %s: %s", ticket.where, brief(verdict.error or Expired()))
    job = session._backend.spawn(partial(session._look_up, ticket, until))
    job.limit(until)
    try:
        state, why = await shield.hold(job)
    except Expired:
        state, why = UNKNOWN, "the server did not say so in time"
    except Exception as exc:
        logger.exception("error while asking what became of %s", ticket.where)
        state, why = UNKNOWN, repr(exc)
    logger.info("%s is %s", ticket.where, state.value)
    return _outcome.looked_up(verdict, state, ticket.xid, f"{ticket.where}: {why}")


async def rollback(session: Session, unit: Unit | None, gen: PQGen[None]) -> None:
    """End the transaction with ROLLBACK. Raises the server's error, what was held back before it.

    :param unit: None if nobody has callbacks for this transaction.
    """
    async with Section(session) as section:
        section.outcome = ROLLED_BACK
        try:
            await run(session, section.shield, gen)
        except Expired:
            session._drop("no answer to ROLLBACK")
            section.error = no_answer("ROLLBACK", session.commit_timeout)
        except psycopg.Error as exc:
            section.error = exc
            if not session.closed:  # refused: the transaction goes on
                section.outcome = "as it was"
                return
        if unit is not None and unit.state is ACTIVE:
            unit.advance(ROLLED_BACK)
            section.callbacks = unit.take()


def no_answer_in_time(session: Session, shield: Shield) -> str:
    if shield.insisted:
        return "no answer to COMMIT before the program was told once more to stop"
    return f"no answer to COMMIT within {session.commit_timeout:g} seconds"


def no_answer(command: str, timeout: float) -> psycopg.OperationalError:
    return psycopg.OperationalError(
        f"no answer to {command} within {timeout:g} seconds: the connection is closed"
    )
