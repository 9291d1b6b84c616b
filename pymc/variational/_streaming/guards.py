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
"""Refuse models whose posterior would be wrong in minibatches."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np

from pytensor import function
from pytensor.compile.mode import Mode
from pytensor.compile.sharedvalue import SharedVariable
from pytensor.graph.basic import Constant, Variable
from pytensor.graph.rewriting.basic import in2out
from pytensor.graph.traversal import ancestors, explicit_graph_inputs
from pytensor.tensor.type_other import NoneConst

from pymc.initial_point import make_initial_point_expression
from pymc.logprob.utils import local_remove_check_parameter
from pymc.model.core import Model
from pymc.pytensorf import replace_rng_nodes
from pymc.variational._streaming.errors import StreamError, warn
from pymc.variational.minibatch_rv import MinibatchRandomVariable

__all__ = [
    "WITHOUT_LOSS",
    "check_model",
    "check_other_streams",
    "depends_on",
    "total_size_of",
]

_UNCOMPILED = Mode(linker="py", optimizer="minimum_compile")

_UNCHECKED = _UNCOMPILED.register((in2out(local_remove_check_parameter), 0))
"""Parameters are checked for all rows at once, and some of the rows tried here may fail."""

_JITTERS = (0.1, 0.1, 0.1, 0.01, 0.01, 0.001)
"""How far from the initial point to look for one where the log-likelihood is finite."""

_FAR = 1e6
"""A value beyond the numbers that stand for missing values, such as -999 and 99999."""

_Terms = Callable[[np.ndarray], list[np.ndarray]]
"""Function from a batch to the log-likelihood of each row, for each likelihood."""

WITHOUT_LOSS = (
    "the fit has no loss, because of score=False or a method without one, such as ASVGD: PyMC "
    "then makes every step with the same random draw, and the posterior is wrong; leave score out, "
    "and fit with ADVI or FullRankADVI"
)
"""Why a stream refuses a fit that does not compute its loss."""


def check_model(model: Model, buffer: SharedVariable, total_size: int | None) -> None:
    """Refuse a model whose posterior would be wrong with minibatches in *buffer*.

    The checks use the batch that is there. They raise a StreamError if the model does not depend
    on the stream, if an unobserved variable does, or if an observed one that does has no or
    another *total_size*, or a log-likelihood that is not one term per row.
    """
    likelihoods = [rv for rv in model.observed_RVs if depends_on(model, rv, buffer)]
    potentials = [p for p in model.potentials if depends_on(model, p, buffer)]
    if not likelihoods and not potentials:
        raise StreamError(
            f"no observed variable of the model depends on the stream {buffer.name!r}; "
            "build the likelihood from as_tensor(), or leave this callback out; if another model "
            "is fitted, call fit_callback() in the context of that one"
        )
    for rv in model.free_RVs:
        if depends_on(model, rv, buffer):
            raise StreamError(
                f"{rv.name!r} is not observed but its prior depends on the stream "
                f"{buffer.name!r}; only likelihoods can be fitted in minibatches"
            )
    for rv in likelihoods:
        _check_total_size(rv, total_size)
    if likelihoods:
        _check_rows(model, likelihoods, buffer)
    for potential in potentials:
        warn(
            f"the Potential {potential.name!r} depends on the stream {buffer.name!r}, and PyMC "
            "never scales a Potential to the whole data; scale it yourself, or write it as an "
            "observed variable with total_size"
        )


def check_other_streams(model: Model) -> None:
    """Refuse a model that uses a stream without rows, beside one whose callback was called.

    PyMC computes a loss without them where no total_size scales them, as in a Potential.
    """
    roots = [*model.basic_RVs, *model.rvs_to_values.values(), *model.potentials]
    shared = [a for a in ancestors(roots) if isinstance(a, SharedVariable)]
    for buffer in shared:
        if hasattr(buffer.tag, "fit_callback") and not len(buffer.get_value(borrow=True)):
            raise StreamError(
                f"the model also uses the stream {buffer.name!r}, which has no rows yet; "
                "pass its fit_callback() to the fit, too"
            )


def depends_on(model: Model, var: Variable, buffer: SharedVariable) -> bool:
    """Whether *var* or its value is computed from *buffer*.

    Transforming a model copies its shared variables, but they keep the container.
    """
    value = model.rvs_to_values.get(var)
    roots = [var] if value is None else [var, value]
    return any(getattr(a, "container", None) is buffer.container for a in ancestors(roots))


def _check_total_size(rv: Variable, total_size: int | None) -> None:
    found = total_size_of(rv)
    if found == ([] if total_size is None else [total_size]):
        return
    if not found:
        problem = "has no total_size, so its likelihood counts one batch instead of all rows"
    else:
        problem = f"has total_size={found if len(found) > 1 else found[0]}"
    raise StreamError(
        f"{rv.name!r} depends on the stream but {problem}; pass total_size={total_size}, "
        "which is the stream's total_size"
    )


def total_size_of(rv: Variable) -> list:
    """Return the total_size of an observed variable by axis, without trailing Nones."""
    if rv.owner is None or not isinstance(rv.owner.op, MinibatchRandomVariable):
        return []
    sizes = [_constant(size) for size in rv.owner.inputs[1:]]
    while sizes and sizes[-1] is None:
        sizes.pop()
    return sizes


def _constant(size: Variable) -> int | str | None:
    if NoneConst.equals(size):
        return None
    return int(size.data) if isinstance(size, Constant) else str(size)


def _check_rows(model: Model, likelihoods: Sequence[Variable], buffer: SharedVariable) -> None:
    """Check that each log-likelihood has one term per row, which depends on that row alone."""
    batch = buffer.get_value()
    logps = _row_logps(model, likelihoods, buffer)
    terms = logps(batch)
    for rv, term in zip(likelihoods, terms):
        _check_shape(rv, term, len(batch))
    for rv, term, rolled in zip(likelihoods, terms, logps(np.roll(batch, 1, axis=0))):
        # At another place in the batch, products of matrices may round a row differently.
        if not _same(rolled, np.roll(term, 1, axis=0), rtol=1e-9, atol=1e-8):
            raise _tied(rv)
    for kept, others in _with_other_rows(batch, logps):
        for rv, term, other in zip(likelihoods, terms, others):
            _check_shape(rv, other, len(batch), " for other values of the rows")
            if not _same(other[kept], term[kept]):
                raise _tied(rv)


def _check_shape(rv: Variable, term: np.ndarray, n_rows: int, when: str = "") -> None:
    if term.ndim == 0 or len(term) != n_rows:
        raise StreamError(
            f"the log-likelihood of {rv.name!r} has shape {term.shape}{when}; streaming needs one "
            f"term per row of the batch, with the {n_rows} rows as the leading axis"
        )


def _tied(rv: Variable) -> StreamError:
    return StreamError(
        f"the log-likelihood of {rv.name!r} ties the rows of a batch together: a row's "
        "term changes with the other rows or with its place in the batch; minibatches "
        "of rows need a likelihood that is a product over rows"
    )


def _with_other_rows(batch: np.ndarray, logps: _Terms) -> Iterator[tuple[slice, list[np.ndarray]]]:
    """Yield slices of the rows that are kept, and the terms where the others are replaced."""
    # First, other rows of the batch: a row's term must not change when its neighbours do.
    for first in (0, 1):
        replaced, kept = slice(first, None, 2), slice(1 - first, None, 2)
        other = batch.copy()
        other[replaced] = np.resize(batch[kept], batch[replaced].shape)
        yield kept, logps(other)
    # Then values that this batch may not have: a model can filter on them or divide by them.
    limits = np.iinfo(batch.dtype) if batch.dtype.kind in "iu" else np.finfo(batch.dtype)
    far = _FAR + 10 * np.abs(batch.astype("float64")).max(axis=0)
    for row in (0 * far, -far, far):
        extreme = np.clip(row, limits.min / 2, limits.max / 2).astype(batch.dtype)
        columns = np.arange(extreme.size)
        for terms in _with_extreme_row(batch, extreme.ravel(), columns, logps):
            yield slice(1, None, 2), terms


def _with_extreme_row(
    batch: np.ndarray, row: np.ndarray, columns: np.ndarray, logps: _Terms
) -> Iterator[list[np.ndarray]]:
    """Yield the terms where every other row has the values of *row* in *columns*.

    Where the model fails, as it does for an index that is out of range, each half of the columns
    is tried by itself, and so on.
    """
    other = batch.copy()
    other.reshape(len(batch), -1)[::2, columns] = row[columns]
    try:
        terms = logps(other)
    except Exception:
        for half in np.array_split(columns, 2) if len(columns) > 1 else ():
            yield from _with_extreme_row(batch, row, half, logps)
    else:
        yield terms


def _row_logps(model: Model, likelihoods: Sequence[Variable], buffer: SharedVariable) -> _Terms:
    """Compile the log-likelihood terms as a function of the batch, at a random point."""
    graphs: Any = model.logp(list(likelihoods), sum=False)
    batch = buffer.type(name="batch")
    roots = list(explicit_graph_inputs(graphs))
    copies = [v for v in ancestors(graphs) if getattr(v, "container", None) is buffer.container]
    values = [v for v in model.value_vars if v in roots]
    compiled = function(
        [batch, *values],
        graphs,
        givens=dict.fromkeys(copies, batch),
        mode=_UNCHECKED,
        on_unused_input="ignore",
    )

    def terms(rows: np.ndarray, point: Sequence[np.ndarray]) -> list[np.ndarray]:
        with np.errstate(all="ignore"):
            return compiled(rows, *point)

    start = _initial_point(model)
    point = _finite_point(partial(terms, buffer.get_value()), [start[v] for v in values])
    return lambda rows: terms(rows, point)


def _finite_point(
    terms: Callable[[Sequence[np.ndarray]], list[np.ndarray]], start: Sequence[np.ndarray]
) -> list[np.ndarray]:
    """Return the one of some random points near *start* where most terms are finite."""
    rng = np.random.default_rng(0)
    points = [[_jitter(value, size, rng) for value in start] for size in _JITTERS]
    shares = [min(np.isfinite(t).sum() / max(1, t.size) for t in terms(p)) for p in points]
    return points[int(np.argmax(shares))]


def _initial_point(model: Model) -> dict[Variable, np.ndarray]:
    """Return what ``model.initial_point`` does, without waiting for a compiler."""
    expressions = make_initial_point_expression(
        free_rvs=model.free_RVs,
        rvs_to_transforms=model.rvs_to_transforms,
        initval_strategies=model.rvs_to_initial_values,
        return_transformed=True,
    )
    found = function([], replace_rng_nodes(expressions), mode=_UNCOMPILED)()
    values = [model.rvs_to_values[rv] for rv in model.free_RVs]
    return {value: np.asarray(number) for value, number in zip(values, found)}


def _jitter(value: np.ndarray, size: float, rng: np.random.Generator) -> np.ndarray:
    if value.dtype.kind != "f":
        return value
    return (value + rng.uniform(-size, size, value.shape)).astype(value.dtype)


def _same(a: np.ndarray, b: np.ndarray, *, rtol: float = 1e-12, atol: float = 0) -> bool:
    rtol = 1e-5 if a.dtype == np.float32 else rtol
    return np.allclose(a, b, rtol=rtol, atol=atol, equal_nan=True)
