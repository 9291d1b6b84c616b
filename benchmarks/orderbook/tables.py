#   Copyright 2026 - present The PyMC Developers
#
#   Licensed under the Apache License, Version 2.0 (the "License");
#   you may not use this file except in compliance with the License.
#   You may obtain a copy of the License at
#
#       http://www.apache.org/licenses/LICENSE-2.0
#
#   Unless required by applicable law or agreed to in writing, software
#   distributed under the License is distributed on an "AS IS" BASIS,
#   WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
#   See the License for the specific language governing permissions and
#   limitations under the License.
"""The tables and figures of ``reproduce``, made of the records of its stages."""

import json

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import filled

__all__ = ["Records", "case_name", "make_tables", "publish"]

CAPTURES, MESSAGES = "Kalshi captures", "messages"
ROWS, EXACT, PRESHUFFLE, FOLD = "rows", "exact", "preshuffle", "fold"
FIRST, SECOND = "in memory", "in memory again"
ORDERED, SHUFFLED = "in order of time", "preshuffled"
WAYS = FIRST, SECOND, ORDERED, SHUFFLED

ORIGINAL = {
    ORDERED: {1_000_000: 0.045, 20_000_000: 0.69, 26_000_000: 1.65},
    SHUFFLED: {20_000_000: 0.027, 122_000_000: 0.022},
}
"""max|Δ| of the posterior means against in memory, as the first experiment had it."""
ORIGINAL_MB = {FIRST: {122_000_000: 9_100}, SHUFFLED: {122_000_000: 570}}

COMMAND = "make reproduce"
COLORS = {FIRST: "tab:gray", SECOND: "tab:gray", ORDERED: "tab:red", SHUFFLED: "tab:blue"}
NOTHING = "–"

Records = dict[str, dict[str, dict[str, Any]]]
"""By case, then by kind: the "parameters" of a stage, its "result" and its "seconds"."""

Case = dict[str, Any]
"""Results by kind, and those of the one fit that a line of a table is about."""

Columns = list[tuple[str, Callable[[Case], Any]]]
"""Headers of a table, and what makes their cells: numbers, text, or None for nothing."""


def case_name(n_rows: float) -> str:
    """Name a table by its rows: 121.8M."""
    return f"{n_rows / 1e9:g}B" if n_rows >= 1e9 else f"{n_rows / 1e6:g}M"


def publish(found: dict[str, Any], results: Path, page: Path | None) -> None:
    """Write the numbers as JSON, the tables into *page*, and draw the figures."""
    records: Records = found["records"]
    results.mkdir(parents=True, exist_ok=True)
    (results / "reproduce.json").write_text(json.dumps(found, indent=1) + "\n")
    if page is not None:
        for name, table in make_tables(records).items():
            page.write_text(filled(page.read_text(), name, COMMAND, table))
    cases = [case for name, case in _fitted(records) if name != CAPTURES]
    label = "max|Δ| of the posterior means\nagainst in memory"
    _draw(
        cases, _apart, (ORDERED, SECOND, SHUFFLED), ORIGINAL, label, results / "reproduce_means.png"
    )
    label = "peak memory of the process, MB"
    ways = FIRST, ORDERED, SHUFFLED
    _draw(cases, _memory, ways, ORIGINAL_MB, label, results / "reproduce_memory.png")


def make_tables(records: Records) -> dict[str, str]:
    """Give each table as Markdown, by name."""
    cases = [((name,), case) for name, case in _fitted(records)]
    by_way = [((*names, w), case | case[w]) for names, case in cases for w in WAYS if w in case]
    streamed = [(names, case) for names, case in by_way if case["examination"]]
    folded = [
        ((name if name == CAPTURES else "synthetic, Parquet",), _results(case)[FOLD])
        for name, case in records.items()
        if FOLD in case
    ]
    return {
        "means": _table("rows", MEANS, cases),
        "errors": _table("rows", ERRORS, cases),
        "scales": _table("rows", SCALES, cases),
        "checks": _table("rows | streamed", CHECKS, streamed),
        "cost": _table("rows | way", COST, by_way),
        "preparation": _table("rows", PREPARATION, cases),
        "fold": _table("messages", FOLDED, folded),
    }


def _fitted(records: Records) -> list[tuple[str, Case]]:
    """List the cases that were fitted by their number of rows, the captures last."""
    cases = [(name, _results(case)) for name, case in records.items() if EXACT in case]
    return sorted(cases, key=lambda item: (item[0] == CAPTURES, item[1][EXACT]["n_rows"]))


def _results(case: dict[str, dict[str, Any]]) -> Case:
    return {
        kind: {"taken": record["seconds"], **record["parameters"], **record["result"]}
        for kind, record in case.items()
    }


def _table(first: str, columns: Columns, lines: Iterable[tuple[tuple[str, ...], Case]]) -> str:
    """Give a table as Markdown, without lines that say nothing."""
    header = [first, *(name for name, _ in columns)]
    rule = ["---"] * (len(columns) + 1 + first.count("|"))
    cells = [(names, [_text(cell(case)) for _, cell in columns]) for names, case in lines]
    told = [[*names, *line] for names, line in cells if {*line} != {NOTHING}]
    return "".join(f"| {' | '.join(line)} |\n" for line in (header, rule, *told))


def _text(value: Any) -> str:
    if value is None:
        return NOTHING
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 100 else f"{value:.2g}"
    return str(value)


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 100 else f"{seconds:,.0f} s"


def _apart(case: Case, way: str, *, averaged: bool = False) -> float | None:
    """Return max|Δ| of the posterior means of a fit against the first one in memory."""
    mean, first = (_mean(case, each, averaged) for each in (way, FIRST))
    if mean is None or first is None:
        return None
    return float(np.abs(np.subtract(mean, first)).max())


def _original(case: Case, way: str) -> str | None:
    """Find what the first experiment had at about as many rows."""
    n_rows = case[EXACT]["n_rows"]
    return next((f"{v:g}" for n, v in ORIGINAL[way].items() if abs(n / n_rows - 1) < 0.01), None)


def _mean(case: Case, way: str, averaged: bool) -> list[float] | None:
    if way not in case:
        return None
    if not averaged:
        return case[way]["last"]
    examination = case[way]["examination"]
    return examination["averaged"]["mean"] if examination else case[way]["averaged"]


def _error(case: Case, way: str, averaged: bool) -> float | None:
    """Return the error of the worst mean in posterior standard deviations."""
    return None if (mean := _mean(case, way, averaged)) is None else _off(case, mean)


def _off(case: Case, mean: list[float]) -> float:
    exact = case[EXACT]
    return float(np.abs(np.subtract(mean, exact["mean"]) / exact["sd"]).max())


def _scale(case: Case, sd: list[float]) -> str:
    """Tell the worst scale as a factor of the best one that a mean-field fit can have."""
    ratio = np.divide(sd, case[EXACT]["mean_field_sd"])
    return f"{ratio[np.abs(np.log(ratio)).argmax()]:.3g}"


def _corrected(case: Case, tell: Callable[[Case, Any], Any], name: str) -> Any:
    corrected = case[SHUFFLED]["examination"]["corrected"]
    return tell(case, corrected[name]) if corrected else "refused"


def _order(case: Case) -> str:
    order = case["examination"]["order"]
    if not order["ordered"]:
        return "no order"
    return (
        f"ordered: `{order['feature']}`, design effect {order['design_effect']:,.0f}, "
        f"drift of about {order['drift']:,.0f} sd"
    )


def _verdict(case: Case, name: str) -> str | None:
    state = case["examination"][name]
    return f"{state['verdict']} ({_text(state['z'])} sd)" if state["verdict"] else None


def _memory(case: Case, way: str) -> float | None:
    return case[way]["peak_mb"] if way in case else None


MEANS: Columns = [
    (SECOND, partial(_apart, way=SECOND)),
    (ORDERED, partial(_apart, way=ORDERED)),
    ("original", partial(_original, way=ORDERED)),
    (SHUFFLED, partial(_apart, way=SHUFFLED)),
    ("original", partial(_original, way=SHUFFLED)),
    (f"averaged: {SECOND}", partial(_apart, way=SECOND, averaged=True)),
    (f"averaged: {SHUFFLED}", partial(_apart, way=SHUFFLED, averaged=True)),
]
ERRORS: Columns = [
    *(
        (header, partial(_error, way=way, averaged=averaged))
        for way in (FIRST, ORDERED, SHUFFLED)
        for header, averaged in ((f"{way}, last step", False), ("averaged", True))
    ),
    ("corrected", lambda case: _corrected(case, _off, "mean")),
    ("whole epochs averaged", lambda case: case[SHUFFLED]["examination"]["epochs"]),
]
SCALES: Columns = [
    (FIRST, lambda case: _scale(case, case[FIRST]["sd"]) if FIRST in case else None),
    (ORDERED, lambda case: _scale(case, case[ORDERED]["sd"]) if ORDERED in case else None),
    (SHUFFLED, lambda case: _scale(case, case[SHUFFLED]["sd"])),
    ("corrected", lambda case: _corrected(case, _scale, "sd")),
]
CHECKS: Columns = [
    ("`check_order` before the fit", _order),
    ("`check_fit` at the last step", lambda case: _verdict(case, "last")),
    ("`check_fit` when averaged", lambda case: _verdict(case, "averaged")),
    ("correction", lambda case: "refused" if case["examination"]["refusal"] else "applied"),
]
COST: Columns = [
    ("peak memory", lambda case: f"{case['peak_mb']:,.0f} MB"),
    ("steps/s", lambda case: f"{case['steps_per_second']:,.0f}"),
    ("steps", lambda case: f"{case['n_steps']:,}"),
    ("ready", lambda case: _seconds(case["seconds"]["ready"])),
    ("fit", lambda case: _seconds(case["seconds"]["fit"])),
    (
        "check_fit",
        lambda case: (said := case["examination"]) and _seconds(said["averaged"]["seconds"]),
    ),
]
PREPARATION: Columns = [
    ("made in", lambda case: _seconds(case[ROWS]["seconds"]) if ROWS in case else None),
    ("on disk", lambda case: f"{case[ROWS]['bytes'] / 1e9:.2f} GB" if ROWS in case else None),
    ("preshuffle", lambda case: _seconds(case[PRESHUFFLE]["seconds"])),
    ("rows/s", lambda case: f"{case[PRESHUFFLE]['rows'] / case[PRESHUFFLE]['seconds']:,.0f}"),
    ("its peak memory", lambda case: f"{case[PRESHUFFLE]['peak_memory'] / 1e6:,.0f} MB"),
    ("exact posterior", lambda case: _seconds(case[EXACT]["taken"])),
]
FOLDED: Columns = [
    ("number", lambda fold: f"{fold['messages']:,}"),
    ("on disk", lambda fold: f"{fold['bytes'] / 1e9:.2f} GB"),
    ("messages/s", lambda fold: f"{fold['messages'] / fold['seconds']:,.0f}"),
    ("peak memory", lambda fold: f"{fold['peak_mb']:,.0f} MB"),
    ("rows", lambda fold: f"{fold['rows']:,}"),
]


def _draw(
    cases: list[Case],
    value: Callable[[Case, str], float | None],
    ways: tuple[str, ...],
    original: Any,
    ylabel: str,
    file: Path,
) -> None:
    """Draw a quantity against the number of rows, and what the first experiment had."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, 4), layout="constrained")
    ax = figure.subplots()
    for way in ways:
        points = [(case[EXACT]["n_rows"], value(case, way)) for case in cases]
        if points := [point for point in points if point[1] is not None]:
            ax.plot(*zip(*points), "o-", label=way, color=COLORS[way], ms=5)
    for way, known in original.items():
        label = f"original experiment, {way}"
        ax.plot(*zip(*known.items()), "x", label=label, color=COLORS[way], ms=8, mew=2)
    ax.set(xscale="log", yscale="log", xlabel="rows", ylabel=ylabel)
    ax.xaxis.set_major_formatter(lambda n_rows, _: case_name(n_rows))
    ax.yaxis.set_major_formatter("{x:,g}")
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(file, dpi=120)
