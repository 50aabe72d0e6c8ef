"""Several commands in one round trip: libpq's pipeline mode, without psycopg's pipelines."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import psycopg
from psycopg import errors, generators, pq

if TYPE_CHECKING:
    from psycopg.abc import PQGen
    from psycopg.pq.abc import PGconn, PGresult

logger = logging.getLogger("aiopgsafe")

ACTIVE = pq.TransactionStatus.ACTIVE
COPY_IN = pq.ExecStatus.COPY_IN
COPYING = (COPY_IN, pq.ExecStatus.COPY_OUT, pq.ExecStatus.COPY_BOTH)
SYNC = pq.ExecStatus.PIPELINE_SYNC
ABORTED = pq.ExecStatus.PIPELINE_ABORTED
FATAL_ERROR = pq.ExecStatus.FATAL_ERROR

Results = list["PGresult"]


def together_gen(
    pgconn: PGconn, sends: Sequence[Callable[[], None]], syncs: int = 1
) -> PQGen[Results]:
    """Send all in one pipeline; the result of each, errors too, but not of the Syncs.

    :param syncs: that come back, the one at the end included.
    """
    try:
        pgconn.enter_pipeline_mode()
        for send in sends:
            send()
        pgconn.pipeline_sync()
        return (yield from collect_gen(pgconn, syncs))
    finally:
        leave_pipeline_mode(pgconn)


def collect_gen(
    pgconn: PGconn, syncs: int = 1, seen: dict[int, Callable[[PGresult], None]] | None = None
) -> PQGen[Results]:
    """Send what is queued, and take all results up to the last Sync.

    :param seen: called with the result at that place as soon as it is there: those behind
        it may never come.
    """
    results: Results = []
    try:
        some = yield from generators.execute(pgconn)
        while True:
            if some and some[0].status == SYNC:
                syncs -= 1
                if not syncs:
                    return results
            else:
                results += some
                if seen is not None and (call := seen.get(len(results) - 1)) is not None:
                    call(results[-1])
            some = yield from generators.fetch_many(pgconn)
    except psycopg.Error:
        # A session that ends says why before its connection does.
        check(results, pgconn)
        raise


def leave_pipeline_mode(pgconn: PGconn) -> None:
    """At the end. Where an exception has hit before, `rest_gen()` takes what is left."""
    if pgconn.pipeline_status:
        try:
            pgconn.exit_pipeline_mode()
        except psycopg.Error as exc:
            logger.debug("pipeline mode goes on: %s", exc)


def rest_gen(pgconn: PGconn) -> PQGen[None]:
    """Take all that is still to come of a pipeline, wherever an exception has hit, and leave it.

    What was sent may have no Sync yet: ours ends it, and one too many does no harm.
    """
    pgconn.pipeline_sync()
    results = yield from generators.execute(pgconn)
    while pgconn.pipeline_status:
        if results and results[0].status == SYNC:
            leave_pipeline_mode(pgconn)
            if not pgconn.pipeline_status:
                return
        results = yield from generators.fetch_many(pgconn)


def left_gen(pgconn: PGconn, interrupted: str = "") -> PQGen[None] | None:
    """Takes what is still to come of a statement whose generator has ended before it.

    :param interrupted: the generator's name.
    """
    if pgconn.pipeline_status:
        return rest_gen(pgconn)
    if pgconn.transaction_status != ACTIVE:
        return None
    return end_copy_gen(pgconn) if interrupted == "_start_copy_gen" else drain_gen(pgconn)


def drain_gen(pgconn: PGconn) -> PQGen[None]:
    """Take all results, up to a COPY."""
    while (result := (yield from generators.fetch(pgconn))) is not None:
        if result.status in COPYING:
            return


def over_gen(pgconn: PGconn) -> PQGen[None]:
    """Take all results, and end a COPY of which nobody knows any more."""
    while pgconn.transaction_status == ACTIVE:
        result = yield from generators.fetch(pgconn)
        if result is None:
            return
        try:
            if result.status == COPY_IN:
                yield from generators.copy_end(pgconn, b"left unfinished")
            elif result.status in COPYING:
                yield from left_in_cursor_gen(pgconn)
        except psycopg.Error as exc:  # it has failed, as it was to
            logger.debug("unfinished COPY: %r", exc)


def left_in_cursor_gen(pgconn: PGconn) -> PQGen[None]:
    """Take the rest of a COPY TO, or of a stream, that has been cancelled; its errors, too."""
    try:
        while isinstance((yield from generators.copy_from(pgconn)), memoryview):
            continue
    except psycopg.Error as exc:  # cancelled; or it is no COPY
        logger.debug("interrupted statement: %r", exc)
    while pgconn.transaction_status == ACTIVE:
        yield from generators.fetch(pgconn)


def end_copy_gen(pgconn: PGconn) -> PQGen[None]:
    """End a COPY that has just begun."""
    copy = pgconn.get_result()  # of which there are any number, in COPY mode
    if copy is not None and copy.status == COPY_IN:
        yield from generators.copy_end(pgconn, b"the task was interrupted")
    while isinstance((yield from generators.copy_from(pgconn)), memoryview):
        continue


def check(results: Sequence[PGresult], pgconn: PGconn) -> None:
    """Raise the first error among results."""
    for result in results:
        if result.status == FATAL_ERROR:
            raise errors.error_from_result(result, encoding=pgconn._encoding)
        if result.status == ABORTED:
            raise errors.PipelineAborted("pipeline aborted")


class KeptResults:
    """Stands in a pipeline's queue for a cursor: keeps the results instead of showing them."""

    def __init__(self, pgconn: PGconn) -> None:
        self._pgconn = pgconn
        self.results: list[PGresult] = []

    def _check_results(self, results: Sequence[PGresult]) -> None:
        check(results, self._pgconn)

    def _set_results(self, results: Sequence[PGresult]) -> None:
        self.results += results
