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
"""The Gaussian nearest to a density, and moments of a density that is near a Gaussian."""

import math

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from scipy.stats import norm

from pymc.variational._streaming.fit.gaussian import log_volume, times
from pymc.variational._streaming.fit.trust_region import Function

__all__ = [
    "Probe",
    "WeightedDraws",
    "best_gaussian",
    "importance_draws",
    "normal_draws",
    "number_of_pairs",
]

_PAIRS = 8
"""Least number of pairs of draws at which likelihoods of rows are evaluated."""

_PRIOR_PAIRS = 384
"""Least number of pairs for what does not depend on rows: it costs nothing beside them, and the
priors of hierarchical models are far from quadratic."""

_ROUNDS = 4

_ENOUGH = 0.5
"""Share of effective draws from which on rounds end that change little."""

_SMALL = 0.03
"""Relative change of moments that is little."""

_MIN_EFFICIENCY = 0.2
"""Share of effective draws below which importance sampling is not trusted."""

_KEPT = 0.6
"""Share of the draws that another round must leave effective."""

_NEARLY_GAUSSIAN = 0.95
"""Share of effective draws below which some of the next ones go farther."""

_FAR = 3.0
"""Factor by which these go farther along a parameter."""

_FAR_SHARE = 0.25
"""Share of the draws that do."""

_STANDARD_ERRORS = 1.0
"""Standard errors up to which a correction of a moment is taken for noise."""

_MAX_STEPS = 100
"""Steps to the nearest Gaussian, beyond which there is none near."""

_TOLERANCE = 0.02
"""Standard deviations, or share of one, by which the last step changes a mean or a scale."""

_LONG = 0.1
"""Share of a whole step from which on a step counts as long."""

_NEAR = 0.2
"""Standard deviations within which the optimum is where no long step raises the bound."""

_MAX_RATIO = 4.0
"""Factor by which a variance may change in one step."""


class WeightedDraws(NamedTuple):
    """Draws with weights, by which they are from a density, and others, from a Gaussian near it."""

    mean: np.ndarray
    covariance: np.ndarray
    """Moments of the Gaussian."""
    points: np.ndarray
    weights: np.ndarray
    plain: np.ndarray
    efficiency: float
    """Effective number of draws over their number, 1 for a Gaussian density."""

    @property
    def is_efficient(self) -> bool:
        return self.efficiency > _MIN_EFFICIENCY

    def moments(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return mean, covariance and skewness of *x*, which is near to each of the points.

        Correlations stay as they are, and means and variances are corrected by what is beyond the
        noise.
        """
        # Differences between both kinds of weights, and between x and y, in which noise cancels.
        center, at = self.plain @ x, self.plain @ self.points
        offsets, y = x - center, self.points - at
        covariance = (self.plain * offsets.T) @ offsets - (self.plain * y.T) @ y
        mean, covariance = self.mean + (center - at), self.covariance + covariance
        shift = self.weights @ offsets
        squares = (offsets - shift) ** 2
        variance = self.weights @ squares
        skewness = self.weights @ (squares * (offsets - shift)) / variance**1.5
        growth = variance / (self.plain @ offsets**2) - 1
        spread = (self.weights - self.plain) ** 2
        shift = _beyond_noise(shift, np.sqrt(spread @ squares))
        ratio = np.sqrt(1 + _beyond_noise(growth, np.sqrt(spread @ (squares / variance - 1) ** 2)))
        return mean + shift, covariance * np.outer(ratio, ratio), skewness


def number_of_pairs(size: int, n_rows: int, n_likelihoods: int) -> tuple[int, int]:
    """Return how many pairs of draws likelihoods of rows get, and what has no rows.

    As many likelihoods of single rows as are given cost nothing.
    """
    most = max(_PRIOR_PAIRS, 8 * size)
    return min(max(_PAIRS, n_likelihoods // n_rows), most), most


def normal_draws(size: int, pairs: int, rng: np.random.Generator) -> np.ndarray:
    """Return half of antithetic draws, shape (n, size), n being *pairs* or *size* at least.

    A Latin hypercube (McKay, Beckman and Conover 1979) of absolute values has the moments of a
    normal distribution in each coordinate; its columns are then made orthogonal.
    """
    n = max(pairs, size)
    absolute = norm.ppf(0.5 + (np.arange(n) + 0.5) / (2 * n))
    draws = rng.permuted(np.tile(absolute[:, None], size), axis=0)
    draws *= rng.choice([-1.0, 1.0], draws.shape)
    u, _, v = np.linalg.svd(draws, full_matrices=False)
    return math.sqrt(n) * u @ v


class Probe:
    """A function of value and gradient at antithetic pairs of draws from a Gaussian N(μ, LLᵀ).

    Where the draws are those of :func:`normal_draws`, what is quadratic is integrated exactly.
    """

    def __init__(self, function: Function, draws: np.ndarray, mean: np.ndarray, scale: np.ndarray):
        self.draws, self.scale = draws, scale
        self.value, gradient = function(mean)
        self.gains, self.even, self.odd = np.zeros(len(draws)), *np.zeros((2, *draws.shape))
        for k, draw in enumerate(draws):
            offset = times(scale, draw)
            (up, slope), (down, opposite) = function(mean + offset), function(mean - offset)
            self.gains[k] = (up + down) / 2 - self.value
            self.even[k] = (slope + opposite) / 2 - gradient
            self.odd[k] = (slope - opposite) / 2
        self.value += self.gains.mean()
        """Expected value."""
        self.gradient = gradient + self.even.mean(axis=0)
        """Expected gradient."""

    def precision(self) -> np.ndarray:
        """Return -LᵀHL of the expected Hessian H, shape (d, d), by Stein's lemma."""
        slopes = self.draws.T @ self.odd @ self.scale / len(self.draws)
        return -(slopes + slopes.T) / 2

    def precision_variance(self) -> np.ndarray:
        """Return its variance by draws, along each parameter; 0 where none are left over."""
        n, size = self.draws.shape
        if n == size:
            return np.zeros(size)
        directions = self.scale / np.linalg.norm(self.scale, axis=1)[:, None]
        rest = self.odd - self.draws @ (self.draws.T @ self.odd) / n
        along = self.draws @ directions.T
        noise = along * (rest @ self.scale @ directions.T)
        return (noise**2).sum(0) / (along**2).sum(0) ** 2 * n / (n - size)

    def value_variance(self) -> float:
        """Return the variance of the expected value."""
        rest = self.gains + ((self.draws @ self.precision()) * self.draws).sum(axis=1) / 2
        return float(rest.var(ddof=1) / len(rest) + self.precision_variance().sum() / 4)


def best_gaussian(
    parts: Sequence[tuple[Function, np.ndarray]],
    mean: np.ndarray,
    covariance: np.ndarray,
) -> tuple[np.ndarray, np.ndarray] | None:
    """Return mean and covariance of the Gaussian with the highest evidence lower bound.

    There the expected gradient vanishes, and the covariance is the negative inverse of the expected
    Hessian (Opper and Archambeau 2009). Each step raises the bound; None if none can. The *parts*
    of the log density have their standard normal draws with them.
    """
    factor, share, eye = np.linalg.cholesky(covariance), 1.0, np.eye(len(mean))
    bound, gradient, precision = _expect(parts, mean, factor)
    for _ in range(_MAX_STEPS):
        if not (np.isfinite(precision).all() and np.isfinite(gradient).all()):
            return None
        values, vectors = np.linalg.eigh(precision)
        values = np.clip(values, 1 / _MAX_RATIO, _MAX_RATIO)
        rises = False
        while not rises and share > 1e-3:
            spread = factor @ vectors / np.sqrt(1 + share * (values - 1))
            covariance = spread @ spread.T
            try:
                new_factor = np.linalg.cholesky(covariance)
            except np.linalg.LinAlgError:  # it grows without end along an open direction
                return None
            new_mean = mean + share * covariance @ gradient
            new = _expect(parts, new_mean, new_factor)
            rises = new[0] >= bound - 1e-3 - 1e-10 * abs(bound)
            share = share if rises else share / 2
        sd, new_sd = np.linalg.norm(factor, axis=1), np.sqrt(np.diag(covariance))
        moved = max(np.abs((new_mean - mean) / new_sd).max(), np.abs(np.log(new_sd / sd)).max())
        if not rises:
            return None
        # A step that turns around what is left of the way has gone too far.
        way = ((precision - eye) * (new[2] - eye)).sum() / 2 + gradient @ covariance @ new[1]
        mean, factor, (bound, gradient, precision) = new_mean, new_factor, new
        # Draws are exact for quadratics only, and an optimum is where no long step raises the bound.
        if moved < (_TOLERANCE if share >= _LONG else _NEAR) * share:
            return mean, covariance
        share = min(1.0, 2 * share) if way > 0 else max(share / 2, _LONG)
    return None


def importance_draws(
    log_density: Callable[[np.ndarray], float],
    mean: np.ndarray,
    covariance: np.ndarray,
    pairs: int,
    rng: np.random.Generator,
    tailed: Sequence[int],
) -> WeightedDraws:
    """Return draws from a density near N(mean, covariance).

    Each round draws from the Gaussian with the moments of the one before, until enough draws are
    effective (Cappé et al. 2004); the largest weights are truncated (Ionides 2008). Where the
    density is not nearly Gaussian, some draws reach into the tails of the *tailed* parameters.
    Where few draws are effective, the weights are those of the Gaussian.
    """
    half, found = normal_draws(len(mean), pairs, rng), list[WeightedDraws]()
    # Which of the tailed parameters a draw goes far along, if any.
    far = rng.choice(len(tailed), len(half)), rng.random(len(half)) < _FAR_SHARE
    for n in range(_ROUNDS):
        factor = np.linalg.cholesky(covariance)
        draws, excess = half, np.zeros(2 * len(half))
        if n and found[-1].efficiency < _NEARLY_GAUSSIAN:
            draws, excess = _reach(half, factor[tailed], *far)
        draws = np.concatenate([draws, -draws])
        points = mean + draws @ factor.T
        logs = np.array([log_density(point) for point in points])
        logs = np.nan_to_num(logs, nan=-np.inf) + (draws**2).sum(axis=1) / 2 - excess
        weights = np.exp(logs - logs.max())
        weights = np.minimum(weights, weights.mean() * math.sqrt(len(weights)))
        weights, plain = weights / weights.sum(), np.exp(-excess) / np.exp(-excess).sum()
        efficiency = float(1 / (weights**2).sum() / len(weights))
        if n and efficiency < _KEPT * found[-1].efficiency:
            break
        found.append(WeightedDraws(mean, covariance, points, weights, plain, efficiency))
        before, sd = mean, np.sqrt(np.diag(covariance))
        mean, covariance, _ = found[-1].moments(points)
        new_sd = np.sqrt(np.diag(covariance))
        change = max(np.abs((mean - before) / new_sd).max(), np.abs(np.log(new_sd / sd)).max())
        if efficiency > _ENOUGH and change < _SMALL:
            break
    last = found[-1]
    if not last.is_efficient:
        return found[0]._replace(weights=found[0].plain, efficiency=last.efficiency)
    return last


def _reach(
    draws: np.ndarray, rows: np.ndarray, chosen: np.ndarray, is_far: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return standard normal draws, of which some are far along parameters, and both signs' log ratio.

    The *rows* of a factor of the covariance are those of the parameters, of which one is *chosen*
    for each draw. The ratio is that of the density of these draws over the standard normal one.
    """
    axes = rows / np.linalg.norm(rows, axis=1)[:, None]
    along = (draws * axes[chosen]).sum(axis=1) * is_far * (_FAR - 1)
    draws = draws + along[:, None] * axes[chosen]
    wide = np.exp((draws @ axes.T) ** 2 / 2 * (1 - _FAR**-2)).mean(axis=1) / _FAR
    return draws, np.tile(np.log(1 - _FAR_SHARE + _FAR_SHARE * wide), 2)


def _beyond_noise(estimate: np.ndarray, error: np.ndarray) -> np.ndarray:
    """Shrink estimates of small values, the more the less they exceed their standard errors."""
    noise = (_STANDARD_ERRORS * error) ** 2
    return estimate * np.maximum(0, 1 - noise / np.maximum(estimate**2, 1e-300))


def _expect(
    parts: Sequence[tuple[Function, np.ndarray]], mean: np.ndarray, factor: np.ndarray
) -> tuple[float, np.ndarray, np.ndarray]:
    """Return bound, expected gradient, and precision in the coordinates of the Gaussian."""
    probes = [Probe(function, draws, mean, factor) for function, draws in parts]
    bound = log_volume(factor) + sum(probe.value for probe in probes)
    gradient = np.sum([probe.gradient for probe in probes], axis=0)
    return bound, gradient, np.sum([probe.precision() for probe in probes], axis=0)
