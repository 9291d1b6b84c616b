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
"""The search for the best fit on all rows of a stream."""

import math

from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from functools import partial
from typing import Any

import numpy as np

from pytensor.graph.traversal import ancestors

from pymc.variational._streaming.fit.density import Density, Term, add_up, sum_over_rows
from pymc.variational._streaming.fit.gaussian import log_volume, marginal_sd, times
from pymc.variational._streaming.fit.gaussian_fit import (
    best_gaussian,
    importance_moments,
    normal_draws,
)
from pymc.variational._streaming.fit.mean_field import (
    MeanField,
    best_mean_field,
    expected,
    sign_draws,
)
from pymc.variational._streaming.fit.report import COMPARE, Finding, Verdict
from pymc.variational._streaming.fit.sample import Sample
from pymc.variational._streaming.fit.trust_region import (
    RELATIVE_STEP,
    Curvature,
    Function,
    Mode,
    Pattern,
    maximize,
)

__all__ = ["Fit", "PassesSpent", "Search", "find_fit", "note_flat"]

_MAX_DENSE = 500
"""Parameters up to which the whole Hessian is held."""

_MAX_SHARED = 8
"""Scalars among many parameters whose standard deviations are computed one by one."""

_SIZES = (4_096, 32_768, 262_144)
"""Rows of the samples, each of which starts from the optimum of the one before."""

_DRAW_ROWS = 65_536
"""Rows at which likelihoods are evaluated for draws of the approximation."""

_WEIGHTED_ROWS = 2**25
"""Likelihoods of rows that a round of importance sampling takes, within bounds on the pairs."""

_WEIGHTED_PAIRS = (500, 4_000)

_PRIOR_PAIRS = 128
"""Least number of pairs of draws for what does not depend on rows."""

_COMPARED_PAIRS = 4
"""Pairs of draws at which the fit before and after are compared on all rows."""

_MIN_EFFICIENCY = 0.2
"""Share of effective draws below which importance sampling is not trusted."""

_MAX_SKEWNESS = 0.7
"""Skewness of a parameter beyond which a Gaussian is misleading; that of an exponential is 2."""

_NON_CENTRED = (
    "Write variables whose prior depends on another one non-centred: a standard normal variable "
    "times the scale."
)

_OTHER_STARTS = 2
"""Random points from which a second mode is looked for."""

_MODE_GAP = 5.0
"""Log density by which another mode may be lower and still matter."""

_JITTER = 1e-3
"""Size of the first random step, which leaves a point of symmetry."""

_FIRST_SCALE = 0.05
"""Largest scale at which a fit of many parameters begins."""

_SEPARATE = 5.0
"""Standard deviations beyond which two optima are two."""

_FAR = 10.0
"""Standard deviations at which the density of a posterior must have fallen."""

_RISE = 5.0
"""Log density by which it has risen there where it has no maximum, as in a funnel."""

Fit = tuple[np.ndarray, np.ndarray]
"""Means, and scales in the form of the approximation."""


class PassesSpent(Exception):
    """As many passes were made as are allowed."""


class Search:
    """The log density on all rows, and what a run of :func:`polish` has found so far."""

    def __init__(
        self,
        density: Density,
        names: Sequence[str],
        executor: Executor | None,
        advance: Callable[..., None],
        max_passes: float,
    ):
        self.density, self.names, self.max_passes = density, names, max_passes
        self._executor, self._advance = executor, advance
        self.passes = 0
        self.sample = Sample(density, [], [])
        self.shared = [k for k, name in enumerate(names) if "[" not in name][:_MAX_SHARED]
        """Scalars, on which others may depend."""
        self.pattern = Pattern.dense(0)
        """Pattern of the Hessian of the likelihood."""
        self.best: Fit | None = None
        self.covariance: np.ndarray | None = None
        self.known: tuple[Sample, np.ndarray] | None = None
        """A sample, and what the Hessian of all rows exceeds that of the sample by."""
        self.found: dict[Verdict, Finding] = {}
        self.notes: list[str] = []

    def value_and_gradient(self, x: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = self.sum(lambda term, rows: term.value_and_gradient(x, rows))
        prior, prior_gradient = self.density.prior.value_and_gradient(x)
        return value + prior, gradient + prior_gradient

    def hessian(self, x: np.ndarray, steps: np.ndarray) -> np.ndarray:
        pattern = self.pattern

        def differences(term: Term, rows: np.ndarray) -> tuple[np.ndarray]:
            return (pattern.differences(lambda y: term.value_and_gradient(y, rows)[1], x, steps),)

        [columns] = self.sum(differences)
        return pattern.assemble(columns, steps) + self.sample.prior_hessian(x, steps)

    def values(self, points: Sequence[np.ndarray]) -> np.ndarray:
        def of_rows(term: Term, rows: np.ndarray) -> tuple[np.ndarray]:
            return (np.array([term.value_and_gradient(x, rows)[0] for x in points]),)

        [values] = self.sum(of_rows)
        return values + [self.density.prior.value_and_gradient(x)[0] for x in points]

    def expected(self, draws: np.ndarray, mean: np.ndarray, scales: np.ndarray) -> Any:
        def of_rows(term: Term, rows: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
            return expected(partial(term.value_and_gradient, rows=rows), draws, mean, scales)

        return self.sum(of_rows)

    def prior_expected(self, draws: np.ndarray) -> Callable[..., Any]:
        return partial(expected, self.density.prior.value_and_gradient, draws)

    def is_higher(self, x: np.ndarray, y: np.ndarray) -> bool:
        """Whether the density of the sample is higher at *x* than at *y*."""
        return not self.sample.value_and_gradient(x)[0] < self.sample.value_and_gradient(y)[0]

    def is_better(self, after: Fit, before: Fit, rng: np.random.Generator) -> bool:
        """Whether the evidence lower bound on all rows has not fallen, at the same draws."""
        draws = sign_draws(len(after[0]), _COMPARED_PAIRS, rng)
        fits, signs = (after, before), (1, -1)
        points = [x + s * times(scale, d) for x, scale in fits for d in draws for s in signs]
        bounds = self.values(points).reshape(2, len(draws), 2).mean(axis=2)
        bounds = bounds + np.array([[log_volume(scale)] for _, scale in fits])
        gain = (bounds[0] - bounds[1])[np.isfinite(bounds[1])]
        error = gain.std() / math.sqrt(max(1, len(gain)))
        is_finite = bool(np.isfinite(bounds[0]).all())
        return is_finite and (not len(gain) or gain.mean() > -2 * error - 1e-3)

    def remedy(self) -> str:
        """Return what to do about a posterior that is not near a Gaussian."""
        free = self.density.model.free_RVs
        scaled = self.density.size <= _MAX_DENSE and any(
            set(free) & set(ancestors(rv.owner.inputs)) for rv in free
        )
        return _NON_CENTRED if scaled else COMPARE

    def show(self, found: Mode | MeanField) -> None:
        self._advance(0, f"Polishing, {found.distance:.2g} sd to go")

    def sum(self, function: Callable[[Term, np.ndarray], tuple[Any, ...]]) -> Any:
        if self.passes >= self.max_passes:
            raise PassesSpent
        parts = sum_over_rows(
            self.density, function, executor=self._executor, advance=self._advance
        )
        self.passes += 1
        return add_up(parts)


def find_fit(run: Search, before: Fit, tolerance: float, rng: np.random.Generator) -> None:
    """Find the best fit, and keep it in *run*."""
    x = before[0] + _JITTER * rng.normal(size=len(before[0]))
    is_dense, is_full = len(x) <= _MAX_DENSE, before[1].ndim == 2
    run.sample = Sample.draw(run.density, rng, _SIZES[-1] if is_dense else None)
    if not is_dense:
        scales = np.minimum(marginal_sd(before[1]), _FIRST_SCALE)
        _fit_mean_field(run, MeanField(x, scales, np.inf), is_full, tolerance, rng)
        return
    mode = _find_mode(run, x, is_full, tolerance, rng)
    if mode.curvature.is_concave:
        if _fit_gaussian(
            run, _around(run, mode), mode.x, mode.curvature.covariance(), is_full, rng
        ):
            return
    else:
        worst = int(np.argmax(np.abs(mode.curvature.vectors[:, 0])))
        run.notes.append(f"the log density is not concave where it ends, along {run.names[worst]}")
    _fit_ridge(run, mode, is_full, tolerance, rng)


def _find_mode(
    run: Search, x: np.ndarray, is_full: bool, tolerance: float, rng: np.random.Generator
) -> Mode:
    """Maximize the log density on growing samples, and then on all rows."""
    run.pattern, steps = Pattern.dense(len(x)), None
    for size in _SIZES:
        sample = run.sample.first(size)
        find = partial(
            maximize,
            sample.value_and_gradient,
            partial(sample.hessian, run.pattern),
            tolerance=tolerance * sample.inflation,
            show=run.show,
        )
        mode = find(x)
        if size == _SIZES[0]:
            mode = _highest_mode(run, find, x, mode, rng)
        if sample.is_whole:
            return mode
        x, steps = mode.x, RELATIVE_STEP * mode.curvature.scale
        if size > _SIZES[0]:
            run.pattern = Pattern(sample.likelihood_hessian(run.pattern, x, steps))

    def keep(mode: Mode) -> None:
        run.show(mode)
        if mode.curvature.is_concave:
            run.best = mode.x, _family(mode.curvature.covariance(), is_full)

    return maximize(
        run.value_and_gradient,
        run.hessian,
        x,
        tolerance=tolerance,
        steps=steps,
        show=keep,
    )


def _highest_mode(
    run: Search, find: Callable[..., Mode], x: np.ndarray, mode: Mode, rng: np.random.Generator
) -> Mode:
    """Return the highest mode from some starts, and note that there are several."""
    for _ in range(_OTHER_STARTS):
        other = find(x + rng.normal(size=len(x)), max_steps=50)
        low, high = sorted((mode, other), key=lambda mode: mode.log_evidence)
        gap = high.log_evidence - low.log_evidence
        if gap < _MODE_GAP and low.curvature.distance(other.x - mode.x) > _SEPARATE:
            run.found["several modes"] = Finding(
                "the posterior has another mode that is as high, and means and standard deviations "
                "are those of one",
                "Order or bound the parameters, so that one mode is left.",
            )
            return high
        mode = high if np.isfinite(high.log_evidence) else mode
    return mode


def _around(run: Search, mode: Mode) -> Function:
    """Return the likelihood of a sample with gradient and Hessian of all rows at a mode."""
    sample, steps = run.sample.first(_DRAW_ROWS), RELATIVE_STEP * mode.curvature.scale
    sampled = sample.hessian(run.pattern, mode.x, steps)
    run.known = sample, mode.curvature.hessian - sampled
    return sample.around(mode.x, mode.value, mode.gradient, run.known[1])


def _fit_gaussian(
    run: Search,
    likelihood: Function,
    mean: np.ndarray,
    covariance: np.ndarray,
    is_full: bool,
    rng: np.random.Generator,
) -> bool:
    """Keep the moments of the posterior, if it is near a Gaussian."""
    found = best_gaussian(_parts(run, likelihood, len(mean), rng), mean, covariance)
    if found is None:
        return False
    prior = run.density.prior.value_and_gradient
    pairs = int(np.clip(_WEIGHTED_ROWS // run.sample.first(_DRAW_ROWS).n_rows, *_WEIGHTED_PAIRS))
    moments = importance_moments(lambda x: likelihood(x)[0] + prior(x)[0], *found, pairs, rng)
    if moments.efficiency > _MIN_EFFICIENCY:
        found = moments.mean, moments.covariance
    else:
        _note_not_gaussian(run, f"{moments.efficiency:.1%} of draws are effective", run.remedy())
    worst = int(np.argmax(np.abs(moments.skewness)))
    if abs(moments.skewness[worst]) > _MAX_SKEWNESS:
        why = f"{run.names[worst]} has skewness {moments.skewness[worst]:.2g}"
        _note_not_gaussian(run, why, COMPARE)
    run.covariance, run.best = found[1], (found[0], _family(found[1], is_full))
    return True


def _parts(
    run: Search, likelihood: Function, size: int, rng: np.random.Generator
) -> list[tuple[Function, np.ndarray]]:
    """Return the parts of the log density with draws, of which the prior's are the most."""
    prior_draws = normal_draws(size, max(_PRIOR_PAIRS, 8 * size), rng)
    return [
        (likelihood, normal_draws(size, max(8, size), rng)),
        (run.density.prior.value_and_gradient, prior_draws),
    ]


def _note_not_gaussian(run: Search, why: str, remedy: str) -> None:
    text = f"the posterior is not near a Gaussian ({why}), and means and sd may be off"
    run.found.setdefault("not Gaussian", Finding(text, remedy))


def _fit_ridge(
    run: Search, mode: Mode, is_full: bool, tolerance: float, rng: np.random.Generator
) -> None:
    """Fit a Gaussian where the mode of the density is of no use.

    Along the ridge of a non-centred hierarchy the density does not say where the posterior is,
    but the bound does, in which the ridge's width counts. Few rows show the way.
    """
    size, found = len(mode.x), (mode.x, mode.curvature.covariance())
    for n_rows in (_SIZES[0], _DRAW_ROWS):
        sample = run.sample.first(n_rows)
        parts = _parts(run, sample.likelihood, size, rng)
        better = best_gaussian(parts, *found, max_steps=200)
        if better is None:
            break
        found = better
    else:
        value, gradient = run.value_and_gradient(found[0])
        steps = RELATIVE_STEP * _family(found[1], is_full=False)
        curvature = Curvature(run.hessian(found[0], steps))
        likelihood = _around(run, Mode(found[0], value, gradient, curvature, np.inf))
        if _fit_gaussian(run, likelihood, *found, is_full, rng):
            return
    _note_not_gaussian(run, "it has no best Gaussian", run.remedy())
    draws, prior = sign_draws(size, 32, rng), run.prior_expected(sign_draws(size, 64, rng))
    q = MeanField(mode.x, mode.curvature.scale, np.inf)
    for n_rows in _SIZES[:2]:
        likelihood = run.sample.first(n_rows).likelihood
        by_draws: list[Any] = [partial(expected, likelihood, draws), prior]
        q = best_mean_field(by_draws, q, tolerance=tolerance, show=run.show)
    run.best = q.mean, np.diag(q.scales) if is_full else q.scales


def _fit_mean_field(
    run: Search, q: MeanField, is_full: bool, tolerance: float, rng: np.random.Generator
) -> None:
    """Fit a mean-field Gaussian of many parameters, on all rows."""
    size = len(q.mean)
    draws = sign_draws(size, 4 if len(run.shared) < 4 else 8, rng, run.shared)
    prior = run.prior_expected(sign_draws(size, 16, rng, run.shared))

    def keep(q: MeanField) -> None:
        run.show(q)
        run.best = q.mean, np.diag(q.scales) if is_full else q.scales

    parts: list[Any] = [partial(expected, run.sample.likelihood, draws), prior]
    show = keep if run.sample.is_whole else run.show
    q = best_mean_field(parts, q, tolerance=tolerance, show=show)
    if not run.sample.is_whole:
        parts = [partial(run.expected, draws), prior]
        best_mean_field(parts, q, tolerance=tolerance, show=keep)


def note_flat(run: Search) -> None:
    """Note a direction in which the density has not fallen far from the mean."""
    if run.best is None or len(run.best[0]) > _MAX_DENSE:
        return
    (mean, scale), sample = run.best, run.sample.first(_SIZES[0])
    covariance = np.diag(marginal_sd(scale) ** 2) if run.covariance is None else run.covariance
    values, vectors = np.linalg.eigh(covariance)
    axes = (vectors * np.sqrt(values)).T[::-1]
    offsets = [_FAR * sign * axis for axis in axes for sign in (1, -1)]
    top = sample.value_and_gradient(mean)[0]
    flat = [v for v in offsets if sample.value_and_gradient(mean + v)[0] > top - 1]
    if not flat:
        return
    # The sample may lack the few rows that decide, and a mean-field fit the width.
    offsets = [share * offset for offset in flat for share in (1, 3)]
    heights = run.values([mean, *(mean + offset for offset in offsets)])
    near, far = np.nan_to_num(heights[1:] - heights[0], nan=-np.inf).reshape(-1, 2).T
    worst = int(np.argmax(near))
    name = run.names[int(np.argmax(np.abs(flat[worst])))]
    if near[worst] > _RISE and far[worst] > near[worst] + _RISE:
        run.found["not Gaussian"] = Finding(
            f"the posterior density rises without end along {name}, a funnel of a scale and of "
            "what it scales",
            _NON_CENTRED,
        )
    elif min(near[worst], far[worst]) > -1:
        run.found["flat direction"] = Finding(
            f"the posterior does not fall off along {name}, and may have no mean",
            "Give it a narrower prior.",
        )


def _family(covariance: np.ndarray, is_full: bool) -> np.ndarray:
    """Return the scales of the Gaussian nearest to one of this covariance."""
    if is_full:
        return np.linalg.cholesky(covariance)
    return 1 / np.sqrt(np.diag(np.linalg.inv(covariance)))
