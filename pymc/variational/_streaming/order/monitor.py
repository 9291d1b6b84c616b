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

import numpy as np

from pymc.variational._streaming.order.anova import (
    ALPHA,
    Anova,
    Features,
    Moments,
    anova,
    anova_of_squares,
)
from pymc.variational._streaming.order.report import OrderReport, Stream, Windows, judge

__all__ = ["Monitor"]

_SHARE = 0.25
"""Of the rows; to compare every row would cost as much as to shuffle them."""
_MIN_PICKS = 64
_MAX_PICKS = 1 << 20
_PILOT = 4_096
_PIECE_ROWS = 1 << 18
"""Compared at a time: integers are copied to floats."""
_GROUPS = 40
"""At most; as soon as there are as many, pairs of neighbours become one."""
_FIRST_LOOK = 4


class Monitor:
    """Running comparison of the windows of one epoch after another.

    Two scales are compared, windows and groups of adjacent windows: a small window hides in its
    own noise a drift that hurts just as much.

    Parameters
    ----------
    stream : Stream
    """

    def __init__(self, stream: Stream):
        self._stream = stream
        self.features: Features | None = None
        """Default: fitted on the first rows."""
        self._tally: _Tally | None = None
        self._held: list[np.ndarray] = []
        """Rows that wait for enough others to fit the features on."""
        self._n_held = self._held_stop = 0
        self._pilot = min(_PILOT, max(_MIN_PICKS, stream.window))
        self._looks = 0

    def start(self) -> None:
        """Forget the rows of the last epoch, not the looks that spent a part of alpha."""
        self._tally = None
        self._held, self._n_held = [], 0
        self._next_look = _FIRST_LOOK

    def add(self, offset: int, rows: np.ndarray) -> None:
        """Take in consecutive rows of the epoch; *offset* is the place of the first."""
        if self.features is None and self._n_held + len(rows) < self._pilot:
            # One row alone would make every column constant.
            self._held.append(rows.copy())
            self._n_held += len(rows)
            self._held_stop = offset + len(rows)
        elif self._held:
            self._add_held(offset, rows)
        else:
            self._add(offset, rows)

    def look(self, *, last: bool = False) -> OrderReport | None:
        """Report if it is time to, and if there is anything to compare."""
        if last and self._held:
            self._add_held(self._held_stop)
        tally = self._tally
        if tally is None or tally.n_windows < 2 or not (last or tally.closed >= self._next_look):
            return None
        self._next_look = max(tally.closed + 1, -(-9 * tally.closed // 8))
        self._looks += 1
        window = self._stream.window
        reports = [self._judge(tally, tally.by_window(), tally.n_windows, window)]
        n_groups = int((tally.group_rows > 0).sum())
        if tally.per_group > 1 and n_groups >= _FIRST_LOOK:
            span = window * tally.per_group
            reports.append(self._judge(tally, tally.by_group(), n_groups, span))
        return min(reports, key=lambda report: (not report.ordered, report.p_value))

    def _add_held(self, stop: int, *more: np.ndarray) -> None:
        """Take in the rows that were held back, which end at *stop*, and what follows them."""
        held = np.concatenate([*self._held, *more])
        start = stop - self._n_held
        self._held, self._n_held = [], 0
        self._add(start, held)

    def _add(self, offset: int, rows: np.ndarray) -> None:
        if self.features is None:
            step = -(-len(rows) // _PILOT)
            self.features = Features.fit(rows[::step], self._stream.source.columns)
        if self._tally is None:
            self._tally = _Tally(self.features, self._stream.window)
        for first in range(0, len(rows), _PIECE_ROWS):
            self._tally.add(offset + first, rows[first : first + _PIECE_ROWS])

    def _judge(self, tally: "_Tally", found: Anova, n_groups: int, span: int) -> OrderReport:
        n_rows = self._stream.n_rows or tally.end
        n_features = len(tally.features)
        places, means, noise = tally.means()
        windows = Windows(
            n_groups=n_groups,
            span=min(span, n_rows),
            places=np.minimum(places / n_rows, 1.0),
            means=means,
            noise=noise,
            group_rows=found.group_size,
            units=tally.total.n,
        )
        return judge(
            self._stream,
            windows,
            found,
            found.correlation(),
            tally.features.names,
            stage="stream",
            threshold=ALPHA / (2 * n_features * self._looks * (self._looks + 1)),
            n_rows=n_rows,
            rows_read=tally.total.n,
        )


class _Tally:
    """Sums over the windows of one epoch, in memory that does not grow with their number."""

    def __init__(self, features: Features, window: int):
        self.features = features
        self.end = 0
        """Rows of the epoch that went by."""
        self.total = Moments(0, np.zeros((4, len(features))))
        self.closed = 0
        """Windows that are complete."""
        self._window = window
        self._picks = _choose(window, len(features))
        self._squares = np.zeros(len(features))
        self._square_sizes = 0.0
        self._open, self._open_rows, self._open_sum = -1, 0, np.zeros(len(features))
        self.per_group = 1
        """Windows of a group."""
        self.group_rows = np.zeros(_GROUPS)
        self._groups = np.zeros((_GROUPS, len(features)))

    @property
    def n_windows(self) -> int:
        return self.closed + (self._open_rows > 0)

    def add(self, offset: int, rows: np.ndarray) -> None:
        self.end = offset + len(rows)
        found, sums, sizes = self.features.sums(rows, offset, self._window, self._picks)
        if not found.n:
            return
        self.total += found
        used = np.flatnonzero(sizes)
        self._take(used + offset // self._window, sums[used], sizes[used])

    def by_window(self) -> Anova:
        """Compare windows, the open one as far as it goes."""
        squares = self._squares + self._open_sum**2 / self._open_rows
        square_sizes = self._square_sizes + self._open_rows**2
        return anova_of_squares(squares, self.n_windows, square_sizes, self.total)

    def by_group(self) -> Anova:
        used = self.group_rows > 0
        return anova(self._groups[used], self.group_rows[used], self.total)

    def means(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return middles (rows) of the groups, and their means and noise in standard deviations."""
        used = np.flatnonzero(self.group_rows)
        sizes = self.group_rows[used, None]
        deviation = np.sqrt(np.maximum(self.total.variance, 1e-300))
        means = (self._groups[used] / sizes - self.total.mean) / deviation
        middles = (used + 0.5) * self.per_group * self._window
        return middles, means, np.broadcast_to(1 / np.sqrt(sizes), means.shape)

    def _take(self, ids: np.ndarray, sums: np.ndarray, sizes: np.ndarray) -> None:
        """Add what was summed up of adjacent windows, the last of which may go on."""
        self._add_to_groups(ids, sums, sizes)
        if ids[0] == self._open:
            sums[0] += self._open_sum
            sizes[0] += self._open_rows
        elif self._open_rows:
            self._close(self._open_sum[None], np.array([self._open_rows]))
        self._close(sums[:-1], sizes[:-1])
        self._open, self._open_sum, self._open_rows = int(ids[-1]), sums[-1], int(sizes[-1])

    def _close(self, sums: np.ndarray, sizes: np.ndarray) -> None:
        self._squares += np.einsum("wf,wf,w->f", sums, sums, 1.0 / sizes)
        self._square_sizes += float((sizes.astype(float) ** 2).sum())
        self.closed += len(sizes)

    def _add_to_groups(self, ids: np.ndarray, sums: np.ndarray, sizes: np.ndarray) -> None:
        while ids[-1] // self.per_group >= _GROUPS:
            self.per_group *= 2
            for array in (self._groups, self.group_rows):
                array[: _GROUPS // 2] = array[::2] + array[1::2]
                array[_GROUPS // 2 :] = 0.0
        np.add.at(self._groups, ids // self.per_group, sums)
        np.add.at(self.group_rows, ids // self.per_group, sizes)


def _choose(window: int, n_features: int) -> np.ndarray:
    """Choose which rows of each window are compared, at random places, the same in each."""
    share = min(_SHARE, 4.0 / n_features)
    n = min(window, max(_MIN_PICKS, int(window * share)), _MAX_PICKS)
    rng = np.random.default_rng(0)
    return np.sort(rng.choice(window, n, replace=False, shuffle=False))
