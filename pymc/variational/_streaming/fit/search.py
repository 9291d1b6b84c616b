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
"""The mode of a posterior, by Newton steps on growing samples and then on all rows."""

import math

from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from functools import partial
from itertools import combinations_with_replacement
from typing import Any

import numpy as np

from pytensor.graph.traversal import ancestors

from pymc.variational._streaming.dataset import StreamingDataset
from pymc.variational._streaming.fit.density import Density, Term, add_up, sum_over_rows
from pymc.variational._streaming.fit.gaussian import (
    Polished,
    log_volume,
    marginal_sd,
    mean,
    names,
    scale,
    times,
)
from pymc.variational._streaming.fit.mean_field import MeanField, moment_draws
from pymc.variational._streaming.fit.newton import MAX_DENSE
from pymc.variational._streaming.fit.report import COMPARE, Finding, Verdict
from pymc.variational._streaming.fit.ridge import Target
from pymc.variational._streaming.fit.sample import LogDensity, Sample
from pymc.variational._streaming.fit.trust_region import RELATIVE_STEP, Mode, Pattern, maximize
from pymc.variational.opvi import Group

__all__ = ["SEVERAL_MODES", "SIZES", "PassesSpent", "Search", "find_mode", "mirrored", "note_flat"]

SIZES = (4_096, 32_768, 262_144)
"""Rows of the samples, each of which starts from the optimum of the one before."""

_MAX_SHARED = 8
"""Parameters among many whose standard deviations are computed one by one."""

_COMPARED_PAIRS = 4
"""Pairs of draws at which the fit before and after are compared on all rows."""

_OTHER_STARTS = 2
"""Random points from which a second mode is looked for."""

_MODE_GAP = 5.0
"""Log density by which another mode may be lower and still matter."""

_SEPARATE = 5.0
"""Standard deviations beyond which two optima are two."""

_FAR = 10.0
"""Standard deviations at which the density of a posterior must have fallen."""

_SLOW = 10.0
"""Fall of the log density up to there, as of heavy tails; that of a Gaussian is 50."""

_OPEN = 1e-5
"""Precision of a direction, relative to the largest, from which on it may be open."""

_WIDE = 1e3
"""Distance over which the density does not fall along an open direction."""

_RISE = 5.0
"""Log density by which it has risen there where it has no maximum, as in a funnel."""

_NON_CENTRED = (
    "Write variables whose prior depends on another one non-centred: a standard normal variable "
    "times the scale."
)

SEVERAL_MODES = Finding(
    "the posterior has another mode that is as high, and means and standard deviations are those of "
    "one",
    "Order or bound the parameters, so that one mode is left.",
)

Fit = tuple[np.ndarray, np.ndarray]
"""Means, and scales in the form of the approximation."""


class PassesSpent(Exception):
    """As many passes were made as are allowed."""


class Search(LogDensity):
    """The log density on all rows, and what a run of :func:`polish` has found so far."""

    def __init__(
        self,
        group: Group,
        streams: Sequence[StreamingDataset],
        *,
        tolerance: float,
        max_passes: float,
        rng: np.random.Generator,
        executor: Executor | None,
        advance: Callable[..., None],
    ):
        super().__init__(Density(group, streams))
        self.names, self.before = names(group), (mean(group), scale(group))
        self.tolerance, self.max_passes, self.rng = tolerance, max_passes, rng
        self._executor, self._advance = executor, advance
        self.passes = 0
        self.sample = Sample(self.density, [], [])
        self.shared = _smallest_variables(group)
        """Parameters on which many others may depend."""
        self.mode: Mode | None = None
        self.best: Fit | None = None
        self.covariance: np.ndarray | None = None
        self.target: Target | None = None
        """What serves for the curvature when the fit is checked, with the Gaussian nearest to it."""
        self.found: dict[Verdict, Finding] = {}
        self.notes: list[str] = []

    def sum(self, function: Callable[[Term, np.ndarray], tuple[Any, ...]]) -> Any:
        if self.passes >= self.max_passes:
            raise PassesSpent
        parts = sum_over_rows(
            self.density, function, executor=self._executor, advance=self._advance
        )
        self.passes += 1
        return add_up(part.sums for part in parts)

    def keep(self, mean: np.ndarray, covariance: np.ndarray) -> None:
        """Keep the Gaussian of the family that is nearest to one of these moments."""
        is_full = self.before[1].ndim == 2
        precision = np.linalg.inv(covariance)
        sd = 1 / np.sqrt(np.diag(precision))
        self.best = mean, np.linalg.cholesky(covariance) if is_full else sd

    def keep_mode(self, mode: Mode) -> None:
        self.show(mode)
        if mode.curvature.is_concave:
            self.keep(mode.x, mode.curvature.covariance())

    def keep_independent(self, q: MeanField) -> None:
        """Keep a mean-field Gaussian in the form of the approximation."""
        self.show(q)
        self.best = q.mean, np.diag(q.scales) if self.before[1].ndim == 2 else q.scales

    def show(self, found: Mode | MeanField) -> None:
        self._advance(0, f"Polishing, {found.distance:.2g} sd to go")

    def known(self) -> Polished:
        """Return what is known of the posterior beyond the best fit."""
        if self.covariance is None or self.target is None:
            return Polished(np.ones(len(self.names)), found=self.found)
        widening = np.sqrt(np.diag(self.covariance) / np.diag(self.target.covariance))
        is_curved = len(self.target.transform.chosen) > 0
        target = self.target._replace(density=None) if is_curved else None
        return Polished(widening, target, self.found)

    def is_better(self, after: Fit) -> bool:
        """Whether the evidence lower bound has not fallen, at the same draws.

        Where what a sample says was corrected to all rows, that is asked: of fits that are nearly
        as good it says the same as all rows do.
        """
        draws = moment_draws(len(after[0]), _COMPARED_PAIRS, self.rng)
        fits, signs = (after, self.before), (1, -1)
        points = [x + s * times(scale, d) for x, scale in fits for d in draws for s in signs]
        density = self if self.target is None else self.target.density
        bounds = density.values(points).reshape(2, len(draws), 2).mean(axis=2)
        bounds = bounds + np.array([[log_volume(scale)] for _, scale in fits])
        gain = (bounds[0] - bounds[1])[np.isfinite(bounds[1])]
        is_finite = bool(np.isfinite(bounds[0]).all())
        if not (is_finite and len(gain)):
            return is_finite
        return bool(gain.mean() > -2 * gain.std() / math.sqrt(len(gain)) - 1e-3)

    def remedy(self) -> str:
        """Return what to do about a posterior that is not near a Gaussian."""
        free = self.density.model.free_RVs
        scaled = self.density.size <= MAX_DENSE and any(
            set(free) & set(ancestors(rv.owner.inputs)) for rv in free
        )
        return _NON_CENTRED if scaled else COMPARE

    def note_not_gaussian(self, why: str, remedy: str) -> None:
        text = f"the posterior is not near a Gaussian ({why}), and means and sd may be off"
        self.found.setdefault("not Gaussian", Finding(text, remedy))


def _smallest_variables(group: Group) -> list[int]:
    """Return the parameters of scalars and short vectors, as scales of effects are."""
    found: list[int] = []
    for _, place, shape, _ in sorted(group.ordering.values(), key=lambda v: math.prod(v[2])):
        if len(found) + math.prod(shape) > _MAX_SHARED:
            break
        found += range(place.start, place.stop)
    return sorted(found)


def find_mode(run: Search, x: np.ndarray) -> Mode:
    """Maximize the log density on growing samples, and then on all rows."""
    run.density.pattern = Pattern.dense(len(x))
    for size in SIZES:
        sample = run.sample.first(size)
        find = partial(
            maximize,
            sample.value_and_gradient,
            sample.hessian,
            tolerance=run.tolerance * sample.inflation,
            show=run.show,
        )
        mode = find(x)
        if size == SIZES[0]:
            mode = _highest_mode(run, find, x, mode)
        x, steps = mode.x, RELATIVE_STEP * mode.curvature.scale
        if sample.inflation == 1:
            run.keep_mode(mode)
            return mode
        if size > SIZES[0]:
            run.density.pattern = Pattern(sample.likelihood_hessian(x, steps))
    return maximize(
        run.value_and_gradient,
        run.hessian,
        x,
        tolerance=run.tolerance,
        steps=steps,
        show=run.keep_mode,
    )


def _highest_mode(run: Search, find: Callable[..., Mode], x: np.ndarray, mode: Mode) -> Mode:
    """Return the highest mode from some starts, and note that there are several."""
    few = run.sample.first(SIZES[0])
    starts = [x + run.rng.normal(size=len(x)) for _ in range(_OTHER_STARTS)]
    starts = [x for x in starts if np.isfinite(few.value_and_gradient(x)[1]).all()]
    if mode.curvature.is_concave:
        sd = np.sqrt(np.diag(mode.curvature.covariance()))
        starts += mirrored(run.names, mode.x, sd, few.values)
    for start in starts:
        other = find(start, max_steps=50)
        low, high = sorted((mode, other), key=lambda mode: mode.log_evidence)
        gap = high.log_evidence - low.log_evidence
        if gap < _MODE_GAP and low.curvature.distance(other.x - mode.x) > _SEPARATE:
            run.found["several modes"] = SEVERAL_MODES
            return high
        mode = high if np.isfinite(high.log_evidence) else mode
    return mode


def mirrored(
    names: Sequence[str],
    x: np.ndarray,
    sd: np.ndarray,
    heights: Callable[[Sequence[np.ndarray]], Any],
) -> list[np.ndarray]:
    """Return points whose *heights* are about that of *x*, and many *sd* away, where signs change.

    They are those of a parameter, of one or two variables, such as factors, or of all.
    """
    variables = np.array([name.partition("[")[0] for name in names])
    pairs = combinations_with_replacement(dict.fromkeys(variables), 2)
    flips = [*np.eye(len(x) if len(x) <= MAX_DENSE else 0, len(x), dtype=bool)]
    flips += [np.isin(variables, pair) for pair in pairs]
    flips.append(np.ones(len(x), bool))
    far = [np.where(f, -x, x) for f in flips if np.abs(2 * x / sd)[f].max() > _SEPARATE]
    top, *others = heights([x, *far])
    return [x for x, height in zip(far, others) if height > top - _MODE_GAP]


def note_flat(run: Search) -> None:
    """Note a direction in which the density has not fallen, or little, far from the mean."""
    if run.density.size > MAX_DENSE:
        return
    mean, scale = run.best or run.before
    density = run.sample.first(SIZES[0]) if run.target is None else run.target.density
    covariance = np.diag(marginal_sd(scale) ** 2) if run.covariance is None else run.covariance
    values, vectors = np.linalg.eigh(covariance)
    axes = [*(_FAR * vectors * np.sqrt(values)).T[::-1], *_open_directions(run.mode)]
    offsets = [sign * axis for axis in axes for sign in (1, -1)]
    top, *heights = density.values([mean, *(mean + offset for offset in offsets)])
    flat = [offset for offset, height in zip(offsets, heights) if height > top - _SLOW]
    if not flat:
        return
    # The sample may lack the few rows that decide, and a mean-field fit the width.
    offsets = [share * offset for offset in flat for share in (1, 3)]
    values = run.values([mean, *(mean + offset for offset in offsets)])
    near, far = np.nan_to_num(values[1:] - values[0], nan=-np.inf).reshape(-1, 2).T
    worst = int(np.argmax(near))
    name = run.names[int(np.argmax(np.abs(flat[worst])))]
    if near[worst] > _RISE and far[worst] > near[worst] + _RISE:
        run.found["not Gaussian"] = Finding(
            f"the posterior density rises without end along {name}, a funnel of a scale and of "
            "what it scales",
            _NON_CENTRED,
        )
    elif min(near[worst], far[worst]) > -1:
        text = f"the posterior does not fall off along {name}, and may have no mean"
        run.found["flat direction"] = Finding(text, "Give it a narrower prior.")
    elif near[worst] > -_SLOW and run.covariance is not None:
        run.note_not_gaussian(f"it falls off slowly along {name}", COMPARE)


def _open_directions(mode: Mode | None) -> list[np.ndarray]:
    """Return a distance along which rows and priors may say nothing, if there is one."""
    if mode is None or abs(mode.curvature.values[0]) > _OPEN * mode.curvature.values[-1]:
        return []
    weakest = mode.curvature.scale * mode.curvature.vectors[:, 0]
    return [_WIDE * weakest / np.abs(weakest).max()]
