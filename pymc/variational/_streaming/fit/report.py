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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from pymc.variational._streaming.errors import StreamError
from pymc.variational._streaming.fit.gaussian import Polished, mean, names, place, polished
from pymc.variational._streaming.fit.newton import Optimum
from pymc.variational.approximations import FullRank, FullRankGroup, MeanFieldGroup
from pymc.variational.opvi import Approximation, Group

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "COMPARE",
    "GO_ON",
    "POLISH",
    "POLISH_AGAIN",
    "Finding",
    "FitReport",
    "StreamRows",
    "Verdict",
]

Verdict = Literal[
    "fine",
    "scales off",
    "last-iterate noise",
    "not converged",
    "not concave",
    "flat direction",
    "several modes",
    "not Gaussian",
    "unknown",
    "ordered rows",
    "one batch",
    "wrong size",
]

_FINE_Z = 0.25
_FINE_FACTOR = 1.05
_FINE_S = _FINE_FACTOR**2 - 1
"""A scale within 5 %."""

_UNCONVERGED_S = -10.0
"""A scale more than three times too wide has not converged from its initial value."""

_HIGH_SIGNAL_TO_NOISE = 3.0
"""Ratio from which on each batch shows which way the means should go."""

_STANDARD_ERRORS = 4.0
"""Standard errors that a scale may be off, of the worst of many."""

_FLAT = {"float64": 1e-10, "float32": 1e-4}
"""Smallest precision, relative to the largest, that rounding leaves known."""

_MAX_DENSE = 4_000
"""Parameters up to which a covariance is held in memory."""

_MAX_LINES = 12
"""Parameters in the printed table."""

_MAX_NAMES = 60
"""Parameters whose names fit beside the figure."""

POLISH = "Call polish(approx, ds)."
POLISH_AGAIN = "Call polish(approx, ds) with a higher max_passes."
COMPARE = "Compare with pm.sample on a part of the rows."
GO_ON = "Make more steps, or check more rows."
"""What to do on a stream without end, which polish refuses."""

_EXPLANATIONS = {
    "fine": "The means are at most {z:.2g} posterior sd off, the scales {percent:.2g} %.",
    "scales off": (
        "The means are where they should be, the scales off by up to a factor of {factor:.3g}.\n"
        "{remedy}"
    ),
    "last-iterate noise": "{off}, which is within the noise of single batches.\n{remedy}",
    "not converged": "{off}, and the scales are off by up to a factor of {factor:.3g}.\n{remedy}",
    "not concave": (
        "The log density is not concave around the fit, least of all along {weakest}: the fit\n"
        "is far from an optimum, or between two.\n{remedy}"
    ),
    "flat direction": (
        "Rows and priors leave {weakest} open: along it the log density has no curvature.\n"
        "Give it a narrower prior."
    ),
    "unknown": ("{off}, but may be {error:.2g} off by errors of this check.\n{remedy}"),
    "ordered rows": (
        "{off}, and the gradient varies {ratio:.3g} times as much along the stream as it\n"
        "would in random order: the fit follows the order of the rows.\n"
        "Shuffle the whole table once with preshuffle."
    ),
    "one batch": (
        "{off}, and this dataset has never gone beyond its first batch.\n"
        "Fit with callbacks=[ds.fit_callback()]. If the fit was made with another dataset, as\n"
        "before a restart, use ds.load_state_dict with its position, and check again."
    ),
}


class Finding(NamedTuple):
    """What makes the numbers of a report doubtful, and what to do about it."""

    text: str
    remedy: str


@dataclass(frozen=True, slots=True)
class StreamRows:
    """The rows of a stream, as counted and as declared."""

    name: str
    """Name of the stream's shared variable."""
    rows: int
    """Number of rows that were read."""
    total_size: int | None
    """Number of rows to which the model scales the likelihood; None if it does not scale it."""
    whole: bool = True
    """Whether these are all rows of the stream."""


@dataclass(frozen=True, slots=True, repr=False)
class FitReport:
    """How far a fit is from where all rows say that it should be.

    It prints as a verdict and one next step.
    """

    names: tuple[str, ...]
    """Names of the unconstrained parameters."""
    z: np.ndarray
    """Posterior standard deviations by which each mean is too high."""
    z_error: float
    """Standard error of *z*, at the worst parameter, where not all rows were read."""
    s: np.ndarray
    """1 - (scale / right scale)²: 0 is right, -3 twice too wide, 0.75 twice too narrow. The right
    scale is the best that the family can have. Of a polished fit, the Gaussian nearest to the
    posterior is measured, from which *sd* differs by skewness and tails."""
    sd: np.ndarray
    """Standard deviations of the posterior by linear response, with all correlations (Giordano,
    Broderick and Jordan 2018); NaN where it is not concave."""
    family_sd: np.ndarray
    """Standard deviations of the approximation."""
    elbo: float
    """Evidence lower bound on all rows; of a polished fit, that of this Gaussian."""
    elbo_error: float
    """Its standard error, by draws and by the sample of rows."""
    streams: tuple[StreamRows, ...]
    """The rows of each stream."""
    signal_to_noise: float
    """Gradient of all rows over the standard deviation of the gradient of a batch, at the worst
    parameter."""
    between_within_ratio: float | None
    """Variance of the gradient between parts of the stream over that within them, at the worst
    parameter: about 1 for rows in random order; None if random rows would reach it."""
    moved: bool
    """Whether the dataset that was passed has gone beyond its first batch."""
    group: Group = field(repr=False)
    """What was checked, inside the approximation."""
    start: np.ndarray = field(repr=False)
    """Mean that was checked."""
    optimum: Optimum = field(repr=False)
    """Where one Newton step leads."""
    passes: int = 1
    """Passes over all rows that were made."""
    seconds: float | None = None
    """Time that :func:`polish` took, None for a check alone."""
    found: Mapping[Verdict, Finding] = field(default_factory=dict)
    """What :func:`polish` found of the posterior that makes its numbers doubtful, by verdict."""
    notes: tuple[str, ...] = ()
    """What else :func:`polish` has to say about how it ended."""
    remedy: str = POLISH
    """What to do if means or scales are off, or may be."""

    @property
    def rows(self) -> int:
        """Number of rows that were counted."""
        return sum(stream.rows for stream in self.streams)

    @property
    def is_polished(self) -> bool:
        """Whether :func:`polish` made the report."""
        return self.seconds is not None

    @property
    def narrowness(self) -> float:
        """Standard deviation of the posterior over that of the approximation, at most."""
        ratio = self.sd / self.family_sd
        return float(ratio.max()) if np.isfinite(ratio).all() else np.nan

    @property
    def verdict(self) -> Verdict:
        """The main cause of what is wrong, or "fine"."""
        concave = self.optimum.precisions[0] > 0
        means_off = not concave or np.abs(self.z).max() > _FINE_Z + 3 * self.z_error
        if any(s.rows != s.total_size if s.whole else not s.total_size for s in self.streams):
            return "wrong size"
        if means_off and not self.moved:
            return "one batch"
        if means_off and self.between_within_ratio is not None and not self.is_polished:
            return "ordered rows"
        for verdict in ("flat direction", "several modes", "not Gaussian"):  # gravest first
            if verdict in self.found:
                return verdict
        if self._is_flat():
            return "flat direction"
        if not concave:
            return "not concave"
        if self.s.min() < _UNCONVERGED_S:
            return "not converged"
        if means_off:
            clear = self.is_polished or self.signal_to_noise > _HIGH_SIGNAL_TO_NOISE
            return "not converged" if clear else "last-iterate noise"
        if self._uncertainty() > _FINE_Z:
            return "unknown"
        return "scales off" if self._factor(_STANDARD_ERRORS) > _FINE_FACTOR else "fine"

    def full_rank(self, var_names: Sequence[str] | None = None) -> Approximation:
        """Return an approximation with the covariance of the posterior.

        Its mean is that of the fit, its covariance that of linear response, as in *sd*.

        Parameters
        ----------
        var_names : sequence of str, optional
            Variables whose covariance is wanted; the others are independent, with *sd*. Default:
            all.

        Returns
        -------
        FullRank or Approximation
            For ``.sample()``, with its factor of the covariance in memory.

        Raises
        ------
        StreamError
            If the fit is not at its optimum, has changed since it was checked, or has more
            parameters than a covariance can be held of.
        """
        if self.verdict not in ("fine", "scales off"):
            found = self.found.get(self.verdict)
            remedy = found.remedy if found else self._remedy()
            raise StreamError(f"the fit is not at its optimum ({self.verdict}); {remedy[:-1]}")
        if not np.array_equal(mean(self.group), self.start):
            raise StreamError("approx has changed since it was checked; check it again")
        with self.group.model as model:
            if var_names is None:
                approx: Approximation = FullRank()
            else:
                whole = FullRankGroup([model[name] for name in var_names])
                approx = Approximation([whole, MeanFieldGroup(None)])
        if sorted(name for group in approx.groups for name in names(group)) != sorted(self.names):
            raise StreamError("the model has changed since the fit; fit and check it again")
        known = polished(self.group)
        for group in approx.groups:
            chosen = [self.names.index(name) for name in names(group)]
            is_full = isinstance(group, FullRankGroup)
            scales = np.linalg.cholesky(self._covariance(chosen)) if is_full else self.sd[chosen]
            is_all = chosen == list(range(len(self.names)))
            noted = known if is_all else Polished(known.widening[chosen])
            place(group, self.start[chosen], scales, noted)
        return approx

    def covariance(self) -> np.ndarray:
        """Return the covariance of the posterior by linear response, shape (d, d)."""
        return self._covariance(list(range(len(self.names))))

    def _covariance(self, chosen: list[int]) -> np.ndarray:
        size, block = len(self.names), np.ix_(chosen, chosen)
        if self.optimum.covariance is not None:
            covariance = self.optimum.covariance[block]
        elif size <= _MAX_DENSE:
            precision = np.array([self.optimum.precision(unit) for unit in np.eye(size)])
            inverse = np.linalg.inv((precision + precision.T) / 2)
            covariance = (self.family_sd[:, None] * inverse * self.family_sd)[block]
        elif len(chosen) <= _MAX_DENSE:
            units = (np.where(np.arange(size) == place, 1.0, 0.0) for place in chosen)
            columns = np.array([self.optimum.solve(unit)[chosen] for unit in units])
            covariance = (columns + columns.T) / 2
        else:
            raise StreamError(
                f"a covariance of {len(chosen)} parameters is too large; use report.sd, or "
                "full_rank(var_names) of some"
            )
        ratio = self.sd[chosen] / np.sqrt(np.diag(covariance))
        return covariance * np.outer(ratio, ratio)

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

    def __repr__(self) -> str:
        title = f"Fit check: {self.verdict}"
        if self._is_narrow():
            title += f", but the family is up to {self.narrowness:.3g} times too narrow"
        return "\n".join([title, self._explanation(), *self._numbers(), *self._table()])

    def _is_narrow(self) -> bool:
        return self.verdict == "fine" and self.narrowness > _FINE_FACTOR

    def _is_flat(self) -> bool:
        precisions = self.optimum.precisions
        dtype = self.group.params[0].dtype
        return bool(abs(precisions[0]) < _FLAT.get(str(dtype), 1e-10) * precisions[-1])

    def _uncertainty(self) -> float:
        return max(self.z_error, self.optimum.step_error)

    def _factor(self, standard_errors: float = 0.0) -> float:
        """Return the worst factor of a scale, less so many standard errors."""
        excess = np.abs(np.log(np.maximum(1 - self.optimum.principal_s, 1e-300))) / 2
        return float(np.exp((excess - standard_errors * self.optimum.s_error / 2).max()))

    def _explanation(self) -> str:
        if self.verdict == "wrong size":
            return "\n".join(_miscounted(s) for s in self.streams if s.rows != s.total_size)
        if self.verdict in self.found:
            text, remedy = self.found[self.verdict]
            return f"{text[0].upper()}{text[1:]}.\n{remedy}"
        worst = int(np.argmax(np.abs(self.z)))
        z = abs(self.z[worst])
        text = _EXPLANATIONS[self.verdict].format(
            off=f"The mean of {self.names[worst]} is {z:.2g} posterior sd off",
            z=z,
            ratio=self.between_within_ratio,
            factor=self._factor(),
            percent=100 * (self._factor() - 1),
            weakest=self.names[int(np.argmax(self.optimum.weakest))],
            error=self._uncertainty(),
            remedy=self._remedy(),
        )
        if self._is_narrow():
            worst = int(np.argmax(self.sd / self.family_sd))
            text += (
                f"\nThe sd of {self.names[worst]} is {self.family_sd[worst]:.3g}, that of the "
                f"posterior {self.sd[worst]:.3g}.\nUse report.full_rank()."
            )
        return text

    def _remedy(self) -> str:
        """Return the next step where means or scales are off, or may be."""
        is_short = self.verdict == "unknown" and self.z_error > _FINE_Z
        return "Check all rows." if is_short and self.remedy != GO_ON else self.remedy

    def _numbers(self) -> list[str]:
        lines = [f"{self.rows:,} rows; ELBO {self.elbo:,.2f} ± {self.elbo_error:.2g}"]
        if self.seconds is not None:
            lines.append(f"Polished in {self.passes} passes and {self.seconds:.1f} s.")
        others = [found.text for verdict, found in self.found.items() if verdict != self.verdict]
        lines += [f"{note[0].upper()}{note[1:]}." for note in (*others, *self.notes)]
        if self.z_error:
            lines.append(f"z has a standard error of {self.z_error:.2g}: not all rows were read.")
        if _FINE_Z < self.optimum.step_error < np.inf:
            lines.append(
                f"So far from the optimum, z may itself be off by {self.optimum.step_error:.2g}."
            )
        return lines

    def _table(self) -> list[str]:
        """List the worst parameters, in the order of the model."""
        badness = np.maximum(np.abs(self.z) / _FINE_Z, np.abs(self.s) / _FINE_S)
        shown = np.sort(np.argsort(-badness, kind="stable")[:_MAX_LINES])
        width = max(len("parameter"), *(len(self.names[j]) for j in shown))
        lines = [f"{'parameter':{width}}  {'z':>8}  {'s':>8}  {'sd':>8}  {'family':>8}"]
        lines += [
            f"{self.names[j]:{width}}  {self.z[j]:8.3g}  {self.s[j]:8.3g}"
            f"  {self.sd[j]:8.3g}  {self.family_sd[j]:8.3g}"
            for j in shown
        ]
        if len(shown) < len(self.z):
            lines.append(f"and {len(self.z) - len(shown)} more, less far off")
        return lines


def _miscounted(stream: StreamRows) -> str:
    declared = "no total_size" if stream.total_size is None else f"total_size={stream.total_size:,}"
    return (
        f"The likelihood of {stream.name!r} has {declared}, but the stream holds {stream.rows:,} "
        f"rows: pass total_size={stream.rows} or ds.total_size."
    )
