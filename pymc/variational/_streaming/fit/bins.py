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

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

__all__ = ["Bins", "Moments"]

_MAX_BINS = 16
"""Bins are merged in pairs when there are this many, so that 8 to 16 cover the series."""


class Moments(NamedTuple):
    """Moments of the parts of a series of vectors, one part in each row."""

    n: np.ndarray
    """Number of vectors, shape (parts,)."""
    mean: np.ndarray
    """Mean of the vectors, shape (parts, size)."""
    squares: np.ndarray
    """Sum of squared departures from the mean, shape (parts, size)."""

    def part(self, start: int, stop: int | None) -> "Moments":
        """Return the moments of some of the parts."""
        return Moments(*(array[start:stop] for array in self))

    def merged(self) -> "Moments":
        """Return the moments of all parts together, as one part."""
        n = self.n.sum(keepdims=True)
        weights = (self.n / n)[:, None]
        mean = (weights * self.mean).sum(0, keepdims=True)
        between = self.n[:, None] * (self.mean - mean) ** 2
        return Moments(n, mean, (self.squares + between).sum(0, keepdims=True))


class Bins:
    """Moments of consecutive parts of a series of vectors, all of one length but the last."""

    def __init__(self, size: int):
        self.size = size
        self._length = 1
        self._used = 0
        self._parts = Moments(
            np.zeros(_MAX_BINS, np.int64), np.zeros((_MAX_BINS, size)), np.zeros((_MAX_BINS, size))
        )

    @property
    def n(self) -> int:
        """Number of vectors of the whole series."""
        return int(self._parts.n.sum())

    @property
    def moments(self) -> Moments:
        """Moments of all bins."""
        return self.after(0)

    def add(self, value: np.ndarray) -> None:
        """Add the next vector of the series."""
        n, mean, squares = self._parts
        if not self._used or n[self._used - 1] == self._length:
            if self._used == _MAX_BINS:
                self._merge_pairs()
            self._used += 1
        last = self._used - 1
        n[last] += 1
        departure = value - mean[last]
        mean[last] += departure / n[last]
        squares[last] += departure * (value - mean[last])

    def after(self, fraction: float, at_least: int = 1) -> Moments:
        """Return the bins that begin no earlier than at *fraction*, and *at_least* the last."""
        first = int(-(-fraction * self.n // self._length))
        first = max(0, min(first, self._used - at_least))
        return self._parts.part(first, self._used)

    def state_dict(self, prefix: str) -> dict[str, np.ndarray]:
        """Return all that has been seen, as arrays by name."""
        arrays = {"length": np.array(self._length), **self.moments._asdict()}
        return {f"{prefix} {name}": array.copy() for name, array in arrays.items()}

    def load_state_dict(self, state: Mapping[str, np.ndarray], prefix: str) -> None:
        """Go on from what :meth:`state_dict` gave."""
        self._length = int(state[f"{prefix} length"])
        self._used = len(state[f"{prefix} n"])
        for array, name in zip(self._parts, Moments._fields):
            array[: self._used] = state[f"{prefix} {name}"]

    def _merge_pairs(self) -> None:
        """Merge full bins, two at a time, into the first half of the arrays."""
        half = self._used // 2
        n, mean, squares = self._parts
        departure = mean[1::2] - mean[::2]
        merged = (
            2 * n[::2],
            (mean[::2] + mean[1::2]) / 2,
            squares[::2] + squares[1::2] + departure**2 * self._length / 2,
        )
        for array, values in zip(self._parts, merged):
            array[:half], array[half:] = values, 0
        self._used = half
        self._length *= 2
