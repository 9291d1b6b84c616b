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

from pymc.variational._streaming.fit.density import Density, Term, add_up, sum_over_rows
from pymc.variational._streaming.fit.gaussian_fit import (
    best_gaussian,
    importance_moments,
    normal_draws,
)
from pymc.variational._streaming.fit.mean_field import (
    MeanField,
    best_mean_field,
    expected,
    linear_response,
    sign_draws,
)
from pymc.variational._streaming.fit.report import Verdict
from pymc.variational._streaming.fit.sample import Sample
from pymc.variational._streaming.fit.trust_region import (
    RELATIVE_STEP,
    Curvature,
    Function,
    Optimum,
    Pattern,
    maximize,
)

__all__ = ["PassesSpent", "Search", "find_fit", "note_flat"]

_MAX_DENSE = 500
"""Parameters up to which the whole Hessian is held."""

_SIZES = (4_096, 32_768, 262_144)
"""Rows of the samples, each of which starts from the optimum of the one before."""

_DRAW_ROWS = 65_536
"""Rows at which likelihoods are evaluated for draws of the approximation."""

_PRIOR_PAIRS = 128
"""Least number of pairs of draws for what does not depend on rows."""

_COMPARED_PAIRS = 4
"""Pairs of draws at which the fit before and after are compared on all rows."""

_MIN_EFFICIENCY = 0.2
"""Share of effective draws below which importance sampling is not trusted."""

_NOT_GAUSSIAN = (
    "the posterior is not near a Gaussian ({:.1%} of draws are effective), and means and standard "
    "deviations may be off"
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

_Fit = tuple[np.ndarray, np.ndarray]
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
        self.best: _Fit | None = None
        self.covariance: np.ndarray | None = None
        self.found: dict[Verdict, str] = {}
        self.notes: list[str] = []

    def value_and_gradient(self, x: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = self.sum(partial(_value_and_gradient, x=x))
        prior, prior_gradient = self.density.prior.value_and_gradient(x)
        return value + prior, gradient + prior_gradient

    def hessian(self, pattern: Pattern, x: np.ndarray, steps: np.ndarray) -> np.ndarray:
        [columns] = self.sum(partial(_differences, x=x, steps=steps, pattern=pattern))
        return pattern.assemble(columns, steps) + self.sample.prior_hessian(x, steps)

    def expected(self, draws: np.ndarray, mean: np.ndarray, scales: np.ndarray) -> Any:
        return self.sum(partial(_expected, draws=draws, mean=mean, scales=scales))

    def is_higher(self, x: np.ndarray, y: np.ndarray) -> bool:
        """Whether the density of the sample is higher at *x* than at *y*."""
        return not self.sample.value_and_gradient(x)[0] < self.sample.value_and_gradient(y)[0]

    def is_better(self, after: _Fit, before: _Fit, rng: np.random.Generator) -> bool:
        """Whether the evidence lower bound on all rows has not fallen, at the same draws."""
        draws = sign_draws(len(after[0]), _COMPARED_PAIRS, rng)
        points = [
            x + sign * _times(factor, draw)
            for x, factor in (after, before)
            for draw in draws
            for sign in (1, -1)
        ]
        bounds = self.values(points).reshape(2, len(draws), 2).mean(axis=2)
        bounds = bounds + np.array([[_entropy(after[1])], [_entropy(before[1])]])
        gain = (bounds[0] - bounds[1])[np.isfinite(bounds[1])]
        error = gain.std() / math.sqrt(max(1, len(gain)))
        is_finite = bool(np.isfinite(bounds[0]).all())
        return is_finite and (not len(gain) or gain.mean() > -2 * error - 1e-3)

    def values(self, points: Sequence[np.ndarray]) -> np.ndarray:
        [values] = self.sum(partial(_values, points=points))
        return values + [self.density.prior.value_and_gradient(x)[0] for x in points]

    def show(self, found: Optimum | MeanField) -> None:
        self._advance(0, f"Polishing, {found.distance:.2g} sd to go")

    def sum(self, function: Callable[[Term, np.ndarray], tuple[Any, ...]]) -> Any:
        if self.passes >= self.max_passes:
            raise PassesSpent
        parts = sum_over_rows(
            self.density, function, executor=self._executor, advance=self._advance
        )
        self.passes += 1
        return add_up(parts)


def find_fit(run: Search, before: _Fit, tolerance: float, rng: np.random.Generator) -> None:
    """Find the best fit, and keep it in *run*."""
    x = before[0] + _JITTER * rng.normal(size=len(before[0]))
    is_dense, is_full = len(x) <= _MAX_DENSE, before[1].ndim == 2
    run.sample = Sample.draw(run.density, rng, _SIZES[-1] if is_dense else None)
    if not is_dense:
        scales = np.sqrt(np.diag(before[1] @ before[1].T)) if is_full else before[1]
        _fit_mean_field(run, x, np.minimum(scales, _FIRST_SCALE), is_full, tolerance, rng)
        return
    optimum = _find_optimum(run, x, is_full, tolerance, rng)
    if optimum.curvature.is_concave and _fit_gaussian(run, optimum, is_full, rng):
        return
    if not optimum.curvature.is_concave:
        worst = int(np.argmax(np.abs(optimum.curvature.vectors[:, 0])))
        run.notes.append(f"the log density is not concave where it ends, along {run.names[worst]}")
    _fit_ridge(run, optimum, is_full, tolerance, rng)


def _find_optimum(
    run: Search, x: np.ndarray, is_full: bool, tolerance: float, rng: np.random.Generator
) -> Optimum:
    """Maximize the log density on growing samples, and then on all rows."""
    pattern, steps = Pattern.dense(len(x)), None
    for size in _SIZES:
        sample = run.sample.first(size)
        find = partial(
            maximize,
            sample.value_and_gradient,
            partial(sample.hessian, pattern),
            tolerance=tolerance * sample.inflation,
            show=run.show,
        )
        optimum = find(x)
        if size == _SIZES[0]:
            optimum = _highest_mode(run, find, x, optimum, rng)
        if sample.is_whole:
            return optimum
        x, steps = optimum.x, RELATIVE_STEP * optimum.curvature.scale
        if size > _SIZES[0]:
            pattern = Pattern(sample.likelihood_hessian(pattern, x, steps))

    def keep(optimum: Optimum) -> None:
        run.show(optimum)
        if optimum.curvature.is_concave:
            run.best = optimum.x, _family(optimum.curvature.covariance(), is_full)

    return maximize(
        run.value_and_gradient,
        partial(run.hessian, pattern),
        x,
        tolerance=tolerance,
        steps=steps,
        show=keep,
    )


def _highest_mode(
    run: Search,
    find: Callable[..., Optimum],
    x: np.ndarray,
    optimum: Optimum,
    rng: np.random.Generator,
) -> Optimum:
    """Return the highest optimum from some starts, and note that there are several."""
    for _ in range(_OTHER_STARTS):
        other = find(x + rng.normal(size=len(x)), max_steps=50)
        low, high = sorted((optimum, other), key=lambda mode: mode.log_evidence)
        gap = high.log_evidence - low.log_evidence
        if gap < _MODE_GAP and low.curvature.distance(other.x - optimum.x) > _SEPARATE:
            run.found["several modes"] = (
                "the posterior has another mode that is as high, and means and standard deviations "
                "are those of one"
            )
            return high
        optimum = high if np.isfinite(high.log_evidence) else optimum
    return optimum


def _fit_gaussian(run: Search, optimum: Optimum, is_full: bool, rng: np.random.Generator) -> bool:
    """Keep the moments of the posterior around an optimum, if it is near a Gaussian there."""
    size, few = len(optimum.x), run.sample.first(_DRAW_ROWS).around(optimum)
    prior = run.density.prior.value_and_gradient
    parts: list[tuple[Function, np.ndarray]] = [
        (few, normal_draws(size, max(8, size), rng)),
        (prior, normal_draws(size, max(_PRIOR_PAIRS, 8 * size), rng)),
    ]
    found = best_gaussian(parts, optimum.x, optimum.curvature.covariance())
    if found is None:
        return False
    moments = importance_moments(lambda x: few(x)[0] + prior(x)[0], *found, rng)
    if moments.efficiency > _MIN_EFFICIENCY:
        found = moments.mean, moments.covariance
    else:
        run.found["not Gaussian"] = _NOT_GAUSSIAN.format(moments.efficiency)
    run.covariance, run.best = found[1], (found[0], _family(found[1], is_full))
    return True


def _fit_ridge(
    run: Search, optimum: Optimum, is_full: bool, tolerance: float, rng: np.random.Generator
) -> None:
    """Fit a mean-field Gaussian where the optimum of the density is of no use.

    Along the ridge of a non-centred hierarchy the density does not say where the posterior is,
    but the bound does, in which the ridge's width counts.
    """
    size = len(optimum.x)
    draws = sign_draws(size, 32, rng), sign_draws(size, 64, rng)
    prior = partial(expected, run.density.prior.value_and_gradient, draws[1])
    q = MeanField(optimum.x, optimum.curvature.scale, np.inf)
    sample = run.sample.first(_DRAW_ROWS)
    likelihood: Function
    for likelihood in (run.sample.first(_SIZES[0]).likelihood, sample.likelihood):
        parts = [partial(expected, likelihood, draws[0]), prior]
        q = best_mean_field(parts, q.mean, q.scales, tolerance=tolerance, show=run.show)
    if not sample.is_whole:
        value, gradient = run.value_and_gradient(q.mean)
        steps = RELATIVE_STEP * q.scales
        curvature = Curvature(run.hessian(Pattern.dense(size), q.mean, steps))
        optimum = Optimum(q.mean, value, gradient, curvature, q.distance)
        likelihood = sample.around(optimum)
        parts = [partial(expected, likelihood, draws[0]), prior]
        q = best_mean_field(parts, q.mean, q.scales, tolerance=tolerance, show=run.show)
    run.best = q.mean, np.diag(q.scales) if is_full else q.scales
    response = linear_response(parts, q)
    if not response.is_concave:
        run.found["not Gaussian"] = _NOT_GAUSSIAN.format(0)
        return
    run.covariance = response.covariance()[:size, :size]
    moments = importance_moments(
        lambda x: likelihood(x)[0] + run.density.prior.value_and_gradient(x)[0],
        q.mean,
        run.covariance,
        rng,
    )
    if moments.efficiency > _MIN_EFFICIENCY:
        run.covariance, run.best = moments.covariance, (moments.mean, run.best[1])
    else:
        run.found["not Gaussian"] = _NOT_GAUSSIAN.format(moments.efficiency)
    if is_full:
        run.best = run.best[0], np.linalg.cholesky(run.covariance)


def _fit_mean_field(
    run: Search,
    x: np.ndarray,
    scales: np.ndarray,
    is_full: bool,
    tolerance: float,
    rng: np.random.Generator,
) -> None:
    """Fit a mean-field Gaussian of many parameters, on all rows."""
    draws = sign_draws(len(x), 4, rng), sign_draws(len(x), 16, rng)

    def keep(q: MeanField) -> None:
        run.show(q)
        run.best = q.mean, np.diag(q.scales) if is_full else q.scales

    prior = partial(expected, run.density.prior.value_and_gradient, draws[1])
    q = MeanField(x, scales, np.inf)
    likelihood: Any = partial(expected, run.sample.likelihood, draws[0])
    show = keep if run.sample.is_whole else run.show
    q = best_mean_field([likelihood, prior], x, scales, tolerance=tolerance, show=show)
    if not run.sample.is_whole:
        likelihood = partial(run.expected, draws[0])
        best_mean_field([likelihood, prior], q.mean, q.scales, tolerance=tolerance, show=keep)


def note_flat(run: Search) -> None:
    """Note a direction in which the density has not fallen far from the mean."""
    if run.best is None or run.covariance is None:
        return
    mean, sample = run.best[0], run.sample.first(_SIZES[0])
    values, vectors = np.linalg.eigh(run.covariance)
    axes = (vectors * np.sqrt(values)).T[::-1]
    offsets = [_FAR * sign * axis for axis in axes for sign in (1, -1)]
    top = sample.value_and_gradient(mean)[0]
    flat = [v for v in offsets if sample.value_and_gradient(mean + v)[0] > top - 1]
    if not flat:
        return
    # The sample may lack the few rows that decide.
    heights = run.values([mean, *(mean + offset for offset in flat)])
    for offset, height in zip(flat, heights[1:]):
        if height > heights[0] - 1:
            name = run.names[int(np.argmax(np.abs(offset)))]
            run.found["flat direction"] = (
                f"the posterior does not fall off along {name}, and may have no mean"
            )
            return


def _family(covariance: np.ndarray, is_full: bool) -> np.ndarray:
    """Return the scales of the Gaussian nearest to one of this covariance."""
    if is_full:
        return np.linalg.cholesky(covariance)
    return 1 / np.sqrt(np.diag(np.linalg.inv(covariance)))


def _times(factor: np.ndarray, draw: np.ndarray) -> np.ndarray:
    return factor @ draw if factor.ndim == 2 else factor * draw


def _entropy(factor: np.ndarray) -> float:
    return float(np.log(np.diag(factor) if factor.ndim == 2 else factor).sum())


def _value_and_gradient(term: Term, rows: np.ndarray, x: np.ndarray) -> tuple[float, np.ndarray]:
    return term.value_and_gradient(x, rows)


def _values(term: Term, rows: np.ndarray, points: Sequence[np.ndarray]) -> tuple[np.ndarray]:
    return (np.array([term.value_and_gradient(x, rows)[0] for x in points]),)


def _differences(
    term: Term, rows: np.ndarray, x: np.ndarray, steps: np.ndarray, pattern: Pattern
) -> tuple[np.ndarray]:
    return (pattern.differences(lambda y: term.value_and_gradient(y, rows)[1], x, steps),)


def _expected(
    term: Term, rows: np.ndarray, draws: np.ndarray, mean: np.ndarray, scales: np.ndarray
) -> tuple[float, np.ndarray, np.ndarray]:
    return expected(lambda x: term.value_and_gradient(x, rows), draws, mean, scales)
