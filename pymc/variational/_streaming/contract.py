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
"""What a model needs of each row of its stream, derived from its graph, and whether rows meet it."""

import operator
import threading

from collections.abc import Callable, Iterator, Sequence
from functools import reduce
from typing import Any, NamedTuple

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
from pytensor.tensor.subtensor import AdvancedSubtensor, IncSubtensor, Subtensor

from pymc.variational._streaming.errors import StreamError
from pymc.variational._streaming.likelihood import (
    UNCOMPILED,
    LikelihoodGraph,
    columns_read,
    compiling,
    indices_of,
    is_shape,
    within_bounds,
)

__all__ = ["Contract", "derive_contract"]

_MOST_COLUMNS = 64
"""Columns of a condition that are looked at one by one."""
_FEW_ROWS = 1 << 16
"""Rows for which a condition is computed without compiling it, which takes a second."""
_TILE = 1 << 10
"""Rows of which conditions are computed together, so that the values stay in the cache."""
_VIEWS = (
    *(AdvancedSubtensor, Alloc, DimShuffle, IncSubtensor, Join, MakeVector, Reshape),
    *(SpecifyShape, Subtensor),
)
_KEEPS_WHOLE = (
    *(scalar.Abs, scalar.Add, scalar.Cast, scalar.Clip, scalar.Identity, scalar.Mul, scalar.Neg),
    *(scalar.ScalarMaximum, scalar.ScalarMinimum, scalar.Second, scalar.Sub, scalar.Switch),
)
_NEGATED = {
    **{scalar.LT: scalar.GE, scalar.GE: scalar.LT, scalar.GT: scalar.LE, scalar.LE: scalar.GT},
    scalar.NEQ: scalar.EQ,
}

_computing = threading.Lock()
"""A function that is not compiled may be called by one thread at a time."""


class Interval(NamedTuple):
    """Values of a column for which a condition holds."""

    lower: float
    upper: float
    is_whole: bool
    """Whether they must be whole numbers, too."""


class Condition(NamedTuple):
    """Something that must not hold for a row."""

    bad: Any
    """Boolean variable of the rows, shape (n,)."""
    compute: Callable[[np.ndarray], np.ndarray]
    """Function from rows to whether each of them breaks the condition, shape (n,)."""
    columns: np.ndarray
    """Columns that it depends on, as numbers in the flattened row."""
    text: str
    """What follows the description of the value in a message."""
    is_support: bool
    interval: Interval | None
    """Values of its only column that do not break it, where they are, or hold, an interval."""


class Contract:
    """Conditions on the rows of a stream, which :meth:`check` holds them to.

    Where a condition leaves an interval of one column, a compiled loop compares the column with it.
    Others, such as those on several columns, are computed for each row.
    """

    def __init__(
        self, conditions: Sequence[Condition], rows: Variable, names: tuple[str, ...] | None
    ):
        self._conditions = conditions
        self._names, self._rows = names, rows
        self._dtype = np.dtype(rows.type.dtype)
        self._sample_shape = rows.type.shape[1:]
        width = int(np.prod(self._sample_shape))
        self._lower, self._upper = np.full(width, -np.inf), np.full(width, np.inf)
        self._whole = np.zeros(width, bool)
        columns = []
        for column, interval in ((one.columns[0], one.interval) for one in conditions):
            if interval is not None:
                columns.append(column)
                self._lower[column] = max(self._lower[column], interval.lower)
                self._upper[column] = min(self._upper[column], interval.upper)
                self._whole[column] |= interval.is_whole
        self._columns = np.unique(np.array(columns, np.int64))
        self._computed = [one for one in conditions if one.interval is None]
        self._n_computed = 0
        """Number of rows for which conditions were computed."""
        self._compiled: Callable[[np.ndarray], bool] | None = None

    def without_supports(self) -> "Contract":
        """Return the contract of rows whose observed values make no difference."""
        kept = [condition for condition in self._conditions if not condition.is_support]
        return Contract(kept, self._rows, self._names)

    def __reduce__(self) -> tuple[Any, ...]:
        """Leave what was compiled behind."""
        return Contract, (self._conditions, self._rows, self._names)

    def check(
        self, rows: np.ndarray, offset: int = 0, locate: Callable[[int], str] = lambda row: ""
    ) -> None:
        """Raise StreamError if one of *rows*, the first of which is at *offset*, breaks a condition.

        *locate* says in which file a row of the stream is. Several threads may call this.
        """
        kind, size = rows.dtype.kind, rows.dtype.itemsize
        if not rows.dtype.isnative or (kind == "f" and size not in (4, 8)):  # unknown to numba
            rows = rows.astype(np.float64 if kind == "f" else f"{kind}{size}")
        if not self._are_within(rows) or self._is_broken(rows):
            for condition in self._conditions:
                bad = self._compute(condition, rows)
                if bad.any():
                    row = int(np.argmax(bad))
                    values = self._describe(rows[row].ravel(), condition.columns)
                    place = f"row {offset + row} of the stream{locate(offset + row)}"
                    raise StreamError(f"{place} holds {values}{condition.text}")

    def compile(self) -> None:
        """Compile what is computed for many rows; never in a thread beside a fit, see `compiling`."""
        if self._n_computed > _FEW_ROWS and self._compiled is None:
            with compiling:
                self._compiled = self._compiled or _compiled(self._computed, self._rows)

    def _are_within(self, rows: np.ndarray) -> bool:
        from pymc.variational._streaming.batches.compiled import are_within

        flat = rows.reshape(len(rows), len(self._lower))  # of no rows, too
        return not len(self._columns) or are_within(
            flat, self._columns, self._lower, self._upper, self._whole
        )

    def _is_broken(self, rows: np.ndarray) -> bool:
        """Whether a row breaks one of the conditions that are computed."""
        if not self._computed:
            return False
        if self._compiled is not None:
            return self._compiled(rows)
        self._n_computed += len(rows)
        return any(self._compute(one, rows).any() for one in self._computed)

    def _compute(self, condition: Condition, rows: np.ndarray) -> np.ndarray:
        with _computing, np.errstate(all="ignore"):
            return condition.compute(rows.astype(self._dtype, copy=False))

    def _describe(self, row: np.ndarray, columns: np.ndarray) -> str:
        names: Sequence = self._names or list(np.ndindex(self._sample_shape))
        return " and ".join(f"{row[c]} in column {names[c]!r}" for c in columns[:3])


def _compiled(conditions: Sequence[Condition], rows: Variable) -> Callable[[np.ndarray], bool]:
    """Compile whether a row breaks one of some conditions, without the interpreter lock."""
    import numba

    broken = pt.stack([within_bounds(one.bad, rows).any() for one in conditions]).any()
    of_tile = function([rows], broken, mode="NUMBA", trust_input=True).vm.jit_fn
    dtype = np.dtype(rows.type.dtype)

    @numba.njit(nogil=True)
    def is_broken(rows):
        for first in range(0, len(rows), _TILE):
            if of_tile(rows[first : first + _TILE].astype(dtype))[0]:
                return True
        return False

    return is_broken


def derive_contract(graph: LikelihoodGraph, names: tuple[str, ...] | None) -> Contract:
    """Derive from the graph of a model what must hold for each row of its stream.

    Derived are whole numbers where a column is cast to integers, indices within the axis that they
    index, observed values within a support that does not depend on parameters, and the bounds of
    what rows alone give to a distribution. Whatever depends on parameters, or on several rows, is
    left out.
    """
    found = [(*one, False) for one in (*_casts(graph), *_indices(graph), *_parameters(graph))]
    for rv, term in zip(graph.likelihoods, graph.terms):
        text = (
            f", outside the support of {rv.name!r}, so that its log-likelihood is -inf; leave such "
            "rows out of the source"
        )
        found += [(bad, axis, text, True) for bad, axis in _supports(term, graph)]
    conditions = []
    for bad, axis, text, is_support in found:
        for separate in _by_row(bad, axis, graph):
            part: Any = rewrite_graph(separate, include=("canonicalize",))
            columns = columns_read([part], graph.rows)
            compute = _computable(part, graph) if len(columns) else None
            if compute is not None:
                interval = _interval(part, graph.rows) if len(columns) == 1 else None
                conditions.append(Condition(part, compute, columns, text, is_support, interval))
    return Contract(conditions, graph.rows, names)


_Found = tuple[Any, Any, str]


def _casts(graph: LikelihoodGraph) -> Iterator[_Found]:
    for node in graph.nodes:
        if not isinstance(getattr(node.op, "scalar_op", None), scalar.Cast):
            continue
        (value,), (cast,) = node.inputs, node.outputs
        if (
            graph.is_by_row(value)
            and cast.type.dtype.startswith(("int", "uint"))
            and not np.can_cast(value.type.dtype, cast.type.dtype)
            and _is_whole(value, graph)
        ):
            text = (
                f", which the model casts to {cast.type.dtype}, and so changes; round the column "
                "in the model if that is meant, as pt.floor does"
            )
            yield pt.neq(value, cast), graph.axis(value), text


def _is_whole(value: Variable, graph: LikelihoodGraph) -> bool:
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
        if isinstance(op, Subtensor) and graph.is_by_row(var) and var.owner.inputs[0].owner is None:
            columns.add(var)
        elif not graph.is_by_row(var):
            if (graph.value(var) != np.floor(graph.value(var))).any():
                return False
        elif isinstance(op, _VIEWS):
            stack += [v for v in var.owner.inputs if graph.is_by_row(v)]
        elif isinstance(op, Elemwise) and isinstance(op.scalar_op, _KEEPS_WHOLE):
            products += isinstance(op.scalar_op, scalar.Mul)
            stack += var.owner.inputs[isinstance(op.scalar_op, scalar.Switch) :]
        elif op is not None:
            return False
    return not products or len(columns) > 1


def _indices(graph: LikelihoodGraph) -> Iterator[_Found]:
    for node in graph.nodes:
        for axis, index in indices_of(node):
            x = node.inputs[0]
            is_of_rows = graph.is_by_row(x) and graph.axis(x) == axis
            if graph.is_by_row(index) and not is_of_rows:
                n = int(np.shape(graph.value(x))[axis])
                text = f", which indexes an axis of length {n}; make the axis as long as it takes"
                yield (index < -n) | (index >= n), graph.axis(index), text


def _parameters(graph: LikelihoodGraph) -> Iterator[_Found]:
    for condition, name in graph.checks.items():
        if graph.is_by_row(condition):
            text = (
                f", where the model needs {name}, or the log-likelihood of the whole batch is -inf; "
                "leave such rows out of the source"
            )
            yield pt.invert(condition), graph.axis(condition), text


def _supports(
    term: Variable, graph: LikelihoodGraph, given: Any = None
) -> Iterator[tuple[Any, Any]]:
    """Yield where a sum of terms is -inf whatever its other terms are, and its row axis.

    *given* is a condition on the rows under which the result has this term.
    """
    op = term.owner and term.owner.op
    if not isinstance(op, Elemwise):
        through = isinstance(op, Alloc) or (given is None and isinstance(op, DimShuffle | Sum))
        if through and (given is None or given.type.ndim == term.owner.inputs[0].type.ndim):
            yield from _supports(term.owner.inputs[0], graph, given)
    elif isinstance(op.scalar_op, scalar.Switch):
        condition, *values = term.owner.inputs
        for value, holds in zip(values, (True, False)):
            implied = _implied(condition, holds, graph.rows)
            if implied is None or not graph.is_by_row(condition):
                continue
            under = implied if given is None else implied & given
            if _is_minus_infinity(value):
                yield under, graph.axis(condition)
            else:
                yield from _supports(value, graph, under)
    elif isinstance(op.scalar_op, scalar.Add | scalar.Cast | scalar.Identity | scalar.Mul):
        for part in term.owner.inputs:
            yield from _supports(part, graph, given)
    elif isinstance(op.scalar_op, scalar.Sub):
        yield from _supports(term.owner.inputs[0], graph, given)


def _implied(condition: Variable, holds: bool, rows: Variable) -> Any:
    """Return a condition on rows alone under which *condition* does, or does not, hold."""
    shapes = [v for v in ancestors([condition]) if is_shape(v)]
    parameters = set(explicit_graph_inputs([condition])) & set(ancestors([condition], shapes))
    if parameters <= {rows}:
        truth = condition if condition.type.dtype == "bool" else pt.neq(condition, 0)
        return truth if holds else pt.invert(truth)
    op = condition.owner and condition.owner.op
    both = isinstance(op, Elemwise) and isinstance(op.scalar_op, scalar.AND | scalar.Mul)
    if holds or not both:
        return None
    parts = [_implied(part, False, rows) for part in condition.owner.inputs]
    known = [part for part in parts if part is not None]
    return reduce(operator.or_, known) if known else None


def _is_minus_infinity(var: Variable) -> bool:
    while var.owner and isinstance(var.owner.op, DimShuffle | Alloc):
        var = var.owner.inputs[0]
    return isinstance(var, Constant) and bool(np.all(var.data == -np.inf))


def _by_row(bad: Any, axis: int, graph: LikelihoodGraph) -> Iterator[Any]:
    """Yield conditions with rows along their only axis, in which no parameter occurs."""
    known = _known_shapes(bad, graph)
    bad = pt.moveaxis(clone_replace(bad, known) if known else bad, axis, 0)
    width = bad.type.shape[1] if bad.type.ndim == 2 else None
    if width is not None and width <= _MOST_COLUMNS:
        yield from (bad[:, i] for i in range(width))
    else:
        yield bad if bad.type.ndim == 1 else bad.any(axis=tuple(range(1, bad.type.ndim)))


def _known_shapes(bad: Variable, graph: LikelihoodGraph) -> dict[Variable, Variable]:
    """Return the shapes of what depends on parameters, which they do not change."""
    known: dict[Variable, Variable] = {}
    for var in ancestors([bad]):
        if not is_shape(var):
            continue
        (of,) = var.owner.inputs
        lengths = [pt.constant(n, dtype="int64") for n in np.shape(graph.value(of))]
        if graph.is_by_row(of):
            lengths[graph.axis(of)] = graph.rows.shape[0]  # type: ignore[index]
        op = var.owner.op
        known[var] = lengths[op.i] if isinstance(op, Shape_i) else pt.stack(lengths)
    return known


def _computable(bad: Variable, graph: LikelihoodGraph) -> Callable | None:
    """Return a function of any number of rows, if a condition depends on nothing else."""
    if not set(explicit_graph_inputs([bad])) <= {graph.rows}:
        return None
    compute = function([graph.rows], bad, mode=UNCOMPILED)
    some = graph.value(graph.rows)
    try:
        shapes = [compute(np.resize(some, (n, *some.shape[1:]))).shape for n in (2, 3)]
    except Exception:
        return None
    return compute if shapes == [(2,), (3,)] else None


def _interval(condition: Variable, rows: Variable, holds: bool = False) -> Interval | None:
    """Return an interval of a column in which a condition on it holds, or does not."""
    if condition.owner is None or not isinstance(condition.owner.op, Elemwise):
        return None
    op, (left, *others) = condition.owner.op.scalar_op, condition.owner.inputs
    if isinstance(op, scalar.Invert):
        return _interval(left, rows, not holds)
    if isinstance(op, scalar.AND | scalar.OR):
        parts = [_interval(part, rows, holds) for part in (left, *others)]
        known = [part for part in parts if part is not None]
        if isinstance(op, scalar.AND) != holds:  # one part is enough
            return max(known, key=lambda part: part.upper - part.lower, default=None)
        if len(known) < len(parts):
            return None
        lower, upper, whole = zip(*known)
        return Interval(max(lower), min(upper), any(whole))
    relation = type(op) if holds else _NEGATED.get(type(op))
    if relation is None or not _is_column(left, rows):
        return None
    if relation is scalar.EQ and _is_column(others[0], rows):  # a cast that keeps its values
        limits = np.iinfo(others[0].type.dtype)
        return Interval(float(limits.min), np.nextafter(float(limits.max) + 1, 0), True)
    if not isinstance(others[0], Constant) or others[0].data.size != 1:
        return None
    return _half_line(relation, float(others[0].data.item()), np.dtype(rows.type.dtype))


def _is_column(var: Variable, rows: Variable) -> bool:
    """Whether *var* is a column, which may be cast to integers or to a type that holds it."""
    op, inputs = var.owner and var.owner.op, var.owner and var.owner.inputs
    if not isinstance(getattr(op, "scalar_op", None), scalar.Cast):
        return isinstance(op, Subtensor) and inputs[0] is rows
    keeps = var.type.dtype.startswith(("int", "uint"))
    keeps |= np.can_cast(inputs[0].type.dtype, var.type.dtype)
    return keeps and _is_column(inputs[0], rows)


def _half_line(relation: type, number: float, dtype: np.dtype) -> Interval | None:
    """Return the values that are so related to a number, also once they are rounded to *dtype*."""
    if relation not in (scalar.GE, scalar.GT, scalar.LE, scalar.LT):
        return None
    is_lower = relation in (scalar.GE, scalar.GT)
    kind = dtype.type if dtype.kind == "f" else np.float64
    with np.errstate(over="ignore"):
        end = kind(number)
    if relation in (scalar.GT, scalar.LT) or end != number:
        end = np.nextafter(end, kind(np.inf if is_lower else -np.inf))
    return Interval(float(end), np.inf, False) if is_lower else Interval(-np.inf, float(end), False)
