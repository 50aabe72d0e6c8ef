"""The figures: what the clients believe, compared with what is in the tables."""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import dataclass, field

from .. import TransactionState
from .bank import Bank, Truth
from .clients import Book, Note
from .wires import Wires

MUST_BE_ZERO = (
    "lies",
    "lies_when_killed",
    "false_commits",
    "callbacks_lost",
    "callbacks_doubled",
    "thrown_away",
    "left_running",
    "places_lost",
    "money_created",
    "money_astray",
    "clients_stuck",
    "unexpected",
)
"""The figures that are faults, in `Figures`."""


@dataclass
class Figures:
    """One side's figures.

    :ivar tried: transfers begun.
    :ivar committed: transfers in the table: the truth.
    :ivar cancelled: transfers that ended with a cancellation.
    :ivar cancelled_in_commit: those of them whose COMMIT had passed to the server.
    :ivar by_kind: for each way to cancel: how many landed in COMMIT, how many of these are lies.
    :ivar killed: server processes killed.
    :ivar killed_in_commit: transfers whose COMMIT's answer was lost with the server process.
    :ivar lies: believed not to be committed, but it is (the server process lived).
    :ivar lies_when_killed: the same where the answer was lost with the server process.
    :ivar in_doubt: `CommitUnknown`: the client was told that it can't be known.
    :ivar false_commits: believed to be committed, but it is not.
    :ivar callbacks_lost: committed and not in doubt, and `on_commit` (psycopg: the code after the
        block) never ran.
    :ivar callbacks_doubled: it ran more than once.
    :ivar opened: connections opened.
    :ivar thrown_away: those of them that the server did not kill and that were replaced.
    :ivar reports: long queries begun, each of which was cancelled.
    :ivar left_running: those of them that ran on on the server a second after the last one.
    :ivar places_lost: of the pool, that have no connection any more.
    :ivar money_created: the sum of the balances now, less what it was at the start.
    :ivar money_astray: the sum of the transfers of which a client believes the wrong thing,
        those in doubt or lost with the server process left out.
    :ivar clients_stuck: that have not finished.
    :ivar unexpected: exceptions that a user of the library would not expect, and how many.
    """

    tried: int = 0
    committed: int = 0
    cancelled: int = 0
    cancelled_in_commit: int = 0
    by_kind: dict[str, dict[str, int]] = field(default_factory=dict)
    killed: int = 0
    killed_in_commit: int = 0
    lies: int = 0
    lies_when_killed: int = 0
    in_doubt: int = 0
    false_commits: int = 0
    callbacks_lost: int = 0
    callbacks_doubled: int = 0
    opened: int = 0
    thrown_away: int = 0
    reports: int = 0
    left_running: int = 0
    places_lost: int = 0
    money_created: int = 0
    money_astray: int = 0
    clients_stuck: int = 0
    unexpected: dict[str, int] = field(default_factory=dict)

    def faults(self) -> list[str]:
        """The names of the figures that should be zero and are not."""
        return [name for name in MUST_BE_ZERO if getattr(self, name)]

    def count(
        self,
        note: Note,
        committed: Container[str],
        commit_sent: Container[str],
        answer_lost: Container[str],
    ) -> None:
        """Add one transfer. The others are ids of transfers: see `Truth` and `Wires`."""
        transfer = note.transfer
        is_committed = transfer.id in committed
        in_commit = note.ending == "cancelled" and transfer.id in commit_sent
        is_answer_lost = transfer.id in answer_lost
        told = note.told_committed > 0
        # Who is told "unknown" and acts as if it were committed is not in doubt.
        in_doubt = note.state is TransactionState.UNKNOWN and not told
        self.tried += 1
        self.committed += is_committed
        self.cancelled += note.ending == "cancelled"
        self.cancelled_in_commit += in_commit
        self.in_doubt += in_doubt
        self.callbacks_doubled += note.told_committed > 1

        # Everything that the library says must be the truth: the callback (psycopg: the code
        # after the block), the block that ended normally, and the state of the transaction.
        says = [told]
        if note.ending == "normal":
            says.append(True)
        if note.state is not None:
            says.append(note.state is TransactionState.COMMITTED)
        lie = is_committed and not in_doubt and not all(says)
        false_commit = not is_committed and any(says)
        self.lies += lie and not is_answer_lost
        self.lies_when_killed += lie and is_answer_lost
        self.false_commits += false_commit
        self.callbacks_lost += is_committed and not told and not in_doubt
        if (lie and not is_answer_lost) or false_commit:
            self.money_astray += transfer.amount

        kind = self.by_kind[transfer.kind]
        kind["in_commit"] += in_commit
        kind["lies"] += in_commit and lie and not is_answer_lost


def figures_of(
    bank: Bank,
    truth: Truth,
    book: Book,
    wires: Wires,
    *,
    kinds: Iterable[str],
    size: int,
    places_lost: int,
    left_running: int,
) -> Figures:
    """One side's figures.

    :param kinds: the names of the ways to cancel.
    :param size: how many clients, and so many connections, there were.
    """
    figures = Figures(
        by_kind={kind: {"in_commit": 0, "lies": 0} for kind in kinds},
        killed=wires.killed,
        killed_in_commit=len(wires.answer_lost),
        opened=wires.opened,
        thrown_away=wires.opened - size - wires.killed + places_lost,
        reports=book.reports,
        left_running=left_running,
        places_lost=places_lost,
        money_created=truth.balances - bank.start,
        clients_stuck=size - book.finished,
        unexpected=dict(book.unexpected),
    )
    for note in book.notes.values():
        figures.count(note, truth.committed, wires.commit_sent, wires.answer_lost)
    return figures
