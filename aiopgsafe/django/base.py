"""The backend's connection: Django finds it here."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import psycopg
from django.core.exceptions import ImproperlyConfigured
from django.db.backends.postgresql import base

from .._connection import Connection
from .._connection._connecting import check_timeout
from .._connection._sync_cursor import SyncRider
from .._errors import foremost, let_out
from .._outcome import COMMITTED
from .._sync_section import see_through
from ._atomic import Hooks, Leaving, Running, install

__all__ = ["DatabaseWrapper"]


class Cursor(SyncRider[Any], base.Cursor):  # type: ignore[misc]
    """Django's, which merges parameters into the query. BEGIN rides on what it executes."""

    _prepares = False


class ServerBindingCursor(SyncRider[Any], base.ServerBindingCursor):  # type: ignore[misc]
    """Django's with ``server_side_binding``."""


DRIVER = ModuleType("psycopg")
"""psycopg, as Django sees it, with connections of ours."""

DRIVER.__dict__.update(vars(psycopg), connect=Connection.connect)

TIMEOUTS = {"commit_timeout", "cancel_timeout", "statement_timeout"}

CURSORS = {base.Cursor: Cursor, base.ServerBindingCursor: ServerBindingCursor}


class DatabaseWrapper(base.DatabaseWrapper):  # type: ignore[misc]
    """Django's connection to PostgreSQL. Its COMMIT and what follows it can't be torn.

    OPTIONS may have what `aiopgsafe.Connection.connect()` takes: ``commit_timeout``,
    ``cancel_timeout``, ``statement_timeout``, ``commit_token``.
    """

    Database = DRIVER
    connection: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._leaving: list[Leaving] = []
        # Callbacks of what was committed, and torn, where the program manages transactions.
        self._kept: list[Any] = []

    def get_connection_params(self) -> dict[str, Any]:
        """Django's, with cursors of ours in place of its own."""
        params: dict[str, Any] = super().get_connection_params()
        for name in TIMEOUTS & params.keys():
            try:
                check_timeout(name, params[name])
            except (TypeError, ValueError) as exc:
                raise ImproperlyConfigured(f"OPTIONS of database {self.alias!r}: {exc}") from exc
        params["cursor_factory"] = CURSORS.get(params["cursor_factory"], params["cursor_factory"])
        return params

    @property
    def pool(self) -> Any:
        """Django's, of connections of ours."""
        options = self.settings_dict["OPTIONS"]
        if not options.get("pool"):  # asked for thrice a transaction
            return None
        given = {} if options["pool"] is True else options["pool"]
        options["pool"] = {"connection_class": Connection, **given}
        return super().pool

    def commit(self) -> None:
        """Commit. What has been committed is known to be, whatever interrupts."""
        unit = getattr(self.connection, "_unit", None)
        try:
            super().commit()
            if self.connection is not None and self.connection.closed:
                # Lost, and the server was asked: it is committed. Django connects again.
                self._close()
                self.connection = None
        except BaseException:
            if unit is not None and unit.state is COMMITTED:
                self.errors_occurred = False
                self.run_commit_hooks_on_set_autocommit_on = True
                self._kept = [*self.run_on_commit]
            raise

    def rollback(self) -> None:
        """Roll back. A program does so when its `commit()` was torn, though it has committed."""
        super().rollback()
        self.run_on_commit = [*self._kept]

    def close(self) -> None:
        """Close the connection. Callbacks that have not been called never will be."""
        self._kept = []
        super().close()

    def run_and_clear_commit_hooks(self) -> None:
        """Run the callbacks of the transaction that was committed."""
        self.validate_no_atomic_block()
        leaving = self._leaving[-1] if self._leaving else None
        hooks = leaving.hooks if leaving is not None else None
        nested = hooks is not None and hooks.running  # in a callback
        if hooks is None or nested:
            hooks = Hooks(self, self.run_on_commit)
            if leaving is not None and not nested:
                leaving.hooks = hooks
        self._kept = []
        if hooks.over:
            return
        if leaving is not None and not nested:
            hooks.run()  # in that section
            raised = hooks.raised
        else:
            running = Running(hooks, self)
            torn = see_through(running)
            raised = foremost(torn, running.signalled, hooks.raised)
        if raised is not None:
            let_out(raised)


install()
