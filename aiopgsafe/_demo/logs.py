"""What the libraries log while the demo runs: counted, and kept off the screen."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Self


class CountWarnings(logging.Handler):
    """Counts warnings and errors of all loggers while it is entered.

    :ivar counts: by logger and message, its parameters left out.
    """

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.counts: Counter[str] = Counter()

    def emit(self, record: logging.LogRecord) -> None:
        self.counts[f"{record.name}: {record.msg}"] += 1

    def __enter__(self) -> Self:
        logging.getLogger().addHandler(self)
        return self

    def __exit__(self, *exc_info: object) -> None:
        logging.getLogger().removeHandler(self)
