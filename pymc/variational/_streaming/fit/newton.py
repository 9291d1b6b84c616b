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
"""Where a Gaussian approximation should be, from the log density around it.

Everything is computed in the coordinates of the approximation itself, θ = μ + Lε with
ε ~ N(0, I). There the precision of the posterior is A = -LᵀHL, H being the expected Hessian of
the log density, and A = I where the approximation is right.
"""

import math

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from scipy.stats import chi2

from pymc.variational._streaming.errors import StreamError
from pymc.variational._streaming.fit.density import Term
from pymc.variational._streaming.fit.krylov import Matrix, Products

__all__ = ["Optimum", "Sample", "find_optimum", "is_dense", "lower_bound"]

_MAX_DENSE = 256
"""Parameters of a mean-field approximation up to which the whole Hessian is estimated."""

_MAX_EXPLICIT = 512
"""Parameters up to which a matrix takes the place of its products, which are hardly fewer."""

_PAIRS = 8
"""Least number of pairs of draws at which the likelihoods of the sample are evaluated."""

_FEW_ROWS = 2**18
"""Likelihoods of rows below which more pairs cost nothing."""

_PRIOR_PAIRS = 384
"""The same of what does not depend on rows: it costs nothing beside them, and the priors of
hierarchical models are far from quadratic."""


class Sample(NamedTuple):
    """Rows that stand for all rows of a stream."""

    term: Term
    blocks: list[np.ndarray]
    weight: float
    """Number of rows that each of them stands for."""
    factors: np.ndarray
    """Factors of rows and columns of the weighted Hessian, shape (d,), which correct it for
    parameters of which the sample has few rows."""
    extra: np.ndarray
    """Second derivatives to add for those of which it has too few, shape (d,)."""


class Optimum(NamedTuple):
    """What one Newton step says about the approximation."""

    step: np.ndarray
    """Newton step of the means, shape (d,)."""
    sd: np.ndarray
    """Standard deviations of the posterior by linear response, NaN if it is not concave."""
    s: np.ndarray
    """1 - (scale / right scale)² of each parameter."""
    s_error: np.ndarray
    """Standard error of *s*."""
    principal_s: np.ndarray
    """The same along the principal directions of a full-rank approximation, whose correlations
    may be wrong though the scales are right; otherwise *s*."""
    covariance: np.ndarray | None
    """Covariance of the posterior, None of many parameters."""
    solve: Callable[[np.ndarray], np.ndarray]
    """Newton step that a gradient of shape (d,) leads to."""
    precision: Callable[[np.ndarray], np.ndarray]
    """Product of A and a vector of shape (d,)."""
    precisions: np.ndarray
    """Some eigenvalues of A, the smallest first."""
    weakest: np.ndarray
    """Part of each parameter in the direction of the smallest of them, shape (d,)."""
    step_error: float
    """Standard deviations by which the step may miss, the log density not being quadratic."""
    expected: float
    """Expected log density less that at the mean."""
    expected_variance: float
    """Its variance, by draws and by the sample of rows."""


def is_dense(scale: np.ndarray) -> bool:
    """Whether the whole Hessian is estimated for an approximation of this scale."""
    return scale.ndim == 2 or len(scale) <= _MAX_DENSE


def lower_bound(scale: np.ndarray, value: float, optimum: Optimum) -> tuple[float, float]:
    """Return the evidence lower bound, given the log density at the mean, and its error."""
    diagonal = np.diag(scale) if scale.ndim == 2 else scale
    entropy = np.log(diagonal).sum() + len(diagonal) * (1 + math.log(2 * math.pi)) / 2
    return float(value + optimum.expected + entropy), math.sqrt(optimum.expected_variance)


def find_optimum(
    mean: np.ndarray,
    scale: np.ndarray,
    gradient: np.ndarray,
    samples: Sequence[Sample],
    prior: Term,
    rng: np.random.Generator,
) -> Optimum:
    """Return what a Newton step says, given the gradient of the log density at the mean.

    What the draws change about value and gradient, and the Hessian, come from samples of rows and
    from the *prior*.
    """
    function = _dense_optimum if is_dense(scale) else _iterative_optimum
    with np.errstate(over="ignore", invalid="ignore"):
        return function(mean, scale, gradient, samples, prior, rng)


class _Probe:
    """Sums over parts of a log density, at antithetic pairs of draws from N(μ, LLᵀ).

    There is a pair for each dimension, or more. All is relative to the log density at the mean.
    """

    def __init__(
        self, mean: np.ndarray, scale: np.ndarray, *, pairs: int, rng: np.random.Generator
    ):
        size = len(mean)
        self._mean, self._factor = mean, _factor(scale)
        self._draws = _orthogonal_draws(size, pairs, rng)
        self._logp = np.zeros(len(self._draws))
        self._odd = np.zeros((len(self._draws), size))
        self._even = np.zeros((len(self._draws), size))
        self._shifts: list[float] = []

    def add(self, part: Callable[[np.ndarray], tuple[float, np.ndarray]], weight: float) -> None:
        """Add *weight* times a part, which returns value and gradient."""
        logp, gradient = part(self._mean)
        shift = 0.0
        for pair, draw in enumerate(self._draws):
            offset = self._factor @ draw
            (logp_up, up), (logp_down, down) = part(self._mean + offset), part(self._mean - offset)
            shift += weight * ((logp_up + logp_down) / 2 - logp)
            self._logp[pair] += weight * ((logp_up + logp_down) / 2 - logp)
            self._odd[pair] += weight * (up - down) / 2
            self._even[pair] += weight * ((up + down) / 2 - gradient)
        self._shifts.append(shift / len(self._draws))

    @property
    def gradient(self) -> np.ndarray:
        """Expected gradient less that at the mean."""
        return self._even.mean(axis=0)

    def precision(self) -> np.ndarray:
        """Return the part in A, by least squares over the draws."""
        slopes = np.linalg.lstsq(self._draws, self._odd)[0] @ self._factor
        return -(slopes + slopes.T) / 2

    def precision_variance(self) -> np.ndarray:
        """Return the variance of A by draws, along each parameter; 0 where none are left over."""
        n_left = len(self._draws) - len(self._mean)
        if not n_left:
            return np.zeros(len(self._mean))
        directions = self._factor / np.linalg.norm(self._factor, axis=1)[:, None]
        rest = self._odd - self._draws @ np.linalg.lstsq(self._draws, self._odd)[0]
        along = self._draws @ directions.T
        noise = along * (rest @ self._factor @ directions.T)
        return (noise**2).sum(0) / (along**2).sum(0) ** 2 * len(self._draws) / n_left

    def expectation(self, precision: np.ndarray, weight: float = 1.0) -> tuple[float, float]:
        """Return the expected log density and its variance, by draws and by sampled parts.

        Its quadratic part is integrated exactly; the draws serve the rest.
        """
        rest = self._logp + np.einsum("ki,ij,kj->k", self._draws, precision, self._draws) / 2
        variance = rest.var(ddof=1) / len(rest)
        if weight > 1 and len(self._shifts) > 1:
            variance += len(self._shifts) * np.var(self._shifts, ddof=1) * (1 - 1 / weight)
        return float(rest.mean() - np.trace(precision) / 2), float(variance)

    def step_variance(self, covariance: np.ndarray) -> tuple[np.ndarray, int]:
        """Return the variance of the Newton steps of single pairs, and the number of pairs."""
        return np.var(self._even @ covariance, axis=0), len(self._draws)


def _dense_optimum(mean, scale, gradient, samples, prior, rng) -> Optimum:
    factor = _factor(scale)
    probes, precision, expected, variance = [], np.zeros_like(factor), 0.0, 0.0
    for sample in samples:
        pairs = _FEW_ROWS // sum(map(len, sample.blocks))
        pairs = min(max(_PAIRS, pairs), _PRIOR_PAIRS)
        probe = _Probe(mean, scale, pairs=pairs, rng=rng)
        for block in sample.blocks:
            probe.add(partial(sample.term.value_and_gradient, rows=block), sample.weight)
        part = _correct(probe.precision(), factor, sample)
        probes.append((probe, part, sample.weight))
    probe = _Probe(mean, scale, pairs=_PRIOR_PAIRS, rng=rng)
    probe.add(prior.value_and_gradient, 1.0)
    probes.append((probe, probe.precision(), 1.0))
    for probe, part, weight in probes:
        value, error = probe.expectation(probe.precision(), weight)
        expected, variance = expected + value, variance + error
        variance += probe.precision_variance().sum() / 4  # of the trace that was integrated
        precision, gradient = precision + part, gradient + probe.gradient
    _require_finite(gradient, expected)
    eigenvalues, vectors = np.linalg.eigh(precision)
    concave = eigenvalues[0] > 0
    # Without a maximum the covariance of the approximation is all there is to measure steps by.
    inverse = np.linalg.inv(precision) if concave else np.eye(len(mean))
    covariance = factor @ inverse @ factor.T
    step, sd = covariance @ gradient, np.sqrt(np.diag(covariance))
    s = 1 - np.diag(precision)
    if scale.ndim == 2 and concave:
        s = 1 - np.diag(factor @ factor.T) / sd**2
    variances = [probe.step_variance(covariance) for probe, _, _ in probes]
    miss = _step_error(variances, inverse @ factor.T @ gradient, s)
    return Optimum(
        step=step,
        sd=sd if concave else np.full(len(sd), np.nan),
        s=s,
        s_error=np.sqrt(
            _sampling_error(samples, len(s) if scale.ndim == 2 else 1) ** 2
            + sum(probe.precision_variance() for probe, _, _ in probes)
        ),
        principal_s=1 - eigenvalues if scale.ndim == 2 else s,
        covariance=covariance if concave else None,
        solve=partial(np.matmul, covariance),
        precision=partial(np.matmul, precision),
        precisions=eigenvalues,
        weakest=np.abs(factor @ vectors[:, 0]) / np.linalg.norm(factor, axis=1),
        step_error=float((miss / sd).max()) if concave else math.inf,
        expected=expected,
        expected_variance=variance,
    )


def _iterative_optimum(mean, scale, gradient, samples, prior, rng) -> Optimum:
    """Find the same in memory O(d), from Hessian-vector products and Krylov spaces."""
    size = len(mean)
    at_mean = partial(_precision_at_mean, mean=mean, scale=scale, samples=samples, prior=prior)
    even, departure, rest = _beyond_quadratic(mean, scale, samples, prior, at_mean, rng)
    gradient = gradient + even.mean(axis=0)
    _require_finite(gradient, float(rest.sum()))

    def precision(v: np.ndarray) -> np.ndarray:
        return at_mean(v) + departure * v

    solver: Matrix | Products
    if size <= _MAX_EXPLICIT:
        solver = Matrix(np.array([precision(unit) for unit in np.eye(size)]), rng)
    else:
        solver = Products(precision, size, rng)
    concave, diagonal, s = solver.concave, solver.diagonal, 1 - solver.diagonal

    def solve(g: np.ndarray) -> np.ndarray:
        return scale * solver.solve(scale * g) if concave else scale**2 * g

    sd = scale / np.sqrt(np.where(diagonal > 0, diagonal, 1))
    sd = sd * np.sqrt(np.maximum(solver.inverse_diagonal, 1))
    error = solve(even.std(axis=0)) / math.sqrt(_PAIRS)
    return Optimum(
        step=solve(gradient),
        sd=sd if concave else np.full(size, np.nan),
        s=s,
        s_error=np.hypot(solver.diagonal_error, _sampling_error(samples, 1)),
        principal_s=s,
        covariance=None,
        solve=solve,
        precision=solver.product,
        precisions=solver.ritz.values,
        weakest=np.abs(solver.ritz.vectors[:, 0]),
        step_error=float(np.abs(error / sd).max()) if concave else math.inf,
        expected=float(rest.mean() - (diagonal - departure).sum() / 2),
        expected_variance=float(rest.var(ddof=1) / _PAIRS + (solver.diagonal_error**2).sum() / 4),
    )


def _precision_at_mean(
    v: np.ndarray, corrected: bool = True, *, mean, scale, samples, prior
) -> np.ndarray:
    """Return the precision at *mean* times *v*, in the coordinates of the approximation."""
    total = prior.hessp(mean, scale * v)
    for sample in samples:
        factors = sample.factors if corrected else 1.0
        for block in sample.blocks:
            product = sample.term.hessp(mean, factors * scale * v, block)
            total += sample.weight * factors * product
        total += corrected * sample.extra * scale * v
    return -scale * total


def _beyond_quadratic(
    mean, scale, samples, prior, at_mean, rng
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return what draws show beyond the quadratic that the precision at the mean gives.

    These are the even part of the gradient and the rest of the log density for each pair of draws,
    and in between the mean departure of the diagonal of the precision.
    """

    def evaluate(x: np.ndarray) -> tuple[float, np.ndarray]:
        value, total = prior.value_and_gradient(x)
        for sample in samples:
            for block in sample.blocks:
                more, part = sample.term.value_and_gradient(x, block)
                value, total = value + sample.weight * more, total + sample.weight * part
        return value, total

    value, gradient = evaluate(mean)
    draws = _moment_draws(len(mean), _PAIRS, rng)
    even, departure, rest = np.zeros_like(draws), np.zeros_like(mean), np.zeros(_PAIRS)
    for pair, draw in enumerate(draws):
        (logp_up, up), (logp_down, down) = (
            evaluate(mean + side * scale * draw) for side in (1, -1)
        )
        product = at_mean(draw, corrected=False)
        even[pair] = (up + down) / 2 - gradient
        departure -= draw * (scale * (up - down) / 2 + product) / _PAIRS
        rest[pair] = (logp_up + logp_down) / 2 - value + draw @ product / 2
    return even, departure, rest


def _sampling_error(samples: Sequence[Sample], size: int) -> float:
    """Return the relative error of second derivatives by samples, along the worst of directions."""
    error = 0.0
    for sample in samples:
        if sample.weight > 1:
            n_rows = sum(map(len, sample.blocks))
            error = max(error, (1 + math.sqrt(size)) / math.sqrt(n_rows))
    return error


def _correct(precision: np.ndarray, factor: np.ndarray, sample: Sample) -> np.ndarray:
    """Correct the precision that a sample gives for parameters of which it has few rows."""
    if (sample.factors == 1).all():
        return precision
    inverse = np.linalg.inv(factor)
    hessian = -inverse.T @ precision @ inverse
    hessian = sample.factors[:, None] * hessian * sample.factors + np.diag(sample.extra)
    return -factor.T @ hessian @ factor


def _require_finite(gradient: np.ndarray, value: float) -> None:
    if not (np.isfinite(gradient).all() and np.isfinite(value)):
        raise StreamError(
            "the log density is not finite at draws from approx, or has no finite gradient "
            "there; run the fit for longer, or keep the default transforms, so that no draw "
            "leaves the support of its variable"
        )


def _step_error(
    variances: Sequence[tuple[np.ndarray, int]], step: np.ndarray, s: np.ndarray
) -> np.ndarray:
    """Return how far a Newton step may miss.

    That is the error of few draws, and the more the larger the step and the change of scales
    are beside the reach of the draws.
    """
    monte_carlo = np.sqrt(sum(variance / n for variance, n in variances))
    single = np.sqrt(sum(variance for variance, _ in variances))
    narrowest = np.maximum(np.abs(1 - s), 1e-3)
    return monte_carlo + 2 * single * (np.abs(s / narrowest).max() + np.mean(step**2))


def _factor(scale: np.ndarray) -> np.ndarray:
    return scale if scale.ndim == 2 else np.diag(scale)


def _orthogonal_draws(size: int, pairs: int, rng: np.random.Generator) -> np.ndarray:
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


def _moment_draws(size: int, pairs: int, rng: np.random.Generator) -> np.ndarray:
    """Draw halves of antithetic pairs with the first five moments of a normal, shape (n, size).

    Each coordinate has two absolute values, the larger of them in one pair.
    """
    small = 1 - math.sqrt(2 / (pairs - 1))
    squares = np.full((pairs, size), small)
    squares[rng.integers(0, pairs, size), np.arange(size)] = pairs - (pairs - 1) * small
    return np.sqrt(squares) * rng.choice([-1.0, 1.0], squares.shape)
