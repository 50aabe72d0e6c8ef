"""The examples end by themselves, with status 0."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psycopg
import pytest

from aiopgsafe.testing import TemporaryServer

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("[!_]*.py"))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_the_example_runs(example: Path, server: TemporaryServer) -> None:
    command = [sys.executable, "-W", "error", str(example), server.dsn]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    assert example.read_text().startswith('"""Shows ')
    with psycopg.connect(server.dsn, autocommit=True) as admin:
        left = "select count(*) from pg_stat_activity where state like 'idle in transaction%'"
        assert admin.execute(left).fetchone() == (0,)


def test_an_example_brings_a_server_of_its_own() -> None:
    command = [sys.executable, str(EXAMPLES[0].with_stem("quickstart"))]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr
    assert "the transaction is committed" in result.stdout


def test_the_celery_worker_loses_callbacks_with_the_stock_backend_only(long: bool) -> None:
    show = EXAMPLES[0].parent / "django_celery" / "show.py"
    command = [sys.executable, str(show), "--rounds", "1"]
    if not long:  # the stock backend's loss is shown in `test_django.py`, too
        command += ["--engine", "aiopgsafe.django"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=170, check=False)
    assert result.returncode == 0, result.stderr
    *rest, ours = result.stdout.splitlines()
    assert ours.count("0 of 1 lost") == 3, result.stdout
    assert not long or rest[-1].count("1 of 1 lost") == 3, result.stdout
