"""The future that resumes its task at once keeps to what tasks expect of one."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import anyio
import pytest

from aiopgsafe._backends._asyncio_answer import Answer


@pytest.fixture(params=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Callable[[Callable[[], Awaitable[None]]], None]:
    options = {"use_uvloop": request.param == "uvloop"}
    return lambda main: anyio.run(main, backend="asyncio", backend_options=options)


def new() -> Answer:
    return Answer(asyncio.get_running_loop())


async def wait_for(answer: Answer, order: list[str]) -> object:
    order.append("waits")
    value = await answer
    order.append("has it")
    return value


def test_the_task_goes_on_within_resume(run: Callable[..., None]) -> None:
    async def main() -> None:
        order: list[str] = []
        answer = new()
        task = asyncio.create_task(wait_for(answer, order))
        await asyncio.sleep(0)

        def on_readable() -> None:
            answer.set(42, None)
            answer.resume()
            order.append("callback ends")

        asyncio.get_running_loop().call_soon(on_readable)
        assert await task == 42
        assert order == ["waits", "has it", "callback ends"]

    run(main)


def test_an_error_is_there_for_whoever_asks_again(run: Callable[..., None]) -> None:
    """A cancellation that came between the answer and the task is what the task is told first."""

    async def main() -> None:
        answer = new()
        seen: list[str] = []

        async def stubborn() -> None:
            for _ in range(2):
                try:
                    await answer
                except BaseException as exc:
                    seen.append(type(exc).__name__)

        task = asyncio.create_task(stubborn())
        await asyncio.sleep(0)
        answer.set(None, LookupError("lost"))
        answer.resume_soon()
        task.cancel()
        await task
        assert seen == ["CancelledError", "LookupError"]

    run(main)


def test_a_cancellation_keeps_its_message(run: Callable[..., None]) -> None:
    async def main() -> None:
        answer = new()
        task = asyncio.create_task(wait_for(answer, []))
        await asyncio.sleep(0)
        task.cancel("for a reason")
        with pytest.raises(asyncio.CancelledError, match="for a reason"):
            await task
        assert answer.cancelled()
        assert not answer.cancel()

    run(main)


def test_others_may_watch_it(run: Callable[..., None]) -> None:
    async def main() -> None:
        answer = new()
        called: list[Answer] = []
        answer.add_done_callback(called.append)
        answer.add_done_callback(called.append)
        assert answer.remove_done_callback(called.append) == 2
        answer.add_done_callback(called.append)
        with pytest.raises(asyncio.InvalidStateError):
            answer.result()
        answer.set(1, None)
        answer.resume()
        assert called == [answer]
        answer.add_done_callback(called.append)  # done already: soon
        await asyncio.sleep(0)
        assert called == [answer, answer]
        assert await answer == 1

    run(main)
