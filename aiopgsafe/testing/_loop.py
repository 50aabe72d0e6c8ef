"""A thread that waits for sockets and timers, and the sockets that it waits for."""

from __future__ import annotations

import errno
import heapq
import itertools
import selectors
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")

# Seconds. The thread answers in microseconds, unless a predicate blocks it.
TIMEOUT = 10.0


class NotRunningError(RuntimeError):
    """The thread was not started, or has ended."""


class Loop:
    """A thread that waits for sockets and timers, and calls back.

    All that the callbacks know belongs to this thread. Other threads hand it a function (`call`).
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._open = False
        # Between a function's arrival and the thread's end. A signal handler may come back to it.
        self._gate = threading.RLock()
        self._functions: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._timers: list[tuple[float, int, Callable[[], object]]] = []  # a heap
        self._serial = itertools.count()  # so that the heap needn't compare functions

    def start(self, name: str, at_end: Callable[[], object]) -> None:
        """Begin, once only.

        :param at_end: called in the thread when it ends.
        """
        self.selector = selectors.DefaultSelector()
        self._waker, self._wakened = socket.socketpair()
        for sock in (self._waker, self._wakened):
            sock.setblocking(False)
        self.selector.register(self._wakened, selectors.EVENT_READ, self._on_wake)
        self._thread = threading.Thread(target=self._run, args=(at_end,), name=name, daemon=True)
        self._open = True
        self._thread.start()

    def call(self, function: Callable[[], T]) -> T:
        """Run the function in the thread and return its result.

        :raises NotRunningError: there is no thread.
        :raises RuntimeError: a predicate, which runs in the thread, has called us.
        :raises TimeoutError: a predicate blocks the thread. The function may run later.
        """
        if self._thread is threading.current_thread():
            raise RuntimeError("a predicate must not use the proxy or its faults")
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(function())
            except Exception as error:
                future.set_exception(error)

        with self._gate:
            if not self._open:
                raise NotRunningError("the proxy is not running")
            self._functions.put(run)
            with suppress(BlockingIOError):  # full: it will wake up anyway
                self._waker.send(b"\0")
        try:
            return future.result(TIMEOUT)
        except TimeoutError:
            raise TimeoutError("a predicate blocks the proxy") from None

    def call_if_running(self, function: Callable[[], object]) -> None:
        with suppress(NotRunningError):
            self.call(function)

    def close(self) -> None:
        """End the thread, and return when it has ended. TimeoutError: a predicate blocks it."""
        self.call_if_running(self._stop)
        if self._thread is not None:
            self._thread.join(TIMEOUT)
            if self._thread.is_alive():
                raise TimeoutError("a predicate blocks the proxy")

    # From here on: in the thread

    def call_at(self, when: float, function: Callable[[], object]) -> None:
        """Call the function when `time.monotonic()` is there."""
        heapq.heappush(self._timers, (when, next(self._serial), function))

    def _run(self, at_end: Callable[[], object]) -> None:
        timers = self._timers
        try:
            while self._open:
                timeout = max(0.0, timers[0][0] - time.monotonic()) if timers else None
                for key, mask in self.selector.select(timeout):
                    key.data(mask)
                while timers and timers[0][0] <= time.monotonic():
                    heapq.heappop(timers)[2]()
        finally:
            with self._gate:
                self._open = False
            self._run_functions()  # of those who came just before
            at_end()
            self._waker.close()
            self._wakened.close()
            self.selector.close()

    def _stop(self) -> None:
        self._open = False

    def _on_wake(self, mask: int) -> None:
        self._wakened.recv(4096)
        self._run_functions()

    def _run_functions(self) -> None:
        with suppress(Empty):
            while True:
                self._functions.get_nowait()()


class Socket:
    """A non-blocking stream socket, in clear text or with TLS.

    :ivar connecting: the connection is still being made.
    :ivar wants_write: reading must wait until TLS could write.
    """

    def __init__(self, loop: Loop, sock: socket.socket) -> None:
        self._loop = loop
        self._mask = 0
        self.wants_write = False
        self.connecting = False
        self._handshaking = False
        self._adopt(sock)

    def _adopt(self, sock: socket.socket) -> None:
        self.sock = sock
        sock.setblocking(False)
        if sock.family != socket.AF_UNIX:
            with suppress(OSError):  # macOS: it was reset meanwhile
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def watch(self, mask: int, callback: Callable[[int], object] | None = None) -> None:
        """Let the loop call back with the events of the mask that have come; 0: no more.

        Another callback needs a `watch(0)` between.
        """
        if mask and not self._mask:
            self._loop.selector.register(self.sock, mask, callback)
        elif mask and mask != self._mask:
            self._loop.selector.modify(self.sock, mask, callback)
        elif self._mask and not mask:
            self._loop.selector.unregister(self.sock)
        self._mask = mask

    def dial(self, family: int, address: Any) -> bool:
        """Begin to connect; a socket used before is closed. False: failed at once."""
        self.close()
        try:
            self._adopt(socket.socket(family, socket.SOCK_STREAM))
            error = self.sock.connect_ex(address)
        except OSError:  # no such family here, no descriptor left, a path too long
            return False
        self.connecting = error == errno.EINPROGRESS
        return self.connecting or error == 0

    def connected(self) -> bool:
        """Ask how the connection attempt ended, once the socket is writable."""
        self.connecting = False
        return self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0

    @property
    def encrypted(self) -> bool:
        return isinstance(self.sock, ssl.SSLSocket)

    def start_tls(self, context: ssl.SSLContext) -> None:
        """Go on as a TLS server. `receive` does the handshake."""
        self.watch(0)
        self.sock = context.wrap_socket(self.sock, server_side=True, do_handshake_on_connect=False)
        self._handshaking = True

    def receive(self) -> bytes | None:
        """Return what is there, None if nothing is, b"" at the end. OSError: it is broken."""
        self.wants_write = False
        try:
            if self._handshaking:
                assert isinstance(self.sock, ssl.SSLSocket)
                self.sock.do_handshake()
                self._handshaking = False
            # More than a TLS record, so that none remains inside of OpenSSL, where the selector
            # doesn't see it.
            return self.sock.recv(65536)
        except ssl.SSLWantWriteError:
            self.wants_write = True
        except (BlockingIOError, ssl.SSLWantReadError):
            pass
        return None

    def send(self, data: bytearray) -> int:
        """Hand data over to the kernel and return how much it took. OSError: it is broken."""
        if self.connecting or self._handshaking:
            return 0
        try:
            return self.sock.send(data)
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return 0

    def finish(self, *, politely: bool = True) -> None:
        """Send FIN: this side says nothing more. Politely: TLS's own goodbye goes before."""
        with suppress(OSError, ValueError):
            if politely and isinstance(self.sock, ssl.SSLSocket):
                self.sock.unwrap()  # says goodbye, then raises: the other side's isn't there yet
        with suppress(OSError):
            # SSLSocket's own method would go on in clear text.
            socket.socket.shutdown(self.sock, socket.SHUT_WR)

    def reset(self) -> None:
        """Close with RST, and throw away what the kernel has not sent yet."""
        with suppress(OSError):
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close()

    def close(self) -> None:
        self.watch(0)
        self.sock.close()
