"""Shows LangGraph keeping its state through a pool of ours: `AsyncPostgresSaver(pool)`.

    python examples/langgraph_checkpoints.py [DSN]

A run of the graph is cancelled in the middle; what was kept is whole, and it goes on from there.
"""

from __future__ import annotations

import asyncio
from typing import Any, TypedDict

from _server import database
from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.postgres.aio import AsyncPostgresSaver
from langgraph.graph import END, START, StateGraph
from psycopg.rows import dict_row

from aiopgsafe import AsyncConnection, AsyncConnectionPool, Database

SCHEMA = "langgraph_example"
STEPS = 5


class State(TypedDict):
    count: int


async def main(dsn: str) -> None:
    async with Database(dsn) as db:
        await db.execute(f"drop schema if exists {SCHEMA} cascade")
        await db.execute(f"create schema {SCHEMA}")
        try:
            await run(dsn)
        finally:
            await db.execute(f"drop schema {SCHEMA} cascade")


async def run(dsn: str) -> None:
    # What LangGraph asks of the connections of a pool.
    options = {
        "autocommit": True,
        "prepare_threshold": 0,
        "row_factory": dict_row,
        "options": f"-c search_path={SCHEMA}",
    }
    in_third = asyncio.Event()
    slow = True

    async def step(state: State) -> State:
        if slow and state["count"] == 2:
            in_third.set()
            await asyncio.sleep(60)
        return {"count": state["count"] + 1}

    graph = StateGraph(State)
    graph.add_node("step", step)
    graph.add_edge(START, "step")
    graph.add_conditional_edges("step", lambda state: END if state["count"] == STEPS else "step")

    pool: AsyncConnectionPool[AsyncConnection[dict[str, Any]]] = AsyncConnectionPool(
        dsn, kwargs=options, min_size=1, max_size=4, open=False
    )
    async with pool:
        saver = AsyncPostgresSaver(pool)  # type: ignore[arg-type]  # pools are invariant
        await saver.setup()
        app = graph.compile(checkpointer=saver)
        config: RunnableConfig = {"configurable": {"thread_id": "1"}}
        first = asyncio.create_task(app.ainvoke({"count": 0}, config))
        await in_third.wait()
        first.cancel()
        await asyncio.wait([first])
        kept = await app.aget_state(config)
        print(f"cancelled in the third of {STEPS} steps: {kept.values['count']} are kept")
        assert kept.values["count"] == 2
        slow = False
        result = await app.ainvoke(None, config)
        print(f"went on from there: {result['count']}")
        assert result["count"] == STEPS
        stats = pool.get_stats()
        assert stats["pool_available"] == stats["pool_size"], stats


if __name__ == "__main__":
    with database() as dsn:
        asyncio.run(main(dsn))
