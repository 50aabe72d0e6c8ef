"""FaultProxy: against a real server, and against bare sockets where every byte counts."""

from __future__ import annotations

import gc
import os
import random
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import anyio
import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from aiopgsafe.testing import (
    Cut,
    Delay,
    FaultProxy,
    Freeze,
    Message,
    TemporaryServer,
    _loop,
    cancel_request,
    command_complete,
    query,
)
from aiopgsafe.testing._protocol import Framer

STARTUP = b"\0\0\0\x0f\0\3\0\0user\0x\0"
SSL_REQUEST = b"\0\0\0\x08\x04\xd2\x16\x2f"
GSSENC_REQUEST = b"\0\0\0\x08\x04\xd2\x16\x30"


@pytest.fixture(scope="module")
def server() -> Iterator[TemporaryServer]:
    with TemporaryServer() as server:
        server.psql("CREATE TABLE t (v text)")
        yield server


@pytest.fixture
def proxy(server: TemporaryServer) -> Iterator[FaultProxy]:
    server.psql("TRUNCATE t")
    with FaultProxy(server.dsn) as proxy:
        yield proxy
    gc.collect()  # a forgotten socket is a ResourceWarning, here and not in another test


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(60) as pool:
        yield pool


def connect(proxy: FaultProxy, **kwargs: Any) -> closing[psycopg.Connection[tuple[Any, ...]]]:
    return closing(psycopg.connect(proxy.dsn, autocommit=True, **kwargs))


def until(condition: Callable[[], bool]) -> None:
    """Wait for what another process will bring about."""
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def message(letter: str, payload: bytes = b"") -> bytes:
    return letter.encode() + (len(payload) + 4).to_bytes(4, "big") + payload


class Line:
    """A bare client and a bare server with the proxy between them."""

    def __init__(self) -> None:
        with ExitStack() as stack:
            listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            dsn = make_conninfo(host="127.0.0.1", port=listener.getsockname()[1])
            self.proxy = stack.enter_context(FaultProxy(dsn))
            address = (self.proxy.host, self.proxy.port)
            self.client = stack.enter_context(socket.create_connection(address))
            self.server = stack.enter_context(listener.accept()[0])
            for sock in (self.client, self.server):
                sock.settimeout(10)
            self.client.sendall(STARTUP)
            assert read(self.server, len(STARTUP)) == STARTUP
            self.close = stack.pop_all().close


@pytest.fixture
def line() -> Iterator[Line]:
    with closing(Line()) as line:
        yield line


def read(sock: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        chunk = sock.recv(size - len(data))
        assert chunk, f"the end, after {data!r}"
        data += chunk
    return data


def silent(sock: socket.socket) -> bool:
    """Nothing comes, for as long as we care to wait."""
    old = sock.gettimeout()
    sock.settimeout(0.1)
    try:
        sock.recv(1, socket.MSG_PEEK)
    except TimeoutError:
        return True
    finally:
        sock.settimeout(old)
    return False


def reset(sock: socket.socket) -> bool:
    try:
        return sock.recv(1) != b"" and False
    except ConnectionResetError:
        return True


# What passes


@pytest.mark.parametrize("way", ["dsn", "socket_dsn"])
def test_a_session_through_the_proxy_is_like_one_without(server: TemporaryServer, way: str) -> None:
    with FaultProxy(getattr(server, way)) as proxy, connect(proxy) as connection:
        assert connection.execute("SELECT 1").fetchone() == (1,)
        big = connection.execute("SELECT repeat('x', 3000000), 1").fetchone()
        assert big == ("x" * 3_000_000, 1)
        assert connection.execute("SELECT length(%s)", ("y" * 3_000_000,)).fetchone() == (3000000,)
        with connection.cursor().copy("COPY t FROM STDIN") as copy:
            for _ in range(1000):
                copy.write("z" * 1000 + "\n")
        assert server.psql("SELECT count(*), min(v) = repeat('z', 1000) FROM t") == "1000|t"
        server.psql("TRUNCATE t")


def test_the_dsn_differs_in_the_address_only() -> None:
    with FaultProxy("host=x hostaddr=127.0.0.1 port=1 user=me application_name='a b'") as proxy:
        assert conninfo_to_dict(proxy.dsn) == {
            "host": "127.0.0.1",
            "port": str(proxy.port),
            "user": "me",
            "application_name": "a b",
        }


def test_a_hundred_clients_at_once(proxy: FaultProxy, threads: ThreadPoolExecutor) -> None:
    with ExitStack() as stack:
        connections = [stack.enter_context(connect(proxy)) for _ in range(90)]
        assert proxy.stats.open_connections == 90

        def run(connection: psycopg.Connection[tuple[Any, ...]]) -> int:
            return sum(connection.execute("SELECT 1").rowcount for _ in range(20))

        assert sum(threads.map(run, connections)) == 90 * 20
    until(lambda: proxy.stats.open_connections == 0)


def test_every_byte_goes_through_in_order_however_it_is_split_and_delayed(line: Line) -> None:
    rng = random.Random(1)
    line.proxy.inject(Delay(0.002), "a")
    line.proxy.inject(Delay(0.001), "b", when="after")
    line.proxy.inject(Delay(0), lambda message: len(message.payload) > 100_000)
    sizes = [0, 1, 3, 100, 5_000, 70_000, 200_000]
    stream = b"".join(
        message(rng.choice("abcd"), rng.randbytes(rng.choice(sizes))) for _ in range(100)
    )

    def send(sock: socket.socket) -> None:
        at = 0
        while at < len(stream):
            size = rng.choice([1, 2, 5, 1000, 30_000, 100_000])
            sock.sendall(stream[at : at + size])
            at += size

    for source, sink in ((line.client, line.server), (line.server, line.client)):
        sender = threading.Thread(target=send, args=(source,))
        sender.start()
        assert read(sink, len(stream)) == stream
        sender.join()


def test_messages_are_the_same_however_the_bytes_are_split() -> None:
    rng = random.Random(2)
    messages = [("Q", b"x" * size) for size in (0, 1, 300, 70_000)] * 3
    stream = SSL_REQUEST + STARTUP + b"".join(message(*pair) for pair in messages)
    for whole in (True, False):
        for _ in range(50):
            cuts = sorted(rng.sample(range(len(stream)), 20))
            framer = Framer(startup=True)
            pieces = [
                piece
                for start, end in pairwise([0, *cuts, len(stream)])
                for piece in framer.feed(stream[start:end], lambda letter: whole)  # noqa: B023
            ]
            assert b"".join(piece.data for piece in pieces) == stream
            assert [p.type for p in pieces if p.first] == ["", "", *(t for t, _ in messages)]
            assert sum(piece.last for piece in pieces) == len(messages) + 2
            if whole:
                assert [(p.type, p.payload) for p in pieces][2:] == messages


def test_a_long_message_goes_on_as_it_comes(line: Line) -> None:
    fault = line.proxy.inject(Cut(), "D", when="after")
    head = b"D" + (100_000_000).to_bytes(4, "big") + b"x" * 99_995
    line.server.sendall(head)
    assert read(line.client, len(head)) == head
    assert fault.hits == 0


def test_a_predicate_sees_the_whole_of_a_long_message(line: Line) -> None:
    seen = []

    def predicate(message: Message) -> bool:
        seen.append(message)
        return True

    line.proxy.inject(Delay(0), predicate)
    line.server.sendall(message("D", b"x" * 1_000_000))
    assert read(line.client, 1_000_005) == message("D", b"x" * 1_000_000)
    assert seen == [Message("backend", "D", b"x" * 1_000_000)]


def test_a_client_that_does_not_read_makes_the_server_wait(line: Line) -> None:
    line.server.settimeout(0.5)
    chunk = message("D", b"x" * 100_000)
    sent = 0
    with suppress(TimeoutError):
        while sent < 1_000_000_000:
            sent += line.server.send(chunk)
    assert sent < 1_000_000_000
    assert len(read(line.client, sent)) == sent


# Ends


def test_a_half_close_is_passed_on_and_the_other_half_goes_on(line: Line) -> None:
    line.client.sendall(b"Q\0\0")  # and dies in mid-sentence
    line.client.shutdown(socket.SHUT_WR)
    assert read(line.server, 3) == b"Q\0\0"
    assert line.server.recv(1) == b""
    line.server.sendall(message("Z"))
    assert read(line.client, 5) == message("Z")
    line.server.close()
    assert line.client.recv(1) == b""
    until(lambda: not line.proxy._relay.connections)


@pytest.mark.parametrize("side", ["client", "server"])
def test_a_reset_is_passed_on(line: Line, side: str) -> None:
    sock, other = line.client, line.server
    if side == "server":
        sock, other = other, sock
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    sock.close()
    assert reset(other)


def test_a_client_that_is_gone_does_not_keep_the_server(line: Line) -> None:
    line.client.close()
    with suppress(ConnectionResetError, BrokenPipeError):
        while True:
            line.server.sendall(message("D", b"x" * 100_000))
    line.server.close()
    until(lambda: not line.proxy._relay.connections)


def test_what_is_no_protocol_is_reset(line: Line) -> None:
    with socket.create_connection((line.proxy.host, line.proxy.port)) as sock:
        sock.sendall(b"GET / HTTP/1.0\r\n\r\n")
        assert reset(sock)
    line.server.sendall(b"Z\0\0\0\3")
    assert reset(line.client)
    assert reset(line.server)


@pytest.mark.parametrize("way", ["tcp", "unix"])
def test_a_server_that_is_down_resets_the_client(way: str, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    host = "127.0.0.1" if way == "tcp" else str(tmp_path)
    with (
        FaultProxy(make_conninfo(host=host, port=port)) as proxy,
        socket.create_connection((proxy.host, proxy.port)) as sock,
    ):
        assert reset(sock)


# Cut


def test_a_commit_cut_before_it_is_passed_on_never_happens(
    server: TemporaryServer, proxy: FaultProxy
) -> None:
    fault = proxy.inject(Cut(), query("commit"))
    with closing(psycopg.connect(proxy.dsn)) as connection:
        connection.execute("INSERT INTO t VALUES ('x')")
        with pytest.raises(psycopg.OperationalError):
            connection.commit()
        fault.wait()
    until(
        lambda: (
            server.psql(
                "SELECT count(*) FROM pg_stat_activity WHERE xact_start < now() "
                "AND backend_type = 'client backend'"
            )
            == "0"
        )
    )
    assert server.psql("SELECT count(*) FROM t") == "0"
    assert fault.hits == 1


@pytest.mark.parametrize("how", ["rst", "fin"])
@pytest.mark.parametrize("after", ["request", "reply"])
def test_a_commit_cut_after_it_was_passed_on_happens(
    server: TemporaryServer, proxy: FaultProxy, how: Any, after: str
) -> None:
    if after == "request":
        proxy.inject(Cut(how), query("COMMIT"), when="after")
    else:
        proxy.inject(Cut(how), command_complete("COMMIT"))
    for i in range(1, 21):
        with closing(psycopg.connect(proxy.dsn)) as connection:
            connection.execute("INSERT INTO t VALUES ('x')")
            with pytest.raises(psycopg.OperationalError):
                connection.commit()
        until(lambda: server.psql("SELECT count(*) FROM t") == str(i))  # noqa: B023


def test_a_cut_is_a_reset_or_an_end_of_file(line: Line) -> None:
    line.proxy.inject(Cut("fin"), "E")
    line.server.sendall(message("N") + message("E", b"x" * 1000) + message("Z"))
    assert read(line.client, 5) == message("N")
    assert line.client.recv(1) == b""
    assert line.server.recv(1) == b""
    for sock in (line.client, line.server):
        for _ in range(3):  # which nobody reads; and yet there is no reset
            sock.sendall(message("X"))
            assert sock.recv(1) == b""

    with closing(Line()) as other:
        other.proxy.inject(Cut(), "E", when="after")
        other.server.sendall(message("E") + message("Z"))
        assert read(other.client, 5) == message("E")
        assert reset(other.client)
        assert reset(other.server)


@pytest.mark.parametrize("end", ["release", "clear", "cut", "close"])
def test_in_a_partition_the_server_goes_on_until_it_is_over(
    server: TemporaryServer, proxy: FaultProxy, end: str
) -> None:
    fault = proxy.inject(Cut(server=False), command_complete("INSERT"))
    with closing(psycopg.connect(proxy.dsn)) as connection:
        pid = connection.info.backend_pid
        session = f"SELECT count(*) FROM pg_stat_activity WHERE pid = {pid}"
        with pytest.raises(psycopg.OperationalError):
            connection.execute("INSERT INTO t SELECT repeat('x', 100) RETURNING repeat(v, 99999)")
        fault.wait()
        assert proxy.stats.open_connections == 0
        assert server.psql(session + " AND state = 'idle in transaction'") == "1"
        fault.remove()
        assert server.psql(session) == "1"
        fault.release() if end == "release" else getattr(proxy, end)()
        until(lambda: server.psql(session) == "0")


def test_a_partition_is_over_when_the_server_gives_up(line: Line) -> None:
    fault = line.proxy.inject(Cut(server=False), "Q", when="after")
    line.client.sendall(message("Q"))
    assert reset(line.client)
    assert read(line.server, 5) == message("Q")
    line.server.sendall(message("D", b"x" * 5_000_000))  # read, by nobody
    line.server.close()
    until(lambda: not line.proxy._relay.draining)
    fault.release()


def test_cut_cuts_all_clients_at_once(proxy: FaultProxy) -> None:
    with ExitStack() as stack:
        connections = [stack.enter_context(connect(proxy)) for _ in range(5)]
        fault = proxy.inject(Freeze(), "Q", times=1)
        connections[0].pgconn.send_query(b"SELECT 1")
        fault.wait()
        assert proxy.cut() == 5
        assert proxy.cut() == 0
        for connection in connections[1:]:
            with pytest.raises(psycopg.OperationalError):
                connection.execute("SELECT 1")
    with connect(proxy) as connection:
        assert connection.execute("SELECT 1").fetchone() == (1,)


def test_a_proxy_that_refuses_resets_new_clients_only(proxy: FaultProxy) -> None:
    with connect(proxy) as connection:
        proxy.refuse = True
        with pytest.raises(psycopg.OperationalError):
            psycopg.connect(proxy.dsn)
        with socket.create_connection((proxy.host, proxy.port)) as sock:
            assert reset(sock)
        connection.execute("SELECT 1")
        proxy.refuse = False
        with connect(proxy) as another:
            another.execute("SELECT 1")


# Freeze


def test_a_frozen_connection_goes_on_where_it_stopped_and_others_never_stop(
    proxy: FaultProxy, threads: ThreadPoolExecutor
) -> None:
    with connect(proxy) as frozen, connect(proxy) as other:
        fault = proxy.inject(Freeze(), command_complete("SELECT"), times=1)
        result = threads.submit(frozen.execute, "SELECT 42")
        fault.wait()
        assert other.execute("SELECT 1").fetchone() == (1,)
        assert not result.done()
        fault.release()
        assert result.result(10).fetchone() == (42,)
        assert frozen.execute("SELECT 43").fetchone() == (43,)
        assert fault.hits == 1


def test_from_the_frozen_message_on_nothing_passes_in_either_direction(line: Line) -> None:
    fault = line.proxy.inject(Freeze(), "C", direction="backend", times=1)
    line.server.sendall(message("D") + message("C") + message("Z"))
    assert read(line.client, 5) == message("D")
    fault.wait()
    line.client.sendall(message("Q"))
    line.client.shutdown(socket.SHUT_WR)
    assert silent(line.client)
    assert silent(line.server)
    fault.release()
    assert read(line.client, 10) == message("C") + message("Z")
    assert read(line.server, 5) == message("Q")
    assert line.server.recv(1) == b""


def test_frozen_after_a_message_the_other_side_has_it(line: Line) -> None:
    fault = line.proxy.inject(Freeze(), "C", when="after")
    line.server.sendall(message("C") + message("Z"))
    assert read(line.client, 5) == message("C")
    fault.wait()
    assert silent(line.client)
    line.proxy.clear()
    assert read(line.client, 5) == message("Z")


def test_a_release_lets_go_and_the_fault_still_acts_until_it_is_removed(line: Line) -> None:
    fault = line.proxy.inject(Freeze(), "C")
    for hits in (1, 2):
        line.server.sendall(message("C"))
        fault.wait()
        assert fault.hits == hits
        fault.release()
        assert read(line.client, 5) == message("C")
    line.server.sendall(message("C"))
    fault.wait()
    fault.remove()
    assert silent(line.client)
    fault.release()
    line.server.sendall(message("C"))
    assert read(line.client, 10) == message("C") * 2
    assert fault.hits == 3


def test_two_faults_that_freeze_must_both_be_released(line: Line) -> None:
    first = line.proxy.inject(Freeze(), "C")
    everything = line.proxy.freeze()
    line.server.sendall(message("C"))
    everything.wait()
    everything.release()
    first.wait()
    again = line.proxy.freeze()
    first.release()
    assert silent(line.client)
    again.release()
    assert read(line.client, 5) == message("C")


def test_clear_releases_also_what_a_fault_would_hold_next(line: Line) -> None:
    first, second = (line.proxy.inject(Freeze(), "C") for _ in range(2))
    line.server.sendall(message("C"))
    first.wait()
    assert second.hits == 0
    line.proxy.clear()
    assert read(line.client, 5) == message("C")


def test_a_predicate_that_blocks_the_proxy_makes_the_others_give_up(
    line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_loop, "TIMEOUT", 0.1)
    entered, leave = threading.Event(), threading.Event()

    def predicate(message: Message) -> bool:
        entered.set()
        return leave.wait(10)

    line.proxy.inject(Delay(0), predicate)
    line.server.sendall(message("C"))
    assert entered.wait(10)
    for call in (line.proxy.cut, line.proxy.close):
        with pytest.raises(TimeoutError, match="predicate"):
            call()
    leave.set()


def test_a_frozen_proxy_holds_sessions_newcomers_and_cancel_requests(
    proxy: FaultProxy, threads: ThreadPoolExecutor
) -> None:
    with connect(proxy) as connection:
        result = threads.submit(connection.execute, "SELECT pg_sleep(30)")
        until(lambda: proxy.stats.frontend_messages["Q"] == 1)
        fault = proxy.freeze()
        assert fault.hits == 1
        fault.wait()
        cancel = threads.submit(connection.cancel_safe)
        newcomer = threads.submit(lambda: psycopg.connect(proxy.dsn))
        with socket.create_connection((proxy.host, proxy.port)) as sock:
            sock.sendall(SSL_REQUEST)
            assert silent(sock)
        assert not any(future.done() for future in (result, cancel, newcomer))
        assert proxy.stats.cancel_requests == 0
        fault.release()
        cancel.result(10)
        with pytest.raises(psycopg.errors.QueryCanceled):
            result.result(10)
        newcomer.result(10).close()
        assert proxy.stats.cancel_requests == 1


# Delay


def test_a_delayed_message_comes_late_and_everything_behind_it_too(line: Line) -> None:
    line.proxy.inject(Delay(0.2), "C")
    start = time.monotonic()
    line.server.sendall(message("D") + message("C") + message("Z"))
    assert read(line.client, 5) == message("D")
    line.client.sendall(message("Q"))
    assert read(line.server, 5) == message("Q")  # the other direction isn't held
    assert read(line.client, 10) == message("C") + message("Z")
    assert time.monotonic() - start >= 0.2


def test_a_delay_after_a_message_holds_those_behind_it(line: Line) -> None:
    line.proxy.inject(Delay(0.2), "C", when="after")
    start = time.monotonic()
    line.server.sendall(message("C") + message("Z"))
    assert read(line.client, 5) == message("C")
    assert read(line.client, 5) == message("Z")
    assert time.monotonic() - start >= 0.2


def test_fifty_connections_are_delayed_at_once(
    proxy: FaultProxy, threads: ThreadPoolExecutor
) -> None:
    with ExitStack() as stack:
        connections = [stack.enter_context(connect(proxy)) for _ in range(50)]
        fault = proxy.inject(Delay(3600), command_complete("SELECT"))
        results = [threads.submit(c.execute, "SELECT 1") for c in connections]
        for _ in results:
            fault.wait()
        assert fault.hits == 50
        assert not any(result.done() for result in results)
        fault.release()
        for result in results:
            assert result.result(10).fetchone() == (1,)


def test_a_delay_on_everything_is_a_longer_way_and_does_not_add_up(proxy: FaultProxy) -> None:
    with connect(proxy) as connection:
        proxy.inject(Delay(0.05), lambda message: True)
        start = time.monotonic()
        cursor = connection.execute("SELECT generate_series(1, 1000)")
        assert time.monotonic() - start >= 0.1
        # A thousand rows of 50 ms each would be 50 s.
        assert time.monotonic() - start < 25
        assert cursor.rowcount == 1000


# Faults in general


def test_a_fault_acts_as_often_as_it_was_told(proxy: FaultProxy) -> None:
    with connect(proxy) as connection:
        fault = proxy.inject(Delay(0), "Q", times=2)
        for _ in range(4):
            connection.execute("SELECT 1")
        assert fault.hits == 2
        fault.wait()
        fault.wait()
        with pytest.raises(TimeoutError):
            fault.wait(0.01)


def test_a_letter_means_one_thing_in_each_direction(line: Line) -> None:
    both = line.proxy.inject(Delay(0), "C")
    close = line.proxy.inject(Delay(0), "C", direction="frontend")
    complete = line.proxy.inject(Delay(0), "C", direction="backend")
    for _ in range(2):
        line.client.sendall(message("C"))
        assert read(line.server, 5) == message("C")
    line.server.sendall(message("C"))
    assert read(line.client, 5) == message("C")
    assert (both.hits, close.hits, complete.hits) == (3, 2, 1)


def test_queries_and_tags_are_found_by_how_they_begin(proxy: FaultProxy) -> None:
    simple = proxy.inject(Delay(0), query("select 1"))
    inserted = proxy.inject(Delay(0), command_complete("INSERT"))
    with connect(proxy) as connection:
        connection.execute("  SELECT 1")
        connection.execute("SELECT 1 + %s", (1,), prepare=True)
        connection.execute("SELECT 2")
        connection.execute("INSERT INTO t VALUES ('select 1')")
    assert simple.hits == 2
    assert inserted.hits == 1


def test_a_predicate_that_fails_is_removed_and_says_so_to_who_waits(proxy: FaultProxy) -> None:
    fault = proxy.inject(Cut(), lambda message: 1 // 0 > 0)
    with connect(proxy) as connection:
        connection.execute("SELECT 1")
    with pytest.raises(RuntimeError, match="predicate") as caught:
        fault.wait()
    assert isinstance(caught.value.__cause__, ZeroDivisionError)

    fault = proxy.inject(Cut(), lambda message: proxy.cut() > 0)
    with connect(proxy) as connection:
        connection.execute("SELECT 1")
    with pytest.raises(RuntimeError, match="predicate"):
        fault.wait()


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_asynchronous_code_waits_without_blocking_and_a_cancelled_wait_takes_no_hit(
    line: Line, backend: str
) -> None:
    fault = line.proxy.inject(Freeze(), "C")

    async def main() -> None:
        with anyio.move_on_after(0.05):
            await fault.reached(1)
        with pytest.raises(TimeoutError):
            await fault.reached(0.05)
        async with anyio.create_task_group() as group:
            group.start_soon(fault.reached)
            await anyio.wait_all_tasks_blocked()
            line.server.sendall(message("C"))
        fault.release()
        line.server.sendall(message("C"))
        await fault.reached()

    anyio.run(main, backend=backend)
    assert fault.hits == 2


@pytest.mark.parametrize(
    ("action", "match", "times"),
    [(Cut(), "CC", None), (Cut(), "C", 0), (Delay(-1), "C", None), (Delay(float("nan")), "C", 1)],
)
def test_nonsense_is_not_injected(proxy: FaultProxy, action: Any, match: str, times: Any) -> None:
    with pytest.raises(ValueError, match=r"C|times|Delay"):
        proxy.inject(action, match, times=times)


# Cancel requests


def test_a_cancel_request_passes_a_frozen_session_and_ends_when_the_server_has_it(
    server: TemporaryServer, proxy: FaultProxy, threads: ThreadPoolExecutor
) -> None:
    with connect(proxy) as connection:
        running = proxy.inject(Freeze(), query("SELECT pg_sleep"), when="after")
        result = threads.submit(connection.execute, "SELECT pg_sleep(30)")
        running.wait()
        pid = connection.info.backend_pid
        active = f"SELECT count(*) FROM pg_stat_activity WHERE pid = {pid} AND state = 'active'"
        until(lambda: server.psql(active) == "1")

        late = proxy.inject(Freeze(), cancel_request())
        cancel: Future[None] = threads.submit(connection.cancel_safe)
        late.wait()
        assert server.psql(active) == "1"
        assert not cancel.done()
        late.release()
        cancel.result(10)
        until(lambda: server.psql(active) == "0")
        assert not result.done()
        running.release()
        with pytest.raises(psycopg.errors.QueryCanceled):
            result.result(10)


# Figures


def test_the_figures_are_exact(proxy: FaultProxy) -> None:
    with connect(proxy) as connection:
        proxy.reset_stats()
        connection.execute("SELECT 1")
        connection.execute("SELECT %s", (1,), prepare=True)
        stats = proxy.stats
        assert stats.round_trips == 3  # Parse and what follows it are two in psycopg
        assert stats.frontend_messages == dict.fromkeys("QPBDE", 1) | {"S": 2}
        assert stats.backend_messages["D"] == 2
        assert (stats.connections, stats.open_connections, stats.cancel_requests) == (0, 1, 0)
        connection.cancel_safe()
        assert proxy.stats.cancel_requests == 1
        assert proxy.stats.open_connections == 1
        assert stats.cancel_requests == 0  # a copy
    until(lambda: proxy.stats.open_connections == 0)
    with connect(proxy):
        assert proxy.stats.connections == 1


# Encryption


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_a_client_may_speak_tls_to_the_proxy(
    server: TemporaryServer,
    tls: ssl.SSLContext,
    version: ssl.TLSVersion,
    threads: ThreadPoolExecutor,
) -> None:
    tls.minimum_version = tls.maximum_version = version
    with FaultProxy(server.dsn, tls=tls) as proxy:
        with connect(proxy, sslmode="require") as connection:
            assert connection.pgconn.ssl_in_use
            row = connection.execute("SELECT repeat('x', 3000000)").fetchone()
            assert row == ("x" * 3_000_000,)
            row = connection.execute("SELECT length(%s)", ("y" * 3_000_000,)).fetchone()
            assert row == (3_000_000,)

            fault = proxy.inject(Freeze(), query("SELECT pg_sleep"), when="after", times=1)
            result = threads.submit(connection.execute, "SELECT pg_sleep(30)")
            fault.wait()
            fault.release()
            until(
                lambda: (
                    server.psql(
                        "SELECT count(*) FROM pg_stat_activity WHERE query LIKE "
                        "'SELECT pg_sleep%' AND state = 'active'"
                    )
                    == "1"
                )
            )
            connection.cancel_safe()
            with pytest.raises(psycopg.errors.QueryCanceled):
                result.result(10)

            for how in ("rst", "fin"):
                with connect(proxy, sslmode="require") as victim:
                    proxy.inject(Cut(how), command_complete("SELECT"), times=1)
                    with pytest.raises(psycopg.OperationalError):
                        victim.execute("SELECT 1")

            server.psql(f"SELECT pg_terminate_backend({connection.info.backend_pid})")
            with pytest.raises(psycopg.errors.AdminShutdown):
                connection.execute("SELECT 1")
        with connect(proxy, sslmode="disable") as connection:
            assert not connection.pgconn.ssl_in_use
            connection.execute("SELECT 1")


def test_clear_text_behind_an_ssl_request_is_reset(
    server: TemporaryServer, tls: ssl.SSLContext
) -> None:
    with FaultProxy(server.dsn, tls=tls) as proxy:
        for bytes_ in (SSL_REQUEST + STARTUP, SSL_REQUEST):
            with socket.create_connection((proxy.host, proxy.port)) as sock:
                sock.sendall(bytes_)
                with suppress(ConnectionResetError):
                    assert sock.recv(1) == b"S"
                    sock.sendall(STARTUP)
                    while sock.recv(100):  # an alert
                        pass
        assert proxy.stats.connections == 0


def test_encryption_is_declined_without_a_context(proxy: FaultProxy) -> None:
    with socket.create_connection((proxy.host, proxy.port)) as sock:
        for request in (GSSENC_REQUEST, SSL_REQUEST):
            sock.sendall(request)
            assert sock.recv(1) == b"N"
    with pytest.raises(psycopg.OperationalError, match="SSL"):
        psycopg.connect(proxy.dsn, sslmode="require")


def test_a_context_for_clients_is_refused() -> None:
    with pytest.raises(ValueError, match="server-side"):
        FaultProxy("", tls=ssl.create_default_context())
    with pytest.raises(ValueError, match="one host"):
        FaultProxy("host=a,b")


# The end of the proxy


def test_close_ends_everything_at_once_whatever_is_held(server: TemporaryServer) -> None:
    threads_before = set(threading.enumerate())
    files_before = len(os.listdir("/dev/fd"))  # noqa: PTH208
    proxy = FaultProxy(server.dsn)
    with pytest.raises(RuntimeError):
        _ = proxy.port
    with pytest.raises(RuntimeError):
        proxy.freeze()
    proxy.start()
    with ExitStack() as stack:
        for action in (Freeze(), Delay(3600), Cut("fin"), Cut(server=False)):
            connection = stack.enter_context(connect(proxy))
            fault = proxy.inject(action, "Q", times=1)
            connection.pgconn.send_query(b"SELECT 1")
            fault.wait()
        everything = proxy.freeze()
        stack.enter_context(socket.create_connection((proxy.host, proxy.port)))
        assert proxy.stats.connections == 4
        proxy.close()
        proxy.close()
    fault.release()
    everything.remove()
    assert proxy.stats.connections == 4
    for call in (proxy.cut, proxy.clear, proxy.freeze, proxy.start):
        with pytest.raises(RuntimeError):
            call()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((proxy.host, proxy.port))
    assert set(threading.enumerate()) == threads_before
    assert len(os.listdir("/dev/fd")) == files_before  # noqa: PTH208


def test_an_idle_proxy_uses_no_cpu(proxy: FaultProxy) -> None:
    with connect(proxy) as connection:
        connection.execute("SELECT 1")
        proxy.freeze()
        before = time.process_time()
        time.sleep(0.2)
        assert time.process_time() - before < 0.1
