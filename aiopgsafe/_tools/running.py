"""What both commands do to run, and to fail."""

from __future__ import annotations

import io
import os
import re
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import anyio
import psycopg
import typer
from rich.console import Console

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
    except TimeoutError:
        typer.echo(f"aiopgsafe {name}: the server does not answer", err=True)
    except (psycopg.Error, ValueError) as error:
        typer.echo(f"aiopgsafe {name}: {without_secrets(error)}", err=True)
    return COULD_NOT_RUN


def without_secrets(error: Exception) -> str:
    """libpq quotes what it doesn't understand of a connection string, passwords included."""
    text = str(error).strip()
    if isinstance(error, psycopg.ProgrammingError) and error.sqlstate is None:
        text = re.sub(r'(?<!=)"(?!=").*"', "(...)", text, flags=re.DOTALL)
        return f"the connection string is not understood: {text}"
    return re.sub(r"[\"'][^\"']*@[^\"']*[\"']", "(...)", text)


class Screen(Console):
    """Prints what comes from elsewhere as it is, on whatever it is printed."""

    def __init__(self) -> None:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")
        super().__init__(highlight=False, emoji=False, markup=False)

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError  # nobody reads any more: no fault of ours


@contextmanager
def until_nobody_reads() -> Iterator[None]:
    """End quietly when standard output is closed."""
    try:
        yield
    except BrokenPipeError:
        # Python would complain once more when it flushes at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
