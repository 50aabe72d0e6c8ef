"""COPY: psycopg's, with a row that is there already read without any waiting."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import psycopg

from .._errors import goes_on

if TYPE_CHECKING:
    from types import TracebackType

    from psycopg.abc import Buffer

__all__ = ["AsyncCopy"]


class AsyncCopy(psycopg.AsyncCopy):
    """psycopg's."""

    __module__ = "aiopgsafe"

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_val: BaseException | None,
        exc_tb: TracebackType | None,
    ) -> None:
        try:
            await super().__aexit__(exc_type, exc_val, exc_tb)
        except BaseException as raised:
            if not goes_on(exc_val, raised):
                raise

    async def __aiter__(self) -> AsyncIterator[Buffer]:
        """Iterate over the blocks of a COPY TO."""
        while data := await self.read():
            yield data

    async def read(self) -> Buffer:
        """Read an unparsed row after a COPY TO; empty at the end."""
        conn: Any = self.connection
        gen = self._read_gen()
        # Most rows came with one before. Nor does waiting for those give others a turn,
        # unless that is due.
        if conn._signalled is None and not conn._channel.closed and conn._channel.ended():
            try:
                gen.send(None)  # type: ignore[arg-type]
            except StopIteration as stop:
                data: Buffer = stop.value
                return data
        return await self.connection.wait(gen)
