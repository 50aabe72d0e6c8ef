"""`CancelSweep` itself: every suspension point is met, in each of the ways."""

from __future__ import annotations

import asyncio
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from aiopgsafe.testing import CancelSweep
from tests.conftest import sweeps

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize(("loop_name", "how"), sweeps())
async def test_every_suspension_point_is_cancelled_once_and_the_last_run_completes(
    how: Any,
) -> None:
    reached: list[int] = []

    async def work() -> str:
        reached.append(0)
        for n in range(1, 4):
            await anyio.lowlevel.checkpoint()
            reached[-1] = n
        return "done"

    trials = [trial async for trial in CancelSweep(work, how=how)]
    assert [trial.point for trial in trials] == list(range(1, len(trials) + 1))
    assert [trial.completed for trial in trials] == [False] * (len(trials) - 1) + [True]
    assert trials[-1].value == "done"
    assert trials[-1].exception is None
    # trio's checkpoint() suspends once or twice, asyncio's may do so too.
    assert len(trials) >= 4
    assert reached[-1] == 3
    assert {0, 1, 2} <= set(reached)
    for trial in trials[:-1]:
        assert trial.exception is not None
        assert "checkpoint" in trial.where


@pytest.mark.parametrize("loop_name", ["asyncio", "uvloop"])
async def test_a_late_cancellation_wins_over_the_result_that_has_come() -> None:
    """The handover race: the future is done, the task has not run yet."""

    async def work() -> None:
        future = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().call_soon(future.set_result, "handed over")
        try:
            await future
        except asyncio.CancelledError:
            seen.append(future.done() and not future.cancelled())
            raise

    for how, done in (("edge", False), ("edge-late", True)):
        seen: list[bool] = []
        sweep = CancelSweep(work, how=how)  # type: ignore[arg-type]
        assert [trial.completed async for trial in sweep] == [False, True]
        assert seen == [done] or how == "edge"


@pytest.mark.parametrize("loop_name", ["asyncio", "uvloop"])
async def test_a_function_that_swallows_the_cancellation_is_seen_to() -> None:
    async def work() -> str:
        try:
            await asyncio.sleep(0)
        except asyncio.CancelledError:
            return "swallowed"
        return "done"

    trials = [trial async for trial in CancelSweep(work)]
    assert [trial.value for trial in trials] == ["swallowed", "done"]


async def test_ways_that_do_not_exist_are_refused(loop_name: str) -> None:
    async def work() -> None:
        await anyio.lowlevel.checkpoint()

    with pytest.raises(ValueError, match="how"):
        CancelSweep(work, how="twice")  # type: ignore[arg-type]
    if loop_name == "trio":
        with pytest.raises(ValueError, match="trio"):
            [trial async for trial in CancelSweep(work, how="edge")]


async def test_a_function_that_never_ends_is_given_up() -> None:
    async def work() -> None:
        while True:
            await anyio.lowlevel.checkpoint()

    sweep = CancelSweep(work, how="level", limit=5)
    with pytest.raises(RuntimeError, match="5 suspension points"):
        [trial async for trial in sweep]
