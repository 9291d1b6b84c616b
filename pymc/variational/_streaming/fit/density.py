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
"""The log density of a model, as a sum over the rows of its streams and a part without rows."""

import math
import threading

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import closing, contextmanager
from functools import partial
from typing import Any, NamedTuple

import cloudpickle
import numpy as np
import pytensor.tensor as pt

from pytensor.compile.sharedvalue import SharedVariable
from pytensor.graph.basic import Variable
from pytensor.graph.replace import clone_replace
from pytensor.graph.traversal import ancestors
from pytensor.tensor.random.type import RandomType

from pymc.model.core import Model
from pymc.pytensorf import compile, join_nonshared_inputs
from pymc.variational._streaming.batches.prefetch import Prefetcher, read_epochs
from pymc.variational._streaming.batches.rebatch import Batch, cast, rebatch
from pymc.variational._streaming.batches.window import ShuffleBuffer
from pymc.variational._streaming.contract import Contract
from pymc.variational._streaming.dataset import StreamingDataset
from pymc.variational._streaming.errors import StreamError
from pymc.variational._streaming.fit.trust_region import Pattern
from pymc.variational._streaming.guards import (
    contract_for,
    depends_on,
    infinite_row,
    scaling,
    total_size_of,
)
from pymc.variational._streaming.likelihood import Factors, compiling, is_of
from pymc.variational._streaming.sources.base import Source
from pymc.variational.opvi import Group

__all__ = ["Density", "Part", "Term", "add_up", "sum_over_rows"]

_BLOCK_VALUES = 2**16
"""Values of the rows that are evaluated at once: calls then cost little, and blocks fit caches."""

_VALUES_OF_PARAMETER = 8
"""Values of the rows that are evaluated at once for each of many parameters, whose gradient takes
its time in every call."""

_PARTS = 32
"""Parts of a stream that are summed by themselves, and can be read by different workers."""

_MOST_TIMES = 10
"""A source that gives this many times the declared rows has no end."""

_worker = threading.local()
"""What the thread has been sent last, so that each worker compiles once."""


class Term:
    """A summand of a log density: the likelihood of any number of rows, or all that needs none.

    It is compiled when it is first used, and again in a process that it was sent to.
    """

    def __init__(self, total: Variable, flat: Variable, rows: Variable | None = None):
        self._total, self._flat, self._rows = total, flat, rows
        self._function: Callable | None = None

    def value_and_gradient(
        self, x: np.ndarray, rows: np.ndarray | None = None
    ) -> tuple[float, np.ndarray]:
        """Return the value and the gradient, shape (d,), at unconstrained parameters *x*."""
        given = () if self._rows is None else (rows,)
        if self._function is None:
            with compiling:
                self._function = self._function or self._compile()
        value, gradient = self._function(*given, x)
        return float(value), np.asarray(gradient, "float64")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_function": None}

    def _compile(self) -> Callable:
        inputs = [self._flat] if self._rows is None else [self._rows, self._flat]
        gradient = pt.grad(self._total, self._flat, disconnected_inputs="ignore")
        return compile(
            inputs, [self._total, gradient], on_unused_input="ignore", allow_input_downcast=True
        )


class Density:
    """The log density of the unconstrained parameters of a model, in the order of *group*.

    A stream must enter the model through likelihoods of its rows alone, and all streams be passed.
    """

    def __init__(self, group: Group, streams: Sequence[StreamingDataset]):
        self._factors = Factors(group.model)
        self.model = model = self._factors.model
        logp = dict(self._factors.logp)
        _refuse_other_uses(model, logp, streams)
        self.size: int = group.ddim
        """Number of parameters."""
        self.streams = list(streams)
        self.likelihoods: list[Term] = []
        """Likelihood of any number of rows of each stream, each row counted once."""
        self.total_sizes: list[int | None] = []
        """Number of rows to which the model scales the likelihood of each stream."""
        for stream in streams:
            buffer = stream.as_tensor()
            observed = [v for v in logp if depends_on(model, v, buffer)]
            if not observed:
                raise StreamError(
                    f"no observed variable of approx.model depends on the stream {buffer.name!r}; "
                    "pass the stream that was fitted"
                )
            terms = [logp.pop(v) / scaling(model, v) for v in observed]
            sizes = {next(iter(total_size_of(rv)), None) for rv in observed}
            self.total_sizes.append((sizes - {stream.total_size} or sizes).pop())
            self.likelihoods.append(self._term(group.ordering, terms, buffer))
        self.prior = self._term(group.ordering, list(logp.values()))
        """All that does not depend on the rows of streams."""
        self.pattern = Pattern.dense(0)
        """Parameters that are varied together to find the Hessian of a likelihood."""
        self._contracts: dict[int, Contract] = {}

    def contract(self, number: int, rows: np.ndarray) -> Contract:
        """Return what rows of a stream must meet, which is derived with the first of them."""
        if number not in self._contracts:
            stream = self.streams[number]
            found = contract_for(self._factors, stream.as_tensor(), rows, stream.columns)
            self._contracts[number] = found
        return self._contracts[number]

    def not_finite(self, remedy: str) -> StreamError:
        """Return an error that names a row without a finite log-likelihood, or else a *remedy*."""
        text = "the log density is not finite at draws from approx, or has no finite gradient there"
        for stream in self.streams:
            batches: Iterable[np.ndarray] = [] if stream._endless else stream
            found = infinite_row(self._factors, stream.as_tensor(), batches, stream.columns)
            if found:
                return StreamError(found)
        return StreamError(f"{text}; {remedy[0].lower()}{remedy[1:-1]}")

    def _term(
        self,
        names: Iterable[str],
        factors: Sequence[Variable],
        buffer: SharedVariable | None = None,
    ) -> Term:
        """Return the sum of *factors*, in the flat parameters of *names*, as a function of rows."""
        values = {v.name: v for v in self.model.value_vars}
        # Sums of many rows need more digits than the values in them.
        tensors = [pt.as_tensor(factor, allow_xtensor_conversion=True) for factor in factors]
        totals = [pt.cast(tensor, "float64").sum() for tensor in tensors]
        [total], flat = join_nonshared_inputs(
            self._factors.initial_point,
            [pt.add(*totals) if totals else pt.zeros((), "float64")],
            [values[name] for name in names],
        )
        if buffer is None:
            return Term(total, flat)
        rows = buffer.type("rows")
        copies = [v for v in ancestors([total]) if is_of(v, buffer)]
        return Term(clone_replace(total, dict.fromkeys(copies, rows)), flat, rows)


class Part(NamedTuple):
    """Sums over some consecutive rows of a stream."""

    stream: int
    """Position of the stream in *density.streams*."""
    n_rows: int
    n_blocks: int
    """Number of calls of the function, each with one block of the rows."""
    sums: tuple[Any, ...]
    first_rows: np.ndarray
    """As many of the rows as were to be kept."""


def sum_over_rows(
    density: Density,
    function: Callable[[Term, np.ndarray], tuple[Any, ...]],
    *,
    rows: int | None = None,
    keep: int = 0,
    min_blocks: int = _PARTS,
    executor: Executor | None = None,
    advance: Callable[[int], None] = lambda n_rows: None,
) -> list[Part]:
    """Sum a function of a likelihood and a block of rows over all rows of all streams.

    The function returns numbers and arrays, whose sums do not depend on who reads what: the blocks
    and the order of summation are fixed. Reading ends after *rows* of each stream, of which *keep*
    are returned, in equal shares from all parts. Few rows are cut into *min_blocks*. The *executor*
    reads parts, but not of sources that can only be read from their beginning.
    """
    parts = []
    for number, (stream, likelihood) in enumerate(zip(density.streams, density.likelihoods)):
        job = _Job(
            stream,
            number,
            likelihood,
            function,
            rows=rows,
            keep=keep,
            block_values=max(_BLOCK_VALUES, _VALUES_OF_PARAMETER * density.size),
            min_blocks=min_blocks,
        )
        derive = partial(density.contract, number)
        if executor is None or not job.has_random_access:
            parts += job.read(0, _PARTS, advance, derive)
            continue
        with closing(job.read_blocks(0, 1)) as blocks:
            first = next(blocks)
        with job.noting(len(first)):
            contract = derive(first)
        payload = cloudpickle.dumps((job, contract))
        futures = [executor.submit(_read_in_worker, payload, i) for i in job.starts()]
        try:
            for future in futures:
                read = future.result()
                parts += read
                advance(sum(part.n_rows for part in read))
        finally:
            for future in futures:
                future.cancel()
    return parts


def add_up(sums: Iterable[Sequence[Any]]) -> tuple[Any, ...]:
    """Return the sums of several together."""
    return tuple(sum(values) for values in zip(*sums))


class _Job:
    """The sum over a stream, cut into parts of whole blocks."""

    def __init__(
        self,
        stream: StreamingDataset,
        number: int,
        term: Term,
        function: Callable[[Term, np.ndarray], tuple[Any, ...]],
        *,
        rows: int | None,
        keep: int,
        block_values: int,
        min_blocks: int,
    ):
        self.number, self.term, self.function = number, term, function
        self.name = str(stream.as_tensor().name)
        self.source: Source = stream._source
        self.shape, self.dtype = stream.sample_shape, stream._dtype
        self.declared = None if stream._endless else stream.total_size
        self.rows, self.keep = rows, math.ceil(keep / _PARTS)
        known = self.source.n_rows or self.declared or rows or block_values
        n_rows = min(known, rows or known)
        self.block = int(max(1, min(block_values // math.prod(self.shape), n_rows // min_blocks)))
        self.blocks = math.ceil(n_rows / self.block / _PARTS)
        """Number of blocks in a part, the last part excepted, which has all that are left."""

    @property
    def has_random_access(self) -> bool:
        source = self.source.source if isinstance(self.source, ShuffleBuffer) else self.source
        return source.read_starts(np.array([0])) is not None

    def starts(self) -> range:
        """Return the first parts of what is worth a task, of which none reads a window in vain."""
        window = self.source.buffer_size if isinstance(self.source, ShuffleBuffer) else 1
        return range(0, _PARTS, min(_PARTS, math.ceil(window / (self.block * self.blocks))))

    def read(
        self,
        first: int,
        stop: int,
        advance: Callable[[int], None],
        contract_of: Callable[[np.ndarray], Contract],
    ) -> list[Part]:
        """Return the parts from *first* to before *stop*, or fewer where the rows end before."""
        parts: list[Part] = []
        for i, rows in enumerate(self.read_blocks(first, stop)):
            if i % self.blocks == 0 and len(parts) < stop - first:
                parts.append(Part(self.number, 0, 0, (), rows[:0]))
            with self.noting(len(rows)):
                offset = (first * self.blocks + i) * self.block
                contract = contract_of(rows)
                contract.check(rows, offset)
                contract.compile()
                parts[-1] = self._add(parts[-1], rows)
            advance(len(rows))
        return parts

    @contextmanager
    def noting(self, n_rows: int) -> Iterator[None]:
        """Add to an error what the likelihood must allow."""
        try:
            yield
        except (AssertionError, TypeError, ValueError) as error:
            error.add_note(
                f"the likelihood of {self.name!r} is evaluated with any number of rows, here "
                f"{n_rows}; take lengths and coordinates from as_tensor().shape[0]"
            )
            raise

    def _add(self, part: Part, rows: np.ndarray) -> Part:
        values = self.function(self.term, rows)
        sums = tuple(a + b for a, b in zip(part.sums, values)) if part.n_blocks else values
        kept = part.first_rows
        if len(kept) < self.keep:
            kept = np.concatenate([kept, rows[: self.keep - len(kept)]])
        return Part(part.stream, part.n_rows + len(rows), part.n_blocks + 1, sums, kept)

    def read_blocks(self, first: int, stop: int) -> Generator[np.ndarray]:
        """Yield the rows of some parts in blocks; the last part of all goes on to the end."""
        part_rows = self.block * self.blocks
        end = self.rows or math.inf
        if stop < _PARTS:
            end = min(end, stop * part_rows)
        start = first * part_rows
        most = math.inf if self.declared is None else _MOST_TIMES * self.declared + self.block
        chunks = read_epochs(self.source, self.shape, self.dtype, start=start, cycle=False)
        with closing(Prefetcher(chunks)) as items:
            for item in rebatch(items, self.block):
                if not isinstance(item, Batch):
                    continue
                if start > most:
                    raise StreamError(
                        f"the stream {self.name!r} has total_size={self.declared} but gave "
                        f"{start} rows and has not ended; pass the number of rows, and a source "
                        "that ends after an epoch"
                    )
                rows = item.rows[: int(min(len(item.rows), end - start))]
                if len(rows):
                    yield cast(rows, self.dtype)
                start += len(rows)
                if start >= end:
                    return


def _read_in_worker(payload: bytes, first: int) -> list[Part]:
    """Return some parts of a job that another process has sent."""
    if getattr(_worker, "payload", None) != payload:
        _worker.payload, _worker.sent = payload, cloudpickle.loads(payload)
    job, contract = _worker.sent
    stop = min(first + job.starts().step, _PARTS)
    return job.read(first, stop, lambda n_rows: None, lambda rows: contract)


def _refuse_other_uses(
    model: Model, factors: Mapping[Variable, Variable], streams: Sequence[StreamingDataset]
) -> None:
    """Refuse a factor that is neither free of rows nor observes those of one stream alone."""
    passed = [stream.as_tensor().container for stream in streams]
    for v, factor in factors.items():
        above = list(ancestors([factor]))
        uses = sum(depends_on(model, v, stream.as_tensor()) for stream in streams)
        # The container is compared, because transforming a model copies its shared variables.
        left_out = [
            a.name
            for a in above
            if hasattr(a.tag, "fit_callback") and getattr(a, "container", None) not in passed
        ]
        if any(isinstance(a.type, RandomType) for a in above):
            reason = (
                "random draws, as those of pm.Minibatch; observe all rows through a "
                "StreamingDataset, which takes arrays too"
            )
        elif left_out:
            reason = f"the stream {left_out[0]!r}, which was not passed; pass all streams"
        elif uses and v not in model.observed_RVs:
            reason = "a stream but is not observed; write it as an observed variable"
        elif uses > 1:
            reason = "several streams; observe each in a variable of its own"
        else:
            continue
        raise StreamError(f"{v.name!r} depends on {reason}")
