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

from scipy.stats import chi2

from pymc.variational._streaming.fit.trust_region import Function

__all__ = ["Moments", "best_gaussian", "importance_moments", "normal_draws"]

_PAIRS = 500
"""Pairs of antithetic draws."""

_ENOUGH = 0.5
"""Share of effective draws at which another round would change little."""

_ROUNDS = 4

_MAX_RATIO = 4.0
"""Factor by which a variance may change in one step."""


class Moments(NamedTuple):
    """Moments of a density."""

    mean: np.ndarray
    covariance: np.ndarray
    efficiency: float
    """Effective number of draws over their number, 1 for a Gaussian density."""


def normal_draws(size: int, pairs: int, rng: np.random.Generator) -> np.ndarray:
    """Return half of antithetic draws, sets of orthogonal ones, shape (n, size), n >= *pairs*.

    Second moments, over all, are those of a standard normal distribution, and so are lengths.
    """
    n_sets = math.ceil(pairs / size)
    squares = chi2.ppf((np.arange(n_sets) + 0.5) / n_sets, size)
    sets = []
    for length in np.sqrt(squares / squares.mean() * size):
        q, r = np.linalg.qr(rng.normal(size=(size, size)))
        sets.append(q * np.sign(np.diag(r)) * length)
    return np.concatenate(sets)


def best_gaussian(
    parts: Sequence[tuple[Function, np.ndarray]],
    mean: np.ndarray,
    covariance: np.ndarray,
    *,
    tolerance: float = 0.02,
    max_steps: int = 30,
) -> tuple[np.ndarray, np.ndarray] | None:
    """Return mean and covariance of the Gaussian with the highest evidence lower bound.

    There the expected gradient vanishes, and the covariance is the negative inverse of the expected
    Hessian (Opper and Archambeau 2009). Each step raises the bound; None if none can.

    Parameters
    ----------
    parts : sequence of (callable, ndarray)
        Parts of the log density, each with its standard normal draws.
    mean : ndarray, shape (d,)
    covariance : ndarray, shape (d, d)
    """
    size, share = len(mean), 1.0
    factor = np.linalg.cholesky(covariance)
    here = _expect(parts, mean, factor)
    for _ in range(max_steps):
        if not (np.isfinite(here.hessian).all() and np.isfinite(here.gradient).all()):
            return None
        values, vectors = np.linalg.eigh(-factor.T @ here.hessian @ factor)
        values = np.clip(values, 1 / _MAX_RATIO, _MAX_RATIO)
        while True:
            spread = vectors / np.sqrt(1 + share * (values - 1))
            covariance = factor @ spread @ (factor @ spread).T
            new_factor = np.linalg.cholesky(covariance)
            new_mean = mean + share * covariance @ here.gradient
            new = _expect(parts, new_mean, new_factor)
            if new.bound >= here.bound - 1e-3 - 1e-10 * abs(here.bound):
                break
            share /= 2
            if share < 1e-3:
                return None
        sd, new_sd = np.linalg.norm(factor, axis=1), np.sqrt(np.diag(covariance))
        moved = max(np.abs((new_mean - mean) / new_sd).max(), np.abs(np.log(new_sd / sd)).max())
        mean, factor, here = new_mean, new_factor, new
        if moved < tolerance * share:
            return mean, covariance
        share = min(1.0, 2 * share)
    return None


def importance_moments(
    log_density: Callable[[np.ndarray], float],
    mean: np.ndarray,
    covariance: np.ndarray,
    rng: np.random.Generator,
) -> Moments:
    """Return the moments of a density near N(mean, covariance).

    Each round draws from the Gaussian with the moments of the one before, until enough draws are
    effective (Cappé et al. 2004); the largest weights are truncated (Ionides 2008). Correlations
    stay as they are, and standard deviations are multiplied by ratios of weighted to unweighted
    draws, in which most of the noise cancels.
    """
    half = rng.normal(size=(_PAIRS, len(mean)))
    draws = np.concatenate([half, -half])
    best = Moments(mean, covariance, 0.0)
    for _ in range(_ROUNDS):
        offsets = draws @ np.linalg.cholesky(covariance).T
        logs = np.array([log_density(mean + offset) for offset in offsets])
        logs = np.nan_to_num(logs, nan=-np.inf) + (draws**2).sum(axis=1) / 2
        weights = np.exp(logs - logs.max())
        weights = np.minimum(weights, weights.mean() * math.sqrt(len(weights)))
        weights /= weights.sum()
        efficiency = float(1 / (weights**2).sum() / len(weights))
        if efficiency < best.efficiency:
            break
        shift = weights @ offsets
        ratio = np.sqrt((weights @ offsets**2 - shift**2) / (offsets**2).mean(axis=0))
        mean, covariance = mean + shift, covariance * np.outer(ratio, ratio)
        best = Moments(mean, covariance, efficiency)
        if efficiency > _ENOUGH:
            break
    return best


class _Expectation(NamedTuple):
    bound: float
    gradient: np.ndarray
    hessian: np.ndarray


def _expect(
    parts: Sequence[tuple[Function, np.ndarray]], mean: np.ndarray, factor: np.ndarray
) -> _Expectation:
    """Return bound, expected gradient and Hessian, from antithetic draws (Stein's lemma)."""
    size = len(mean)
    bound = float(np.log(np.diag(factor)).sum())
    expected, slopes = np.zeros(size), np.zeros((size, size))
    for function, draws in parts:
        odd = np.zeros((len(draws), size))
        for k, draw in enumerate(draws):
            offset = factor @ draw
            (value, gradient), (opposite, other) = function(mean + offset), function(mean - offset)
            bound += (value + opposite) / 2 / len(draws)
            expected += (gradient + other) / 2 / len(draws)
            odd[k] = (gradient - other) / 2
        slopes += draws.T @ odd / len(draws)
    hessian = np.linalg.solve(factor.T, slopes)
    return _Expectation(bound, expected, (hessian + hessian.T) / 2)
