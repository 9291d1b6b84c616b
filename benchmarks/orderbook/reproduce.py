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

A run that was stopped goes on where it was: the result of each stage is a file in the work folder.
Delete that folder to start anew. The numbers, tables and figures go into the results folder.
"""

import argparse
import math
import os
import shutil
import time

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from rich.console import Console

from benchmarks.orderbook.columns import holds_messages
from benchmarks.orderbook.experiment import (
    BATCH_SIZE,
    exact_posterior,
    fit_model,
    in_process,
    parquet_files,
    shuffle,
)
from benchmarks.orderbook.fold import fold
from benchmarks.orderbook.generate import generate
from benchmarks.orderbook.rows import write_rows
from benchmarks.orderbook.stages import Stage, run_stages
from benchmarks.orderbook.tables import (
    CAPTURES,
    EXACT,
    FOLD,
    IN_MEMORY,
    MESSAGES,
    ORDERED,
    PRESHUFFLE,
    ROWS,
    SHUFFLED,
    case_name,
    publish,
)
from tests.variational.streaming.memory import peak_mb

__all__ = ["Settings", "main", "plan"]

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
    """Rows of the tables; each is the beginning of the largest."""
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


def plan(settings: Settings, work: Path) -> list[Stage]:
    """List all stages in the order in which they run."""
    stages = _sizes(settings, work) if settings.sizes else []
    if settings.captures is not None:
        stages += _captures(settings, settings.captures, work)
    if settings.messages is not None:
        stages += _fold(settings.messages, work)
    if settings.billion is not None:
        stages += _billion(settings, settings.billion, work)
    return stages


def disk_needed(settings: Settings) -> int:
    """Tell how many bytes the products take at most at the same time."""
    # A table, its scattered rows and the shuffled ones; none is larger than the bare numbers.
    largest = max(settings.billion or 0, *settings.sizes)
    per_message = MESSAGE_BYTES + SCRATCH_BYTES + ROW_BYTES
    return max(3 * ROW_BYTES * largest, per_message * (settings.messages or 0))


def _sizes(settings: Settings, work: Path) -> list[Stage]:
    largest, product = max(settings.sizes), work / "rows"
    table = {"of": settings.table, "seed": SEED}
    rows = Stage(
        case_name(largest),
        ROWS,
        partial(_write_rows, product, settings.table, settings.sizes),
        {**table, "sizes": list(settings.sizes)},
        expected=largest / 2e6,
        product=product,
    )
    stages = [rows]
    for size in sorted(settings.sizes):
        case = _Case(case_name(size), product / str(size), size, table, rows, settings)
        stages += case.all_ways(work)
    return stages


def _captures(settings: Settings, captures: Path, work: Path) -> list[Stage]:
    files = [file for file in captures.rglob("*") if file.is_file()]
    table = {"files": len(files), "bytes": sum(file.stat().st_size for file in files)}
    product = work / "captured-rows"
    # They are too short to compile for, so the second of two folds counts.
    run = partial(in_process, _measured_fold, captures, product, repeats=2)
    rows = Stage(CAPTURES, FOLD, run, table, expected=table["bytes"] / 5e6, product=product)
    case = _Case(CAPTURES, product, None, table, rows, settings)
    return [rows, *case.all_ways(work)]


def _fold(n_messages: int, work: Path) -> list[Stage]:
    product, parameters = work / "messages", {"messages": n_messages, "seed": SEED}
    messages = Stage(
        MESSAGES,
        "generate",
        partial(_generate, product, n_messages),
        parameters,
        expected=n_messages / 1.2e6,
        product=product,
    )
    folded = work / "folded"
    run = partial(in_process, _measured_fold, product, folded)
    expected = n_messages / 1.5e6
    return [
        messages,
        Stage(
            MESSAGES, FOLD, run, parameters, expected=expected, needs=(messages,), product=folded
        ),
    ]


def _billion(settings: Settings, n_rows: int, work: Path) -> list[Stage]:
    product = work / "many-rows"
    table = {"of": n_rows, "seed": SEED}
    run = partial(_write_rows, product, n_rows, (n_rows,))
    rows = Stage(case_name(n_rows), ROWS, run, table, expected=n_rows / 2e6, product=product)
    case = _Case(case_name(n_rows), product / str(n_rows), n_rows, table, rows, settings)
    return [rows, case.exact(), *case.shuffled(work)]


@dataclass(frozen=True, slots=True)
class _Case:
    """One table, and the stages that fit the model to it."""

    name: str
    rows: Path
    n_rows: int | None
    """None if that is not known beforehand; the buffer then holds a twentieth of the rows."""
    table: dict[str, Any]
    """All that its rows depend on."""
    made_by: Stage
    settings: Settings

    def all_ways(self, work: Path) -> list[Stage]:
        in_memory = [self._fit(kind, self.made_by, self.rows, seed) for seed, kind in IN_MEMORY]
        ordered = self._fit(ORDERED, self.made_by, self.rows, SEED, streamed=True)
        return [self.exact(), *in_memory, ordered, *self.shuffled(work)]

    def exact(self) -> Stage:
        run = partial(_exact, self.rows)
        return self._stage(EXACT, run, needs=(self.made_by,), expected=5 + self._million / 3)

    def shuffled(self, work: Path) -> list[Stage]:
        product = work / f"{self.name}-shuffled"
        run = partial(_preshuffle, self.rows, product)
        seconds = 2 + self._million / 2
        shuffle = self._stage(
            PRESHUFFLE, run, needs=(self.made_by,), expected=seconds, product=product
        )
        return [shuffle, self._fit(SHUFFLED, shuffle, product, SEED, streamed=True)]

    def _fit(
        self, kind: str, source: Stage, rows: Path, seed: int, *, streamed: bool = False
    ) -> Stage:
        check_last = (self.n_rows or 0) <= CHECKED_TWICE
        options: dict[str, Any] = {
            "n_steps": self._steps,
            "seed": seed,
            "buffer_size": self.settings.buffer_size if self.n_rows else None,
            "streamed": streamed,
            "check_last": check_last,
        }
        checks = (1 + check_last) * self._million * 1.4 if streamed else 0
        run = partial(_fit, rows, **options)
        expected = 16 + self._steps / 700 + checks
        return self._stage(kind, run, options, needs=(source,), expected=expected)

    def _stage(
        self, kind: str, run: Callable, options: dict[str, Any] | None = None, **rest: Any
    ) -> Stage:
        parameters = {**self.table, "rows": self.n_rows, **(options or {})}
        return Stage(self.name, kind, run, parameters, **rest)

    @property
    def _million(self) -> float:
        return (self.n_rows or 0) / 1e6

    @property
    def _steps(self) -> int:
        """Enough that one whole epoch remains when the first half is left out."""
        return max(self.settings.steps, 2 * math.ceil((self.n_rows or 0) / BATCH_SIZE) + 1)


def _write_rows(product: Path, planned: int, sizes: tuple[int, ...]) -> dict[str, Any]:
    """Write the largest table, and link the files of each smaller one into a directory."""
    shutil.rmtree(product, ignore_errors=True)
    whole = product / "whole"
    began = time.perf_counter()
    write_rows(whole, rows=max(sizes), planned=planned, seed=SEED, cuts=sizes)
    seconds = time.perf_counter() - began
    for size in sizes:
        (product / str(size)).mkdir()
        n_rows = 0
        for file in parquet_files(whole):
            if n_rows < size:
                os.link(file, product / str(size) / file.name)
                n_rows += pq.read_metadata(file).num_rows
    return {"rows": max(sizes), "bytes": _bytes(whole), "seconds": seconds}


def _exact(rows: Path) -> dict[str, Any]:
    return asdict(in_process(exact_posterior, rows))


def _fit(rows: Path, *, buffer_size: int | None, streamed: bool, **options: Any) -> dict[str, Any]:
    n_rows = sum(pq.read_metadata(file).num_rows for file in parquet_files(rows))
    size = buffer_size or max(n_rows // WINDOW_SHARE, BATCH_SIZE)
    fit = partial(
        in_process, fit_model, rows, buffer_size=size if streamed else None, progressbar=False
    )
    # Whoever comes first compiles for the others, which would show in its memory and seconds.
    fit(**{**options, "n_steps": 1})
    result = fit(**options, examine=streamed)
    return {
        **asdict(result),
        "trace": None,
        "buffer_size": size if streamed else None,
        # What follows a colon names files of this machine.
        "warnings": [warning.partition(":")[0] for warning in result.warnings],
    }


def _preshuffle(rows: Path, product: Path) -> dict[str, Any]:
    report = in_process(shuffle, rows, product, seed=SEED)
    return {**asdict(report), "destination": None}


def _generate(product: Path, n_messages: int) -> dict[str, Any]:
    generate(
        product,
        messages=n_messages,
        seed=SEED,
        file_format="parquet",
        overwrite=True,
        progressbar=False,
    )
    return {"messages": n_messages, "bytes": _bytes(product)}


def _measured_fold(messages: Path, rows: Path, *, repeats: int = 1) -> dict[str, Any]:
    """Fold in this process, and report the last of *repeats*."""
    for _ in range(repeats):
        report = fold(messages, rows, overwrite=True, progressbar=False)
    # What was found names files of this machine.
    return {**asdict(report), "findings": None, "bytes": _bytes(messages), "peak_mb": peak_mb()}


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


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
    args = parser.parse_args(argv)
    settings = Settings(
        sizes=args.sizes,
        billion=defaults.billion if args.billion else None,
        captures=args.captures,
    )
    _check(settings, args.work)
    records = run_stages(plan(settings, args.work / "tables"), args.work / "records")
    publish(records, args.results, args.page)
    Console(stderr=True).print(f"The numbers are in {args.results / 'reproduce.json'}")


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(float(part)) for part in text.split(","))


def _check(settings: Settings, work: Path) -> None:
    """Refuse before an hour has gone by what would fail after it."""
    if settings.captures is not None and not holds_messages(settings.captures):
        raise SystemExit(f"captures={settings.captures} holds no messages")
    if not 1 <= min(settings.sizes) <= max(settings.sizes) <= settings.table:
        raise SystemExit(f"sizes must lie between 1 and {settings.table}, got {settings.sizes}")
    work.mkdir(parents=True, exist_ok=True)
    free, needed = shutil.disk_usage(work).free + _bytes(work), disk_needed(settings)
    if free < needed:
        raise SystemExit(
            f"{work} must have {needed / 1e9:.0f} GB free, it has {free / 1e9:.0f}; pass --work on "
            "another disk, --no-billion or smaller --sizes"
        )


if __name__ == "__main__":
    main()
