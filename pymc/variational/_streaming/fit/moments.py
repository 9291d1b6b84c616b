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

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from pymc.variational._streaming.fit.gaussian_fit import (
    Probe,
    WeightedDraws,
    best_gaussian,
    importance_draws,
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

_MAX_WIDENING = 1.05
"""Standard deviation over that of the nearest Gaussian, beyond which a parameter may have tails
that another one makes, as the spread of some groups does those of their mean."""

_MAX_SKEWNESS = 0.7
"""Skewness of a parameter beyond which a Gaussian is misleading; that of an exponential is 2."""

_SHIFTED = 2.0
"""Standard deviations by which the volume of the others moves a parameter from its mode, beyond
which these are integrated out."""

_NEARBY = 0.3
"""Standard deviations over which that is estimated."""

_MAX_CURVED = 3
"""Parameters along which a path may be curved."""

_MAX_OTHERS = 2
"""Other paths that are tried where the first one does not reach the tails."""

_ROUNDS = 4
"""Points of a ridge, one after the other, around which the posterior is fitted."""

_SETTLED = 0.5
"""Standard deviations from such a point to the mean up to which it is the last one."""

_Path = tuple[np.ndarray, list[int], np.ndarray]
"""A point, the parameters along which a path runs through it, and the covariance of these."""


class _Fit(NamedTuple):
    """The Gaussian nearest to a density in coordinates that follow a path."""

    target: Target
    draws: WeightedDraws

    @property
    def reaches_tails(self) -> bool:
        variance = np.diag(self.draws.moments(self.draws.points)[1])
        widening = np.sqrt(variance / np.diag(self.target.covariance))
        others = np.delete(widening, self.target.transform.chosen)
        return self.draws.is_efficient and bool((others < _MAX_WIDENING).all())


def fit_moments(run: Search, mode: Mode) -> bool:
    """Keep the moments of the posterior, if it is near a Gaussian along a path or at its mode."""
    path, at_mode = _path(run, mode), (mode.x, list[int](), np.zeros((0, 0)))
    best = _fit_along(run, mode, path)
    if best is None and path[1]:
        best = _fit_along(run, mode, at_mode)
    if best is None:
        return False
    others = _other_paths(run, mode, best.target.transform.chosen)
    try:
        while not best.reaches_tails and (other := next(others, None)) is not None:
            fit = _fit_along(run, mode, other)
            if fit is not None and fit.draws.efficiency > best.draws.efficiency:
                best = fit
    finally:
        _keep(run, best)
    return True


def _fit_along(run: Search, mode: Mode, path: _Path) -> _Fit | None:
    """Return the Gaussian nearest to a density in coordinates that follow a path, if there is one."""
    x, curved, spread = path
    for n in range(_ROUNDS):
        target = _target(run, mode, (x, curved, spread))
        size, transform = len(x), target.transform
        pairs = number_of_pairs(size, target.density.sample.n_rows, _FEW_LIKELIHOODS)
        halves = [normal_draws(size, n, run.rng) for n in pairs]
        parts = list(zip((target.likelihood, target.prior), halves))
        best = best_gaussian(parts, target.mean, target.covariance)
        if best is None:
            return None
        x, sd = transform.place(best[0])[0], np.sqrt(np.diag(best[1]))
        is_near = (np.abs(x - transform.center)[curved] < _SETTLED * sd[curved]).all()
        target = target._replace(mean=best[0], covariance=best[1])
        if is_near:
            break
    n_pairs = int(np.clip(_WEIGHTED_ROWS // target.density.sample.n_rows, *_WEIGHTED_PAIRS))
    tailed = run.shared or list(range(len(x)))
    draws = importance_draws(target.value, target.mean, target.covariance, n_pairs, run.rng, tailed)
    return _Fit(target, draws)


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


def _other_paths(run: Search, mode: Mode, known: np.ndarray) -> Iterator[_Path]:
    """Yield paths along others of the parameters that many may depend on, scales first."""
    sample, steps = run.sample.first(_DRAW_ROWS), RELATIVE_STEP * mode.curvature.scale
    covariance = mode.curvature.covariance()
    sd, shifts = np.sqrt(np.diag(covariance)), _shifts(run, mode.x, covariance)

    def rank(k: int) -> tuple[bool, bool, float]:
        return "[" in run.names[k], "_log__" not in run.names[k], -shifts[k]

    chosen = set(run.shared).difference(known) if len(sd) > 1 else set[int]()
    for k in sorted(chosen, key=rank)[:_MAX_OTHERS]:
        found = Ridge(sample, [k], steps).climb(mode.x, sd[[k]] / 2)
        if found is not None:
            yield found[0], [k], found[1]


def _most_drawn(run: Search, x: np.ndarray, covariance: np.ndarray) -> int | None:
    """Return the parameter that the volume of the others draws farthest from a mode, if any far."""
    shifts = _shifts(run, x, covariance)
    return int(np.argmax(shifts)) if shifts.max() > _SHIFTED else None


def _shifts(run: Search, x: np.ndarray, covariance: np.ndarray) -> np.ndarray:
    """Return how far the volume of the others draws parameters from a mode, in sd.

    The mean of the gradient around the mode says how that volume grows.
    """
    few, size = run.sample.first(SIZES[0]), len(x)
    values, vectors = np.linalg.eigh(covariance)
    factor = _NEARBY * vectors * np.sqrt(np.maximum(values, 0))
    probe = Probe(few.value_and_gradient, normal_draws(size, size, run.rng), x, factor)
    shift = covariance @ probe.even.mean(axis=0) / _NEARBY**2
    sd = np.sqrt(np.diag(covariance))
    return np.abs(shift) / np.where(sd > 0, sd, np.inf)


def _keep(run: Search, fit: _Fit) -> None:
    """Keep the moments of a density near a Gaussian."""
    run.target, draws = fit.target, fit.draws
    x = np.array([run.target.transform.place(point)[0] for point in draws.points])
    mean, run.covariance, skewness = draws.moments(x)
    if not draws.is_efficient:
        run.note_not_gaussian(f"{draws.efficiency:.1%} of draws are effective", run.remedy())
    worst = int(np.argmax(np.abs(skewness)))
    if abs(skewness[worst]) > _MAX_SKEWNESS:
        run.note_not_gaussian(f"{run.names[worst]} has skewness {skewness[worst]:.2g}", COMPARE)
    run.keep(mean, run.covariance)
