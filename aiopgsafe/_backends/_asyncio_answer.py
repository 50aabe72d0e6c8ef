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
        "_error",
        "_loop",
        "_message",
        "_value",
        "state",
    )

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._asyncio_future_blocking = False
        self._loop = loop
        self.state = PENDING
        self._value: Any = None
        self._error: BaseException | None = None
        self._message: object = None
        self._callbacks: list[tuple[Callback, Context | None]] = []

    # Of who answers

    def set(self, value: Any, error: BaseException | None) -> None:
        """Note the answer; `resume()` or `resume_soon()` lets the task have it."""
        self._value, self._error = value, error
        self.state = DONE

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
        return self.state != PENDING

    def cancelled(self) -> bool:
        return self.state == CANCELLED

    def cancel(self, msg: object = None) -> bool:
        if self.state != PENDING:
            return False
        self.state, self._message = CANCELLED, msg
        self.resume_soon()
        return True

    def result(self) -> Any:
        if self.state == CANCELLED:
            raise asyncio.CancelledError(*(() if self._message is None else (self._message,)))
        if self.state == PENDING:
            raise asyncio.InvalidStateError("the answer is not there yet")
        if (error := self._error) is None:
            return self._value
        # Asked for again where the task was cancelled meanwhile: it is told of that first.
        try:
            raise error
        finally:
            del self, error  # its traceback leads to this frame

    def add_done_callback(self, fn: Callback, *, context: Context | None = None) -> None:
        self._callbacks.append((fn, context))
        if self.state != PENDING:
            self.resume_soon()

    def remove_done_callback(self, fn: Callback) -> int:
        before = len(self._callbacks)
        self._callbacks = [entry for entry in self._callbacks if entry[0] != fn]
        return before - len(self._callbacks)

    def __await__(self) -> Generator[Any, None, Any]:
        if self.state == PENDING:
            self._asyncio_future_blocking = True
            yield self
            if self.state == DONE and self._error is None:
                return self._value
        return self.result()
