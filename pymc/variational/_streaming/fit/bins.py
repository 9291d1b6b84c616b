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
"""Means and variances along a long series, in memory that does not grow with it."""

import math

from collections.abc import Mapping, Sequence
from functools import reduce
from itertools import batched
from typing import NamedTuple

import numpy as np

__all__ = ["Bins", "Moments", "merge"]

_MAX_BINS = 32
"""Bins are merged in pairs when there are this many, so that 16 to 32 cover the series."""


class Moments(NamedTuple):
    """Moments of a part of a series of vectors."""

    n: int
    """Number of vectors."""
    mean: np.ndarray
    """Mean of the vectors."""
    squares: np.ndarray
    """Sum of squared departures from the mean."""


def merge(parts: Sequence[Moments]) -> Moments:
    """Return the moments of all parts together."""
    return reduce(_merge_two, parts)


class Bins:
    """Moments of consecutive parts of a series of vectors, all of one length but the last."""

    def __init__(self, parts: Sequence[Moments] = ()):
        self.parts = list(parts)

    @property
    def n(self) -> int:
        """Number of vectors of the whole series."""
        return sum(part.n for part in self.parts)

    def add(self, value: np.ndarray) -> None:
        """Add the next vector of the series."""
        new = Moments(1, value, np.zeros_like(value))
        if self.parts and self.parts[-1].n < self.parts[0].n:
            self.parts[-1] = _merge_two(self.parts[-1], new)
            return
        if len(self.parts) == _MAX_BINS:
            self.parts = [merge(pair) for pair in batched(self.parts, 2)]
        self.parts.append(new)

    def after(self, fraction: float, at_least: int = 1) -> list[Moments]:
        """Return the bins that begin no earlier than at *fraction*, and *at_least* the last."""
        first = math.ceil(fraction * self.n / self.parts[0].n)
        return self.parts[max(0, min(first, len(self.parts) - at_least)) :]

    def state_dict(self, prefix: str) -> dict[str, np.ndarray]:
        """Return all that has been seen, as arrays by name."""
        columns = zip(Moments._fields, zip(*self.parts))
        return {f"{prefix} {field}": np.array(column) for field, column in columns}

    def load_state_dict(self, state: Mapping[str, np.ndarray], prefix: str) -> None:
        """Go on from what :meth:`state_dict` gave."""
        columns = [state.get(f"{prefix} {field}", ()) for field in Moments._fields]
        self.parts = [Moments(int(n), mean, squares) for n, mean, squares in zip(*columns)]


def _merge_two(a: Moments, b: Moments) -> Moments:
    n, departure = a.n + b.n, b.mean - a.mean
    mean = a.mean + departure * (b.n / n)
    return Moments(n, mean, a.squares + b.squares + departure**2 * (a.n * b.n / n))
