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
way a billion rows. A run that was stopped goes on: finished stages are in ``records.json`` in the
work folder, and only what the others need is made again.
"""

import json
import math
import shutil
import sys
import time

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq

from benchmarks.harness import about, filled, in_process, load, markdown, run_command, save
from benchmarks.orderbook.columns import holds_messages, parquet_files
from benchmarks.orderbook.experiment import BATCH_SIZE, exact_posterior, fit_model
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
CHECKED_TWICE = 30_000_000
WINDOW_SHARE = 20
SEED = 0

CAPTURES = "Kalshi captures"
ROWS, EXACT, PRESHUFFLE, FOLD = "rows", "exact", "preshuffle", "fold"
WAYS = FIRST, SECOND, ORDERED, SHUFFLED = (
    *("in memory", "in memory again"),
    *("in order of time", "preshuffled"),
)
ORIGINAL = {
    ORDERED: {1_000_000: 0.045, 20_000_000: 0.69, 26_000_000: 1.65},
    SHUFFLED: {20_000_000: 0.027, 122_000_000: 0.022},
}
"""max|Δ| of the posterior means against in memory, as the first experiment had it."""
ORIGINAL_MB = {FIRST: {122_000_000: 9_100.0}, SHUFFLED: {122_000_000: 570.0}}

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
"""By kind of a stage its "parameters", its "result" and its "seconds"."""
Records = dict[str, Case]


class Stage(NamedTuple):
    """A part of the experiment, whose result depends on nothing but its parameters."""

    kind: str
    parameters: dict[str, Any]
    run: Callable[[], dict[str, Any]]
    """Return the result, as JSON can hold it."""
    is_read: bool = False
    """Whether later stages of the same case read what it makes."""


def run(
    work: Path, *, sizes: Sequence[int], captures: Path | None = None, billion: bool = True
) -> Records:
    """Run all stages that have no record in *work*, and return the records of all."""
    file, folder = work / "records.json", work / "tables"
    work.mkdir(parents=True, exist_ok=True)
    kept: Records = load(file)
    records: Records = {}
    for case, stages in _cases(folder, sizes, captures, billion):
        shutil.rmtree(folder, ignore_errors=True)
        done = kept.setdefault(case, {})
        missing = {s.kind for s in stages if done.get(s.kind, {}).get("parameters") != s.parameters}
        todo = [s for s in stages if missing and (s.is_read or s.kind in missing)]
        for kind, parameters, take, _ in todo:
            began = time.perf_counter()
            result = take()
            seconds = time.perf_counter() - began
            sys.stderr.write(f"{case} {kind}: {seconds:.1f} s\n")
            if kind in missing:
                done[kind] = {"parameters": parameters, "seconds": seconds, "result": result}
                save(kept, file)
        records[case] = {stage.kind: done[stage.kind] for stage in stages}
    shutil.rmtree(folder, ignore_errors=True)
    return records


def _cases(
    folder: Path, sizes: Sequence[int], captures: Path | None, billion: bool
) -> Iterator[tuple[str, list[Stage]]]:
    """Yield the stages of each case, which make their tables in *folder*."""
    rows = folder / "rows"
    for size in sorted(sizes):
        yield _case_name(size), _of_rows(rows, size, TABLE, WAYS)
    if captures is not None:
        table = {"files": len(find_files(captures)), "bytes": _bytes(captures)}
        made = Stage(FOLD, table, partial(_fold, captures, rows), is_read=True)
        yield CAPTURES, [made, *_fits(rows, None, table, WAYS)]
    if billion:
        ways = (SHUFFLED,)
        yield _case_name(BILLION), _of_rows(rows, BILLION, BILLION, ways)


def _of_rows(rows: Path, size: int, planned: int, ways: Sequence[str]) -> list[Stage]:
    table = {"of": planned, "seed": SEED}
    make = partial(_write_rows, rows, size, planned)
    made = Stage(ROWS, {**table, "rows": size}, make, is_read=True)
    return [made, *_fits(rows, size, table, ways)]


def _fits(rows: Path, n_rows: int | None, table: dict, ways: Sequence[str]) -> list[Stage]:
    """Give the stages of one table of rows; the buffer holds a twentieth of an unknown number."""
    parameters = {**table, "rows": n_rows}
    shuffled = rows.with_name("shuffled")
    stages = [Stage(EXACT, parameters, partial(_exact, rows))]
    for way in ways:
        if way == SHUFFLED:
            make = partial(_preshuffle, rows, shuffled)
            stages.append(Stage(PRESHUFFLE, parameters, make, is_read=True))
        options: dict[str, Any] = {
            # Enough that one whole epoch remains when the first half is left out.
            "n_steps": max(STEPS, 2 * math.ceil((n_rows or 0) / BATCH_SIZE) + 1),
            "seed": {FIRST: 1, SECOND: 2}.get(way, SEED),
            "buffer_size": BUFFER_SIZE if n_rows else None,
            "streamed": way in (ORDERED, SHUFFLED),
            "check_last": (n_rows or 0) <= CHECKED_TWICE,
        }
        fit = partial(_fit, shuffled if way == SHUFFLED else rows, **options)
        stages.append(Stage(way, {**parameters, **options}, fit))
    return stages


def _write_rows(rows: Path, size: int, planned: int) -> dict[str, Any]:
    write_rows(rows, rows=size, planned=planned, seed=SEED)
    return {"rows": size, "bytes": _bytes(rows)}


def _exact(rows: Path) -> dict[str, Any]:
    return asdict(in_process(exact_posterior, rows))


def _fit(rows: Path, *, buffer_size: int | None, streamed: bool, **options: Any) -> dict[str, Any]:
    n_rows = sum(pq.read_metadata(file).num_rows for file in parquet_files(rows))
    size = (buffer_size or max(n_rows // WINDOW_SHARE, BATCH_SIZE)) if streamed else None
    fit = partial(in_process, fit_model, rows, buffer_size=size, progressbar=False)
    # Whoever comes first compiles for the others, which would show in its memory and seconds.
    fit(**{**options, "n_steps": 1})
    result = fit(**options, examine=streamed)
    # Warnings name files of this machine.
    return {**result, "trace": None, "buffer_size": size, "warnings": len(result["warnings"])}


def _preshuffle(rows: Path, shuffled: Path) -> dict[str, Any]:
    report = in_process(preshuffle, rows, shuffled, seed=SEED, progressbar=False)
    return {**asdict(report), "destination": None}


def _fold(messages: Path, rows: Path) -> dict[str, Any]:
    report = in_process(fold, messages, rows, overwrite=True, progressbar=False)
    # What was found names files of this machine.
    return {**vars(report), "findings": None}


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


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
    exact, shuffling = case[EXACT]["result"], case[PRESHUFFLE]["result"]
    last, averaged = _means(case, "last"), _means(case, "averaged")
    # What the first experiment had at about as many rows.
    original = {
        way: next((f"{v:g}" for n, v in known.items() if abs(n / exact["n_rows"] - 1) < 0.01), None)
        for way, known in ORIGINAL.items()
    }

    def off(mean: list[float] | None) -> float | None:
        """Return the error of the worst mean in posterior standard deviations."""
        error = np.subtract(mean or np.nan, exact["mean"]) / exact["sd"]
        return float(np.abs(error).max()) if mean else None

    if FIRST in case:
        ordered, shuffled = _apart(last, ORDERED), _apart(last, SHUFFLED)
        means = [_apart(last, SECOND), ordered, original[ORDERED], shuffled, original[SHUFFLED]]
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


def _case_name(n_rows: float) -> str:
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
    axes[1].xaxis.set_major_formatter(lambda n, _: _case_name(n))
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
