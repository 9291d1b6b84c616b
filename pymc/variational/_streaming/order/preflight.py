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
"""Compare windows of a table before it is streamed, on a thin sample."""

import os

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import TYPE_CHECKING, NamedTuple, cast

import numpy as np

from scipy.special import gammaln

from pymc.variational._streaming.order.anova import (
    ALPHA,
    PILOT_ROWS,
    Anova,
    Comparison,
    GroupSquares,
    PowerSums,
    anova,
)
from pymc.variational._streaming.order.report import (
    OrderReport,
    Stream,
    make_report,
    report_one_window,
)
from pymc.variational._streaming.sources.base import Source

if TYPE_CHECKING:
    from pymc.variational._streaming.order.features import Features

__all__ = ["preflight"]

_DESIGNS = [(20, 32), (20, 16), (20, 8), (12, 8), (8, 8), (12, 4), (8, 4), (6, 4)]
"""Windows, and blocks in each; the first that is not too expensive is used."""
_WINDOW_VALUES = 1 << 17
"""Number of values sampled from each window, in all its blocks and columns."""
_BLOCK_ROWS = 1 << 16
"""Number of rows that are decoded at a time."""
_BUDGET = 3 << 24
"""Number of values that may be decoded, in about half a second of processor time."""
_OPEN_VALUES = 1 << 18
"""Number of values that could be decoded in the time that opening a file takes."""
_HALF_LEVEL = 1e-2
"""Each random half of the blocks must show the order by itself."""
_MIN_EVENTS = 20
"""Effective number of blocks: an event that comes in few blocks is no order."""
_MIN_BLOCKS = 8
"""Number of blocks in a window; fewer have no halves to speak of."""
_SEPARATE_ROWS = 100
_THREADS = min(4, os.cpu_count() or 1)
"""Number of threads that read the sample, each a file or row group at a time."""


class _Plan(NamedTuple):
    """Which blocks of rows are read, and how."""

    starts: np.ndarray
    """First rows of the windows, shape (k,)."""
    stops: np.ndarray
    """Ends of the windows."""
    n_blocks: int
    """Number of blocks in a window."""
    block: int
    """Number of rows in a block."""
    reads: list[tuple[int, np.ndarray]]
    """Row at which each read starts, and the first rows of its blocks, ascending."""
    reach: float
    """Share of the windows that could have been chosen."""


def preflight(stream: Stream, seed: int) -> tuple[OrderReport | None, "Features | None"]:
    """Compare windows in the order of epoch 0, on a sample of the rows.

    Returns
    -------
    report : OrderReport or None
        None if the rows can only be read in sequence, or not within the budget, or if the
        sample holds values that are not finite, which are refused when they are streamed.
    features : Features or None
        Fitted on rows from all over the table.
    """
    n_rows, window = stream.source.n_rows, stream.window
    if n_rows is None or stream.source.read_starts(np.zeros(1, np.int64)) is None:
        return None, None
    starts = np.arange(0, n_rows, window)
    if len(starts) > 2 and n_rows - starts[-1] < window / 4:
        starts = starts[:-1]
    if len(starts) < 2:
        return report_one_window(stream, n_rows), None
    if min(window, n_rows - starts[-1]) < _MIN_BLOCKS:
        return None, None
    rng = np.random.default_rng(seed)
    known = _compare_footers(stream, starts, n_rows, rng)
    if known is not None:
        return known, None
    plan = _make_plan(stream, starts, n_rows, rng)
    if plan is None:
        return None, None
    rows = _read(stream.source, plan)
    if not np.isfinite(rows).all():
        return None, None
    with np.errstate(all="ignore"):  # of values that are too large to be squared
        return _compare_blocks(stream, plan, rows, n_rows)


def _compare_footers(
    stream: Stream, starts: np.ndarray, n_rows: int, rng: np.random.Generator
) -> OrderReport | None:
    """Report a column whose values in some windows all lie below those in others.

    Among random windows of at least a hundred rows, that never happens.
    """
    chosen = starts[_stratified(len(starts), _DESIGNS[0][0], rng)]
    stops = np.minimum(chosen + stream.window, n_rows)
    rows = int((stops - chosen).min())
    bounds = [stream.source.ranges(int(a), int(b)) for a, b in zip(chosen, stops)]
    if rows < _SEPARATE_ROWS or any(b is None for b in bounds):
        return None
    low, high = np.array(bounds, dtype=float).transpose(2, 1, 0)
    k, d = len(chosen), len(low)
    correlation = np.array([_separation(a, b) for a, b in zip(low, high)])
    log_p = np.log(2 * k**2 * d) + 2 * gammaln(rows + 1) - gammaln(2 * rows + 1)
    middle = (low + high).T / 2
    found = Comparison(
        names=stream.source.columns or (),
        p_value=np.where(correlation > 0, np.exp(log_p), 1.0),
        correlation=correlation,
        threshold=ALPHA / d,
        span=stream.window,
        n_groups=k,
        n_units=k * rows,
        group_rows=rows,
        n_rows=n_rows,
        rows_read=0,
        positions=(chosen + stops) / (2 * n_rows),
        means=(middle - middle.mean(axis=0)) / np.maximum(middle.std(axis=0), 1e-300),
        noise=np.zeros((k, d)),
        note="The footers alone show it: all its values in some windows lie below all in others.",
    )
    return make_report(stream, found) if found.alarming.any() else None


def _separation(low: np.ndarray, high: np.ndarray) -> float:
    """Return a lower bound on the correlation within windows of 'the value is at most c'.

    The best c has a share *a* of the windows wholly at or below it, and *b* wholly above.
    """
    below = (high[None, :] <= high[:, None]).mean(axis=1)
    above = (low[None, :] > high[:, None]).mean(axis=1)
    best = int(np.argmax(below * above))
    a, b = below[best], above[best]
    if not a * b:
        return 0.0
    q = np.linspace(a, 1 - b, 65)
    return float(((a * (1 - q) ** 2 + b * q**2) / (q * (1 - q))).min())


def _make_plan(
    stream: Stream, starts: np.ndarray, n_rows: int, rng: np.random.Generator
) -> _Plan | None:
    """Choose windows and blocks that are cheap enough to read, all over the table if possible."""
    width = max(1, int(np.prod(stream.source.sample_shape or (1,))))
    stops = np.minimum(starts + stream.window, n_rows)
    depth = stops - cast(np.ndarray, stream.source.read_starts(stops - 1))
    most = _BUDGET // width
    for reach in (n_rows, most, most // 4, most // 16):
        near = np.flatnonzero(depth <= reach)
        for k, n_blocks in _DESIGNS if len(near) > 1 else []:
            chosen = near[_stratified(len(near), k, rng)]
            first, last = starts[chosen], stops[chosen]
            places, block = _draw_blocks(first, last, n_blocks, _WINDOW_VALUES // width, rng)
            reads, cost = _plan_reads(stream.source, places.ravel(), block, width)
            if cost <= _BUDGET:
                share = len(near) / len(starts)
                return _Plan(first, last, places.shape[1], block, reads, share)
    return None


def _stratified(n: int, k: int, rng: np.random.Generator) -> np.ndarray:
    """Draw *k* of *n*, one from each stratum, or all if they are fewer."""
    k = min(n, k)
    edges = np.arange(k + 1) * n // k
    return rng.integers(edges[:-1], edges[1:])


def _draw_blocks(
    starts: np.ndarray, stops: np.ndarray, n_blocks: int, sampled: int, rng: np.random.Generator
) -> tuple[np.ndarray, int]:
    """Draw blocks from strata of the windows: first rows, shape (k, n_blocks), and length."""
    n_blocks = min(n_blocks, int((stops - starts).min()))
    stratum = (stops - starts)[:, None] // n_blocks
    block = max(1, min(sampled // n_blocks, int(stratum.min())))
    shift = rng.integers(0, stratum - block + 1, (len(starts), n_blocks))
    return starts[:, None] + np.arange(n_blocks) * stratum + shift, block


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
    decoded = -(-depth // _BLOCK_ROWS) * _BLOCK_ROWS
    return reads, int(decoded.sum()) * width + len(reads) * _OPEN_VALUES


def _read(source: Source, plan: _Plan) -> np.ndarray:
    """Return the rows of all blocks, shape (k * n_blocks * block, *sample_shape)."""

    def read(planned: tuple[int, np.ndarray]) -> np.ndarray:
        return _read_blocks(source, *planned, plan.block)

    with ThreadPoolExecutor(_THREADS if source.concurrent else 1) as pool:
        return np.concatenate(list(pool.map(read, plan.reads)))


def _read_blocks(source: Source, start: int, places: np.ndarray, n: int) -> np.ndarray:
    """Return *n* rows from each of the ascending *places*, reading on from row *start*."""
    parts = []
    with closing(source.blocks(0, start, block_rows=_BLOCK_ROWS)) as blocks:
        while start < places[-1] + n:
            rows = next(blocks)
            # Some of the places are in these rows, wholly or in part.
            for place in places[(places < start + len(rows)) & (places + n > start)]:
                parts.append(rows[max(0, place - start) : place + n - start].copy())
            start += len(rows)
    return np.concatenate(parts)


def _compare_blocks(
    stream: Stream, plan: _Plan, rows: np.ndarray, n_rows: int
) -> tuple[OrderReport, "Features"]:
    """Compare windows by the means of the blocks of *plan*, which are *rows*."""
    from pymc.variational._streaming.order.features import Features

    features = Features.fit(rows[:: -(-len(rows) // PILOT_ROWS)], stream.source.columns)
    single, sums, _ = features.sums(rows, 0, plan.block, np.arange(plan.block))
    k, n_blocks = len(plan.starts), plan.n_blocks
    blocks = (sums / plan.block).reshape(k, n_blocks, -1)
    found, in_few_blocks = _test(blocks, single)
    threshold = ALPHA / len(features)
    rare = np.flatnonzero(in_few_blocks & (found.p_value < threshold))
    variance = np.maximum(single.variance, 1e-300)
    means = (blocks.mean(axis=1) - single.mean) / np.sqrt(variance)
    comparison = Comparison(
        names=features.names,
        p_value=np.where(in_few_blocks, 1.0, found.p_value),
        correlation=np.minimum(found.component / variance, 1.0),
        threshold=threshold,
        span=stream.window,
        n_groups=k,
        n_units=k * n_blocks,
        group_rows=n_blocks * plan.block,
        n_rows=n_rows,
        rows_read=len(rows),
        positions=(plan.starts + plan.stops) / (2 * n_rows),
        means=means,
        noise=np.broadcast_to(np.sqrt(found.within / n_blocks / variance), means.shape),
        note=_note(plan, [features.names[j] for j in rare]),
    )
    return make_report(stream, comparison), features


def _test(blocks: np.ndarray, single: PowerSums) -> tuple[Anova, np.ndarray]:
    """Compare windows by their blocks, and mark the features that stand out in few of these.

    Both halves of the blocks must agree on an alarm.
    """
    found = _anova_of(blocks, single)
    halves = [_anova_of(half, single).p_value for half in (blocks[:, ::2], blocks[:, 1::2])]
    weaker = np.maximum(*halves)
    p_value = np.where(weaker > _HALF_LEVEL, np.maximum(found.p_value, weaker), found.p_value)
    in_few_blocks = PowerSums.of(blocks.reshape(-1, blocks.shape[2])).events() < _MIN_EVENTS
    return found._replace(p_value=p_value), in_few_blocks


def _anova_of(blocks: np.ndarray, single: PowerSums) -> Anova:
    k, n_blocks, n_features = blocks.shape
    windows = GroupSquares.of(blocks.sum(axis=1), np.full(k, n_blocks))
    return anova(windows, PowerSums.of(blocks.reshape(-1, n_features)), single.events())


def _note(plan: _Plan, rare: Sequence[str]) -> str:
    note = ""
    if rare:
        note += (
            f"{rare[0]!r} stands out in so few places of the sample that it may be chance; "
            "the check while streaming decides after an epoch. "
        )
    if plan.reach < 1:
        note += (
            f"Only {100 * plan.reach:.2g} % of the table was in reach of the sample, since row "
            "groups are read from their start; the check while streaming reads the rest."
        )
    return note
