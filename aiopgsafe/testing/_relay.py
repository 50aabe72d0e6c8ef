"""The connections that go through a proxy. All of this belongs to the proxy's thread."""

from __future__ import annotations

import selectors
import socket
import ssl
import time
from collections import Counter, deque
from collections.abc import Generator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any, Literal

from ._faults import Cut, Fault, Faults, Freeze, Stats
from ._loop import Loop, Socket
from ._protocol import (
    CANCEL_REQUEST,
    GSSENC_REQUEST,
    SSL_REQUEST,
    Direction,
    Framer,
    Piece,
    ProtocolError,
)

Address = tuple[int, Any]  # family, and what connect() takes

# Bytes per connection and direction; with more than that waiting, the proxy stops to read.
_MAX_WAITING = 1024 * 1024


class Pipe:
    """One direction of a connection: takes messages in, lets the faults act, passes them on."""

    def __init__(
        self, connection: Connection, direction: Direction, source: Socket, sink: Socket
    ) -> None:
        self._connection = connection
        self._relay = connection.relay
        self._direction = direction
        self.source = source
        self._sink = sink
        self._framer = Framer(startup=direction == "frontend")
        self._pieces: deque[Piece] = deque()  # read, and still to pass the faults
        self._waiting = 0  # bytes in pieces
        self.out = bytearray()  # past the faults, for the kernel to take
        self.end: Literal["fin", "rst"] | None = None  # how the source has ended
        self._broken = False  # the sink takes nothing any more
        self.done = False  # the end was passed on, or there is nobody to pass it on to
        self.flow = self._flow()

    @property
    def full(self) -> bool:
        return self._waiting + len(self.out) >= _MAX_WAITING

    def read(self) -> None:
        """Take what the source has to say, and split it into messages."""
        try:
            data = self.source.receive()
            if data is None:
                return
            if not data:
                self.end = "fin"
                if rest := self._framer.take_rest():  # the source died in mid-sentence
                    self._put(Piece("?", rest, first=False, last=False, arrived=0.0))
            if self.done:  # nobody wants it: we only read to see the end
                return
            must_be_whole = partial(self._relay.faults.need_whole, self._direction)
            for piece in self._framer.feed(data, must_be_whole):
                if piece.type or self._greet(piece):
                    self._put(piece)
        except ProtocolError:
            self._connection.cut(Cut())
        except OSError:
            self.end = "rst"

    def _put(self, piece: Piece) -> None:
        self._pieces.append(piece)
        self._waiting += len(piece.data)

    def _greet(self, piece: Piece) -> bool:
        """Look at a startup packet, and answer it if it asks for encryption. Else: True."""
        code = piece.startup_code
        if code in (SSL_REQUEST, GSSENC_REQUEST):
            client = self.source
            tls = self._relay.tls if code == SSL_REQUEST and not client.encrypted else None
            client.sock.send(b"S" if tls else b"N")  # the first byte: there is room for it
            if tls:
                if self._framer.take_rest():
                    raise ProtocolError("clear text behind an SSLRequest")
                client.start_tls(tls)
            return False
        if code == CANCEL_REQUEST:
            self._relay.stats.cancel_requests += 1
        else:
            self._relay.stats.connections += 1
            self._connection.session = True
        return True

    def _flow(self) -> Generator[None]:
        """Pass the messages on, in order, and yield whenever that must wait.

        It is resumed whenever anything has happened (`Connection.pump`), so each wait looks for
        itself whether its time has come.
        """
        met: list[Fault] = []
        while True:
            while not self._pieces:
                if self._flush() and (self.end or self._broken):
                    return self._finish()
                yield
            piece = self._pieces.popleft()
            self._waiting -= len(piece.data)

            if piece.first:
                met = self._relay.faults.meet(self._direction, piece)
                for fault in met:
                    if fault.when == "before":
                        yield from self._act(fault, piece.arrived)
                        if self._connection.closed:
                            return None

            self.out += piece.data
            if piece.last:
                self._count(piece)
                for fault in met:
                    if fault.when == "after":
                        yield from self._act(fault, None)
                        if self._connection.closed:
                            return None

    def _act(self, fault: Fault, since: float | None) -> Generator[None]:
        """Do what the fault wants, once all that came before is handed over.

        :param since: when a Delay has begun; None: now.
        """
        while not self._flush():
            yield
        action, faults, connection = fault.action, self._relay.faults, self._connection
        if isinstance(action, Cut):
            connection.cut(action, fault)
            faults.hit(fault)
        elif isinstance(action, Freeze):
            faults.hold(connection, fault, connection.pump)
            faults.hit(fault)
            yield  # to be resumed when no fault holds the connection
        else:
            until = (time.monotonic() if since is None else since) + action.seconds
            self._relay.loop.call_at(until, connection.pump)
            faults.hold(self, fault, connection.pump)
            faults.hit(fault)
            while faults.holds(self) and time.monotonic() < until:
                yield
            faults.forget(self)

    def _count(self, piece: Piece) -> None:
        stats = self._relay.stats
        if self._direction == "backend":
            stats.backend_messages[piece.type] += 1
        else:
            stats.frontend_messages[piece.type] += 1
            if self._connection.last_speaker == "backend" and piece.type != "X":
                stats.round_trips += 1
        self._connection.last_speaker = self._direction

    def _flush(self) -> bool:
        """Hand over to the kernel what it takes. True: nothing is left."""
        try:
            while self.out:
                taken = self._sink.send(self.out)
                if not taken:
                    return False
                del self.out[:taken]
        except OSError:
            self._broken = True
            self.out.clear()
        return True

    def _finish(self) -> None:
        """All there was is passed on: pass on the end."""
        self.done = True
        if self.end == "rst":
            self._connection.cut(Cut())
        else:
            if not self._broken:
                self._sink.finish()
            self._connection.close_if_done()


class Connection:
    """A client, its server, and the pipes between them."""

    def __init__(self, relay: Relay, client: Socket) -> None:
        self.relay = relay
        self.client = client
        self.server = Socket(relay.loop, socket.socket())
        self._addresses = iter(relay.addresses)  # that we haven't tried yet
        self._frontend = Pipe(self, "frontend", self.client, self.server)
        self._backend = Pipe(self, "backend", self.server, self.client)
        self.last_speaker: Direction = "frontend"
        self.session = False  # it sent a StartupMessage
        self.closed = False

    @property
    def _frozen(self) -> bool:
        return self.relay.faults.holds(self) or self.relay.frozen

    def dial(self) -> None:
        """Connect to the server's next address; none is left: reset the client."""
        if any(self.server.dial(*address) for address in self._addresses):
            self.watch()
        else:
            self.cut(Cut())

    def watch(self) -> None:
        """Tell the loop what this connection waits for."""
        if self.closed:
            return
        frozen = self._frozen
        for incoming, outgoing in (
            (self._frontend, self._backend),
            (self._backend, self._frontend),
        ):
            sock = incoming.source
            mask = 0
            if not frozen and (sock.connecting or sock.wants_write or outgoing.out):
                mask |= selectors.EVENT_WRITE
            if not (frozen or sock.connecting or incoming.end or incoming.full):
                mask |= selectors.EVENT_READ
            sock.watch(mask, partial(self._on_ready, incoming))

    def _on_ready(self, pipe: Pipe, mask: int) -> None:
        # Something else in the same round of the loop may have come first.
        if self.closed or self._frozen:
            return
        sock = pipe.source
        if sock.connecting and not sock.connected():
            self.dial()
        elif mask & selectors.EVENT_READ or sock.wants_write:
            pipe.read()
        self.pump()

    def pump(self) -> None:
        """Something has happened: let both pipes go on as far as they can."""
        for pipe in (self._frontend, self._backend):
            if not (self.closed or self._frozen):
                next(pipe.flow, None)
        self.watch()

    def cut(self, cut: Cut, fault: Fault | None = None) -> None:
        if self.closed:
            return
        self._leave()
        self.relay.cut_socket(self.client, cut)
        if cut.server:
            self.relay.cut_socket(self.server, cut)
        else:
            assert fault is not None
            self.relay.drain(self.server)
            on_release = partial(self.relay.cut_socket, self.server, cut)
            self.relay.faults.hold(self.server, fault, on_release)

    def close_if_done(self) -> None:
        if self._frontend.done and self._backend.done:
            self._leave()
            self.client.close()
            self.server.close()

    def _leave(self) -> None:
        """Let the proxy forget the connection; its sockets are the caller's."""
        self.closed = True
        self.relay.connections.discard(self)
        self.client.watch(0)
        self.server.watch(0)
        for held in (self, self._frontend, self._backend):
            self.relay.faults.forget(held)


class Relay:
    """All connections, and what concerns them all.

    Other threads use `start`, `refuse`, and what they hand to `loop`.
    """

    def __init__(self, tls: ssl.SSLContext | None) -> None:
        self.tls = tls
        self.refuse = False
        self.loop = Loop()
        self.faults = Faults(self.loop)
        self.stats = Stats()
        self.connections: set[Connection] = set()
        self.draining: set[Socket] = set()  # read and thrown away, until they end

    def start(self, name: str, listener: socket.socket, addresses: list[Address]) -> None:
        self._listener = Socket(self.loop, listener)
        self.addresses = addresses
        self.loop.start(name, self._close_sockets)
        self.loop.call(self._listen)

    def _close_sockets(self) -> None:
        self._listener.close()
        for connection in self.connections:
            connection.client.close()
            connection.server.close()
        self.connections.clear()
        for sock in self.draining:
            sock.close()

    def _listen(self) -> None:
        self._listener.watch(selectors.EVENT_READ, self._on_accept)

    def _on_accept(self, mask: int) -> None:
        if self.frozen:  # since the loop told of the client
            return
        with suppress(BlockingIOError, ConnectionAbortedError):
            while True:
                client = Socket(self.loop, self._listener.sock.accept()[0])
                if self.refuse:
                    client.reset()
                    continue
                connection = Connection(self, client)
                self.connections.add(connection)
                connection.dial()

    @property
    def frozen(self) -> bool:
        return self.faults.holds(self)

    def freeze_all(self, fault: Fault) -> None:
        self.faults.hold(self, fault, self._thaw)
        self._listener.watch(0)
        for connection in self.connections:
            connection.watch()
        self.faults.hit(fault)

    def _thaw(self) -> None:
        if not self.frozen:  # by another fault
            self._listen()
            for connection in list(self.connections):
                connection.pump()

    def cut_all(self, cut: Cut) -> int:
        victims = list(self.connections)
        for connection in victims:
            connection.cut(cut)
        for sock in list(self.draining):
            for on_release in self.faults.forget(sock):
                on_release()
        return len(victims)

    def cut_socket(self, sock: Socket, cut: Cut) -> None:
        if cut.how == "fin":
            sock.finish(politely=False)
            # Not closed: with unread bytes in it, the kernel would send RST after all.
            self.drain(sock)
        else:
            self.draining.discard(sock)
            sock.reset()

    def drain(self, sock: Socket) -> None:
        """Read the socket to its end, for nobody, then close it."""
        if sock.sock.fileno() != -1:
            self.draining.add(sock)
            sock.watch(selectors.EVENT_READ, partial(self._on_drain, sock))

    def _on_drain(self, sock: Socket, mask: int) -> None:
        with suppress(OSError):  # broken, or reset in the same round of the loop
            if sock.receive() != b"":
                return
        self.draining.discard(sock)
        sock.close()
        self.faults.forget(sock)

    def snapshot(self) -> Stats:
        return replace(
            self.stats,
            open_connections=sum(connection.session for connection in self.connections),
            frontend_messages=Counter(self.stats.frontend_messages),
            backend_messages=Counter(self.stats.backend_messages),
        )

    def reset_stats(self) -> None:
        self.stats = Stats()
