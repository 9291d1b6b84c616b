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
"""Rows of synthetic markets, without writing their messages to disk first.

>>> write_rows("ordered", rows=5_000_000, seed=0)

They are the rows that ``generate`` and ``fold`` make of the same messages, in the same order, but
markets go from the simulator through the book to the table in memory. For tables of up to a
billion rows, whose messages would take tens of gigabytes.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.orderbook.book import Book, close_ms
from benchmarks.orderbook.generate import SERIES, plan
from benchmarks.orderbook.merge import COLUMNS, regrouped
from benchmarks.orderbook.publish import published
from benchmarks.orderbook.simulate import Market, simulate

__all__ = ["write_rows"]

ROWS_PER_FILE = 1_000_000
AHEAD = 4


def write_rows(
    destination: str | Path,
    *,
    rows: int,
    seed: int,
    planned: int | None = None,
    cuts: Sequence[int] = (),
    workers: int = 2,
    overwrite: bool = False,
) -> None:
    """Write the first *rows* rows of synthetic markets, sorted by time, as Parquet files.

    Parameters
    ----------
    destination : str or Path
        Directory that appears when all of its files are complete; their names sort by time.
    rows : int
        Rows to write.
    seed : int
        The same seed and numbers give the same rows.
    planned : int, optional
        Rows of the table whose first rows these are; the markets drift through all of it.
        Default: *rows*.
    cuts : sequence of int
        Numbers of rows after which a file ends, so that whole files make a prefix of so many.
    workers : int
        Windows of time simulated at the same time.
    overwrite : bool
        Replace *destination* if it exists.

    Notes
    -----
    Memory does not depend on *rows*: a few windows of four markets each.
    """
    bounds = sorted({*range(ROWS_PER_FILE, rows, ROWS_PER_FILE), *cuts, rows})
    if bounds[0] < 1 or bounds[-1] > rows:
        raise ValueError(f"cuts must lie between 1 and rows={rows}, got {list(cuts)}")
    if planned is not None and planned < rows:
        raise ValueError(f"planned must be at least rows={rows}, got {planned}")
    with published(destination, overwrite=overwrite) as (content, _):
        windows = _windows(plan(_messages_for(planned or rows), seed), workers)
        for number, table in enumerate(regrouped(windows, bounds)):
            pq.write_table(table, content / f"part-{number:05}.parquet", compression="zstd")


def _messages_for(rows: int) -> int:
    """Give enough messages: of a hundred, 98 make rows."""
    return 1_000 + rows * 103 // 100


def _windows(markets: list[Market], workers: int) -> Iterator[pa.Table]:
    """Yield the rows of the markets that are open at the same time, window by window."""
    groups = iter([markets[at : at + len(SERIES)] for at in range(0, len(markets), len(SERIES))])
    with ThreadPoolExecutor(workers) as pool:
        waiting: list[Future[pa.Table]] = [
            pool.submit(_window, group) for group in islice(groups, AHEAD)
        ]
        while waiting:
            yield waiting.pop(0).result()
            waiting += [pool.submit(_window, group) for group in islice(groups, 1)]


def _window(markets: list[Market]) -> pa.Table:
    """Merge the rows of *markets* by time; those of the same time go by market."""
    in_order = sorted(markets, key=lambda market: market.ticker)
    rows, up = (np.concatenate(parts) for parts in zip(*map(_market, in_order)))
    order = np.argsort(rows["recv_ms"], kind="stable")
    columns = (*(rows[name][order] for name in COLUMNS[:-1]), up[order])
    return pa.table(dict(zip(COLUMNS, columns)))


def _market(market: Market) -> tuple[np.ndarray, np.ndarray]:
    """Give the rows of one market that have a label, and their labels."""
    book = Book(close_ms=close_ms(market.ticker))
    rows, labels = [], []
    for events in simulate(market):
        lines = np.arange(len(events.kind))
        n_waiting = book.waiting
        made, up, up_before = book.fold(events, lines)
        rows.append(made)
        if up_before >= 0:
            labels.append(np.full(n_waiting, up_before, np.int8))
        labels.append(up)
    up = np.concatenate(labels)
    return np.concatenate(rows)[: len(up)], up
