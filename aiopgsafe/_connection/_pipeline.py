"""Pipelines that are left wherever their block is interrupted."""

from __future__ import annotations

import logging
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, cast

import psycopg

from .._ending import acquire_shielded
from .._errors import goes_on
from .._shield import Shield

if TYPE_CHECKING:
    from .._session import Session

logger = logging.getLogger("aiopgsafe")


class Pipeline(psycopg.AsyncPipeline):
    """psycopg's. Leaving it takes the lock deaf: left in pipeline mode nothing else would work.

    :param locked: whoever uses it has the connection's lock: `executemany()`.
    """

    def __init__(self, conn: psycopg.AsyncConnection[Any], *, locked: bool = False) -> None:
        super().__init__(conn, _no_lock=locked)
        self._locked = locked

    async def __aenter__(self) -> Self:
        level = self.level
        try:
            return await super().__aenter__()
        except BaseException as exc:
            # Entered, and interrupted in a turn that a busy channel gave the others
            # after it: `__aexit__` won't be called.
            if self.level > level:
                self._exit(exc)
            if self.level == 0:
                self._conn._pipeline = None
            raise

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_val: BaseException | None,
        exc_tb: TracebackType | None,
    ) -> None:
        conn: psycopg.AsyncConnection[Any] = self._conn
        shield = Shield(cast("Session", conn)._backend)
        acquired = not self._locked and await acquire_shielded(cast("Session", conn), shield)
        try:
            # Interrupted, it cancels what runs and takes all results all the same.
            await conn.wait(self._exit_gen())
        except Exception as exc:
            # As psycopg: it must not hide what goes through the block.
            if exc_val is None and shield.held is None:
                raise exc.with_traceback(None) from exc.__cause__
            logger.warning("error ignored terminating %r: %s", self, exc)
        except shield.loop.interruptions as exc:
            shield.hold_back(exc)
        finally:
            self._exit(exc_val or shield.held)
            if self.level == 0:
                conn._pipeline = None
            if acquired:
                conn.lock.release()
        if shield.held is not None and not goes_on(exc_val, shield.held):
            raise shield.held
