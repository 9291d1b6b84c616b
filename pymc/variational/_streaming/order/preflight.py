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
from dataclasses import dataclass, replace

import numpy as np

from scipy.special import gammaln

from pymc.variational._streaming.order.anova import ALPHA, Anova, Features, Moments, anova
from pymc.variational._streaming.order.report import (
    OrderReport,
    Stream,
    Windows,
    judge,
    one_window,
)
from pymc.variational._streaming.sources.base import Source

__all__ = ["preflight"]

_DESIGNS = [(20, 32), (20, 16), (20, 8), (12, 8), (8, 8), (12, 4), (8, 4), (6, 4)]
"""Windows, and blocks in each; the first that is not too expensive is used."""
_WINDOW_VALUES = 1 << 17
"""Sampled from each window, in all its blocks and columns."""
_BLOCK_ROWS = 1 << 16
"""Decoded at a time."""
_PILOT = 4_096
_SLAB = 2_048
"""Rows whose features fit into the cache."""
_BUDGET = 3 << 24
"""Values that may be decoded, in about half a second of processor time."""
_OPEN_VALUES = 1 << 18
"""What could be decoded in the time that opening a file takes."""
_HALF_LEVEL = 1e-2
"""Each random half of the blocks must show the order by itself."""
_MIN_EVENTS = 20
"""Effective number of blocks: an event that comes in one burst is no order."""
_MIN_BLOCKS = 8
"""In a window; fewer have no halves to speak of."""
_SEPARATE_ROWS = 100
_THREADS = min(4, os.cpu_count() or 1)
"""That read the sample, each a file or row group at a time."""


@dataclass(frozen=True, slots=True)
class _Plan:
    """Where to look."""

    starts: np.ndarray
    """Windows, shape (k,)."""
    places: np.ndarray
    """First rows of the blocks, shape (k, n_blocks), ascending."""
    block: int
    """Rows of a block."""
    covers: float
    """Share of the windows that could have been chosen."""


def preflight(stream: Stream, seed: int) -> tuple[OrderReport | None, Features | None]:
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
        return one_window(stream, n_rows), None
    if min(window, n_rows - starts[-1]) < _MIN_BLOCKS:
        return None, None
    rng = np.random.default_rng(seed)
    known = _compare_footers(stream, starts, n_rows, rng)
    if known is not None:
        return known, None
    plan = _plan(stream, starts, n_rows, rng)
    if plan is None:
        return None, None
    rows = _read(stream.source, plan)
    if not np.isfinite(rows).all():
        return None, None
    with np.errstate(all="ignore"):  # of values that are too large to be squared
        return _compare(stream, plan, rows, n_rows)


def _compare(
    stream: Stream, plan: _Plan, rows: np.ndarray, n_rows: int
) -> tuple[OrderReport, Features]:
    """Compare windows by the means of the blocks of *plan*, which are *rows*."""
    features = Features.fit(rows[:: -(-len(rows) // _PILOT)], stream.source.columns)
    blocks, single = _summarise(features, rows, plan)
    found, bursts = _test(blocks, single)
    threshold = ALPHA / len(features)
    hidden = np.flatnonzero(bursts & (found.p_value < threshold))
    found = replace(found, p_value=np.where(bursts, 1.0, found.p_value))
    variance = np.maximum(single.variance, 1e-300)
    means = (blocks.mean(axis=1) - single.mean) / np.sqrt(variance)
    k, n_blocks, _ = blocks.shape
    windows = Windows(
        n_groups=k,
        span=stream.window,
        places=_middles(plan.starts, stream.window, n_rows),
        means=means,
        noise=np.broadcast_to(np.sqrt(found.within / n_blocks / variance), means.shape),
        group_rows=n_blocks * plan.block,
        units=k * n_blocks,
    )
    report = judge(
        stream,
        windows,
        found,
        np.minimum(found.component() / variance, 1.0),
        features.names,
        stage="preflight",
        threshold=threshold,
        n_rows=n_rows,
        rows_read=len(rows),
        note=_note(plan, [features.names[j] for j in hidden]),
    )
    return report, features


def _summarise(features: Features, rows: np.ndarray, plan: _Plan) -> tuple[np.ndarray, Moments]:
    """Return block means, shape (k, n_blocks, n_features), and the moments of single rows."""
    step = max(1, _SLAB // plan.block) * plan.block
    means, single = [], Moments(0, np.zeros((4, len(features))))
    for first in range(0, len(rows), step):
        values = features(rows[first : first + step])
        single += Moments.of(values)
        means.append(values.reshape(len(features), -1, plan.block).mean(axis=2).T)
    return np.concatenate(means).reshape(*plan.places.shape, -1), single


def _test(blocks: np.ndarray, single: Moments) -> tuple[Anova, np.ndarray]:
    """Compare windows by their blocks, and mark the features that stand out in few of these.

    Both halves of the blocks must agree on an alarm.
    """
    found = _anova_of(blocks, single)
    halves = [_anova_of(half, single).p_value for half in (blocks[:, ::2], blocks[:, 1::2])]
    weaker = np.maximum(*halves)
    p_value = np.where(weaker > _HALF_LEVEL, np.maximum(found.p_value, weaker), found.p_value)
    bursts = Moments.of(blocks.reshape(-1, blocks.shape[2]).T).events() < _MIN_EVENTS
    return replace(found, p_value=p_value), bursts


def _anova_of(blocks: np.ndarray, single: Moments) -> Anova:
    k, n_blocks, n_features = blocks.shape
    total = Moments.of(blocks.reshape(-1, n_features).T)
    return anova(blocks.sum(axis=1), np.full(k, n_blocks), total, single.events())


def _middles(starts: np.ndarray, window: int, n_rows: int) -> np.ndarray:
    """Return the middle of each window as a share of the table."""
    return (starts + np.minimum(starts + window, n_rows)) / (2 * n_rows)


def _note(plan: _Plan, hidden: Sequence[str]) -> str:
    notes = []
    if hidden:
        notes.append(
            f"{hidden[0]!r} stands out in so few places of the sample that it may be chance; "
            "the check while streaming tells after an epoch."
        )
    if plan.covers < 1:
        notes.append(
            f"Only {100 * plan.covers:.2g} % of the table was in reach of the sample, since row "
            "groups are read from their start; the check while streaming sees the rest."
        )
    return " ".join(notes)


def _plan(
    stream: Stream, starts: np.ndarray, n_rows: int, rng: np.random.Generator
) -> _Plan | None:
    """Choose windows and blocks that are cheap enough to read, all over the table if possible."""
    source = stream.source
    stops = np.minimum(starts + stream.window, n_rows)
    depth = stops - _read_starts(source, stops - 1)
    most = _BUDGET // _width(source)
    for reach in (n_rows, most, most // 4, most // 16):
        near = np.flatnonzero(depth <= reach)
        for k, n_blocks in _DESIGNS if len(near) > 1 else []:
            chosen = near[_stratified(len(near), min(k, len(near)), rng)]
            places, block = _draw(
                starts[chosen], stops[chosen], n_blocks, _WINDOW_VALUES // _width(source), rng
            )
            if _cost(source, places, block) <= _BUDGET:
                return _Plan(starts[chosen], places, block, len(near) / len(starts))
    return None


def _draw(
    starts: np.ndarray, stops: np.ndarray, n_blocks: int, sampled: int, rng: np.random.Generator
) -> tuple[np.ndarray, int]:
    """Draw blocks from strata of the windows: first rows, shape (k, n_blocks), and length."""
    n_blocks = min(n_blocks, int((stops - starts).min()))
    stratum = (stops - starts)[:, None] // n_blocks
    block = max(1, min(sampled // n_blocks, int(stratum.min())))
    shift = rng.integers(0, stratum - block + 1, (len(starts), n_blocks))
    return starts[:, None] + np.arange(n_blocks) * stratum + shift, block


def _stratified(n: int, k: int, rng: np.random.Generator) -> np.ndarray:
    edges = np.arange(k + 1) * n // k
    return rng.integers(edges[:-1], edges[1:])


def _cost(source: Source, places: np.ndarray, block: int) -> int:
    """Return about how many values could be decoded in the time that reading takes."""
    places = places.ravel()
    entries = _read_starts(source, places)
    if np.array_equal(entries, places):
        return 0  # any row of an array can be read by itself
    first = _reads(entries, places, block)
    last = np.append(first[1:], len(places)) - 1
    depth = places[last] + block - entries[first]
    decoded = -(-depth // _BLOCK_ROWS) * _BLOCK_ROWS
    return int(decoded.sum()) * _width(source) + len(first) * _OPEN_VALUES


def _reads(entries: np.ndarray, places: np.ndarray, block: int) -> np.ndarray:
    """Return the first block of each read; what lies near the last one is cheaper to read on."""
    gaps = entries[1:] - (places[:-1] + block)
    return np.append(0, np.flatnonzero(gaps > _BLOCK_ROWS) + 1)


def _read_starts(source: Source, rows: np.ndarray) -> np.ndarray:
    starts = source.read_starts(rows)
    assert starts is not None
    return starts


def _width(source: Source) -> int:
    """Return the values of a row."""
    return max(1, int(np.prod(source.sample_shape or (1,))))


def _read(source: Source, plan: _Plan) -> np.ndarray:
    """Return the rows of all blocks, shape (k * n_blocks * block, *sample_shape)."""
    places = plan.places.ravel()
    entries = _read_starts(source, places)
    first = _reads(entries, places, plan.block)

    def read(entry: int, some: np.ndarray) -> np.ndarray:
        return _read_from(source, entry, some, plan.block)

    with ThreadPoolExecutor(_THREADS if source.concurrent else 1) as pool:
        parts = list(pool.map(read, entries[first].tolist(), np.split(places, first[1:])))
    blocks = np.concatenate(parts)
    return blocks.reshape(-1, *blocks.shape[2:])


def _read_from(source: Source, entry: int, places: np.ndarray, n: int) -> np.ndarray:
    """Return *n* rows from each of the ascending *places*, reading on from *entry*."""
    found, start, done = None, entry, 0
    with closing(source.blocks(0, entry, block_rows=_BLOCK_ROWS)) as blocks:
        while done < len(places):
            block = next(blocks)
            stop = start + len(block)
            for i in range(done, int(np.searchsorted(places, stop))):
                low, high = max(places[i], start), min(places[i] + n, stop)
                rows = block[low - start : high - start]
                if found is None:
                    found = np.empty((len(places), n, *rows.shape[1:]), rows.dtype)
                found[i, low - places[i] : high - places[i]] = rows
            done = int(np.searchsorted(places + n, stop, side="right"))
            start = stop
    assert found is not None
    return found


def _compare_footers(
    stream: Stream, starts: np.ndarray, n_rows: int, rng: np.random.Generator
) -> OrderReport | None:
    """Report a column whose values in some windows all lie below those in others.

    Among random windows of at least a hundred rows, that never happens.
    """
    chosen = starts[_stratified(len(starts), min(_DESIGNS[0][0], len(starts)), rng)]
    stops = np.minimum(chosen + stream.window, n_rows)
    rows = int((stops - chosen).min())
    bounds = [stream.source.ranges(int(a), int(b)) for a, b in zip(chosen, stops)]
    if rows < _SEPARATE_ROWS or any(b is None for b in bounds):
        return None
    low, high = np.array(bounds, dtype=float).transpose(2, 1, 0)
    correlation = np.array([_separation(a, b) for a, b in zip(low, high)])
    k, d = len(chosen), len(low)
    log_p = np.log(2 * k**2 * d) + 2 * gammaln(rows + 1) - gammaln(2 * rows + 1)
    p_value = np.where(correlation > 0, np.exp(log_p), 1.0)
    middle = (low + high).T / 2
    windows = Windows(
        n_groups=k,
        span=stream.window,
        places=_middles(chosen, stream.window, n_rows),
        means=(middle - middle.mean(axis=0)) / np.maximum(middle.std(axis=0), 1e-300),
        noise=np.zeros((k, d)),
        group_rows=rows,
        units=k * rows,
    )
    report = judge(
        stream,
        windows,
        Anova(p_value, correlation, 1 - correlation, rows),
        correlation,
        stream.source.columns or (),
        stage="preflight",
        threshold=ALPHA / d,
        n_rows=n_rows,
        rows_read=0,
        note="The footers alone show it: all its values in some windows lie below all in others.",
    )
    return report if report.ordered else None


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
