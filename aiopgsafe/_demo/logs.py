"""What the libraries log while the demo runs: counted, and kept off the screen."""

from __future__ import annotations

import gc
import logging
import sys
from collections import Counter
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from sys import UnraisableHookArgs


class CountWarnings(logging.Handler):
    """Counts warnings and errors of all loggers, and of finalisers, while it is entered.

    psycopg leaves a generator behind where a query's cancellation is cancelled, in a cycle with
    its own traceback. Where the collector closes the inner one first, the outer one's finaliser
    finds it "already executing", and Python says so on stderr.

    :ivar counts: by logger and message, its parameters left out; by "finaliser", what it is
        of, and the exception.
    """

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.counts: Counter[str] = Counter()

    def emit(self, record: logging.LogRecord) -> None:
        self.counts[f"{record.name}: {record.msg}"] += 1

    def _note(self, unraisable: UnraisableHookArgs) -> None:
        name = getattr(unraisable.object, "__qualname__", type(unraisable.object).__qualname__)
        self.counts[f"finaliser of {name}: {unraisable.exc_value!r}"] += 1

    def __enter__(self) -> Self:
        logging.getLogger().addHandler(self)
        self._hook = sys.unraisablehook
        sys.unraisablehook = self._note
        return self

    def __exit__(self, *exc_info: object) -> None:
        gc.collect()  # what this side leaves behind is its own, and is not said at the exit
        sys.unraisablehook = self._hook
        logging.getLogger().removeHandler(self)
