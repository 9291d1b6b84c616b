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
"""Maximize a function of up to some hundred parameters by damped Newton steps.

Gradients are computed, and second derivatives are their differences: those have no fast code for
some densities, and take long to compile for others.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

__all__ = [
    "RELATIVE_STEP",
    "Curvature",
    "Function",
    "Mode",
    "Pattern",
    "differences",
    "hessp",
    "maximize",
]

Function = Callable[[np.ndarray], tuple[float, np.ndarray]]
"""Function that returns its value and gradient."""

_REUSE = 0.5
"""Standard deviations that steps may have gone before the Hessian is computed anew."""

_MISS = 0.05
"""Share of a step by which it may miss where it should lead, and have left the Hessian as it was."""

_HEAVY_DAMPING, _MAX_DAMPING = 1e12, 1e30
"""Damping that is raised faster, and that without which no step raises a function."""

_MAX_SHORTENED = 12
"""Times that a step is shortened, over which gradients are not finite."""

RELATIVE_STEP = 0.03
"""Distance over which gradients are compared, in standard deviations of single parameters."""


class Pattern:
    """Which parameters are varied together to find a Hessian from few gradients.

    A few columns of a hierarchy's Hessian are dense, those of the parameters that groups share.
    Each of these is found by itself; they are also rows, by symmetry, and columns which have
    no other row in common are found together (Curtis, Powell and Reid 1974). The zeros are those
    of *hessian*.
    """

    def __init__(self, hessian: np.ndarray):
        scale = np.sqrt(np.abs(np.diag(hessian)) + np.finfo(float).tiny)
        nonzero = np.abs(hessian) > 1e-7 * np.outer(scale, scale)
        np.fill_diagonal(nonzero, True)
        self._nonzero = nonzero
        order = np.argsort(-nonzero.sum(axis=0), kind="stable")
        choices = [_groups(nonzero, order, n) for n in (0, 1, 2, 4, 8, 16, 32) if n <= len(order)]
        self.groups: list[np.ndarray] = min(choices, key=len)

    @classmethod
    def dense(cls, size: int) -> "Pattern":
        """Return the pattern of a Hessian without zeros."""
        return cls(np.ones((size, size)))

    def differences(
        self, gradient: Callable[[np.ndarray], np.ndarray], x: np.ndarray, steps: np.ndarray
    ) -> np.ndarray:
        """Return half the differences of gradients across each group, shape (groups, d)."""
        columns = []
        for group in self.groups:
            offset = np.zeros(len(x))
            offset[group] = steps[group]
            columns.append((gradient(x + offset) - gradient(x - offset)) / 2)
        return np.array(columns)

    def assemble(self, columns: np.ndarray, steps: np.ndarray) -> np.ndarray:
        """Return the Hessian, shape (d, d), of the differences that groups gave."""
        size = len(steps)
        hessian, known = np.zeros((size, size)), np.zeros(size, bool)
        for group, column in zip(self.groups, columns):
            for j in group:
                # What a column that is found by itself has where a sample had zeros counts too.
                rows = ~known if len(group) == 1 else self._nonzero[:, j] & ~known
                hessian[rows, j] = hessian[j, rows] = column[rows] / steps[j]
            if len(group) == 1:
                known[group] = True
        return hessian


def _groups(nonzero: np.ndarray, order: np.ndarray, n_single: int) -> list[np.ndarray]:
    """Return *n_single* columns each by itself, and groups of others without common rows."""
    rest = order[n_single:]
    groups: list[list[int]] = []
    taken: list[np.ndarray] = []
    for j in rest:
        rows = nonzero[:, j].copy()
        rows[order[:n_single]] = False
        for group, used in zip(groups, taken):
            if not (used & rows).any():
                group.append(int(j))
                used |= rows
                break
        else:
            groups.append([int(j)])
            taken.append(rows)
    return [np.array([j]) for j in order[:n_single]] + [np.array(group) for group in groups]


class Curvature:
    """A negative Hessian in the metric of its diagonal, for steps with any damping."""

    def __init__(self, hessian: np.ndarray):
        self.hessian = (hessian + hessian.T) / 2
        diagonal = np.abs(np.diag(hessian))
        self.scale = 1 / np.sqrt(np.maximum(diagonal, 1e-40))
        """Standard deviation of each parameter, given the others."""
        negative = -self.hessian * self.scale[:, None] * self.scale
        self.values, self.vectors = np.linalg.eigh(negative)

    @property
    def is_concave(self) -> bool:
        return bool(self.values[0] > 1e-11 * max(1.0, self.values[-1]))

    def step(self, gradient: np.ndarray, damping: float) -> tuple[np.ndarray, float]:
        """Return a damped Newton step, and the gain that the quadratic model predicts."""
        shift = damping if self.is_concave else damping + max(1e-6, -1.5 * self.values[0])
        slopes = self.vectors.T @ (self.scale * gradient)
        step = slopes / (self.values + shift)
        return self.scale * (self.vectors @ step), float(slopes @ step - step**2 @ self.values / 2)

    def covariance(self) -> np.ndarray:
        """Return the inverse, shape (d, d), of a concave function's."""
        factor = self.scale[:, None] * self.vectors / np.sqrt(self.values)
        return factor @ factor.T

    def distance(self, step: np.ndarray) -> float:
        """Return the largest step of a parameter, in marginal standard deviations."""
        return float(np.abs(step / np.sqrt(np.diag(self.covariance()))).max())


def differences(
    gradient: Callable[[np.ndarray], np.ndarray], x: np.ndarray, steps: np.ndarray
) -> np.ndarray:
    """Return the Hessian at *x*, shape (d, d), by differences of gradients over *steps*."""
    columns = np.array([gradient(x + e) - gradient(x - e) for e in np.diag(steps)])
    hessian = columns / (2 * steps[:, None])
    return (hessian + hessian.T) / 2


def hessp(
    gradient: Callable[[np.ndarray], np.ndarray], x: np.ndarray, v: np.ndarray, scale: np.ndarray
) -> np.ndarray:
    """Return the Hessian at *x* times *v*, by a difference over a part of *scale*."""
    share = RELATIVE_STEP / max(np.abs(v / scale).max(), np.finfo(float).tiny)
    return (gradient(x + share * v) - gradient(x - share * v)) / (2 * share)


class Mode(NamedTuple):
    """Where damped Newton steps have ended."""

    x: np.ndarray
    value: float
    gradient: np.ndarray
    curvature: Curvature
    at: np.ndarray
    """Point at which the curvature was computed, which is near *x*."""
    distance: float
    """Standard deviations to go, infinite where the function is not concave."""

    @property
    def log_evidence(self) -> float:
        """Laplace's approximation of the logarithm of the integral, but for a constant.

        It compares modes, as heights do not: that of a hierarchy without spread is infinite.
        """
        if not self.curvature.is_concave or not np.isfinite(self.value):
            return -np.inf
        log_scales = np.log(self.curvature.scale) - np.log(self.curvature.values) / 2
        return float(self.value + log_scales.sum())


def maximize(
    function: Function,
    hessian: Callable[[np.ndarray, np.ndarray], np.ndarray],
    x: np.ndarray,
    *,
    tolerance: float,
    max_steps: int = 100,
    steps: np.ndarray | None = None,
    show: Callable[[Mode], None] = lambda optimum: None,
) -> Mode:
    """Maximize by Newton steps, damped in the metric of the Hessian's diagonal.

    Damping in this metric crosses long ridges, where a ball in parameter space would have to be
    as small as the ridge is narrow (Levenberg 1944, Marquardt 1963). A step is taken only if the
    function rises. The *hessian* is a function of a point and of the distances over which gradients
    are compared, at first *steps*; *show* is told where each step has led. The search ends when the
    next step is below *tolerance*, in standard deviations by the curvature.
    """
    value, gradient = function(x)
    if steps is None:
        steps = 1e-4 * np.maximum(1.0, np.abs(x))
    curvature, at, moved, damping = _curvature(hessian, x, steps), x, 0.0, 1e-3
    for n in range(max_steps + 1):
        distance = np.inf
        if curvature.is_concave:
            distance = curvature.distance(curvature.step(gradient, 0.0)[0])
        show(Mode(x, value, gradient, curvature, at, distance))
        if distance < tolerance or n == max_steps:
            break
        found = _rise(function, x, value, gradient, curvature, damping)
        if found is None:
            break
        start, slope, (x, value, gradient, damping) = x, gradient, found
        moved += 0.0 if _has_held(curvature, x - start, slope, gradient) else distance
        if moved > _REUSE:
            curvature = _curvature(hessian, x, RELATIVE_STEP * curvature.scale)
            at, moved = x, 0.0
    return Mode(x, value, gradient, curvature, at, distance)


def _has_held(
    curvature: Curvature, step: np.ndarray, before: np.ndarray, after: np.ndarray
) -> bool:
    """Whether the gradient has changed along a step as the curvature before it says."""
    if not curvature.is_concave:
        return False
    miss = curvature.step(after - before - curvature.hessian @ step, 0.0)[0]
    sd = np.sqrt(np.diag(curvature.covariance()))
    return bool((np.abs(miss) < _MISS * np.maximum(np.abs(step), sd)).all())


def _curvature(
    hessian: Callable[[np.ndarray, np.ndarray], np.ndarray], x: np.ndarray, steps: np.ndarray
) -> Curvature:
    """Return the curvature over *steps*, or over shorter ones where gradients are not finite."""
    for _ in range(_MAX_SHORTENED):
        found = hessian(x, steps)
        if np.isfinite(found).all():
            break
        steps = np.where(np.isfinite(np.diag(found)), steps, steps / 10)
    return Curvature(found)


def _rise(
    function: Function,
    x: np.ndarray,
    value: float,
    gradient: np.ndarray,
    curvature: Curvature,
    damping: float,
) -> tuple[np.ndarray, float, np.ndarray, float] | None:
    """Return where a step leads that makes the function rise, and the next damping."""
    while damping < _MAX_DAMPING:
        step, predicted = curvature.step(gradient, damping)
        new, new_gradient = function(x + step)
        ratio = (new - value) / predicted if predicted > 0 else -1.0
        is_finite = np.isfinite(new) and np.isfinite(new_gradient).all()
        if is_finite and (ratio > 1e-3 or predicted < 1e-11 * abs(value)):
            if ratio > 0.75:
                damping /= 10
            elif ratio < 0.25:
                damping *= 2
            return x + step, new, new_gradient, max(damping, 1e-14)
        damping = max(damping, 1e-6) * (8 if damping < _HEAVY_DAMPING else 1_000)
    return None
