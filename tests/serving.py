"""Real servers of web applications, each in a process of its own: one for each loop."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryFile
from time import monotonic, sleep

SERVERS = ["uvicorn-asyncio", "uvicorn-uvloop", "hypercorn-trio"]
ROOT = Path(__file__).parent.parent


class Service:
    """A server in a process of its own.

    :param kind: one of `SERVERS`.
    :param app: ``module:name``; it has a route ``/readyz``.
    :param graceful: seconds after which it stops to wait for its requests; None: it doesn't.
    """

    def __init__(self, kind: str, app: str, graceful: int | None = 5, **environment: str) -> None:
        self.log = TemporaryFile("w+")  # noqa: SIM115
        # It inherits the socket: a port that is only known to be free may be taken by another
        # test's program before it binds to it.
        with socket.create_server(("127.0.0.1", 0)) as listening:
            self.port = listening.getsockname()[1]
            fd = listening.fileno()
            if kind == "hypercorn-trio":
                command = ["hypercorn", "-k", "trio", "-b", f"fd://{fd}", app]
                command += ["--graceful-timeout", str(graceful or 1000)]
            else:
                command = ["uvicorn", "--fd", str(fd), "--loop", kind.partition("-")[2]]
                command += ["--no-access-log", app]
                if graceful is not None:
                    command += ["--timeout-graceful-shutdown", str(graceful)]
            self.process = subprocess.Popen(
                [sys.executable, "-m", *command],
                env={**os.environ, "PYTHONPATH": str(ROOT / "examples"), **environment},
                cwd=ROOT,
                stdout=self.log,
                stderr=self.log,
                process_group=0,
                pass_fds=[fd],
            )
        self.base = f"http://127.0.0.1:{self.port}"

    def wait_until_ready(self) -> None:
        deadline = monotonic() + 20
        while not self.answers():
            assert monotonic() < deadline, self.said()
            assert self.process.poll() is None, self.said()
            sleep(0.01)  # it needs the processor itself

    def said(self) -> str:
        self.log.seek(0)
        return self.log.read()

    def end(self) -> None:
        # hypercorn serves in a process of its own, which would outlive it; after `stop()` there
        # is none.
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.log.close()

    def answers(self) -> bool:
        try:
            return self.request("GET", "/readyz").startswith(b"HTTP/1.1 200")
        except OSError:
            return False

    def request(
        self, method: str, path: str, body: str = "", hang_up: float | None = None
    ) -> bytes:
        """The whole answer; what came of it until the client hung up after so many seconds."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=30) as client:
            client.sendall(
                f"{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
                f"Content-Type: application/json\r\n"
                f"Content-Length: {len(body)}\r\n\r\n{body}".encode()
            )
            deadline = None if hang_up is None else monotonic() + hang_up
            answer = b""
            while True:
                if deadline is not None:
                    if (left := deadline - monotonic()) <= 0:
                        return answer
                    client.settimeout(left)
                try:
                    data = client.recv(65536)
                except TimeoutError:
                    if deadline is None:
                        raise
                    return answer
                answer += data
                # hypercorn on trio never closes behind a stream of Starlette's: the response ends
                # by what Starlette cancels when hypercorn says that it does, its close() included.
                if not data or is_complete(answer):
                    return answer

    def stop(self) -> float:
        """By SIGTERM. How many seconds it took."""
        before = monotonic()
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(timeout=30)
        return monotonic() - before


def is_complete(answer: bytes) -> bool:
    """Whether an HTTP answer has come to its end, by what its head says of its length."""
    head, _, body = answer.partition(b"\r\n\r\n")
    if b"\r\ntransfer-encoding: chunked" in head.lower():
        return body.endswith(b"\r\n0\r\n\r\n")
    length = re.search(rb"\r\ncontent-length: *(\d+)", head, re.IGNORECASE)
    return length is not None and len(body) >= int(length[1])
