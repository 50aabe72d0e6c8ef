"""FastAPI: applications in the test's own loop, and real servers with clients that hang up."""

from __future__ import annotations

import json
import os
import random
import signal
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from time import monotonic
from typing import Annotated, Any

import anyio
import anyio.lowlevel
import httpx2 as httpx
import psycopg
import pytest
from fastapi import BackgroundTasks, Depends, FastAPI, HTTPException, WebSocket
from fastapi.testclient import TestClient
from psycopg_pool import PoolTimeout

from aiopgsafe import CommitUnknown, Database, Draining, TransactionState
from aiopgsafe.fastapi import (
    CurrentConnection,
    CurrentDatabase,
    CurrentTransaction,
    add_exception_handlers,
    cancel_on_disconnect,
    health_router,
    lifespan,
)
from tests.conftest import Figures
from tests.serving import SERVERS, Service
from tests.test_cancel_on_signal import program_handler

Admin = psycopg.Connection[Any]

# httpx leaves the bodies that it sends to the garbage collector; trio warns of that.
pytestmark = pytest.mark.filterwarnings("ignore:Async generator 'httpx2:ResourceWarning")


@asynccontextmanager
async def client_of(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    """As a server would: within the application's lifespan."""
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://test") as client,
    ):
        yield client


@pytest.fixture
def app(dsn: str, admin: Admin) -> FastAPI:
    admin.execute("create table t (id int)")
    db = Database(dsn, min_size=1, max_size=2, timeout=0.2)
    app = FastAPI(lifespan=lifespan(db))
    app.add_middleware(cancel_on_disconnect)
    add_exception_handlers(app)
    app.include_router(health_router())
    return app


def ids(admin: Admin) -> list[int]:
    return [i for (i,) in admin.execute("select id from t order by id")]


@pytest.mark.anyio
async def test_a_transaction_is_committed_before_the_response(app: FastAPI, admin: Admin) -> None:
    seen: list[list[int]] = []

    @app.post("/t")
    async def add(tx: CurrentTransaction, db: CurrentDatabase) -> dict[str, str]:
        await tx.execute("insert into t values (1)")
        await db.execute("insert into t values (2)")  # belongs to it
        async with db.transaction() as inner:
            await inner.execute("insert into t values (3)")
        return {"state": tx.state.value}

    class Look:
        def __init__(self, app: Any) -> None:
            self.app = app

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            async def send_and_look(message: Any) -> None:
                seen.append(ids(admin))
                await send(message)

            await self.app(scope, receive, send_and_look)

    app.add_middleware(Look)
    async with client_of(app) as client:
        response = await client.post("/t")
    assert (response.status_code, response.json()) == (200, {"state": "active"})
    assert seen[0] == [1, 2, 3]


@pytest.mark.anyio
async def test_what_raises_is_rolled_back(app: FastAPI, admin: Admin) -> None:
    @app.post("/{what}")
    async def add(what: str, tx: CurrentTransaction) -> None:
        await tx.execute("insert into t values (1)")
        raise HTTPException(409) if what == "conflict" else KeyError(what)

    async with client_of(app) as client:
        assert (await client.post("/conflict")).status_code == 409
        assert (await client.post("/bug")).status_code == 500
    assert ids(admin) == []


@pytest.mark.anyio
async def test_a_commit_that_fails_is_no_success(app: FastAPI, admin: Admin) -> None:
    admin.execute("alter table t add unique (id) deferrable initially deferred")

    @app.post("/t")
    async def add(tx: CurrentTransaction) -> str:
        await tx.execute("insert into t values (1), (1)")
        return "done"

    async with client_of(app) as client:
        assert (await client.post("/t")).status_code == 500
    assert ids(admin) == []


@pytest.mark.anyio
async def test_what_the_database_raises_is_answered(app: FastAPI) -> None:
    errors = {"timeout": PoolTimeout(), "draining": Draining(), "unknown": CommitUnknown("?")}

    @app.get("/raise/{what}")
    async def fail(what: str) -> None:
        raise errors[what]

    @app.get("/busy")
    async def busy(db: CurrentDatabase, conn: CurrentConnection) -> None:
        async with db.connection(), db.connection():
            pass

    async with client_of(app) as client:
        for path in ("/raise/timeout", "/raise/draining", "/busy"):
            response = await client.get(path)
            assert (response.status_code, response.headers["retry-after"]) == (503, "1"), path
        response = await client.get("/raise/unknown")
        assert response.status_code == 500
        assert response.json()["outcome"] == "unknown"
        assert "fail" not in response.text


@pytest.mark.anyio
async def test_who_may_ask_again_is_told_so(app: FastAPI, admin: Admin) -> None:
    @app.post("/lost")
    async def lose(tx: CurrentTransaction) -> None:
        await tx.execute("insert into t values (1)")
        await tx.execute("select pg_terminate_backend(pg_backend_pid())")

    @app.post("/outside")
    async def outside(db: CurrentDatabase) -> None:
        await db.execute("select pg_terminate_backend(pg_backend_pid())")

    @app.post("/cancelled")
    async def cancelled(tx: CurrentTransaction) -> None:
        await tx.execute("select pg_cancel_backend(pg_backend_pid()), pg_sleep(60)")

    async with client_of(app) as client:
        response = await client.post("/lost")
        assert (response.status_code, response.headers["retry-after"]) == (503, "1")
        assert "undone" in response.json()["detail"]
        # Nobody knows what the statement has done; nor is each cancellation the application's end.
        assert (await client.post("/outside")).status_code == 500
        assert (await client.post("/cancelled")).status_code == 500
    assert ids(admin) == []


@pytest.mark.anyio
async def test_what_is_done_though_its_callback_failed_is_said_to_be(
    app: FastAPI, admin: Admin
) -> None:
    def fail() -> None:
        raise KeyError("a callback's")

    @app.post("/committed")
    async def add(tx: CurrentTransaction) -> None:
        await tx.execute("insert into t values (1)")
        tx.on_commit(fail)

    @app.post("/own")
    async def group() -> None:
        raise ExceptionGroup("the program's own", [KeyError()])

    async with client_of(app) as client:
        response = await client.post("/committed")
        assert (response.status_code, response.json()["outcome"]) == (500, "committed")
        response = await client.post("/own")
        assert (response.status_code, response.text) == (500, "Internal Server Error")
    assert ids(admin) == [1]


@pytest.mark.anyio
async def test_probes_tell_of_the_process_and_of_the_database(app: FastAPI) -> None:
    async with client_of(app) as client:
        db: Database[Any] = app.state.aiopgsafe
        assert (await client.get("/livez")).status_code == 200
        assert (await client.get("/readyz")).json() == {"status": "ready"}
        db.pool._health.down()
        assert (await client.get("/readyz")).json() == {"status": "unavailable"}
        await db.drain(0)
        response = await client.get("/readyz")
        assert (response.status_code, response.json()) == (503, {"status": "draining"})
        assert (await client.get("/livez")).status_code == 200


@pytest.mark.anyio
async def test_background_tasks_are_not_the_clients(app: FastAPI, admin: Admin) -> None:
    @app.post("/t")
    async def add(tasks: BackgroundTasks, db: CurrentDatabase, tx: CurrentTransaction) -> str:
        async def later() -> None:
            await db.execute("insert into t values (2)")

        await tx.execute("insert into t values (1)")
        tasks.add_task(later)
        return "done"

    async with client_of(app) as client:
        assert (await client.post("/t")).status_code == 200
    assert ids(admin) == [1, 2]


@pytest.mark.anyio
async def test_errors_come_through_the_middleware_as_they_are(app: FastAPI) -> None:
    @app.get("/bug")
    async def bug() -> None:
        raise KeyError("bug")

    @app.exception_handler(KeyError)
    async def handle(request: object, exc: Exception) -> Any:
        raise LookupError from exc

    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        with pytest.raises(LookupError):
            await client.get("/bug")


def test_the_test_client_and_websockets(app: FastAPI, admin: Admin) -> None:
    @app.websocket("/ws")
    async def ws(websocket: WebSocket, db: CurrentDatabase) -> None:
        await websocket.accept()
        async with db.transaction() as tx:
            await tx.execute("insert into t values (%s)", (int(await websocket.receive_text()),))
        await websocket.send_text("committed")

    for i in range(2):  # opened and closed each time
        with TestClient(app) as client, client.websocket_connect("/ws") as websocket:
            websocket.send_text(str(i))
            assert websocket.receive_text() == "committed"
            assert ids(admin) == [*range(i + 1)]
            assert client.get("/readyz").status_code == 200


def test_without_its_lifespan_the_application_is_told_so(dsn: str) -> None:
    app = FastAPI()

    @app.get("/")
    async def get(db: CurrentDatabase) -> None: ...

    with pytest.raises(RuntimeError, match="lifespan"):
        TestClient(app).get("/")
    with pytest.raises(ValueError, match="grace"):
        lifespan(Database(dsn), grace=-1)
    unreachable = FastAPI(lifespan=lifespan(Database("host=127.0.0.1 port=1")))
    with pytest.raises(psycopg.OperationalError), TestClient(unreachable):
        pass


async def repository(tx: CurrentTransaction) -> Any:
    await tx.execute("insert into t values (1)")
    return tx


def test_dependencies_can_be_built_upon(app: FastAPI, admin: Admin) -> None:
    @app.post("/t")
    async def add(
        repo: Annotated[Any, Depends(repository, scope="function")], tx: CurrentTransaction
    ) -> bool:
        return repo is tx

    with TestClient(app) as client:
        assert client.post("/t").json() is True
    assert ids(admin) == [1]


def test_a_mounted_application_has_the_database(app: FastAPI) -> None:
    inner = FastAPI()

    @inner.get("/x")
    async def one(db: CurrentDatabase) -> list[int]:
        return list(await (await db.execute("select 1")).fetchone() or ())

    app.mount("/inner", inner)
    with TestClient(app) as client:
        assert client.get("/inner/x").json() == [1]


class Server:
    """The server's side of one request, as ASGI has it."""

    def __init__(self, *body: bytes, headers: tuple[tuple[bytes, bytes], ...] = ()) -> None:
        self.messages: list[Any] = [
            {"type": "http.request", "body": part, "more_body": True} for part in body
        ]
        if self.messages:
            self.messages[-1]["more_body"] = False
        self.asked = 0
        self.gone = anyio.Event()
        self.scope = {"type": "http", "headers": [*headers]}

    async def receive(self) -> Any:
        self.asked += 1
        if self.messages:
            return self.messages.pop(0)
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        await anyio.lowlevel.checkpoint()


@pytest.mark.anyio
async def test_a_body_that_nobody_reads_hides_no_disconnect() -> None:
    server = Server(*[b"abc"] * 100)

    async def handler(scope: Any, receive: Any, send: Any) -> None:
        server.gone.set()
        await anyio.sleep_forever()

    with anyio.fail_after(5):
        await cancel_on_disconnect(handler)(server.scope, server.receive, server.send)


@pytest.mark.anyio
async def test_a_large_body_is_not_read_ahead() -> None:
    server = Server(*[b"x" * 40_000] * 10)

    async def handler(scope: Any, receive: Any, send: Any) -> None:
        for _ in range(10):
            await anyio.lowlevel.checkpoint()
        assert server.asked == 2
        while (await receive())["more_body"]:
            pass

    await cancel_on_disconnect(handler)(server.scope, server.receive, server.send)


@pytest.mark.anyio
async def test_whoever_asks_is_told_of_the_disconnect() -> None:
    server = Server(b"x")
    told: list[Any] = []

    async def handler(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "http.response.body"})
        server.gone.set()
        with anyio.move_on_after(5):
            told.append(await receive())
        with anyio.CancelScope() as asking:  # as Starlette's is_disconnected()
            asking.cancel()
            told.append(await receive())

    await cancel_on_disconnect(handler)(server.scope, server.receive, server.send)
    assert told == [{"type": "http.disconnect"}] * 2


@pytest.mark.anyio
async def test_a_body_that_waits_to_be_wanted_is_not_asked_for() -> None:
    server = Server(b"x", headers=((b"expect", b"100-continue"),))

    async def handler(scope: Any, receive: Any, send: Any) -> None:
        for _ in range(10):
            await anyio.lowlevel.checkpoint()
        assert server.asked == 0
        assert (await receive())["body"] == b"x"

    await cancel_on_disconnect(handler)(server.scope, server.receive, server.send)


@pytest.mark.anyio
async def test_a_client_that_has_the_announced_length_has_its_answer() -> None:
    """Starlette sends the end of a file in a message of its own, which may come too late."""
    server = Server()
    over: list[str] = []

    async def handler(scope: Any, receive: Any, send: Any) -> None:
        headers = [(b"content-length", b"3")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"abc", "more_body": True})
        server.gone.set()
        for _ in range(10):
            await anyio.lowlevel.checkpoint()
        await send({"type": "http.response.body", "body": b""})
        over.append("background task")

    await cancel_on_disconnect(handler)(server.scope, server.receive, server.send)
    assert over == ["background task"]


@pytest.mark.anyio
async def test_an_error_of_the_servers_is_the_applications_to_hear() -> None:
    server = Server()

    async def broken() -> Any:
        raise LookupError("too large")

    async def handler(scope: Any, receive: Any, send: Any) -> None:
        await receive()

    with pytest.raises(LookupError, match="too large"):
        await cancel_on_disconnect(handler)(server.scope, broken, server.send)


@pytest.mark.anyio
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
async def test_a_server_that_is_told_to_stop_has_its_streams_ended_and_its_requests_after_the_grace(
    dsn: str, admin: Admin, signum: int
) -> None:
    db = Database(dsn)
    app = FastAPI()
    ended: list[str] = []

    async def listen() -> None:
        async with db.listen("c") as subscription:
            listening.set()
            async for _ in subscription:
                pass
        ended.append("stream")

    async def ask() -> None:
        with pytest.raises(psycopg.errors.QueryCanceled):
            await db.execute("select pg_sleep(60)")
        ended.append("request")

    with program_handler(signum) as called:
        async with lifespan(db, grace=0.2)(app):
            listening = anyio.Event()
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(listen)
                tasks.start_soon(ask)
                await listening.wait()
                with anyio.fail_after(10):
                    while admin.execute(RUNNING).fetchone() != (1,):
                        await anyio.lowlevel.checkpoint()
                os.kill(os.getpid(), signum)
        assert called == [signum]
        assert ended == ["stream", "request"]
        assert db.pool.closed
        assert getattr(signal.getsignal(signum), "__module__", "") == program_handler.__module__


@pytest.mark.anyio
async def test_a_signal_that_is_ignored_or_left_out_ends_nothing(dsn: str) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        db = Database(dsn)
        with program_handler(signal.SIGTERM) as called:
            async with lifespan(db, grace=0, signals=[signal.SIGINT])(FastAPI()):
                os.kill(os.getpid(), signal.SIGINT)
                os.kill(os.getpid(), signal.SIGTERM)
                while not called:
                    await anyio.lowlevel.checkpoint()
                async with db.listen("c"):
                    await db.execute("select 1")
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.anyio
async def test_what_ends_in_the_grace_is_let_end(dsn: str) -> None:
    db = Database(dsn)
    with program_handler(signal.SIGTERM) as called:
        async with lifespan(db, grace=60)(FastAPI()):
            os.kill(os.getpid(), signal.SIGTERM)
            while not called:
                await anyio.lowlevel.checkpoint()
            async with db.transaction() as tx:  # of a request that was begun before
                await tx.execute("select pg_sleep(0.1)")
        assert tx.state is TransactionState.COMMITTED
        assert db.pool.closed


# Real servers


@pytest.fixture
def middleware() -> bool:
    return False


@pytest.fixture
def environment() -> dict[str, str]:
    return {}


@pytest.fixture
def graceful() -> int | None:
    return 5


@pytest.fixture(params=SERVERS)
def service(
    request: pytest.FixtureRequest,
    dsn: str,
    admin: Admin,
    middleware: bool,
    environment: dict[str, str],
    graceful: int | None,
) -> Iterator[Service]:
    admin.execute("create table account (id int primary key, balance int)")
    admin.execute("insert into account select i, 1000 from generate_series(1, 10) i")
    admin.execute("create table transfer (id int primary key)")
    options = {"SERVICE_MIDDLEWARE": "1"} if middleware else {}
    options.update(SERVICE_DSN=dsn, **environment)
    service = Service(request.param, "tests.programs.service:app", graceful, **options)
    try:
        service.wait_until_ready()
        yield service
    finally:
        service.end()


def wait_for(admin: Admin, query: str, expected: Any, seconds: float = 1.0) -> None:
    deadline = monotonic() + seconds
    while (found := admin.execute(query.encode()).fetchone()) != (expected,):
        assert monotonic() < deadline, (query, found)


RUNNING = (
    "select count(*) from pg_stat_activity where backend_type = 'client backend'"
    " and pid <> pg_backend_pid() and state <> 'idle'"
)


def transfer_at_random(service: Service, first: int, count: int, seed: int) -> list[int]:
    """Transfers of which a third hang up at a random moment: those that were answered 2xx."""
    chance = random.Random(seed)
    answered = []
    for id in range(first, first + count):
        hang_up = chance.random() * 0.02 if chance.random() < 1 / 3 else None
        body = json.dumps({"id": id, "pause": chance.random() * 0.004})
        try:
            answer = service.request("POST", "/transfers", body, hang_up)
        except ConnectionError:
            continue
        if answer.startswith(b"HTTP/1.1 201"):
            answered.append(id)
    return answered


def run_clients(service: Service, clients: int, each: int) -> set[int]:
    answered: set[int] = set()

    def work(number: int) -> None:
        answered.update(transfer_at_random(service, number * each, each, number))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answered


def check_ledger(admin: Admin, answered: set[int]) -> int:
    """Who was answered is there, once, and money neither came nor went. How many there are."""
    there = {i for (i,) in admin.execute("select id from transfer")}
    assert answered <= there
    assert admin.execute("select sum(balance) from account").fetchone() == (10_000,)
    moved = "select 5000 - sum(balance) from account where id <= 5"
    assert admin.execute(moved).fetchone() == (len(there),)
    return len(there)


@pytest.mark.parametrize("middleware", [False, True], ids=["plain", "BaseHTTPMiddleware"])
def test_clients_that_hang_up_leave_nothing_behind(
    service: Service, admin: Admin, figures: Figures, request: pytest.FixtureRequest
) -> None:
    requests = 2000 if request.config.getoption("--long") else 240
    answered = run_clients(service, 8, requests // 8)
    wait_for(admin, RUNNING, 0)
    committed = check_ledger(admin, answered)
    assert service.request("POST", "/transfers", '{"id": -2}').startswith(b"HTTP/1.1 201")
    figures(requests=requests, answered=len(answered), committed=committed, lies=0)


def test_a_query_stops_when_its_client_hangs_up(service: Service, admin: Admin) -> None:
    for _ in range(20):  # twice as many as the pool has connections
        service.request("GET", "/sleep", hang_up=0.05)
    wait_for(admin, RUNNING, 0)
    assert service.request("GET", "/readyz").startswith(b"HTTP/1.1 200")


def test_background_tasks_and_streams_go_on(service: Service, admin: Admin) -> None:
    assert b"later" in service.request("GET", "/later")
    wait_for(admin, "select count(*) from transfer where id = -1", 1, 5)
    assert b"99" in service.request("GET", "/numbers")
    service.request("GET", "/numbers", hang_up=0.1)
    wait_for(admin, RUNNING, 0)


def test_sigterm_in_the_middle_loses_no_answer(
    service: Service, admin: Admin, figures: Figures
) -> None:
    answered: set[int] = set()
    clients = threading.Thread(target=lambda: answered.update(run_clients(service, 8, 100)))
    clients.start()
    while admin.execute("select count(*) from transfer").fetchone() < (50,):  # type: ignore[operator]
        assert clients.is_alive()
    took = service.stop()
    clients.join()
    assert service.process.returncode in (0, -signal.SIGTERM), service.said()
    assert took < 10
    committed = check_ledger(admin, answered)
    wait_for(admin, RUNNING, 0)
    figures(answered=len(answered), committed=committed, exit_s=round(took, 2))


def begin(service: Service, path: str, answers: list[bytes]) -> threading.Thread:
    thread = threading.Thread(target=lambda: answers.append(service.request("GET", path)))
    thread.start()
    return thread


LISTENS = "select count(*) from pg_stat_activity where query like 'LISTEN%'"


# hypercorn's process that serves gets no signal; it has a timeout in any case.
UVICORNS = [server for server in SERVERS if server.startswith("uvicorn")]


@pytest.mark.parametrize("service", UVICORNS, indirect=True)
@pytest.mark.parametrize("graceful", [None])
def test_streams_of_notifications_do_not_keep_a_server_from_its_end(
    service: Service, admin: Admin
) -> None:
    answers: list[bytes] = []
    client = begin(service, "/events", answers)
    wait_for(admin, LISTENS, 1, 10)
    took = service.stop()
    client.join()
    assert service.process.returncode in (0, -signal.SIGTERM), service.said()
    assert b"listening" in answers[0]
    assert b"end" in answers[0]  # the generator's own
    assert took < 5


@pytest.mark.parametrize("service", UVICORNS, indirect=True)
@pytest.mark.parametrize("graceful", [None])
@pytest.mark.parametrize("environment", [{"SERVICE_GRACE": "0.5"}], ids=["grace"])
def test_a_request_that_would_not_end_is_cancelled_after_the_grace(
    service: Service, admin: Admin
) -> None:
    answers: list[bytes] = []
    client = begin(service, "/sleep", answers)
    wait_for(admin, RUNNING, 1, 10)
    took = service.stop()
    client.join()
    assert answers[0].startswith(b"HTTP/1.1 503"), answers
    assert b"stops" in answers[0]
    assert 0.5 <= took < 5
