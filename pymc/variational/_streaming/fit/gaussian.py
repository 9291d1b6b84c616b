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
"""The parameters of a Gaussian approximation, as flat arrays."""

import numpy as np

from pytensor.compile.sharedvalue import SharedVariable

from pymc.variational.approximations import FullRankGroup, MeanFieldGroup
from pymc.variational.opvi import Approximation, Group

__all__ = [
    "gaussian_group",
    "mean_variable",
    "names",
    "put",
    "scale",
    "scale_variable",
    "set_values",
    "standard_deviations",
]


def gaussian_group(approx: Approximation) -> Group:
    """Return the one group of a mean-field or full-rank approximation.

    Raises
    ------
    TypeError
        If it is of another family, mixes families, or has parameters of the user's own.
    """
    if not isinstance(approx, Approximation):
        raise TypeError(f"approx is {type(approx).__name__}; pass what pm.fit returned")
    group = approx.groups[0]
    if (
        len(approx.groups) > 1
        or not isinstance(group, MeanFieldGroup | FullRankGroup)
        or group.shared_params is None
    ):
        raise TypeError(
            f"approx={approx} is neither a MeanField nor a FullRank approximation with its own "
            'parameters; fit with method="advi" or "fullrank_advi"'
        )
    return group


def mean_variable(group: Group) -> SharedVariable:
    return group.shared_params["mu"]


def scale_variable(group: Group) -> SharedVariable:
    """Return the unconstrained scales: ``rho``, or ``L_tril`` of a full-rank approximation."""
    name = "rho" if isinstance(group, MeanFieldGroup) else "L_tril"
    return group.shared_params[name]


def scale(group: Group) -> np.ndarray:
    """Return standard deviations, shape (d,), or a lower Cholesky factor, shape (d, d)."""
    values = np.asarray(scale_variable(group).get_value(), "float64")
    if isinstance(group, MeanFieldGroup):
        return np.logaddexp(0, values)
    factor = np.zeros((group.ddim, group.ddim))
    factor[np.tril_indices(group.ddim)] = values
    np.fill_diagonal(factor, np.logaddexp(0, np.diag(factor)))
    return factor


def standard_deviations(group: Group) -> np.ndarray:
    values = scale(group)
    return values if values.ndim == 1 else np.linalg.norm(values, axis=1)


def set_values(group: Group, mean: np.ndarray, scale: np.ndarray) -> None:
    """Set the means, and the scales in the form that :func:`scale` returns."""
    put(mean_variable(group), mean)
    if isinstance(group, FullRankGroup):
        scale = scale.copy()
        np.fill_diagonal(scale, _inverse_softplus(np.diag(scale)))
        put(scale_variable(group), scale[np.tril_indices(group.ddim)])
    else:
        put(scale_variable(group), _inverse_softplus(scale))


def put(variable: SharedVariable, values: np.ndarray) -> None:
    """Set a shared variable, in its own type."""
    variable.set_value(np.asarray(values, variable.type.dtype))


def names(group: Group) -> tuple[str, ...]:
    """Return a name for each unconstrained parameter, such as ``"sigma_log__"`` or ``"b[2]"``."""
    return tuple(
        name + str(list(index)) if index else name
        for name, _, shape, _ in group.ordering.values()
        for index in np.ndindex(shape)
    )


def _inverse_softplus(values: np.ndarray) -> np.ndarray:
    return values + np.log(-np.expm1(-values))
