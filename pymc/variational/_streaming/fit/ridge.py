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
"""Coordinates in which a posterior that lies along a curved ridge is near a Gaussian."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from scipy.interpolate import CubicSpline

from pymc.variational._streaming.fit.sample import LogDensity
from pymc.variational._streaming.fit.trust_region import (
    RELATIVE_STEP,
    Curvature,
    Function,
    Mode,
    differences,
    maximize,
)

__all__ = ["Ridge", "RidgeTransform", "Target"]

_NODES = np.arange(-4, 5)
"""Standard deviations from its centre at which the path of the ridge is looked up."""

_SPLINES = CubicSpline(_NODES, np.eye(len(_NODES)), bc_type="natural")
"""A curve through 1 at each node, and 0 at the others."""

_ON_RIDGE = 1e-3
"""Standard deviations from the ridge."""

_LONGEST = 1.0
"""Longest step along the ridge."""

_MAX_STEPS = 12


class Ridge:
    """A log density along some *chosen* parameters, the others integrated out by Laplace's method.

    Where rows pin products of parameters, as a scale times what it scales, the mode of the density
    says nothing about the scale, but that of its marginal density does (Rue, Martino and Chopin
    2009). The *steps* are distances over which gradients are first compared.
    """

    def __init__(self, density: LogDensity, chosen: Sequence[int], steps: np.ndarray):
        self._density, self._steps = density, steps
        self.chosen = np.array(chosen)
        self.others = np.setdiff1d(np.arange(len(steps)), self.chosen)

    def mode(self, x: np.ndarray) -> tuple[np.ndarray, Mode]:
        """Return the mode given the chosen ones of *x*, whole and without them."""
        whole, steps, block = x.copy(), self._steps.copy(), np.ix_(self.others, self.others)

        def value_and_gradient(rest: np.ndarray) -> tuple[float, np.ndarray]:
            whole[self.others] = rest
            value, gradient = self._density.value_and_gradient(whole)
            return value, gradient[self.others]

        def hessian(rest: np.ndarray, rest_steps: np.ndarray) -> np.ndarray:
            whole[self.others], steps[self.others] = rest, rest_steps
            return self._density.hessian(whole, steps)[block]

        rest, first = x[self.others], steps[self.others]
        found = maximize(value_and_gradient, hessian, rest, tolerance=_ON_RIDGE, steps=first)
        there = Curvature(hessian(found.x, RELATIVE_STEP * found.curvature.scale))
        whole[self.others] = found.x
        return whole, found._replace(curvature=there, at=found.x)

    def climb(
        self, x: np.ndarray, steps: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
        """Return the mode given the best of the chosen ones, their covariance, and the others'.

        The *steps* are distances over which marginal densities are compared. None where there is
        no maximum.
        """
        size = len(steps)

        def density(x: np.ndarray) -> tuple[np.ndarray, float]:
            whole, mode = self.mode(x)
            return whole, mode.log_evidence

        def slopes(x: np.ndarray) -> np.ndarray:
            pairs = [
                (density(self._moved(x, e))[1], density(self._moved(x, -e))[1])
                for e in np.diag(steps)
            ]
            return np.array([(up - down) / 2 for up, down in pairs]) / steps

        x, value = density(x)
        for _ in range(_MAX_STEPS):
            gradient = slopes(x)
            hessian = differences(lambda t: slopes(self._moved(x, t)), np.zeros(size), steps)
            if not (np.isfinite(gradient).all() and np.isfinite(hessian).all()):
                return None
            curvature = Curvature(hessian)
            step = curvature.step(gradient, 0.0)[0]
            step *= min(1, _LONGEST / np.abs(step).max())
            if curvature.is_concave:
                steps = np.sqrt(np.diag(curvature.covariance())) / 2
                if (np.abs(step) < 0.2 * steps).all():
                    return x, curvature.covariance(), self._given(x)
            while (new := density(self._moved(x, step)))[1] <= value:
                step = step / 2
                if (np.abs(step) < 1e-3 * steps).all():
                    return None
            x, value = new
        return None

    def transform(self, x: np.ndarray, covariance: np.ndarray) -> "RidgeTransform":
        """Return coordinates in which the ridge is straight around a mode given the chosen ones."""
        spread = np.linalg.cholesky(covariance)
        middle = self.mode(x)[1]
        paths = [
            [*self._path(x, middle, -s)[::-1], middle, *self._path(x, middle, s)] for s in spread.T
        ]
        return RidgeTransform(self.chosen, x, spread, middle, paths)

    def _path(self, x: np.ndarray, mode: Mode, step: np.ndarray) -> list[Mode]:
        """Return the modes at the nodes to one side, each the one before where there is none."""
        path = []
        for _ in range(_NODES[-1]):
            x = self._moved(x, step)
            whole, found = self.mode(x)
            if found.curvature.is_concave:
                x, mode = whole, found
            path.append(mode)
        return path

    def _given(self, x: np.ndarray) -> np.ndarray:
        """Return the covariance given the chosen ones, which is 0 for these, shape (d, d)."""
        covariance = np.zeros((len(x), len(x)))
        covariance[np.ix_(self.others, self.others)] = self.mode(x)[1].curvature.covariance()
        return covariance

    def _moved(self, x: np.ndarray, shift: np.ndarray) -> np.ndarray:
        moved = x.copy()
        moved[self.chosen] += shift
        return moved


class RidgeTransform:
    """Coordinates y of parameters x, in which the others' distribution given the chosen ones is one.

    Mean and factor of the covariance of the others are splines of the chosen ones, the diagonal of
    the factor on a log scale. Around the centre, y is x to first order, and everywhere if none are
    chosen. The *spread* is a factor of the covariance of the chosen ones, *middle* the mode of the
    others at the centre, and *paths* those at the nodes along each column of *spread*.
    """

    def __init__(
        self,
        chosen: Sequence[int] | np.ndarray,
        center: np.ndarray,
        spread: np.ndarray,
        middle: Mode,
        paths: Sequence[Sequence[Mode]],
    ):
        self.chosen, self.center = np.array(chosen, int), center
        self._others = others = np.setdiff1d(np.arange(len(center)), self.chosen)
        self._spread, self._middle = spread, _position(middle)
        ways = [_position(mode) - self._middle for path in paths for mode in path]
        self._paths = np.array(ways).reshape(len(chosen) * len(_NODES), len(self._middle))
        """Mean, factor and log widths at the nodes of each path, less those at the centre."""
        k, (_, factor, logs) = len(chosen), self._parts(self._middle)
        self._tangent = np.zeros((len(center), len(center)))
        self._tangent[np.ix_(chosen, range(k))] = spread
        means = self._paths[:, : len(others)].reshape(k, len(_NODES), len(others))
        self._tangent[others, :k] = (_weights(np.zeros(1))[1][0] @ means).T
        self._tangent[others, k:] = factor * np.exp(logs)
        self._inverse = np.linalg.inv(self._tangent)

    @property
    def covariance(self) -> np.ndarray:
        """Covariance of a standard normal in these coordinates."""
        return self._tangent @ self._tangent.T

    def place(self, y: np.ndarray) -> tuple[np.ndarray, float]:
        """Return the parameters, and the log volume of the transform there."""
        if not len(self.chosen):
            return y, 0.0
        u, e = self._split(y)
        mean, factor, logs = self._at(_weights(u)[0])
        x = y.copy()
        x[self._others] = mean + factor @ (np.exp(logs) * e)
        return x, self._volume(logs)

    def straighten(self, function: Function, *, volume: bool = False) -> Function:
        """Return a function of the coordinates, or with the *volume* a log density of them."""
        if not len(self.chosen):
            return function

        def straight(y: np.ndarray) -> tuple[float, np.ndarray]:
            u, e = self._split(y)
            weights, slopes = _weights(u)
            mean, factor, logs = self._at(weights)
            widths, x = np.exp(logs), y.copy()
            offset = widths * e
            x[self._others] = mean + factor @ offset
            value, gradient = function(x)
            rest = gradient[self._others]
            turned = factor.T @ rest
            by_part = [rest, np.outer(rest, offset).ravel(), turned * offset + volume]
            along = (self._paths @ np.concatenate(by_part)).reshape(-1, len(_NODES))
            along = self._spread.T @ gradient[self.chosen] + (slopes * along).sum(axis=1)
            value += volume * self._volume(logs)
            return value, self._inverse.T @ np.concatenate([along, widths * turned])

        return straight

    def _volume(self, logs: np.ndarray) -> float:
        return float((logs - self._parts(self._middle)[2]).sum())

    def _split(self, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return standard normal coordinates of the chosen ones and of the others."""
        e, k = self._inverse @ (y - self.center), len(self.chosen)
        return e[:k], e[k:]

    def _at(self, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return mean, factor with a diagonal of ones, and log widths of the others."""
        return self._parts(self._middle + weights.ravel() @ self._paths)

    def _parts(self, position: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        n = len(self._others)
        return position[:n], position[n:-n].reshape(n, n), position[-n:]


class Target(NamedTuple):
    """A log density of the coordinates of a transform, in which it is near a Gaussian."""

    density: Any
    """Corrected density of the parameters, None where that is yet to be made."""
    transform: RidgeTransform
    mean: np.ndarray
    covariance: np.ndarray
    """Moments of the coordinates, as far as they are known."""

    @property
    def likelihood(self) -> Function:
        return self.transform.straighten(self.density.likelihood)

    @property
    def prior(self) -> Function:
        """All but the likelihood, with the volume of the transform."""
        return self.transform.straighten(self.density.prior, volume=True)

    def value(self, y: np.ndarray) -> float:
        x, volume = self.transform.place(y)
        return self.density.likelihood(x)[0] + (self.density.prior(x)[0] + volume)


def _weights(steps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the weights of the nodes for each step, and their derivatives, shape (k, nodes)."""
    held = np.clip(steps, _NODES[0], _NODES[-1])
    piece = np.searchsorted(_NODES[1:-1], held, side="right")
    t = (held - _NODES[piece])[:, None]
    a, b, c, d = _SPLINES.c[:, piece]
    slopes = (3 * a * t + 2 * b) * t + c
    return ((a * t + b) * t + c) * t + d + (steps - held)[:, None] * slopes, slopes


def _position(mode: Mode) -> np.ndarray:
    """Return mean, factor of the covariance as a unit triangle, and log widths, one after another."""
    factor = np.linalg.cholesky(mode.curvature.covariance())
    widths = np.diag(factor)
    return np.concatenate([mode.x, (factor / widths).ravel(), np.log(widths)])
