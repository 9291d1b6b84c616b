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
"""The log density of a model as a function of a stream's rows and of flat parameters."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytensor.tensor as pt

from pytensor.compile.sharedvalue import SharedVariable
from pytensor.graph.basic import Variable
from pytensor.graph.replace import clone_replace
from pytensor.graph.traversal import ancestors
from pytensor.tensor.subtensor import AdvancedSubtensor, get_idx_list

from pymc.model.core import Model
from pymc.pytensorf import compile, join_nonshared_inputs
from pymc.variational._streaming.guards import depends_on, total_size_of
from pymc.variational._streaming.likelihood import columns_read, is_of
from pymc.variational.minibatch_rv import get_scaling

__all__ = ["compile_density", "flat_names"]

Density = Callable[[np.ndarray, np.ndarray, float, float], tuple[np.ndarray, np.ndarray]]
"""Function from rows, parameters and the weights of likelihood and prior to density and gradient."""


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


def compile_density(model: Model, buffer: SharedVariable) -> tuple[Density, np.ndarray]:
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

    def density(x: np.ndarray, point: np.ndarray, *by: float) -> tuple[np.ndarray, np.ndarray]:
        values = zip((x, point, *by), (rows, flat, *weights))
        return function(*(np.asarray(value, var.type.dtype) for value, var in values))

    return density, columns


def flat_names(model: Model) -> list[str]:
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
