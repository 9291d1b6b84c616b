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

from scipy.sparse.linalg import LinearOperator, cg

from pymc.variational._streaming.fit.gaussian import log_volume
from pymc.variational._streaming.fit.gaussian_fit import Probe, normal_draws, number_of_pairs
from pymc.variational._streaming.fit.mean_field import MeanField, moment_draws, response
from pymc.variational._streaming.fit.trust_region import Function, hessp

__all__ = ["MAX_DENSE", "Optimum", "Rows", "find_optimum", "is_dense"]

MAX_DENSE = 512
"""Parameters up to which the whole Hessian is estimated."""

_PAIRS_OF_MANY = 16
"""Pairs of draws of many parameters."""

_FEW_LIKELIHOODS = 2**19
"""Likelihoods of rows that cost little beside a pass over all rows."""

_STEPS = 40
"""Products that find the extreme directions."""

_SIGNS = 32
"""Random vectors of signs that estimate the diagonal."""

_MAX_PRODUCTS = 128
"""Products that solve for a vector, at most."""


class Rows(NamedTuple):
    """What is known of a log density, from all rows and from a sample of them."""

    likelihood: Function
    prior: Function
    n_rows: int
    """Number of rows that the likelihood is evaluated at."""
    error: float
    """Relative error of its second derivatives by the choice of these rows."""
    shared: Sequence[int] = ()
    """Parameters of many whose standard deviations are worth the cost of exact ones."""

    def value_and_gradient(self, x: np.ndarray) -> tuple[float, np.ndarray]:
        """Return the log density and its gradient."""
        (value, gradient), (more, slope) = self.likelihood(x), self.prior(x)
        return value + more, gradient + slope


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
    shifts: np.ndarray
    """Standard deviations by which means of the shared parameters are higher than a Gaussian's."""
    elbo: float
    elbo_error: float
    """Standard error of the evidence lower bound, by draws and by the sample of rows."""


def is_dense(scale: np.ndarray) -> bool:
    """Whether the whole Hessian is estimated for an approximation of this scale."""
    return scale.ndim == 2 or len(scale) <= MAX_DENSE


def find_optimum(
    mean: np.ndarray, scale: np.ndarray, rows: Rows, rng: np.random.Generator
) -> Optimum:
    """Return what a Newton step says about a Gaussian approximation."""
    find = _dense_optimum if is_dense(scale) else _iterative_optimum
    optimum = find(mean, scale, rows, rng)
    constant = len(mean) * (1 + math.log(2 * math.pi)) / 2
    return optimum._replace(elbo=optimum.elbo + log_volume(scale) + constant)


def _dense_optimum(
    mean: np.ndarray, scale: np.ndarray, rows: Rows, rng: np.random.Generator
) -> Optimum:
    size, factor = len(mean), scale if scale.ndim == 2 else np.diag(scale)
    parts = zip((rows.likelihood, rows.prior), number_of_pairs(size, rows.n_rows, _FEW_LIKELIHOODS))
    probes = [Probe(f, normal_draws(size, n, rng), mean, factor) for f, n in parts]
    gradient = probes[0].gradient + probes[1].gradient
    of_rows = probes[0].precision()
    precision = of_rows + probes[1].precision()
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
        shifts=np.zeros(0),
        elbo=probes[0].value + probes[1].value,
        elbo_error=math.sqrt(variance + (rows.error * np.trace(of_rows)) ** 2),
    )


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


def _iterative_optimum(
    mean: np.ndarray, scale: np.ndarray, rows: Rows, rng: np.random.Generator
) -> Optimum:
    """Find the same in memory O(d), from products with the Hessian."""

    def product(v: np.ndarray) -> np.ndarray:
        """Return -LᵀHL *v* of the Hessian H at the mean."""
        return -scale * hessp(lambda x: rows.value_and_gradient(x)[1], mean, scale * v, scale)

    size = len(mean)
    probe = Probe(rows.value_and_gradient, moment_draws(size, _PAIRS_OF_MANY, rng), mean, scale)
    products = np.array([product(draw) for draw in probe.draws])
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
    sd[list(rows.shared)], shifts = response(rows.value_and_gradient, q, rows.shared, rng)
    noise = rng.choice([-1.0, 1.0], _PAIRS_OF_MANY) @ (probe.even - probe.even.mean(axis=0))
    miss = np.abs(solve(noise) / sd).max() / _PAIRS_OF_MANY
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
        shifts=shifts,
        elbo=probe.value - probe.gains.mean() + rest.mean() - trace / 2,
        elbo_error=math.sqrt(variance + (rows.error * trace) ** 2),
    )


class Products:
    """A precision of many parameters, which is known by its products with vectors.

    Directions that stand out are taken exactly, and the diagonal of the rest from random signs
    (Bekas, Kokiopoulou and Saad 2007).
    """

    def __init__(
        self,
        product: Callable[[np.ndarray], np.ndarray],
        size: int,
        rng: np.random.Generator,
    ):
        self.product = product
        values, vectors, errors, _ = _eigenpairs(product, rng.normal(size=size))
        known = errors < 0.01 * np.abs(values)
        # A multiple of the identity has no noise; vectors that do not stand out would add some.
        excess, vectors = (values - np.median(values))[known], vectors[:, known]
        signs = rng.choice([-1.0, 1.0], (_SIGNS, size))
        rests = [v * (product(v) - vectors @ (excess * (vectors.T @ v))) for v in signs]
        self.diagonal = vectors**2 @ excess + np.mean(rests, axis=0)
        self.diagonal_error = np.std(rests, axis=0, ddof=1) / np.sqrt(_SIGNS)
        self._root = np.sqrt(np.where(self.diagonal > 0, self.diagonal, 1))
        found = _eigenpairs(self._scaled, rng.normal(size=size))
        self.values, self.vectors, self._errors, self._weights = found
        """Eigenpairs of the precision scaled to a diagonal of ones, the smallest value first."""
        self.concave = bool((self.diagonal > 0).all() and self.values[0] > 0)

    def inverse_diagonal(self) -> np.ndarray:
        """Return the diagonal of the inverse of the scaled precision.

        Other directions than those that stand out enter it by the mean of their inverses, which
        Gauss quadrature gives (Golub and Welsch 1969).
        """
        known = self._errors < 0.1 * np.abs(self.values)
        shares, stand_out = self.vectors[:, known] ** 2, known & (np.abs(np.log2(self.values)) > 1)
        rest = np.average(1 / self.values, weights=self._weights * ~stand_out + 1e-12)
        return shares @ (1 / self.values[known]) + (1 - shares.sum(axis=1)) * rest

    def solve(self, target: np.ndarray) -> np.ndarray:
        operator = LinearOperator(
            (len(target), len(target)), lambda v: self._scaled(np.ravel(v)), dtype="float64"
        )
        return cg(operator, target / self._root, rtol=1e-4, maxiter=_MAX_PRODUCTS)[0] / self._root

    def _scaled(self, v: np.ndarray) -> np.ndarray:
        return self.product(v / self._root) / self._root


def _eigenpairs(
    product: Callable[[np.ndarray], np.ndarray], start: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return approximate eigenvalues in order, vectors, errors, and shares in *start*.

    They are found by Lanczos's method.
    """
    q, basis, diagonal, beside = start / np.linalg.norm(start), [], [], []
    while True:
        basis.append(q)
        w = product(q)
        diagonal.append(q @ w)
        for _ in range(2):  # one orthogonalization leaves rounding errors that grow
            for other in basis:
                w = w - (other @ w) * other
        rest = np.linalg.norm(w)
        if len(basis) == min(_STEPS, len(start)) or rest < 1e-6 * np.abs(diagonal).max():
            break
        beside.append(rest)
        q = w / rest
    values, vectors = np.linalg.eigh(np.diag(diagonal) + np.diag(beside, 1) + np.diag(beside, -1))
    return values, np.array(basis).T @ vectors, rest * np.abs(vectors[-1]), vectors[0] ** 2
