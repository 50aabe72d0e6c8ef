"""What a second adversary found in outcomes and in what waits: each must stay mended."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import psycopg
import pytest

from aiopgsafe import (
    AsyncConnection,
    CommitUnknown,
    Database,
    Retry,
    TransactionState,
    resolve_commit,
    safe_to_retry,
)
from aiopgsafe._errors import mark_retry
from aiopgsafe._tools.tokens import CREATE
from aiopgsafe.testing import (
    Cut,
    FaultProxy,
    Freeze,
    Message,
    TemporaryServer,
    command_complete,
)
from tests.dropin import Scene, compared

pytestmark = pytest.mark.anyio

Conn = AsyncConnection[Any]
Admin = psycopg.Connection[Any]
COMMITTED, ROLLED_BACK = TransactionState.COMMITTED, TransactionState.ROLLED_BACK
UNKNOWN = TransactionState.UNKNOWN


def ids(admin: Admin) -> list[int]:
    return [i for (i,) in admin.execute("select id from t order by id")]


@pytest.fixture(autouse=True)
def tables(admin: Admin) -> None:
    admin.execute("create table t (id int)")
    admin.execute(CREATE)


@pytest.fixture
async def auto(proxy: FaultProxy, anyio_backend: object) -> AsyncIterator[Conn]:
    conn = await AsyncConnection.connect(proxy.dsn, autocommit=True)
    yield conn
    await conn.close()


@pytest.fixture
async def with_tokens(proxy: FaultProxy, anyio_backend: object) -> AsyncIterator[Conn]:
    conn = await AsyncConnection.connect(proxy.dsn, autocommit=True, commit_token=True)
    yield conn
    await conn.close()


async def table(s: Scene) -> None:
    await s.conn.execute("create table if not exists t (id int)")
    await s.conn.commit()


# How a session writes times


@pytest.fixture(scope="module")
def recovered() -> Iterator[FaultProxy]:
    """A server after a crash, when a number of another history may be somebody else's."""
    with TemporaryServer() as server:
        server.restart("immediate")
        server.psql("create table t (id int)")
        with FaultProxy(server.dsn) as proxy:
            yield proxy


SETTINGS = ["timezone to 'Europe/Berlin'", "datestyle to 'SQL, DMY'"]


@pytest.mark.parametrize("setting", SETTINGS)
async def test_the_sessions_time_zone_makes_no_difference(
    recovered: FaultProxy, anyio_backend: object, setting: str
) -> None:
    async with await AsyncConnection.connect(recovered.dsn, autocommit=True) as conn:
        await conn.execute(f"set {setting}".encode())
        recovered.inject(Cut("rst"), command_complete("COMMIT"), times=1)
        async with conn.transaction() as tx:
            await tx.execute("insert into t values (1)")
            ticket = tx.ticket()
    assert tx.state is COMMITTED
    elsewhere = psycopg.conninfo.make_conninfo(recovered.dsn, options="-c TimeZone=Asia/Tokyo")
    assert await resolve_commit(ticket, elsewhere) is COMMITTED


async def test_a_retry_in_another_time_zone_does_not_double(
    recovered: FaultProxy, anyio_backend: object
) -> None:
    async def elsewhere(conn: Conn) -> None:
        await conn.set_autocommit(True)
        await conn.execute("set timezone to 'Europe/Berlin'")

    async with Database(recovered.dsn, min_size=1, configure=elsewhere) as db:
        await db.execute("delete from t")

        @db.atomic(retry=Retry())
        async def pay() -> None:
            await db.execute("insert into t values (2)")

        recovered.inject(Cut("rst"), command_complete("COMMIT"), times=1)
        await pay()
        assert await (await db.execute("select id from t")).fetchall() == [(2,)]


async def test_the_session_is_ended_whatever_its_time_zone(
    auto: Conn, proxy: FaultProxy, admin: Admin, dsn: str
) -> None:
    """Its COMMIT, frozen in the network, must find nothing: else the retry would double."""
    await auto.execute("set timezone to 'Europe/Berlin'")
    auto.commit_timeout = 1.0
    fault = proxy.inject(Freeze(), lambda m: m.type == "Q" and b"COMMIT" in m.payload, times=1)
    with pytest.raises(psycopg.OperationalError) as lost:
        async with auto.transaction() as tx:
            await tx.execute("insert into t values (1)")
    assert tx.state is ROLLED_BACK
    assert safe_to_retry(lost.value)
    fault.release()
    assert ids(admin) == []


# Tokens


@pytest.fixture
def reader(admin: Admin, proxy: FaultProxy) -> Any:
    """A role whose transactions only read, unless they say otherwise."""
    admin.execute("drop role if exists reader")
    admin.execute("create role reader login")
    admin.execute("alter role reader set default_transaction_read_only to on")
    admin.execute("grant usage on schema aiopgsafe, public to reader")
    admin.execute("grant select, insert on aiopgsafe.token to reader")
    admin.execute("grant all on t to reader")
    yield psycopg.conninfo.make_conninfo(proxy.dsn, user="reader")
    admin.execute("drop owned by reader")
    admin.execute("drop role reader")


async def insert(conn: Conn, **options: Any) -> tuple[TransactionState, str]:
    async with conn.transaction(**options) as tx:
        await tx.execute("insert into t values (1)")
        ticket = tx.ticket()
    return tx.state, ticket


async def insert_after_a_statement(conn: Conn) -> tuple[TransactionState, str]:
    async with conn.transaction() as tx:
        await tx.execute("set transaction read write")
        await tx.execute("insert into t values (1)")
        ticket = tx.ticket()
    return tx.state, ticket


async def insert_by_commit(conn: Conn) -> tuple[TransactionState, str]:
    await conn.set_autocommit(False)
    await conn.set_read_only(False)
    async with conn.transaction() as tx:
        await tx.execute("insert into t values (1)")
        ticket = tx.ticket()
    await conn.commit()
    return tx.state, ticket


async def insert_by_hand(conn: Conn) -> tuple[TransactionState, str]:
    await conn.execute("begin read write")
    async with conn.transaction() as tx:
        await tx.execute("insert into t values (1)")
        ticket = tx.ticket()
    with pytest.raises(psycopg.ProgrammingError, match="ticket"):
        await conn.execute("commit")
    await conn.commit()
    return tx.state, ticket


@pytest.mark.parametrize(
    "do",
    [
        lambda conn: insert(conn, read_only=False),
        insert_after_a_statement,
        insert_by_commit,
        insert_by_hand,
    ],
    ids=["block", "statement", "commit", "by hand"],
)
async def test_a_token_goes_with_every_transaction_that_may_write(
    reader: str, dsn: str, do: Callable[[Conn], Awaitable[tuple[TransactionState, str]]]
) -> None:
    async with await AsyncConnection.connect(reader, autocommit=True, commit_token=True) as conn:
        state, ticket = await do(conn)
    assert state is COMMITTED
    assert await resolve_commit(ticket, dsn) is COMMITTED
    # Asked by a role whose own transactions only read.
    assert await resolve_commit(ticket, reader) is COMMITTED


async def test_a_transaction_that_only_reads_has_no_ticket(with_tokens: Conn) -> None:
    async with with_tokens.transaction(read_only=True) as tx:
        with pytest.raises(psycopg.NotSupportedError, match="only reads"):
            tx.ticket()
        await tx.execute("notify x")
    assert tx.state is COMMITTED
    async with with_tokens.transaction() as tx:
        await tx.execute("set transaction read only")
    assert tx.state is COMMITTED


async def test_a_ticket_is_kept_true_or_its_transaction_fails(with_tokens: Conn, dsn: str) -> None:
    with pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
        async with with_tokens.transaction() as tx:
            ticket = tx.ticket()
            await tx.execute("set transaction read only")
    assert tx.state is ROLLED_BACK
    assert await resolve_commit(ticket, dsn) is ROLLED_BACK


async def test_what_an_earlier_transaction_was_does_not_matter(
    with_tokens: Conn, dsn: str, admin: Admin
) -> None:
    async with with_tokens.transaction(read_only=True) as tx:
        await tx.execute("select 1")
    await with_tokens.execute("begin")
    async with with_tokens.transaction() as tx:
        await tx.execute("insert into t values (1)")
        ticket = tx.ticket()
    await with_tokens.commit()
    assert ids(admin) == [1]
    assert await resolve_commit(ticket, dsn) is COMMITTED


async def test_two_phase_transactions_have_no_ticket(
    with_tokens: Conn, auto: Conn, dsn: str
) -> None:
    for conn in (with_tokens, auto):
        await conn.set_autocommit(False)
        await conn.tpc_begin("x")
        async with conn.transaction() as tx:
            await tx.execute("insert into t values (1)")
            with pytest.raises(psycopg.NotSupportedError, match="coordinator"):
                tx.ticket()
        await conn.tpc_prepare()
        await conn.tpc_rollback()


async def test_a_transaction_that_was_prepared_as_text_is_open(
    auto: Conn, dsn: str, admin: Admin
) -> None:
    with pytest.raises(CommitUnknown):
        async with auto.transaction() as tx:
            await tx.execute("insert into t values (1)")
            ticket = tx.ticket()
            await tx.execute("prepare transaction 'x'")
    assert await resolve_commit(ticket, dsn, timeout=0.2) is UNKNOWN
    admin.execute("commit prepared 'x'")
    assert await resolve_commit(ticket, dsn) is COMMITTED


async def test_a_token_is_asked_for_where_its_row_is(
    with_tokens: Conn, dsn: str, admin: Admin
) -> None:
    _, ticket = await insert(with_tokens)
    assert await resolve_commit(ticket, dsn, dbname="template1", timeout=0.2) is UNKNOWN
    assert await resolve_commit(ticket, dsn) is COMMITTED


async def test_a_token_that_was_deleted_is_not_taken_for_one_that_never_was(
    with_tokens: Conn, dsn: str, admin: Admin
) -> None:
    _, ticket = await insert(with_tokens)
    admin.execute(
        "insert into aiopgsafe.token (token) values ('00000000-0000-0000-0000-000000000000')"
    )
    admin.execute("delete from aiopgsafe.token where token::text !~ '^00000000-0000'")
    assert await resolve_commit(ticket, dsn) is UNKNOWN


@pytest.mark.parametrize("ending", ["select 1; -- x\rcommit", "commit"])
async def test_a_token_that_was_never_sent_tells_nothing(
    with_tokens: Conn, dsn: str, admin: Admin, ending: str
) -> None:
    """For the server a comment ends with CR, too."""
    with pytest.raises(CommitUnknown) as unknown:
        async with with_tokens.transaction() as tx:
            await tx.execute("insert into t values (1)")
            await tx.execute(ending.encode())
    assert not safe_to_retry(unknown.value)
    assert tx.state is UNKNOWN
    assert ids(admin) == [1]


# What waits


async def test_a_block_around_which_no_transaction_is_does_not_begin_one(
    auto: Conn, admin: Admin
) -> None:
    async with auto.transaction():
        await auto.execute("select 1")
    with pytest.raises(KeyError):
        async with auto.transaction(isolation_level=psycopg.IsolationLevel.SERIALIZABLE) as tx:
            with pytest.raises(psycopg.errors.SyntaxError):
                auto._begin_waits = b"BEGIN NONSENSE"
                await auto.execute("insert into t values (0)")
            with pytest.raises(psycopg.OperationalError, match="has not begun"):
                async with auto.transaction():
                    await auto.execute("insert into t values (1)")
            raise KeyError
    assert tx.state is ROLLED_BACK
    with pytest.raises(CommitUnknown):
        async with auto.transaction():
            await auto.execute("rollback")
            with pytest.raises(psycopg.OperationalError, match="has ended"):
                async with auto.transaction():
                    await auto.execute("insert into t values (2)")
    assert ids(admin) == []


@compared
async def test_deallocate_all_comes_first_or_anywhere(s: Scene) -> None:
    await table(s)
    await s.conn.set_autocommit(True)
    for _ in range(2):
        async with s.conn.transaction():
            await s.conn.execute("deallocate all")
            await s.conn.execute("insert into t values (0)")
            async with s.conn.transaction("sp"):
                await s.conn.execute("discard plans; deallocate all")
                await s.conn.execute("insert into t values (1)")
                with s.fails():
                    async with s.conn.transaction("sp"):
                        await s.conn.execute("do $$ begin execute 'deallo' || 'cate all'; end $$")
                        await s.conn.execute("select 1/0")
                await s.conn.execute("insert into t values (3)")
    s.note(await s.elsewhere("select id from t order by id"))
    await s.conn.set_autocommit(False)
    await s.conn.execute("deallocate all")
    await s.conn.commit()
    await s.conn.execute("insert into t values (4)")
    await s.conn.commit()
    s.note(await s.elsewhere("select count(*) from t"))


@compared
async def test_savepoints_of_one_name_that_fail_inside_one_another(s: Scene) -> None:
    await table(s)
    await s.conn.set_autocommit(True)
    for _ in range(3):
        async with s.conn.transaction():
            await s.conn.execute("select %s", (1,), prepare=True)
            with s.fails():
                async with s.conn.transaction("sp"):
                    with s.fails():
                        async with s.conn.transaction("sp"):
                            await s.conn.execute("select 1/0")
                    raise KeyError
            await s.conn.execute("insert into t values (1)")
    s.note(await s.elsewhere("select count(*) from t"))


@compared
async def test_cursors_on_the_server_are_closed_behind_a_savepoint_that_failed(s: Scene) -> None:
    await table(s)
    for factory in (None, psycopg.AsyncRawServerCursor):
        if factory is not None:
            s.conn.server_cursor_factory = factory
        async with s.conn.transaction():
            cur = s.conn.cursor("c", withhold=True)
            await cur.execute("select generate_series(1, 3)")
            with s.fails():
                async with s.conn.transaction():
                    await s.conn.execute("select 1/0")
            await cur.close()
            async with s.conn.cursor("c") as cur:
                await cur.execute("select generate_series(1, 3)")
                with s.fails():
                    async with s.conn.transaction():
                        await s.conn.execute("select 1/0")
                await cur.execute("select generate_series(1, 4)")
                s.note(await cur.fetchall())
        await s.conn.commit()
        s.note(await s.fetch("select name from pg_cursors where name <> ''"))
        await s.conn.commit()


@compared
async def test_prepared_statements_do_not_pile_up_behind_rollbacks(s: Scene) -> None:
    await table(s)
    await s.conn.set_autocommit(True)
    for ending in ("block", "rollback"):
        for i in range(5):
            await s.conn.set_autocommit(ending == "block")
            with s.fails():
                async with s.conn.transaction():
                    await s.conn.execute(f"select {i}, %s".encode(), (1,), prepare=True)
                    with s.fails():
                        async with s.conn.transaction():
                            await s.conn.execute("select 1/0")
                    raise KeyError
            await s.conn.rollback()
        found = "select count(*) from pg_prepared_statements where name not like '_aiopgsafe%'"
        s.note(await s.fetch(found))
        await s.conn.rollback()


@compared
async def test_a_function_in_sql_is_no_end_of_the_transaction(s: Scene) -> None:
    await table(s)
    if (await s.fetch("select current_setting('server_version_num')::int"))[0] < (140000,):
        return
    body = (
        "create function {}() returns int language sql begin atomic"
        " select case when true then 1 else 2 end; select 3; end"
    )
    await s.conn.rollback()
    async with s.conn.transaction():
        await s.conn.execute(body.format("f").encode())
        await s.conn.execute("insert into t values (1)")
    await s.conn.execute(body.format("g").encode())
    await s.conn.commit()
    s.note(await s.fetch("select f(), g(), (select count(*) from t)"))
    await s.conn.execute("commit; begin; insert into t values (2)")
    s.status()
    await s.conn.commit()
    s.note(await s.elsewhere("select count(*) from t"))


async def test_the_program_may_end_one_transaction_and_begin_another(
    conn: Conn, admin: Admin
) -> None:
    await conn.execute("insert into t values (1)")
    for text in ("commit; begin", "rollback and chain", "rollback; begin"):
        await conn.execute(text.encode())
        await conn.execute("insert into t values (1)")
        await conn.commit()
    assert ids(admin) == [1] * 4


# Streams and COPY


STREAMS = ["select generate_series(1, 3)", "select i from t, generate_series(1, 2) i"]


@compared
async def test_what_rides_behind_a_stream_has_results_of_its_own(s: Scene) -> None:
    """libpq keeps the mode of a stream until something is sent outside of a pipeline."""
    await table(s)
    await s.conn.set_autocommit(True)
    insert = "insert into t values (1), (2) returning id"

    async def stream(size: int) -> None:
        cur = s.conn.cursor()
        s.note([row async for row in cur.stream(STREAMS[0].encode(), size=size)])

    for size in (1, 2):
        for in_block in (False, True):
            if not in_block:
                await stream(size)
            async with s.conn.transaction():
                if in_block:
                    await stream(size)
                async with s.conn.transaction():
                    cur = await s.conn.execute(insert)
                    s.note(await cur.fetchall(), cur.rowcount, cur.statusmessage)
                await stream(size)
        await stream(size)
        cur = await s.conn.execute("with a as (select 1 x) select 'insert', x from a")
        s.note(await cur.fetchall())
    await s.conn.set_autocommit(False)
    for _ in range(2):
        await stream(1)
        cur = await s.conn.execute(insert)
        s.note(await cur.fetchall())
        await s.conn.commit()
    s.note(await s.elsewhere("select count(*) from t"))


@compared
async def test_a_stream_may_be_the_first_statement_of_a_connection(s: Scene) -> None:
    """Its BEGIN asks for the server's history, in a pipeline, before it."""
    await table(s)
    await s.conn.commit()
    async with s.another() as conn:
        s.note([row async for row in conn.cursor().stream(STREAMS[0].encode())])
        cur = await conn.execute("insert into t values (1) returning id")
        s.note(await cur.fetchall())
        await conn.commit()
    s.note(await s.elsewhere("select count(*) from t"))


async def test_a_stream_that_writes_leaves_the_outcome_to_be_asked_for(
    auto: Conn, proxy: FaultProxy, admin: Admin
) -> None:
    admin.execute(
        "create function write() returns int language sql as 'insert into t values (1) returning 1'"
    )
    async with auto.transaction():
        await auto.execute("select 1")
    proxy.inject(Cut("rst"), command_complete("COMMIT"), times=1)
    async with auto.transaction() as tx:
        assert [row async for row in auto.cursor().stream("select write()")] == [(1,)]
    assert tx.state is COMMITTED
    assert ids(admin) == [1]


async def test_what_is_lost_before_commit_is_known_to_be(auto: Conn, proxy: FaultProxy) -> None:
    """After a stream an empty query goes before COMMIT; it is not COMMIT."""
    async with auto.transaction():
        await auto.execute("select 1")

    def empty(message: Message) -> bool:
        return message.type == "Q" and message.payload == b"\0"

    proxy.inject(Cut("rst"), empty, direction="frontend", times=1)
    with pytest.raises(psycopg.OperationalError) as caught:
        async with auto.transaction() as tx:
            assert [row async for row in auto.cursor().stream("select 1")] == [(1,)]
    assert tx.state is ROLLED_BACK
    assert safe_to_retry(caught.value)


@pytest.mark.parametrize(
    "statement", ["commit", "copy t from stdin; commit", "copy t to stdout; commit"]
)
async def test_a_commit_by_copy_is_seen(
    auto: Conn, with_tokens: Conn, dsn: str, statement: str
) -> None:
    undone: list[str] = []
    with pytest.raises((psycopg.Error, ValueError)):
        async with auto.transaction() as tx:
            await tx.execute("insert into t values (1)")
            tx.on_rollback(undone.append, "undone")
            async with auto.cursor().copy(statement.encode()) as copy:
                if "stdin" in statement:
                    await copy.write_row((2,))
    assert tx.state is UNKNOWN
    assert undone == []
    with pytest.raises(psycopg.ProgrammingError, match="ticket"):
        async with with_tokens.transaction() as tx:
            await tx.execute("insert into t values (1)")
            ticket = tx.ticket()
            async with with_tokens.cursor().copy(statement.encode()):
                pass
    assert tx.state is ROLLED_BACK
    assert await resolve_commit(ticket, dsn) is ROLLED_BACK


async def test_a_transaction_that_is_gone_is_not_called_rolled_back(
    auto: Conn, admin: Admin
) -> None:
    """Ended where nobody can see it: by libpq itself, here."""
    undone: list[str] = []
    with pytest.raises(KeyError):
        async with auto.transaction() as tx:
            await tx.execute("insert into t values (1)")
            tx.on_rollback(undone.append, "undone")
            auto.pgconn.exec_(b"commit")
            raise KeyError
    assert tx.state is UNKNOWN
    assert undone == []
    assert ids(admin) == [1]


async def test_begin_atomic_is_a_body_only_where_something_is_created(
    with_tokens: Conn, admin: Admin
) -> None:
    admin.execute('create table u ("begin" int)')
    with pytest.raises(psycopg.ProgrammingError, match="ticket"):
        async with with_tokens.transaction() as tx:
            tx.ticket()
            await tx.execute("select begin atomic from u; commit")
    assert tx.state is ROLLED_BACK


# Errors


async def test_a_mark_that_says_unsafe_stays(auto: Conn, dsn: str) -> None:
    """An error of another connection goes through the block of one that is lost, too."""
    async with await AsyncConnection.connect(dsn, autocommit=True) as other:
        for kind in ("unknown", "marked", "lost"):
            conn = await AsyncConnection.connect(dsn, autocommit=True)
            error: Exception = (
                CommitUnknown("?") if kind == "unknown" else psycopg.OperationalError()
            )
            if kind == "marked":
                mark_retry(error, safe=False)
            with pytest.raises(psycopg.OperationalError) as raised:
                async with conn.transaction():
                    await conn.execute("select 1")
                    await other.execute(
                        "select pg_terminate_backend(%s, 5000)", (conn.info.backend_pid,)
                    )
                    if kind == "lost":
                        await auto.execute("select pg_terminate_backend(pg_backend_pid())")
                    while not conn.closed:
                        with pytest.raises(psycopg.OperationalError):
                            await conn.execute("select 1")
                    raise error
            assert not safe_to_retry(raised.value), kind


async def test_no_answer_to_what_goes_before_commit_is_no_doubt(
    auto: Conn, proxy: FaultProxy, admin: Admin
) -> None:
    auto.commit_timeout = 0.5

    def rolls_back_to(message: Message) -> bool:
        return message.type == "Q" and b"ROLLBACK TO" in message.payload

    with pytest.raises(psycopg.OperationalError) as raised:
        async with auto.transaction() as tx:
            await tx.execute("insert into t values (1)")
            with pytest.raises(psycopg.errors.DivisionByZero):
                async with auto.transaction():
                    await auto.execute("select 1/0")
            proxy.inject(Freeze(), rolls_back_to, times=1)
    assert not isinstance(raised.value, CommitUnknown)
    assert tx.state is ROLLED_BACK
    assert safe_to_retry(raised.value)
    assert ids(admin) == []
