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
"""What averages, checks and resumed fits are given: streams, and Gaussian approximations."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from pytensor.compile.sharedvalue import SharedVariable

from pymc.variational._streaming.dataset import StreamingDataset
from pymc.variational._streaming.errors import StreamError
from pymc.variational.approximations import FullRankGroup, MeanFieldGroup
from pymc.variational.opvi import Approximation, Group

__all__ = [
    "Polished",
    "as_streams",
    "gaussian_group",
    "log_volume",
    "marginal_sd",
    "mean",
    "names",
    "place",
    "polished",
    "refuse_endless",
    "scale",
    "set_mean",
    "times",
]


class Polished(NamedTuple):
    """What is known of the posterior beyond the mean and the scales of an approximation."""

    widening: np.ndarray
    """Standard deviations of the posterior over those of the Gaussian nearest to it, shape (d,)."""
    target: Any = None
    """Coordinates in which that is the nearest one, if the posterior lies along a curved path."""
    found: Mapping[Any, Any] = {}
    """What makes the numbers doubtful."""


def as_streams(ds: StreamingDataset | Sequence[StreamingDataset]) -> list[StreamingDataset]:
    """Return one stream or several as a list."""
    streams = list(ds) if isinstance(ds, Sequence) else [ds]
    for stream in streams:
        if not isinstance(stream, StreamingDataset):
            raise TypeError(
                f"ds={type(stream).__name__}(...) is not a StreamingDataset; pass the one that is "
                "fitted"
            )
    return streams


def refuse_endless(streams: Sequence[StreamingDataset], who: str, remedy: str) -> None:
    """Refuse a stream that was declared endless, of which all rows cannot be read."""
    for stream in streams:
        if stream._endless:
            name = stream.as_tensor().name
            raise StreamError(f"{who} reads all rows, but the stream {name!r} has no end; {remedy}")


def gaussian_group(approx: Approximation) -> Group:
    """Return the one group of a mean-field or full-rank approximation.

    Raises
    ------
    TypeError
        If *approx* is of another family, mixes families, or has parameters of the user's own.
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


def names(group: Group) -> tuple[str, ...]:
    """Return a name for each unconstrained parameter, such as ``"sigma_log__"`` or ``"b[2]"``."""
    return tuple(
        name + str(list(index)) if index else name
        for name, _, shape, _ in group.ordering.values()
        for index in np.ndindex(shape)
    )


def mean(group: Group) -> np.ndarray:
    """Return a copy of the means, shape (d,)."""
    return np.array(_parameter(group, "mu").get_value(borrow=True), "float64")


def set_mean(group: Group, values: np.ndarray) -> None:
    _set(_parameter(group, "mu"), values)


def scale(group: Group) -> np.ndarray:
    """Return standard deviations, shape (d,), or a lower Cholesky factor, shape (d, d)."""
    if isinstance(group, MeanFieldGroup):
        return np.logaddexp(0, np.asarray(_parameter(group, "rho").get_value(), "float64"))
    factor = np.zeros((group.ddim, group.ddim))
    factor[np.tril_indices(group.ddim)] = _parameter(group, "L_tril").get_value()
    np.fill_diagonal(factor, np.logaddexp(0, np.diag(factor)))
    return factor


def place(group: Group, means: np.ndarray, scales: np.ndarray, known: Polished) -> None:
    """Set the means, and the scales in the form that :func:`scale` returns, and note what is known."""
    set_mean(group, means)
    if isinstance(group, MeanFieldGroup):
        _set(_parameter(group, "rho"), _inverse_softplus(scales))
    else:
        factor = scales.copy()
        np.fill_diagonal(factor, _inverse_softplus(np.diag(scales)))
        _set(_parameter(group, "L_tril"), factor[np.tril_indices(group.ddim)])
    _parameter(group, "mu").tag.polished = mean(group), scale(group), known


def polished(group: Group) -> Polished:
    """Return what :func:`place` noted, or nothing if another mean or scale was set since."""
    noted: Any = getattr(_parameter(group, "mu").tag, "polished", (None, None, None))
    is_same = all(map(np.array_equal, noted[:2], (mean(group), scale(group))))
    return noted[2] if is_same else Polished(np.ones(group.ddim))


def marginal_sd(scale: np.ndarray) -> np.ndarray:
    """Return the standard deviation of each parameter, for a result of :func:`scale`."""
    return scale if scale.ndim == 1 else np.linalg.norm(scale, axis=1)


def log_volume(scale: np.ndarray) -> float:
    """Return the logarithm of the determinant of a scale."""
    return float(np.log(np.diag(scale) if scale.ndim == 2 else scale).sum())


def times(scale: np.ndarray, draw: np.ndarray) -> np.ndarray:
    """Return a scale times a standard normal draw."""
    return scale @ draw if scale.ndim == 2 else scale * draw


def _parameter(group: Group, name: str) -> SharedVariable:
    parameters: Any = group.shared_params  # PyMC declares it as None
    return parameters[name]


def _set(variable: SharedVariable, values: np.ndarray) -> None:
    variable.set_value(np.asarray(values, variable.type.dtype))


def _inverse_softplus(values: np.ndarray) -> np.ndarray:
    return values + np.log(-np.expm1(-values))
