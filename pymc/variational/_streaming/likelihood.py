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

import threading

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any, cast

import numpy as np
import pytensor.tensor as pt

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
from pytensor.tensor.basic import AllocEmpty, Join, MakeVector, ScalarFromTensor
from pytensor.tensor.blockwise import Blockwise
from pytensor.tensor.elemwise import DimShuffle, Elemwise
from pytensor.tensor.math import All
from pytensor.tensor.shape import Shape, Shape_i
from pytensor.tensor.subtensor import (
    AdvancedIncSubtensor,
    AdvancedSubtensor,
    Subtensor,
    get_constant_idx,
    get_idx_list,
)

from pymc.initial_point import make_initial_point_expression
from pymc.logprob.utils import CheckParameterValue, local_remove_check_parameter
from pymc.model.core import Model
from pymc.pytensorf import find_rng_nodes, replace_rng_nodes, reseed_rngs
from pymc.variational._streaming.errors import StreamError

__all__ = [
    "UNCOMPILED",
    "Factors",
    "LikelihoodGraph",
    "TiedError",
    "columns_read",
    "compiling",
    "indices_of",
    "is_of",
    "is_shape",
    "same",
    "within_bounds",
]

UNCOMPILED = Mode(linker="py", optimizer="minimum_compile")

compiling = threading.Lock()
"""PyTensor changes the configuration of all threads while it compiles."""

_JITTERS = (0.1, 0.1, 0.1, 0.01, 0.01, 0.001)
"""How far from the initial point to look for one where the log-likelihood is finite."""

_FAR = (1.0, 1.0, 3.0, 3.0, 10.0, 10.0)
"""How far from there to look for a point where the log-likelihood of a row is finite."""

_TRIED_VALUES, _FEWEST_ROWS = 1 << 16, 8
"""Values of the rows that a graph is tried on, where it does not need as many as a batch has."""


class TiedError(Exception):
    """A value depends on several rows, or on the place of a row in the batch."""

    def __init__(self, reason: str, constant: Variable | None = None):
        super().__init__(reason)
        self.constant = constant
        """Variable that differs between the places of a batch, where that is the reason."""


class Factors:
    """Factors of the density of a model, and its initial point, each computed when it is needed."""

    def __init__(self, model: Model):
        self.model = model.root
        """The outermost model: a nested one lacks the variables of those around it."""

    @classmethod
    def of_context(cls) -> "Factors | None":
        """Return those of the model in whose context this is called, if any."""
        model = Model.get_context(error_if_none=False)
        return cls(model) if isinstance(model, Model) else None

    @cached_property
    def logp(self) -> dict[Variable, Any]:
        """Log-probability of each random variable, and each potential, for single entries."""
        variables = [*self.model.basic_RVs, *self.model.potentials]
        try:
            return dict(zip(variables, self.model.logp(variables, sum=False)))
        except ValueError as err:
            raise StreamError(
                "the log-likelihood needs variables that are not in this model; call "
                f"fit_callback() in the context of the model that has them all ({err})"
            ) from err

    @cached_property
    def initial_point(self) -> dict[str, np.ndarray]:
        """Values of ``Model.initial_point(0)``, for which nothing is compiled."""
        rvs = self.model.free_RVs
        values = make_initial_point_expression(
            free_rvs=rvs,
            rvs_to_transforms=self.model.rvs_to_transforms,
            initval_strategies=self.model.rvs_to_initial_values,
            return_transformed=True,
        )
        values = replace_rng_nodes(values)
        reseed_rngs(find_rng_nodes(values), 0)
        with config.change_flags(cxx=""):  # or the graph within an LKJ prior is compiled in C
            found = function([], values, mode=UNCOMPILED)()
        return {str(self.model.rvs_to_values[rv].name): value for rv, value in zip(rvs, found)}


class LikelihoodGraph:
    """Log-likelihood terms of a model as a graph of the rows and of the parameters.

    It knows the axis of each variable along which rows lie. Each operation is tried by itself on
    random rows: an entry of its result must come from the rows at one place, whatever their values
    are and wherever that place is. So an operation that ties rows together is found also where no
    row of the *batch* uses its result.  *others* are further variables, such as potentials.
    """

    def __init__(
        self,
        factors: Factors,
        likelihoods: Sequence[Variable],
        buffer: SharedVariable,
        batch: np.ndarray,
        others: Sequence[Any] = (),
    ):
        self.model = model = factors.model
        self.likelihoods = likelihoods
        terms = [factors.logp[rv] for rv in likelihoods]
        graphs: Any = [*terms, *model.replace_rvs_by_values(others)]
        self.rows = buffer.type(name=buffer.name)
        copies = [v for v in ancestors(graphs) if is_of(v, buffer)]
        graphs = clone_replace(graphs, dict.fromkeys(copies, self.rows), copy_inputs_over=True)
        graphs, self.checks = _simplify(graphs, self.rows)
        self.terms, self.others = graphs[: len(likelihoods)], graphs[len(likelihoods) :]
        self.nodes: list[Apply] = list(toposort([*graphs, *self.checks]))
        roots = set(explicit_graph_inputs(graphs))
        self._parameters = [v for v in model.value_vars if v in roots]
        self._logps = self._compile(self.terms)
        start = [factors.initial_point[str(v.name)] for v in self._parameters]
        self._point = self._finite_point(batch, start)
        self._values = self._evaluate_all(batch)
        self._rng = np.random.default_rng(0)
        self._axes: dict[Variable, Any] = {self.rows: 0}
        for node in self.nodes:
            self._axes.update(zip(node.outputs, self._axes_of_outputs(node)))

    def evaluate(self, rows: np.ndarray) -> list[np.ndarray]:
        """Return the log-likelihood of each row, for each term, at a random point."""
        return self._logps(rows, *self._point)

    def is_possible(self, rows: np.ndarray, row: int) -> bool:
        """Whether a row has a finite log-likelihood at a point far from the initial one."""
        rng = np.random.default_rng(0)
        points = ([_jitter(value, size, rng) for value in self._point] for size in _FAR)
        return any(all(np.isfinite(t[row]).all() for t in self._logps(rows, *x)) for x in points)

    def axis(self, var: Variable) -> int | None:
        """Return the axis of the rows, or None where the variable does not depend on them.

        It raises a TiedError if an entry depends on several rows, or on its place.
        """
        found = self._axes.get(var)
        if isinstance(found, TiedError):
            raise found
        return found

    def is_by_row(self, var: Variable) -> bool:
        """Whether rows lie along an axis of *var*."""
        return isinstance(self._axes.get(var), int)

    def value(self, var: Variable) -> Any:
        """Return the value of a variable for a few rows."""
        if isinstance(var, Constant):
            return var.data
        return self._values[var] if var in self._values else var.get_value(borrow=True)  # type: ignore[attr-defined]

    def _compile(self, variables: Sequence[Variable]) -> Callable[..., list[np.ndarray]]:
        compiled = function(
            [self.rows, *self._parameters], variables, mode=UNCOMPILED, on_unused_input="ignore"
        )

        def quiet(*args: Any) -> list[np.ndarray]:
            with np.errstate(all="ignore"):
                return compiled(*args)

        return quiet

    def _finite_point(self, batch: np.ndarray, start: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Return the one of some random points near *start* where most terms are finite."""
        rng = np.random.default_rng(0)
        points = [[_jitter(value, size, rng) for value in start] for size in _JITTERS]

        def share(point: list[np.ndarray]) -> float:
            try:
                terms = self._logps(batch, *point)
            except IndexError:  # told of by the contract
                return 0.0
            except ValueError as err:
                raise StreamError(
                    f"the log-likelihood cannot be computed for a batch of {len(batch)} rows "
                    f"({str(err).partition(chr(10))[0]}); leave out what has another length, such "
                    "as dims of all rows"
                ) from err
            return min((np.isfinite(t).sum() / max(1, t.size) for t in terms), default=1.0)

        return max(points, key=share)

    def _evaluate_all(self, batch: np.ndarray) -> dict[Variable, Any]:
        """Return the values of all variables for some rows, else for as many as a batch has.

        An array or a latent variable can have the length of a batch. An index of the batch can be
        out of range, where zero is not.
        """
        variables = [self.rows, *self._parameters]
        variables += [v for node in self.nodes for v in node.outputs]
        compute = self._compile(variables)
        few = batch[: max(_FEWEST_ROWS, _TRIED_VALUES // batch[0].size)]
        for rows in (few, np.zeros_like(few), batch, np.zeros_like(batch)):
            try:
                return dict(zip(variables, compute(rows, *self._point)))
            except Exception as err:
                error = err
        raise error

    def _axes_of_outputs(self, node: Apply) -> Sequence[Any]:
        """Return the axis of the rows in each output, or why there is none."""
        axes = [self._axes.get(v) for v in node.inputs]
        error = next((axis for axis in axes if isinstance(axis, TiedError)), None)
        n = len(node.outputs)
        if error is not None:
            return [error] * n
        if all(axis is None for axis in axes) or isinstance(node.op, Shape | Shape_i):
            return [None] * n
        try:
            if isinstance(node.op, Elemwise):
                return [self._common_axis(node.inputs, axes)] * n
            return self._try(node, axes)
        except TiedError as err:
            return [err.with_traceback(None)] * n
        except Exception as err:
            return [TiedError(f"{node.op} cannot be tried on other rows ({err})")] * n

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

    def _try(self, node: Apply, axes: Sequence[int | None]) -> list[int]:
        """Return the row axis of each output of an operation, which is tried on random rows."""
        inputs = [v if isinstance(v, Constant) else v.type() for v in node.inputs]
        free = [i for i, v in enumerate(inputs) if not isinstance(v, Constant)]
        outputs = node.clone_with_new_inputs(inputs).outputs
        compiled = function([inputs[i] for i in free], outputs, mode=UNCOMPILED)
        values = [(self.value(node.inputs[i]), axes[i]) for i in free]
        with np.errstate(all="ignore"):
            try:
                return self._equivariant(node, compiled, values, self._random)
            except TiedError:
                raise
            except Exception:  # such as the factors of a matrix that is not positive definite
                return self._equivariant(node, compiled, values, lambda value: value)

    def _equivariant(
        self,
        node: Apply,
        compiled: Callable,
        values: list[tuple[Any, int | None]],
        draw: Callable[[np.ndarray], np.ndarray],
    ) -> list[int]:
        """Return the axis of each output that moves with the rows, and keeps them apart.

        A shift by one place, and a first half of their own, leave each place no row but its own.
        """
        n = len(self._values[self.rows])
        order, kept = np.roll(np.arange(n), 1), np.arange((n + 1) // 2)
        rows = [value if axis is None else draw(value) for value, axis in values]
        moved = [v if axis is None else v.take(order, axis) for v, (_, axis) in zip(rows, values)]
        others = list(rows)
        for i, (value, axis) in enumerate(values):
            if axis is not None:
                others[i] = np.roll(draw(value), 1, axis)
                np.moveaxis(others[i], axis, 0)[kept] = np.moveaxis(rows[i], axis, 0)[kept]
        found = []
        for a, b, c in zip(*(map(np.asarray, compiled(*some)) for some in (rows, moved, others))):
            fitting = (
                axis
                for axis in range(a.ndim)
                if a.shape[axis] == n
                and same(a.take(order, axis), b, rtol=1e-9, atol=1e-8)
                and a.shape == c.shape
                and same(a.take(kept, axis), c.take(kept, axis))
            )
            if (axis := next(fitting, None)) is None:
                raise TiedError(f"{node.op} does not keep the rows apart")
            found.append(axis)
        return found

    def _random(self, value: np.ndarray) -> np.ndarray:
        if value.dtype.kind == "f":
            return self._rng.uniform(0.1, 0.9, value.shape).astype(value.dtype)
        return self._rng.integers(0, 2, value.shape).astype(value.dtype)


def is_of(var: Variable, buffer: SharedVariable) -> bool:
    """Whether *var* is a buffer: transforming a model copies it, but keeps the container."""
    return getattr(var, "container", None) is buffer.container


def is_shape(var: Variable) -> bool:
    return var.owner is not None and isinstance(var.owner.op, Shape | Shape_i)


def columns_read(graphs: Sequence[Variable], rows: Variable) -> np.ndarray:
    """Return which columns of *rows* some graphs depend on, as numbers in the flattened row."""
    shape = rows.type.shape[1:]
    labels = np.arange(np.prod(shape, dtype=int)).reshape(1, *shape)
    read: set[int] = set()
    shapes = [v for v in ancestors(graphs) if is_shape(v)]
    used = set(ancestors(graphs, shapes)) - set(shapes)
    whole = {rows}
    """Variables with the columns of the rows, such as those that were cast together."""
    for node in toposort(graphs):
        if whole.isdisjoint(node.inputs) or used.isdisjoint(node.outputs):
            continue
        if isinstance(node.op, Elemwise) and whole.issuperset(node.inputs):
            whole.update(node.outputs)
            continue
        taken = labels
        if isinstance(node.op, Subtensor):
            index = get_constant_idx(node.op.idx_list, node.inputs, allow_partial=True)
            if not any(isinstance(entry, Variable) for entry in index[1:]):
                taken = labels[(slice(None), *index[1:])]
        read.update(taken.ravel().tolist())
    if not whole.isdisjoint(graphs):
        read.update(labels.ravel().tolist())
    return np.array(sorted(read), np.int64)


def indices_of(node: Apply) -> Iterator[tuple[int, Any]]:
    """Yield the axes of its first input that a node indexes by integers, and these."""
    op, n_batch_axes = node.op, 0
    if isinstance(node.op, Blockwise):
        op, n_batch_axes = node.op.core_op, node.op.batch_ndim(node)
    if isinstance(op, AdvancedSubtensor | AdvancedIncSubtensor):
        x, *rest = node.inputs
        rest = rest[isinstance(op, AdvancedIncSubtensor) :]
        for axis, index in enumerate(get_idx_list([x, *rest], op.idx_list), n_batch_axes):
            if isinstance(index, Variable) and index.type.dtype != "bool":
                yield axis, index


def within_bounds(result: Variable, rows: Variable) -> Any:
    """Clip the indices that *rows* give: numba reads and writes other memory where one is wrong."""
    fgraph = FunctionGraph(outputs=[clone_replace(result, copy_inputs_over=True)], clone=False)
    for node in fgraph.toposort():
        for axis, index in indices_of(node):
            if rows in ancestors([index]):
                n = cast(Any, node.inputs[0]).shape[axis]
                clipped = pt.clip(index, -n, n - 1).astype(index.type.dtype)
                place = max(i for i, v in enumerate(node.inputs) if v is index)
                fgraph.change_node_input(node, place, clipped)
    return fgraph.outputs[0]


def same(a: np.ndarray, b: np.ndarray, *, rtol: float = 1e-12, atol: float = 0) -> bool:
    rtol = 1e-5 if a.dtype == np.float32 else rtol
    return a.shape == b.shape and np.allclose(a, b, rtol=rtol, atol=atol, equal_nan=True)


@node_rewriter([OpFromGraph])
def _inline(fgraph: FunctionGraph, node: Apply) -> list[Variable]:
    return inline_ofg_node(node)


@node_rewriter([AllocEmpty])
def _fill(fgraph: FunctionGraph, node: Apply) -> list[Variable]:
    """Fill what a scan writes to, where each place would have what was in memory there."""
    return [pt.zeros(node.inputs, dtype=node.op.dtype)]


def _simplify(
    graphs: Sequence[Variable], rows: Variable
) -> tuple[list[Variable], dict[Variable, str]]:
    """Leave out inner graphs, and the checks of parameters, which are made for all rows at once.

    Checks of what is computed from rows alone are returned, with their names, unless something like
    the factors of a covariance would have to be computed for each row.
    """
    lowered: Any = rewrite_graph(list(graphs), include=("lower_xtensor",))
    fgraph = FunctionGraph(outputs=list(lowered), clone=False)
    in2out(_inline, _fill).rewrite(fgraph)
    names = []
    for node in fgraph.toposort():
        if isinstance(node.op, CheckParameterValue):
            for condition in _conjuncts(node.inputs[1:]):
                owners = [v.owner for v in ancestors([condition]) if v.owner]
                is_cheap = not any(isinstance(owner.op, Blockwise) for owner in owners)
                if set(explicit_graph_inputs([condition])) == {rows} and is_cheap:
                    fgraph.add_output(condition)
                    names.append(node.op.msg)
    in2out(local_remove_check_parameter).rewrite(fgraph)
    return fgraph.outputs[: len(graphs)], dict(zip(fgraph.outputs[len(graphs) :], names))


def _conjuncts(conditions: Sequence[Variable]) -> Iterator[Variable]:
    """Yield the conditions that all hold where some scalars do, before they were reduced."""
    for condition in conditions:
        op = condition.owner and condition.owner.op
        reduced = isinstance(op, All | Join | MakeVector | ScalarFromTensor)
        if reduced or (isinstance(op, DimShuffle) and op.is_expand_dims):
            yield from _conjuncts(condition.owner.inputs)
        elif condition.type.dtype == "bool":
            yield condition


def _jitter(value: np.ndarray, size: float, rng: np.random.Generator) -> np.ndarray:
    noise = rng.uniform(-size, size, value.shape) if value.dtype.kind == "f" else 0
    return (value + noise).astype(value.dtype)
