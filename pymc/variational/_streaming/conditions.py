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
"""What the likelihoods of a model need of the rows of a stream, derived from its graph."""

import operator

from collections.abc import Callable, Iterator, Sequence
from functools import reduce
from typing import Any

import numpy as np
import pytensor.tensor as pt

from pytensor import function
from pytensor.graph.basic import Constant, Variable
from pytensor.graph.replace import clone_replace
from pytensor.graph.rewriting.utils import rewrite_graph
from pytensor.graph.traversal import ancestors, explicit_graph_inputs
from pytensor.scalar import basic as scalar
from pytensor.tensor.basic import Alloc, Join, MakeVector
from pytensor.tensor.elemwise import DimShuffle, Elemwise
from pytensor.tensor.math import Sum
from pytensor.tensor.shape import Reshape, Shape_i, SpecifyShape
from pytensor.tensor.subtensor import (
    AdvancedIncSubtensor,
    AdvancedSubtensor,
    IncSubtensor,
    Subtensor,
    get_idx_list,
)

from pymc.variational._streaming.contract import Condition, Contract
from pymc.variational._streaming.likelihood import (
    UNCOMPILED,
    LikelihoodGraph,
    RowAxes,
    columns_read,
    is_shape,
)

__all__ = ["derive_contract"]

_MOST_COLUMNS = 64
"""Columns of a condition that are looked at one by one."""
_VIEWS = (
    *(AdvancedSubtensor, Alloc, DimShuffle, IncSubtensor, Join, MakeVector, Reshape),
    *(SpecifyShape, Subtensor),
)
_KEEPS_WHOLE = (
    *(scalar.Abs, scalar.Add, scalar.Cast, scalar.Clip, scalar.Identity, scalar.Mul, scalar.Neg),
    *(scalar.ScalarMaximum, scalar.ScalarMinimum, scalar.Second, scalar.Sub, scalar.Switch),
)


def derive_contract(
    graph: LikelihoodGraph,
    axes: RowAxes,
    likelihoods: Sequence[Variable],
    names: tuple[str, ...] | None,
) -> Contract:
    """Derive from the graph of a model what must hold for each row of its stream.

    Derived are whole numbers where a column is cast to integers, indices within the axis that they
    index, observed values within a support that does not depend on parameters, and the bounds of
    what rows alone give to a distribution. Whatever depends on parameters, or on several rows, is
    left out.
    """
    needed = *_casts(axes), *_indices(axes), *_parameters(graph, axes)
    found = [(*condition, False) for condition in needed]
    for rv, term in zip(likelihoods, graph.terms):
        supports = _supports(term, axes)
        found += [(bad, axis, _outside(rv), True) for bad, axis in supports]
    conditions = []
    for bad, axis, text, is_support in found:
        for separate in _by_row(bad, axis, graph, axes):
            part: Any = rewrite_graph(separate, include=("canonicalize",))
            columns = columns_read([part], graph.rows)
            compute = _computable(part, graph.rows, axes) if len(columns) else None
            if compute is not None:
                convex = len(columns) == 1 and _is_convex(part, graph.rows)
                conditions.append(Condition(part, compute, columns, text, is_support, convex))
    return Contract(conditions, graph.rows, names)


_Found = tuple[Any, Any, str]


def _casts(axes: RowAxes) -> Iterator[_Found]:
    for node in axes.nodes:
        if not isinstance(getattr(node.op, "scalar_op", None), scalar.Cast):
            continue
        (value,), (cast,) = node.inputs, node.outputs
        if (
            axes.is_by_row(value)
            and cast.type.dtype.startswith(("int", "uint"))
            and not np.can_cast(value.type.dtype, cast.type.dtype)
            and _is_whole(value, axes)
        ):
            text = (
                f", which the model casts to {cast.type.dtype}, and so changes; round the column "
                "in the model if that is meant, as pt.floor does"
            )
            yield pt.neq(value, cast), axes.of(value), text


def _is_whole(value: Variable, axes: RowAxes) -> bool:
    """Whether an expression is whole where the columns in it are.

    A column that is multiplied before the cast is put into bins, and meant to be rounded down.
    """
    products = 0
    columns = set()
    stack = [value]
    while stack:
        var = stack.pop()
        op = var.owner and var.owner.op
        if not var.type.dtype.startswith("float"):
            continue
        if isinstance(op, Subtensor) and axes.is_by_row(var) and var.owner.inputs[0].owner is None:
            columns.add(var)
        elif not axes.is_by_row(var):
            if (axes.value(var) != np.floor(axes.value(var))).any():
                return False
        elif isinstance(op, _VIEWS):
            stack += [v for v in var.owner.inputs if axes.is_by_row(v)]
        elif isinstance(op, Elemwise) and isinstance(op.scalar_op, _KEEPS_WHOLE):
            products += isinstance(op.scalar_op, scalar.Mul)
            stack += var.owner.inputs[isinstance(op.scalar_op, scalar.Switch) :]
        elif op is not None:
            return False
    return not products or len(columns) > 1


def _indices(axes: RowAxes) -> Iterator[_Found]:
    for node in axes.nodes:
        if not isinstance(node.op, AdvancedSubtensor | AdvancedIncSubtensor):
            continue
        x, *rest = node.inputs
        entries = get_idx_list(
            [x, *rest[isinstance(node.op, AdvancedIncSubtensor) :]], node.op.idx_list
        )
        for axis, index in enumerate(entries):
            if isinstance(index, slice) or index.type.dtype == "bool" or not axes.is_by_row(index):
                continue
            if axes.is_by_row(x) and axes.of(x) == axis:
                continue
            n = int(np.shape(axes.value(x))[axis])
            text = f", which indexes an axis of length {n}; make the axis as long as it takes"
            yield (index < -n) | (index >= n), axes.of(index), text


def _parameters(graph: LikelihoodGraph, axes: RowAxes) -> Iterator[_Found]:
    for condition, name in graph.checks.items():
        if axes.is_by_row(condition):
            text = (
                f", where the model needs {name}, or the log-likelihood of the whole batch is -inf; "
                "leave such rows out of the source"
            )
            yield pt.invert(condition), axes.of(condition), text


def _supports(term: Variable, axes: RowAxes, given: Any = None) -> Iterator[tuple[Any, Any]]:
    """Yield where a sum of terms is -inf whatever its other terms are, and its row axis.

    *given* is a condition on the rows under which the result has this term.
    """
    op = term.owner and term.owner.op
    if not isinstance(op, Elemwise):
        through = isinstance(op, Alloc) or (given is None and isinstance(op, DimShuffle | Sum))
        if through and (given is None or given.type.ndim == term.owner.inputs[0].type.ndim):
            yield from _supports(term.owner.inputs[0], axes, given)
    elif isinstance(op.scalar_op, scalar.Switch):
        condition, *values = term.owner.inputs
        for value, holds in zip(values, (True, False)):
            implied = _implied(condition, holds, axes)
            if implied is None or not axes.is_by_row(condition):
                continue
            under = implied if given is None else implied & given
            if _is_minus_infinity(value):
                yield under, axes.of(condition)
            else:
                yield from _supports(value, axes, under)
    elif isinstance(op.scalar_op, scalar.Add | scalar.Cast | scalar.Identity | scalar.Mul):
        for part in term.owner.inputs:
            yield from _supports(part, axes, given)
    elif isinstance(op.scalar_op, scalar.Sub):
        yield from _supports(term.owner.inputs[0], axes, given)


def _implied(condition: Variable, holds: bool, axes: RowAxes) -> Any:
    """Return a condition on rows alone under which *condition* does, or does not, hold."""
    shapes = [v for v in ancestors([condition]) if is_shape(v)]
    parameters = set(explicit_graph_inputs([condition])) & set(ancestors([condition], shapes))
    if parameters <= {axes.rows}:
        is_bool = condition.type.dtype == "bool"
        if holds:
            return condition if is_bool else pt.neq(condition, 0)
        return pt.invert(condition) if is_bool else pt.eq(condition, 0)
    op = condition.owner and condition.owner.op
    both = isinstance(op, Elemwise) and isinstance(op.scalar_op, scalar.AND | scalar.Mul)
    if holds or not both:
        return None
    parts = [_implied(part, False, axes) for part in condition.owner.inputs]
    known = [part for part in parts if part is not None]
    return reduce(operator.or_, known) if known else None


def _is_minus_infinity(var: Variable) -> bool:
    while var.owner and isinstance(var.owner.op, DimShuffle | Alloc):
        var = var.owner.inputs[0]
    return isinstance(var, Constant) and bool(np.all(var.data == -np.inf))


def _outside(rv: Variable) -> str:
    return (
        f", outside the support of {rv.name!r}, so that its log-likelihood is -inf; leave such "
        "rows out of the source"
    )


def _by_row(bad: Any, axis: int, graph: LikelihoodGraph, axes: RowAxes) -> Iterator[Any]:
    """Yield conditions with rows along their only axis, in which no parameter occurs."""
    known = _known_shapes(bad, graph, axes)
    bad = pt.moveaxis(clone_replace(bad, known) if known else bad, axis, 0)
    width = bad.type.shape[1] if bad.type.ndim == 2 else None
    if width is not None and width <= _MOST_COLUMNS:
        yield from (bad[:, i] for i in range(width))
    else:
        yield bad if bad.type.ndim == 1 else bad.any(axis=tuple(range(1, bad.type.ndim)))


def _known_shapes(bad: Variable, graph: LikelihoodGraph, axes: RowAxes) -> dict[Variable, Variable]:
    """Return the shapes of what depends on parameters, which they do not change."""
    known: dict[Variable, Variable] = {}
    for var in ancestors([bad]):
        if not is_shape(var):
            continue
        (of,) = var.owner.inputs
        lengths = [pt.constant(n, dtype="int64") for n in np.shape(axes.value(of))]
        if axes.is_by_row(of):
            lengths[axes.of(of)] = graph.rows.shape[0]  # type: ignore[index]
        op = var.owner.op
        known[var] = lengths[op.i] if isinstance(op, Shape_i) else pt.stack(lengths)
    return known


def _computable(bad: Variable, rows: Variable, axes: RowAxes) -> Callable | None:
    """Return a function of any number of rows, if a condition depends on nothing else."""
    if not set(explicit_graph_inputs([bad])) <= {rows}:
        return None
    compute = function([rows], bad, mode=UNCOMPILED)
    some = axes.value(rows)
    try:
        shapes = [compute(np.resize(some, (n, *some.shape[1:]))).shape for n in (2, 3)]
    except Exception:
        return None
    return compute if shapes == [(2,), (3,)] else None


def _is_convex(bad: Variable, rows: Variable) -> bool:
    """Whether a condition only compares a column with constants, on either side of it."""
    op = bad.owner and bad.owner.op
    if isinstance(op, Elemwise) and isinstance(op.scalar_op, scalar.Invert):
        return _are_half_lines(bad.owner.inputs[0], rows, scalar.AND)
    return _are_half_lines(bad, rows, scalar.OR)


def _are_half_lines(condition: Variable, rows: Variable, joined_by: type) -> bool:
    op = condition.owner and condition.owner.op
    if not isinstance(op, Elemwise):
        return False
    if isinstance(op.scalar_op, joined_by):
        return all(_are_half_lines(part, rows, joined_by) for part in condition.owner.inputs)
    if not isinstance(op.scalar_op, scalar.LT | scalar.GT | scalar.LE | scalar.GE):
        return False
    return all(
        rows not in ancestors([v]) or (v.owner and v.owner.inputs[0] is rows)
        for v in condition.owner.inputs
    )
