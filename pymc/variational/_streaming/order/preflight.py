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

from contextlib import closing
from typing import cast

import numpy as np

from scipy.special import gammaln

from pymc.variational._streaming.order.anova import (
    ALPHA,
    Anova,
    PowerSums,
    anova,
    group_squares,
)
from pymc.variational._streaming.order.report import (
    Comparison,
    OrderReport,
    Stream,
    make_report,
    report_one_window,
)
from pymc.variational._streaming.sources.base import Source

__all__ = ["preflight"]

_DESIGNS = [(20, 32), (20, 8), (8, 8)]
"""Windows, and blocks in each; the first that is not too expensive is used."""
_WINDOW_VALUES = 1 << 17
"""Number of values sampled from each window, in all its blocks and columns."""
_BLOCK_ROWS = 1 << 16
"""Number of rows that are decoded at a time."""
_BUDGET = 3 << 24
"""Number of values that may be decoded, in about half a second of processor time."""
_HALF_LEVEL = 1e-2
"""Each random half of the blocks must show the order by itself."""
_MIN_EVENTS = 20
"""Effective number of blocks: an event that comes in few blocks is no order."""
_MIN_BLOCKS = 8
"""Number of blocks in a window; fewer have no halves to speak of."""
_RARE_NOTE = (
    "{!r} stands out in so few places of the sample that it may be chance; the check while "
    "streaming decides after an epoch."
)


def preflight(stream: Stream, seed: int) -> OrderReport | None:
    """Compare windows in the order of epoch 0, on a sample of the rows.

    None if the rows can only be read in sequence, or not within the budget, or if the sample
    holds values that are not finite, which are refused when they are streamed.
    """
    n_rows, window = stream.n_rows, stream.window
    if n_rows is None or stream.source.read_starts(np.zeros(1, np.int64)) is None:
        return None
    starts = np.arange(0, n_rows, window)
    if len(starts) > 2 and n_rows - starts[-1] < window / 4:
        starts = starts[:-1]
    if len(starts) < 2:
        return report_one_window(stream)
    if min(window, n_rows - starts[-1]) < _MIN_BLOCKS:
        return None
    rng = np.random.default_rng(seed)
    return _compare_footers(stream, starts, rng) or _compare_sample(stream, starts, rng)


def _compare_footers(
    stream: Stream, starts: np.ndarray, rng: np.random.Generator
) -> OrderReport | None:
    """Report a column whose values in some windows all lie below those in others."""
    n_rows = cast(int, stream.n_rows)
    chosen = starts[_stratified(len(starts), _DESIGNS[0][0], rng)]
    stops = np.minimum(chosen + stream.window, n_rows)
    bounds = [stream.source.ranges(int(a), int(b)) for a, b in zip(chosen, stops)]
    if bounds[0] is None:
        return None
    low, high = np.array(bounds, dtype=float).transpose(2, 0, 1)
    k, d = low.shape
    # Where a share a of the windows lies wholly at or below some c, and b wholly above, the
    # correlation within windows of "the value is at most c" is at least 2 √(ab).
    below = (high[None] <= high[:, None]).mean(axis=1)
    above = (low[None] > high[:, None]).mean(axis=1)
    correlation = 2 * np.sqrt((below * above).max(axis=0))
    # The probability that all rows of one of two random windows lie below those of the other.
    rows = int((stops - chosen).min())
    log_p = np.log(2 * k**2 * d) + 2 * gammaln(rows + 1) - gammaln(2 * rows + 1)
    middle = (low + high) / 2
    found = Comparison(
        names=stream.source.columns or (),
        p_value=np.where(correlation > 0, np.exp(log_p), 1.0),
        correlation=correlation,
        threshold=ALPHA / d,
        span=stream.window,
        n_groups=k,
        n_units=k * rows,
        rows_read=0,
        positions=(chosen + stops) / (2 * n_rows),
        means=(middle - middle.mean(axis=0)) / np.maximum(middle.std(axis=0), 1e-300),
        noise=np.zeros((k, d)),
        note="The footers alone show it: all its values in some windows lie below all in others.",
    )
    report = make_report(stream, found)
    return report if report.ordered else None


def _compare_sample(
    stream: Stream, starts: np.ndarray, rng: np.random.Generator
) -> OrderReport | None:
    """Compare windows by blocks of their rows, if those are cheap enough to read."""
    n_rows = cast(int, stream.n_rows)
    width = max(1, int(np.prod(stream.source.sample_shape or (1,))))
    for k, n_blocks in _DESIGNS:
        chosen = starts[_stratified(len(starts), k, rng)]
        stops = np.minimum(chosen + stream.window, n_rows)
        places, block = _draw_blocks(chosen, stops, n_blocks, _WINDOW_VALUES // width, rng)
        reads, cost = _plan_reads(stream.source, places.ravel(), block, width)
        if cost <= _BUDGET:
            break
    else:
        return None
    rows = np.concatenate([_read_blocks(stream.source, *planned, block) for planned in reads])
    if not np.isfinite(rows).all():
        return None
    positions = (chosen + stops) / (2 * n_rows)
    with np.errstate(all="ignore"):  # of values that are too large to be squared
        return make_report(stream, _compare_blocks(stream, rows, block, positions))


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
    # A read decodes up to a block of rows in excess.
    return reads, int((depth + _BLOCK_ROWS).sum()) * width


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
    stream: Stream, rows: np.ndarray, block: int, positions: np.ndarray
) -> Comparison:
    """Compare windows at these *positions* by the means of blocks of *block* rows."""
    from pymc.variational._streaming.order.features import Features

    features = Features.fit(rows, stream.source.columns)
    single, sums, _ = features.sums(rows, 0, block, np.arange(block))
    blocks = (sums / block).reshape(len(positions), -1, len(features.names))
    k, n_blocks, _ = blocks.shape
    found = _test(blocks, single)
    threshold = ALPHA / len(features.names)
    in_few_blocks = PowerSums.of(blocks.reshape(k * n_blocks, -1)).events() < _MIN_EVENTS
    rare = np.flatnonzero(in_few_blocks & (found.p_value < threshold))
    variance = np.maximum(single.variance, 1e-300)
    means = (blocks.mean(axis=1) - single.mean) / np.sqrt(variance)
    return Comparison(
        names=features.names,
        p_value=np.where(in_few_blocks, 1.0, found.p_value),
        correlation=np.minimum(found.component / variance, 1.0),
        threshold=threshold,
        span=stream.window,
        n_groups=k,
        n_units=k * n_blocks,
        rows_read=len(rows),
        positions=positions,
        means=means,
        noise=np.broadcast_to(np.sqrt(found.within / n_blocks / variance), means.shape),
        note=_RARE_NOTE.format(features.names[rare[0]]) if len(rare) else "",
    )


def _test(blocks: np.ndarray, single: PowerSums) -> Anova:
    """Compare windows by their blocks; both halves of the blocks must agree on an alarm."""
    found = _anova_of(blocks, single)
    halves = [_anova_of(half, single).p_value for half in (blocks[:, ::2], blocks[:, 1::2])]
    weaker = np.maximum(*halves)
    p_value = np.where(weaker > _HALF_LEVEL, np.maximum(found.p_value, weaker), found.p_value)
    return found._replace(p_value=p_value)


def _anova_of(blocks: np.ndarray, single: PowerSums) -> Anova:
    k, n_blocks, n_features = blocks.shape
    squares = group_squares(blocks.sum(axis=1), np.full(k, n_blocks))
    return anova(squares, k, PowerSums.of(blocks.reshape(-1, n_features)), single.events())
