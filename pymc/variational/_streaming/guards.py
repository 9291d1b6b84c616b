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

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from pytensor.compile.sharedvalue import SharedVariable
from pytensor.graph.basic import Constant, Variable
from pytensor.graph.traversal import ancestors
from pytensor.tensor.type_other import NoneConst
from pytensor.xtensor.type import XTensorType

from pymc.model.core import Model
from pymc.variational._streaming.contract import Contract, derive_contract
from pymc.variational._streaming.errors import StreamError, warn
from pymc.variational._streaming.likelihood import (
    Factors,
    LikelihoodGraph,
    TiedError,
    columns_read,
    is_of,
)
from pymc.variational.minibatch_rv import MinibatchRandomVariable, get_scaling

__all__ = [
    "WITHOUT_LOSS",
    "check_model",
    "contract_for",
    "depends_on",
    "infinite_row",
    "other_batches",
    "scaling",
    "streams_of",
    "total_size_of",
    "warn_of_unmoved",
]

WITHOUT_LOSS = (
    "the fit has no loss, because of score=False or a method without one, such as ASVGD: PyMC 6.4 "
    "makes every step with the same random draw then, and the posterior is wrong; leave score out, "
    "and fit with ADVI or FullRankADVI"
)
"""Why a stream refuses a fit that does not compute its loss."""

_ROUNDED = 0.01
"""Share of terms that may differ by rounding, where single floats cancel."""
_MOST_SHOWN = 8
"""Values of a row that a message shows."""

_LEAST_ROWS = 8
"""Rows from which a contract is derived, at least."""


def check_model(
    factors: Factors,
    buffer: SharedVariable,
    total_size: int | None,
    columns: tuple[str, ...] | None,
    offset: int,
) -> Contract:
    """Refuse a model whose posterior would be wrong with minibatches in *buffer*.

    Raises a StreamError if the model does not depend on the stream, if an unobserved variable
    does, or if an observed one that does has no or another *total_size*, or a log-likelihood that
    is not one term per row.  Returns conditions on the rows, which those in the buffer meet; the
    first of these is at *offset*.
    """
    model = factors.model
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
        for other in streams_of(model, [rv]):
            if not is_of(other, buffer):
                raise StreamError(
                    f"{rv.name!r} depends on the streams {buffer.name!r} and {other.name!r}, whose "
                    "rows do not belong together; stream their columns from one source"
                )
        _check_total_size(model, rv, total_size)
    batch = buffer.get_value(borrow=True)
    if len(batch) == 1:
        batch = _at_least(_LEAST_ROWS, batch)
    graph = LikelihoodGraph(factors, likelihoods, buffer, batch, potentials)
    contract = derive_contract(graph, columns)
    contract.check(batch, offset)
    _refuse_nan(factors, graph, batch)
    _check_rows(graph, batch)
    for potential in potentials:
        warn(
            f"the Potential {potential.name!r} depends on the stream {buffer.name!r}, and PyMC "
            "never scales a Potential to the whole data; scale it yourself, or write it as an "
            "observed variable with total_size"
        )
    return contract


def contract_for(
    factors: Factors,
    buffer: SharedVariable,
    rows: np.ndarray,
    columns: tuple[str, ...] | None,
    predicted: Mapping[str, Variable] = {},
) -> Contract:
    """Derive what the likelihoods of a model need of rows, such as indices within their axis.

    Variables that are *predicted* must have a value for each row that depends on that row alone.
    """
    model = factors.model
    likelihoods = [rv for rv in model.observed_RVs if depends_on(model, rv, buffer)]
    others = {name: rv for name, rv in predicted.items() if rv not in likelihoods}
    rows = _at_least(_LEAST_ROWS, rows)
    graph = LikelihoodGraph(factors, likelihoods, buffer, rows, list(others.values()))
    for name, var in zip(others, graph.others):
        _require_by_row(name, var, graph)
    return derive_contract(graph, columns)


def _require_by_row(name: str, var: Variable, graph: LikelihoodGraph) -> None:
    """Refuse a variable whose leading axis is not the rows, or that ties them."""
    try:
        reason = "" if graph.axis(var) == 0 else "its rows lie along another axis than the first"
    except TiedError as err:
        reason = str(err)
    if reason:
        raise StreamError(
            f"{name!r} has not one value or vector per row, which depends on that row alone "
            f"({reason}); predict a variable that has"
        )


def other_batches(model: Model, buffer: SharedVariable) -> dict[SharedVariable, np.ndarray]:
    """Return the batches of the other streams of a model, and refuse one that has no rows.

    PyMC computes a loss without them where no total_size scales them, as in a Potential.
    """
    others = [other for other in streams_of(model) if not is_of(other, buffer)]
    batches = {other: other.get_value(borrow=True) for other in others}
    for other, rows in batches.items():
        if not len(rows):
            raise StreamError(
                f"the model also uses the stream {other.name!r}, which has no rows yet; "
                "pass its fit_callback() to the fit, too"
            )
    return batches


def warn_of_unmoved(batches: Mapping[SharedVariable, np.ndarray]) -> None:
    """Warn of streams that have not moved on from a batch since the last step."""
    for buffer, rows in batches.items():
        if buffer.get_value(borrow=True) is rows:
            warn(
                f"the stream {buffer.name!r} has not moved since the last step, so that one batch "
                "is fitted as all its rows; pass its fit_callback() to the fit, too"
            )


def infinite_row(
    factors: Factors,
    buffer: SharedVariable,
    batches: Iterable[np.ndarray],
    columns: tuple[str, ...] | None,
    offset: int = 0,
) -> str:
    """Say which row has no finite log-likelihood around the initial point, or return "".

    The first row is at *offset*.
    """
    model, graph = factors.model, None
    likelihoods = [rv for rv in model.observed_RVs if depends_on(model, rv, buffer)]
    for batch in batches:
        graph = graph or LikelihoodGraph(factors, likelihoods, buffer, batch)
        for term in graph.evaluate(batch):
            bad = ~np.isfinite(term).reshape(len(batch), -1).all(axis=1)
            if bad.any():
                row, names = int(np.argmax(bad)), columns or range(batch[0].size)
                read = columns_read(graph.terms, graph.rows)[:_MOST_SHOWN]
                values = ", ".join(f"{names[c]}: {batch[row].flat[c]:g}" for c in read)
                remedy = "leave such rows out of the source"
                if graph.is_possible(batch, row):
                    remedy = "set initval of the parameters on which its support depends"
                return (
                    f"row {offset + row} of the stream has no finite log-likelihood around the "
                    f"model's initial point; {remedy} (it has {values})"
                )
        offset += len(batch)
    return ""


def streams_of(model: Model, variables: Sequence[Variable] | None = None) -> list[SharedVariable]:
    """Return the buffer of each stream that *variables*, by default all of *model*, depend on."""
    if variables is None:
        variables = [*model.basic_RVs, *model.potentials]
    found = [a for a in _inputs(model, variables) if hasattr(a.tag, "fit_callback")]
    return list({buffer.container: buffer for buffer in found}.values())


def depends_on(model: Model, var: Variable, buffer: SharedVariable) -> bool:
    """Whether *var*, or a value that takes its place in the density, is computed from *buffer*."""
    return any(is_of(a, buffer) for a in _inputs(model, [var]))


def _inputs(model: Model, variables: Sequence[Variable]) -> list[SharedVariable]:
    """Return shared variables from which *variables*, or the values of those above, are computed."""
    above = list(ancestors(variables))
    values = [model.rvs_to_values[v] for v in above if v in model.rvs_to_values]
    return [a for a in ancestors([*variables, *values]) if isinstance(a, SharedVariable)]


def _check_total_size(model: Model, rv: Variable, total_size: int | None) -> None:
    found = total_size_of(rv)
    wanted = [] if total_size is None else [total_size]
    shape = model.rvs_to_values[rv].type.shape
    if found[:1] == wanted and all(n in (None, m) for n, m in zip(found[1:], shape[1:])):
        return
    if not found:
        problem = "has no total_size, so its likelihood counts one batch instead of all rows"
    else:
        problem = f"has total_size={found if len(found) > 1 else found[0]}"
    raise StreamError(f"{rv.name!r} depends on the stream but {problem}; {_remedy(rv, total_size)}")


def _remedy(rv: Variable, total_size: int | None) -> str:
    """Return how the variable can be given its total_size: some kinds of variables take none."""
    inner = getattr(rv.owner.op, "fgraph", None)
    if inner is not None and any(
        isinstance(node.op, MinibatchRandomVariable) for node in inner.apply_nodes
    ):
        return "write the sum over the latent variable as a pm.Mixture with total_size"
    if isinstance(rv.type, XTensorType):
        return f"write it with pm instead of pymc.dims, of mu.values, with total_size={total_size}"
    return (
        f"pass total_size={total_size}, which is the stream's total_size, together with observed="
    )


def total_size_of(rv: Variable) -> list:
    """Return the total_size of an observed variable by axis, without trailing Nones."""
    if rv.owner is None or not isinstance(rv.owner.op, MinibatchRandomVariable):
        return []
    sizes = [_constant(size) for size in rv.owner.inputs[1:]]
    while sizes and sizes[-1] is None:
        sizes.pop()
    return sizes


def scaling(model: Model, rv: Variable) -> Variable | float:
    """Return the factor by which PyMC scales the likelihood of a batch to all rows."""
    if not total_size_of(rv):
        return 1.0
    return get_scaling(rv.owner.inputs[1:], model.rvs_to_values[rv].shape)


def _constant(size: Variable) -> int | str | None:
    if NoneConst.equals(size):
        return None
    return int(size.data) if isinstance(size, Constant) else str(size)


def _refuse_nan(factors: Factors, graph: LikelihoodGraph, batch: np.ndarray) -> None:
    """Refuse what makes all rows NaN, such as a centre that was computed while there were no rows."""
    terms = (np.isnan(term).any(axis=tuple(range(1, term.ndim))) for term in graph.evaluate(batch))
    if not any(is_nan.all() for is_nan in terms):
        return
    inputs = (v for v in ancestors(graph.terms) if isinstance(v, Constant | SharedVariable))
    values = [*map(graph.value, inputs), *factors.initial_point.values()]
    floats = (v for v in values if isinstance(v, np.ndarray) and v.dtype.kind == "f")
    if any(np.isnan(v).any() for v in floats):
        raise StreamError(
            f"the model holds NaN, as what is computed from {graph.rows.name!r} before it has rows; "
            "build that part of the model within `with ds.rows(x):`, where x are two rows with "
            ".min and .max of each column in summarize(source)"
        )


def _at_least(n_rows: int, rows: np.ndarray) -> np.ndarray:
    """Repeat rows: along which axis they lie, and what ties them, does not show where there is one."""
    return np.resize(rows, (max(len(rows), n_rows), *rows.shape[1:]))


def _check_rows(graph: LikelihoodGraph, batch: np.ndarray) -> None:
    """Check that each log-likelihood has one term per row, which depends on that row alone."""
    terms = graph.evaluate(batch)
    for rv, var, term in zip(graph.likelihoods, graph.terms, terms):
        if term.ndim == 0 or len(term) != len(batch):
            raise StreamError(
                f"the log-likelihood of {rv.name!r} has shape {term.shape}; streaming needs one "
                f"term per row of the batch, with the {len(batch)} rows as the leading axis"
            )
        try:
            if graph.axis(var):
                raise TiedError("its rows lie along another axis than the first")
        except TiedError as err:
            raise _tied(graph, rv, err, len(batch)) from None
    _check_length(graph, batch, terms)


def _check_length(graph: LikelihoodGraph, batch: np.ndarray, terms: Sequence[np.ndarray]) -> None:
    """Check that a term is the same among fewer rows, but for its total_size, if there can be."""
    few = (len(batch) + 1) // 2
    try:
        others = graph.evaluate(batch[:few])
    except Exception:
        return
    for rv, term, other in zip(graph.likelihoods, terms, others):
        wanted = term[:few] * (len(batch) / few if total_size_of(rv) else 1)
        if len(other) != few:
            continue
        rtol = 1e-6 if other.dtype == np.float64 else 1e-3
        is_close = np.isclose(other, wanted, rtol=rtol, equal_nan=True)
        if is_close.mean() < 1 - _ROUNDED:
            raise StreamError(
                f"the log-likelihood of {rv.name!r} depends on the number of rows in the batch; "
                "leave that number out, since total_size scales a batch to all rows"
            )


def _tied(graph: LikelihoodGraph, rv: Variable, err: TiedError, n_rows: int) -> StreamError:
    used = set(ancestors([] if err.constant is None else [err.constant]))
    values = {v: graph.model.rvs_to_values[v] for v in graph.model.free_RVs}
    latents = [
        repr(v.name)
        for v, value in values.items()
        if value in used and n_rows in np.shape(graph.value(value))
    ]
    if latents:
        return StreamError(
            f"{', '.join(latents)} has one latent value for each row of a batch, which would stand "
            f"for other rows in every step; integrate it out of the likelihood of {rv.name!r}"
        )
    return StreamError(
        f"the log-likelihood of {rv.name!r} ties the rows of a batch together: {err}; "
        "minibatches of rows need a likelihood that is a product over rows"
    )
