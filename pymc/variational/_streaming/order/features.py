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
"""What is compared between windows: sums over rows of the model's score, or of their columns."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np

from pymc.variational._streaming.order.ranks import Differences

__all__ = ["PILOT_ROWS", "Features", "Statistic", "correlation", "rare_rows"]

PILOT_ROWS = 4_096
"""Number of rows from which a statistic is made."""

_LIMIT = 5.0
"""What scaled values approach, so that heavy tails do not hide a drift."""
_ALL_PRODUCTS = 8
"""With more columns than this, products are squares and those with the last column."""
_RARE = 0.1
"""Columns that depart from their most frequent value in fewer rows than this have rare values."""


class Statistic(ABC):
    """Sums over rows whose distribution is the same in all windows of shuffled rows."""

    names: list[str]
    """What each coordinate is about."""
    columns: np.ndarray
    """Whether a column takes part, shape (n_columns,)."""
    share: float
    """Share of the rows that is used while they stream."""
    rare_share: float
    """Share of the rows, those with rare values, that is used besides, at most by a half more."""

    @abstractmethod
    def sums(self, rows: np.ndarray) -> np.ndarray:
        """Return the coordinates of *rows*, shape (n_coordinates,)."""

    def drift(
        self,
        units: np.ndarray,
        groups: np.ndarray,
        found: Differences,
        unit_rows: float,
        n_rows: int,
    ) -> np.ndarray:
        """Return how far the mean follows the groups, in posterior sd, shape (n_coordinates,).

        That is √(ρN), with the correlation ρ of rows in the same group: a group's mean is off by
        σ √ρ, and a posterior's is known to σ / √N.
        """
        return np.sqrt(n_rows * correlation(found, unit_rows))


class Features(Statistic):
    """Sums of columns, their squares and their products, scaled on a pilot sample.

    Products matter because the relation of two columns can drift while each stays put.
    """

    share, rare_share = 0.25, 0.125

    def __init__(self, pilot: np.ndarray, columns: Sequence[str] | None):
        pilot = _flat(pilot)
        self._centre = np.median(pilot, axis=0)
        spread = 1.4826 * np.median(np.abs(pilot - self._centre), axis=0)
        # Columns of two values, or mostly of one, are left as they are.
        self._limit = np.where(spread > 0, _LIMIT, np.inf)
        self._scale = np.where(spread > 0, spread, 1.0)
        d = pilot.shape[1]
        left, right = np.triu_indices(d)
        keep = (left == right) | (right == d - 1) | (d <= _ALL_PRODUCTS)
        self._pairs = left[keep], right[keep]
        names = list(columns or [f"column {j}" for j in range(d)])
        self.names = names + [
            f"{names[i]} squared" if i == j else f"{names[i]} × {names[j]}"
            for i, j in zip(*self._pairs)
        ]
        self.columns = np.ones(d, bool)

    def sums(self, rows: np.ndarray) -> np.ndarray:
        with np.errstate(all="ignore"):  # of values that are too large to be scaled or squared
            x = (_flat(rows) - self._centre) / self._scale
            x /= 1 + np.abs(x) / self._limit
            return np.append(x.sum(axis=0), (x.T @ x)[self._pairs])


def correlation(found: Differences, unit_rows: float) -> np.ndarray:
    """Return the correlation ρ of rows in the same group, shape (n_coordinates,)."""
    return found.component / (found.component + unit_rows * found.within)


def rare_rows(pilot: np.ndarray, read: np.ndarray) -> list[tuple[int, float]]:
    """Return columns that are mostly one value, and that value."""
    found = []
    for j in np.flatnonzero(read):
        values, counts = np.unique(_flat(pilot)[:, j], return_counts=True)
        if counts.max() > (1 - _RARE) * len(pilot):
            found.append((int(j), float(values[counts.argmax()])))
    return found


def _flat(rows: np.ndarray) -> np.ndarray:
    return rows.reshape(len(rows), -1).astype("float64")
