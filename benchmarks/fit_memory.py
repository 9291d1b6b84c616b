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
"""The memory of fits on streams, and the time until they have their first batch.

They are tables of ``python -m benchmarks.fit_speed``.
"""

import os
import statistics
import time
import warnings

from pathlib import Path
from typing import Any

import pymc as pm

from benchmarks.data import Data
from benchmarks.fits import (
    LIMIT,
    MEMORY,
    STREAM,
    Case,
    in_memory_columns,
    on_one_batch,
    on_stream,
    order_book,
    stream,
)
from benchmarks.orderbook.experiment import in_process, parquet_files
from benchmarks.turns import Lane, race, taking_turns

__all__ = ["first_batch", "forget_pages", "memory_table", "start_table"]

SMALL = 1_000_000
LARGE = 100_000_000


def memory_table(data: Data, turns: int) -> str:
    """Measure the peak memory of fits at two sizes, each against a fit that reads nothing."""
    text = "| rows | fit | peak MB | above one batch |\n|---|---|---|---|\n"
    for n_rows in (SMALL, data.n_rows):
        case = Case(data.shuffled(data.order_book(n_rows)), order_book)
        ways = {
            LIMIT: on_one_batch,
            STREAM: on_stream,
            MEMORY: in_memory_columns,
        }
        # Whoever comes first compiles for the others, which takes memory.
        for _ in range(2):
            with taking_turns({way: Lane(make, case) for way, make in ways.items()}) as lanes:
                race(lanes.values(), turns=turns)
        limit = lanes[LIMIT].peak_mb
        for way, lane in lanes.items():
            text += f"| {n_rows:,} | {way} | {lane.peak_mb:.0f} | {lane.peak_mb - limit:.0f} |\n"
    return text


def start_table(data: Data, turns: int) -> str:
    """Measure how long it takes to open a large table, and until the first batch is there."""
    text = "| 100 million rows | page cache | files | open, s | first batch, s |\n|---|---|---|---|---|\n"
    book = data.order_book(LARGE)
    for name, rows in {"preshuffled": data.shuffled(book), "in order of time": book}.items():
        for cache, before in {"warm": len, "cold": forget_pages}.items():
            seconds = []
            for _ in range(turns):
                before(parquet_files(rows))
                seconds.append(in_process(first_batch, rows))
            opened, first = (statistics.median(each) for each in zip(*seconds))
            n_files = len(parquet_files(rows))
            text += f"| {name} | {cache} | {n_files} | {opened:.2f} | {first:.2f} |\n"
    return text


def first_batch(rows: Path) -> tuple[float, float]:
    """Return the seconds until the dataset is made, and until ``fit_callback`` returns."""
    warnings.simplefilter("ignore")
    began = time.perf_counter()
    ds = stream(Case(rows, order_book))
    opened = time.perf_counter()
    with pm.Model():
        buffer: Any = ds.as_tensor()
        order_book(buffer[:, :-1], buffer[:, -1], ds.total_size)
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
