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
"""Statistics of groups of rows: whether they differ more than random groups would."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from scipy.special import betainc, betaincinv

__all__ = ["ALPHA", "PILOT_ROWS", "Anova", "Comparison", "GroupSquares", "PowerSums", "anova"]

ALPHA = 3e-5
"""Probability of a false alarm that each check of a data set may spend."""

PILOT_ROWS = 4_096
"""Number of rows on which the features are scaled."""

_MAX_DESIGN_EFFECT = 5.0
_MAX_DRIFT = 10.0
"""Posterior standard deviations; in-RAM minibatches leave a last iterate about that far off."""
_EVENTS_PER_GROUP = 5.0
"""Cochran's rule for chi-square: rarer events than this have no chi-square distribution."""
_MIN_EVENTS = 20.0


class PowerSums(NamedTuple):
    """Sums of the first four powers of each feature over *n* units."""

    n: int
    sums: np.ndarray
    """shape (4, n_features)"""

    @classmethod
    def of(cls, values: np.ndarray) -> "PowerSums":
        """Sum up *values*, shape (n_units, n_features)."""
        return cls(len(values), np.array([(values**power).sum(axis=0) for power in (1, 2, 3, 4)]))

    def plus(self, other: "PowerSums") -> "PowerSums":
        return PowerSums(self.n + other.n, self.sums + other.sums)

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
        """Return how many units carry the variance: n for a fair coin, n p for rare events."""
        m1, m2, m3, m4 = self.sums / self.n
        fourth = m4 - 4 * m1 * m3 + 6 * m1**2 * m2 - 3 * m1**4
        square = self.variance**2
        return self.n * square / np.maximum(fourth, np.maximum(square, 1e-300))


class GroupSquares(NamedTuple):
    """What an analysis of variance needs to know of *n* groups."""

    n: int
    squares: np.ndarray
    """Sums over the groups of (sum of units)² / size, shape (n_features,)."""
    square_sizes: float
    """Sum over the groups of size²."""

    @classmethod
    def of(cls, sums: np.ndarray, sizes: np.ndarray) -> "GroupSquares":
        """Sum up groups with these *sums*, shape (n, n_features), of *sizes* units, none 0."""
        squares = np.einsum("gf,gf,g->f", sums, sums, 1.0 / sizes)
        return cls(len(sizes), squares, float((sizes.astype(float) ** 2).sum()))

    def plus(self, other: "GroupSquares") -> "GroupSquares":
        return GroupSquares(
            self.n + other.n, self.squares + other.squares, self.square_sizes + other.square_sizes
        )


class Anova(NamedTuple):
    """One-way analysis of variance of every feature, shape (n_features,) each."""

    p_value: np.ndarray
    """1 where there are too few events for a claim."""
    component: np.ndarray
    """Variance of the groups' true means."""
    within: np.ndarray
    """Mean square within groups."""
    group_size: float
    """Number of units in a group (for unequal groups, Kish's n0)."""

    @property
    def correlation(self) -> np.ndarray:
        """Correlation of units in the same group."""
        variance = self.component + self.within
        return np.divide(self.component, variance, out=np.zeros_like(variance), where=variance > 0)


def anova(groups: GroupSquares, total: PowerSums, events: np.ndarray | None = None) -> Anova:
    """Compare groups of units.

    The share of the variance that lies between random groups has a Beta distribution, exactly
    for normal units; conditioning on the total variance keeps it there for others, and makes
    drawing without replacement automatic.

    Parameters
    ----------
    groups : GroupSquares
    total : PowerSums
        Sums over the units of all groups.
    events : ndarray, shape (n_features,), optional
        Effective number of events behind the units.  Default: ``total.events()``.
    """
    n, k = total.n, groups.n
    whole = n * total.variance
    between = np.clip(groups.squares - n * total.mean**2, 0.0, whole)
    share = np.divide(between, whole, out=np.zeros_like(whole), where=whole > 0)
    p_value = betainc(max(n - k, 1) / 2, (k - 1) / 2, 1.0 - share)
    events = total.events() if events is None else events
    claim = (n > k) & (whole > 0) & (events >= max(_MIN_EVENTS, _EVENTS_PER_GROUP * k))
    within = (whole - between) / max(n - k, 1)
    group_size = (n - groups.square_sizes / n) / (k - 1)
    component = np.maximum(between / (k - 1) - within, 0.0) / group_size
    return Anova(np.where(claim, p_value, 1.0), component, within, group_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Groups of rows that were compared feature by feature."""

    names: Sequence[str]
    """Names of the features."""
    p_value: np.ndarray
    """shape (n_features,)"""
    correlation: np.ndarray
    """Correlation ρ of rows in the same group, shape (n_features,)."""
    threshold: float
    """P-value below which a feature may raise the alarm."""
    span: int
    """Number of rows of the table that a group stands for."""
    n_groups: int
    n_units: int
    """Number of units (rows, or blocks of rows) in all groups."""
    group_rows: float
    """Number of independent rows that a group contributed."""
    n_rows: int
    """Number of rows in the table, or of those seen so far where it is unknown."""
    rows_read: int
    """Number of rows that the comparison used."""
    positions: np.ndarray
    """Middle of each group of the figure, as a share of the table; shape (k,)."""
    means: np.ndarray
    """Mean of each feature there, in its standard deviations; shape (k, n_features)."""
    noise: np.ndarray
    """Standard error that random groups would have; shape (k, n_features)."""
    note: str = ""
    """What limits the comparison, or what else it found."""

    @property
    def design_effect(self) -> np.ndarray:
        """Kish's 1 + (span - 1) ρ."""
        return 1.0 + (self.span - 1.0) * self.correlation

    @property
    def drift(self) -> np.ndarray:
        """How far the last iterate drifts, about, in posterior standard deviations.

        The mean of a group is off by σ √ρ, and the posterior's own is known to σ / √N.
        """
        return np.sqrt(self.correlation * self.n_rows)

    @property
    def alarming(self) -> np.ndarray:
        """Whether groups differ, significantly and by enough for a posterior to notice."""
        noticed = (self.design_effect > _MAX_DESIGN_EFFECT) | (self.drift > _MAX_DRIFT)
        return (self.p_value < self.threshold) & noticed

    def visible_drift(self) -> float:
        """Return the drift of a feature that would just raise the alarm."""
        n, k = self.n_units, self.n_groups
        if n <= k:
            return np.inf
        share = 1.0 - betaincinv((n - k) / 2, (k - 1) / 2, self.threshold)
        ratio = (share / (k - 1)) / max((1.0 - share) / (n - k), 1e-300)
        significant = min((ratio - 1.0) / self.group_rows, 1.0)
        noticed = (_MAX_DESIGN_EFFECT - 1.0) / max(self.span - 1.0, 1.0)
        least = min(_MAX_DRIFT, float(np.sqrt(noticed * self.n_rows)))
        return max(float(np.sqrt(significant * self.n_rows)), least)
