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
import json
import math
import os
import shutil
import time
import zlib

from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
    Records,
    case_name,
    publish,
)
from tests.variational.streaming.memory import peak_mb

__all__ = ["Settings", "Steps", "main", "run"]

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


class Steps:
    """The results of steps, each a small JSON file in *folder*, so that a run can go on.

    >>> steps = Steps(folder)
    >>> with steps.product("1M", "rows", {"rows": 1_000_000}, write_rows) as rows:
    ...     steps.record("1M", "fit", {"steps": 8_000}, lambda: fit_rows(rows()))
    """

    def __init__(self, folder: Path) -> None:
        self.records: Records = {}
        self._folder = folder
        self._console = Console(stderr=True)
        for name in ("records", "tables"):
            (folder / name).mkdir(parents=True, exist_ok=True)

    def record(
        self, case: str, kind: str, parameters: dict[str, Any], run: Callable[[], Any]
    ) -> None:
        """Call *run* for a result that is plain JSON, unless that of these parameters is there."""
        file = self._folder / "records" / f"{_name(case, kind)}.json"
        record = json.loads(file.read_text()) if file.exists() else {}
        if record.get("parameters") != parameters:
            began = time.perf_counter()
            result = run()
            record = {"parameters": parameters, "seconds": time.perf_counter() - began}
            record["result"] = result
            unfinished = file.with_suffix(".unfinished")
            unfinished.write_text(json.dumps(record, indent=1))
            unfinished.replace(file)
            self._console.print(f"{case} {kind}: {record['seconds']:.1f} s", highlight=False)
        self.records.setdefault(case, {})[kind] = record

    @contextmanager
    def product(
        self, case: str, kind: str, parameters: dict[str, Any], make: Callable[[Path], Any]
    ) -> Iterator[Callable[[], Path]]:
        """Record a step that makes a directory, and yield what returns it for other steps.

        It is made again if a step needs it and it is gone, and deleted in the end.
        """
        number = zlib.crc32(json.dumps(parameters).encode())
        path = self._folder / "tables" / f"{_name(case, kind)}-{number:08x}"
        unfinished = path.with_name(f"{path.name}.unfinished")

        def make_whole() -> Any:
            for old in (path, unfinished):
                shutil.rmtree(old, ignore_errors=True)
            result = make(unfinished)
            unfinished.rename(path)
            return result

        def ready() -> Path:
            if not path.exists():
                make_whole()
            return path

        self.record(case, kind, parameters, make_whole)
        yield ready
        shutil.rmtree(path, ignore_errors=True)


def _name(case: str, kind: str) -> str:
    return f"{case}-{kind}".replace(" ", "-")


def run(settings: Settings, work: Path) -> Records:
    """Take all steps that have no record in *work*, and return the records of all."""
    steps = Steps(work)
    sizes = tuple(sorted(settings.sizes))
    if sizes:
        _run_sizes(steps, settings, settings.table, sizes)
    if settings.captures is not None:
        _run_captures(steps, settings, settings.captures)
    if settings.messages is not None:
        _run_fold(steps, settings.messages)
    if settings.billion is not None:
        _run_sizes(steps, settings, settings.billion, (settings.billion,), streamed_only=True)
    return steps.records


def disk_needed(settings: Settings) -> int:
    """Tell how many bytes the products take at most at the same time."""
    # A table, its scattered rows and the shuffled ones; none is larger than the bare numbers.
    largest = max(settings.billion or 0, *settings.sizes)
    per_message = MESSAGE_BYTES + SCRATCH_BYTES + ROW_BYTES
    return max(3 * ROW_BYTES * largest, per_message * (settings.messages or 0))


def _run_sizes(
    steps: Steps,
    settings: Settings,
    planned: int,
    sizes: tuple[int, ...],
    *,
    streamed_only: bool = False,
) -> None:
    """Make one table, and fit its beginnings of so many rows."""
    table = {"of": planned, "seed": SEED}
    parameters = table if streamed_only else {**table, "sizes": [*settings.sizes]}
    make = partial(_write_rows, planned=planned, sizes=sizes)
    with steps.product(case_name(max(sizes)), ROWS, parameters, make) as rows:
        for size in sizes:
            case = _Case(steps, settings, case_name(size), size, table)
            case.fit_all(lambda: rows() / str(size), streamed_only=streamed_only)


def _run_captures(steps: Steps, settings: Settings, captures: Path) -> None:
    files = [file for file in captures.rglob("*") if file.is_file()]
    table = {"files": len(files), "bytes": _bytes(captures)}
    # They are too short to compile for, so the second of two folds counts.
    make = partial(in_process, _measured_fold, captures, repeats=2)
    with steps.product(CAPTURES, FOLD, table, make) as rows:
        _Case(steps, settings, CAPTURES, None, table).fit_all(rows)


def _run_fold(steps: Steps, n_messages: int) -> None:
    parameters = {"messages": n_messages, "seed": SEED}
    make = partial(_generate, n_messages=n_messages)
    with steps.product(MESSAGES, "generate", parameters, make) as messages:

        def measure(rows: Path) -> dict[str, Any]:
            return in_process(_measured_fold, messages(), rows)

        with steps.product(MESSAGES, FOLD, parameters, measure):
            pass


@dataclass(frozen=True, slots=True)
class _Case:
    """One table to fit the model to."""

    steps: Steps
    settings: Settings
    name: str
    n_rows: int | None
    """None if that is not known beforehand; the buffer then holds a twentieth of the rows."""
    table: dict[str, Any]
    """All that its rows depend on."""

    def fit_all(self, rows: Callable[[], Path], *, streamed_only: bool = False) -> None:
        parameters = {**self.table, "rows": self.n_rows}
        self.steps.record(
            self.name, EXACT, parameters, lambda: asdict(in_process(exact_posterior, rows()))
        )
        if not streamed_only:
            for seed, kind in IN_MEMORY:
                self._fit(kind, rows, seed=seed)
            self._fit(ORDERED, rows, streamed=True)
        with self.steps.product(
            self.name, PRESHUFFLE, parameters, lambda product: _preshuffle(rows(), product)
        ) as shuffled:
            self._fit(SHUFFLED, shuffled, streamed=True)

    def _fit(
        self, kind: str, rows: Callable[[], Path], *, seed: int = SEED, streamed: bool = False
    ) -> None:
        n_rows = self.n_rows or 0
        # Enough that one whole epoch remains when the first half is left out.
        n_steps = max(self.settings.steps, 2 * math.ceil(n_rows / BATCH_SIZE) + 1)
        options: dict[str, Any] = {
            "n_steps": n_steps,
            "seed": seed,
            "buffer_size": self.settings.buffer_size if n_rows else None,
            "streamed": streamed,
            "check_last": n_rows <= CHECKED_TWICE,
        }
        parameters = {**self.table, "rows": self.n_rows, **options}
        self.steps.record(self.name, kind, parameters, lambda: _fit(rows(), **options))


def _write_rows(product: Path, *, planned: int, sizes: tuple[int, ...]) -> dict[str, Any]:
    """Write the largest table, and link the files of each smaller one into a directory."""
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
    generate(product, messages=n_messages, seed=SEED, file_format="parquet", progressbar=False)
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
    publish(run(settings, args.work), args.results, args.page)
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
