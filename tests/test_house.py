"""The rules of the house: who imports whom, who knows psycopg's private parts, what is public."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import psycopg
import psycopg._capabilities
import psycopg._conninfo_utils
import psycopg._cursor_base
import psycopg._queries
import psycopg.generators
import psycopg.waiting
import pytest
from psycopg.pq import ConnStatus

import aiopgsafe
from aiopgsafe import _backends
from aiopgsafe._backends import _readiness
from aiopgsafe._connection._rider import RidingCursor

PACKAGE = Path(aiopgsafe.__file__).parent

STOREYS = [
    "_errors",
    "_calls",
    "_shield",
    "_backends",
    "_outcome",
    "_resolver",
    "_unit",
    "_session",
    "_ending",
    "_base_block",
    "_transaction",
    "_sync_section",
    "_sync_ending",
    "_sync_transaction",
    "_signals",
    "_connection",
    "_retry",
    "_health",
    "_pool",
    "_listener",
    "_draining",
    "_blocks",
    "_database",
    "django",
]
"""From top to bottom: a module may import what stands above it."""

PUBLIC_ONLY = ["fastapi", "testing", "_demo", "_tools", "cli", "__main__"]
"""These see what users see."""


def modules() -> Iterator[tuple[str, Path]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        yield parts[0], path


def imports(path: Path) -> Iterator[str]:
    """The full names of the modules that a file imports, in TYPE_CHECKING blocks too."""
    package = ["aiopgsafe", *path.relative_to(PACKAGE).parent.parts]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize(("storey", "path"), list(modules()), ids=lambda value: Path(value).name)
def test_imports_go_one_way(storey: str, path: Path) -> None:
    for name in imports(path):
        parts = name.split(".")
        if parts[0] != "aiopgsafe" or len(parts) < 2 or storey == "__init__":
            continue
        if storey in STOREYS:
            assert parts[1] in STOREYS, f"{path.name} imports {name}"
            above = STOREYS[: STOREYS.index(storey) + 1]
            assert parts[1] in above, f"{path.name} imports {name} from below"
        else:
            assert storey in PUBLIC_ONLY
            assert parts[1] in {
                *aiopgsafe.__all__,
                storey,
                "testing",
                "_demo",
                "_tools",
                "__version__",
            } or (storey == "__main__" and parts[1] == "cli"), f"{path.name} imports {name}"


@pytest.mark.parametrize(("storey", "path"), list(modules()), ids=lambda value: Path(value).name)
def test_the_event_loop_is_seen_through_the_backends_only(storey: str, path: Path) -> None:
    if storey in ("_backends", "testing", "_demo"):
        return
    assert not [n for n in imports(path) if n.split(".")[0] in ("asyncio", "trio", "uvloop")]


@pytest.mark.parametrize(("storey", "path"), list(modules()), ids=lambda value: Path(value).name)
def test_psycopgs_private_parts_are_known_to_the_connection_only(storey: str, path: Path) -> None:
    if storey == "_connection":
        return
    for name in imports(path):
        if name.startswith("psycopg"):
            assert not any(part.startswith("_") for part in name.split(".")), name


@pytest.mark.parametrize(
    ("owner", "name", "signature"),
    [
        (psycopg.BaseConnection, "_exec_command", "(self, command, result_format)"),
        (psycopg.BaseConnection, "_get_tx_start_command", "(self)"),
        (psycopg.BaseConnection, "_rollback_gen", "(self)"),
        (psycopg.BaseConnection, "_tpc_finish_gen", "(self, action, xid)"),
        (psycopg.BaseConnection, "_check_connection_ok", "(self)"),
        (psycopg.BaseConnection, "_connect_gen", "(conninfo)"),
        (psycopg.BaseConnection, "_cancel_gen", "(self)"),
        (psycopg.BaseConnection, "_should_cancel", "(self)"),
        (psycopg.errors, "_info_to_dict", "(info)"),
        (psycopg.BaseConnection, "_notify_handler", "(wself, pgn)"),
        (psycopg.AsyncConnection, "_get_connection_params", "(conninfo, kwargs)"),
        (psycopg.AsyncConnection, "_try_cancel", "(self, timeout)"),
        (psycopg.AsyncConnection, "_pipeline_nolock", "(self)"),
        (psycopg.BaseConnection, "_start_query", "(self)"),
        (psycopg.AsyncConnection, "wait", "(self, gen, interval, timeout)"),
        (psycopg.AsyncCursor, "_execute_gen", "(self, query, params, prepare, binary)"),
        (psycopg.AsyncPipeline, "_sync_gen", "(self)"),
        (psycopg.AsyncPipeline, "_process_results", "(self, queued, results)"),
        (psycopg._conninfo_utils, "split_attempts", "(params)"),
        (psycopg._conninfo_utils, "get_param", "(params, name)"),
        (psycopg._conninfo_utils, "gssapi_requested", "(params)"),
        (psycopg.AsyncCursor, "_start_query", "(self, query)"),
        (psycopg.AsyncCursor, "_reset", "(self, reset_query)"),
        (psycopg.AsyncCursor, "_loaders_changed", "(wself, oid, loader)"),
        (psycopg.AsyncCursor, "_maybe_prepare_gen", "(self, pgq, prepare, binary)"),
        (psycopg._queries.PostgresQuery, "convert", "(self, query, vars)"),
        (psycopg._queries, "_query2pg_nocache", "(query, encoding)"),
        (psycopg._preparing.PrepareManager, "get", "(self, query, prepare)"),
        (psycopg._preparing.PrepareManager, "clear", "(self)"),
        (psycopg._preparing.PrepareManager, "maintain_gen", "(self, conn)"),
    ],
    ids=lambda value: value if isinstance(value, str) else getattr(value, "__name__", ""),
)
def test_a_psycopg_that_moves_its_private_parts_fails_here(
    owner: object, name: str, signature: str
) -> None:
    parameters = inspect.signature(getattr(owner, name)).parameters
    assert f"({', '.join(parameters)})" == signature


@pytest.mark.parametrize("is_async", [True, False])
def test_a_cursor_is_made_as_psycopg_makes_it(is_async: bool) -> None:
    """Ours sets the same attributes, but for the adapters, which it makes when asked."""
    made = inspect.getsource(psycopg.AsyncCursor.__init__ if is_async else psycopg.Cursor.__init__)
    made += inspect.getsource(psycopg._cursor_base.BaseCursor.__init__)
    ours = inspect.getsource(RidingCursor._set_up)
    assert set(re.findall(r"self\.(\w+)(?:: .*)? = ", made)) == set(
        re.findall(r"self\.(\w+)(?:: .*)? = ", ours)
    )


def test_psycopg_is_as_the_connection_believes() -> None:
    conn = inspect.getsource(psycopg.BaseConnection.__init__)
    for attribute in ("_num_transactions", "_tpc", "_notifies_backlog", "_notify_handlers"):
        assert f"self.{attribute}" in conn
    assert "pgconn.cancel_conn()" in inspect.getsource(psycopg.BaseConnection._cancel_gen)
    assert ConnStatus.BAD == _backends.CONNECTION_BAD
    assert psycopg.waiting.Wait.R == psycopg.waiting.Ready.R == _readiness.READ
    assert psycopg.waiting.Wait.W == psycopg.waiting.Ready.W == _readiness.WRITE
    # What psycopg looks for in a pipeline's queue; `_KeptResult` stands there.
    source = inspect.getsource(psycopg.AsyncPipeline._process_results)
    assert "cursor._check_results(results)" in source
    assert "cursor._set_results(results)" in source


def test_public_names_say_that_they_are_aiopgsafes() -> None:
    for name in aiopgsafe.__all__:
        value = getattr(aiopgsafe, name)
        home = "psycopg" if name in ("IsolationLevel", "Notify", "Rollback") else "aiopgsafe"
        assert value.__module__ == home, name
        assert value.__doc__, name
    assert sorted(aiopgsafe.__all__) == aiopgsafe.__all__


def test_no_file_takes_longer_to_read_than_ten_minutes() -> None:
    long = {str(path): len(path.read_text().splitlines()) for _, path in modules()}
    assert {path: lines for path, lines in long.items() if lines > 450} == {}
