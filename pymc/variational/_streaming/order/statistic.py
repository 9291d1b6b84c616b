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
"""What is compared between windows: sums over rows of the model's score, or of their columns."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pytensor.tensor as pt

from pytensor.compile.sharedvalue import SharedVariable
from pytensor.graph.replace import clone_replace
from pytensor.graph.traversal import ancestors
from scipy.optimize import minimize

from pymc.pytensorf import compile, join_nonshared_inputs
from pymc.variational._streaming.guards import depends_on, scaling
from pymc.variational._streaming.likelihood import Factors, columns_read, is_of, within_bounds
from pymc.variational._streaming.order.ranks import variance_components

__all__ = ["PILOT_ROWS", "Features", "ModelScore", "Score", "Statistic"]

PILOT_ROWS = 4_096
"""Number of rows from which a statistic is made."""

_LIMIT = 5.0
"""What scaled values approach, so that heavy tails do not hide a drift."""
_ALL_PRODUCTS = 8
"""With more columns than this, products are squares and those with the last column."""
_MOST_COORDINATES = 64
"""Of more parameters than this, random sums are compared."""
_JITTERS = (0.3, 0.1, 0.01, 0.0)
"""How far from the initial point to look for one where the gradient is finite."""
_STEPS = 50
"""Number of steps towards the optimum of the pilot sample."""


class Statistic(ABC):
    """Sums over rows whose distribution is the same in all windows of shuffled rows."""

    names: list[str]
    """What each coordinate is about."""
    columns: np.ndarray
    """Numbers of the columns that take part, in the flattened row."""
    share: float
    """Share of the rows that is used while they stream."""
    rare_share: float
    """Share of the rows, those with rare values, that is used besides, at most by a half more."""

    @abstractmethod
    def sums(self, rows: np.ndarray) -> np.ndarray:
        """Return the coordinates of *rows*, shape (n_coordinates,)."""

    def drift(
        self, units: np.ndarray, groups: np.ndarray, unit_rows: float, n_rows: int
    ) -> np.ndarray | None:
        """Return how far the posterior mean follows groups of units, in its sd, if that is known.

        Each of the *units*, shape (n_units, n_coordinates), sums up *unit_rows* rows.
        """
        return None


class Features(Statistic):
    """Sums of columns, their squares and their products, scaled on a pilot sample.

    Products matter because the relation of two columns can drift while each stays put.
    """

    share, rare_share = 0.25, 0.125

    def __init__(self, pilot: np.ndarray, columns: Sequence[str] | None):
        pilot = _flat(pilot)
        self._centre = np.median(pilot, axis=0)
        spread = 1.4826 * np.median(np.abs(pilot - self._centre), axis=0)
        # Columns of two values, or mostly of one, are left as they are.
        self._limit = np.where(spread > 0, _LIMIT, np.inf)
        self._scale = np.where(spread > 0, spread, 1.0)
        d = pilot.shape[1]
        left, right = np.triu_indices(d)
        keep = (left == right) | (right == d - 1) | (d <= _ALL_PRODUCTS)
        self._pairs = left[keep], right[keep]
        names = list(columns or [f"column {j}" for j in range(d)])
        self.names = names + [
            f"{names[i]} squared" if i == j else f"{names[i]} × {names[j]}"
            for i, j in zip(*self._pairs)
        ]
        self.columns = np.arange(d)

    def sums(self, rows: np.ndarray) -> np.ndarray:
        with np.errstate(all="ignore"):  # of values that are too large to be scaled or squared
            x = (_flat(rows) - self._centre) / self._scale
            x /= 1 + np.abs(x) / self._limit
            return np.append(x.sum(axis=0), (x.T @ x)[self._pairs])


def _flat(rows: np.ndarray) -> np.ndarray:
    return rows.reshape(len(rows), -1).astype("float64")


class ModelScore:
    """The density of a model in whose buffer a stream puts its rows, and its gradient, compiled.

    *density* is a function of rows, parameters and the weights of likelihood and prior.
    """

    def __init__(self, factors: Factors, buffer: SharedVariable):
        model, point = factors.model, factors.initial_point
        self.initial = np.concatenate([np.ravel(point[v.name]) for v in model.value_vars])
        self.names = [
            str(model.values_to_rvs[v].name) + (str(list(place)).replace(" ", "") if place else "")
            for v in model.value_vars
            for place in np.ndindex(np.shape(point[v.name]))
        ]
        rows, weights = buffer.type("rows"), (pt.scalar("likelihood"), pt.scalar("prior"))
        likelihood, prior = _likelihood_and_prior(factors, buffer)
        total = weights[0] * likelihood + weights[1] * prior
        [total], flat = join_nonshared_inputs(point, [total], model.value_vars)
        total = clone_replace(total, {v: rows for v in ancestors([total]) if is_of(v, buffer)})
        self.columns = columns_read([total], rows)
        """Numbers of the columns that the likelihoods read, in the flattened row."""
        # A row with a wrong index is refused before a step uses it, but may be compared before.
        total = within_bounds(total, rows)
        gradient = pt.grad(total, flat, disconnected_inputs="ignore")
        inputs = [rows, flat, *weights]
        function = compile(inputs, [total, gradient], on_unused_input="ignore")
        function.trust_input = True  # the types of its inputs take longer to check than a few rows
        types = [var.type.dtype for var in inputs]
        self.density: Callable = lambda *values: function(*map(np.asarray, values, types))

    def at(self, pilot: np.ndarray, n_rows: int) -> "Score":
        """Return the score at two points near which *pilot* has a finite likelihood."""
        rng = np.random.default_rng(0)
        for jitter in _JITTERS:
            point = self.initial + jitter * rng.normal(size=self.initial.shape)
            value, gradient = self.density(pilot, point, 1.0, 1.0)
            if np.isfinite(value) and np.isfinite(gradient).all():
                return Score(self, point, pilot, n_rows)
        raise ValueError("it is not finite near the initial point")


def _likelihood_and_prior(factors: Factors, buffer: SharedVariable) -> tuple[Any, Any]:
    """Return the log-likelihood of the rows in *buffer*, not scaled to all, and the log prior."""
    model, logp = factors.model, factors.logp
    observed = [rv for rv in model.observed_RVs if depends_on(model, rv, buffer)]
    if not observed:
        raise ValueError(f"no observed variable depends on {buffer.name!r}")
    likelihood = sum(pt.sum(logp[rv] / scaling(model, rv)) for rv in observed)
    return likelihood, sum(pt.sum(logp[rv]) for rv in model.free_RVs)


class Score(Statistic):
    """Gradient of the log-likelihood of rows at two points.

    These are the optimum of the pilot sample, where windows show whether the posterior mean would
    follow them, and a point near the initial one, where they show whether curvatures differ.  Any
    points serve that do not depend on the order of the rows.
    """

    share, rare_share = 1 / 64, 1 / 64
    """Gradients at two points cost more than the sums of columns, so fewer rows are used."""

    def __init__(self, model: ModelScore, point: np.ndarray, pilot: np.ndarray, n_rows: int):
        self.columns = model.columns
        self._gradient: Callable = lambda rows, x: model.density(rows, x, 1.0, 0.0)[1]
        target = partial(_negative, model.density, pilot, max(1.0, n_rows / len(pilot)), 1.0)
        found = minimize(target, point, jac=True, method="L-BFGS-B", options={"maxiter": _STEPS})
        self._points = [found.x if np.isfinite(found.x).all() else point, point]
        self._hash = self._hessians = None
        names, d = model.names, len(point)
        if d > _MOST_COORDINATES:
            self._hash = _random_sums(np.abs(self._gradient(pilot, point)), d)
            names = [f"a random sum ({i}) of all parameters" for i in range(_MOST_COORDINATES)]
        else:
            self._hessians = [
                _hessian(partial(_negative, model.density, pilot, *weights), self._points[0])
                for weights in ((1 / len(pilot), 0.0), (0.0, 1.0))
            ]
        places = "", " near the initial point"
        self.names = [f"gradient of {name}{place}" for place in places for name in names]

    def sums(self, rows: np.ndarray) -> np.ndarray:
        gradients = [self._gradient(rows, x) for x in self._points]
        if self._hash is not None:
            bucket, factor = self._hash
            gradients = [np.bincount(bucket, g * factor, _MOST_COORDINATES) for g in gradients]
        return np.concatenate(gradients)

    def drift(
        self, units: np.ndarray, groups: np.ndarray, unit_rows: float, n_rows: int
    ) -> np.ndarray | None:
        """Return the spread of the steps that Newton's method would make to the groups' optima."""
        if self._hessians is None:
            return None
        of_row, of_prior = self._hessians
        inverse = _inverse(n_rows * of_row + of_prior)
        gradients = units.reshape(len(units), 2, -1) * (n_rows / unit_rows)
        steps = (gradients @ inverse).reshape(units.shape)
        component, _ = variance_components(steps, groups)
        return np.sqrt(component / np.tile(np.diag(inverse), 2))


def _negative(density, pilot, likelihood, prior, point) -> tuple[float, np.ndarray]:
    """Return the negative weighted log density of *pilot*, and its gradient."""
    value, gradient = density(pilot, point, likelihood, prior)
    if not (np.isfinite(value) and np.isfinite(gradient).all()):
        return 1e300, np.zeros_like(point)
    return -float(value), -np.asarray(gradient, "float64")


def _hessian(target: Callable, point: np.ndarray) -> np.ndarray:
    """Return the Hessian of *target* by central differences of its gradient."""
    steps = 1e-4 * np.diag(np.maximum(1.0, np.abs(point)))
    rows = [(target(point + h)[1] - target(point - h)[1]) / (2 * h.sum()) for h in steps]
    return np.nan_to_num(np.array(rows) + np.transpose(rows)) / 2


def _inverse(hessian: np.ndarray) -> np.ndarray:
    """Invert the Hessian, whose eigenvalues count by their size where it is not a minimum."""
    values, vectors = np.linalg.eigh(hessian)
    values = np.maximum(np.abs(values), 1e-10 * np.abs(values).max() + 1e-300)
    return (vectors / values) @ vectors.T


def _random_sums(size: np.ndarray, d: int) -> tuple[np.ndarray, np.ndarray]:
    """Return for each parameter the sum that it is in, and its random sign over its *size*."""
    rng = np.random.default_rng(0)
    bucket = rng.permutation(np.arange(d) % _MOST_COORDINATES)
    return bucket, rng.choice([-1.0, 1.0], d) / np.maximum(size, size.mean() + 1e-300)
