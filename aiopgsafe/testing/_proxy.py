"""A proxy between client and server that delays, freezes and cuts at a chosen message.

`FaultProxy` is the face for its users. From here down, each in a file:

- `_relay`: the connections, and how messages pass; it belongs to the proxy's one thread,
- `_faults`: what users have asked to happen,
- `_loop`: the thread,
- `_protocol`: the messages.

The methods that users call hand the thread a function and wait until it was run, so that what
they ask for is in force when they return.
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import Callable
from functools import partial
from typing import Literal, Self

from psycopg.conninfo import conninfo_to_dict, make_conninfo

from ._faults import Action, Cut, Delay, Fault, Freeze, Stats, When
from ._loop import NotRunningError
from ._protocol import Direction, Matcher, Message
from ._relay import Address, Relay


class FaultProxy:
    """A TCP proxy in front of a PostgreSQL server, in a thread of its own.

    The context manager calls `start` and `close`. The proxy listens at 127.0.0.1. It passes on
    bytes in order, ends of file and resets as they are, and CancelRequests, each on its own
    connection, as clients send them. With a client it speaks clear text, or TLS if asked to and
    able to (`tls`); with the server always clear text. GSSAPI encryption it declines. A client
    that speaks something else is reset.

    The methods may be called from every thread, and block for no more than the blink of an eye,
    or raise TimeoutError when a predicate blocks the proxy for 10 s. Before `start` and after
    `close` they raise RuntimeError.

    :param dsn: the server, as psycopg's conninfo string: one host or the directory of a unix
        socket. Without a host: localhost.
    :param tls: a server-side context; the proxy then grants SSLRequests.
    :raises ValueError: several hosts, or a client-side context.
    :raises psycopg.ProgrammingError: not a conninfo string.
    """

    host = "127.0.0.1"

    def __init__(self, dsn: str, *, tls: ssl.SSLContext | None = None) -> None:
        self._parameters = conninfo_to_dict(dsn)
        server = self._parameters.get("hostaddr") or self._parameters.get("host") or "localhost"
        self._server_host = str(server)
        self._server_port = str(self._parameters.get("port") or 5432)
        if "," in self._server_host + self._server_port:
            raise ValueError("the proxy serves one host")
        if tls is not None and tls.protocol == ssl.PROTOCOL_TLS_CLIENT:
            raise ValueError("the proxy needs a server-side TLS context")
        self._relay = Relay(tls)
        self._port = 0

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<FaultProxy, port {self._port}, for {self._server_host}:{self._server_port}>"

    @property
    def port(self) -> int:
        """The TCP port. RuntimeError before `start`."""
        if not self._port:
            raise RuntimeError("the proxy was not started")
        return self._port

    @property
    def dsn(self) -> str:
        """The server's connection string, but with the proxy's address."""
        changes = {"host": self.host, "hostaddr": None, "port": self.port}
        return make_conninfo("", **{**self._parameters, **changes})

    def start(self) -> None:
        """Listen. The server need not run yet.

        :raises RuntimeError: started before.
        :raises OSError: the server's host is unknown.
        """
        if self._port:
            raise RuntimeError("the proxy was started before")
        host, port = self._server_host, self._server_port
        addresses: list[Address]
        if host.startswith("/"):
            addresses = [(socket.AF_UNIX, f"{host}/.s.PGSQL.{port}")]
        else:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            addresses = [(family, address) for family, _, _, _, address in found]
        listener = socket.create_server((self.host, 0), backlog=1024)
        self._port = listener.getsockname()[1]
        self._relay.start(repr(self), listener, addresses)

    def close(self) -> None:
        """Close all sockets and end the thread. May be called again."""
        self._relay.loop.close()

    def inject(
        self,
        action: Action,
        match: str | Callable[[Message], bool],
        *,
        direction: Direction | None = None,
        when: When = "before",
        times: int | None = None,
    ) -> Fault:
        """Do something when a certain message is about to be passed on.

        A message that waits behind another one is looked at when its turn has come, so faults
        injected by then count. Several that match act one after the other, the oldest first.

        :param match: the type letter of the message, or a predicate. This is called in the
            proxy's thread with each message, whole, however long; it must neither block nor use
            the proxy. `query`, `command_complete` and `cancel_request` make some. SSLRequests
            and GSSENCRequests, which the proxy answers itself, are not shown.
        :param direction: only messages from the "frontend" or from the "backend".
        :param when: "before" the message is passed on, or "after" it was handed to the other
            side's socket.
        :param times: for how many messages; None: for all.
        :raises ValueError: a match or a number that is none.
        """
        if isinstance(match, str):
            if len(match) > 1:
                raise ValueError(f"not a message type: {match!r}")
            matcher = Matcher(None, types=match)
        else:
            matcher = match if isinstance(match, Matcher) else Matcher(match)
        if times is not None and times < 1:
            raise ValueError(f"times={times}")
        if isinstance(action, Delay) and not action.seconds >= 0:
            raise ValueError(f"{action}")
        faults = self._relay.faults
        fault = Fault(faults, action, matcher, direction, when, times)
        self._relay.loop.call(partial(faults.arm, fault))
        return fault

    def clear(self) -> None:
        """Remove all faults, and release what they and `freeze` hold."""
        self._relay.loop.call(self._relay.faults.clear)

    def cut(self, how: Literal["rst", "fin"] = "rst") -> int:
        """Cut all connections, both sides, frozen ones too, and return how many clients that hit.

        With them go the server's sides that a `Cut(server=False)` left open.
        """
        return self._relay.loop.call(partial(self._relay.cut_all, Cut(how)))

    def freeze(self) -> Fault:
        """Freeze all connections, new ones and CancelRequests too, until the fault is released.

        New ones wait in the kernel: connecting succeeds, and nobody answers.
        """
        fault = Fault(self._relay.faults, Freeze(), Matcher(None))
        self._relay.loop.call(partial(self._relay.freeze_all, fault))
        return fault

    @property
    def refuse(self) -> bool:
        """If set, new connections, CancelRequests' too, are accepted and reset at once."""
        return self._relay.refuse

    @refuse.setter
    def refuse(self, refuse: bool) -> None:
        self._relay.refuse = refuse

    @property
    def stats(self) -> Stats:
        """A copy of the counters. After `close`: the last state."""
        try:
            return self._relay.loop.call(self._relay.snapshot)
        except NotRunningError:
            return self._relay.snapshot()

    def reset_stats(self) -> None:
        """Begin to count anew."""
        self._relay.loop.call(self._relay.reset_stats)
