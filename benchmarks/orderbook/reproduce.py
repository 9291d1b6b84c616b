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

import argparse
import json
import math
import shutil
import sys
import time

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from benchmarks.orderbook.columns import holds_messages
from benchmarks.orderbook.experiment import (
    BATCH_SIZE,
    exact_posterior,
    fit_model,
    in_process,
    parquet_files,
)
from benchmarks.orderbook.fold import fold
from benchmarks.orderbook.generate import generate
from benchmarks.orderbook.rows import write_rows
from benchmarks.orderbook.tables import (
    CAPTURES,
    EXACT,
    FIRST,
    FOLD,
    MESSAGES,
    ORDERED,
    PRESHUFFLE,
    ROWS,
    SECOND,
    SHUFFLED,
    Records,
    case_name,
    publish,
)
from pymc.variational.streaming import preshuffle
from tests.variational.streaming.memory import peak_mb

__all__ = ["Settings", "main", "run"]

SEED = 0
ROW_BYTES = 13
SCRATCH_BYTES = 21
MESSAGE_BYTES = 12
CHECKED_TWICE = 30_000_000
WINDOW_SHARE = 20


@dataclass(frozen=True, slots=True)
class Settings:
    """The experiment to run."""

    sizes: tuple[int, ...] = (1_000_000, 5_000_000, 20_000_000, 26_000_000, 121_800_000)
    """Rows of the tables; each is the beginning of one."""
    table: int = 121_800_000
    """Rows of the table through which the markets drift, at least the largest size."""
    billion: int | None = 1_000_000_000
    """Rows of a table of its own that is only streamed."""
    messages: int | None = 100_000_000
    """Synthetic messages to fold."""
    captures: Path | None = None
    """Directory of captured messages."""
    buffer_size: int = 1_000_000
    """Rows."""
    steps: int = 20_000
    """Of each fit, at least; two whole epochs if those are more."""


@dataclass(frozen=True, slots=True)
class Stage:
    """A part of the experiment whose result is recorded."""

    kind: str
    parameters: dict[str, Any]
    """All that the result depends on."""
    run: Callable[[], dict[str, Any]]
    """Return the result, as JSON can hold it."""
    is_needed: bool = False
    """Whether it makes what later stages of the same case read."""


def run(settings: Settings, work: Path) -> Records:
    """Run all stages that have no record in *work*, and return the records of all."""
    file, tables = work / "records.json", work / "tables"
    work.mkdir(parents=True, exist_ok=True)
    kept: Records = json.loads(file.read_text()) if file.exists() else {}
    records: Records = {}
    for case, stages in _cases(settings, tables):
        shutil.rmtree(tables, ignore_errors=True)
        done = kept.setdefault(case, {})
        open_stages = [
            stage
            for stage in stages
            if done.get(stage.kind, {}).get("parameters") != stage.parameters
        ]
        for stage in stages if open_stages else []:
            if stage not in open_stages and not stage.is_needed:
                continue
            began = time.perf_counter()
            result = stage.run()
            seconds = time.perf_counter() - began
            sys.stderr.write(f"{case} {stage.kind}: {seconds:.1f} s\n")
            if stage in open_stages:
                record = {"parameters": stage.parameters, "seconds": seconds, "result": result}
                done[stage.kind] = record
                unfinished = file.with_suffix(".unfinished")
                unfinished.write_text(json.dumps(kept, indent=1))
                unfinished.replace(file)
        records[case] = {stage.kind: done[stage.kind] for stage in stages}
    shutil.rmtree(tables, ignore_errors=True)
    return records


def _cases(settings: Settings, tables: Path) -> Iterator[tuple[str, list[Stage]]]:
    """Yield the stages of each case, which make their tables in one directory."""
    rows = tables / "rows"
    for size in sorted(settings.sizes):
        yield case_name(size), _of_rows(settings, rows, size, settings.table)
    if settings.captures is not None:
        table = {"files": len(_files(settings.captures)), "bytes": _bytes(settings.captures)}
        # They are too short to compile for, so the second of two folds counts.
        measured = partial(in_process, _measured_fold, settings.captures, rows, repeats=2)
        fits = _fits(settings, rows, None, table)
        yield CAPTURES, [Stage(FOLD, table, measured, is_needed=True), *fits]
    if settings.messages is not None:
        messages, table = tables / "messages", {"messages": settings.messages, "seed": SEED}
        made = partial(_generate, messages, settings.messages)
        measured = partial(in_process, _measured_fold, messages, rows)
        generated = Stage("generate", table, made, is_needed=True)
        yield MESSAGES, [generated, Stage(FOLD, table, measured)]
    if settings.billion is not None:
        size = settings.billion
        yield case_name(size), _of_rows(settings, rows, size, size, streamed_only=True)


def _of_rows(
    settings: Settings, rows: Path, size: int, planned: int, *, streamed_only: bool = False
) -> list[Stage]:
    table = {"of": planned, "seed": SEED}
    parameters = {**table, "rows": size}
    made = Stage(ROWS, parameters, partial(_write_rows, rows, size, planned), is_needed=True)
    return [made, *_fits(settings, rows, size, table, streamed_only=streamed_only)]


def _fits(
    settings: Settings,
    rows: Path,
    n_rows: int | None,
    table: dict[str, Any],
    *,
    streamed_only: bool = False,
) -> list[Stage]:
    """Give the stages of one table of rows; the buffer holds a twentieth of an unknown number."""
    parameters = {**table, "rows": n_rows}
    shuffled = rows.with_name("shuffled")

    def fit(kind: str, rows: Path, *, seed: int = SEED, streamed: bool = True) -> Stage:
        options: dict[str, Any] = {
            # Enough that one whole epoch remains when the first half is left out.
            "n_steps": max(settings.steps, 2 * math.ceil((n_rows or 0) / BATCH_SIZE) + 1),
            "seed": seed,
            "buffer_size": settings.buffer_size if n_rows else None,
            "streamed": streamed,
            "check_last": (n_rows or 0) <= CHECKED_TWICE,
        }
        return Stage(kind, {**parameters, **options}, partial(_fit, rows, **options))

    in_ram = [fit(FIRST, rows, seed=1, streamed=False), fit(SECOND, rows, seed=2, streamed=False)]
    return [
        Stage(EXACT, parameters, partial(_exact, rows)),
        *([] if streamed_only else [*in_ram, fit(ORDERED, rows)]),
        Stage(PRESHUFFLE, parameters, partial(_preshuffle, rows, shuffled), is_needed=True),
        fit(SHUFFLED, shuffled),
    ]


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
    # What follows a colon names files of this machine.
    warnings = [warning.partition(":")[0] for warning in result["warnings"]]
    return {**result, "trace": None, "buffer_size": size, "warnings": warnings}


def _preshuffle(rows: Path, shuffled: Path) -> dict[str, Any]:
    report = in_process(preshuffle, rows, shuffled, seed=SEED, progressbar=False)
    return {**asdict(report), "destination": None}


def _generate(messages: Path, n_messages: int) -> dict[str, Any]:
    generate(messages, messages=n_messages, seed=SEED, file_format="parquet", progressbar=False)
    return {"messages": n_messages, "bytes": _bytes(messages)}


def _measured_fold(messages: Path, rows: Path, *, repeats: int = 1) -> dict[str, Any]:
    """Fold in this process, and report the last of *repeats*."""
    for _ in range(repeats):
        report = fold(messages, rows, overwrite=True, progressbar=False)
    # What was found names files of this machine.
    return {**asdict(report), "findings": None, "bytes": _bytes(messages), "peak_mb": peak_mb()}


def _files(folder: Path) -> list[Path]:
    return [file for file in folder.rglob("*") if file.is_file()]


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in _files(folder))


def main(argv: list[str] | None = None) -> None:
    """Run the experiment, or what is left of it, and publish the results."""
    parser = argparse.ArgumentParser(description="Repeat the experiment at its scale.")
    defaults = Settings()
    parser.add_argument(
        "--sizes", type=_numbers, default=defaults.sizes, help="rows, such as 1e6,5e6"
    )
    parser.add_argument(
        "--billion",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="stream a billion rows as well",
    )
    parser.add_argument("--captures", type=Path, help="directory of captured messages")
    parser.add_argument("--work", type=Path, default=Path("build/reproduce"))
    parser.add_argument("--results", type=Path, default=Path("build/reproduce/results"))
    parser.add_argument("--page", type=Path, help="file to put the tables into")
    parser.add_argument("--numbers", type=Path, help="reproduce.json of a run to publish instead")
    args = parser.parse_args(argv)
    if args.numbers is not None:
        publish(json.loads(args.numbers.read_text())["records"], args.results, args.page)
        return
    billion = defaults.billion if args.billion else None
    settings = Settings(sizes=args.sizes, billion=billion, captures=args.captures)
    _check(settings, args.work)
    publish(run(settings, args.work), args.results, args.page)
    sys.stderr.write(f"The numbers are in {args.results / 'reproduce.json'}\n")


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(float(part)) for part in text.split(","))


def _check(settings: Settings, work: Path) -> None:
    """Refuse before an hour has gone by what would fail after it."""
    if settings.captures is not None and not holds_messages(settings.captures):
        raise SystemExit(f"captures={settings.captures} holds no messages")
    if not 1 <= min(settings.sizes) <= max(settings.sizes) <= settings.table:
        raise SystemExit(f"sizes must lie between 1 and {settings.table}, got {settings.sizes}")
    work.mkdir(parents=True, exist_ok=True)
    # A table, its scattered rows and the shuffled ones; none is larger than the bare numbers.
    of_rows = 3 * ROW_BYTES * max(settings.billion or 0, *settings.sizes)
    of_messages = (MESSAGE_BYTES + SCRATCH_BYTES + ROW_BYTES) * (settings.messages or 0)
    free, needed = shutil.disk_usage(work).free + _bytes(work), max(of_rows, of_messages)
    if free < needed:
        raise SystemExit(
            f"{work} must have {needed / 1e9:.0f} GB free, it has {free / 1e9:.0f}; pass --work on "
            "another disk, --no-billion or smaller --sizes"
        )


if __name__ == "__main__":
    main()
