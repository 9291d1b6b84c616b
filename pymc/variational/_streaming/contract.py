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
"""What a model demands of the columns of a stream, and whether every row meets it."""

import operator

from collections.abc import Callable, Iterator, Sequence
from functools import partial, reduce
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
from pytensor.tensor.subtensor import (
    AdvancedIncSubtensor,
    AdvancedSubtensor,
    IncSubtensor,
    Subtensor,
    get_idx_list,
)

from pymc.variational._streaming.errors import StreamError
from pymc.variational._streaming.likelihood import (
    UNCOMPILED,
    LikelihoodGraph,
    RowAxes,
    columns_read,
    is_shape,
)

__all__ = ["Contract", "derive_contract"]

_MOST_VALUES = 1 << 20
"""Values that are computed at most to learn which whole numbers a column may hold."""

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
    is_convex: bool
    """Whether it holds between any two values for which it holds."""


class Contract:
    """Conditions on the rows of a stream, which :meth:`check` holds them to.

    The values of a batch are compared, by a compiled loop, with a box: an interval for each column.
    All conditions were found to hold in the box, for whole numbers or for any.  A condition for
    which there is none, as on real values of two columns, is computed for each row.
    """

    def __init__(
        self,
        conditions: Sequence[Condition],
        rows: Variable,
        names: tuple[str, ...] | None,
    ):
        self._conditions = conditions
        self._names = names
        self._rows = rows
        self._dtype = np.dtype(rows.type.dtype)
        self._sample_shape = rows.type.shape[1:]
        self._computed: list[Condition] = []
        self._compiled: Callable | None = None
        width = int(np.prod(self._sample_shape))
        self._lower, self._upper = np.full(width, np.inf), np.full(width, -np.inf)
        self._use_box(list(conditions))

    def without_supports(self) -> "Contract":
        """Return the contract of rows whose observed values make no difference."""
        kept = [condition for condition in self._conditions if not condition.is_support]
        return Contract(kept, self._rows, self._names)

    def check(self, rows: np.ndarray, offset: int = 0) -> None:
        """Raise StreamError if a row breaks a condition.

        Parameters
        ----------
        rows : ndarray, shape (n, *sample_shape)
        offset : int
            Position of the first row, for the message.
        """
        from pymc.variational._streaming.batches.compiled import are_within

        if self._boxed:
            flat = rows.reshape(len(rows), -1)
            if not are_within(flat, self._columns, self._lower, self._upper, self._whole):
                self._require(self._boxed, flat, offset)
                self._widen_box(flat)
        if self._computed and self._is_any_broken(rows.astype(self._dtype, copy=False)):
            self._require(self._computed, rows.reshape(len(rows), -1), offset)

    def _is_any_broken(self, rows: np.ndarray) -> bool:
        if self._compiled is None:
            broken = pt.stack([condition.bad.any() for condition in self._computed]).any()
            self._compiled = function([self._rows], broken, mode="NUMBA", trust_input=True)
        return bool(self._compiled(rows))

    def _require(self, conditions: Sequence[Condition], flat: np.ndarray, offset: int) -> None:
        for condition in conditions:
            bad = condition.compute(self._cast(flat))
            if bad.any():
                row = int(np.argmax(bad))
                where = self._describe(flat[row], condition.columns)
                raise StreamError(f"row {offset + row} of the stream holds {where}{condition.text}")

    def _cast(self, flat: np.ndarray) -> np.ndarray:
        with np.errstate(all="ignore"):
            return flat.reshape(len(flat), *self._sample_shape).astype(self._dtype, copy=False)

    def _describe(self, row: np.ndarray, columns: np.ndarray) -> str:
        names = self._names or [
            str(tuple(map(int, np.unravel_index(c, self._sample_shape)))) for c in range(len(row))
        ]
        show = repr if self._names else str
        return " and ".join(f"{row[c]} in column {show(names[c])}" for c in columns[:3])

    def _use_box(self, conditions: list[Condition]) -> None:
        """Compare with the box the columns of some conditions, and no others."""
        self._boxed = conditions
        self._whole = np.zeros(len(self._lower), bool)
        """Whether the values of a column must be whole, shape (n_columns,)."""
        for condition in conditions:
            self._whole[condition.columns] |= not condition.is_convex
        found = [condition.columns for condition in conditions]
        self._columns = np.unique(np.concatenate([np.zeros(0, np.int64), *found]))

    def _widen_box(self, flat: np.ndarray) -> None:
        """Widen the box to some rows, and compute from now on what does not hold all over it."""
        self._whole &= (flat == np.floor(flat)).all(axis=0)
        low = np.minimum(self._lower, flat.min(axis=0))
        high = np.maximum(self._upper, flat.max(axis=0))
        margin = np.where(self._whole, np.maximum(16.0, high - low), 0.0)
        for one in self._boxed:
            margin[one.columns] *= len(one.columns) == 1
        self._lower, self._upper = low - margin, high + margin
        kept = []
        for one in self._boxed:
            holding = partial(self._holding, one, flat[:1], low, high)
            found = holding(margin) or holding(0 * margin)
            if found is None:
                self._computed.append(one)
            else:
                kept.append(one)
                at = one.columns
                self._lower[at] = np.maximum(self._lower[at], found[0])
                self._upper[at] = np.minimum(self._upper[at], found[1])
        self._use_box(kept)
        self._compiled = None

    def _holding(
        self, one: Condition, row: np.ndarray, low: np.ndarray, high: np.ndarray, margin: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """Return bounds, at most *margin* beyond *low* and *high*, within which a condition holds."""
        at = one.columns
        low, high, margin = low[at], high[at], margin[at]
        if not self._whole[at].all():
            return (low, high) if one.is_convex else None
        if np.prod(high - low + 2 * margin + 1) * row.size > _MOST_VALUES:
            return None
        sides = [np.arange(a, b + 1) for a, b in zip(low - margin, high + margin)]
        grid = np.stack(np.meshgrid(*sides, indexing="ij"), axis=-1).reshape(-1, len(at))
        if self._dtype.kind in "iu":
            limits = np.iinfo(self._dtype)
            grid = grid[((grid >= limits.min) & (grid <= limits.max)).all(axis=1)]
        rows = np.repeat(row.astype("float64"), len(grid), axis=0)
        rows[:, at] = grid
        try:
            bad = one.compute(self._cast(rows))
        except IndexError:  # a table that has no such entry
            return None
        below, above = (grid < low).all(axis=1), (grid > high).all(axis=1)
        if bad[~(below | above)].any():
            return None
        lower = np.max([grid[0], *(grid[bad & below] + 1)], axis=0)
        return lower, np.min([grid[-1], *(grid[bad & above] - 1)], axis=0)


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
