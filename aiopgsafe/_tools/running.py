"""What both commands do to run, and to fail."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from importlib.util import find_spec

import anyio
import psycopg
import typer

OK, FAULTY, COULD_NOT_RUN = 0, 1, 2
"""Exit statuses."""


def run(name: str, command: Callable[[], Awaitable[int]], loop: str) -> int:
    """Run a command in an event loop; what is wrong with its arguments or the server is said.

    :param name: of the command.
    :param loop: "asyncio", "uvloop" or "trio".
    """
    try:
        if loop != "asyncio" and find_spec(loop) is None:
            raise ValueError(f"{loop} is not installed: pip install 'aiopgsafe[{loop}]'")
        backend = "trio" if loop == "trio" else "asyncio"
        options = {"use_uvloop": True} if loop == "uvloop" else {}
        return anyio.run(command, backend=backend, backend_options=options)
    except (psycopg.Error, ValueError) as error:
        typer.echo(f"aiopgsafe {name}: {str(error).strip()}", err=True)
        return COULD_NOT_RUN
