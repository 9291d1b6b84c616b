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
"""Whether groups of rows differ more than random groups of the same size would."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from scipy.special import betainc, betaincinv

__all__ = ["ALPHA", "Anova", "Features", "Moments", "anova", "drift_seen", "gate"]

ALPHA = 3e-5
"""Probability of a false alarm that each check of a data set may spend."""

MAX_DESIGN_EFFECT = 5.0
MAX_DRIFT = 10.0
"""Posterior standard deviations; in-RAM minibatches leave a last iterate about that far off."""

_CLIP = 5.0
_CLIP_RARE = 3.0
"""In typical values of a column that is mostly one value, as amounts of rare events are: enough to
see amounts drift, and so few that each of the events counts."""
_ALL_PRODUCTS = 8
"""With more columns than this, products are with the last column and of projections."""
_PROJECTIONS = 16
_EVENTS_PER_GROUP = 5.0
"""Cochran's rule for chi-square: rarer events than this have no chi-square distribution."""
_MIN_EVENTS = 20.0


@dataclass(frozen=True, slots=True)
class Features:
    """Columns, their squares and their products, standardised and clipped on a pilot sample.

    Products matter because the relation of two columns can drift while each stays put.
    """

    names: tuple[str, ...]
    arrays: tuple[np.ndarray, ...]
    """For each column its centre, one over its scale, its limit, and whether it was constant in the
    pilot sample, as a label of sorted rows is: then departures are watched.  Two-valued columns
    have no limit: that would make rare values vanish.  Then the projections, shape (n, n_columns),
    and the factors of each product."""

    @classmethod
    def fit(cls, pilot: np.ndarray, columns: Sequence[str] | None) -> "Features":
        """Choose and scale the features for rows like those of *pilot*."""
        values = np.ascontiguousarray(_flat(pilot).T, dtype="float64")
        kinds = [_standardise(column) for column in values]
        centre, scale, limit = (np.array(part) for part in list(zip(*kinds))[:3])
        plain = np.array([kind[3] for kind in kinds])
        n_random = _PROJECTIONS if len(values) > _ALL_PRODUCTS else 0
        projections = np.random.default_rng(0).normal(size=(n_random, len(values)))
        projections /= np.sqrt(len(values))
        left, right = _pairs(plain, n_random)
        factor = 1.0 / np.where(scale, scale, 1.0)
        return cls(
            _names(columns, centre, scale, n_random, left, right),
            (centre, factor, limit, scale == 0, projections, left, right),
        )

    def __len__(self) -> int:
        return len(self.names)

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        """Return the features of *rows*, shape (n_features, n_rows)."""
        from pymc.variational._streaming.order.compiled_features import evaluate_features

        found = np.empty((len(self), len(rows)))
        evaluate_features(_flat(rows), np.arange(len(rows)), found, *self.arrays)
        return found

    def sums(
        self, rows: np.ndarray, offset: int, window: int, picks: np.ndarray
    ) -> tuple["Moments", np.ndarray, np.ndarray]:
        """Sum up the *picks* of each window that *rows*, from *offset* on, are a part of.

        Returns
        -------
        total : Moments
        sums : ndarray, shape (n_windows, n_features)
        sizes : ndarray, shape (n_windows,)
        """
        from pymc.variational._streaming.order.compiled_features import sum_features

        powers, sums, sizes = sum_features(_flat(rows), offset, window, picks, self.arrays)
        return Moments(int(sizes.sum()), powers), sums, sizes


@dataclass(slots=True)
class Moments:
    """Sums of the first four powers of each feature."""

    n: int
    sums: np.ndarray
    """shape (4, n_features)"""

    @classmethod
    def of(cls, values: np.ndarray) -> "Moments":
        squares = values * values
        pairs = (values, values), (squares, values), (squares, squares)
        # Unlike a dot product, which wakes threads of the BLAS for many rows.
        powers = [np.einsum("fn,fn->f", a, b) for a, b in pairs]
        return cls(values.shape[1], np.array([values.sum(axis=1), *powers]))

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(self.n + other.n, self.sums + other.sums)

    @property
    def mean(self) -> np.ndarray:
        return self.sums[0] / self.n

    @property
    def variance(self) -> np.ndarray:
        """Exactly 0 where rounding is all that varies."""
        raw = self.sums[1] / self.n
        variance = raw - self.mean**2
        return np.where(variance > 1e-10 * raw, variance, 0.0)

    def events(self) -> np.ndarray:
        """Rows that carry the variance: n for a fair coin, n p for a rare event."""
        m1, m2, m3, m4 = self.sums / self.n
        fourth = m4 - 4 * m1 * m3 + 6 * m1**2 * m2 - 3 * m1**4
        square = self.variance**2
        return self.n * square / np.maximum(fourth, np.maximum(square, 1e-300))


@dataclass(frozen=True, slots=True)
class Anova:
    """One-way analysis of variance of every feature, shape (n_features,) each."""

    p_value: np.ndarray
    """1 where there are too few events for a claim."""
    between: np.ndarray
    """Mean square between groups."""
    within: np.ndarray
    """Mean square within groups."""
    group_size: float
    """Units of a group (for unequal groups, Kish's n0)."""

    def component(self) -> np.ndarray:
        """Variance of the groups' true means."""
        return np.maximum(self.between - self.within, 0.0) / self.group_size

    def correlation(self) -> np.ndarray:
        """Return the correlation of units in the same group."""
        variance = self.component() + self.within
        return np.divide(
            self.component(), variance, out=np.zeros_like(variance), where=variance > 0
        )


def anova(
    sums: np.ndarray, sizes: np.ndarray, total: Moments, events: np.ndarray | None = None
) -> Anova:
    """Compare groups of units.

    The share of the variance that lies between random groups has a Beta distribution, exactly
    for normal units; conditioning on the total variance keeps it there for others, and makes
    drawing without replacement automatic.

    Parameters
    ----------
    sums : ndarray, shape (n_groups, n_features)
        Sums of the units of each group.
    sizes : ndarray, shape (n_groups,)
        Units of each group, none 0.
    total : Moments
        Of the same units.
    events : ndarray, shape (n_features,), optional
        Effective events behind the units.  Default: ``total.events()``.
    """
    squares = np.einsum("gf,gf,g->f", sums, sums, 1.0 / sizes)
    square_sizes = float((sizes.astype(float) ** 2).sum())
    return anova_of_squares(squares, len(sizes), square_sizes, total, events)


def anova_of_squares(
    squares: np.ndarray,
    k: int,
    square_sizes: float,
    total: Moments,
    events: np.ndarray | None = None,
) -> Anova:
    """Compare *k* groups by the sums over them of (sum of units)² / size, and of size²."""
    n = total.n
    whole = n * total.variance
    between = np.clip(squares - n * total.mean**2, 0.0, whole)
    share = np.divide(between, whole, out=np.zeros_like(whole), where=whole > 0)
    p_value = betainc(max(n - k, 1) / 2, (k - 1) / 2, 1.0 - share)
    events = total.events() if events is None else events
    claim = (n > k) & (whole > 0) & (events >= max(_MIN_EVENTS, _EVENTS_PER_GROUP * k))
    return Anova(
        np.where(claim, p_value, 1.0),
        between / (k - 1),
        (whole - between) / max(n - k, 1),
        (n - square_sizes / n) / (k - 1),
    )


def gate(
    correlation: np.ndarray | float, span: float, n_rows: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tell which correlations within groups of *span* rows a posterior would notice.

    Returns
    -------
    design_effect : ndarray
        Kish's 1 + (span - 1) ρ.
    drift : ndarray
        About how far the last iterate drifts, in posterior standard deviations: the mean of a
        group is off by σ √ρ, and the posterior's own is known to σ / √N.
    notices : ndarray of bool
    """
    correlation = np.asarray(correlation)
    effect = 1.0 + (span - 1.0) * correlation
    drift = np.sqrt(correlation * n_rows)
    return effect, drift, (effect > MAX_DESIGN_EFFECT) | (drift > MAX_DRIFT)


def drift_seen(p_value: float, k: int, n: int, group_rows: float, span: float, n_rows: int):
    """Return the drift (posterior sd) of a feature that would just raise the alarm."""
    if n <= k:
        return np.inf
    share = 1.0 - betaincinv((n - k) / 2, (k - 1) / 2, p_value)
    ratio = (share / (k - 1)) / max((1.0 - share) / (n - k), 1e-300)
    correlation = min((ratio - 1.0) / group_rows, 1.0)
    noticed = min(MAX_DRIFT, np.sqrt((MAX_DESIGN_EFFECT - 1.0) / max(span - 1.0, 1.0) * n_rows))
    return max(float(np.sqrt(correlation * n_rows)), float(noticed))


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
    if scale:
        return centre, scale, _CLIP, True
    return centre, float(np.median(deviations[deviations > 0])), _CLIP_RARE, True


def _pairs(plain: np.ndarray, n_random: int) -> tuple[np.ndarray, np.ndarray]:
    """Choose the pairs of columns whose products are watched."""
    d = len(plain)
    if d <= _ALL_PRODUCTS:
        left, right = np.triu_indices(d)
    else:
        left = np.concatenate([np.arange(d + n_random), np.arange(d - 1)])
        right = np.concatenate([np.arange(d + n_random), np.full(d - 1, d - 1)])
    square = np.concatenate([plain, np.ones(n_random, bool)])
    keep = (left != right) | square[left]
    return left[keep], right[keep]


def _names(columns, centre, scale, n_random, left, right) -> tuple[str, ...]:
    base = list(columns or [f"column {j}" for j in range(len(centre))])
    base = [f"{b} ≠ {c:g}" if not s else b for b, c, s in zip(base, centre, scale)]
    base += [f"projection {j}" for j in range(n_random)]
    products = [
        f"{base[i]} squared" if i == j else f"{base[i]} × {base[j]}" for i, j in zip(left, right)
    ]
    return (*base, *products)
