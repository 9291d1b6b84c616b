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
    PowerSums,
    anova,
    group_squares,
)
from pymc.variational._streaming.order.report import (
    Comparison,
    OrderReport,
    Stream,
    make_report,
)

if TYPE_CHECKING:
    from pymc.variational._streaming.order.features import Features

__all__ = ["Monitor"]

_SHARE = 0.25
"""Share of the rows that is used; to use every row would cost as much as to shuffle them."""
_MIN_PICKS = 64
_MAX_PICKS = 1 << 20
_MAX_GROUPS = 40
"""As soon as there are more groups of windows, pairs of neighbours become one."""
_FIRST_COMPARISON = 4
"""Number of windows that are compared first."""


class Monitor:
    """Running comparison of the windows of one epoch, whose memory does not grow with their number.

    Two scales are compared, windows and groups of adjacent windows: a small window hides in its
    own noise a drift that hurts just as much.
    """

    def __init__(self, stream: Stream, start: int = 0):
        self.start = self.stop = start
        """Range of the rows of the epoch that were added."""
        self._stream = stream
        self._features: Features | None = None
        self._waiting: np.ndarray | None = None
        """Rows that are too few to fit the features on."""
        self._total = PowerSums(0, np.zeros((4, 0)))
        self._n_windows = 0
        self._n_comparisons = 0
        self._next_comparison = _FIRST_COMPARISON

    def add(self, offset: int, rows: np.ndarray) -> None:
        """Add consecutive rows of the epoch from *offset* on, without those added before."""
        rows = rows[max(0, self.stop - offset) :]
        if not len(rows):
            return
        self.stop = max(self.stop, offset) + len(rows)
        if self._waiting is not None:
            rows = np.concatenate([self._waiting, rows])
        if self._features is None and len(rows) < PILOT_ROWS:
            self._waiting = rows.copy()
        else:
            self._waiting = None
            self._sum_up(rows)

    def compare(self, *, last: bool = False) -> OrderReport | None:
        """Compare the windows so far, if it is time to and if there are two of them."""
        if last and self._waiting is not None:
            self._sum_up(self._waiting)
            self._waiting = None
        complete = self._n_windows - 1
        if complete < (1 if last else self._next_comparison):
            return None
        self._next_comparison = max(complete + 1, -(-9 * complete // 8))
        self._n_comparisons += 1
        window = self._stream.window
        reports = [self._report(self._squares, self._n_windows, window)]
        used = self._group_rows > 0
        n_groups = int(used.sum())
        if self._per_group > 1 and n_groups >= _FIRST_COMPARISON:
            squares = group_squares(self._groups[used], self._group_rows[used])
            reports.append(self._report(squares, n_groups, window * self._per_group))
        return min(reports, key=lambda report: (not report.ordered, report.p_value))

    def _sum_up(self, rows: np.ndarray) -> None:
        """Add *rows*, the last ones so far, to the sums over windows."""
        if self._features is None:
            self._features = self._fit_features(rows)
        offset, window = self.stop - len(rows), self._stream.window
        total, sums, sizes = self._features.sums(rows, offset, window, self._picks)
        if total.n:
            self._total = PowerSums(self._total.n + total.n, self._total.sums + total.sums)
            used = np.flatnonzero(sizes)
            windows = used + offset // window
            self._add_to_groups(windows, sums[used], sizes[used])
            self._add_to_windows(windows, sums[used], sizes[used])

    def _fit_features(self, rows: np.ndarray) -> "Features":
        from pymc.variational._streaming.order.features import Features

        features = Features.fit(rows, self._stream.source.columns)
        n = len(features.names)
        self._picks = _choose_picks(self._stream.window, n)
        self._total = PowerSums(0, np.zeros((4, n)))
        self._squares = np.zeros(n)
        self._last, self._last_sum, self._last_rows = -1, np.zeros(n), 0
        self._per_group = 1
        self._groups, self._group_rows = np.zeros((_MAX_GROUPS, n)), np.zeros(_MAX_GROUPS)
        return features

    def _add_to_windows(self, windows: np.ndarray, sums: np.ndarray, sizes: np.ndarray) -> None:
        if windows[0] == self._last:
            # More rows of a window replace its square by that of all its rows so far.
            self._squares -= self._last_sum**2 / self._last_rows
            self._n_windows -= 1
            sums[0] += self._last_sum
            sizes[0] += self._last_rows
        self._squares += group_squares(sums, sizes)
        self._n_windows += len(windows)
        self._last, self._last_sum, self._last_rows = windows[-1], sums[-1], sizes[-1]

    def _add_to_groups(self, windows: np.ndarray, sums: np.ndarray, sizes: np.ndarray) -> None:
        while windows[-1] // self._per_group >= _MAX_GROUPS:
            self._per_group *= 2
            for array in (self._groups, self._group_rows):
                array[: _MAX_GROUPS // 2] = array[::2] + array[1::2]
                array[_MAX_GROUPS // 2 :] = 0.0
        np.add.at(self._groups, windows // self._per_group, sums)
        np.add.at(self._group_rows, windows // self._per_group, sizes)

    def _report(self, squares: np.ndarray, n_groups: int, span: int) -> OrderReport:
        assert self._features is not None
        total, names = self._total, self._features.names
        n_rows = self._stream.n_rows or self.stop
        found = anova(squares, n_groups, total)
        # The shares of all comparisons sum up to ALPHA, as those of 1 / (m (m + 1)) do to 1.
        n_tests = 2 * len(names) * self._n_comparisons * (self._n_comparisons + 1)
        variance = np.maximum(total.variance, 1e-300)
        used = np.flatnonzero(self._group_rows)
        sizes = self._group_rows[used, None]
        means = (self._groups[used] / sizes - total.mean) / np.sqrt(variance)
        middles = (used + 0.5) * self._per_group * self._stream.window
        comparison = Comparison(
            names=names,
            p_value=found.p_value,
            correlation=np.minimum(found.component / variance, 1.0),
            threshold=ALPHA / n_tests,
            span=min(span, n_rows),
            n_groups=n_groups,
            n_units=total.n,
            rows_read=total.n,
            positions=np.minimum(middles / n_rows, 1.0),
            means=means,
            noise=np.broadcast_to(1 / np.sqrt(sizes), means.shape),
        )
        return make_report(self._stream._replace(n_rows=n_rows), comparison)


def _choose_picks(window: int, n_features: int) -> np.ndarray:
    """Choose which rows of each window are used, at random positions, the same in each."""
    share = min(_SHARE, 4.0 / n_features)
    n = min(window, max(_MIN_PICKS, int(window * share)), _MAX_PICKS)
    return np.sort(np.random.default_rng(0).choice(window, n, replace=False, shuffle=False))
