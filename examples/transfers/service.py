"""The service: accounts, transfers, and a feed of what happens, with a page that shows it.

    make serve                                  # with a PostgreSQL of its own
    TRANSFERS_DSN=... uvicorn --app-dir examples transfers.service:app

- `POST /transfers`: moves money, once for each idempotency key, however often it is sent.
- `GET /events`: Server-Sent Events, fed by `Database.listen()`; a gap where some may be missed.
- `GET /`: the page.
"""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anyio
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse
from fastapi.staticfiles import StaticFiles
from psycopg.rows import dict_row
from pydantic import BaseModel, Field
from starlette.types import ASGIApp, Receive, Scope, Send

from aiopgsafe import Database, Gap
from aiopgsafe.fastapi import (
    CurrentDatabase,
    CurrentTransaction,
    add_exception_handlers,
    cancel_on_disconnect,
    health_router,
    lifespan,
)

HERE = Path(__file__).parent
CHANNEL = "transfers"
OPENING_BALANCE = 1000

SCHEMA = """
    create table if not exists account (
        id int primary key, name text not null, balance int not null check (balance >= 0)
    );
    create table if not exists transfer (
        id bigint generated always as identity primary key, key text not null unique,
        source int not null references account, target int not null references account,
        amount int not null check (amount > 0), made timestamptz not null default now()
    );
"""
NAMES = ("Ada", "Barbara", "Edsger", "Frances", "Grace", "Katherine", "Leslie", "Tony")


async def create_schema(db: Database[Any]) -> None:
    async with db.transaction() as tx:
        await tx.execute(SCHEMA)
        for number, name in enumerate(NAMES, 1):
            await tx.execute(
                "insert into account values (%s, %s, %s) on conflict do nothing",
                (number, name, OPENING_BALANCE),
            )


db = Database(os.environ.get("TRANSFERS_DSN", ""), max_size=10, timeout=2)


class Service(FastAPI):
    """Counts what nobody else sees."""

    held_back = 0


class CountHeldBack:
    """Counts clients that went away while their transfer was committed: it is, all the same."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self.app(scope, receive, send)
        except anyio.get_cancelled_exc_class():
            app.held_back += scope.get("committed", False)
            raise


app = Service(title="Transfers", lifespan=lifespan(db, grace=10))
app.add_middleware(CountHeldBack)
app.add_middleware(cancel_on_disconnect)
add_exception_handlers(app)
app.include_router(health_router())
app.mount("/static", StaticFiles(directory=HERE / "static"), name="static")


class Transfer(BaseModel):
    key: str = Field(min_length=1, max_length=100, description="the same key, the same transfer")
    source: int
    target: int
    amount: int = Field(gt=0)


@app.post("/transfers", status_code=201)
async def transfer(wanted: Transfer, tx: CurrentTransaction, request: Request) -> JSONResponse:
    """Move money. Repeated with the same key it changes nothing, and answers as before: 200."""
    tx.on_commit(request.scope.__setitem__, "committed", True)
    cur = await tx.execute(
        "insert into transfer (key, source, target, amount) values (%s, %s, %s, %s)"
        " on conflict (key) do nothing returning id",
        (wanted.key, wanted.source, wanted.target, wanted.amount),
    )
    made = await cur.fetchone()
    if made is None:
        cur = await tx.execute(
            "select id, (source, target, amount) = (%s, %s, %s) from transfer where key = %s",
            (wanted.source, wanted.target, wanted.amount, wanted.key),
        )
        before = await cur.fetchone()
        if before is None or not before[1]:
            raise HTTPException(409, "the key belongs to another transfer")
        return JSONResponse({"id": before[0]}, status_code=200)
    # In the order of their numbers: two transfers between the same accounts don't deadlock.
    for account in sorted((wanted.source, wanted.target)):
        change = wanted.amount if account == wanted.target else -wanted.amount
        cur = await tx.execute(
            "update account set balance = balance + %s where id = %s and balance + %s >= 0"
            " returning balance",
            (change, account, change),
        )
        if await cur.fetchone() is None:
            raise HTTPException(422, f"account {account} has not got {wanted.amount}")
    event = {"id": made[0], **wanted.model_dump(exclude={"key"})}
    await tx.execute("select pg_notify(%s, %s)", (CHANNEL, json.dumps(event)))
    return JSONResponse({"id": made[0]}, status_code=201)


@app.get("/accounts")
async def accounts(db: CurrentDatabase) -> list[dict[str, Any]]:
    async with db.connection() as conn, conn.cursor(row_factory=dict_row) as cur:
        await cur.execute("select id, name, balance from account order by id")
        return await cur.fetchall()


@app.get("/status")
async def status(db: CurrentDatabase) -> dict[str, Any]:
    """What the page shows beside the accounts."""
    stats = db.pool.get_stats()
    return {
        "available": db.available,
        "pool_size": stats["pool_size"],
        "pool_used": stats["pool_size"] - stats["pool_available"],
        "waiting": stats["requests_waiting"],
        "held_back": app.held_back,
    }


@app.get("/events")
async def events(db: CurrentDatabase) -> StreamingResponse:
    async def feed() -> AsyncIterator[str]:
        yield "retry: 500\n\n"
        async with db.listen(CHANNEL) as subscription:
            yield "event: ready\ndata: {}\n\n"
            async for item in subscription:
                if isinstance(item, Gap):
                    yield "event: gap\ndata: {}\n\n"
                else:
                    yield f"event: transfer\ndata: {item.payload}\n\n"

    return StreamingResponse(
        feed(), media_type="text/event-stream", headers={"Cache-Control": "no-store"}
    )


@app.get("/", include_in_schema=False)
async def page() -> FileResponse:
    return FileResponse(HERE / "static" / "index.html")
