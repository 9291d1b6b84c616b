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
"""Compare windows of a table before it is streamed, on a thin sample.

Windows are given by their first rows and their ends, shape (k, 2).
"""

import os

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import cast

import numpy as np

from pymc.variational._streaming.order.report import (
    OrderReport,
    Part,
    Stream,
    compare,
    report_one_window,
)
from pymc.variational._streaming.order.statistic import PILOT_ROWS, Statistic
from pymc.variational._streaming.sources.base import Source

__all__ = ["preflight"]

_DESIGNS = [(64, 1_280), (20, 320), (8, 64)]
"""Windows, and blocks in all; the first that is not too expensive is used."""
_MAX_BLOCKS = 64
"""Number of blocks of a window."""
_MAX_ROWS, _MAX_VALUES = 1 << 18, 1 << 21
"""Number of rows, and of values, that are sampled in all windows."""
_BLOCK_ROWS = 1 << 16
"""Number of rows that are decoded at a time."""
_BUDGET = 3 << 24
"""Number of values that may be decoded, in about half a second of processor time."""
_THREADS = min(4, os.cpu_count() or 1)
"""Number of threads that read the sample, each a file or row group at a time."""
_MIN_BLOCKS = 8
"""Number of blocks in a window, at least."""


def preflight(
    stream: Stream, make_statistic: Callable[[np.ndarray], Statistic], seed: int
) -> OrderReport | None:
    """Compare windows in the order of epoch 0, on a sample of the rows.

    None if the rows can only be read in sequence, or not within the budget.
    """
    n_rows, window = stream.n_rows, stream.window
    if n_rows is None or stream.source.read_starts(np.zeros(1, np.int64)) is None:
        return None
    starts = np.arange(0, n_rows, window)
    if len(starts) > 2 and n_rows - starts[-1] < window / 4:
        starts = starts[:-1]
    if len(starts) < 2:
        return report_one_window(stream)
    windows = np.stack([starts, np.minimum(starts + window, n_rows)], axis=1)
    if np.diff(windows).min() < _MIN_BLOCKS:
        return None
    return _compare_sample(stream, windows, make_statistic, np.random.default_rng(seed))


def _compare_sample(
    stream: Stream,
    windows: np.ndarray,
    make_statistic: Callable[[np.ndarray], Statistic],
    rng: np.random.Generator,
) -> OrderReport | None:
    """Compare windows by blocks of their rows, if those are cheap enough to read."""
    width = max(1, int(np.prod(stream.source.sample_shape or (1,))))
    most = min(_MAX_ROWS, _MAX_VALUES // width)
    for k, n_blocks in _DESIGNS:
        chosen = _stratified(windows, k, rng)
        per_window = min(_MAX_BLOCKS, max(_MIN_BLOCKS, n_blocks // len(chosen)))
        places, block = _draw_blocks(chosen, per_window, most // len(chosen), rng)
        reads, cost = _plan_reads(stream.source, places.ravel(), block, width)
        if cost <= _BUDGET:
            break
    else:
        return None
    with ThreadPoolExecutor(_THREADS if stream.source.concurrent else 1) as pool:
        parts = pool.map(lambda read: _read_blocks(stream.source, *read, block=block), reads)
        rows = np.concatenate(list(parts))
    statistic = make_statistic(rows[:: -(-len(rows) // PILOT_ROWS)])
    blocks = rows.reshape(places.size, block, *rows.shape[1:])
    return compare(
        stream,
        statistic,
        [Part(np.array([statistic.sums(b) for b in blocks]), block, statistic.names)],
        np.repeat(np.arange(len(chosen)), places.shape[1]),
        span=stream.window,
        rows_read=len(rows),
        middles=chosen.mean(axis=1),
    )


def _stratified(windows: np.ndarray, k: int, rng: np.random.Generator) -> np.ndarray:
    """Draw *k* windows, the first, the last, and one from each stratum between, or take all."""
    k = min(len(windows), k)
    edges = np.arange(k + 1) * len(windows) // k
    drawn = rng.integers(edges[:-1], edges[1:])
    drawn[[0, -1]] = 0, len(windows) - 1
    return windows[drawn]


def _draw_blocks(
    windows: np.ndarray, n_blocks: int, sampled: int, rng: np.random.Generator
) -> tuple[np.ndarray, int]:
    """Draw blocks from strata of the windows: first rows, shape (k, n_blocks), and length."""
    sizes = np.diff(windows)
    n_blocks = min(n_blocks, int(sizes.min()))
    stratum = sizes // n_blocks
    block = max(1, min(sampled // n_blocks, int(stratum.min())))
    shift = rng.integers(0, stratum - block + 1, (len(windows), n_blocks))
    return windows[:, :1] + np.arange(n_blocks) * stratum + shift, block


def _plan_reads(
    source: Source, places: np.ndarray, block: int, width: int
) -> tuple[list[tuple[int, np.ndarray]], int]:
    """Return what each read starts at and takes, and how many values could be decoded meanwhile."""
    origins = cast(np.ndarray, source.read_starts(places))
    # To read on to a block that lies near the last one is cheaper than to start anew.
    gaps = origins[1:] - (places[:-1] + block)
    first = np.flatnonzero(gaps > _BLOCK_ROWS) + 1
    reads = list(zip(origins[np.append(0, first)].tolist(), np.split(places, first)))
    if np.array_equal(origins, places):
        return reads, 0  # any row of an array can be read by itself
    depth = np.array([some[-1] + block - origin for origin, some in reads])
    # A read decodes up to a block of rows in excess.
    return reads, int((depth + _BLOCK_ROWS).sum()) * width


def _read_blocks(source: Source, start: int, places: np.ndarray, *, block: int) -> np.ndarray:
    """Return *block* rows from each of the ascending *places*, reading on from row *start*."""
    parts = []
    with closing(source.blocks(0, start, block_rows=_BLOCK_ROWS)) as blocks:
        while start < places[-1] + block:
            rows = next(blocks)
            # Some of the places are in these rows, wholly or in part.
            for place in places[(places < start + len(rows)) & (places + block > start)]:
                parts.append(rows[max(0, place - start) : place + block - start].copy())
            start += len(rows)
    return np.concatenate(parts)
