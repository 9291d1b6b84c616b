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
"""Whether groups of rows differ more than random groups would."""

from typing import NamedTuple

import numpy as np

from scipy.special import betainc

__all__ = ["ALPHA", "PILOT_ROWS", "Anova", "PowerSums", "anova", "group_squares"]

ALPHA = 3e-5
"""Probability of a false alarm that each check of a data set may spend."""

PILOT_ROWS = 4_096
"""Number of rows on which the features are scaled."""

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


class Anova(NamedTuple):
    """One-way analysis of variance of every feature, shape (n_features,) each."""

    p_value: np.ndarray
    """1 where there are too few events for a claim."""
    component: np.ndarray
    """Variance of the groups' true means."""
    within: np.ndarray
    """Mean square within groups."""


def group_squares(sums: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Return the sum over groups of (sum of units)² / size, shape (n_features,)."""
    return np.einsum("gf,gf,g->f", sums, sums, 1.0 / sizes)


def anova(squares: np.ndarray, k: int, total: PowerSums, events: np.ndarray | None = None) -> Anova:
    """Compare groups of units.

    The share of the variance that lies between random groups has a Beta distribution, exactly
    for normal units; conditioning on the total variance keeps it there for others, and makes
    drawing without replacement automatic.

    Parameters
    ----------
    squares : ndarray, shape (n_features,)
        The :func:`group_squares`.
    k : int
        Number of groups, at least 2.
    total : PowerSums
        Sums over the units of all groups.
    events : ndarray, shape (n_features,), optional
        Effective number of events behind the units.  Default: ``total.events()``.
    """
    n = total.n
    whole = n * total.variance
    between = np.clip(squares - n * total.mean**2, 0.0, whole)
    share = np.divide(between, whole, out=np.zeros_like(whole), where=whole > 0)
    p_value = betainc(max(n - k, 1) / 2, (k - 1) / 2, 1.0 - share)
    events = total.events() if events is None else events
    claim = (n > k) & (whole > 0) & (events >= max(_MIN_EVENTS, _EVENTS_PER_GROUP * k))
    within = (whole - between) / max(n - k, 1)
    component = np.maximum(between / (k - 1) - within, 0.0) * k / n
    return Anova(np.where(claim, p_value, 1.0), component, within)
