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

>>> for table in regrouped(merged([Sorted(rows, up), ...]), [1_000_000, 2_000_000]):
...     pq.write_table(table, path)
"""

import heapq

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from benchmarks.orderbook.book import ROW

__all__ = ["COLUMNS", "Sorted", "merged", "regrouped"]

COLUMNS = ("mid", "spread", "imbalance", "up")
KEYED = np.dtype([("key", "i8"), *ROW.descr[1:], ("up", "i1")])

MERGED_ROWS = 1 << 18
FEWEST_ROWS = 1 << 10
ORDER_BITS = 20


class Sorted(NamedTuple):
    """Files of the rows of a market in order of time."""

    rows: Path
    """Rows of type `ROW`."""
    up: Path
    """Their labels, int8, as far as they are known; rows of negative ones are left out."""


def merged(markets: list[Sorted]) -> Iterator[pa.Table]:
    """Yield all rows by time; rows of the same time go by market, then as they came."""
    later = sorted(
        ((_first_key(market, at), at) for at, market in enumerate(markets)), reverse=True
    )
    # Markets by a key up to which their rows are in the pool.
    heap: list[tuple[int, int]] = []
    n_read, pool, n_pooled, n_kept = [0] * len(markets), [_NO_ROWS], 0, 0
    while heap or later:
        if later and (not heap or later[-1] <= heap[0]):
            heapq.heappush(heap, later.pop())
            continue
        _, at = heap[0]
        share = max(FEWEST_ROWS, MERGED_ROWS // len(heap))
        rows, last_key = _read(markets[at], at, n_read[at], share)
        n_read[at] += share
        pool.append(rows)
        n_pooled += len(rows)
        if last_key is None:
            heapq.heappop(heap)
        else:
            heapq.heapreplace(heap, (last_key, at))
        # Sorting so many at a time takes a time that does not grow with the number of markets.
        if n_pooled > 2 * max(n_kept, share * (len(heap) + 1)):
            ready, rest = _divided(pool, min([*heap[:1], *later[-1:], (_NEVER, 0)])[0])
            yield _table(ready)
            pool, n_pooled, n_kept = [rest], len(rest), len(rest)
    yield _table(_divided(pool, _NEVER)[0])


def regrouped(pieces: Iterator[pa.Table], ends: Iterable[int]) -> Iterator[pa.Table]:
    """Cut and join *pieces* so that a table ends after each number of rows in *ends*."""
    held: list[pa.Table] = []
    start = 0
    for end in ends:
        while sum(piece.num_rows for piece in held) < end - start:
            if (piece := next(pieces, None)) is None:
                break
            held.append(piece)
        if not any(piece.num_rows for piece in held):
            return
        rows = pa.concat_tables(held)
        yield rows[: end - start].combine_chunks()
        held, start = [rows[end - start :]], end


_NO_ROWS = np.empty(0, KEYED)
_NEVER = np.iinfo(np.int64).max


def _first_key(market: Sorted, order: int) -> int:
    return int(_keys(np.fromfile(market.rows, ROW, 1), order)[0])


def _keys(rows: np.ndarray, order: int) -> np.ndarray:
    return (rows["recv_ms"] << ORDER_BITS) | order


def _read(market: Sorted, order: int, first: int, n: int) -> tuple[np.ndarray, int | None]:
    """Read rows that have labels, and the key of the last row; None says that no more follow."""
    up = np.fromfile(market.up, np.int8, n, offset=first)
    rows = np.fromfile(market.rows, ROW, len(up), offset=first * ROW.itemsize)
    keyed = np.empty(len(up), KEYED)
    keyed["key"], keyed["up"] = _keys(rows, order), up
    for name in COLUMNS[:-1]:
        keyed[name] = rows[name]
    return keyed[up >= 0], int(keyed["key"][-1]) if len(up) == n else None


def _divided(pool: list[np.ndarray], key: int) -> tuple[np.ndarray, np.ndarray]:
    """Sort rows, and cut them behind *key*."""
    rows = np.concatenate(pool)
    rows = rows[np.argsort(rows["key"], kind="stable")]
    cut = np.searchsorted(rows["key"], key, "right")
    return rows[:cut], rows[cut:]


def _table(rows: np.ndarray) -> pa.Table:
    return pa.table({name: np.ascontiguousarray(rows[name]) for name in COLUMNS})
