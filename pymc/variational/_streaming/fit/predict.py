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
"""Score and predict rows that a fit has not seen, in memory that does not grow with them."""

import os

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pytensor.graph.basic import Variable
from pytensor.graph.replace import clone_replace
from pytensor.graph.traversal import ancestors

from pymc.logprob.utils import replace_rvs_by_values
from pymc.model.core import Model
from pymc.pytensorf import compile
from pymc.variational._streaming.batches.window import ShuffleBuffer
from pymc.variational._streaming.dataset import StreamingDataset
from pymc.variational._streaming.errors import StreamError
from pymc.variational._streaming.fit.bins import Moments, merge
from pymc.variational._streaming.guards import (
    contract_for,
    depends_on,
    scaling,
    streams_of,
    total_size_of,
)
from pymc.variational._streaming.likelihood import Factors, columns_read, is_of
from pymc.variational._streaming.sources.arrow import with_columns
from pymc.variational._streaming.sources.parquet.files import import_pyarrow
from pymc.variational._streaming.utils import positive_int, progress_bar, replacing
from pymc.variational.opvi import Approximation

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["LogScore", "log_score", "predict"]

_BLOCK_VALUES = 2**20
"""Number of draws times number of rows that are held at once."""


@dataclass(frozen=True, slots=True, repr=False)
class LogScore:
    """The log predictive density of rows. It prints as one line."""

    mean: float
    """Mean of the log predictive density of a row; higher is better."""
    se: float
    """Standard error of the mean, from the variation between rows."""
    rows: int
    """Number of rows."""

    def __repr__(self) -> str:
        return f"log score {self.mean:.5g} ± {self.se:.2g} per row, {self.rows:,} rows"


def log_score(
    approx: Approximation,
    rows: Any,
    *,
    ds: StreamingDataset | None = None,
    draws: int = 200,
    seed: int = 0,
    progressbar: bool = True,
) -> LogScore:
    """Return the log predictive density of rows, which the fit should not have seen.

    The density of a row is averaged over draws from the approximation before its logarithm is
    taken. Rows count once each, whatever the ``total_size`` of the model. Several variables that
    observe the same row are scored together.

    Parameters
    ----------
    approx : Approximation
        What :func:`pymc.fit` returned.
    rows : Source, ndarray, Arrow table or data frame
        Rows with the columns of the stream, in any order, such as ``parquet_source("valid/")``.
    ds : StreamingDataset, optional
        Stream whose place the rows take. Default: the only one of the model.
    draws : int, default 200
        Number of draws from the approximation.
    seed : int, default 0
        Seed of the draws.
    progressbar : bool, default True
        Whether a progress bar is shown.

    Returns
    -------
    LogScore
        Mean over the rows, its standard error, and the number of rows.

    Raises
    ------
    StreamError
        If no observed variable depends on the stream, or it is not clear which stream is meant.
    ValueError
        If there are no rows, or they lack a column that is read, or have other levels.

    Notes
    -----
    *Cost*: the likelihood of every row at each draw. *Memory*: some 30 MB for a block of rows
    at all draws. With few draws
    the score is too low where the density of a row varies much between them.

    References
    ----------
    Gelman, A., Hwang, J. and Vehtari, A. (2014). Understanding predictive information criteria for
    Bayesian models. Statistics and Computing 24, 997-1016.

    Examples
    --------
    >>> import numpy as np
    >>> import pymc as pm
    >>> from pymc.variational.streaming import StreamingDataset
    >>> table = np.random.default_rng(0).normal(1.0, 2.0, size=(11_000, 1))
    >>> ds = StreamingDataset(table[:10_000], batch_size=100)
    >>> with pm.Model():
    ...     mu = pm.Normal("mu", 0, 10)
    ...     y = pm.Normal("y", mu, 2, observed=ds.as_tensor()[:, 0], total_size=ds.total_size)
    ...     approx = pm.fit(1_000, callbacks=[ds.fit_callback()], progressbar=False)
    >>> log_score(approx, table[10_000:], progressbar=False).rows
    1000
    """
    posterior = _Posterior(approx, ds, draws, seed)
    likelihood = posterior.compile(posterior.log_likelihoods())
    parts = []
    for block in posterior.blocks(rows, "Scoring", progressbar):
        terms = np.sum([values.sum(axis=2) for values in likelihood(block)], axis=0)
        highest = np.nan_to_num(terms.max(axis=0))
        with np.errstate(divide="ignore", invalid="ignore"):  # a row may be impossible
            scores = highest + np.log(np.exp(terms - highest).mean(axis=0))
            mean = scores.mean()
            parts.append(Moments(len(scores), mean, np.square(scores - mean).sum()))
    with np.errstate(invalid="ignore"):
        n_rows, _, squares = merge(parts)
        se = np.sqrt(squares / max(1, n_rows - 1) / n_rows)
    mean = sum(part.n * part.mean for part in parts) / n_rows
    return LogScore(float(mean), float(se), n_rows)


def predict(
    approx: Approximation,
    rows: Any,
    *,
    to: str | os.PathLike,
    var_names: Sequence[str] | None = None,
    quantiles: float | Sequence[float] = (0.05, 0.5, 0.95),
    ds: StreamingDataset | None = None,
    draws: int = 200,
    seed: int = 0,
    overwrite: bool = False,
    progressbar: bool = True,
) -> None:
    """Write what a fit predicts for rows to a Parquet file, in the order of the rows.

    A variable ``y`` has the columns ``y_mean``, ``y_sd``, ``y_q5``, ``y_q50`` and ``y_q95``. They
    describe draws of an observed variable, with its own noise, or of a Deterministic.

    Parameters
    ----------
    approx : Approximation
        What :func:`pymc.fit` returned.
    rows : Source, ndarray, Arrow table or data frame
        Rows with the columns of the stream, in any order, such as ``parquet_source("new/")``.
        Columns that the predicted variables do not read, such as the observed one, may be missing.
    to : path
        File to write. It appears when it is whole.
    var_names : sequence of str, optional
        Observed variables and Deterministics to predict, with one value, or one vector, per row.
        Default: the observed variables that depend on the stream.
    quantiles : float or sequence of float, default (0.05, 0.5, 0.95)
        Probabilities of the quantiles.
    ds : StreamingDataset, optional
        Stream whose place the rows take. Default: the only one of the model.
    draws : int, default 200
        Number of draws from the approximation.
    seed : int, default 0
        Seed of the draws.
    overwrite : bool, default False
        Whether a file of this name is replaced.
    progressbar : bool, default True
        Whether a progress bar is shown.

    Raises
    ------
    FileExistsError
        If the file exists, without *overwrite*.
    StreamError
        If a variable does not depend on the stream, or on another one too, or has not one value or
        vector per row that depends on that row alone, or it is not clear which stream is meant.
    ValueError
        If there are no rows, or they lack a column that is read, or have other levels; or of one
        draw, which has no standard deviation.
    KeyError
        If the model has no variable of a name.

    Notes
    -----
    *Cost*: the model of every row at each draw, and sorting the draws. *Memory*:
    some 30 MB for a block of rows at all draws, times the values of a row.

    Examples
    --------
    >>> import numpy as np
    >>> import pyarrow.parquet as pq
    >>> import pymc as pm
    >>> from pymc.variational.streaming import StreamingDataset
    >>> table = np.random.default_rng(0).normal(1.0, 2.0, size=(10_000, 1))
    >>> ds = StreamingDataset(table, batch_size=100)
    >>> with pm.Model():
    ...     mu = pm.Normal("mu", 0, 10)
    ...     y = pm.Normal("y", mu, 2, observed=ds.as_tensor()[:, 0], total_size=ds.total_size)
    ...     approx = pm.fit(1_000, callbacks=[ds.fit_callback()], progressbar=False)
    >>> predict(approx, table[:3], to="predictions.parquet", progressbar=False)
    >>> pq.read_table("predictions.parquet").column_names
    ['y_mean', 'y_sd', 'y_q5', 'y_q50', 'y_q95']
    """
    probabilities = np.ravel(quantiles)
    if not np.all((probabilities >= 0) & (probabilities <= 1)):
        raise ValueError(f"quantiles={quantiles} must lie between 0 and 1")
    if draws == 1:
        raise ValueError("draws=1 gives no standard deviation; pass 2 at least")
    to = Path(to)
    if to.is_dir():
        raise IsADirectoryError(f"{to} is a folder; pass the name of a file")
    if to.exists() and not overwrite:
        raise FileExistsError(f"{to} exists; pass overwrite=True to replace it")
    posterior = _Posterior(approx, ds, draws, seed)
    variables = posterior.variables(var_names)
    sample = posterior.compile(posterior.forward(list(variables.values())))
    table = import_pyarrow().table
    blocks = posterior.blocks(rows, "Predicting", progressbar, variables)
    _write(to, (table(_describe(variables, sample(block), probabilities)) for block in blocks))


class _Posterior:
    """Draws from an approximation, and the parts of its model that depend on one stream."""

    def __init__(self, approx: Approximation, ds: StreamingDataset | None, draws: int, seed: int):
        if not isinstance(approx, Approximation):
            raise TypeError(f"approx is {type(approx).__name__}; pass what pm.fit returned")
        self._model: Model = approx.model
        self._factors = Factors(self._model)
        self._stream = ds or _only_stream(self._model)
        self._buffer = self._stream.as_tensor()
        self._n_draws = positive_int("draws", draws)
        self._draws = approx.sample_dict_fn(self._n_draws, random_seed=seed)
        # From the seed of the draws, the noise of an observed variable would be the same numbers.
        self._seed = int(np.random.SeedSequence(seed, spawn_key=(1,)).generate_state(1)[0])

    def log_likelihoods(self) -> list[Variable]:
        """Return the log-likelihood terms of the rows, each row counted once."""
        logp = self._factors.logp
        return [logp[rv] / scaling(self._model, rv) for rv in self._observed()]

    def forward(self, variables: Sequence[Variable]) -> Sequence[Variable]:
        """Return the graphs that draw *variables*, in the values of the parameters."""
        model = self._model
        graphs: Any = [rv.owner.inputs[0] if total_size_of(rv) else rv for rv in variables]
        return replace_rvs_by_values(
            graphs,
            rvs_to_values={rv: model.rvs_to_values[rv] for rv in model.free_RVs},
            rvs_to_transforms=model.rvs_to_transforms,
        )

    def variables(self, names: Sequence[str] | None) -> dict[str, Variable]:
        """Return the named variables, all of which depend on the rows."""
        if names is None:
            return {str(rv.name): rv for rv in self._observed()}
        if isinstance(names, str):
            raise TypeError(f"var_names={names!r} is a string; pass [{names!r}]")
        for name in names:
            if not depends_on(self._model, self._model[name], self._buffer):
                raise StreamError(
                    f"{name!r} does not depend on the rows of {self._buffer.name!r}; "
                    "take it from approx.sample()"
                )
        return {name: self._model[name] for name in names}

    def compile(self, graphs: Sequence[Variable]) -> Callable[[np.ndarray], list[np.ndarray]]:
        """Return a function from rows to values of *graphs*, of shape (draws, rows, values)."""
        rows = self._buffer.type("rows")
        above = list(ancestors(graphs))
        values = [value for value in self._model.value_vars if value in above]
        copies = [a for a in above if is_of(a, self._buffer)]
        others = [a.name for a in above if hasattr(a.tag, "fit_callback") and a not in copies]
        if others:
            raise StreamError(
                f"what is predicted depends on the stream {others[0]!r} too, which has no rows; "
                "predict variables of one stream"
            )
        graphs = clone_replace(graphs, dict.fromkeys(copies, rows), copy_inputs_over=True)
        self._read = columns_read(graphs, rows)
        function = compile(
            [rows, *values],
            graphs,
            random_seed=self._seed,
            on_unused_input="ignore",
            allow_input_downcast=True,
        )
        points = [[self._draws[v.name][i] for v in values] for i in range(self._n_draws)]

        def evaluate(block: np.ndarray) -> list[np.ndarray]:
            draws = [[v.reshape(len(block), -1) for v in function(block, *p)] for p in points]
            return [np.stack(of_one) for of_one in zip(*draws)]

        return evaluate

    def blocks(
        self, rows: Any, description: str, show: bool, predicted: Mapping[str, Variable] = {}
    ) -> Iterator[np.ndarray]:
        """Yield the rows in their order, in blocks."""
        if isinstance(rows, ShuffleBuffer):
            raise TypeError("rows is a shuffle_buffer; pass the source that it shuffles")
        names = self._stream.columns
        unread = [name for j, name in enumerate(names or ()) if j not in self._read]
        source = with_columns(rows, self._stream._source, unread)
        size = max(1, _BLOCK_VALUES // self._n_draws)
        n_rows, contract = 0, None
        with progress_bar(description, source.n_rows, show=show) as advance:
            for block in self._stream._read_once(source, size):
                if contract is None:
                    # Observed values outside a support have a log-likelihood, -inf.
                    contract = contract_for(
                        self._factors, self._buffer, block, names, predicted
                    ).without_supports()
                contract.check(block, n_rows)
                contract.compile()
                yield block
                n_rows += len(block)
                advance(len(block))
        if not n_rows:
            raise ValueError("rows has no rows")

    def _observed(self) -> list[Variable]:
        model, buffer = self._model, self._buffer
        observed = [rv for rv in model.observed_RVs if depends_on(model, rv, buffer)]
        if not observed:
            raise StreamError(
                f"no observed variable of approx.model depends on the stream {buffer.name!r}; "
                "pass the ds that was fitted"
            )
        return observed


def _only_stream(model: Model) -> StreamingDataset:
    """Return the dataset of the one stream that *model* observes."""
    offers = [buffer.tag.fit_callback for buffer in streams_of(model, model.basic_RVs)]
    streams = [offer.dataset and offer.dataset() for offer in offers]
    if len(streams) != 1:
        raise StreamError(
            f"the model of approx observes {len(streams)} streams whose rows could be meant; "
            "pass ds=..., the one whose place the rows take"
        )
    if streams[0] is None:
        raise StreamError(
            "the StreamingDataset of approx.model is gone; keep a reference to it as long as to "
            "approx, as a function does that returns both"
        )
    return streams[0]


def _describe(
    names: Iterable[str], draws: Sequence[np.ndarray], quantiles: np.ndarray
) -> dict[str, np.ndarray]:
    """Return a column for each moment and quantile of each value of a row."""
    columns = {}
    for name, of_variable in zip(names, draws):
        for k, of_one in enumerate(np.moveaxis(of_variable, 2, 0)):
            prefix = name if of_variable.shape[2] == 1 else f"{name}[{k}]"
            columns[f"{prefix}_mean"] = of_one.mean(axis=0)
            columns[f"{prefix}_sd"] = of_one.std(axis=0, ddof=1)
            cuts = np.quantile(of_one, quantiles, axis=0)
            columns |= {f"{prefix}_q{100 * q:g}": cut for q, cut in zip(quantiles, cuts)}
    return columns


def _write(to: Path, tables: Iterator["pa.Table"]) -> None:
    """Write tables to a file."""
    import pyarrow.parquet as pq

    with replacing(to) as file:
        first = next(tables)
        with pq.ParquetWriter(file, first.schema) as writer:
            for table in chain([first], tables):
                writer.write_table(table)
