"""`aiopgsafe listen`: notifications and gaps, as they come."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial

import typer
from rich.text import Text

from .. import Database, Gap, Notify
from .running import OK, Screen, run, until_nobody_reads


def listen(dsn: str, channels: list[str], as_json: bool, loop: str) -> int:
    """Print what comes until Ctrl-C, and return the command's exit status."""
    show = _as_json if as_json else partial(_as_text, Screen())
    try:
        with until_nobody_reads():
            return run("listen", partial(_listen, dsn, channels, show), loop)
    except KeyboardInterrupt:
        pass
    return OK


async def _listen(dsn: str, channels: list[str], show: Callable[[Notify | Gap], None]) -> int:
    # The listener has a connection of its own: the pool needs none.
    db = Database(dsn, min_size=0, max_size=1, max_idle=0)
    subscription = db.listen(*channels)
    async with db, subscription:
        typer.echo(f"listening to {', '.join(channels)}: Ctrl-C ends it", err=True)
        async for item in subscription:
            show(item)
    return OK


def _as_text(screen: Screen, item: Notify | Gap) -> None:
    now = (datetime.now(UTC).astimezone().strftime("%H:%M:%S.%f")[:-3], "dim")
    if isinstance(item, Gap):
        since = datetime.fromtimestamp(item.since, UTC).astimezone().strftime("%H:%M:%S")
        gap = (f"gap: what was sent since {since} may have been missed", "yellow")
        text = Text.assemble(now, "  ", gap)
    else:
        channel, pid = (printable(item.channel), "cyan"), (str(item.pid), "dim")
        text = Text.assemble(now, "  ", channel, " ", pid, "  ", printable(item.payload))
    screen.print(text, soft_wrap=True)


def printable(text: str) -> str:
    """A line of its own, that can't move the cursor: control characters as Python writes them."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _as_json(item: Notify | Gap) -> None:
    if isinstance(item, Gap):
        line: dict[str, object] = {"gap": list(item.channels), "since": item.since}
    else:
        line = {"channel": item.channel, "payload": item.payload, "pid": item.pid}
    typer.echo(json.dumps(line))
