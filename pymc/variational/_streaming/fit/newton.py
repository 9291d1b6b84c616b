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
"""Where a Gaussian approximation should be, from the log density at draws of it.

Everything is computed in the coordinates of the approximation itself, θ = μ + Lε with
ε ~ N(0, I). There the Hessian of the log density is A = LᵀHL, and -I where the scales are
right.
"""

import math

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from scipy.linalg import hadamard
from scipy.stats import chi2
from scipy.stats import f as f_distribution

from pymc.variational._streaming.errors import StreamError
from pymc.variational._streaming.fit.bins import Moments, merge

__all__ = ["Optimum", "Probe", "between_within_ratio", "lower_bound", "newton_step"]

_MAX_DENSE = 64
"""Parameters of a mean-field approximation up to which the whole Hessian is estimated."""

_SIGN_PAIRS = 64
"""Pairs of draws that estimate the diagonal of the Hessian, a power of two."""

_FALSE_ALARM = 1e-6
"""Probability at which rows in random order are taken for ordered ones."""

_MIN_RATIO = 5.0
"""Variance ratio below which an order of the rows is not worth a word."""


class Optimum(NamedTuple):
    """What one Newton step says about the approximation."""

    z: np.ndarray
    """Standard deviations of the posterior by which each mean is too high."""
    s: np.ndarray
    """1 - (scale / right scale)² of each parameter."""
    principal_s: np.ndarray
    """The same along the principal directions of a full-rank approximation, whose correlations
    may be wrong though the scales are right; otherwise *s*."""
    mean: np.ndarray
    """Mean to which the step leads."""
    scale: np.ndarray | None
    """Scales there, None if they are not known."""
    step_error: float
    """Standard deviations by which the step may miss, the log density not being quadratic.
    Infinite where it is not concave, NaN where the Hessian is not known."""


class Probe:
    """Sums over parts of a log density, at antithetic pairs of draws from N(μ, LLᵀ).

    There are *pairs* of them or more: one for each dimension where the whole Hessian is estimated.
    The *scale* is a vector of standard deviations, or a lower Cholesky factor.
    """

    def __init__(
        self, mean: np.ndarray, scale: np.ndarray, *, pairs: int, rng: np.random.Generator
    ):
        size = len(mean)
        self._mean, self._scale = mean, scale
        self._dense = is_dense(scale)
        self._draws = _normal_draws(size, pairs, rng) if self._dense else _sign_draws(size, rng)
        n_draws = len(self._draws)
        self.gradient = np.zeros(size)
        """Expected gradient of all parts."""
        self._logp = np.zeros(n_draws)
        self._cross = np.zeros((size, size) if self._dense else size)
        """Sum over draws of ε times the odd part of the gradient, the slope of which is A."""
        self._even = np.zeros((n_draws if self._dense else 0, size))
        """Even part of the gradient at each draw."""

    def add(self, part: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
        """Add a part, which returns value and gradient; return its expected gradient."""
        gradient = np.zeros_like(self.gradient)
        for pair, draw in enumerate(self._draws):
            offset = self._scale @ draw if self._scale.ndim == 2 else self._scale * draw
            (logp_up, up), (logp_down, down) = part(self._mean + offset), part(self._mean - offset)
            self._logp[pair] += (logp_up + logp_down) / 2
            even, odd = (up + down) / 2, (up - down) / 2
            gradient += even / len(self._draws)
            self._cross += np.outer(draw, odd) if self._dense else draw * odd
            if self._dense:
                self._even[pair] += even
        if not (np.isfinite(self._logp).all() and np.isfinite(gradient).all()):
            raise StreamError(
                "the log density is not finite at draws from approx, or has no finite gradient "
                "there; run the fit for longer, or keep the default transforms, so that no draw "
                "leaves the support of its variable"
            )
        self.gradient += gradient
        return gradient

    def curvature(self) -> np.ndarray:
        """Return the expected A, by least squares over the draws, or its diagonal."""
        if not self._dense:
            return self._scale * self._cross / len(self._draws)
        slopes = np.linalg.solve(self._draws.T @ self._draws, self._cross) @ _factor(self._scale)
        return (slopes + slopes.T) / 2

    def expectation(self) -> tuple[float, float]:
        """Return the expected log density and its Monte Carlo variance.

        Its quadratic part is integrated exactly; the draws serve the rest.
        """
        rest, exact = self._logp, 0.0
        if self._dense:
            curved = self.curvature()
            rest = rest - np.einsum("ki,ij,kj->k", self._draws, curved, self._draws) / 2
            exact = np.trace(curved) / 2
        return rest.mean() + exact, rest.var(ddof=1) / len(rest)

    def step_variance(self, covariance: np.ndarray) -> tuple[np.ndarray, int]:
        """Return the variance of the Newton steps of single pairs, and the number of pairs."""
        return np.var(self._even @ covariance, axis=0), len(self._draws)


def is_dense(scale: np.ndarray) -> bool:
    """Whether the whole Hessian is estimated for an approximation of this scale."""
    return scale.ndim == 2 or len(scale) <= _MAX_DENSE


def lower_bound(scale: np.ndarray, probes: Sequence[Probe]) -> tuple[float, float]:
    """Return the evidence lower bound, and its Monte Carlo error."""
    expected, variances = zip(*(probe.expectation() for probe in probes))
    diagonal = np.diag(scale) if scale.ndim == 2 else scale
    entropy = np.log(diagonal).sum() + len(diagonal) * (1 + math.log(2 * math.pi)) / 2
    return float(sum(expected) + entropy), math.sqrt(sum(variances))


def newton_step(mean: np.ndarray, scale: np.ndarray, probes: Sequence[Probe]) -> Optimum:
    """Return what a Newton step on the parts of all probes together says."""
    curved = np.sum([probe.curvature() for probe in probes], axis=0)
    gradient = np.sum([probe.gradient for probe in probes], axis=0)
    if not is_dense(scale):
        sd = scale / np.sqrt(np.where(curved < 0, -curved, 1))
        s = 1 + curved
        return Optimum(-sd * gradient, s, s, mean + sd**2 * gradient, None, np.nan)
    factor = _factor(scale)
    principal_s = 1 + np.linalg.eigvalsh(curved)
    if principal_s[-1] >= 1:
        # The density is not concave: take the approximation's own covariance for the posterior's.
        sd = np.linalg.norm(factor, axis=1)
        step, s = factor @ factor.T @ gradient, 1 + np.diag(curved)
        return Optimum(-step / sd, s, principal_s, mean + step, None, np.inf)
    inverse = np.linalg.inv(-curved)
    covariance = factor @ inverse @ factor.T
    step, sd = covariance @ gradient, np.sqrt(np.diag(covariance))
    if scale.ndim == 2:
        s, best = 1 - np.diag(factor @ factor.T) / sd**2, np.linalg.cholesky(covariance)
    else:
        s, best = 1 + np.diag(curved), scale / np.sqrt(-np.diag(curved))
        principal_s = s
    variances = [probe.step_variance(covariance) for probe in probes]
    error = _step_error(variances, inverse @ factor.T @ gradient, s)
    return Optimum(-step / sd, s, principal_s, mean + step, best, (error / sd).max())


def between_within_ratio(parts: Sequence[Moments]) -> float:
    """Return the variance between parts over that within them, of the worst parameter.

    It is about 1 for parts of a stream in random order, and 0 is returned if such a stream would
    reach it by chance.
    """
    whole, inside = merge(parts), sum(part.squares for part in parts)
    between, within = len(parts) - 1, whole.n - len(parts)
    if min(between, within) < 7:
        return 0.0
    with np.errstate(all="ignore"):
        ratio = np.nan_to_num((whole.squares - inside) / between / (inside / within)).max()
    chance = f_distribution.sf(ratio, between, within) * len(whole.mean)
    return float(ratio) if ratio > _MIN_RATIO and chance < _FALSE_ALARM else 0.0


def _step_error(
    variances: Sequence[tuple[np.ndarray, int]], step: np.ndarray, s: np.ndarray
) -> np.ndarray:
    """Return how far a Newton step may miss.

    That is the error of few draws, and the more the larger the step and the change of scales
    are beside the reach of the draws.
    """
    monte_carlo = np.sqrt(sum(variance / n for variance, n in variances))
    single = np.sqrt(sum(variance for variance, _ in variances))
    return monte_carlo + 2 * single * (np.abs(s / (1 - s)).max() + np.mean(step**2))


def _factor(scale: np.ndarray) -> np.ndarray:
    return scale if scale.ndim == 2 else np.diag(scale)


def _normal_draws(size: int, pairs: int, rng: np.random.Generator) -> np.ndarray:
    """Draw vectors, each *size* of which are orthogonal, shape (n, size).

    Their lengths are those of normal vectors, in even proportions.
    """
    turns = math.ceil(pairs / size)
    directions = np.concatenate([_rotation(size, rng) for _ in range(turns)])
    lengths = chi2.ppf((rng.permutation(turns * size) + 0.5) / (turns * size), size)
    return directions * np.sqrt(lengths * size / lengths.mean())[:, None]


def _rotation(size: int, rng: np.random.Generator) -> np.ndarray:
    q, r = np.linalg.qr(rng.normal(size=(size, size)))
    return q * np.sign(np.diag(r))


def _sign_draws(size: int, rng: np.random.Generator) -> np.ndarray:
    """Draw signs in Hadamard patterns, which the dimensions share at random, shape (n, size)."""
    patterns = rng.permutation(size) % _SIGN_PAIRS
    signs = rng.choice(np.array([-1, 1], "int8"), size)
    return hadamard(_SIGN_PAIRS, "int8")[:, patterns] * signs
