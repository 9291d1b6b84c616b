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

One table of synthetic order-book rows, sorted by time, is made, and the model of ``experiment`` is
fitted to its first million rows, its first five, and so on to all of them: from memory, in order
of time through a buffer, and after ``preshuffle``, each in a process of its own. The same is done
with real captures, if there are any, and the last way with a table of a billion rows.

A run that was stopped goes on: the results of finished stages are in a file in the work folder, and
only what the others need is made again. Delete that file to start anew.
The numbers, tables and figures go into the results folder.
"""

import math
import shutil
import sys
import time

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq

from benchmarks.harness import about, in_process, load, save
from benchmarks.orderbook import tables
from benchmarks.orderbook.columns import holds_messages, parquet_files
from benchmarks.orderbook.experiment import BATCH_SIZE, exact_posterior, fit_model
from benchmarks.orderbook.fold import fold
from benchmarks.orderbook.generate import generate, write_rows
from benchmarks.orderbook.publish import run_command
from pymc.variational.streaming import preshuffle
from tests.variational.streaming.memory import peak_mb

__all__ = ["reproduce", "run"]

PACKAGES = "pymc", "pytensor", "numba", "numpy", "pyarrow"
TABLE = 121_800_000
"""Rows of the table through which the markets drift, and of which the others are the beginning."""
BILLION = 1_000_000_000
"""Rows of a table of its own that is only streamed."""
MESSAGES = 100_000_000
BUFFER_SIZE = 1_000_000
STEPS = 20_000
"""Of each fit, at least; two whole epochs if those are more."""
CHECKED_TWICE = 30_000_000
WINDOW_SHARE = 20
SEED = 0


class Stage(NamedTuple):
    """A part of the experiment whose result is recorded."""

    kind: str
    parameters: dict[str, Any]
    """All that the result depends on."""
    run: Callable[[], dict[str, Any]]
    """Return the result, as JSON can hold it."""
    is_read: bool = False
    """Whether later stages of the same case read what it makes."""


def run(
    work: Path, *, sizes: Sequence[int], captures: Path | None = None, billion: bool = True
) -> tables.Records:
    """Run all stages that have no record in *work*, and return the records of all."""
    file, folder = work / "records.json", work / "tables"
    work.mkdir(parents=True, exist_ok=True)
    kept: tables.Records = load(file)
    records: tables.Records = {}
    for case, stages in _cases(folder, sizes, captures, billion):
        shutil.rmtree(folder, ignore_errors=True)
        done = kept.setdefault(case, {})
        missing = {s.kind for s in stages if done.get(s.kind, {}).get("parameters") != s.parameters}
        for kind, parameters, take, is_read in stages if missing else []:
            if kind not in missing and not is_read:
                continue
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
    rows, messages = folder / "rows", folder / "messages"
    for size in sorted(sizes):
        yield tables.case_name(size), _of_rows(rows, size, TABLE, tables.WAYS)
    if captures is not None:
        files = _files(captures)
        table = {"files": len(files), "bytes": _bytes(captures)}
        # They are too short to compile for, so the second of two folds counts.
        measure = partial(in_process, _measured_fold, captures, rows, repeats=2)
        fits = _fits(rows, None, table, tables.WAYS)
        yield tables.CAPTURES, [Stage(tables.FOLD, table, measure, is_read=True), *fits]
    table = {"messages": MESSAGES, "seed": SEED}
    make = partial(_generate, messages)
    measure = partial(in_process, _measured_fold, messages, rows)
    generated = Stage("generate", table, make, is_read=True)
    yield tables.MESSAGES, [generated, Stage(tables.FOLD, table, measure)]
    if billion:
        ways = (tables.SHUFFLED,)
        yield tables.case_name(BILLION), _of_rows(rows, BILLION, BILLION, ways)


def _of_rows(rows: Path, size: int, planned: int, ways: Sequence[str]) -> list[Stage]:
    table = {"of": planned, "seed": SEED}
    make = partial(_write_rows, rows, size, planned)
    made = Stage(tables.ROWS, {**table, "rows": size}, make, is_read=True)
    return [made, *_fits(rows, size, table, ways)]


def _fits(
    rows: Path, n_rows: int | None, table: dict[str, Any], ways: Sequence[str]
) -> list[Stage]:
    """Give the stages of one table of rows; the buffer holds a twentieth of an unknown number."""
    parameters = {**table, "rows": n_rows}
    shuffled = rows.with_name("shuffled")
    stages = [Stage(tables.EXACT, parameters, partial(_exact, rows))]
    for way in ways:
        if way == tables.SHUFFLED:
            make = partial(_preshuffle, rows, shuffled)
            stages.append(Stage(tables.PRESHUFFLE, parameters, make, is_read=True))
        options: dict[str, Any] = {
            # Enough that one whole epoch remains when the first half is left out.
            "n_steps": max(STEPS, 2 * math.ceil((n_rows or 0) / BATCH_SIZE) + 1),
            "seed": {tables.FIRST: 1, tables.SECOND: 2}.get(way, SEED),
            "buffer_size": BUFFER_SIZE if n_rows else None,
            "streamed": way in (tables.ORDERED, tables.SHUFFLED),
            "check_last": (n_rows or 0) <= CHECKED_TWICE,
        }
        fit = partial(_fit, shuffled if way == tables.SHUFFLED else rows, **options)
        stages.append(Stage(way, {**parameters, **options}, fit))
    return stages


def _write_rows(rows: Path, size: int, planned: int) -> dict[str, Any]:
    began = time.perf_counter()
    write_rows(rows, rows=size, planned=planned, seed=SEED)
    return {"rows": size, "bytes": _bytes(rows), "seconds": time.perf_counter() - began}


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


def _generate(messages: Path) -> dict[str, Any]:
    generate(messages, messages=MESSAGES, seed=SEED, format="parquet", progressbar=False)
    return {"messages": MESSAGES, "bytes": _bytes(messages)}


def _measured_fold(messages: Path, rows: Path, *, repeats: int = 1) -> dict[str, Any]:
    """Fold in this process, and report the last of *repeats*."""
    for _ in range(repeats):
        report = fold(messages, rows, overwrite=True, progressbar=False)
    # What was found names files of this machine.
    return {**vars(report), "findings": None, "bytes": _bytes(messages), "peak_mb": peak_mb()}


def _files(folder: Path) -> list[Path]:
    return [file for file in folder.rglob("*") if file.is_file()]


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in _files(folder))


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
    tables.publish(found, results, Path(page) if page else None)
    return f"The numbers are in {results / 'reproduce.json'}"


if __name__ == "__main__":
    run_command(reproduce)
