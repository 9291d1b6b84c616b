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

from benchmarks.pages import filled

__all__ = ["Records", "publish"]

CAPTURES, MESSAGES = "Kalshi captures", "messages"
ROWS, EXACT, PRESHUFFLE, FOLD = "rows", "exact", "preshuffle", "fold"
FIRST, SECOND = "in memory", "in memory again"
IN_MEMORY = (1, FIRST), (2, SECOND)
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
"""By case, then by kind: the "parameters" of a step, its "result" and its "seconds"."""

Case = dict[str, Any]
"""Results by kind."""


def case_name(n_rows: float) -> str:
    """Name a table by its rows: 121.8M."""
    return f"{n_rows / 1e9:g}B" if n_rows >= 1e9 else f"{n_rows / 1e6:g}M"


def publish(records: Records, results: Path, page: Path | None) -> None:
    """Write the numbers as JSON, the tables into *page*, and draw the figures."""
    results.mkdir(parents=True, exist_ok=True)
    (results / "reproduce.json").write_text(json.dumps({"records": records}, indent=1) + "\n")
    if page is not None:
        for name, table in make_tables(records).items():
            page.write_text(filled(page.read_text(), name, COMMAND, table))
    cases = [_results(case) for name, case in records.items() if name != CAPTURES and EXACT in case]
    cases.sort(key=lambda case: case[EXACT]["n_rows"])
    for name, (ylabel, lines, original) in FIGURES.items():
        _draw(cases, ylabel, lines, original, results / f"reproduce_{name}.png")


def make_tables(records: Records) -> dict[str, str]:
    """Give each table as Markdown, by name."""
    cases = {name: _results(case) for name, case in records.items()}
    fitted = [(name, case) for name, case in cases.items() if EXACT in case]
    fitted.sort(key=lambda item: (item[0] == CAPTURES, item[1][EXACT]["n_rows"]))
    tables = {
        name: _table(header, (line for item in fitted for line in lines(*item)))
        for name, (header, lines) in TABLES.items()
    }
    header = "messages | number | on disk | messages/s | peak memory | rows"
    lines = (_fold_line(name, case) for name, case in cases.items() if FOLD in case)
    return {**tables, "fold": _table(header, lines)}


def _means_lines(name: str, case: Case) -> Iterable[list[str]]:
    original = {
        way: f"{found:g}" if (found := _original(way, case)) else NOTHING
        for way in (ORDERED, SHUFFLED)
    }
    apart = {way: _number(distance(case, way)) for way in WAYS}
    averaged = {way: _number(distance(case, way, averaged=True)) for way in WAYS}
    yield [
        *(name, apart[SECOND], apart[ORDERED], original[ORDERED], apart[SHUFFLED]),
        *(original[SHUFFLED], averaged[SECOND], averaged[SHUFFLED]),
    ]


def distance(case: Case, way: str, *, averaged: bool = False) -> float | None:
    """Return max|Δ| of the posterior means of a fit against the first one in memory."""
    mean, first = (_mean(case, each, averaged) for each in (way, FIRST))
    if mean is None or first is None:
        return None
    return float(np.abs(np.subtract(mean, first)).max())


def _original(way: str, case: Case) -> float | None:
    """Find what the first experiment had at about as many rows."""
    n_rows = case[EXACT]["n_rows"]
    return next((v for n, v in ORIGINAL[way].items() if abs(n / n_rows - 1) < 0.01), None)


def _mean(case: Case, way: str, averaged: bool) -> list[float] | None:
    if way not in case:
        return None
    if not averaged:
        return case[way]["last"]
    examination = case[way]["examination"]
    return examination["averaged"]["mean"] if examination else case[way]["averaged"]


def _errors_lines(name: str, case: Case) -> Iterable[list[str]]:
    cells = [
        _number(_error(case, _mean(case, way, averaged)))
        for way in (FIRST, ORDERED, SHUFFLED)
        for averaged in (False, True)
    ]
    examination = case[SHUFFLED]["examination"]
    corrected = examination["corrected"]
    cells.append(_number(_error(case, corrected["mean"])) if corrected else "refused")
    yield [name, *cells, str(examination["epochs"])]


def _error(case: Case, mean: list[float] | None) -> float | None:
    """Return the error of the worst mean in posterior standard deviations."""
    if mean is None:
        return None
    exact = case[EXACT]
    return float(np.abs(np.subtract(mean, exact["mean"]) / exact["sd"]).max())


def _scales_lines(name: str, case: Case) -> Iterable[list[str]]:
    cells = [
        _factor(case, case[way]["sd"]) if way in case else NOTHING
        for way in (FIRST, ORDERED, SHUFFLED)
    ]
    corrected = case[SHUFFLED]["examination"]["corrected"]
    yield [name, *cells, _factor(case, corrected["sd"]) if corrected else "refused"]


def _factor(case: Case, sd: list[float]) -> str:
    """Tell the worst scale as a factor of the best one that a mean-field fit can have."""
    ratio = np.divide(sd, case[EXACT]["mean_field_sd"])
    return f"{ratio[np.abs(np.log(ratio)).argmax()]:.3g}"


def _check_lines(name: str, case: Case) -> Iterable[list[str]]:
    for way in (ORDERED, SHUFFLED):
        if way in case:
            said = case[way]["examination"]
            states = [_verdict(said[state]) for state in ("last", "averaged")]
            applied = "refused" if said["refusal"] else "applied"
            yield [name, way, _order(said["order"]), *states, applied]


def _order(order: dict[str, Any]) -> str:
    if not order["ordered"]:
        return "no order"
    return (
        f"ordered: `{order['feature']}`, design effect {order['design_effect']:,.0f}, "
        f"drift of about {order['drift']:,.0f} sd"
    )


def _verdict(state: dict[str, Any]) -> str:
    if state["verdict"] is None:
        return NOTHING
    return f"{state['verdict']} ({_number(state['z'])} sd)"


def _cost_lines(name: str, case: Case) -> Iterable[list[str]]:
    for way in WAYS:
        if way in case:
            fit = case[way]
            said = fit["examination"]
            check = _seconds(said["averaged"]["seconds"]) if said else NOTHING
            yield [
                *(name, way, f"{fit['peak_mb']:,.0f} MB", f"{fit['steps_per_second']:,.0f}"),
                *(f"{fit['n_steps']:,}", _seconds(fit["seconds"]["ready"])),
                *(_seconds(fit["seconds"]["fit"]), check),
            ]


def _preparation_lines(name: str, case: Case) -> Iterable[list[str]]:
    made, shuffle = case.get(ROWS), case[PRESHUFFLE]
    yield [
        name,
        _seconds(made["seconds"]) if made else NOTHING,
        f"{made['bytes'] / 1e9:.2f} GB" if made else NOTHING,
        _seconds(shuffle["seconds"]),
        f"{shuffle['rows'] / shuffle['seconds']:,.0f}",
        f"{shuffle['peak_memory'] / 1e6:,.0f} MB",
        _seconds(case[EXACT]["taken"]),
    ]


def _fold_line(name: str, case: Case) -> list[str]:
    fold = case[FOLD]
    return [
        name if name == CAPTURES else "synthetic, Parquet",
        f"{fold['messages']:,}",
        f"{fold['bytes'] / 1e9:.2f} GB",
        f"{fold['messages'] / fold['seconds']:,.0f}",
        f"{fold['peak_mb']:,.0f} MB",
        f"{fold['rows']:,}",
    ]


TABLES: dict[str, tuple[str, Callable[[str, Case], Iterable[list[str]]]]] = {
    "means": (
        f"rows | {SECOND} | {ORDERED} | original | {SHUFFLED} | original "
        f"| averaged: {SECOND} | averaged: {SHUFFLED}",
        _means_lines,
    ),
    "errors": (
        f"rows | {FIRST}, last step | averaged | {ORDERED}, last step | averaged "
        f"| {SHUFFLED}, last step | averaged | corrected | whole epochs averaged",
        _errors_lines,
    ),
    "scales": (f"rows | {FIRST} | {ORDERED} | {SHUFFLED} | corrected", _scales_lines),
    "checks": (
        "rows | streamed | `check_order` before the fit | `check_fit` at the last step "
        "| `check_fit` when averaged | correction",
        _check_lines,
    ),
    "cost": ("rows | way | peak memory | steps/s | steps | ready | fit | check_fit", _cost_lines),
    "preparation": (
        "rows | made in | on disk | preshuffle | rows/s | its peak memory | exact posterior",
        _preparation_lines,
    ),
}


def _memory(case: Case, way: str) -> float | None:
    return case[way]["peak_mb"] if way in case else None


FIGURES: dict[str, tuple[str, list[tuple], Any]] = {
    "means": (
        "max|Δ| of the posterior means\nagainst in memory",
        [
            *((way, way, distance, {}) for way in (ORDERED, SECOND, SHUFFLED)),
            (f"{SHUFFLED}, averaged", SHUFFLED, partial(distance, averaged=True), {"ls": "--"}),
        ],
        ORIGINAL,
    ),
    "memory": (
        "peak memory of the process, MB",
        [(way, way, _memory, {}) for way in (FIRST, ORDERED, SHUFFLED)],
        ORIGINAL_MB,
    ),
}
"""By name, the quantity, its lines, and the points of the first experiment."""


def _draw(cases: list[Case], ylabel: str, lines: list[tuple], original: Any, file: Path) -> None:
    """Draw quantities against the number of rows."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, 4), layout="constrained")
    ax = figure.subplots()
    for label, way, value, style in lines:
        points = [(case[EXACT]["n_rows"], value(case, way)) for case in cases]
        if points := [point for point in points if point[1] is not None]:
            style = {"color": COLORS[way], "ls": "-", "lw": 1.5, "ms": 5, **style}
            ax.plot(*zip(*points), "o", label=label, **style)
    for way, known in original.items():
        style = {"color": COLORS[way], "ms": 8, "mew": 2}
        ax.plot(*zip(*known.items()), "x", label=f"original experiment, {way}", **style)
    ax.set(xscale="log", yscale="log", xlabel="rows", ylabel=ylabel)
    ax.xaxis.set_major_formatter(lambda n_rows, _: case_name(n_rows))
    ax.yaxis.set_major_formatter("{x:,g}")
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(file, dpi=120)


def _results(case: dict[str, dict[str, Any]]) -> Case:
    return {
        kind: {"taken": record["seconds"], **record["parameters"], **record["result"]}
        for kind, record in case.items()
    }


def _table(header: str, lines: Iterable[list[str]]) -> str:
    """Give a table as Markdown, without lines that say nothing."""
    told = [" | ".join(line) for line in lines if set(line[1:]) != {NOTHING}]
    rule = " | ".join(["---"] * len(header.split(" | ")))
    return "".join(f"| {line} |\n" for line in (header, rule, *told))


def _number(value: float | None) -> str:
    if value is None:
        return NOTHING
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}"


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 100 else f"{seconds:,.0f} s"
