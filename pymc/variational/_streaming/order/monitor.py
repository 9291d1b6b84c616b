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
"""Compare the windows of a stream while they are emitted."""

from collections.abc import Callable
from typing import Any

import numpy as np

from pymc.variational._streaming.order.ranks import ALPHA
from pymc.variational._streaming.order.report import OrderReport, Part, Stream, compare
from pymc.variational._streaming.order.statistic import PILOT_ROWS, Statistic

__all__ = ["Monitor"]

_MAX_UNITS = 1_280
"""As soon as there are more units, pairs of neighbours become one."""
_PER_WINDOW = 64
"""Number of units of a window, unless there are too many in all."""
_MAX_GROUPS = 40
_MIN_ROWS = 128
"""Number of rows of a unit that are used, if it has as many; those of small models take no longer
than one."""
_MAX_ROWS = 1 << 12
"""Number of rows of a unit that are used at most, if all rows are compared."""
_FIRST_COMPARISON = 4
"""Number of windows that are compared first."""
_GROWTH = 1.5
"""Factor by which the rows grow from one comparison to the next."""
_RARE = 0.1
"""Columns that depart from their most frequent value in fewer rows than this have rare values."""
_FREQUENT = 4
"""Values that come so many times as often as in the pilot sample are not rare."""


class Monitor:
    """Running comparison of the windows of one epoch, whose memory does not grow with their number.

    The rows from *start* on are cut into units of equal length.  From each, the first rows are
    summed up, and all that have a rare value in a column that takes part, in sums of their own.
    With *whole*, up to 4,096 rows of each unit are used, not only the share that a fit waits for.
    """

    def __init__(
        self,
        stream: Stream,
        make_statistic: Callable[[np.ndarray], Statistic],
        start: int = 0,
        *,
        epoch: int = 0,
        whole: bool = False,
    ):
        self.start = self.stop = start
        """Range of the rows of the epoch that were added."""
        self.epoch = epoch
        self._stream = stream
        self._make_statistic = make_statistic
        self._whole = whole
        self._statistic: Any = None
        """What is compared, once there is a pilot sample."""
        self._waiting: list[np.ndarray] = []
        """Rows that are too few for a pilot sample."""
        self._span = max(1, stream.window // _PER_WINDOW)
        """Number of rows of the table in a unit."""
        self._units: list[np.ndarray] = []
        """Sums over each unit, first of any rows and then of those with rare values."""
        self._parts: tuple[list[np.ndarray], list[np.ndarray]] = [], []
        """Rows of the unit that is not complete."""
        self._used = 0
        """Number of rows at the start of a unit that are used."""
        self._rare: list[tuple[int, Any]] = []
        """Columns that are mostly one value, and that value."""
        self._every, self._n_rare = 1, 0
        """One in how many of the rows with rare values is used, and how many have come."""
        self._rows_read = self._n_comparisons = 0
        self._next_comparison = start + _FIRST_COMPARISON * stream.window

    def add(self, offset: int, rows: np.ndarray) -> None:
        """Add consecutive rows of the epoch from *offset* on, without those added before."""
        rows = rows[max(0, self.stop - offset) :]
        if not len(rows):
            return
        self.stop = max(self.stop, offset) + len(rows)
        if self._statistic is None and sum(map(len, self._waiting)) + len(rows) < PILOT_ROWS:
            self._waiting.append(rows.copy())
        else:
            self._sum_up(rows)

    def compare(self, *, last: bool = False) -> OrderReport | None:
        """Compare the windows so far, if it is time to and if there are two of them."""
        if last and self._waiting:
            self._sum_up(self._waiting.pop())
        if not last and self.stop < self._next_comparison:
            return None
        self._next_comparison = int(_GROWTH * self.stop)
        first = -(-self.start // self._span)
        places = np.arange(first, len(self._units)) * self._span
        windows = (places + self._used // 2) // self._stream.window
        sizes = [size for size in _group_sizes(windows) if _can_compare(windows // size)]
        if not sizes:
            return None
        self._n_comparisons += 1
        n_rows = self._stream.n_rows or self.stop
        parts = self._parts_of(np.array(self._units[first:]))
        for size in sizes:
            groups = np.unique(windows // size, return_inverse=True)[1]
            report = compare(
                self._stream._replace(n_rows=n_rows),
                self._statistic,
                parts,
                groups,
                span=min(self._stream.window * size, n_rows),
                rows_read=self._rows_read,
                middles=np.bincount(groups, places + self._span / 2) / np.bincount(groups),
                # The shares of all comparisons sum up to ALPHA, as those of 1 / (m (m + 1)) do to 1.
                alpha=ALPHA / (self._n_comparisons * (self._n_comparisons + 1) * len(sizes)),
            )
            if report.ordered:
                break
        return report

    def _parts_of(self, units: np.ndarray) -> list[Part]:
        names = self._statistic.names
        parts = [Part(units[:, 0], self._used, names)]
        if self._rare:
            rare = [f"{name} of rows with rare values" for name in names]
            parts.append(Part(units[:, 1], self._span / self._every, rare))
        return parts

    def _sum_up(self, rows: np.ndarray) -> None:
        """Add *rows*, the last ones so far, to the sums over units."""
        rows = np.concatenate([*self._waiting, rows]) if self._waiting else rows
        self._waiting = []
        origin = first = self.stop - len(rows)
        if self._statistic is None:
            self._statistic = self._make_statistic(rows[:: -(-len(rows) // PILOT_ROWS)])
            self._used = min(self._span, max(_MIN_ROWS, self._enough_rows()))
            self._find_rare(rows[:PILOT_ROWS])
            self._units = [self._no_sums()] * (first // self._span)
        rare = self._rare_among(rows)
        while first < self.stop:
            if len(self._units) == _MAX_UNITS:
                self._join_units()
            start = len(self._units) * self._span
            end = min(start + self._span, self.stop)
            used = min(end, start + self._used)
            low, high = np.searchsorted(rare, [first - origin, end - origin])
            chosen = rows[first - origin : max(first, used) - origin], rows[rare[low:high]]
            for part, some in zip(self._parts, chosen):
                self._rows_read += len(some)
                part.extend([some.copy()] if len(some) else [])
            if end == start + self._span:
                self._units.append(self._sums())
                self._parts = [], []
            first = end

    def _sums(self) -> np.ndarray:
        sums = self._no_sums()
        for i, some in enumerate(self._parts):
            if some:
                sums[i] = self._statistic.sums(np.concatenate(some))
        return sums

    def _no_sums(self) -> np.ndarray:
        return np.zeros((2, len(self._statistic.names)))

    def _enough_rows(self) -> int:
        """Return how many rows of a unit are worth their time, and their memory."""
        if self._whole:
            return min(self._span, _MAX_ROWS)
        return int(self._span * self._statistic.share)

    def _join_units(self) -> None:
        units = np.array(self._units).reshape(-1, 2, *self._units[0].shape)
        joined = units.sum(axis=1)
        self._span *= 2
        if self._used < _MIN_ROWS or 2 * self._used <= self._enough_rows():
            self._used *= 2
        else:  # the least number of rows is still more than the share
            joined[:, 0] = units[:, 0, 0]
        self._units = list(joined)

    def _find_rare(self, pilot: np.ndarray) -> None:
        """Find the columns with rare values, and how many of these rows can be used."""
        flat = pilot.reshape(len(pilot), -1)
        for j in self._statistic.columns:
            values, counts = np.unique(flat[:, j], return_counts=True)
            if counts.max() > (1 - _RARE) * len(pilot):
                self._rare.append((j, values[counts.argmax()]))
        share = self._have_rare_values(pilot).mean()
        self._every = max(1, round(share / self._statistic.rare_share))

    def _rare_among(self, rows: np.ndarray) -> np.ndarray:
        """Return the places of the rows with rare values that are used."""
        found = np.flatnonzero(self._have_rare_values(rows))
        chosen = found[-self._n_rare % self._every :: self._every]
        self._n_rare += len(found)
        expected = self._every * self._statistic.rare_share * (self.stop - self.start)
        if self._n_rare > _FREQUENT * expected:
            self._rare = []  # as where a column is constant only in the pilot sample
        return chosen

    def _have_rare_values(self, rows: np.ndarray) -> np.ndarray:
        flat = rows.reshape(len(rows), -1)
        return np.any([flat[:, j] != value for j, value in self._rare], axis=0)


def _group_sizes(windows: np.ndarray) -> list[int]:
    """Return how many adjacent windows to compare as one: one, and as many as leave few groups.

    A slow drift shows in large groups, in which changes from window to window cancel out.
    """
    size = 1
    while len(windows) and windows[-1] // size - windows[0] // size >= _MAX_GROUPS:
        size *= 2
    return sorted({1, size})


def _can_compare(groups: np.ndarray) -> bool:
    """Whether there are several groups, and twice as many units."""
    return 2 <= len(np.unique(groups)) <= len(groups) / 2
