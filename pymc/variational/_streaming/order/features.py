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
"""Features of rows: columns, squares and products, computed and summed by compiled loops.

Import this module where it is used: numba takes a second to import.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from pymc.variational._streaming.order.anova import PILOT_ROWS, PowerSums
from pymc.variational._streaming.sources.compiled import compiled

__all__ = ["Features"]

_CLIP = 5.0
"""Limit of scaled values, so that heavy tails do not hide a drift."""
_ALL_PRODUCTS = 8
"""With more columns than this, products are squares and those with the last column."""
_TILE = 256
"""Number of rows whose features are computed and summed while they are cached."""


class _Scaling(NamedTuple):
    """How the compiled loops compute the features of a row."""

    centre: np.ndarray
    """shape (n_columns,), as the next three"""
    factor: np.ndarray
    """One over the scale of each column."""
    limit: np.ndarray
    """Where scaled values are clipped.  Two-valued columns have no limit: it would make rare values
    vanish."""
    constant: np.ndarray
    """Whether a column was constant in the pilot sample, as a label of sorted rows is: then
    departures from that value are the feature."""
    left: np.ndarray
    """Column that is the first factor of each product."""
    right: np.ndarray
    """Column that is the second factor."""


@dataclass(frozen=True, slots=True)
class Features:
    """Columns, their squares and their products, standardised and clipped on a pilot sample.

    Products matter because the relation of two columns can drift while each stays put.
    """

    names: tuple[str, ...]
    scaling: _Scaling

    @classmethod
    def fit(cls, rows: np.ndarray, columns: Sequence[str] | None) -> "Features":
        """Choose and scale the features on some of these rows."""
        pilot = _flat(rows[:: -(-len(rows) // PILOT_ROWS)])
        values = np.ascontiguousarray(pilot.T, dtype="float64")
        kinds = [_standardise(column) for column in values]
        centre, scale, limit, squared = (np.array(part) for part in zip(*kinds))
        left, right = _pairs(squared)
        factor = 1.0 / np.where(scale, scale, 1.0)
        return cls(
            _names(columns, centre, scale, left, right),
            _Scaling(centre, factor, limit, scale == 0, left, right),
        )

    def sums(
        self, rows: np.ndarray, offset: int, window: int, picks: np.ndarray
    ) -> tuple[PowerSums, np.ndarray, np.ndarray]:
        """Sum up the features of some rows of each window of a stream.

        *rows* follow each other from position *offset* on; the sorted *picks* are the positions
        within a window that are used.  Returned are sums over all used rows, sums over each
        window from that of the first row to that of the last, and the numbers of rows in these.
        """
        powers, sums, sizes = _sum_features(_flat(rows), offset, window, picks, self.scaling)
        return PowerSums(int(sizes.sum()), powers), sums, sizes


def _flat(rows: np.ndarray) -> np.ndarray:
    """Return contiguous rows of float columns, shape (n_rows, n_columns)."""
    # numba knows neither half floats nor foreign byte orders.
    dtype = rows.dtype if rows.dtype in (np.float32, np.float64) else np.float64
    return np.ascontiguousarray(rows, dtype).reshape(len(rows), -1)


def _standardise(column: np.ndarray) -> tuple[float, float, float, bool]:
    """Return centre, scale, clipping limit, and whether the square says something new."""
    levels = np.unique(column)
    if len(levels) == 1:
        return float(column[0]), 0.0, np.inf, False
    if len(levels) == 2:
        return float(column.mean()), float(column.std()), np.inf, False
    centre = float(np.median(column))
    deviations = np.abs(column - centre)
    scale = 1.4826 * float(np.median(deviations))
    # A column that is mostly one value, as amounts of rare events are, has no such scale.
    return centre, scale or float(np.median(deviations[deviations > 0])), _CLIP, True


def _pairs(squared: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Choose the pairs of columns whose products are compared."""
    d = len(squared)
    left, right = np.triu_indices(d)
    keep = (left != right) | squared[left]
    if d > _ALL_PRODUCTS:
        keep &= (left == right) | (right == d - 1)
    return left[keep], right[keep]


def _names(columns, centre, scale, left, right) -> tuple[str, ...]:
    base = list(columns or [f"column {j}" for j in range(len(centre))])
    base = [f"{b} ≠ {c:g}" if not s else b for b, c, s in zip(base, centre, scale)]
    products = [
        f"{base[i]} squared" if i == j else f"{base[i]} × {base[j]}" for i, j in zip(left, right)
    ]
    return (*base, *products)


@compiled()
def _evaluate(rows, at, out, scaling):
    """Write the features of the rows *at* these positions to *out*, shape (n_features, len(at))."""
    n, d = len(at), len(scaling.centre)
    for j in range(d):
        for i in range(n):
            value = float(rows[at[i], j])
            if scaling.constant[j]:
                out[j, i] = 1.0 if value != scaling.centre[j] else 0.0
            else:
                scaled = (value - scaling.centre[j]) * scaling.factor[j]
                out[j, i] = min(max(scaled, -scaling.limit[j]), scaling.limit[j])
    for q in range(len(scaling.left)):
        for i in range(n):
            out[d + q, i] = out[scaling.left[q], i] * out[scaling.right[q], i]


@compiled(fastmath={"reassoc", "contract"})
def _sum_features(rows, offset, window, picks, scaling):
    """Return the first four powers of all features, and sums and sizes of each window."""
    n_features = len(scaling.centre) + len(scaling.left)
    n_windows = (offset + len(rows) - 1) // window - offset // window + 1
    powers, sums = np.zeros((4, n_features)), np.zeros((n_windows, n_features))
    sizes = np.zeros(n_windows, np.int64)
    values, at = np.empty((n_features, _TILE)), np.empty(_TILE, np.int64)
    for w in range(n_windows):
        # The rows may begin and end within a window, so only some of its picks are among them.
        start = (offset // window + w) * window - offset
        low, high = np.searchsorted(picks, -start), np.searchsorted(picks, len(rows) - start)
        sizes[w] = high - low
        for first in range(low, high, _TILE):
            n = min(_TILE, high - first)
            for i in range(n):
                at[i] = picks[first + i] + start
            _evaluate(rows, at[:n], values, scaling)
            # Four sums of one feature at a time stay in registers.
            for f in range(n_features):
                one = two = three = four = 0.0
                for i in range(n):
                    value = values[f, i]
                    square = value * value
                    one += value
                    two += square
                    three += square * value
                    four += square * square
                sums[w, f] += one
                powers[0, f] += one
                powers[1, f] += two
                powers[2, f] += three
                powers[3, f] += four
    return powers, sums, sizes
