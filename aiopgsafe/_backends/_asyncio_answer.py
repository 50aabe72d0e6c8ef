"""A future whose task goes on at once when its answer is there."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator
from contextvars import Context
from typing import Any

Callback = Callable[["Answer"], object]

PENDING, DONE, CANCELLED = range(3)


class Answer:
    """What a task waits for: a future, as `asyncio.Task` knows them (`asyncio.isfuture()`).

    asyncio's own has its task resumed in the next cycle of the loop: another look at all
    descriptors, for each statement. This one calls the task back where the answer is read,
    in the reader's callback, as the last thing that it does.
    """

    __slots__ = (
        "_asyncio_future_blocking",
        "_callbacks",
        "_loop",
        "_message",
        "_outcome",
        "_state",
    )

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._asyncio_future_blocking = False
        self._loop = loop
        self._state = PENDING
        self._outcome: tuple[Any, BaseException | None] = (None, None)
        self._message: object = None
        self._callbacks: list[tuple[Callback, Context | None]] = []

    # Of who answers

    def set(self, value: Any, error: BaseException | None) -> None:
        """Note the answer; `resume()` or `resume_soon()` lets the task have it."""
        self._outcome = value, error
        self._state = DONE

    def resume(self) -> None:
        """Let the task go on, in this call. Not from within a task."""
        callbacks, self._callbacks = self._callbacks, []
        for callback, context in callbacks:
            if context is None:
                callback(self)
            else:
                context.run(callback, self)

    def resume_soon(self) -> None:
        """Let the task go on in the next cycle."""
        callbacks, self._callbacks = self._callbacks, []
        for callback, context in callbacks:
            self._loop.call_soon(callback, self, context=context)

    # Of the task

    def get_loop(self) -> asyncio.AbstractEventLoop:
        return self._loop

    def done(self) -> bool:
        return self._state != PENDING

    def cancelled(self) -> bool:
        return self._state == CANCELLED

    def cancel(self, msg: object = None) -> bool:
        if self._state != PENDING:
            return False
        self._state, self._message = CANCELLED, msg
        self.resume_soon()
        return True

    def result(self) -> Any:
        if self._state == CANCELLED:
            raise asyncio.CancelledError(*(() if self._message is None else (self._message,)))
        if self._state == PENDING:
            raise asyncio.InvalidStateError("the answer is not there yet")
        value, error = self._outcome
        if error is None:
            return value
        # Asked for again where the task was cancelled meanwhile: it is told of that first.
        try:
            raise error
        finally:
            del self, error  # its traceback leads to this frame

    def add_done_callback(self, fn: Callback, *, context: Context | None = None) -> None:
        self._callbacks.append((fn, context))
        if self._state != PENDING:
            self.resume_soon()

    def remove_done_callback(self, fn: Callback) -> int:
        before = len(self._callbacks)
        self._callbacks = [entry for entry in self._callbacks if entry[0] != fn]
        return before - len(self._callbacks)

    def __await__(self) -> Generator[Any, None, Any]:
        if self._state == PENDING:
            self._asyncio_future_blocking = True
            yield self
        return self.result()
