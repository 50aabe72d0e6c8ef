"""Connecting: which addresses to try, and what to say when none answers."""

from __future__ import annotations

import os
from functools import partial
from math import isfinite
from typing import TYPE_CHECKING

import psycopg
from psycopg._conninfo_utils import get_param, is_ip_address, split_attempts
from psycopg.conninfo import conninfo_attempts

from .._backends import Backend

if TYPE_CHECKING:
    from psycopg.abc import ConnDict


def check_timeout(name: str, seconds: float) -> None:
    """Raise if `seconds` is not a positive, finite number."""
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)):
        raise TypeError(f"{name} is a number of seconds, not {type(seconds).__name__}")
    if not isfinite(seconds) or seconds <= 0:
        raise ValueError(f"{name} must be a positive, finite number of seconds, not {seconds}")


def add_option(params: ConnDict, option: str) -> None:
    """Add a server setting to ``options``, as they are given or else in the environment."""
    options = params.get("options") or os.environ.get("PGOPTIONS", "")
    params["options"] = f"{options} {option}".strip()


async def attempts(backend: Backend, params: ConnDict) -> list[ConnDict]:
    """The addresses to try, in order. psycopg's own code, in a thread where it must ask the DNS."""
    for attempt in split_attempts(params):
        host = get_param(attempt, "host")
        named = host and not host.startswith("/") and not is_ip_address(host)
        if named and not get_param(attempt, "hostaddr"):
            return await backend.in_thread(partial(conninfo_attempts, params)).wait()
    return conninfo_attempts(params)


def connect_error(failures: list[tuple[psycopg.Error, str]]) -> psycopg.Error:
    last = failures[-1][0]
    if len(failures) == 1:
        return last.with_traceback(None)
    lines = [str(last), "Multiple connection attempts failed. All failures were:"]
    lines.extend(f"- {where}: {error}" for error, where in failures)
    return type(last)("\n".join(lines), pgconn=last.pgconn)
