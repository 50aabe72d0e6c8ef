"""trio: sees what arrives on connections that nobody waits for."""

from __future__ import annotations

import logging
import selectors
from collections.abc import Callable
from contextlib import suppress

import trio

logger = logging.getLogger("aiopgsafe")


class Watcher:
    """Sees what arrives on connections that nobody waits for.

    A selector of its own, which trio waits for: trio lets one task wait for a
    descriptor, and that is whoever runs a statement.
    """

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        trio.lowlevel.spawn_system_task(self._run)

    def add(self, fd: int, callback: Callable[[], None]) -> None:
        self.remove(fd)  # of a connection that was closed behind our back
        self._selector.register(fd, selectors.EVENT_READ, callback)

    def remove(self, fd: int) -> None:
        with suppress(KeyError):
            self._selector.unregister(fd)

    async def _run(self) -> None:
        fd = self._selector.fileno()
        try:
            while True:
                await trio.lowlevel.wait_readable(fd)
                for key, _ in self._selector.select(0):
                    # One callback may have removed another's.
                    if self._selector.get_map().get(key.fd) is key:
                        try:
                            key.data()
                        except Exception:  # it would take trio down with it
                            logger.exception("error in the watch of descriptor %d", key.fd)
        finally:
            self._selector.close()


_watchers: trio.lowlevel.RunVar[Watcher] = trio.lowlevel.RunVar("aiopgsafe_watcher")


def watcher() -> Watcher:
    """Of the running `trio.run`."""
    try:
        return _watchers.get()
    except LookupError:
        found = Watcher()
        _watchers.set(found)
        return found
