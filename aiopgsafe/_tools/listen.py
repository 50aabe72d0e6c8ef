"""`aiopgsafe listen`: notifications and gaps, as they come."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial

import typer
from rich.console import Console
from rich.markup import escape

from .. import Database, Gap, Notify
from .running import OK, run


def listen(dsn: str, channels: list[str], as_json: bool, loop: str) -> int:
    """Print what comes until Ctrl-C, and return the command's exit status."""
    show = _as_json if as_json else partial(_as_text, Console(highlight=False, soft_wrap=True))
    try:
        return run("listen", partial(_listen, dsn, channels, show), loop)
    except KeyboardInterrupt:
        return OK
    except BrokenPipeError:
        # Whoever reads has gone. Python would complain once more when it flushes at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
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


def _as_text(console: Console, item: Notify | Gap) -> None:
    now = datetime.now(UTC).astimezone().strftime("%H:%M:%S.%f")[:-3]
    if isinstance(item, Gap):
        since = datetime.fromtimestamp(item.since, UTC).astimezone().strftime("%H:%M:%S")
        console.print(
            f"[dim]{now}[/]  [yellow]gap: what was sent since {since} may have been missed[/]"
        )
    else:
        payload = escape(item.payload)
        console.print(
            f"[dim]{now}[/]  [cyan]{escape(item.channel)}[/] [dim]{item.pid}[/]  {payload}"
        )


def _as_json(item: Notify | Gap) -> None:
    if isinstance(item, Gap):
        line: dict[str, object] = {"gap": list(item.channels), "since": item.since}
    else:
        line = {"channel": item.channel, "payload": item.payload, "pid": item.pid}
    typer.echo(json.dumps(line))
