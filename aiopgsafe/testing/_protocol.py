"""PostgreSQL's protocol 3, as far as a proxy needs it.

Where messages begin, what they are, predicates to pick them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

Direction = Literal["frontend", "backend"]

# Codes of the startup packets that are no StartupMessage (those carry the protocol's version).
CANCEL_REQUEST = 80877102
SSL_REQUEST = 80877103
GSSENC_REQUEST = 80877104

# Bytes. A longer message goes on in pieces as it comes, unless somebody must see it whole.
_WHOLE_MESSAGE = 64 * 1024
# Bytes. The server itself refuses startup packets above this (MAX_STARTUP_PACKET_LENGTH).
_LONGEST_STARTUP = 10_000


class ProtocolError(Exception):
    """What comes from a socket is not PostgreSQL's protocol 3."""


@dataclass(frozen=True)
class Message:
    """A message on its way through the proxy.

    :ivar direction: "frontend": from the client; "backend": from the server.
    :ivar type: the message's type, one letter as in PostgreSQL's documentation ("Message
        Formats"); "" for StartupMessage and CancelRequest, which have none. A letter may mean
        one thing in each direction: "C" is the client's Close and the server's CommandComplete.
    :ivar payload: what follows the message's length word.
    """

    direction: Direction
    type: str
    payload: bytes


class Piece(NamedTuple):
    """A message as it goes on: whole (`first` and `last`), or a part of a long one."""

    type: str
    data: bytes
    first: bool
    last: bool
    arrived: float  # time.monotonic()

    @property
    def payload(self) -> bytes:
        return self.data[5:] if self.type else self.data[4:]

    @property
    def startup_code(self) -> int:
        """What tells startup packets apart."""
        return int.from_bytes(self.data[4:8], "big")


class Framer:
    """Splits the bytes of one direction of one connection into messages.

    :param startup: begin with startup packets, until the StartupMessage: the frontend's.
    """

    def __init__(self, *, startup: bool) -> None:
        self._startup = startup
        self._buffer = bytearray()
        self._type = ""  # of the long message that is going on in pieces,
        self._rest = 0  # and how many bytes of it are still to come

    def take_rest(self) -> bytes:
        """Take the beginning of a message that is waiting for its end."""
        rest = bytes(self._buffer)
        self._buffer.clear()
        return rest

    def feed(self, data: bytes, must_be_whole: Callable[[str], bool]) -> Iterator[Piece]:
        """Take bytes as they come and yield what can go on.

        :param must_be_whole: asked with the type of a long message.
        :raises ProtocolError: an impossible length.
        """
        buffer = self._buffer
        buffer += data
        now = time.monotonic()
        while buffer:
            if self._rest:
                part = bytes(buffer[: self._rest])
                del buffer[: len(part)]
                self._rest -= len(part)
                yield Piece(self._type, part, first=False, last=not self._rest, arrived=now)
                continue

            start = 0 if self._startup else 1  # of the length word, which counts itself
            if len(buffer) < start + 4:
                return
            letter = "" if self._startup else chr(buffer[0])
            length = int.from_bytes(buffer[start : start + 4], "big")
            if length < 4 or (self._startup and not 8 <= length <= _LONGEST_STARTUP):
                raise ProtocolError(f"a message of type {letter!r} and length {length}")
            size = start + length

            if len(buffer) < size and (size <= _WHOLE_MESSAGE or must_be_whole(letter)):
                return
            part = bytes(buffer[:size])
            del buffer[:size]
            self._type, self._rest = letter, size - len(part)
            piece = Piece(letter, part, first=True, last=not self._rest, arrived=now)
            if self._startup:
                self._startup = piece.startup_code in (SSL_REQUEST, GSSENC_REQUEST)
            yield piece


class Matcher:
    """A predicate that knows which messages it can be about, so that others needn't be shown."""

    def __init__(
        self,
        test: Callable[[Message], bool] | None,
        *,
        direction: Direction | None = None,
        types: str | None = None,
    ) -> None:
        self._test = test  # None: the type says it all
        self._direction = direction  # None: both
        self._types = types  # None: all; "": the startup phase

    def __call__(self, message: Message) -> bool:
        if not self.may_match(message.direction, message.type):
            return False
        return self._test is None or self._test(message)

    def may_match(self, direction: Direction, letter: str) -> bool:
        if self._direction not in (None, direction):
            return False
        return self._types is None or (letter in self._types if letter else self._types == "")

    @property
    def needs_payload(self) -> bool:
        return self._test is not None


def query(text: str) -> Callable[[Message], bool]:
    """Match the client's Query or Parse whose SQL begins with `text`.

    Case and leading whitespace don't matter.
    """
    wanted = text.strip().lower().encode()

    def test(message: Message) -> bool:
        sql = message.payload
        if message.type == "P":  # the statement's name comes first
            sql = sql.partition(b"\0")[2]
        return sql.lstrip().lower().startswith(wanted)

    return Matcher(test, direction="frontend", types="QP")


def command_complete(tag: str) -> Callable[[Message], bool]:
    """Match the server's CommandComplete whose tag begins with `tag` ("COMMIT", "INSERT" ...)."""

    def test(message: Message) -> bool:
        return message.payload.startswith(tag.encode())

    return Matcher(test, direction="backend", types="C")


def cancel_request() -> Callable[[Message], bool]:
    """Match a CancelRequest, which comes on a connection of its own."""

    def test(message: Message) -> bool:
        return message.payload.startswith(CANCEL_REQUEST.to_bytes(4, "big"))

    return Matcher(test, direction="frontend", types="")
