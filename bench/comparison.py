"""Cases, the figures of their rounds, and the table that comes of them: what the comparisons with others share."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from kvik.errors import KvikError
from kvik_runs import NotAvailable

HOPELESS = 0.7  # a peer's variant slower than this share of its best is not run again: some take minutes

Measure = partial[float]


@dataclass(frozen=True)
class Unit:
    """How figures are written, and which of two is better."""

    name: str
    scale: float = 1.0
    more_is_better: bool = True
    digits: int = 0

    def show(self, value: float) -> str:
        """Without the unit's name."""
        return f"{value / self.scale:,.{self.digits}f}"


RATE = Unit("tok/s")
MEMORY = Unit("MB", 1e6, more_is_better=False)
SECONDS = Unit("s", more_is_better=False, digits=2)


@dataclass(frozen=True)
class Case:
    """One row: a measurement of ours, and those of theirs of which the best counts."""

    name: str
    ours: Measure
    theirs: Mapping[str, Measure]
    unit: Unit = RATE
    target: float | None = 1.0  # of the ratio: how many times better than the best of theirs; None: none is set
    share_target: float | None = None  # of the share of the bandwidth
    step_bytes: Callable[[], float] | None = None  # bytes of memory that a step reads
    tokens_of_step: int = 1
    maximum: Callable[[], float] | None = None  # a target for our figure itself
    once: bool = False  # one round tells it


class Results:
    """Every figure of every round, by case and by whose it is."""

    def __init__(self) -> None:
        self.values: dict[str, dict[str, list[float]]] = {}
        self.missing: dict[str, str] = {}  # case and whose, why there is no figure
        self.failed = False  # something that should have worked did not
        self.bandwidth: list[float] = []
        self._of_this_round: dict[Any, float] = {}  # several cases may compare with one measurement

    def start_round(self, bandwidth: float) -> None:
        """Nothing measured before counts as measured."""
        self._of_this_round.clear()
        self.bandwidth.append(bandwidth)

    def measure(self, case: Case, whose: str, measure: Measure) -> None:
        """Add one figure, or note why there is none."""
        key = f"{case.name}: {whose}"
        if key in self.missing:
            return
        try:
            what = (measure.func, measure.args, tuple(measure.keywords.items()))
            value = self._of_this_round[what] if what in self._of_this_round else measure()
            self._of_this_round[what] = value
            self.values.setdefault(case.name, {}).setdefault(whose, []).append(value)
        except NotAvailable as reason:
            self.missing[key] = str(reason).partition("\n")[0]
        except (RuntimeError, OSError, KvikError) as error:  # the other cases are worth their time still
            self.missing[key] = f"failed: {error}"
            self.failed = True

    def run(self, case: Case, round_number: int) -> None:
        """One round of one case: ours, then theirs."""
        if case.once and round_number > 0:
            return
        self.measure(case, "kvik", case.ours)
        if "kvik" not in self.values.get(case.name, {}):
            return
        for variant in case.theirs:
            if not self.is_hopeless(case, variant):
                self.measure(case, variant, case.theirs[variant])

    def median(self, case: Case, whose: str) -> float | None:
        """Of the rounds so far."""
        values = self.values.get(case.name, {}).get(whose)
        return statistics.median(values) if values else None

    def best(self, case: Case) -> str | None:
        """The variant of theirs with the best median."""
        medians = {variant: self.median(case, variant) for variant in case.theirs}
        known = {variant: value for variant, value in medians.items() if value is not None}
        pick = max if case.unit.more_is_better else min
        return pick(known, key=lambda variant: known[variant]) if known else None

    def is_hopeless(self, case: Case, variant: str) -> bool:
        """Whether a variant has been shown to be far behind."""
        best, mine = self.best(case), self.values.get(case.name, {}).get(variant)
        if best is None or not mine or not case.unit.more_is_better:
            return False
        top = self.median(case, best)
        return top is not None and max(mine) < HOPELESS * top


def table(results: Results, chosen: Sequence[Case], whose: str = "llama.cpp") -> str:
    """Markdown: median (lowest ... highest); `whose` are the figures next to kvik's."""
    bandwidth = statistics.median(results.bandwidth) if results.bandwidth else None
    lines = [f"| case | kvik | {whose}, its best | ratio | target | of the bandwidth |", "|---|---|---|---|---|---|"]
    for case in chosen:
        ours, best = results.median(case, "kvik"), results.best(case)
        theirs = results.median(case, best) if best else None
        ratio = "-"
        if ours and theirs:
            ratio = f"{ours / theirs if case.unit.more_is_better else theirs / ours:.2f}"
        share = "-"
        if bandwidth and ours and case.step_bytes:
            share = f"{ours * case.step_bytes() / case.tokens_of_step / bandwidth:.0%}"
        name = f"{case.name}, {case.unit.name}"
        mine, other = figure(results, case, "kvik"), figure(results, case, best)
        lines.append(f"| {name} | {mine} | {other} | {ratio} | {target_of(case)} | {share} |")
    return "\n".join(lines)


def target_of(case: Case) -> str:
    """A cell: what is asked for."""
    if case.maximum is not None:
        return f"≤ {case.unit.show(case.maximum())} {case.unit.name}"
    ratio = [] if case.target is None else [f"≥ {case.target:g}"]
    share = [] if case.share_target is None else [f"≥ {case.share_target:.0%} of the bandwidth"]
    return ", ".join(ratio + share) or "-"


def figure(results: Results, case: Case, whose: str | None) -> str:
    """A cell."""
    values = results.values.get(case.name, {}).get(whose, []) if whose else []
    if not values:
        return "not available" if whose == "kvik" else "not measured"
    low, middle, high = (case.unit.show(value) for value in (min(values), statistics.median(values), max(values)))
    spread = f" ({low} … {high})" if len(values) > 1 else ""
    return f"{middle}{spread}" + (f" [{whose}]" if whose != "kvik" else "")
