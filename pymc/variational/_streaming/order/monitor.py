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

from typing import TYPE_CHECKING

import numpy as np

from pymc.variational._streaming.order.anova import (
    ALPHA,
    PILOT_ROWS,
    Anova,
    Comparison,
    GroupSquares,
    PowerSums,
    anova,
)
from pymc.variational._streaming.order.report import OrderReport, Stream, make_report

if TYPE_CHECKING:
    from pymc.variational._streaming.order.features import Features

__all__ = ["Monitor"]

_SHARE = 0.25
"""Share of the rows that is used; to use every row would cost as much as to shuffle them."""
_MIN_PICKS = 64
_MAX_PICKS = 1 << 20
_PIECE_ROWS = 1 << 18
"""Number of rows that are summed up at a time: integers are copied to floats."""
_MAX_GROUPS = 40
"""As soon as there are more groups of windows, pairs of neighbours become one."""
_FIRST_COMPARISON = 4
"""Number of windows that are compared first."""


class Monitor:
    """Running comparison of the windows of one epoch after another.

    Two scales are compared, windows and groups of adjacent windows: a small window hides in its
    own noise a drift that hurts just as much.
    """

    def __init__(self, stream: Stream):
        self._stream = stream
        self.features: Features | None = None
        """Default: fitted on the first rows."""
        self._pilot_rows = min(PILOT_ROWS, max(_MIN_PICKS, stream.window))
        self._n_comparisons = 0
        self.start_epoch()

    def start_epoch(self) -> None:
        """Forget the rows of the last epoch, but not the comparisons that spent a part of alpha."""
        self._sums: _EpochSums | None = None
        self._waiting: tuple[int, np.ndarray] | None = None
        """Position and values of rows that are too few to fit the features on."""
        self._next_comparison = _FIRST_COMPARISON

    def add(self, offset: int, rows: np.ndarray) -> None:
        """Add consecutive rows of the epoch; *offset* is the position of the first."""
        if self._waiting is not None:
            offset, rows = self._waiting[0], np.concatenate([self._waiting[1], rows])
        if self.features is None and len(rows) < self._pilot_rows:
            self._waiting = offset, rows.copy()
        else:
            self._waiting = None
            self._sum_up(offset, rows)

    def compare(self, *, last: bool = False) -> OrderReport | None:
        """Compare the windows so far, if it is time to and if there are two of them."""
        if last and self._waiting is not None:
            self._sum_up(*self._waiting)
            self._waiting = None
        sums = self._sums
        if sums is None or sums.n_windows < 2:
            return None
        if not last and sums.complete.n < self._next_comparison:
            return None
        self._next_comparison = max(sums.complete.n + 1, -(-9 * sums.complete.n // 8))
        self._n_comparisons += 1
        window = self._stream.window
        reports = [self._report(sums, sums.by_window(), sums.n_windows, window)]
        n_groups = int((sums.group_rows > 0).sum())
        if sums.per_group > 1 and n_groups >= _FIRST_COMPARISON:
            span = window * sums.per_group
            reports.append(self._report(sums, sums.by_group(), n_groups, span))
        return min(reports, key=lambda report: (not report.ordered, report.p_value))

    def _sum_up(self, offset: int, rows: np.ndarray) -> None:
        if self.features is None:
            from pymc.variational._streaming.order.features import Features

            step = -(-len(rows) // PILOT_ROWS)
            self.features = Features.fit(rows[::step], self._stream.source.columns)
        if self._sums is None:
            self._sums = _EpochSums(self.features, self._stream.window)
        for first in range(0, len(rows), _PIECE_ROWS):
            self._sums.add(offset + first, rows[first : first + _PIECE_ROWS])

    def _report(self, sums: "_EpochSums", found: Anova, n_groups: int, span: int) -> OrderReport:
        n_rows = self._stream.n_rows or sums.n_rows
        n_tests = 2 * len(sums.features) * self._n_comparisons * (self._n_comparisons + 1)
        positions, means, noise = sums.means()
        comparison = Comparison(
            names=sums.features.names,
            p_value=found.p_value,
            correlation=found.correlation,
            threshold=ALPHA / n_tests,
            span=min(span, n_rows),
            n_groups=n_groups,
            n_units=sums.total.n,
            group_rows=found.group_size,
            n_rows=n_rows,
            rows_read=sums.total.n,
            positions=np.minimum(positions / n_rows, 1.0),
            means=means,
            noise=noise,
        )
        return make_report(self._stream, comparison)


class _EpochSums:
    """Sums over the windows of one epoch, in memory that does not grow with their number.

    The rows of a window can come in several parts, so the last window is kept apart from the
    complete ones until another begins.
    """

    def __init__(self, features: "Features", window: int):
        self.features = features
        self.n_rows = 0
        """Number of rows of the epoch that went by."""
        self.total = PowerSums(0, np.zeros((4, len(features))))
        self._window = window
        self._picks = _choose_picks(window, len(features))
        self.complete = GroupSquares(0, np.zeros(len(features)), 0.0)
        self._last, self._last_rows, self._last_sum = -1, 0, np.zeros(len(features))
        self.per_group = 1
        """Number of windows in a group."""
        self.group_rows = np.zeros(_MAX_GROUPS)
        self._groups = np.zeros((_MAX_GROUPS, len(features)))

    @property
    def n_windows(self) -> int:
        return self.complete.n + (self._last_rows > 0)

    def add(self, offset: int, rows: np.ndarray) -> None:
        self.n_rows = offset + len(rows)
        total, sums, sizes = self.features.sums(rows, offset, self._window, self._picks)
        if total.n:
            self.total = self.total.plus(total)
            used = np.flatnonzero(sizes)
            windows = used + offset // self._window
            self._add_to_groups(windows, sums[used], sizes[used])
            self._add_to_windows(windows, sums[used], sizes[used])

    def by_window(self) -> Anova:
        """Compare windows, the last one as far as it goes."""
        return anova(self.complete.plus(self._last_squares()), self.total)

    def by_group(self) -> Anova:
        """Compare groups of adjacent windows."""
        used = self.group_rows > 0
        return anova(GroupSquares.of(self._groups[used], self.group_rows[used]), self.total)

    def means(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return middles (rows) of the groups, and their means and noise in standard deviations."""
        used = np.flatnonzero(self.group_rows)
        sizes = self.group_rows[used, None]
        deviation = np.sqrt(np.maximum(self.total.variance, 1e-300))
        means = (self._groups[used] / sizes - self.total.mean) / deviation
        middles = (used + 0.5) * self.per_group * self._window
        return middles, means, np.broadcast_to(1 / np.sqrt(sizes), means.shape)

    def _last_squares(self) -> GroupSquares:
        return GroupSquares.of(self._last_sum[None], np.array([self._last_rows]))

    def _add_to_windows(self, windows: np.ndarray, sums: np.ndarray, sizes: np.ndarray) -> None:
        if windows[0] == self._last:
            sums[0] += self._last_sum
            sizes[0] += self._last_rows
        elif self._last_rows:
            self.complete = self.complete.plus(self._last_squares())
        self.complete = self.complete.plus(GroupSquares.of(sums[:-1], sizes[:-1]))
        self._last, self._last_sum, self._last_rows = int(windows[-1]), sums[-1], int(sizes[-1])

    def _add_to_groups(self, windows: np.ndarray, sums: np.ndarray, sizes: np.ndarray) -> None:
        while windows[-1] // self.per_group >= _MAX_GROUPS:
            self.per_group *= 2
            for array in (self._groups, self.group_rows):
                array[: _MAX_GROUPS // 2] = array[::2] + array[1::2]
                array[_MAX_GROUPS // 2 :] = 0.0
        np.add.at(self._groups, windows // self.per_group, sums)
        np.add.at(self.group_rows, windows // self.per_group, sizes)


def _choose_picks(window: int, n_features: int) -> np.ndarray:
    """Choose which rows of each window are used, at random positions, the same in each."""
    share = min(_SHARE, 4.0 / n_features)
    n = min(window, max(_MIN_PICKS, int(window * share)), _MAX_PICKS)
    rng = np.random.default_rng(0)
    return np.sort(rng.choice(window, n, replace=False, shuffle=False))
