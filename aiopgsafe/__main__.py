"""The command `aiopgsafe`, also as `python -m aiopgsafe`."""

from __future__ import annotations

import sys
from importlib.util import find_spec

NEEDED = ("typer", "rich")


def main() -> None:
    """Run the command line; without the packages that it needs, say which extra has them."""
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        sys.exit(
            f"aiopgsafe: the command line needs {' and '.join(missing)}:"
            " pip install 'aiopgsafe[cli]'"
        )
    from .cli import app

    app(prog_name="aiopgsafe")


if __name__ == "__main__":
    main()
