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
"""The log-likelihood of a model, row by row, and which axes of its graph run over the rows."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import numpy as np

from pytensor import config, function
from pytensor.compile.builders import OpFromGraph
from pytensor.compile.mode import Mode
from pytensor.compile.rewriting import inline_ofg_node
from pytensor.compile.sharedvalue import SharedVariable
from pytensor.graph.basic import Apply, Constant, Variable
from pytensor.graph.fg import FunctionGraph
from pytensor.graph.replace import clone_replace
from pytensor.graph.rewriting.basic import in2out, node_rewriter
from pytensor.graph.rewriting.utils import rewrite_graph
from pytensor.graph.traversal import ancestors, explicit_graph_inputs, toposort
from pytensor.tensor.basic import Join, MakeVector, ScalarFromTensor
from pytensor.tensor.blockwise import Blockwise
from pytensor.tensor.elemwise import DimShuffle, Elemwise
from pytensor.tensor.math import All
from pytensor.tensor.shape import Shape, Shape_i
from pytensor.tensor.subtensor import Subtensor, get_constant_idx

from pymc.initial_point import make_initial_point_expression
from pymc.logprob.utils import CheckParameterValue, local_remove_check_parameter
from pymc.model.core import Model
from pymc.pytensorf import replace_rng_nodes
from pymc.variational._streaming.errors import StreamError

__all__ = [
    "UNCOMPILED",
    "LikelihoodGraph",
    "RowAxes",
    "TiedError",
    "columns_read",
    "is_of",
    "is_shape",
    "same",
]

UNCOMPILED = Mode(linker="py", optimizer="minimum_compile")

_JITTERS = (0.1, 0.1, 0.1, 0.01, 0.01, 0.001)
"""How far from the initial point to look for one where the log-likelihood is finite."""

_FEW_ROWS = 7
"""Rows that a graph is tried on, where it does not need as many as a batch has."""


class TiedError(Exception):
    """A value depends on several rows, or on the place of a row in the batch."""

    def __init__(self, reason: str, constant: Variable | None = None):
        super().__init__(reason)
        self.constant = constant
        """Variable that differs between the places of a batch, where that is the reason."""


class LikelihoodGraph:
    """Log-likelihood terms of a model as a graph of the rows and of the parameters.

    Parameters
    ----------
    model : Model
    likelihoods : sequence of Variable
        Observed variables.
    buffer : SharedVariable
        Variable that holds the rows.
    rows : ndarray
        Some rows, since those of the buffer may be none.
    others : sequence of Variable
        Further variables of the model, such as potentials, whose graphs follow the terms.
    """

    def __init__(
        self,
        model: Model,
        likelihoods: Sequence[Variable],
        buffer: SharedVariable,
        rows: np.ndarray,
        others: Sequence[Any] = (),
    ):
        graphs: Any = [*_logp(model, likelihoods), *model.replace_rvs_by_values(others)]
        self.rows = buffer.type(name=buffer.name)
        copies = [v for v in ancestors(graphs) if is_of(v, buffer)]
        graphs = clone_replace(graphs, dict.fromkeys(copies, self.rows), copy_inputs_over=True)
        self.graphs, checks = _simplify(graphs, self.rows)
        self.terms = self.graphs[: len(likelihoods)]
        self.checks = dict(zip(self.graphs[len(graphs) :], checks))
        """What the parameters that are computed from rows alone must be, and its name."""
        roots = set(explicit_graph_inputs(graphs))
        self._values = [v for v in model.value_vars if v in roots]
        self.logps = self._compile(self.terms)
        start = _initial_point(model)
        self.point = self._finite_point(rows, [start[v] for v in self._values])

    def evaluate(self, rows: np.ndarray) -> list[np.ndarray]:
        """Return the log-likelihood of each row, for each term, at a random point."""
        return self.logps(rows, *self.point)

    def _compile(self, variables: Sequence[Variable]) -> Callable[..., list[np.ndarray]]:
        compiled = function(
            [self.rows, *self._values], variables, mode=UNCOMPILED, on_unused_input="ignore"
        )

        def quiet(*args: Any) -> list[np.ndarray]:
            with np.errstate(all="ignore"):
                return compiled(*args)

        return quiet

    def _finite_point(self, rows: np.ndarray, start: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Return the one of some random points near *start* where most terms are finite."""
        rng = np.random.default_rng(0)
        points = [[_jitter(value, size, rng) for value in start] for size in _JITTERS]

        def share(point: list[np.ndarray]) -> float:
            try:
                terms = self.logps(rows, *point)
            except IndexError:  # told of by the contract
                return 0.0
            except ValueError as err:
                raise StreamError(
                    f"the log-likelihood cannot be computed for a batch of {len(rows)} rows "
                    f"({str(err).partition(chr(10))[0]}); leave out what has another length, such "
                    "as dims of all rows"
                ) from err
            return min((np.isfinite(t).sum() / max(1, t.size) for t in terms), default=1.0)

        return max(points, key=share)


def is_of(var: Variable, buffer: SharedVariable) -> bool:
    """Whether *var* is a buffer: transforming a model copies it, but keeps the container."""
    return getattr(var, "container", None) is buffer.container


def columns_read(graphs: Sequence[Variable], rows: Variable) -> np.ndarray:
    """Return which columns of *rows* some graphs depend on, as numbers in the flattened row."""
    shape = rows.type.shape[1:]
    labels = np.arange(np.prod(shape, dtype=int)).reshape(1, *shape)
    read: set[int] = set()
    shapes = [v for v in ancestors(graphs) if is_shape(v)]
    used = {v.owner for v in ancestors(graphs, shapes) if v not in shapes}
    for node in {node for node in used if node and rows in node.inputs}:
        taken = labels
        if isinstance(node.op, Subtensor):
            index = get_constant_idx(node.op.idx_list, node.inputs, allow_partial=True)
            if not any(isinstance(entry, Variable) for entry in index[1:]):
                taken = labels[(slice(None), *index[1:])]
        read.update(taken.ravel().tolist())
    return np.array(sorted(read), np.int64)


def is_shape(var: Variable) -> bool:
    return var.owner is not None and isinstance(var.owner.op, Shape | Shape_i)


class RowAxes:
    """The axis of each variable of a graph along which the rows of a batch lie.

    Each operation is tried by itself on random rows: an entry of its result must come from the
    rows at one place, whatever their values are and wherever that place is. So an operation that
    ties rows together is found also where no row of the batch uses its result.

    Parameters
    ----------
    graph : LikelihoodGraph
    batch : ndarray
        Rows that the model can be computed for.
    """

    def __init__(self, graph: LikelihoodGraph, batch: np.ndarray):
        self.nodes: list[Apply] = list(toposort(graph.graphs))
        self.values = _computed(graph, batch, [v for node in self.nodes for v in node.outputs])
        self.rows = graph.rows
        self._n_rows = len(self.values[graph.rows])
        self._found: dict[Variable, Any] = {graph.rows: 0}
        self._values_of_point = dict(zip(graph._values, graph.point))
        self._rng = np.random.default_rng(0)
        for node in self.nodes:
            inputs = [self._found.get(v) for v in node.inputs]
            found: Any = next((v for v in inputs if isinstance(v, Exception)), None)
            try:
                self._found.update(zip(node.outputs, [] if found else self._axes(node, inputs)))
            except Exception as err:
                found = err.with_traceback(None)
            if found is not None:
                self._found.update(dict.fromkeys(node.outputs, found))

    def of(self, var: Variable) -> int | None:
        """Return the axis, or None where the variable does not depend on the rows.

        Raises
        ------
        TiedError
            If an entry depends on several rows, or on its place.
        Exception
            If an operation cannot be tried.
        """
        found = self._found.get(var)
        if isinstance(found, Exception):
            raise found
        return found

    def is_by_row(self, var: Variable) -> bool:
        """Whether rows lie along an axis of *var*."""
        return isinstance(self._found.get(var), int)

    def value(self, var: Variable) -> Any:
        if isinstance(var, Constant):
            return var.data
        if var in self.values:
            return self.values[var]
        if var in self._values_of_point:
            return self._values_of_point[var]
        return var.get_value(borrow=True)  # type: ignore[attr-defined]

    def _axes(self, node: Apply, axes: Sequence[int | None]) -> list[int | None]:
        if all(axis is None for axis in axes) or isinstance(node.op, Shape | Shape_i):
            return [None] * len(node.outputs)
        if isinstance(node.op, Elemwise):
            return [self._common_axis(node.inputs, axes)] * len(node.outputs)
        return self._try(node, axes)

    def _common_axis(self, inputs: Sequence[Variable], axes: Sequence[int | None]) -> int:
        """Return the row axis of what is broadcast together, as for any values of the rows."""
        place, *others = {axis for axis in axes if axis is not None}
        if others:
            raise TiedError("each row is combined with the others")
        for var, axis in zip(inputs, axes):
            value = self.value(var)
            if axis is None and (value != value.take([0], place)).any():
                raise TiedError("a value for each place in the batch is used", var)
        return place

    def _try(self, node: Apply, axes: Sequence[int | None]) -> list[int | None]:
        fresh = [v if axis is None else v.type() for v, axis in zip(node.inputs, axes)]
        free = [v for v, axis in zip(fresh, axes) if axis is not None]
        constant = {v: v.type() for v in fresh if v not in free and not isinstance(v, Constant)}
        clone = node.clone_with_new_inputs([constant.get(v, v) for v in fresh])
        compiled = function([*free, *constant.values()], clone.outputs, mode=UNCOMPILED)
        known = [self.value(v) for v in constant]
        actual = [(self.value(v), axis) for v, axis in zip(node.inputs, axes) if axis is not None]
        with np.errstate(all="ignore"):
            try:
                return self._equivariant(node, compiled, known, actual, self._random)
            except TiedError:
                raise
            except Exception:  # such as the factors of a matrix that is not positive definite
                return self._equivariant(node, compiled, known, actual, lambda value: value)

    def _equivariant(
        self,
        node: Apply,
        compiled: Callable,
        known: list[Any],
        actual: list[tuple[np.ndarray, int]],
        draw: Callable[[np.ndarray], np.ndarray],
    ) -> list[int | None]:
        """Return the axis of each output that moves with the rows, and keeps them apart."""
        n, rng = self._n_rows, self._rng
        order, kept = rng.permutation(n), np.arange(0, n, 2)
        rows = [(draw(value), axis) for value, axis in actual]
        others = [(np.roll(draw(value), 1, axis), axis) for value, axis in actual]
        for (value, axis), (other, _) in zip(rows, others):
            np.moveaxis(other, axis, 0)[kept] = np.moveaxis(value, axis, 0)[kept]
        outputs = compiled(*[value for value, _ in rows], *known)
        moved = compiled(*[value.take(order, axis) for value, axis in rows], *known)
        replaced = compiled(*[value for value, _ in others], *known)
        found: list[int | None] = []
        for a, b, c in zip(*map(_as_list, (outputs, moved, replaced))):
            for axis in range(a.ndim):
                if (
                    a.shape[axis] == n
                    and same(a.take(order, axis), b, rtol=1e-9, atol=1e-8)
                    and a.shape == c.shape
                    and same(a.take(kept, axis), c.take(kept, axis))
                ):
                    found.append(axis)
                    break
            else:
                raise TiedError(f"{node.op} does not keep the rows apart")
        return found

    def _random(self, value: np.ndarray) -> np.ndarray:
        kind = value.dtype.kind
        if kind == "f":
            return self._rng.uniform(0.1, 0.9, value.shape).astype(value.dtype)
        return self._rng.integers(0, 2, value.shape).astype(value.dtype)


def _computed(
    graph: LikelihoodGraph, batch: np.ndarray, variables: Sequence[Variable]
) -> dict[Variable, Any]:
    """Return the values of variables for a few rows, else for as many as a batch has.

    An array or a latent variable can have the length of a batch. An index of the batch can be out
    of range, where zero is not.
    """
    compute = graph._compile([graph.rows, *variables])
    tries = [rows for rows in (batch[:_FEW_ROWS], batch) for rows in (rows, np.zeros_like(rows))]
    for rows in tries:
        try:
            values = compute(rows, *graph.point)
        except Exception as err:
            error = err
        else:
            return dict(zip([graph.rows, *variables], values))
    raise error


def same(a: np.ndarray, b: np.ndarray, *, rtol: float = 1e-12, atol: float = 0) -> bool:
    rtol = 1e-5 if a.dtype == np.float32 else rtol
    return a.shape == b.shape and np.allclose(a, b, rtol=rtol, atol=atol, equal_nan=True)


def _as_list(outputs: Any) -> list[np.ndarray]:
    return [np.asarray(output) for output in outputs]


def _logp(model: Model, likelihoods: Sequence[Variable]) -> list[Variable]:
    try:
        return cast(list[Variable], model.logp([*likelihoods], sum=False)) if likelihoods else []
    except ValueError as err:
        raise StreamError(
            "the log-likelihood needs variables that are not in this model; call fit_callback() in "
            f"the context of the model that has them all ({err})"
        ) from err


@node_rewriter([OpFromGraph])
def _inline(fgraph: FunctionGraph, node: Apply) -> list[Variable]:
    return inline_ofg_node(node)


def _simplify(graphs: Sequence[Variable], rows: Variable) -> tuple[list[Variable], list[str]]:
    """Leave out inner graphs, and the checks of parameters, which are made for all rows at once.

    Checks of what is computed from rows alone are appended to the graphs, and named.
    """
    lowered: Any = rewrite_graph(list(graphs), include=("lower_xtensor",))
    fgraph = FunctionGraph(outputs=list(lowered), clone=False)
    in2out(_inline).rewrite(fgraph)
    names = []
    for node in fgraph.toposort():
        if isinstance(node.op, CheckParameterValue):
            for condition in _conjuncts(node.inputs[1:]):
                if set(explicit_graph_inputs([condition])) == {rows} and _is_cheap(condition):
                    fgraph.add_output(condition)
                    names.append(node.op.msg)
    in2out(local_remove_check_parameter).rewrite(fgraph)
    return list(fgraph.outputs), names


def _is_cheap(var: Variable) -> bool:
    """Whether nothing like the factors of a covariance has to be computed for each row."""
    return not any(v.owner and isinstance(v.owner.op, Blockwise) for v in ancestors([var]))


def _conjuncts(conditions: Sequence[Variable]) -> Iterator[Variable]:
    """Yield the conditions that all hold where some scalars do, before they were reduced."""
    for condition in conditions:
        op = condition.owner and condition.owner.op
        reduced = isinstance(op, All | Join | MakeVector | ScalarFromTensor)
        if reduced or (isinstance(op, DimShuffle) and op.is_expand_dims):
            yield from _conjuncts(condition.owner.inputs)
        elif condition.type.dtype == "bool":
            yield condition


def _initial_point(model: Model) -> dict[Variable, np.ndarray]:
    """Return what ``model.initial_point`` does, without waiting for a compiler."""
    expressions = make_initial_point_expression(
        free_rvs=model.free_RVs,
        rvs_to_transforms=model.rvs_to_transforms,
        initval_strategies=model.rvs_to_initial_values,
        return_transformed=True,
    )
    with config.change_flags(cxx=""):  # or the graph within an LKJ prior would be compiled in C
        found = function([], replace_rng_nodes(expressions), mode=UNCOMPILED)()
    values = [model.rvs_to_values[rv] for rv in model.free_RVs]
    return {value: np.asarray(number) for value, number in zip(values, found)}


def _jitter(value: np.ndarray, size: float, rng: np.random.Generator) -> np.ndarray:
    if value.dtype.kind != "f":
        return value
    return (value + rng.uniform(-size, size, value.shape)).astype(value.dtype)
