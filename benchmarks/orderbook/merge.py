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
"""Merge the rows of markets by time, in bounded memory.

>>> for table in merged([Sorted(rows, up), ...]):
...     pq.write_table(table, path)
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from benchmarks.orderbook.book import ROW

__all__ = ["COLUMNS", "Sorted", "merged"]

COLUMNS = ("mid", "spread", "imbalance", "up")
KEYED = np.dtype([("key", "i8"), *ROW.descr[1:], ("up", "i1")])

MERGED_ROWS = 1 << 18
FEWEST_ROWS = 1 << 10
ORDER_BITS = 20
NEVER = np.iinfo(np.int64).max


class Sorted(NamedTuple):
    """Files of the rows of a market in order of time."""

    rows: Path
    """Rows of type `ROW`."""
    up: Path
    """Labels, int8, of the first of these rows, at least of one; those of -1 are left out."""


def merged(markets: list[Sorted]) -> Iterator[pa.Table]:
    """Yield all rows by time; rows of the same time go by market, then as they came.

    The files are read in blocks, in the order of the blocks' first rows, so that rows before the
    first of the next block are complete.
    """
    n_rows = [market.up.stat().st_size for market in markets]
    first = np.sort([_key(market, order, 0) for order, market in enumerate(markets)])
    last = np.sort([_key(market, order, n_rows[order] - 1) for order, market in enumerate(markets)])
    n_open = np.arange(1, len(markets) + 1) - np.searchsorted(last, first)
    n = max(FEWEST_ROWS, MERGED_ROWS // int(n_open.max()))
    blocks = sorted(
        (_key(market, order, start), order, start)
        for order, market in enumerate(markets)
        for start in range(0, n_rows[order], n)
    )
    pool, n_pooled, n_kept = [np.empty(0, KEYED)], 0, 0
    for (_, order, start), next_key in zip(blocks, [*(key for key, *_ in blocks[1:]), NEVER]):
        pool.append(_read(markets[order], order, start, n))
        n_pooled += len(pool[-1])
        # Sorting so many at a time takes a time that does not grow with the number of markets.
        if n_pooled > 2 * max(n_kept, MERGED_ROWS) or next_key == NEVER:
            rows = np.concatenate(pool)
            rows = rows[np.argsort(rows["key"], kind="stable")]
            cut = int(np.searchsorted(rows["key"], next_key))
            yield pa.table({name: np.ascontiguousarray(rows[name][:cut]) for name in COLUMNS})
            pool, n_pooled, n_kept = [rows[cut:]], len(rows) - cut, len(rows) - cut


def _key(market: Sorted, order: int, at: int) -> int:
    """Return the time of one row, then the order of its market, as one number."""
    (row,) = np.fromfile(market.rows, ROW, 1, offset=at * ROW.itemsize)
    return int(row["recv_ms"]) << ORDER_BITS | order


def _read(market: Sorted, order: int, start: int, n: int) -> np.ndarray:
    up = np.fromfile(market.up, np.int8, n, offset=start)
    rows = np.fromfile(market.rows, ROW, len(up), offset=start * ROW.itemsize)
    keyed = np.empty(len(up), KEYED)
    keyed["key"], keyed["up"] = rows["recv_ms"] << ORDER_BITS | order, up
    for name in COLUMNS[:-1]:
        keyed[name] = rows[name]
    return keyed[up >= 0]
