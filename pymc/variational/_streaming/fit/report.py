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
"""What a check of a fit has found, and what to do about it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np

from pymc.variational._streaming.errors import StreamError
from pymc.variational._streaming.fit.gaussian import (
    gaussian_group,
    mean_variable,
    names,
    set_values,
)
from pymc.variational._streaming.fit.newton import Optimum
from pymc.variational.opvi import Approximation

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["FitReport", "StreamRows", "Verdict"]

Verdict = Literal[
    "fine",
    "scales off",
    "last-iterate noise",
    "not converged",
    "ordered rows",
    "one batch",
    "wrong size",
]

_FINE_Z = 0.5
_FINE_S = 0.4
"""A scale within about 20 %; a likelihood that counts twice has s = 0.5 or -1."""

_YOUNG_S = -10.0
"""Scales more than three times too wide are still on their way from where they start."""

_CLEAR = 3.0
"""Times the noise of a batch that leave no doubt which way the means should go."""

_EXPLANATIONS = {
    "fine": "The means are at most {z:.2g} posterior sd off, the scales {percent:.2g} %.",
    "scales off": (
        "The means are where they should be, the scales off by up to a factor of {factor:.2g}.\n"
        "Run longer, or use report.apply(approx)."
    ),
    "last-iterate noise": (
        "{off}, which is within the noise of single batches.\n"
        "Average over whole epochs with EpochAverage, run longer, or lower the learning rate."
    ),
    "not converged": "{off}, {why}.\nRun more steps, or raise the learning rate.",
    "ordered rows": (
        "{off}, and the gradient varies {disorder:.3g} times as much along the stream as it\n"
        "would in random order: the fit follows the order of the rows.\n"
        "Shuffle the whole table once with preshuffle."
    ),
    "one batch": (
        "{off}, and this dataset has never gone beyond its first batch.\n"
        "Fit with callbacks=[ds.fit_callback()]. If the fit was made with another dataset, as\n"
        "before a restart, use ds.load_state_dict with its position, and check again."
    ),
}

_MAX_DOUBT = 0.5
"""Posterior standard deviations that a Newton step may miss by."""

_MAX_LINES = 12
"""Parameters in the printed table."""

_MAX_NAMES = 60
"""Parameters whose names fit beside the figure."""


@dataclass(frozen=True, slots=True)
class StreamRows:
    """The rows of a stream, as counted and as declared."""

    name: str
    rows: int
    """Rows of one pass."""
    total_size: int | None
    """Rows that the model scales the likelihood to; None if it does not scale it."""


@dataclass(frozen=True, slots=True)
class FitReport:
    """How far a fit is from where all rows say that it should be.

    It prints as a verdict.
    """

    names: tuple[str, ...]
    """The unconstrained parameters."""
    z: np.ndarray
    """Posterior standard deviations by which each mean is too high."""
    s: np.ndarray
    """1 - (scale / right scale)²: 0 is right, -3 twice too wide, 0.75 twice too narrow."""
    elbo: float
    """Evidence lower bound on all rows."""
    elbo_error: float
    """Its Monte Carlo error."""
    streams: tuple[StreamRows, ...]
    clarity: float
    """Gradient of all rows over the noise in that of one batch, at the worst parameter."""
    disorder: float | None
    """Times that the gradient varies more along the stream than it would in random order;
    None if it does not vary more."""
    moved: bool
    """Whether the dataset that was passed has gone beyond its first batch."""
    whole_hessian: bool
    """Whether `z` takes correlations into account."""
    optimum: Optimum = field(repr=False)
    """Where one Newton step leads."""

    @property
    def rows(self) -> int:
        """Rows that were counted."""
        return sum(stream.rows for stream in self.streams)

    @property
    def verdict(self) -> Verdict:
        """The main cause of what is wrong, or "fine"."""
        means_off = np.abs(self.z).max() > _FINE_Z or np.isinf(self.optimum.doubt)
        if any(stream.rows != stream.total_size for stream in self.streams):
            return "wrong size"
        if means_off and not self.moved:
            return "one batch"
        if means_off and self.disorder is not None:
            return "ordered rows"
        if self.s.min() < _YOUNG_S or (means_off and self.clarity > _CLEAR):
            return "not converged"
        if means_off:
            return "last-iterate noise"
        return "scales off" if np.abs(self.optimum.widths).max() > _FINE_S else "fine"

    def apply(self, approx: Approximation) -> None:
        """Move *approx* to where a Newton step leads, means and scales.

        Parameters
        ----------
        approx : MeanField or FullRank
            The fit that was checked.

        Raises
        ------
        StreamError
            If the fit is too far from its optimum for one step, if the Hessian is not known,
            or if *approx* is not the fit that was checked, or has changed since.
        """
        group = gaussian_group(approx)
        if names(group) != self.names:
            raise StreamError(
                "approx has other parameters than the report; apply it to the approximation that "
                "was checked"
            )
        if not np.array_equal(mean_variable(group).get_value(), self.optimum.start):
            raise StreamError(
                "approx is another fit, or has changed since it was checked; check it again"
            )
        if not self.whole_hessian:
            raise StreamError(
                f"{len(self.z)} parameters are too many for the Hessian that a Newton step needs; "
                "average the fit with EpochAverage, or run it longer"
            )
        if self.optimum.scale is None or self.optimum.doubt > _MAX_DOUBT:
            raise StreamError(
                "the fit is too far from its optimum for a Newton step, which may miss it by "
                f"{self.optimum.doubt:.2g} posterior sd; average the fit with EpochAverage, or "
                "run it longer, and check again"
            )
        set_values(group, self.optimum.mean, self.optimum.scale)

    def plot(self) -> "Sequence[Axes]":
        """Plot z and s of each parameter, with the band that counts as fine.

        Returns
        -------
        sequence of two matplotlib Axes
        """
        import matplotlib.pyplot as plt

        row = np.arange(len(self.z))
        height = min(20, 1.6 + 0.25 * len(row))
        figure, axes = plt.subplots(1, 2, sharey=True, figsize=(8, height), layout="constrained")
        for ax, values, fine in zip(axes, (self.z, self.s), (_FINE_Z, _FINE_S), strict=True):
            ax.axvspan(-fine, fine, color="C2", alpha=0.2, lw=0)
            ax.hlines(row, 0, values, color="0.7", lw=1)
            ax.scatter(values, row, s=16, c=np.where(np.abs(values) > fine, "C3", "C0"), zorder=2)
            limit = 1.5 * max(1, np.abs(values).max())
            ax.set_xscale("symlog", linthresh=1)
            ax.set_xlim(-limit, limit)
            ax.xaxis.set_major_formatter("{x:g}")
        axes[0].set_xlabel("z: mean too high, in posterior sd")
        axes[1].set_xlabel("s: 1 - (scale / right scale)²")
        if len(row) <= _MAX_NAMES:
            axes[0].set_yticks(row, self.names)
        axes[0].set_ylim(len(row) - 0.5, -0.5)
        figure.suptitle(f"Fit check: {self.verdict}")
        return axes

    def __str__(self) -> str:
        return "\n".join(
            [f"Fit check: {self.verdict}", *self._explanation(), *self._numbers(), *self._table()]
        )

    def _explanation(self) -> list[str]:
        if self.verdict == "wrong size":
            return [_miscounted(s) for s in self.streams if s.rows != s.total_size]
        worst = int(np.argmax(np.abs(self.z)))
        z, error = abs(self.z[worst]), self._scale_error()
        return [
            _EXPLANATIONS[self.verdict].format(
                off=f"The mean of {self.names[worst]} is {z:.2g} posterior sd off",
                z=z,
                disorder=self.disorder,
                why=self._why_not_converged(),
                factor=error,
                percent=100 * (error - 1),
            )
        ]

    def _numbers(self) -> list[str]:
        lines = [f"{self.rows:,} rows; ELBO {self.elbo:,.2f} ± {self.elbo_error:.2g}"]
        if self.verdict in ("fine", "scales off") and self.disorder is not None:
            lines.append(
                f"Note that the gradient varies {self.disorder:.3g} times as much along the stream "
                "as in random order."
            )
        if np.isinf(self.optimum.doubt):
            lines.append(
                "The log density is not concave around the fit: it is far from an optimum."
            )
        elif self.optimum.doubt > _MAX_DOUBT:
            lines.append(
                f"So far from the optimum, z may itself be off by {self.optimum.doubt:.2g}."
            )
        if not self.whole_hessian:
            lines.append(
                "z leaves out correlations: where they are strong, it may be much too small or large."
            )
        return lines

    def _table(self) -> list[str]:
        """List the worst parameters, in the order of the model."""
        badness = np.maximum(np.abs(self.z) / _FINE_Z, np.abs(self.s) / _FINE_S)
        shown = np.sort(np.argsort(-badness, kind="stable")[:_MAX_LINES])
        width = max(len("parameter"), *(len(self.names[j]) for j in shown))
        lines = [f"{'parameter':{width}}  {'z':>8}  {'s':>8}"]
        lines += [f"{self.names[j]:{width}}  {self.z[j]:8.3g}  {self.s[j]:8.3g}" for j in shown]
        if len(shown) < len(self.z):
            lines.append(f"and {len(self.z) - len(shown)} more, less far off")
        return lines

    def _why_not_converged(self) -> str:
        if self.s.min() >= _YOUNG_S:
            return "which is clear from each batch"
        return f"and the scales are up to {np.sqrt(1 - self.s.min()):.3g} times too wide"

    def _scale_error(self) -> float:
        """Return the largest factor by which a scale is too wide or too narrow."""
        ratio = np.sqrt(np.maximum(1 - self.optimum.widths, np.finfo(float).tiny))
        return float(np.maximum(ratio, 1 / ratio).max())


def _miscounted(stream: StreamRows) -> str:
    declared = "no total_size" if stream.total_size is None else f"total_size={stream.total_size:,}"
    return (
        f"The likelihood of {stream.name!r} has {declared}, but the stream holds {stream.rows:,} "
        f"rows: pass total_size={stream.rows} or ds.total_size."
    )
