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
"""The score of a model: the gradient of the rows' log-likelihood in its parameters."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytensor.tensor as pt

from pytensor.compile.sharedvalue import SharedVariable
from pytensor.graph.basic import Variable
from pytensor.graph.replace import clone_replace
from pytensor.graph.traversal import ancestors
from pytensor.tensor.subtensor import AdvancedSubtensor, get_idx_list
from scipy.optimize import minimize

from pymc.model.core import Model
from pymc.pytensorf import compile, join_nonshared_inputs
from pymc.variational._streaming.guards import depends_on, total_size_of
from pymc.variational._streaming.likelihood import columns_read, is_of
from pymc.variational._streaming.order.features import Statistic
from pymc.variational._streaming.order.ranks import Differences, variance_components
from pymc.variational.minibatch_rv import get_scaling

__all__ = ["ModelScore", "Score"]

_MOST_COORDINATES = 64
"""Of more parameters than this, random sums are compared."""
_JITTERS = (0.3, 0.1, 0.01, 0.0)
"""How far from the initial point to look for one where the gradient is finite."""
_STEPS = 50
"""Number of steps towards the optimum of the pilot sample."""

Density = Callable[[np.ndarray, np.ndarray, float, float], tuple[np.ndarray, np.ndarray]]
"""Function from rows, parameters and the weights of likelihood and prior to density and gradient."""


class ModelScore:
    """The compiled density of a model in whose buffer a stream puts its rows."""

    def __init__(self, model: Model, buffer: SharedVariable):
        self.density, columns = _compile_density(model, buffer)
        self.names = _flat_names(model)
        self.columns = np.zeros(int(np.prod(buffer.type.shape[1:])), bool)
        """Columns that the likelihoods may read, shape (n_columns,)."""
        self.columns[columns] = True
        point = model.initial_point(0)
        self.initial = np.concatenate([np.ravel(point[v.name]) for v in model.value_vars])

    def at(self, pilot: np.ndarray, n_rows: int) -> "Score | None":
        """Return the score at two points near which *pilot* has a finite likelihood, if any."""
        rng = np.random.default_rng(0)
        for jitter in _JITTERS:
            point = self.initial + jitter * rng.normal(size=self.initial.shape)
            value, gradient = self.density(pilot, point, 1.0, 1.0)
            if np.isfinite(value) and np.isfinite(gradient).all():
                return Score(self, point, pilot, n_rows)
        return None


class Score(Statistic):
    """Gradient of the log-likelihood of rows at two points.

    These are the optimum of the pilot sample, where windows show whether the posterior mean would
    follow them, and a point near the initial one, where they show whether curvatures differ.  Any
    points serve that do not depend on the order of the rows.
    """

    share, rare_share = 1 / 64, 1 / 64
    """Gradients at two points cost more than the sums of columns, so fewer rows are used."""

    def __init__(self, model: ModelScore, point: np.ndarray, pilot: np.ndarray, n_rows: int):
        self.columns = _columns_that_matter(model, point, pilot)
        self._gradient: Callable = lambda rows, x: model.density(rows, x, 1.0, 0.0)[1]
        target = partial(_negative, model.density, pilot, max(1.0, n_rows / len(pilot)), 1.0)
        found = minimize(target, point, jac=True, method="L-BFGS-B", options={"maxiter": _STEPS})
        self._points = [found.x if np.isfinite(found.x).all() else point, point]
        self._hash = self._hessians = None
        d = len(point)
        if d > _MOST_COORDINATES:
            self._hash = _random_sums(np.abs(self._gradient(pilot, point)), d)
            names = [f"a random sum ({i}) of all parameters" for i in range(_MOST_COORDINATES)]
        else:
            names = model.names
            self._hessians = [
                _hessian(partial(_negative, model.density, pilot, *weights), self._points[0])
                for weights in ((1 / len(pilot), 0.0), (0.0, 1.0))
            ]
        places = "", " near the initial point"
        self.names = [f"gradient of {name}{place}" for place in places for name in names]

    def sums(self, rows: np.ndarray) -> np.ndarray:
        return np.concatenate([self._project(self._gradient(rows, x)) for x in self._points])

    def drift(
        self,
        units: np.ndarray,
        groups: np.ndarray,
        found: Differences,
        unit_rows: float,
        n_rows: int,
    ) -> np.ndarray:
        """Return the spread of the steps that Newton's method would make to the groups' optima."""
        if self._hessians is None:
            return super().drift(units, groups, found, unit_rows, n_rows)
        of_row, of_prior = self._hessians
        inverse = _inverse(n_rows * of_row + of_prior)
        gradients = units.reshape(len(units), 2, -1) * (n_rows / unit_rows)
        steps = (gradients @ inverse).reshape(units.shape)
        component, _ = variance_components(steps, groups)
        return np.sqrt(component / np.tile(np.diag(inverse), 2))

    def _project(self, gradient: np.ndarray) -> np.ndarray:
        if self._hash is None:
            return gradient
        bucket, factor = self._hash
        return np.bincount(bucket, gradient * factor, _MOST_COORDINATES)


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


def _columns_that_matter(model: ModelScore, point: np.ndarray, pilot: np.ndarray) -> np.ndarray:
    """Mark the columns without whose values the likelihood would be another."""
    read = model.columns.copy()
    rows = pilot[:64].reshape(min(64, len(pilot)), -1)
    value = model.density(pilot[:64], point, 1.0, 0.0)[0]
    for j in np.flatnonzero(read & (np.ptp(rows, axis=0) > 0)):
        other = rows.copy()
        other[:, j] = np.roll(other[:, j], 1)
        changed = model.density(other.reshape(pilot[:64].shape), point, 1.0, 0.0)[0] != value
        read[j] = changed
    return read


def _row_likelihoods(model: Model, buffer: SharedVariable) -> list[Variable]:
    """Return the log-likelihoods of the rows in *buffer*, one term per row, not scaled to all."""
    observed = [rv for rv in model.observed_RVs if depends_on(model, rv, buffer)]
    if not observed:
        raise ValueError(f"no observed variable depends on {buffer.name!r}")
    terms: Any = model.logp(observed, sum=False)
    return [
        term / get_scaling(rv.owner.inputs[1:], model.rvs_to_values[rv].shape)
        if total_size_of(rv)
        else term
        for rv, term in zip(observed, terms)
    ]


def _compile_density(model: Model, buffer: SharedVariable) -> tuple[Density, np.ndarray]:
    """Compile the weighted sum of likelihood and prior, and its gradient.

    Also return the columns that it may read, as numbers in the flattened row.
    """
    likelihood = sum(pt.sum(term) for term in _row_likelihoods(model, buffer))
    priors: Any = model.logp(model.free_RVs, sum=False)
    prior = sum(map(pt.sum, priors))
    rows, weights = buffer.type("rows"), (pt.scalar("likelihood"), pt.scalar("prior"))
    [total], flat = join_nonshared_inputs(
        model.initial_point(0), [weights[0] * likelihood + weights[1] * prior], model.value_vars
    )
    total = clone_replace(total, {v: rows for v in ancestors([total]) if is_of(v, buffer)})
    columns = columns_read([total], rows)
    total = _within_bounds(total, rows)
    gradient = pt.grad(total, flat, disconnected_inputs="ignore")
    function = compile([rows, flat, *weights], [total, gradient], on_unused_input="ignore")
    function.trust_input = True  # the types of its inputs take longer to check than a few rows

    types = [var.type.dtype for var in (rows, flat, *weights)]

    def density(*values: Any) -> tuple[np.ndarray, np.ndarray]:
        return function(*map(np.asarray, values, types))

    return density, columns


def _flat_names(model: Model) -> list[str]:
    """Return the name of each element of the flat parameters, as ``b[1]``."""
    point = model.initial_point(0)
    names = {v.name: model.values_to_rvs[v].name for v in model.value_vars}
    return [
        names[v.name] + (str(list(place)).replace(" ", "") if place else "")
        for v in model.value_vars
        for place in np.ndindex(np.shape(point[v.name]))
    ]


def _within_bounds(total: Variable, rows: Variable) -> Variable:
    """Clip the indices that *rows* give: numba reads and writes other memory where one is wrong.

    Rows with such an index are refused before a step uses them, but may be compared before.
    """
    clipped = {}
    for node in {v.owner for v in ancestors([total]) if v.owner}:
        if not isinstance(node.op, AdvancedSubtensor):
            continue
        for axis, index in enumerate(get_idx_list(node.inputs, node.op.idx_list)):
            if not isinstance(index, Variable) or index.type.dtype == "bool":
                continue
            if rows in ancestors([index]):
                n = node.inputs[0].shape[axis]
                clipped[index] = pt.clip(index, -n, n - 1).astype(index.type.dtype)
    return clone_replace(total, clipped) if clipped else total
