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
"""Repeat, at its scale, the experiment in which ordered rows gave wrong posteriors unnoticed.

    python -m benchmarks.orderbook.reproduce
    python -m benchmarks.orderbook.reproduce --sizes 1e6,5e6 --no-billion --captures DIR

Each part of the first table is fitted from memory, in order of time through a buffer, and after
``preshuffle``, each in a process of its own; so are real captures, if there are any, and the last
way a billion rows. A run that was stopped goes on: finished tables are in ``records.json`` in the
work folder.
"""

import json
import math
import shutil
import sys

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import about, filled, in_process, load, markdown, run_command, save
from benchmarks.orderbook.columns import holds_messages
from benchmarks.orderbook.experiment import BATCH_SIZE, Posterior, exact_posterior, fit_model
from benchmarks.orderbook.fold import fold
from benchmarks.orderbook.generate import write_rows
from benchmarks.orderbook.reading import find_files
from pymc.variational.streaming import preshuffle

__all__ = ["publish", "reproduce", "run"]

PACKAGES = "pymc", "pytensor", "numba", "numpy", "pyarrow"
TABLE = 121_800_000
"""Rows of the table through which the markets drift, and of which the others are the beginning."""
BILLION = 1_000_000_000
"""Rows of a table of its own that is only streamed."""
BUFFER_SIZE = 1_000_000
STEPS = 20_000
"""Of each fit, at least; two whole epochs if those are more."""
WINDOW_SHARE = 20
"""What part of captures, whose number of rows is not known before, the buffer holds."""
SEED = 0

CAPTURES = "Kalshi captures"
EXACT, PRESHUFFLE = "exact", "preshuffle"
WAYS = FIRST, SECOND, ORDERED, SHUFFLED = (
    *("in memory", "in memory again"),
    *("in order of time", "preshuffled"),
)
ORIGINAL = {
    ORDERED: {1e6: 0.045, 20e6: 0.69, 26e6: 1.65},
    SHUFFLED: {20e6: 0.027, 121.8e6: 0.022},
}
"""max|Δ| of the posterior means against in memory, as the first experiment had it."""
ORIGINAL_MB = {FIRST: {121.8e6: 9_100.0}, SHUFFLED: {121.8e6: 570.0}}

SEEDS = {FIRST: 1, SECOND: 2, ORDERED: SEED, SHUFFLED: SEED}
COMMAND = "make reproduce"
COLORS = {FIRST: "tab:gray", SECOND: "tab:gray", ORDERED: "tab:red", SHUFFLED: "tab:blue"}
CHECKS = "`check_order` before the fit | `check_fit` at the last step | `check_fit` when averaged"
HEADS = {
    "means": f"{SECOND} | {ORDERED} | original | {SHUFFLED} | original | "
    f"averaged: {SECOND} | averaged: {SHUFFLED}",
    "errors": "".join(f"{way}, last step | averaged | " for way in (FIRST, ORDERED, SHUFFLED))
    + "corrected | whole epochs averaged",
    "checks": f"streamed | {CHECKS} | correction",
    "cost": "way | peak memory | steps/s | steps | ready | fit | check_fit",
    "preparation": "preshuffle | its peak memory",
}

Case = dict[str, dict[str, Any]]
"""By kind of a result, of one table, its "parameters" and its "result"."""
Records = dict[str, Case]


def run(
    work: Path, *, sizes: Sequence[int], captures: Path | None = None, billion: bool = True
) -> Records:
    """Fit all tables that have no records in *work*, and return the records of all."""
    file, folder = work / "records.json", work / "tables"
    work.mkdir(parents=True, exist_ok=True)
    kept: Records = load(file)
    records: Records = {}
    for name, table, make in _tables(sizes, captures, billion):
        # Enough that one whole epoch remains when the first half is left out.
        n_steps = max(STEPS, 2 * math.ceil((table["rows"] or 0) / BATCH_SIZE) + 1)
        parameters = {**table, "n_steps": n_steps, "buffer_size": BUFFER_SIZE}
        if kept.get(name, {}).get(EXACT, {}).get("parameters") != parameters:
            shutil.rmtree(folder, ignore_errors=True)
            in_process(make, folder / "rows")
            results = dict(_results(folder, parameters))
            shutil.rmtree(folder)
            kept[name] = {
                kind: {"parameters": parameters, "result": result}
                for kind, result in results.items()
            }
            save(kept, file)
        records[name] = kept[name]
    return records


def _tables(
    sizes: Sequence[int], captures: Path | None, billion: bool
) -> Iterator[tuple[str, dict[str, Any], Callable[[Path], object]]]:
    """Yield the name of each table, what its rows depend on, and what writes them."""
    planned = dict.fromkeys(sorted(sizes), TABLE) | ({BILLION: BILLION} if billion else {})
    for size, of in planned.items():
        make = partial(write_rows, rows=size, planned=of, seed=SEED)
        yield _table_name(size), {"of": of, "seed": SEED, "rows": size}, make
    if captures is not None:
        files = find_files(captures)
        table = {"files": len(files), "bytes": sum(file.stat().st_size for file in files)}
        yield CAPTURES, {**table, "rows": None}, partial(fold, captures, progressbar=False)


def _results(folder: Path, parameters: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Fit the rows in *folder*; yield the kind of each result, and it, as JSON can hold it."""
    rows, shuffled = folder / "rows", folder / "shuffled"
    exact = in_process(exact_posterior, rows)
    yield EXACT, asdict(exact)
    size = max(exact.n_rows // WINDOW_SHARE, BATCH_SIZE)
    if parameters["rows"]:
        size = parameters["buffer_size"]
    for way in WAYS if parameters["rows"] != BILLION else (SHUFFLED,):
        if way == SHUFFLED:
            report = in_process(preshuffle, rows, shuffled, seed=SEED, progressbar=False)
            yield PRESHUFFLE, {**asdict(report), "destination": None}
            rows = shuffled
        streamed = way in (ORDERED, SHUFFLED)
        options = {"buffer_size": size if streamed else None, "seed": SEEDS[way]}
        fit = partial(in_process, fit_model, rows, progressbar=False, **options)
        # Whoever comes first compiles for the others, which would show in its memory and seconds.
        fit(n_steps=1)
        result = fit(n_steps=parameters["n_steps"], examine=streamed)
        sys.stderr.write(f"{exact.n_rows:,} rows, {way}: {result['seconds']['fit']:.1f} s\n")
        # Warnings name files of this machine.
        yield way, {**result, "trace": None, "warnings": len(result["warnings"])}


def publish(found: dict[str, Any], results: Path, page: Path | None) -> None:
    """Write the numbers as JSON, the tables into *page*, and draw the figure."""
    results.mkdir(parents=True, exist_ok=True)
    (results / "reproduce.json").write_text(json.dumps(found, indent=1) + "\n")
    fitted = [(name, case) for name, case in found["records"].items() if EXACT in case]
    fitted.sort(key=lambda item: (item[0] == CAPTURES, item[1][EXACT]["result"]["n_rows"]))
    tables: dict[str, list[list[str]]] = {name: [] for name in HEADS}
    for name, case in fitted:
        for table, cells in _lines(case):
            tables[table].append([name, *map(_text, cells)])
    if page is not None:
        for table, lines in tables.items():
            text = markdown(f"rows | {HEADS[table]}", lines)
            page.write_text(filled(page.read_text(), table, COMMAND, text))
    _draw([case for name, case in fitted if name != CAPTURES], results / "reproduce.png")


def _lines(case: Case) -> Iterator[tuple[str, list[Any]]]:
    """Yield the cells of each line about a case, and the table that it belongs to."""
    exact = Posterior(*(case[EXACT]["result"][name] for name in Posterior.__slots__))
    shuffling = case[PRESHUFFLE]["result"]
    last, averaged = _means(case, "last"), _means(case, "averaged")

    def off(mean: list[float] | None) -> float | None:
        return float(np.abs(exact.errors(mean)).max()) if mean else None

    if FIRST in case:
        means: list[Any] = [_apart(last, SECOND)]
        for way, original in ORIGINAL.items():
            value = original.get(exact.n_rows)
            means += [_apart(last, way), None if value is None else f"{value:g}"]
        yield "means", [*means, _apart(averaged, SECOND), _apart(averaged, SHUFFLED)]
    errors = [off(each.get(w)) for w in (FIRST, ORDERED, SHUFFLED) for each in (last, averaged)]
    examined = case[SHUFFLED]["result"]["examination"]
    corrected = off(examined["corrected"]["mean"]) if examined["corrected"] else "refused"
    yield "errors", [*errors, corrected, examined["epochs"]]
    for way in last:
        yield from _lines_of_fit(way, case[way]["parameters"]["n_steps"], case[way]["result"])
    memory = f"{shuffling['peak_memory'] / 1e6:,.0f} MB"
    yield "preparation", [_seconds(shuffling["seconds"]), memory]


def _lines_of_fit(way: str, n_steps: int, fit: dict) -> Iterator[tuple[str, list[Any]]]:
    seconds = [_seconds(fit["seconds"][name]) for name in ("ready", "fit")]
    costs = [f"{fit['peak_mb']:,.0f} MB", f"{fit['steps_per_second']:,.0f}", f"{n_steps:,}"]
    checked = fit["examination"] and _seconds(fit["examination"]["averaged"]["seconds"])
    yield "cost", [way, *costs, *seconds, checked]
    if examined := fit["examination"]:
        verdicts = (
            f"{state['verdict']} ({_text(state['z'])} sd)" if state["verdict"] else None
            for state in (examined["last"], examined["averaged"])
        )
        order = examined["order"]
        told = "no order"
        if order["ordered"]:
            effect, drift = f"{order['design_effect']:,.0f}", f"{order['drift']:,.0f}"
            told = (
                f"ordered: `{order['feature']}`, design effect {effect}, drift of about {drift} sd"
            )
        yield "checks", [way, told, *verdicts, "refused" if examined["refusal"] else "applied"]


def _means(case: Case, when: str) -> dict[str, list[float]]:
    """Return posterior means by way, after the last step or averaged."""
    means = {way: case[way]["result"][when] for way in WAYS if way in case}
    examined = {way: case[way]["result"]["examination"] for way in means}
    return {way: examined[way][when]["mean"] if examined[way] else means[way] for way in means}


def _apart(means: dict[str, list[float]], way: str) -> float | None:
    """Return max|Δ| of the posterior means of a fit against the first one in memory."""
    if way not in means or FIRST not in means:
        return None
    return float(np.abs(np.subtract(means[way], means[FIRST])).max())


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 100 else f"{value:.2g}"
    return "–" if value is None else str(value)


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 100 else f"{seconds:,.0f} s"


def _table_name(n_rows: float) -> str:
    """Name a table by its rows: 121.8M."""
    return f"{n_rows / 1e9:g}B" if n_rows >= 1e9 else f"{n_rows / 1e6:g}M"


def _draw(cases: list[Case], file: Path) -> None:
    """Draw how far from in memory fits are, and their memory, with what the first experiment had."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, 7), layout="constrained")
    n_rows = [case[EXACT]["result"]["n_rows"] for case in cases]
    apart = {w: [_apart(_means(c, "last"), w) for c in cases] for w in (SECOND, ORDERED, SHUFFLED)}
    memory = {
        way: [case[way]["result"]["peak_mb"] if way in case else None for case in cases]
        for way in (FIRST, ORDERED, SHUFFLED)
    }
    axes = figure.subplots(2, sharex=True)
    labels = "max|Δ| of the posterior means\nagainst in memory", "peak memory of the process, MB"
    for ax, values, original, label in zip(axes, (apart, memory), (ORIGINAL, ORIGINAL_MB), labels):
        for way, of_way in values.items():
            ax.plot(n_rows, np.array(of_way, float), "o-", label=way, color=COLORS[way], ms=5)
        for way, points in original.items():
            told = f"original experiment, {way}"
            ax.plot(*zip(*points.items()), "x", label=told, color=COLORS[way], ms=8, mew=2)
        ax.set(xscale="log", yscale="log", ylabel=label)
        ax.yaxis.set_major_formatter("{x:,g}")
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    axes[1].xaxis.set_major_formatter(lambda n, _: _table_name(n))
    axes[1].set_xlabel("rows")
    figure.savefig(file, dpi=120)


def reproduce(
    sizes: str = "1e6,5e6,20e6,26e6,121.8e6",
    billion: bool = True,
    captures: str = "",
    work: Path = Path("build/reproduce"),
    results: Path = Path("build/reproduce/results"),
    page: str = "",
    numbers: str = "",
) -> str:
    """Run the experiment, or what is left of it, and publish the numbers, or those of a run."""
    if numbers:
        found = load(Path(numbers))
    else:
        if captures and not holds_messages(Path(captures)):
            raise ValueError(f"captures={captures} holds no messages")
        rows = [int(float(size)) for size in sizes.split(",")]
        if not 1 <= min(rows) <= max(rows) <= TABLE:
            raise ValueError(f"sizes must lie between 1 and {TABLE}, got {sizes}")
        messages = Path(captures) if captures else None
        records = run(work, sizes=rows, captures=messages, billion=billion)
        found = {"about": about(*PACKAGES), "records": records}
    publish(found, results, Path(page) if page else None)
    return f"The numbers are in {results / 'reproduce.json'}"


if __name__ == "__main__":
    run_command(reproduce)
