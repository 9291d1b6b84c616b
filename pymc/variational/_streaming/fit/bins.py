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
"""Means and scatter of a long series, in memory that does not grow with it."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import batched

import numpy as np

__all__ = ["Bins", "Moments", "merged", "stack", "unstack"]

_MAX_BINS = 16
"""Bins are merged in pairs when there are this many, so that 8 to 16 cover the series."""


class Moments:
    """Mean of vectors and their squared departures from it."""

    __slots__ = ("mean", "n", "squares")

    def __init__(self, size: int):
        self.n = 0
        self.mean = np.zeros(size)
        self.squares = np.zeros(size)

    def add(self, value: np.ndarray) -> None:
        self.n += 1
        departure = value - self.mean
        self.mean += departure / self.n
        self.squares += departure * (value - self.mean)

    def merge(self, other: "Moments") -> "Moments":
        """Take in what *other* has seen."""
        n = self.n + other.n
        if n:
            departure = other.mean - self.mean
            self.squares += other.squares + departure**2 * (self.n * other.n / n)
            self.mean += departure * (other.n / n)
            self.n = n
        return self


class Bins:
    """Moments of consecutive parts of a series, all of the same length but the last."""

    def __init__(self, size: int):
        self.size = size
        self._length = 1
        self._bins: list[Moments] = []

    @property
    def n(self) -> int:
        """Vectors of the whole series."""
        return sum(part.n for part in self._bins)

    def add(self, value: np.ndarray) -> None:
        if not self._bins or self._bins[-1].n == self._length:
            if len(self._bins) == _MAX_BINS:
                self._bins = [first.merge(second) for first, second in batched(self._bins, 2)]
                self._length *= 2
            self._bins.append(Moments(self.size))
        self._bins[-1].add(value)

    def state(self) -> dict[str, np.ndarray]:
        """Return all that has been seen, as arrays by name."""
        return {"length": np.array(self._length), **stack(self._bins, self.size)}

    @classmethod
    def of_state(cls, state: Mapping[str, np.ndarray]) -> "Bins":
        """Go on from what :meth:`state` gave."""
        bins = cls(state["mean"].shape[1])
        bins._length = int(state["length"])
        bins._bins = unstack(state)
        return bins

    def after(self, fraction: float, at_least: int = 1) -> list[Moments]:
        """Return the bins that begin no earlier than at *fraction*, and *at_least* the last."""
        first = int(-(-fraction * self.n // self._length))
        return self._bins[max(0, min(first, len(self._bins) - at_least)) :]


def stack(parts: Sequence[Moments], size: int) -> dict[str, np.ndarray]:
    """Return moments of vectors of this size as arrays by name, the parts along the first axis."""
    return {
        "n": np.array([part.n for part in parts], np.int64),
        "mean": np.array([part.mean for part in parts]).reshape(len(parts), size),
        "squares": np.array([part.squares for part in parts]).reshape(len(parts), size),
    }


def unstack(state: Mapping[str, np.ndarray]) -> list[Moments]:
    """Return the moments that :func:`stack` made arrays of."""
    parts = []
    for n, mean, squares in zip(state["n"], state["mean"], state["squares"]):
        part = Moments(mean.size)
        part.n, part.mean, part.squares = int(n), mean.copy(), squares.copy()
        parts.append(part)
    return parts


def merged(parts: Iterable[Moments]) -> Moments:
    """Return the moments of several parts together."""
    total: Moments | None = None
    for part in parts:
        total = total or Moments(part.mean.size)
        total.merge(part)
    assert total is not None
    return total
