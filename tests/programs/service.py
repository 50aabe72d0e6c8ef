"""A service that moves money, for `tests/test_fastapi.py`: uvicorn and hypercorn run it."""

from __future__ import annotations

import os
from typing import Annotated

import anyio
from fastapi import BackgroundTasks, Body, FastAPI
from fastapi.responses import StreamingResponse
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.requests import Request
from starlette.responses import Response

from aiopgsafe import Database
from aiopgsafe.fastapi import (
    CurrentConnection,
    CurrentDatabase,
    CurrentTransaction,
    add_exception_handlers,
    cancel_on_disconnect,
    health_router,
    lifespan,
)

db = Database(os.environ["SERVICE_DSN"], min_size=1, max_size=10, timeout=10)
app = FastAPI(lifespan=lifespan(db, grace=float(os.environ.get("SERVICE_GRACE", "5"))))


async def pass_on(request: Request, call_next: RequestResponseEndpoint) -> Response:
    return await call_next(request)


if os.environ.get("SERVICE_MIDDLEWARE"):
    app.add_middleware(BaseHTTPMiddleware, dispatch=pass_on)
app.add_middleware(cancel_on_disconnect)
add_exception_handlers(app)
app.include_router(health_router())


@app.post("/transfers", status_code=201)
async def transfer(
    tx: CurrentTransaction, id: Annotated[int, Body()], pause: Annotated[float, Body()] = 0.0
) -> dict[str, int]:
    await tx.execute("update account set balance = balance - 1 where id = %s", (1 + id % 5,))
    await tx.execute("select pg_sleep(%s)", (pause,))
    await tx.execute("update account set balance = balance + 1 where id = %s", (6 + id % 5,))
    await tx.execute("insert into transfer values (%s)", (id,))
    return {"id": id}


@app.get("/sleep")
async def sleep(conn: CurrentConnection) -> None:
    await conn.execute("select pg_sleep(60)")


@app.get("/events")
async def events(db: CurrentDatabase) -> StreamingResponse:
    async def lines() -> object:
        async with db.listen("events") as subscription:
            yield "listening\n"
            async for event in subscription:
                yield f"{event}\n"
        yield "end\n"

    return StreamingResponse(lines(), media_type="text/plain")  # type: ignore[arg-type]


@app.get("/later")
async def later(tasks: BackgroundTasks, db: CurrentDatabase) -> str:
    async def note() -> None:
        await db.execute("select pg_sleep(0.2)")
        await db.execute("insert into transfer values (-1)")

    tasks.add_task(note)
    return "later"


@app.get("/numbers")
async def numbers(db: CurrentDatabase) -> StreamingResponse:
    async def lines() -> object:
        for i in range(100):
            await db.execute("select pg_sleep(0.01)")
            yield f"{i}\n"
            await anyio.lowlevel.checkpoint()

    return StreamingResponse(lines(), media_type="text/plain")  # type: ignore[arg-type]
