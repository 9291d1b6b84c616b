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

import numpy as np

from pymc.variational._streaming.fit.gaussian_fit import (
    Probe,
    best_gaussian,
    importance_moments,
    normal_draws,
    number_of_pairs,
)
from pymc.variational._streaming.fit.report import COMPARE
from pymc.variational._streaming.fit.ridge import Ridge, RidgeTransform, Target
from pymc.variational._streaming.fit.sample import Corrected
from pymc.variational._streaming.fit.search import SIZES, Search
from pymc.variational._streaming.fit.trust_region import RELATIVE_STEP, Curvature, Mode

__all__ = ["fit_moments"]

_DRAW_ROWS = 65_536
"""Rows at which likelihoods are evaluated for draws of the approximation."""

_FEW_LIKELIHOODS = 2**17
"""Likelihoods of rows that cost little in each step to the nearest Gaussian."""

_WEIGHTED_ROWS = 2**25
"""Likelihoods of rows that a round of importance sampling takes, within bounds on the pairs."""

_WEIGHTED_PAIRS = (500, 4_000)

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

_Path = tuple[np.ndarray, list[int], np.ndarray]
"""A point, the parameters along which a path runs through it, and the covariance of these."""


def fit_moments(run: Search, mode: Mode) -> bool:
    """Keep the moments of the posterior, if it is near a Gaussian along a path or at its mode."""
    path, at_mode = _path(run, mode), (mode.x, list[int](), np.zeros((0, 0)))
    return _fit_along(run, mode, path) or (bool(path[1]) and _fit_along(run, mode, at_mode))


def _fit_along(run: Search, mode: Mode, path: _Path) -> bool:
    """Keep the moments of a density that is near a Gaussian in coordinates that follow a path."""
    x, curved, spread = path
    for n in range(_ROUNDS):
        target = _target(run, mode, (x, curved, spread))
        size, transform = len(x), target.transform
        pairs = number_of_pairs(size, target.density.sample.n_rows, _FEW_LIKELIHOODS)
        draws = [normal_draws(size, n, run.rng) for n in pairs]
        parts = list(zip((target.likelihood, target.prior), draws))
        best = best_gaussian(parts, target.mean, target.covariance)
        if best is None:
            return False
        x, sd = transform.place(best[0])[0], np.sqrt(np.diag(best[1]))
        is_near = (np.abs(x - transform.center)[curved] < _SETTLED * sd[curved]).all()
        if is_near or n == _ROUNDS - 1:
            _keep(run, target, *best)
            return True
    return False


def _target(run: Search, mode: Mode, path: _Path) -> Target:
    """Return the density of a sample, corrected to all rows, in coordinates that follow a path."""
    (x, curved, spread), steps = path, RELATIVE_STEP * mode.curvature.scale
    sample, (height, slope) = run.sample.first(_DRAW_ROWS), run.prior(x)
    if curved:
        value, gradient = run.value_and_gradient(x)
        mode = Mode(x, value, gradient, Curvature(run.hessian(x, steps)), x, np.inf)
    difference = np.zeros((len(x), len(x)))
    if sample.inflation > 1:
        difference = mode.curvature.hessian - sample.hessian(mode.at, steps)
    density = Corrected(sample, x, mode.value - height, mode.gradient - slope, difference)
    if curved:
        transform = Ridge(density, curved, steps).transform(x, spread)
    else:
        transform = RidgeTransform([], x, spread, mode, [])
    return Target(density, transform, x, transform.covariance)


def _path(run: Search, mode: Mode) -> _Path:
    """Return a path along parameters that are far from the mode when the others are integrated out.

    Such is the scale in a product of scale and effects about which many rows say more than about
    either. Of most posteriors there are none, and the path is the mode.
    """
    sample, steps = run.sample.first(_DRAW_ROWS), RELATIVE_STEP * mode.curvature.scale
    x, curved, spread = mode.x, list[int](), np.zeros((0, 0))
    covariance, tried = mode.curvature.covariance(), set[int]()
    sd = np.sqrt(np.diag(covariance))
    while len(curved) < min(_MAX_CURVED, len(x) - 1):
        k = _most_drawn(run, x, covariance)
        if k is None:
            break
        # A scale serves for an effect that was taken before it, but not the other way round.
        more = [k] if len(curved) == 1 and k not in tried else [*curved, k]
        tried.add(k)
        found = Ridge(sample, more, steps).climb(x, sd[more] / 2)
        if found is None:
            break
        (x, spread, covariance), curved = found, more
    return x, curved, spread


def _most_drawn(run: Search, x: np.ndarray, covariance: np.ndarray) -> int | None:
    """Return the parameter that the volume of the others draws farthest from a mode, if any far.

    The mean of the gradient around the mode says how that volume grows.
    """
    few, size = run.sample.first(SIZES[0]), len(x)
    values, vectors = np.linalg.eigh(covariance)
    factor = _NEARBY * vectors * np.sqrt(np.maximum(values, 0))
    probe = Probe(few.value_and_gradient, normal_draws(size, size, run.rng), x, factor)
    shift = covariance @ probe.even.mean(axis=0) / _NEARBY**2
    sd = np.sqrt(np.diag(covariance))
    shift = np.abs(shift) / np.where(sd > 0, sd, np.inf)
    return int(np.argmax(shift)) if shift.max() > _SHIFTED else None


def _keep(run: Search, target: Target, mean: np.ndarray, covariance: np.ndarray) -> None:
    """Keep the moments of a density near a Gaussian."""
    pairs = int(np.clip(_WEIGHTED_ROWS // target.density.sample.n_rows, *_WEIGHTED_PAIRS))
    moments = importance_moments(target.value, mean, covariance, pairs, run.rng)
    run.target = target._replace(mean=mean, covariance=covariance)
    if moments.efficiency > _MIN_EFFICIENCY:
        run.widening = np.sqrt(np.diag(moments.covariance) / np.diag(covariance))
        mean, covariance = moments.mean, moments.covariance
    else:
        run.note_not_gaussian(f"{moments.efficiency:.1%} of draws are effective", run.remedy())
    worst = int(np.argmax(np.abs(moments.skewness)))
    if abs(moments.skewness[worst]) > _MAX_SKEWNESS:
        why = f"{run.names[worst]} has skewness {moments.skewness[worst]:.2g}"
        run.note_not_gaussian(why, COMPARE)
    mean, run.covariance = target.transform.moments(mean, covariance, run.rng)
    run.keep(mean, run.covariance)
