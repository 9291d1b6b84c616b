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
"""How fast fits on streams are, what memory they take, and how soon they start.

    python -m benchmarks.fit_speed --page docs/source/speed.md
    python -m benchmarks.fit_speed --only speed

Each fit has a process of its own, is compiled first and runs long enough to fill its windows; then
the fits of a table take turns of some thousand steps.  The fit on one batch is the limit: it reads
nothing.  Processor time is that of all threads.  With ``--folder`` the data are kept, and found the
next time.
"""

import os
import statistics
import time
import warnings

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import pymc as pm

from benchmarks.data import N_GROUPS, Data
from benchmarks.fits import (
    LIMIT,
    MEMORY,
    PEER,
    STREAM,
    Case,
    hierarchical,
    in_memory,
    in_memory_columns,
    on_changed_pytensor,
    on_dataloader,
    on_one_batch,
    on_ready_batches,
    on_stream,
    on_stream_of_array,
    order_book,
    stream,
    wide,
)
from benchmarks.orderbook.experiment import in_process, parquet_files
from benchmarks.pages import markdown, measure
from benchmarks.turns import Lane, race, ratio

__all__ = ["first_batch", "speeds"]

COMMAND = "python -m benchmarks.fit_speed"
WIDE_BUFFER = 100_000
HEADS = (
    "steps/s | ms per step | CPU ms per step | disk MB/s | speed / limit | speed / `pm.Minibatch`"
)


def speed_table(data: Data, turns: int) -> str:
    """Measure the order-book model on PyMC's default settings."""
    ordered = Case(data.order_book(), order_book)
    shuffled = Case(data.shuffled(ordered.rows), order_book)
    by_place = partial(on_changed_pytensor, nogil=False)
    lanes = {
        LIMIT: Lane(on_one_batch, shuffled),
        "four batches in turn, in the cache": Lane(on_ready_batches, shuffled, 4),
        "batches that are in memory already": Lane(on_ready_batches, shuffled),
        "stream of an array in memory": Lane(on_stream_of_array, shuffled),
        STREAM: Lane(on_stream, shuffled),
        "stream, as it comes (zstd, dictionaries)": Lane(on_stream, ordered),
        MEMORY: Lane(in_memory_columns, shuffled),
        f"{MEMORY}, features in one matrix": Lane(in_memory, shuffled),
        PEER: Lane(on_dataloader, ordered),
        f"{LIMIT}, PyTensor's arguments by place": Lane(by_place, on_one_batch, shuffled),
        f"{STREAM}, PyTensor's arguments by place": Lane(by_place, on_stream, shuffled),
        f"{STREAM}, and its step without the lock": Lane(
            partial(on_changed_pytensor, nogil=True), on_stream, shuffled
        ),
    }
    race(lanes.values(), turns=turns)
    return markdown(f"rows | {HEADS}", speeds(lanes, LIMIT, MEMORY))


def shapes_table(data: Data, turns: int) -> str:
    """Measure other models and tables, each beside its own limit."""
    book, groups = data.shuffled(data.order_book()), data.shuffled(data.groups())
    cases = {
        "64 columns": Case(data.shuffled(data.wide()), wide, buffer_size=WIDE_BUFFER),
        '64 columns, format="arrow"': Case(
            data.shuffled(data.wide(), "arrow"), wide, buffer_size=WIDE_BUFFER
        ),
        '256 columns, format="arrow"': Case(
            data.shuffled(data.wide(256), "arrow"),
            partial(wide, width=256),
            buffer_size=WIDE_BUFFER,
        ),
        "batches of 256": Case(book, order_book, batch_size=256),
        f"hierarchical, {N_GROUPS} groups": Case(groups, hierarchical),
        "order book, cold page cache": Case(book, order_book),
    }
    lines = []
    for name, case in cases.items():
        before = partial(forget_pages, parquet_files(case.rows)) if "cold" in name else None
        ways = {LIMIT: on_one_batch, STREAM: on_stream, MEMORY: in_memory}
        lanes = {way: Lane(make, case) for way, make in ways.items()}
        race(lanes.values(), turns=turns, before=before)
        lines += [[name, *line] for line in speeds(lanes, LIMIT, MEMORY)]
    return markdown(f"model | rows | {HEADS}", lines)


def speeds(lanes: dict[str, Lane], limit: str, other: str) -> Iterator[list[str]]:
    """Yield the cells of each lane, with its speed over that of two of them."""
    for name, lane in lanes.items():
        seconds = lane.median("seconds")
        yield [
            name,
            f"{1 / seconds:,.0f}",
            f"{1e3 * seconds:.3f}",
            f"{1e3 * lane.median('processor_seconds'):.3f}",
            f"{lane.median('disk_mb') / seconds:.0f}",
            *(ratio(lane, lanes[each]) for each in (limit, other)),
        ]


def memory_table(data: Data, turns: int) -> str:
    """Measure the peak memory of fits at two sizes, each against a fit that reads nothing."""
    lines = []
    for n_rows in (data.n_rows // 20, data.n_rows):
        case = Case(data.shuffled(data.order_book(n_rows)), order_book)
        ways = {LIMIT: on_one_batch, STREAM: on_stream, MEMORY: in_memory_columns}
        # Whoever comes first compiles for the others, which takes memory.
        for _ in range(2):
            lanes = {way: Lane(make, case) for way, make in ways.items()}
            race(lanes.values(), turns=turns)
        limit = lanes[LIMIT].peak_mb
        for way, lane in lanes.items():
            lines.append([f"{n_rows:,}", way, f"{lane.peak_mb:.0f}", f"{lane.peak_mb - limit:.0f}"])
    return markdown("rows | fit | peak MB | above one batch", lines)


def start_table(data: Data, turns: int) -> str:
    """Measure how long it takes to open a large table, and until the first batch is there."""
    lines, n_rows = [], 5 * data.n_rows
    book = data.order_book(n_rows)
    for name, rows in {"preshuffled": data.shuffled(book), "in order of time": book}.items():
        for cache, before in {"warm": len, "cold": forget_pages}.items():
            seconds = []
            for _ in range(turns):
                before(parquet_files(rows))
                seconds.append(in_process(first_batch, rows))
            opened, first = (statistics.median(each) for each in zip(*seconds))
            n_files = len(parquet_files(rows))
            lines.append([name, cache, n_files, f"{opened:.2f}", f"{first:.2f}"])
    heads = f"{n_rows / 1e6:g} million rows | page cache | files | open, s | first batch, s"
    return markdown(heads, lines)


def first_batch(rows: Path) -> tuple[float, float]:
    """Return the seconds until the dataset is made, and until ``fit_callback`` returns."""
    warnings.simplefilter("ignore")
    began = time.perf_counter()
    case = Case(rows, order_book)
    ds = stream(case)
    opened = time.perf_counter()
    with pm.Model():
        case.observe(ds.as_tensor(), ds.total_size)
        built = time.perf_counter()
        callback = ds.fit_callback()
        return opened - began, time.perf_counter() - built


def forget_pages(files: list[Path]) -> None:
    """Drop files from the page cache."""
    for file in files:
        handle = os.open(file, os.O_RDONLY)
        os.fsync(handle)  # pages that are not on the disk yet would stay
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


TABLES: dict[str, Callable[[Data, int], str]] = {
    "speed": speed_table,
    "shapes": shapes_table,
    "memory": memory_table,
    "start": start_table,
}


def main(arguments: Sequence[str] | None = None) -> None:
    measure(COMMAND, TABLES, arguments, rows=20e6, turns=9)


if __name__ == "__main__":
    main()
