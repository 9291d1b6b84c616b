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

from pymc.variational._streaming.errors import StreamError
from pymc.variational._streaming.fit.gaussian import log_volume
from pymc.variational._streaming.fit.gaussian_fit import Probe, normal_draws
from pymc.variational._streaming.fit.krylov import Products
from pymc.variational._streaming.fit.mean_field import MeanField, response_sd
from pymc.variational._streaming.fit.trust_region import Function, hessp

__all__ = ["Optimum", "Rows", "find_optimum", "is_dense"]

_MAX_DENSE = 512
"""Parameters of a mean-field approximation up to which the whole Hessian is estimated."""

_PAIRS = 8
"""Least number of pairs of draws at which the likelihoods of the sample are evaluated."""

_PAIRS_OF_MANY = 16
"""Pairs of draws of many parameters."""

_FEW_ROWS = 2**19
"""Likelihoods of rows below which more pairs cost nothing."""

_PRIOR_PAIRS = 384
"""The same of what does not depend on rows: it costs nothing beside them, and the priors of
hierarchical models are far from quadratic."""


class Rows(NamedTuple):
    """What is known of the likelihood, from all rows and from a sample of them."""

    likelihood: Function
    n_rows: int
    """Number of rows that the likelihood is evaluated at."""
    error: float
    """Relative error of its second derivatives by the choice of these rows."""
    factors: np.ndarray
    """Factors of rows and columns of its Hessian, shape (d,), which correct it for parameters of
    which the sample has few rows."""
    extra: np.ndarray
    """Second derivatives to add for those of which it has too few, shape (d,)."""
    shared: Sequence[int] = ()
    """Parameters of many whose standard deviations are worth the cost of exact ones."""


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
    elbo: float
    elbo_error: float
    """Standard error of the evidence lower bound, by draws and by the sample of rows."""


def is_dense(scale: np.ndarray) -> bool:
    """Whether the whole Hessian is estimated for an approximation of this scale."""
    return scale.ndim == 2 or len(scale) <= _MAX_DENSE


def find_optimum(
    mean: np.ndarray, scale: np.ndarray, rows: Rows, prior: Function, rng: np.random.Generator
) -> Optimum:
    """Return what a Newton step says about a Gaussian approximation."""
    find = _dense_optimum if is_dense(scale) else _iterative_optimum
    with np.errstate(over="ignore", invalid="ignore"):
        optimum = find(mean, scale, rows, prior, rng)
    if not (np.isfinite(optimum.step).all() and np.isfinite(optimum.elbo)):
        raise StreamError(
            "the log density is not finite at draws from approx, or has no finite gradient "
            "there; run the fit for longer, or keep the default transforms, so that no draw "
            "leaves the support of its variable"
        )
    constant = len(mean) * (1 + math.log(2 * math.pi)) / 2
    return optimum._replace(elbo=optimum.elbo + log_volume(scale) + constant)


def _dense_optimum(mean, scale, rows, prior, rng) -> Optimum:
    size, factor = len(mean), scale if scale.ndim == 2 else np.diag(scale)
    most = max(_PRIOR_PAIRS, 4 * size)
    pairs = min(max(_PAIRS, _FEW_ROWS // rows.n_rows), most)
    parts = (rows.likelihood, pairs), (prior, most)
    probes = [Probe(f, normal_draws(size, n, rng), mean, factor) for f, n in parts]
    gradient = probes[0].gradient + probes[1].gradient
    of_rows = probes[0].precision()
    precision = _correct(of_rows, factor, rows) + probes[1].precision()
    eigenvalues, vectors = np.linalg.eigh(np.nan_to_num(precision))
    concave = eigenvalues[0] > 0
    # Without a maximum the covariance of the approximation is all there is to measure steps by.
    inverse = np.linalg.inv(precision) if concave else np.eye(size)
    covariance = factor @ inverse @ factor.T
    step, sd = covariance @ gradient, np.sqrt(np.diag(covariance))
    s = 1 - np.diag(precision)
    if scale.ndim == 2 and concave:
        s = 1 - np.diag(factor @ factor.T) / sd**2
    sampling = rows.error * (1 + math.sqrt(size if scale.ndim == 2 else 1))
    variance = sum(probe.value_variance() for probe in probes)
    return Optimum(
        step=step,
        sd=sd if concave else np.full(size, np.nan),
        s=s,
        s_error=np.sqrt(sampling**2 + sum(probe.precision_variance() for probe in probes)),
        principal_s=1 - eigenvalues if scale.ndim == 2 else s,
        covariance=covariance if concave else None,
        solve=partial(np.matmul, covariance),
        precision=partial(np.matmul, precision),
        precisions=eigenvalues,
        weakest=np.abs(factor @ vectors[:, 0]) / np.linalg.norm(factor, axis=1),
        step_error=_step_error(probes, covariance, step, s) if concave else math.inf,
        elbo=probes[0].value + probes[1].value,
        elbo_error=math.sqrt(variance + (rows.error * np.trace(of_rows)) ** 2),
    )


def _correct(precision: np.ndarray, factor: np.ndarray, rows: Rows) -> np.ndarray:
    """Correct the precision that a sample gives for parameters of which it has few rows."""
    inverse = np.linalg.inv(factor)
    to, back = inverse @ (rows.factors[:, None] * factor), rows.extra[:, None] * factor
    return to.T @ precision @ to - factor.T @ back


def _step_error(probes: list[Probe], covariance: np.ndarray, step: np.ndarray, s) -> float:
    """Return how far a Newton step may miss, in standard deviations of the posterior.

    That is the error of few draws, and the more the larger the step and the change of scales
    are beside the reach of the draws.
    """
    sd = np.sqrt(np.diag(covariance))
    variances = [np.var(probe.even @ covariance, axis=0) / sd**2 for probe in probes]
    monte_carlo = np.sqrt(sum(v / len(p.draws) for v, p in zip(variances, probes)))
    whitened = np.linalg.solve(probes[0].scale, step)
    far = np.abs(s / np.maximum(np.abs(1 - s), 1e-3)).max() + np.mean(whitened**2)
    return float((monte_carlo + 2 * np.sqrt(sum(variances)) * far).max())


def _iterative_optimum(mean, scale, rows, prior, rng) -> Optimum:
    """Find the same in memory O(d), from products with the Hessian."""

    def evaluate(x: np.ndarray) -> tuple[float, np.ndarray]:
        (value, gradient), (more, slope) = rows.likelihood(x), prior(x)
        return value + more, gradient + slope

    size, product = len(mean), partial(_precision_at_mean, mean, scale, rows, prior)
    probe = Probe(evaluate, _moment_draws(size, _PAIRS_OF_MANY, rng), mean, scale)
    products = np.array([product(draw, corrected=False) for draw in probe.draws])
    # The diagonal of A differs from that at the mean by what the draws have beyond it.
    departure = -(probe.draws * (scale * probe.odd + products)).mean(axis=0)
    rest = probe.gains + (probe.draws * products).sum(axis=1) / 2
    solver = Products(lambda v: product(v) + departure * v, size, rng)
    concave, diagonal, s = solver.concave, solver.diagonal, 1 - solver.diagonal

    def solve(g: np.ndarray) -> np.ndarray:
        return scale * solver.solve(scale * g) if concave else scale**2 * g

    sd = scale / np.sqrt(np.where(diagonal > 0, diagonal, 1))
    sd = sd * np.sqrt(np.maximum(solver.inverse_diagonal(), 1))
    q = MeanField(mean, scale, np.inf)
    sd[list(rows.shared)] = response_sd(evaluate, q, rows.shared, rng)
    miss = np.abs(solve(probe.even.std(axis=0)) / sd).max() / math.sqrt(_PAIRS_OF_MANY)
    trace = (diagonal - departure).sum()
    variance = rest.var(ddof=1) / _PAIRS_OF_MANY + (solver.diagonal_error**2).sum() / 4
    return Optimum(
        step=solve(probe.gradient),
        sd=sd if concave else np.full(size, np.nan),
        s=s,
        s_error=np.hypot(solver.diagonal_error, 2 * rows.error),
        principal_s=s,
        covariance=None,
        solve=solve,
        precision=solver.product,
        precisions=solver.values,
        weakest=np.abs(solver.vectors[:, 0]),
        step_error=float(miss) if concave else math.inf,
        elbo=probe.value - probe.gains.mean() + rest.mean() - trace / 2,
        elbo_error=math.sqrt(variance + (rows.error * trace) ** 2),
    )


def _precision_at_mean(
    mean: np.ndarray, scale: np.ndarray, rows: Rows, prior: Function, v: np.ndarray, corrected=True
) -> np.ndarray:
    """Return -LᵀHL *v* of the Hessian H at the mean."""
    factors, extra = (rows.factors, rows.extra) if corrected else (1.0, 0.0)
    v = scale * v
    of_rows = hessp(lambda x: rows.likelihood(x)[1], mean, factors * v, scale)
    of_prior = hessp(lambda x: prior(x)[1], mean, v, scale)
    return -scale * (factors * of_rows + extra * v + of_prior)


def _moment_draws(size: int, pairs: int, rng: np.random.Generator) -> np.ndarray:
    """Draw halves of antithetic pairs with the first five moments of a normal, shape (n, size).

    Each coordinate has two absolute values, the larger of them in one pair.
    """
    small = 1 - math.sqrt(2 / (pairs - 1))
    squares = np.full((pairs, size), small)
    squares[rng.integers(0, pairs, size), np.arange(size)] = pairs - (pairs - 1) * small
    return np.sqrt(squares) * rng.choice([-1.0, 1.0], squares.shape)
