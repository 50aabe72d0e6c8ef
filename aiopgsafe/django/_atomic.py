"""`Atomic.__exit__()` as a section: torn anywhere, the block is left as if it had not been.

Django's runs, and does everything; what it had not done when it was torn is done afterwards
(`Leaving._mend()`), by what the server decided: callbacks run if and only if it has committed,
autocommit is on again, no block is left behind. Stock Django at the same places loses the
callbacks, or runs them in a later transaction, or leaves autocommit off, so that the next block
reports success and is never committed.
"""

from __future__ import annotations

import gc
import logging
import sys
from collections.abc import Iterable
from copy import copy
from itertools import repeat
from operator import delitem
from sys import getrefcount
from threading import Lock
from types import TracebackType
from typing import Any

import psycopg
from django.db import Error
from django.db.transaction import Atomic, TransactionManagementError, get_connection

from .._errors import foremost, goes_on, let_out
from .._outcome import COMMITTED
from .._sync_section import Calls, Section, came_through, see_through

__all__ = ["Hooks", "Leaving", "Running", "install"]

logger = logging.getLogger("django.db.backends.base")


class Hooks:
    """A transaction's callbacks, to be run as Django does: each once, wherever it is torn.

    :param hooks: of `BaseDatabaseWrapper.run_on_commit`.

    :ivar over: whether all have run that are to.
    :ivar raised: what a callback raised.
    """

    over = running = False
    raised: BaseException | None = None
    _taken = False

    def __init__(self, wrapper: Any, hooks: Iterable[Any]) -> None:
        self._wrapper = wrapper
        self._hooks = [*hooks]  # with their savepoints, and whether errors are logged
        self._calls = Calls([fn for _, fn, _ in self._hooks])

    def run(self) -> None:
        """May be torn, and called again."""
        self.running = True
        try:
            self._run()
            self.over = True
        finally:
            self.running = False

    def _run(self) -> None:
        if not self._taken:
            self._wrapper.run_on_commit = []
            self._taken = True
        while self._calls.left:
            try:
                self._calls.call_next()
            except BaseException as exc:
                _, fn, robust = self._hooks[self._calls.note(exc)]
                if not isinstance(exc, Exception):
                    self.raised = self.raised or exc  # it stops the program, not the others
                elif robust:
                    log_error(fn, exc)
                else:
                    self.raised = self.raised or exc
                    self._calls.left.clear()  # those after it don't run: Django's documentation


class Running(Section):
    """Runs callbacks where no block is left: the program manages its transactions itself."""

    def __init__(self, hooks: Hooks, wrapper: Any) -> None:
        super().__init__()
        self._hooks = hooks
        self._wrapper = wrapper

    def _step(self) -> None:
        self._hooks.run()

    def torn(self, exc: BaseException) -> None:
        """What is to be known then is noted where a callback raises."""

    def give_up(self) -> None:
        """Those that are left are lost: they must not run in a later transaction."""
        self._wrapper.run_on_commit = []


def log_error(fn: object, exc: BaseException) -> None:
    """In Django's words."""
    name = getattr(fn, "__qualname__", repr(fn))
    message = f"Error calling {name} in on_commit() during transaction (%s)."
    logger.error(message, exc, exc_info=exc)


class Leaving(Section):
    """One block's exit.

    :ivar raised: what came out of it first.
    :ivar hooks: what it runs, as soon as it is committed.
    """

    raised: BaseException | None = None
    hooks: Hooks | None = None
    _begun = False

    def __init__(
        self,
        atomic: Atomic,
        wrapper: Any,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        super().__init__()
        self._atomic = atomic
        self._wrapper = wrapper
        self._given = exc_type, exc, tb
        blocks, savepoints = wrapper.atomic_blocks, wrapper.savepoint_ids
        on_top = bool(blocks) and blocks[-1] is atomic
        if not on_top and forget_torn(atomic, wrapper, exc) and exc is None:
            self.raised = error = TransactionManagementError(
                "a block inside this one was never left: an exception had come before its end"
            )
            self._given = type(error), error, None
        self._handled = sys.exc_info()[1]  # around it
        self._outermost = not savepoints
        # As it is afterwards; how many are left of the others.
        self._blocks = len(blocks) - 1 if wrapper.in_atomic_block else 0
        self._savepoints = len(savepoints) - 1 if savepoints else 0
        # The outermost may be in a transaction that the program manages itself.
        self._in_block = self._savepoints > 0 or (bool(savepoints) and wrapper.commit_on_exit)
        self._unit = getattr(wrapper.connection, "_unit", None)

    def _step(self) -> None:
        leaving = self._wrapper._leaving
        if self not in leaving:
            leaving.append(self)
        if not self._begun:
            self._begun = True
            DJANGOS_EXIT(self._atomic, *self._given)
        elif not self._whole:
            self._mend()
        while self in leaving:
            leaving.remove(self)

    def torn(self, exc: BaseException) -> None:
        """It may be Django's own error, or a callback's: what is whole is not mended."""
        if not self._begun:
            self._given = type(exc), exc, exc.__traceback__  # no COMMIT begins any more
        self.raised = foremost(self.raised, self._first(exc))

    def give_up(self) -> None:
        """The connection is closed, and this block is left."""
        wrapper = self._wrapper
        del wrapper.atomic_blocks[self._blocks :]
        del wrapper.savepoint_ids[self._savepoints :]
        wrapper.in_atomic_block = self._in_block
        while self in wrapper._leaving:
            wrapper._leaving.remove(self)
        wrapper.close()

    def _first(self, exc: BaseException) -> BaseException:
        """What tore it, if `exc` is an error that Django has for it: of an exit half done."""
        before: BaseException | None = exc
        while before is not None and before not in (self._handled, self._given[1]):
            if not isinstance(before, (Error, psycopg.Error)):
                return before
            before = before.__context__
        return exc

    def finish(self) -> None:
        """Raise what came out of it."""
        hooks = self.hooks.raised if self.hooks is not None else None
        signalled, came = self.signalled, self.raised
        if came is hooks is signalled is None:
            return
        # What came from elsewhere goes before errors of our own, and of the callbacks.
        own = came is hooks or isinstance(came, (Error, psycopg.Error))
        raised = foremost(None if own else came, signalled, came, hooks)
        if raised is None or goes_on(self._given[1], raised):
            return
        if self._committed and raised is not self._given[1]:
            note = "aiopgsafe: the transaction is committed"
            if note not in getattr(raised, "__notes__", ()):
                raised.add_note(note)
        let_out(raised)

    @property
    def _committed(self) -> bool:
        if self._unit is not None:
            return self._unit.state is COMMITTED
        # Nothing was executed: it is what `BaseDatabaseWrapper.commit()` got to.
        return self.hooks is not None or self._wrapper.run_commit_hooks_on_set_autocommit_on

    @property
    def _whole(self) -> bool:
        """Whether Django's exit has come to its end, whatever it has raised."""
        wrapper = self._wrapper
        if len(wrapper.atomic_blocks) > self._blocks:
            return False
        if not self._outermost:
            left = len(wrapper.savepoint_ids) == self._savepoints
            return left and isinstance(self.raised, Error)
        if wrapper.in_atomic_block:
            return False
        if self._committed and not self._called:
            return False
        on = wrapper.connection is None or (wrapper.autocommit and wrapper.connection.autocommit)
        return bool(on and not wrapper.run_commit_hooks_on_set_autocommit_on)

    @property
    def _called(self) -> bool:
        """Whether the callbacks have been, if there are any."""
        return not self._wrapper.run_on_commit if self.hooks is None else self.hooks.over

    def _mend(self) -> None:
        wrapper = self._wrapper
        if self.hooks is not None:
            self.hooks.running = False  # torn where it was to be noted
        # Locks whose ``with`` was torn. The connection is this thread's: nobody else has them.
        if wrapper._thread_sharing_lock.locked():
            wrapper._thread_sharing_lock = Lock()
        if wrapper.connection is not None and wrapper.connection.lock.locked():
            wrapper.connection.lock = Lock()
        del wrapper.atomic_blocks[self._blocks :]
        if not self._outermost:
            self._mend_inner()
            return
        wrapper.in_atomic_block = False
        if wrapper.closed_in_transaction:
            wrapper.connection = None
            return
        if self._committed:
            wrapper.errors_occurred = wrapper.needs_rollback = False
            wrapper.run_commit_hooks_on_set_autocommit_on = True
        elif wrapper.connection is not None and wrapper.connection._in_transaction:
            self._roll_back()
        if not self._committed and self.hooks is None:
            wrapper.run_on_commit = []
            wrapper.needs_rollback = False
        try:
            wrapper.set_autocommit(True)
        except Error:
            wrapper.close()
        if self._committed and not self._called:  # the database can't be reached any more
            wrapper.run_and_clear_commit_hooks()

    def _mend_inner(self) -> None:
        wrapper = self._wrapper
        del wrapper.savepoint_ids[self._savepoints :]
        wrapper.in_atomic_block = self._in_block
        # Nobody knows how much of it the savepoint has undone.
        wrapper.needs_rollback = self._in_block

    def _roll_back(self) -> None:
        wrapper = self._wrapper
        try:
            wrapper.rollback()
        except Error:
            wrapper.close()


DJANGOS_EXIT = Atomic.__exit__
DJANGOS_ENTER = Atomic.__enter__


class Entry:
    """What a block's entry changes, to be undone."""

    def __init__(self, wrapper: Any) -> None:
        self._wrapper = wrapper
        self._in_block = wrapper.in_atomic_block
        self._blocks = len(wrapper.atomic_blocks)
        self._savepoints = len(wrapper.savepoint_ids)
        self._autocommit = wrapper.autocommit

    def undo(self) -> None:
        """May be torn, and called again."""
        wrapper = self._wrapper
        del wrapper.atomic_blocks[self._blocks :]
        del wrapper.savepoint_ids[self._savepoints :]
        wrapper.in_atomic_block = self._in_block
        conn = wrapper.connection
        if self._in_block or not self._autocommit or conn is None:
            return
        if not (wrapper.autocommit and conn.autocommit):
            try:
                wrapper.set_autocommit(True)
            except Error:
                wrapper.close()


def enter(atomic: Atomic) -> None:
    """Django's. Torn, it leaves no block that nobody will leave."""
    wrapper: Any = get_connection(atomic.using)
    if not hasattr(wrapper, "_leaving"):
        DJANGOS_ENTER(atomic)
        return
    entry = Entry(wrapper)
    try:
        DJANGOS_ENTER(atomic)
    except BaseException:
        try:
            entry.undo()
        except BaseException:
            entry.undo()  # that was torn, too
            raise
        raise


def forget_torn(atomic: Atomic, wrapper: Any, exc: BaseException | None) -> bool:
    """Forget blocks inside this one, torn at their exit's first bytecode. Whether any were.

    Others inside it may be left later, out of order (generators): Django only counts.
    """
    blocks = wrapper.atomic_blocks
    if not wrapper.in_atomic_block or atomic not in blocks:
        return False
    inner: int = blocks[::-1].index(atomic)
    if not inner:
        return False
    torn = {id(frame.f_locals["atomic"]) for frame in came_through(exc, leave.__code__)}
    number = torn_on_top(blocks, inner, torn)
    if number < inner:
        gc.collect()  # an exception that is over may still be in a cycle with its frames
        number = torn_on_top(blocks, inner, torn)
    if number:
        # Each has its savepoint, or None: both lists in one C call, which nothing tears.
        any(map(delitem, (blocks, wrapper.savepoint_ids), repeat(slice(-number, None))))
    return number > 0


def torn_on_top(blocks: list[Atomic], inner: int, torn: set[int]) -> int:
    """How many of the `inner` blocks on top are `torn`, or nobody has any more, who could leave."""
    number = 0
    while number < inner and (
        id(blocks[~number]) in torn or getrefcount(blocks[~number]) == ONLY_HERE
    ):
        number += 1
    return number


ONLY_HERE = 2
"""References: the list's, and getrefcount()'s own."""


def another(atomic: Atomic) -> Atomic:
    """For each call of a decorated function: it may call itself, and be torn."""
    return copy(atomic)


def leave(
    atomic: Atomic,
    exc_type: type[BaseException] | None,
    exc: BaseException | None,
    tb: TracebackType | None,
) -> None:
    """Django's, as a section where the connection is ours."""
    begun: list[Leaving | None] = []
    try:
        try:
            wrapper: Any = get_connection(atomic.using)
            if not hasattr(wrapper, "_leaving"):
                begun.append(None)
                DJANGOS_EXIT(atomic, exc_type, exc, tb)
                return
            leaving = Leaving(atomic, wrapper, exc_type, exc, tb)
            begun.append(leaving)
            see_through(leaving)
            leaving.finish()
        except BaseException as torn:
            _see_left(atomic, begun, torn)
            raise
    except BaseException as torn:  # between two lines of it
        _see_left(atomic, begun, torn)
        raise


def _see_left(atomic: Atomic, begun: list[Leaving | None], torn: BaseException) -> None:
    """If `torn` came before the exit had begun, or before its end: it is seen through."""
    if not begun:
        wrapper: Any = get_connection(atomic.using)
        if not hasattr(wrapper, "_leaving"):
            return
        begun.append(Leaving(atomic, wrapper, type(torn), torn, torn.__traceback__))
    leaving = begun[0]
    if leaving is not None and not leaving.over:
        leaving.torn(torn)
        see_through(leaving)


def install() -> None:
    """Blocks on connections of ours are entered and left our way from now on; others as before."""
    Atomic.__enter__ = enter
    Atomic.__exit__ = leave
    Atomic._recreate_cm = another
