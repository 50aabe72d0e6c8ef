"""The command line: commands and their options, no more. Needs the extra `cli`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from . import __version__

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


class Loop(StrEnum):
    """The event loops that aiopgsafe runs on."""

    asyncio = "asyncio"
    uvloop = "uvloop"
    trio = "trio"


Dsn = Annotated[str, typer.Argument(help="A connection string or URL; '' for libpq's defaults.")]
LoopOption = Annotated[Loop, typer.Option(help="The event loop to run on.")]


def show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def aiopgsafe(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show it.")
    ] = False,
) -> None:
    """PostgreSQL for asyncio and trio, with COMMITs that nothing can tear."""


@app.command()
def demo(
    loop: LoopOption = Loop.asyncio,
    seconds: Annotated[
        float, typer.Option(min=0.1, max=3600.0, help="For how long each side moves money.")
    ] = 12.0,
    seed: Annotated[
        int | None, typer.Option(help="Of the random choices. Default: another one each time.")
    ] = None,
    clients: Annotated[int, typer.Option(min=1, max=64, help="Concurrent clients.")] = 10,
    json: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write all figures there; - for standard output."),
    ] = None,
    dsn: Annotated[
        str | None,
        typer.Option(
            help="A server of yours instead of a temporary one. The demo works in schemas of its"
            " own names, drops them at the end, and touches nothing else.",
        ),
    ] = None,
) -> None:
    """Move money while tasks are cancelled: psycopg's own pool and connection beside ours.

    COMMIT's answers come 20 ms late, every transfer is cancelled at a random moment, and from
    time to time a server process is killed. Then what each client believes is compared with
    what is in the tables.

    Exit status: 0 if aiopgsafe's clients knew the truth throughout, 1 if not, 2 if the demo
    could not be run.
    """
    from ._demo import Options, main

    options = Options(loop=loop.value, seconds=seconds, seed=seed, clients=clients, dsn=dsn)
    raise typer.Exit(main(options, json))


@app.command()
def listen(
    dsn: Dsn,
    channels: Annotated[list[str], typer.Argument(metavar="CHANNEL...", help="One or more.")],
    json: Annotated[bool, typer.Option("--json", help="A JSON object a line.")] = False,
    loop: LoopOption = Loop.asyncio,
) -> None:
    """Print notifications as they come, and gaps where some may have been missed.

    A lost connection is made again, as often as it takes. Ctrl-C ends it.

    Exit status: 0 after Ctrl-C, 2 if it could not listen.
    """
    from ._tools import listen

    raise typer.Exit(listen(dsn, channels, json, loop.value))


@app.command()
def doctor(dsn: Dsn, loop: LoopOption = Loop.asyncio) -> None:
    """Connect, and show what matters for the promises, with advice.

    Exit status: 0, 1 if a promise can't be kept there, 2 if it could not connect.
    """
    from ._tools import doctor

    raise typer.Exit(doctor(dsn, loop.value))


tokens = typer.Typer(no_args_is_help=True, help="The table that commit_token=True needs.")
app.add_typer(tokens, name="tokens")


@tokens.command()
def create(dsn: Dsn, loop: LoopOption = Loop.asyncio) -> None:
    """Create the table aiopgsafe.token, if it isn't there.

    Exit status: 0, 2 if it could not be created.
    """
    from ._tools import create_tokens

    raise typer.Exit(create_tokens(dsn, loop.value))


@tokens.command()
def prune(
    dsn: Dsn,
    older_than: Annotated[
        float,
        typer.Option(min=60.0, help="Seconds; older tickets can't be redeemed."),
    ] = 86_400.0,
    loop: LoopOption = Loop.asyncio,
) -> None:
    """Delete old tokens, in batches. For a daily job.

    Exit status: 0, 2 if that was not possible.
    """
    from ._tools import prune_tokens

    raise typer.Exit(prune_tokens(dsn, older_than, loop.value))
