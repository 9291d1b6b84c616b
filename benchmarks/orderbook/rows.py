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

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa

from benchmarks.orderbook.book import Book, close_ms
from benchmarks.orderbook.generate import SERIES, Market, plan, simulate
from benchmarks.orderbook.merge import COLUMNS
from benchmarks.orderbook.publish import published, write_files

__all__ = ["write_rows"]

AHEAD = 4


def write_rows(
    destination: str | Path,
    *,
    rows: int,
    seed: int,
    planned: int | None = None,
    overwrite: bool = False,
) -> None:
    """Write the first *rows* rows of synthetic markets, sorted by time, as Parquet files.

    The markets drift through the whole table of *planned* rows, by default as many. The same seed
    and numbers give the same rows. The destination appears when all of its files are complete, and
    is replaced only with *overwrite*. Memory is bounded: by a few windows of four markets each.
    """
    planned = rows if planned is None else planned
    if not 1 <= rows <= planned:
        raise ValueError(f"rows must lie between 1 and planned={planned}, got {rows}")
    with published(destination, overwrite=overwrite) as (content, _):
        write_files(_first(rows, plan(_messages_for(planned), seed)), content)


def _messages_for(rows: int) -> int:
    """Give enough messages: of a hundred, 98 make rows."""
    return 1_000 + rows * 103 // 100


def _first(n_rows: int, markets: list[Market]) -> Iterator[pa.Table]:
    """Yield rows of the markets, those that are open at the same time together."""
    windows = [markets[at : at + len(SERIES)] for at in range(0, len(markets), len(SERIES))]
    with ThreadPoolExecutor(2) as pool:
        for at in range(0, len(windows), AHEAD):
            for table in pool.map(_window, windows[at : at + AHEAD]):
                yield table[:n_rows]
                n_rows -= min(n_rows, len(table))
            if n_rows == 0:
                return


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
        made, known = book.fold(events, np.arange(len(events.kind)))
        rows.append(made)
        labels.append(known)
    up = np.concatenate(labels)
    return np.concatenate(rows)[: len(up)], up
