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
"""Moments of a posterior that is near a Gaussian, along a path that may be curved."""

from functools import partial
from typing import NamedTuple

import numpy as np

from pymc.variational._streaming.fit.gaussian_fit import (
    Probe,
    best_gaussian,
    importance_moments,
    normal_draws,
)
from pymc.variational._streaming.fit.report import COMPARE
from pymc.variational._streaming.fit.ridge import Ridge, RidgeTransform
from pymc.variational._streaming.fit.sample import Known
from pymc.variational._streaming.fit.search import SIZES, Search
from pymc.variational._streaming.fit.trust_region import (
    RELATIVE_STEP,
    Curvature,
    Function,
    Mode,
)

__all__ = ["fit_along_path", "fit_along_ridge", "fit_around"]

_DRAW_ROWS = 65_536
"""Rows at which likelihoods are evaluated for draws of the approximation."""

_NEAR_STEPS = 12
"""Steps to the nearest Gaussian, beyond which it is sought on few rows first."""

_WEIGHTED_ROWS = 2**25
"""Likelihoods of rows that a round of importance sampling takes, within bounds on the pairs."""

_WEIGHTED_PAIRS = (500, 4_000)

_PRIOR_PAIRS = 128
"""Least number of pairs of draws for what does not depend on rows."""

_MIN_EFFICIENCY = 0.2
"""Share of effective draws below which importance sampling is not trusted."""

_MAX_SKEWNESS = 0.7
"""Skewness of a parameter beyond which a Gaussian is misleading; that of an exponential is 2."""

_SHIFTED = 2.0
"""Standard deviations by which the volume of the others moves a parameter from its mode, beyond
which these are integrated out."""

_NEARBY = 0.3
"""Standard deviations over which that is estimated."""

_MAX_CURVED = 3
"""Parameters along which a path may be curved."""

_ROUNDS = 4
"""Points of a ridge, one after the other, around which the posterior is fitted."""

_SETTLED = 0.5
"""Standard deviations from such a point to the mean up to which it is the last one."""

Gaussian = tuple[np.ndarray, np.ndarray]
"""Mean and covariance."""


class _Target(NamedTuple):
    """The log density around a point, by the rows of a sample and what is known of all."""

    likelihood: Function
    prior: Function
    known: Known
    center: np.ndarray

    def density(self, x: np.ndarray) -> tuple[float, np.ndarray]:
        (value, gradient), (more, slope) = self.likelihood(x), self.prior(x)
        return value + more, gradient + slope

    def parts(self, rng: np.random.Generator) -> list[tuple[Function, np.ndarray]]:
        return _parts(self.likelihood, self.prior, len(self.center), rng)


def fit_around(
    run: Search, mode: Mode, found: Gaussian, is_full: bool, rng: np.random.Generator
) -> bool:
    """Keep the moments of the posterior, if it is near a Gaussian, which is sought from *found*."""
    target = _around(run, mode)
    best = best_gaussian(target.parts(rng), *found, max_steps=_NEAR_STEPS)
    if best is not None:
        _keep(run, target, best, is_full, rng)
    return best is not None


def fit_along_path(run: Search, mode: Mode, is_full: bool, rng: np.random.Generator) -> bool:
    """Keep the moments of a posterior that is near a Gaussian along a curved path, if one is."""
    scale = mode.curvature.scale
    path = _path(run, mode, rng)
    if path is None:
        return False
    x, curved, spread = path
    for n in range(_ROUNDS):
        target, transform = _straight(run, x, curved, spread, scale)
        best = best_gaussian(
            target.parts(rng), transform.center, transform.covariance, max_steps=_NEAR_STEPS
        )
        if best is None:
            break
        x, sd = transform.place(best[0]), np.sqrt(np.diag(best[1]))
        is_near = (np.abs(x - transform.center)[curved] < _SETTLED * sd[curved]).all()
        if is_near or n == _ROUNDS - 1:
            _keep(run, target, best, is_full, rng)
            return True
    return False


def fit_along_ridge(run: Search, mode: Mode, is_full: bool, rng: np.random.Generator) -> bool:
    """Keep the moments of a posterior that is near a Gaussian far from the mode, if it is.

    The density does not say where that is, but the bound does, in which the ridge's width counts.
    The posterior of few rows is wide, and begins where that of more rows is near.
    """
    found = mode.x, np.diag(np.minimum(mode.curvature.scale, 1) ** 2)
    for n_rows in (SIZES[0], _DRAW_ROWS):
        likelihood = run.sample.first(n_rows).alone().likelihood
        better = best_gaussian(
            _parts(likelihood, run.prior, len(mode.x), rng), *found, max_steps=100
        )
        if better is None:
            return False
        found = better
    value, gradient = run.value_and_gradient(found[0])
    steps = RELATIVE_STEP / np.sqrt(np.diag(np.linalg.inv(found[1])))
    curvature = Curvature(run.hessian(found[0], steps))
    return fit_around(run, Mode(found[0], value, gradient, curvature, np.inf), found, is_full, rng)


def _around(run: Search, mode: Mode) -> _Target:
    """Return the density of a sample with value, gradient and Hessian of all rows at a mode."""
    sample, steps = run.sample.first(_DRAW_ROWS), RELATIVE_STEP * mode.curvature.scale
    difference = mode.curvature.hessian - sample.hessian(run.pattern, mode.x, steps)
    prior, slope = run.prior(mode.x)
    likelihood = sample.around(mode.x, mode.value - prior, mode.gradient - slope, difference)
    return _Target(likelihood, run.prior, Known(sample, difference), mode.x)


def _straight(
    run: Search, x: np.ndarray, curved: list[int], spread: np.ndarray, scale: np.ndarray
) -> tuple[_Target, RidgeTransform]:
    """Return the density in coordinates that are straight around a point of the path."""
    whole = Ridge(run.value_and_gradient, run.hessian, curved, scale)
    x, _ = whole.mode(x)
    value, gradient = run.value_and_gradient(x)
    target = _around(run, Mode(x, value, gradient, Curvature(whole.hessian), np.inf))
    sample, difference = target.known[:2]

    def hessian(y: np.ndarray, steps: np.ndarray) -> np.ndarray:
        return sample.hessian(run.pattern, y, steps) + difference

    transform = Ridge(target.density, hessian, curved, scale).transform(x, spread)
    height, slope = run.prior(x)
    likelihood = sample.around(x, value - height, gradient - slope, difference, transform)
    prior = transform.straighten(run.prior, volume=True)
    return _Target(likelihood, prior, Known(sample, difference, transform), x), transform


def _path(
    run: Search, mode: Mode, rng: np.random.Generator
) -> tuple[np.ndarray, list[int], np.ndarray] | None:
    """Return a point of a path, the parameters along which it runs, and the covariance of these.

    They are far from the mode when the others are integrated out, as the scale in a product of
    scale and effects about which many rows say more than about either.
    """
    sample, scale = run.sample.first(_DRAW_ROWS), mode.curvature.scale
    hessian = partial(sample.hessian, run.pattern)
    x, covariance, spread = mode.x, mode.curvature.covariance(), np.zeros((0, 0))
    steps, curved = np.sqrt(np.diag(covariance)) / 2, list[int]()
    while len(curved) < _MAX_CURVED and (k := _most_drawn(run, x, covariance, rng)) is not None:
        curved.append(k)
        ridge = Ridge(sample.value_and_gradient, hessian, curved, scale)
        found = ridge.climb(x, steps[curved])
        if found is None:
            return None
        x, spread, covariance = found
    return (x, curved, spread) if curved else None


def _most_drawn(
    run: Search, x: np.ndarray, covariance: np.ndarray, rng: np.random.Generator
) -> int | None:
    """Return the parameter that the volume of the others draws farthest from a mode, if any far.

    The mean of the gradient around the mode says how that volume grows.
    """
    few, size = run.sample.first(SIZES[0]), len(x)
    values, vectors = np.linalg.eigh(covariance)
    factor = _NEARBY * vectors * np.sqrt(np.maximum(values, 0))
    probe = Probe(few.value_and_gradient, normal_draws(size, size, rng), x, factor)
    shift = covariance @ probe.even.mean(axis=0) / _NEARBY**2
    sd = np.sqrt(np.diag(covariance))
    shift = np.abs(shift) / np.where(sd > 0, sd, np.inf)
    return int(np.argmax(shift)) if shift.max() > _SHIFTED else None


def _keep(
    run: Search, target: _Target, found: Gaussian, is_full: bool, rng: np.random.Generator
) -> None:
    """Keep the moments of a density near a Gaussian."""
    rows = run.sample.first(_DRAW_ROWS).n_rows
    pairs = int(np.clip(_WEIGHTED_ROWS // rows, *_WEIGHTED_PAIRS))
    moments = importance_moments(lambda x: target.density(x)[0], *found, pairs, rng)
    if moments.efficiency > _MIN_EFFICIENCY:
        found = moments.mean, moments.covariance
    else:
        run.note_not_gaussian(f"{moments.efficiency:.1%} of draws are effective", run.remedy())
    worst = int(np.argmax(np.abs(moments.skewness)))
    if abs(moments.skewness[worst]) > _MAX_SKEWNESS:
        why = f"{run.names[worst]} has skewness {moments.skewness[worst]:.2g}"
        run.note_not_gaussian(why, COMPARE)
    run.known = target.known._replace(straight=found)
    if target.known.transform is not None:
        found = target.known.transform.moments(*found, rng)
    run.keep(*found, is_full)


def _parts(
    likelihood: Function, prior: Function, size: int, rng: np.random.Generator
) -> list[tuple[Function, np.ndarray]]:
    """Return the parts of the log density with draws, of which the prior's are the most."""
    draws = normal_draws(size, max(8, size), rng)
    return [(likelihood, draws), (prior, normal_draws(size, max(_PRIOR_PAIRS, 8 * size), rng))]
