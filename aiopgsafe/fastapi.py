"""A `Database` in a FastAPI application.

    db = Database("...")
    app = FastAPI(lifespan=lifespan(db))
    app.add_middleware(cancel_on_disconnect)
    add_exception_handlers(app)
    app.include_router(health_router())

    @app.post("/transfers")
    async def transfer(tx: CurrentTransaction) -> None:
        await tx.execute(...)

The last one's COMMIT comes before its response: who is answered 2xx is committed.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, closing
from math import inf
from signal import SIGINT, SIGTERM
from typing import Annotated, Any, TypeAlias, cast

import anyio
import psycopg
from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import JSONResponse
from psycopg import errors
from psycopg_pool import PoolClosed, PoolTimeout, TooManyRequests
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from . import (
    AsyncConnection,
    CommitUnknown,
    Database,
    Draining,
    Transaction,
    TransactionState,
    safe_to_retry,
)

__all__ = [
    "CurrentConnection",
    "CurrentDatabase",
    "CurrentTransaction",
    "add_exception_handlers",
    "cancel_on_disconnect",
    "health_router",
    "lifespan",
]

logger = logging.getLogger("aiopgsafe")

DATABASE = "aiopgsafe"
"""In the state of the application."""


def lifespan(
    db: Database[Any],
    *,
    grace: float = 30.0,
    wait: bool = True,
    signals: Sequence[int] = (SIGTERM, SIGINT),
) -> Callable[[FastAPI], AbstractAsyncContextManager[dict[str, Any]]]:
    """For ``FastAPI(lifespan=...)``: open the database, and drain and close it at the end.

    A server (uvicorn, hypercorn) that is told to stop, by one of `signals`, lets the requests
    end first. Streams of notifications (`Database.listen()`) end at once then; whatever else
    runs has `grace` seconds, requests and background tasks, and is cancelled after them.

    :param grace: seconds, as in `Database.drain()`.
    :param wait: whether an application whose database can't be reached does not start.
    :param signals: as in `signal`, that end the application. Their handlers stay what they are;
        a program that handles one and goes on leaves it out. In another thread than the main
        one, and where they are ignored, nobody is told.

    Raises `ValueError` for a negative `grace`.
    """
    if not grace >= 0:
        raise ValueError(f"grace is a number of seconds, not negative: {grace}")

    @asynccontextmanager
    async def span(app: FastAPI) -> AsyncIterator[dict[str, Any]]:
        await db.open(wait)
        watch = db._stop_watch(grace, signals)
        try:
            setattr(app.state, DATABASE, db)
            with watch:
                yield {DATABASE: db}
        finally:
            with anyio.CancelScope(shield=True):
                await db.drain(watch.leave())

    return span


def current_database(connection: HTTPConnection) -> Database[Any]:
    """The database of the application that a request, or a websocket, belongs to.

    Also of one that it is mounted in. Raises `RuntimeError` if there is no `lifespan()` of ours.
    """
    db = _find_database(connection)
    if db is None:
        raise RuntimeError("no database: FastAPI(lifespan=aiopgsafe.fastapi.lifespan(db))")
    return db


def _find_database(connection: HTTPConnection) -> Database[Any] | None:
    db = connection.scope.get("state", {}).get(DATABASE)
    db = getattr(connection.app.state, DATABASE, None) if db is None else db
    return cast("Database[Any] | None", db)


CurrentDatabase: TypeAlias = Annotated[Database[Any], Depends(current_database)]
"""The application's `Database`."""


async def _connection(db: CurrentDatabase) -> AsyncGenerator[AsyncConnection[Any], None]:
    async with db.connection() as conn:
        yield conn


async def _transaction(db: CurrentDatabase) -> AsyncGenerator[Transaction[Any], None]:
    async with db.transaction() as tx:
        yield tx


# Before the response: with FastAPI's own scope the client has its 200 before the COMMIT, and a
# stream that it reads slowly keeps the connection.

CurrentConnection: TypeAlias = Annotated[
    AsyncConnection[Any], Depends(_connection, scope="function")
]
"""A connection of the pool's, until the function has returned; a transaction is committed then."""

CurrentTransaction: TypeAlias = Annotated[Transaction[Any], Depends(_transaction, scope="function")]
"""A transaction, committed when the function has returned and before the response is sent.

Rolled back if the function raises, `HTTPException` too. What goes through the database in the
function (`db.execute()`, `db.transaction()`, `db.atomic`) belongs to it.
"""


def cancel_on_disconnect(app: ASGIApp) -> ASGIApp:
    """Middleware that cancels a request whose client has gone: ``app.add_middleware(...)``.

    Its query is cancelled on the server then, and its connection used again. Without it a
    plain function runs to its end, for nobody. A COMMIT that has been sent is seen through.
    Add it last: the middleware that is added last is the outermost.
    """
    return _CancelOnDisconnect(app)


class _CancelOnDisconnect:
    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        watched = _Watched(scope, receive, send)
        error: Exception | None = None
        with closing(watched):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(watched.watch, tasks.cancel_scope)
                try:
                    await self._app(scope, watched.receive, watched.send)
                except Exception as exc:  # not in an ExceptionGroup: handlers go by its class
                    error = exc
                tasks.cancel_scope.cancel()
        if error is not None:
            raise error


class _Watched:
    """A request whose client is watched: what the server says of it goes through here.

    Its body is read ahead of the application, but not far. Behind its end the client's
    disconnecting is all that can still come.
    """

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._receive = receive
        self._send = send
        self._passed_on, self._messages = anyio.create_memory_object_stream[Message](inf)
        self._ahead = 0
        self._room = anyio.Event()
        self._answered = False
        self._to_come = inf
        self._error: Exception | None = None
        # To read the body is to ask for it: whether it is wanted the application has to say.
        self._wanted = anyio.Event()
        if not any(name == b"expect" for name, _ in scope["headers"]):
            self._wanted.set()

    def close(self) -> None:
        self._passed_on.close()
        self._messages.close()

    async def receive(self) -> Message:
        """For the application."""
        self._wanted.set()
        try:
            try:
                # Also in a scope that is cancelled: so Starlette asks without waiting.
                message = self._messages.receive_nowait()
            except anyio.WouldBlock:
                message = await self._messages.receive()
        except (anyio.EndOfStream, anyio.ClosedResourceError):
            if self._error is not None:
                raise self._error from None
            return {"type": "http.disconnect"}
        self._ahead -= len(message.get("body", b""))
        self._room.set()
        return message

    async def send(self, message: Message) -> None:
        """Of the application."""
        kind = message["type"]
        if kind == "http.response.start":
            length = dict(message.get("headers", ())).get(b"content-length")
            self._to_come = float(length) if length else inf
        ends = kind == "http.response.body" and not message.get("more_body", False)
        # A client that has all of the announced length has the answer, whatever follows.
        self._to_come -= len(message.get("body", b""))
        if ends or kind == "http.response.pathsend" or self._to_come <= 0:
            # The server calls the end of its answer a disconnecting, too: what still runs
            # then, background tasks, is not the client's.
            self._answered = True
        await self._send(message)

    async def watch(self, scope: anyio.CancelScope) -> None:
        """Cancel when the client has gone."""
        await self._wanted.wait()
        with self._passed_on:
            try:
                while (message := await self._receive())["type"] != "http.disconnect":
                    self._ahead += len(message.get("body", b""))
                    self._passed_on.send_nowait(message)
                    while self._ahead > READ_AHEAD:
                        self._room = anyio.Event()
                        await self._room.wait()
            except Exception as exc:  # the application's to hear
                self._error = exc
                return
        if not self._answered:
            scope.cancel()


READ_AHEAD = 65536
"""Bytes of a body that are kept for an application that hasn't asked for them yet."""

RETRY_AFTER = 1
"""Seconds, for a client that was refused: another instance may have a place sooner."""


def add_exception_handlers(app: FastAPI) -> None:
    """Answer what the database raises.

    503 with Retry-After: no connection was free in time (`PoolTimeout`, `TooManyRequests`);
    the application stops (`Draining`, `PoolClosed`, a statement that was cancelled for it); the
    transaction is rolled back and may be run again (`safe_to_retry()`). Nothing of that
    transaction is done: a function that has committed another one before must answer for itself.

    500 with an "outcome": "unknown" for `CommitUnknown`, a client must not repeat what isn't
    idempotent; "committed" where callbacks of a transaction that is have failed.
    """
    for error in (PoolTimeout, TooManyRequests, PoolClosed, Draining, psycopg.OperationalError):
        app.add_exception_handler(error, _over_http(_unavailable))
    app.add_exception_handler(CommitUnknown, _over_http(_unknown))
    app.add_exception_handler(ExceptionGroup, _over_http(_callbacks_failed))


Answer: TypeAlias = Callable[[Request, Exception], Awaitable[JSONResponse]]


def _over_http(answer: Answer) -> Answer:
    """Not over a websocket, where there is no such answer: the server closes it."""

    async def over_http(request: Request, exc: Exception) -> JSONResponse:
        if request.scope["type"] != "http":
            raise exc
        return await answer(request, exc)

    return over_http


async def _unavailable(request: Request, exc: Exception) -> JSONResponse:
    db = _find_database(request)
    stops = isinstance(exc, errors.QueryCanceled) and db is not None and db.draining
    if stops or isinstance(exc, (Draining, PoolClosed)):
        detail = "The application stops."
    elif isinstance(exc, (PoolTimeout, TooManyRequests)):
        reached = db is None or db.available
        detail = f"The database {'has no connection to spare' if reached else 'is out of reach'}."
    elif safe_to_retry(exc):
        detail = "It was undone by the database, and may be done again."
    else:
        raise exc
    logger.warning("%s %s: %s", request.method, request.url.path, str(exc).partition("\n")[0])
    return JSONResponse(
        {"detail": detail}, status_code=503, headers={"Retry-After": str(RETRY_AFTER)}
    )


async def _unknown(request: Request, exc: Exception) -> JSONResponse:
    detail = "The outcome is unknown: it may have been done. Ask before you repeat it."
    return JSONResponse({"detail": detail, "outcome": "unknown"}, status_code=500)


async def _callbacks_failed(request: Request, exc: Exception) -> JSONResponse:
    if getattr(exc, "outcome", None) is not TransactionState.COMMITTED:
        raise exc
    logger.error("%s %s: %s", request.method, request.url.path, exc, exc_info=exc)
    detail = "It has been done. Something that was to follow it has failed."
    return JSONResponse({"detail": detail, "outcome": "committed"}, status_code=500)


def health_router(*, live: str = "/livez", ready: str = "/readyz") -> APIRouter:
    """Routes for probes: is the process there, and can it reach its database?

    The second one asks nobody: the connections' watchers know (`Database.available`). It is 503
    while the database can't be reached, and as soon as it drains.
    """
    router = APIRouter(tags=["health"])

    @router.get(live)
    async def alive() -> dict[str, str]:
        return {"status": "alive"}

    @router.get(ready)
    async def is_ready(db: CurrentDatabase) -> JSONResponse:
        if db.available and not db.draining:
            return JSONResponse({"status": "ready"})
        status = "draining" if db.draining else "unavailable"
        return JSONResponse(
            {"status": status}, status_code=503, headers={"Retry-After": str(RETRY_AFTER)}
        )

    return router
