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
"""The best mean-field Gaussian of many parameters, in memory proportional to their number."""

import math

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from scipy.linalg import hadamard
from scipy.sparse.linalg import LinearOperator, cg

from pymc.variational._streaming.fit.trust_region import (
    Function,
    hessp,
)

__all__ = [
    "MeanField",
    "Part",
    "best_mean_field",
    "expected",
    "moment_draws",
    "response",
]

Part = Callable[[np.ndarray, np.ndarray], tuple[Any, ...]]
"""Function of means and scales that returns an expected value, and its gradients in these."""

_MAX_STEPS = 100

_MAX_PRODUCTS = 50
"""Hessian-vector products of one step."""

_GAP_DRAWS = 8
"""Draws at which the divergence of many parameters is estimated."""

_FAR_FROM_QUADRATIC = 0.5
"""Error of the height at two standard deviations from which on the others do not follow linearly."""


class MeanField(NamedTuple):
    """A Gaussian of independent parameters."""

    mean: np.ndarray
    scales: np.ndarray
    distance: float
    """Last step of a mean, in units of the scales."""

    def measured_from(self, other: "MeanField") -> "MeanField":
        """Return it with the largest distance of a mean or a log scale from another one."""
        means, log_scales = (
            (self.mean - other.mean) / other.scales,
            np.log(self.scales / other.scales),
        )
        return self._replace(distance=float(np.abs([means, log_scales]).max()))


def moment_draws(
    size: int, n: int, rng: np.random.Generator, alone: Sequence[int] = ()
) -> np.ndarray:
    """Return half of antithetic draws with five moments of a normal, shape (pairs, size).

    Each coordinate has two absolute values, the larger of them in one pair of *n*, which is a power
    of 2. Those that are *alone*, since many others depend on them, are 1 or -1, and orthogonal to
    each other and to all others, for which it takes twice as many pairs.
    """
    n = max(n, 2 ** max(len(alone) - 1, 0).bit_length())
    small = 1 - math.sqrt(2 / (n - 1)) if n > 2 else 1.0
    squares = np.full((n, size), small)
    squares[rng.integers(0, n, size), np.arange(size)] = n - (n - 1) * small
    draws = np.sqrt(squares) * rng.choice([-1.0, 1.0], squares.shape)
    if not len(alone):
        return draws
    draws = np.concatenate([draws, -draws])
    draws[:, list(alone)] = np.tile(hadamard(n)[:, : len(alone)], (2, 1))
    return draws


def expected(
    function: Function,
    draws: np.ndarray,
    mean: np.ndarray,
    scales: np.ndarray,
    places: Sequence[int] = (),
) -> tuple[Any, ...]:
    """Return the expected value at antithetic draws, and its gradients in mean and log scales.

    The columns of the expected Hessian at some *places* follow, if their draws are orthogonal to
    those of all others.
    """
    value, by_mean, by_scale = 0.0, np.zeros(len(mean)), np.zeros(len(mean))
    columns = [np.zeros(len(mean)) for _ in places]
    for draw in draws:
        offset = scales * draw
        (up, gradient), (down, opposite) = function(mean + offset), function(mean - offset)
        value += (up + down) / 2 / len(draws)
        by_mean += (gradient + opposite) / 2 / len(draws)
        change = (gradient - opposite) / 2 / len(draws)
        by_scale += offset * change
        for place, column in zip(places, columns):
            column += change / offset[place]
    return value, by_mean, by_scale, *columns


def best_mean_field(
    parts: Sequence[Part],
    q: MeanField,
    *,
    tolerance: float,
    show: Callable[[MeanField], None],
    held: Sequence[int] = (),
) -> MeanField:
    """Maximize the evidence lower bound at fixed draws over means and log scales.

    That is deterministic ADVI (Giordano, Ingram and Broderick 2024), by a trust-region Newton
    method with conjugate gradients (Steihaug 1983), in units of the scales. The *parts* of the log
    density return what :func:`expected` returns; *show* is told where each step has led, and one
    below *tolerance* ends the search. Some parameters can be *held*.
    """
    size, distance = len(q.mean), np.inf
    free = np.ones(2 * size)
    free[[*held, *(size + place for place in held)]] = 0
    x, radius = _coordinates(q)[0], np.sqrt(size)
    value, gradient = _bound(parts, x)
    for _ in range(_MAX_STEPS):
        unit = _coordinates(MeanField(x[:size], np.exp(x[size:]), distance))[1]
        product = partial(_precision_product, parts, x, unit)
        step, predicted, is_inside = _steihaug(
            lambda v: free * product(v), free * unit * gradient, radius
        )
        new, new_gradient = _bound(parts, x + unit * step)
        ratio = (new - value) / predicted if np.isfinite(new) else -1.0
        is_rounding = 0 <= predicted < 1e-11 * abs(value)
        if ratio > 1e-3 or is_rounding:
            distance = float(np.abs(step[:size]).max())
            x, value, gradient = x + unit * step, new, new_gradient
            show(MeanField(x[:size], np.exp(x[size:]), distance))
            if is_inside and max(distance, np.abs(step[size:]).max()) < tolerance:
                break
        if ratio < 0.25:
            radius = np.linalg.norm(step) / 4
            if is_rounding or radius < 1e-6:
                break
        elif ratio > 0.75 and not is_inside:
            radius *= 3
    return MeanField(x[:size], np.exp(x[size:]), distance)


def response(
    function: Function, q: MeanField, places: Sequence[int], rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Return standard deviations of the posterior for some parameters, and shifts of their means.

    Means and scales respond, since the scale of a group's effects follows theirs (Giordano,
    Broderick and Jordan 2018). The density of one parameter, the others integrated out, is the
    bound, along the response, plus the divergence of the others' Gaussian. Where it is skewed, or
    the divergence changes, its mean is not that of the Gaussian, but so many standard deviations
    higher.
    """
    size, (x, unit) = len(q.mean), _coordinates(q)
    parts = [partial(expected, function, moment_draws(size, 4, rng, places))]
    product = partial(_precision_product, parts, x, unit)
    operator = LinearOperator((2 * size, 2 * size), lambda v: product(np.ravel(v)), dtype="float64")
    draws = rng.normal(size=(_GAP_DRAWS, size))
    draws[:, list(places)] = 0  # a tuple is another index

    def height(x: np.ndarray) -> float:
        return _bound(parts, x)[0] + _divergence(function, x, draws)

    sd, shifts = np.ones(len(places)), np.zeros(len(places))
    for k, place in enumerate(places):
        target = np.zeros(2 * size)
        target[place] = 1
        column = cg(operator, target, rtol=0.01, maxiter=_MAX_PRODUCTS)[0]
        sd[k] = np.sqrt(max(column[place], 1))
        points = [x + side * unit * column / sd[k] for side in (-2, 0, 2)]
        heights = np.array([height(point) for point in points])
        if np.abs(heights[1] - heights[::2] - 2).max() > _FAR_FROM_QUADRATIC:
            qs = (MeanField(point[:size], np.exp(point[size:]), np.inf) for point in points)
            find = partial(best_mean_field, tolerance=0.1, show=lambda q: None, held=[place])
            heights = np.array([height(_coordinates(find(parts, q))[0]) for q in qs])
        shifts[k] = (heights[2] - heights[0]) / 4
    return q.scales[list(places)] * sd, shifts


def _divergence(function: Function, x: np.ndarray, draws: np.ndarray) -> float:
    """Return the divergence of a Gaussian from the density, but for what does not change with it.

    It is a sixth of the mean square of the gradient of their ratio where the density has a third
    derivative, and an eighth where it has a fourth.
    """
    mean, log_scales = np.split(x, 2)
    scales, moves = np.exp(log_scales), (draws != 0).any(axis=0)
    gradients = np.array([function(mean + scales * draw)[1] for draw in draws])
    return float(((scales * gradients + draws)[:, moves] ** 2).sum() / len(draws) / 6)


def _coordinates(q: MeanField) -> tuple[np.ndarray, np.ndarray]:
    """Return means and log scales, and the units in which steps of them are alike."""
    unit = np.concatenate([q.scales, np.full(len(q.scales), np.sqrt(0.5))])
    return np.concatenate([q.mean, np.log(q.scales)]), unit


def _precision_product(
    parts: Sequence[Part], x: np.ndarray, unit: np.ndarray, v: np.ndarray
) -> np.ndarray:
    """Return the negative Hessian of the bound, in these units, times *v*."""
    return -unit * hessp(lambda y: _bound(parts, y)[1], x, unit * v, unit)


def _bound(parts: Sequence[Part], x: np.ndarray) -> tuple[float, np.ndarray]:
    """Return the bound, but for a constant, and its gradient in means and log scales."""
    mean, log_scales = np.split(x, 2)
    sums = [part(mean, np.exp(np.clip(log_scales, -100, 50))) for part in parts]
    value, by_mean, by_scale = (sum(values) for values in zip(*sums))
    return float(value + log_scales.sum()), np.concatenate([by_mean, 1 + by_scale])


def _steihaug(
    product: Callable[[np.ndarray], np.ndarray], gradient: np.ndarray, radius: float
) -> tuple[np.ndarray, float, bool]:
    """Return a step of at most *radius*, the gain to expect, and whether it ends inside.

    The *product* is that of the negative Hessian and a vector.
    """
    step, residual, direction = np.zeros_like(gradient), gradient, gradient
    curved = np.zeros_like(gradient)
    for _ in range(_MAX_PRODUCTS):
        image = product(direction)
        slope = direction @ image
        length = residual @ residual / slope if slope > 0 else np.inf
        if np.linalg.norm(step + length * direction) >= radius or not np.isfinite(length):
            a, b, c = direction @ direction, step @ direction, step @ step - radius**2
            length = (np.sqrt(b**2 - a * c) - b) / a
            step, curved = step + length * direction, curved + length * image
            return step, float(gradient @ step - step @ curved / 2), False
        step, curved = step + length * direction, curved + length * image
        new = residual - length * image
        if np.linalg.norm(new) < 0.02 * np.linalg.norm(gradient):
            break
        direction = new + (new @ new) / (residual @ residual) * direction
        residual = new
    return step, float(gradient @ step - step @ curved / 2), True
