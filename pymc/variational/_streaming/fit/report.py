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
    mean,
    names,
    set_mean,
    set_scale,
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

_UNCONVERGED_S = -10.0
"""A scale more than three times too wide has not converged from its initial value."""

_HIGH_SIGNAL_TO_NOISE = 3.0
"""Ratio from which on each batch shows which way the means should go."""

_MAX_STEP_ERROR = 0.5
"""Posterior standard deviations by which a Newton step may miss."""

_MAX_LINES = 12
"""Parameters in the printed table."""

_MAX_NAMES = 60
"""Parameters whose names fit beside the figure."""

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
    "not converged": (
        "{off}, and the scales are up to {wide:.3g} times too wide.\n"
        "Run more steps, or raise the learning rate."
    ),
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


@dataclass(frozen=True, slots=True)
class StreamRows:
    """The rows of a stream, as counted and as declared."""

    name: str
    """Name of the stream's shared variable."""
    rows: int
    """Number of rows of one pass."""
    total_size: int | None
    """Number of rows to which the model scales the likelihood; None if it does not scale it."""


@dataclass(frozen=True, slots=True)
class FitReport:
    """How far a fit is from where all rows say that it should be.

    It prints as a verdict.
    """

    names: tuple[str, ...]
    """Names of the unconstrained parameters."""
    z: np.ndarray
    """Posterior standard deviations by which each mean is too high."""
    s: np.ndarray
    """1 - (scale / right scale)²: 0 is right, -3 twice too wide, 0.75 twice too narrow."""
    elbo: float
    """Evidence lower bound on all rows."""
    elbo_error: float
    """Its Monte Carlo error."""
    streams: tuple[StreamRows, ...]
    """The rows of each stream."""
    clarity: float
    """Signal-to-noise ratio of one batch: the gradient of all rows over the standard deviation of
    the gradient of a batch, at the worst parameter."""
    disorder: float | None
    """Variance of the gradient between parts of the stream over that within them, at the worst
    parameter: about 1 for rows in random order; None if random rows would reach it."""
    moved: bool
    """Whether the dataset that was passed has gone beyond its first batch."""
    start: np.ndarray = field(repr=False)
    """Mean that was checked."""
    optimum: Optimum = field(repr=False)
    """Where one Newton step leads."""

    @property
    def rows(self) -> int:
        """Number of rows that were counted."""
        return sum(stream.rows for stream in self.streams)

    @property
    def whole_hessian(self) -> bool:
        """Whether `z` takes correlations into account."""
        return not np.isnan(self.optimum.step_error)

    @property
    def verdict(self) -> Verdict:
        """The main cause of what is wrong, or "fine"."""
        means_off = np.abs(self.z).max() > _FINE_Z or np.isinf(self.optimum.step_error)
        if any(stream.rows != stream.total_size for stream in self.streams):
            return "wrong size"
        if means_off and not self.moved:
            return "one batch"
        if means_off and self.disorder is not None:
            return "ordered rows"
        clear = means_off and self.clarity > _HIGH_SIGNAL_TO_NOISE
        if clear or self.s.min() < _UNCONVERGED_S:
            return "not converged"
        if means_off:
            return "last-iterate noise"
        return "scales off" if np.abs(self.optimum.principal_s).max() > _FINE_S else "fine"

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
        if names(group) != self.names or not np.array_equal(mean(group), self.start):
            raise StreamError(
                "approx is another fit, or has changed since it was checked; check it again"
            )
        if self.optimum.scale is None or self.optimum.step_error > _MAX_STEP_ERROR:
            reason = (
                "the fit is too far from its optimum for a Newton step, which may miss it by "
                f"{self.optimum.step_error:.2g} posterior sd"
                if self.whole_hessian
                else f"{len(self.z)} parameters are too many for the Hessian of a Newton step"
            )
            raise StreamError(
                f"{reason}; average the fit with EpochAverage, or run it longer, and check again"
            )
        set_mean(group, self.optimum.mean)
        set_scale(group, self.optimum.scale)

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
            [f"Fit check: {self.verdict}", self._explanation(), *self._numbers(), *self._table()]
        )

    def _explanation(self) -> str:
        if self.verdict == "wrong size":
            return "\n".join(_miscounted(s) for s in self.streams if s.rows != s.total_size)
        worst = int(np.argmax(np.abs(self.z)))
        z = abs(self.z[worst])
        ratio = np.maximum(1 - self.optimum.principal_s, np.finfo(float).tiny)
        factor = np.exp(np.abs(np.log(ratio)).max() / 2)
        return _EXPLANATIONS[self.verdict].format(
            off=f"The mean of {self.names[worst]} is {z:.2g} posterior sd off",
            z=z,
            disorder=self.disorder,
            wide=np.sqrt(max(1, 1 - self.s.min())),
            factor=factor,
            percent=100 * (factor - 1),
        )

    def _numbers(self) -> list[str]:
        error = self.optimum.step_error
        lines = [f"{self.rows:,} rows; ELBO {self.elbo:,.2f} ± {self.elbo_error:.2g}"]
        if np.isinf(error):
            lines.append("The log density is not concave around the fit, which is far off.")
        elif error > _MAX_STEP_ERROR:
            lines.append(f"So far from the optimum, z may itself be off by {error:.2g}.")
        if not self.whole_hessian:
            lines.append("z leaves out correlations, and is rough where they are strong.")
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


def _miscounted(stream: StreamRows) -> str:
    declared = "no total_size" if stream.total_size is None else f"total_size={stream.total_size:,}"
    return (
        f"The likelihood of {stream.name!r} has {declared}, but the stream holds {stream.rows:,} "
        f"rows: pass total_size={stream.rows} or ds.total_size."
    )
