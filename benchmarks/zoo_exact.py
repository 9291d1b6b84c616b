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
"""Moments of posteriors that a few sums over the rows determine, for any number of rows.

They share no code with what is measured.  Blocks are matrices of rows, each read once; values are
unconstrained and in the order of the model.
"""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from scipy.special import softmax

__all__ = ["Moments", "many_groups", "mixture"]

Moments = dict[str, Any]
N_NODES = 5
"""Of the quadrature, in each direction."""
BINS_PER_UNIT, REACH = 1_000, 20
"""Of the histogram; bins so narrow move no moment by a thousandth of a standard deviation."""


def many_groups(blocks: Iterable[np.ndarray], *, n_groups: int) -> Moments:
    """Return the moments of the normal hierarchy, by Gauss-Hermite quadrature of four values.

    Given those, the levels are normal and independent.
    """
    n, sx, sy, squares = np.zeros(n_groups), np.zeros(n_groups), np.zeros(n_groups), np.zeros(3)
    for block in blocks:
        group, x, y = block.T.astype(float)
        for total, weights in (n, None), (sx, x), (sy, y):
            total += np.bincount(group.astype(int), weights, n_groups)
        squares += y @ y, x @ y, x @ x

    def conditional(h: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the means and variances of all levels, given the other values."""
        mean, log_spread, slope, log_sigma = h
        variance = 1 / (n * np.exp(-2 * log_sigma) + np.exp(-2 * log_spread))
        drawn = (sy - slope * sx) * np.exp(-2 * log_sigma) + mean * np.exp(-2 * log_spread)
        return variance * drawn, variance

    def density(h: np.ndarray) -> Any:
        """Return the log density of the other values, in which the levels are integrated out."""
        mean, log_spread, slope, log_sigma = h
        level, variance = conditional(h)
        square = squares @ np.array([1, -2 * slope, slope**2])
        quadratic = square * np.exp(-2 * log_sigma) + n_groups * mean**2 * np.exp(-2 * log_spread)
        quadratic -= (level**2 / variance).sum()
        prior = -(mean**2 + slope**2) / 18 - np.exp(2 * log_spread) / 2 - np.exp(2 * log_sigma) / 8
        logs = np.log(variance).sum() / 2 - n_groups * log_spread - n.sum() * log_sigma
        return logs - quadratic / 2 + prior + log_spread + log_sigma

    start = np.array([sy.sum() / n.sum(), -1.0, 0.0, np.log(squares[0] / n.sum()) / 2])
    mode, covariance = _maximum(density, start)
    nodes, weights = np.polynomial.hermite_e.hermegauss(N_NODES)
    e = np.stack(np.meshgrid(*[nodes] * 4), axis=-1).reshape(-1, 4)
    points = mode + e @ np.linalg.cholesky(covariance).T
    logs = np.array([density(h) for h in points]) + (e**2).sum(axis=1) / 2
    product = np.prod(np.stack(np.meshgrid(*[weights] * 4), axis=-1).reshape(-1, 4), axis=1)
    return _mixed(points, softmax(logs + np.log(product)), conditional)


def mixture(blocks: Iterable[np.ndarray], *, start: np.ndarray) -> Moments:
    """Return the mode of the mixture of two normals and the curvature around it.

    The posterior of millions of rows is as good as normal.
    """
    counts = np.zeros(2 * REACH * BINS_PER_UNIT)
    for block in blocks:
        bins = ((block[:, -1].astype(float) + REACH) * BINS_PER_UNIT).astype(int)
        counts += np.bincount(bins, minlength=len(counts))
    y = (np.arange(len(counts)) + 0.5) / BINS_PER_UNIT - REACH
    y, counts = y[counts > 0], counts[counts > 0]

    def density(h: np.ndarray) -> Any:
        w = 1 / (1 + np.exp(-2 * h[0])), 1 / (1 + np.exp(2 * h[0]))
        sigma, mu = np.exp(h[1:3]), (h[3], h[3] + np.exp(h[4]))
        parts = (w[k] / sigma[k] * np.exp(-(((y - mu[k]) / sigma[k]) ** 2) / 2) for k in range(2))
        prior = -(sigma @ sigma + mu[0] ** 2 + mu[1] ** 2) / 8
        return counts @ np.log(sum(parts)) + prior + np.log(w[0] * w[1]) + h[1] + h[2] + h[4]

    mode, covariance = _maximum(density, start)
    sd = np.sqrt(np.diag(covariance))
    return {"mean": mode, "sd": sd, "mean_se": 0 * sd, "sd_se": 0 * sd}


def _maximum(density: Callable[[np.ndarray], Any], z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the place of the maximum, by Newton's method, and the inverse of the curvature.

    Imaginary steps give derivatives in which no digits cancel.
    """
    unit = np.eye(len(z))

    def gradient(z: np.ndarray) -> np.ndarray:
        return np.array([density(z + 1e-20j * e).imag for e in unit]) / 1e-20

    for _ in range(100):
        hessian = np.array([gradient(z + 1e-5 * e) - gradient(z - 1e-5 * e) for e in unit]) / 2e-5
        values, vectors = np.linalg.eigh(-(hessian + hessian.T) / 2)
        along = vectors.T @ gradient(z)
        step = vectors @ (along / abs(values))
        if values.min() > 0 and (along**2 / values).sum() < 1e-4:
            return z + step, vectors / values @ vectors.T
        while density(z + step) < density(z):
            step /= 2
        z = z + step
    raise RuntimeError(f"no maximum was found near {z}")


def _mixed(points: np.ndarray, weights: np.ndarray, conditional: Any) -> Moments:
    """Return the moments of a mixture over points of the values that are not levels."""
    first = second = 0.0
    for h, w in zip(points, weights):
        level, variance = conditional(h)
        first, second = first + w * level, second + w * (level**2 + variance)
    h_mean = weights @ points
    h_sd = np.sqrt(weights @ (points - h_mean) ** 2)
    level_sd = np.sqrt(second - first**2)
    mean = np.concatenate([h_mean[:2], first, h_mean[2:]])
    sd = np.concatenate([h_sd[:2], level_sd, h_sd[2:]])
    return {"mean": mean, "sd": sd, "mean_se": 0 * sd, "sd_se": 0 * sd}
