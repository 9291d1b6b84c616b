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
"""What an order check found, in words and in a figure."""

import json
import os
import re

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np

from scipy import stats

from pymc.variational._streaming.order.ranks import ALPHA, compare_groups
from pymc.variational._streaming.order.statistic import Statistic
from pymc.variational._streaming.sources.base import Source

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["OrderReport", "Part", "Stream", "compare", "report_one_window"]

_MAX_DESIGN_EFFECT = 5.0
_MAX_DRIFT = 10.0
"""Posterior standard deviations; in-RAM minibatches leave a last iterate about that far off."""
_SHOWN = 3
"""Number of features in the figure."""


class Stream(NamedTuple):
    """The rows that are checked, and the windows that they are cut into."""

    source: Source
    """Source of the rows, before any buffer."""
    window: int
    """Number of rows that are shuffled together, or of a batch where nothing is shuffled."""
    n_rows: int | None
    """Number of rows in the table, or of those seen so far where it is unknown."""


class Part(NamedTuple):
    """Sums over rows of one kind, of each unit that is compared."""

    units: np.ndarray
    """shape (n_units, n_coordinates)"""
    unit_rows: float
    """Number of rows that a unit stands for."""
    names: Sequence[str]


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class OrderReport:
    """Whether the windows of a stream differ more than random ones would.

    Printing it gives the verdict; :meth:`plot` shows the features that differ most.
    """

    window: int
    """Number of rows that are shuffled together, or of a batch where nothing is shuffled."""
    n_rows: int
    """Number of rows in the table, or of those seen so far where it is unknown."""
    repair: str
    """The call that shuffles the rows for good."""
    ordered: bool = False
    """Whether the rows are in an order that windows do not mix and a posterior would notice."""
    feature: str = ""
    """Name of what differs most between windows: a parameter's gradient, a column or a product."""
    p_value: float = 1.0
    """Probability that windows of shuffled rows differ as much in this feature."""
    threshold: float = 0.0
    """The alarm needs a p-value below this, so that false alarms stay below 1 in 10,000."""
    design_effect: float = 1.0
    """Variance of a window's mean, over that of as many random rows (Kish)."""
    drift: float = 0.0
    """How far the posterior mean would follow the windows, in posterior standard deviations.

    By the Hessian of some of the rows; without a model, √(ρN) with the correlation ρ of rows in the
    same window."""
    visible: float = 0.0
    """Drift that this check would just have seen."""
    rows_read: int = 0
    """Number of rows that the comparison used."""
    _groups: str = ""
    """What was compared; empty if one window holds the whole table."""
    _middles: np.ndarray | None = None
    """Row in the middle of each group, shape (k,)."""
    _shown: Sequence[tuple[str, np.ndarray, np.ndarray]] = ()
    """Names of the features that differ most, their means in the groups, in standard deviations of a
    row, and the standard errors that random groups would have; shape (k,) each."""

    def __repr__(self) -> str:
        if not self._groups:
            return f"Nothing to compare: one window of {self.window:,} rows holds the whole table."
        return self._alarm() if self.ordered else self._all_clear()

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Plot window means of the worst features over the table, with their expected band.

        Parameters
        ----------
        ax : matplotlib Axes, optional
            Default: those of a new figure.

        Returns
        -------
        matplotlib Axes
        """
        if ax is None:
            import matplotlib.pyplot as plt

            _, ax = plt.subplots()
        for name, means, noise in self._shown:
            positions = np.minimum(cast(np.ndarray, self._middles) / self.n_rows, 1.0)
            (line,) = ax.plot(positions, means, "o-", ms=4, lw=1, label=name)
            band = 1.96 * noise
            ax.fill_between(positions, -band, band, color=line.get_color(), alpha=0.12, lw=0)
        if self._shown:
            ax.legend(frameon=False)
        ax.axhline(0, color="0.6", lw=0.8, zorder=0)
        verdict = "Ordered rows" if self.ordered else "No order found"
        ax.set(
            xlim=(0, 1),
            xlabel=f"place in the table ({self.n_rows:,} rows)",
            ylabel="mean (standard deviations)",
            title=f"{verdict} (band: 95 % of random groups)",
        )
        return ax

    def _alarm(self) -> str:
        share = 100 * min(1.0, self.window / self.n_rows)
        return (
            f"The rows are in an order that the stream does not mix: {self.feature!r} differs "
            f"between {self._groups}. Shuffle the table once: {self.repair}. "
            f"The posterior mean would follow them by about {self.drift:,.0f} posterior standard "
            f"deviations (p = {self.p_value:.1g}, alarm below {self.threshold:.1g}), the design "
            f"effect is {self.design_effect:,.0f} (means vary that many times as much as those of "
            f"random rows), and one window covers {share:.2g} % of the {self.n_rows:,} rows"
        )

    def _all_clear(self) -> str:
        if self.p_value < self.threshold:
            finding = (
                f"No order that a posterior would notice: {self.feature!r} differs between "
                f"{self._groups} (p = {self.p_value:.1g}), but with a design effect of "
                f"{self.design_effect:.2g} a fit drifts by about {self.drift:.2g} posterior "
                "standard deviations."
            )
        else:
            finding = (
                f"No order found: {self._groups} differ no more than random ones would "
                f"(least p = {self.p_value:.1g}, for {self.feature!r}; alarm below "
                f"{self.threshold:.1g})."
            )
        return (
            f"{finding} It used {self.rows_read:,} of {self.n_rows:,} rows, and would not have "
            f"seen an order worth less than {self.visible:,.0f} posterior standard deviations "
            "of drift."
        )


def compare(
    stream: Stream,
    statistic: Statistic,
    parts: Sequence[Part],
    groups: np.ndarray,
    *,
    span: int,
    rows_read: int,
    middles: np.ndarray,
    alpha: float = ALPHA,
) -> OrderReport:
    """Compare groups of units in all *parts*, and report the coordinates that differ most.

    An alarm is a difference that is significant, and large enough for a posterior to notice.  A
    group stands for *span* rows of the table, with the row *middles* in its middle.
    """
    n_rows = cast(int, stream.n_rows)
    found = [_compare_part(part, statistic, groups, span, n_rows) for part in parts]
    p_value, correlation, drift, means, noise = (np.concatenate(c, axis=-1) for c in zip(*found))
    names = [name for part in parts for name in part.names]
    threshold = alpha / (len(p_value) + len(parts))
    alarming = (p_value < threshold) & _noticed(correlation, drift, span)
    worst = np.lexsort((-drift, p_value, np.where(alarming, -drift, 1.0)))
    first = worst[0]
    kind = f"windows of {stream.window:,} rows"
    if span > stream.window:
        kind = f"groups of {span:,} adjacent rows"
    return OrderReport(
        window=stream.window,
        n_rows=n_rows,
        repair=_repair(stream.source),
        ordered=bool(alarming.any()),
        feature=names[first],
        p_value=float(p_value[first]),
        threshold=threshold,
        design_effect=float(1 + (span - 1) * correlation[first]),
        drift=float(drift[first]),
        visible=_visible_drift(threshold, len(middles), len(groups), rows_read, span, n_rows),
        rows_read=rows_read,
        _groups=f"{len(middles)} {kind}",
        _middles=middles,
        _shown=[(names[j], means[:, j], noise[:, j]) for j in worst[:_SHOWN]],
    )


def _compare_part(
    part: Part, statistic: Statistic, groups: np.ndarray, span: int, n_rows: int
) -> tuple[np.ndarray, ...]:
    """Return p-values, correlations of rows in a group, drifts, and the means and their noise.

    Without a drift that the statistic knows, it is √(ρN), with that correlation ρ: a group's mean is
    off by σ √ρ, and a posterior's is known to σ / √N.
    """
    units, unit_rows = np.nan_to_num(part.units, posinf=0.0, neginf=0.0), part.unit_rows
    found = compare_groups(units, groups)
    by_variance, by_rank = (r / (r + unit_rows) for r in (found.ratio, found.rank_ratio))
    drift = statistic.drift(units, groups, unit_rows, n_rows)
    if drift is None:
        drift = np.sqrt(n_rows * by_variance)
    # Heavy tails blur variances, but not those of ranks.
    is_clear = _noticed(by_variance, drift, span)
    correlation = np.where(is_clear, by_variance, np.maximum(by_variance, by_rank))
    drift = np.where(drift > 0, drift, np.sqrt(n_rows * correlation))
    sizes = np.bincount(groups)[:, None]
    starts = np.flatnonzero(np.diff(groups, prepend=-1))
    means = np.add.reduceat(units - units.mean(axis=0), starts) / sizes
    means /= np.sqrt(found.within * unit_rows)
    noise = np.broadcast_to(1 / np.sqrt(sizes * unit_rows), means.shape)
    return np.minimum(found.p_value, found.pooled), correlation, drift, means, noise


def _noticed(correlation: np.ndarray, drift: np.ndarray, span: int) -> np.ndarray:
    return ((span - 1.0) * correlation > _MAX_DESIGN_EFFECT - 1) | (drift > _MAX_DRIFT)


def _visible_drift(
    threshold: float, k: int, n_units: int, rows_read: int, span: int, n_rows: int
) -> float:
    """Return the drift of a feature that would just raise the alarm in *k* groups."""
    ratio = stats.f.isf(threshold, k - 1, n_units - k)
    significant = min((ratio - 1.0) * k / rows_read, 1.0)
    noticed = min(_MAX_DRIFT**2 / n_rows, (_MAX_DESIGN_EFFECT - 1.0) / max(span - 1.0, 1.0))
    return float(np.sqrt(max(significant, noticed) * n_rows))


def report_one_window(stream: Stream) -> OrderReport:
    """Report that there is nothing to compare."""
    return OrderReport(stream.window, cast(int, stream.n_rows), _repair(stream.source))


def _repair(source: Source) -> str:
    """Return the call that shuffles the rows of *source* for good."""
    if source.path is not None:
        return f"preshuffle({json.dumps(source.path, default=os.fspath)}, {_shuffled(source.path)}, seed=0)"
    rows = np.arange(3)
    starts = source.read_starts(rows)
    if starts is not None and (starts == rows).all():  # an array, which is read at any row
        return "rows[np.random.default_rng(0).permutation(len(rows))]"
    return 'write the rows to Parquet, and preshuffle("rows.parquet", "shuffled", seed=0)'


def _shuffled(path: Any) -> str:
    """Return a literal of a path beside the rows, or in the working directory if they are in many."""
    is_glob = isinstance(path, str) and re.search(r"[*?\[]", path)
    if not isinstance(path, str) or (is_glob and "://" in path):
        return '"shuffled"'
    folder = path[: is_glob.start()].rpartition("/")[0] if is_glob else path
    name = folder.rstrip("/").removesuffix(".parquet")
    return json.dumps(f"{name}-shuffled" if name.strip("./") else "../shuffled")
