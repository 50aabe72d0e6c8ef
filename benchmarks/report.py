"""What was measured: printed as it comes, and kept for the plots."""

from __future__ import annotations

from benchmarks.turns import Figures

OURS = "aiopgsafe"


class Report:
    """By title and loop: each client's median. Smaller is better, except for rates."""

    def __init__(self) -> None:
        self.medians: dict[str, dict[str, dict[str, float]]] = {}
        self.units: dict[str, str] = {}

    def add(self, loop: str, title: str, figures: dict[str, Figures]) -> None:
        medians = {name: f.median for name, f in figures.items()}
        self._keep(loop, title, medians, "µs")
        cells = [
            f"{name} {f.median:.1f} (p99 {f.p99:.0f}, cpu {f.client:.0f} + {f.server:.0f})"
            for name, f in figures.items()
        ]
        self._print(loop, title, cells, {n: m / medians[OURS] for n, m in medians.items()})

    def add_rates(self, loop: str, title: str, rates: dict[str, float]) -> None:
        self._keep(loop, title, rates, "transactions/s")
        cells = [f"{name} {rate:,.0f}/s" for name, rate in rates.items()]
        self._print(loop, title, cells, {n: rates[OURS] / r for n, r in rates.items()})

    def add_waits(self, loop: str, title: str, waits: dict[str, float]) -> None:
        title += ", p99"
        self._keep(loop, title, waits, "ms")
        cells = [f"{name} {wait:.1f} ms" for name, wait in waits.items()]
        self._print(loop, title, cells, {n: w / waits[OURS] for n, w in waits.items()})

    def _keep(self, loop: str, title: str, values: dict[str, float], unit: str) -> None:
        self.medians.setdefault(title, {})[loop] = values
        self.units[title] = unit

    def _print(self, loop: str, title: str, cells: list[str], ratios: dict[str, float]) -> None:
        others = [f"{ratio:.2f} {name}" for name, ratio in ratios.items() if name != OURS]
        print(f"{loop:8}{title:36}{', '.join(others)}", flush=True)
        print(f"{'':12}{', '.join(cells)}", flush=True)
