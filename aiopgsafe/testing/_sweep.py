"""Cancel an async function at each of its suspension points, one after the other."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable, Coroutine, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import anyio

__all__ = ["CancelSweep", "Trial"]

T = TypeVar("T")

How = Literal["edge", "edge-late", "edge-repeated", "timeout", "level"]
"""How the function is cancelled; the first four on asyncio and uvloop only.

- ``edge``: `task.cancel()`, once, while it waits;
- ``edge-late``: `task.cancel()` when what it waits for has come and the task has
  not run yet: the cancellation and the result race, and the cancellation wins;
- ``edge-repeated``: `task.cancel()` there and at every later suspension point;
- ``timeout``: its `asyncio.timeout()` expires there;
- ``level``: its anyio (on trio: trio) cancel scope is cancelled there.
"""


@dataclass
class Trial(Generic[T]):
    """One run of the function."""

    point: int
    """Which suspension point it was cancelled at; the first is 1."""
    where: str
    """The suspension point: the innermost frames of the function's stack."""
    value: T | None = None
    """What the function returned, if it did."""
    exception: BaseException | None = None
    """What it raised, if it did: mostly the cancellation."""
    completed: bool = False
    """It had no such point and ran through undisturbed: the last trial of a sweep."""


class CancelSweep(Generic[T]):
    """Run `work` again and again, cancelled at its 1st, 2nd, ... k-th suspension point.

    ::

        async for trial in CancelSweep(work, how="level"):
            assert ...  # what must hold after work was cancelled at trial.point

    The last trial is one in which `work` had no further suspension point and ran
    to its end (`Trial.completed`). Every trial on asyncio has a task of its own.

    :param work: called without arguments, once a trial; an async function.
    :param how: see `How`.
    :param limit: give up with `RuntimeError` after so many points.

    Raises `ValueError` for a `how` that the running event loop doesn't have.
    """

    def __init__(
        self,
        work: Callable[[], Coroutine[Any, Any, T]],
        *,
        how: How = "edge",
        limit: int = 10_000,
    ) -> None:
        if how not in ("edge", "edge-late", "edge-repeated", "timeout", "level"):
            raise ValueError(f"how is not one of the ways to cancel: {how!r}")
        self._work = work
        self._how: How = how
        self._limit = limit
        self._point = 0
        self._ended = False

    def __aiter__(self) -> CancelSweep[T]:
        return self

    async def __anext__(self) -> Trial[T]:
        if self._ended:
            raise StopAsyncIteration
        self._point += 1
        if self._point > self._limit:
            raise RuntimeError(f"not done after {self._limit} suspension points")
        trio = sys.modules.get("trio")
        if trio is not None and trio.lowlevel.in_trio_task():
            if self._how != "level":
                raise ValueError(f"trio has no {self._how!r} cancellation")
            trial = await self._scoped(lambda cancel: cancel())
        else:
            task = asyncio.create_task(self._in_task())
            await asyncio.wait([task])
            trial = task.result()
        self._ended = trial.completed
        return trial

    async def _in_task(self) -> Trial[T]:
        loop = asyncio.get_running_loop()
        task = asyncio.current_task()
        assert task is not None
        if self._how == "level":
            return await self._scoped(loop.call_soon)
        if self._how == "timeout":
            trial = self._new_trial()
            try:
                async with asyncio.timeout(None) as timeout:
                    # It calls us back in the next cycle by itself.
                    await self._run(trial, lambda _: timeout.reschedule(loop.time()))
            except TimeoutError:
                pass
            return trial
        trial = self._new_trial()
        try:
            await self._run(trial, lambda future: self._native(loop, task, future))
        except asyncio.CancelledError:
            while task.uncancel():
                pass
        return trial

    def _native(
        self, loop: asyncio.AbstractEventLoop, task: asyncio.Task[Any], future: Any
    ) -> None:
        if self._how == "edge-late" and asyncio.isfuture(future):
            # Before the task adds its own callback, so that ours is called first.
            future.add_done_callback(lambda _: task.cancel())
        else:
            loop.call_soon(task.cancel)

    async def _scoped(self, soon: Callable[[Callable[[], object]], object]) -> Trial[T]:
        trial = self._new_trial()
        with anyio.CancelScope() as scope:
            await self._run(trial, lambda _: soon(scope.cancel))
        return trial

    def _new_trial(self) -> Trial[T]:
        return Trial(self._point, where="", completed=True)

    async def _run(self, trial: Trial[T], cancel: Callable[[Any], object]) -> None:
        def on_suspend(count: int, yielded: Any, coro: Any) -> None:
            if count == self._point:
                trial.completed = False
                trial.where = _where(coro)
                cancel(yielded)
            elif count > self._point and self._how == "edge-repeated":
                cancel(yielded)

        try:
            trial.value = await _Points(self._work(), on_suspend)
        except Exception as exc:
            trial.exception = exc
        except BaseException as exc:
            trial.exception = exc
            raise


class _Points(Awaitable[T]):
    """Passes everything between a coroutine and the event loop on, and sees it suspend."""

    def __init__(
        self, coro: Coroutine[Any, Any, T], on_suspend: Callable[[int, Any, Any], object]
    ) -> None:
        self._coro = coro
        self._on_suspend = on_suspend

    def __await__(self) -> Generator[Any, Any, T]:
        coro = self._coro
        step: Callable[[], Any] = lambda: coro.send(None)  # noqa: E731
        count = 0
        while True:
            try:
                yielded = step()
            except StopIteration as stop:
                return stop.value  # type: ignore[no-any-return]
            count += 1
            self._on_suspend(count, yielded, coro)
            try:
                value = yield yielded
                step = lambda value=value: coro.send(value)  # type: ignore[misc]  # noqa: E731
            except BaseException as exc:
                step = lambda exc=exc: coro.throw(exc)  # type: ignore[misc]  # noqa: E731


def _where(coro: Any) -> str:
    frames = []
    while coro is not None:
        frame = getattr(coro, "cr_frame", None) or getattr(coro, "gi_frame", None)
        if frame is not None:
            code = frame.f_code
            frames.append(f"{Path(code.co_filename).name}:{frame.f_lineno} {code.co_qualname}")
        coro = getattr(coro, "cr_await", None) or getattr(coro, "gi_yieldfrom", None)
    return " > ".join(frames[-4:])
