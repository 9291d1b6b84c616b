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
"""The Gaussian approximation of a density, by Newton steps on its evidence lower bound."""

import math

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from scipy.stats import chi2

__all__ = ["Gaussian", "best_gaussian", "best_scales", "normal_draws"]

Function = Callable[[np.ndarray], tuple[float, np.ndarray]]

_MAX_RATIO = 4.0
"""Factor by which a variance may change in one step."""


class Gaussian(NamedTuple):
    """A Gaussian approximation."""

    mean: np.ndarray
    covariance: np.ndarray
    bound: float
    """Its evidence lower bound, but for a constant."""
    converged: bool


class _Expectation(NamedTuple):
    bound: float
    gradient: np.ndarray
    hessian: np.ndarray


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
    show: Callable[[float], None] = lambda distance: None,
) -> Gaussian:
    """Return the Gaussian with the highest bound, from steps that each raise it.

    At the optimum the expected gradient vanishes and the covariance is the negative inverse of
    the expected Hessian (Opper and Archambeau 2009).

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
                return Gaussian(mean, factor @ factor.T, here.bound, False)
        sd, new_sd = np.linalg.norm(factor, axis=1), np.sqrt(np.diag(covariance))
        moved = max(np.abs((new_mean - mean) / new_sd).max(), np.abs(np.log(new_sd / sd)).max())
        mean, factor, here = new_mean, new_factor, new
        show(moved / share)
        if moved < tolerance * share:
            return Gaussian(mean, covariance, here.bound, True)
        share = min(1.0, 2 * share)
    return Gaussian(mean, factor @ factor.T, here.bound, False)


def best_scales(
    parts: Sequence[tuple[Function, np.ndarray]],
    mean: np.ndarray,
    scales: np.ndarray,
    *,
    max_steps: int = 10,
) -> tuple[np.ndarray, float]:
    """Return the standard deviations of the best mean-field Gaussian, and its bound."""
    best, bound = scales, -np.inf
    for _ in range(max_steps):
        here = _expect(parts, mean, np.diag(scales))
        if here.bound < bound:
            return best, bound
        best, bound = scales, here.bound
        ratio = -np.diag(here.hessian) * scales**2
        scales = scales / np.sqrt(np.clip(ratio, 1 / _MAX_RATIO, _MAX_RATIO))
        if np.abs(np.log(scales / best)).max() < 1e-3:
            break
    return best, bound


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
