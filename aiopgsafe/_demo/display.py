"""What people see: progress while it runs, one table at the end."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console, Group
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn
from rich.table import Table
from rich.text import Text

from .clients import Book
from .figures import Figures

GOOD, BAD, DOUBT = "green", "bold red", "yellow"

FAULTS = {
    "lies": '"not committed", but it was',
    "lies_when_killed": '"not committed", but it was: server process killed',
    "false_commits": '"committed", but it was not',
    "callbacks_lost": "not run",
    "callbacks_doubled": "run twice",
    "thrown_away": "connections thrown away",
    "left_running": "cancelled queries left running on the server",
    "money_astray": "€ that moved against what the client believes",
    "money_created": "€ created or lost in the accounts",
    "places_lost": "places of the pool lost",
    "clients_stuck": "clients that did not come back",
    "unexpected": "unexpected exceptions",
}
"""`figures.MUST_BE_ZERO` in words."""


@contextmanager
def progress_of(console: Console, name: str, seconds: float) -> Iterator[Callable[[Book], None]]:
    """A bar for one side; yields the function to be called as time passes."""
    columns = (
        SpinnerColumn(finished_text=" "),
        TextColumn("{task.description:<10}"),
        BarColumn(bar_width=30),
        TextColumn("{task.fields[counts]}"),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(name, total=seconds, counts="connecting")

        def update(book: Book) -> None:
            if book.started is not None:
                counts = f"{len(book.notes):,} transfers, {book.cancelled:,} cancelled"
                passed = min(time.monotonic() - book.started, seconds)
                progress.update(task, completed=passed, counts=counts)

        yield update


class Report:
    """The table of both sides' figures.

    :param peer_label: what stands over the peer's column, below its name.
    """

    def __init__(
        self, peer: Figures, ours: Figures, *, peer_label: str, ours_label: str, plain: bool
    ) -> None:
        self._sides = (peer, ours)
        self._marks = ("ok", "!!") if plain else ("✓", "✗")
        self._table = Table(box=None, padding=(0, 1), pad_edge=False)
        self._table.add_column("", width=60)
        for label in (f"psycopg\n{peer_label}", f"aiopgsafe\n{ours_label}"):
            self._table.add_column(label, justify="right", width=14)
            self._table.add_column("", width=2)

    def render(self) -> Group:
        self._section("What happened", first=True)
        self._fact("transfers tried", "tried")
        self._fact("committed: they are in the table", "committed")
        self._fact("cancelled at a random moment", "cancelled")
        self._fact("   while COMMIT was under way", "cancelled_in_commit", "bold")
        self._fact("server processes killed", "killed")
        self._fact("   and the answer to COMMIT was lost with them", "killed_in_commit", "bold")

        self._section("What the clients believe")
        self._fault("lies")
        for kind in dict.fromkeys(kind for side in self._sides for kind in side.by_kind):
            self._kind(kind)
        self._fault("lies_when_killed")
        self._fact('"can\'t be known" (CommitUnknown)', "in_doubt", DOUBT)
        self._fault("false_commits")

        self._section("on_commit callbacks (psycopg: the code after the block)")
        self._fault("callbacks_lost")
        self._fault("callbacks_doubled")

        self._section("What it cost")
        self._fault("thrown_away")
        self._rate("   for each cancellation", "thrown_away", "cancelled", "reports")
        self._fact("long queries cancelled", "reports")
        self._fault("left_running")
        self._fault("money_astray")
        self._fault("money_created")
        for name in ("places_lost", "clients_stuck", "unexpected"):
            if any(getattr(side, name) for side in self._sides):
                self._fault(name)
        return Group(self._table, Text(), *self._verdicts())

    def _section(self, title: str, *, first: bool = False) -> None:
        if not first:
            self._table.add_row()
        self._table.add_row(Text(title, style="bold cyan"))

    def _fact(self, label: str, name: str, style: str = "") -> None:
        cells: list[Text] = []
        for side in self._sides:
            value = _value(side, name)
            cells += [Text(f"{value:,}", style=style if value else "dim"), Text()]
        self._table.add_row(f"  {label}", *cells)

    def _rate(self, label: str, name: str, *of: str) -> None:
        cells: list[Text] = []
        for side in self._sides:
            count = sum(_value(side, each) for each in of)
            rate = f"{_value(side, name) / count:.2f}" if count else "-"
            cells += [Text(rate, style="dim"), Text()]
        self._table.add_row(f"  {label}", *cells)

    def _fault(self, name: str) -> None:
        cells: list[Text] = []
        for side in self._sides:
            value = _value(side, name)
            style = BAD if value else GOOD
            cells += [Text(f"{value:,}", style=style), Text(self._marks[bool(value)], style=style)]
        self._table.add_row(f"  {FAULTS[name]}", *cells)

    def _kind(self, kind: str) -> None:
        """Of the cancellations in COMMIT by one kind, those that became lies."""
        cells: list[Text] = []
        for side in self._sides:
            counts = side.by_kind.get(kind)
            text = f"{counts['lies']:,} of {counts['in_commit']:,}" if counts else "-"
            cells += [Text(text, style="dim"), Text()]
        self._table.add_row(Text(f"     cancelled in COMMIT by {kind}", style="dim"), *cells)

    def _verdicts(self) -> list[Text]:
        peer, ours = self._sides
        verdicts = []
        if peer.lies:
            verdicts.append(
                self._verdict(
                    "psycopg",
                    True,
                    f"{peer.lies:,} transfers were committed, and their clients were told that"
                    " they were not.",
                )
            )
        faults = ours.faults()
        if faults:
            text = "; ".join(f"{_value(ours, name):,} {FAULTS[name]}" for name in faults) + "."
        elif not ours.cancelled_in_commit:
            faults, text = ["nothing"], "no cancellation landed in COMMIT: nothing is shown."
        else:
            text = (
                f"{ours.cancelled_in_commit:,} cancellations landed in COMMIT, and nobody was told"
                " anything but the truth."
            )
        if ours.in_doubt:
            text += (
                f"\n{'':12}{ours.in_doubt:,} lost the connection in COMMIT: told that the outcome"
                " is unknown."
            )
        verdicts.append(self._verdict("aiopgsafe", bool(faults), text))
        return verdicts

    def _verdict(self, name: str, bad: bool, text: str) -> Text:
        style = BAD if bad else GOOD
        return Text.assemble((f"{self._marks[bad]} {name:<10}", style), text)


def _value(side: Figures, name: str) -> int:
    value = getattr(side, name)
    return sum(value.values()) if isinstance(value, dict) else int(value)
