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
"""Compare a fit with what all rows of its stream say."""

import math

from collections.abc import Callable, Iterator, Sequence
from itertools import batched

import numpy as np
import pytensor.tensor as pt

from pytensor.compile.sharedvalue import SharedVariable
from pytensor.graph.basic import Variable
from pytensor.graph.traversal import ancestors
from pytensor.tensor.random.type import RandomType
from rich.console import Console

from pymc.model.core import Model
from pymc.progress_bar import CustomProgress, default_progress_theme
from pymc.pytensorf import compile, join_nonshared_inputs
from pymc.variational._streaming.dataset import StreamingDataset
from pymc.variational._streaming.errors import StreamError
from pymc.variational._streaming.fit.bins import Bins
from pymc.variational._streaming.fit.gaussian import gaussian_group, mean, names, scale
from pymc.variational._streaming.fit.newton import (
    Probe,
    between_within_ratio,
    is_dense,
    lower_bound,
    newton_step,
)
from pymc.variational._streaming.fit.report import FitReport, StreamRows
from pymc.variational._streaming.fit.streams import as_streams
from pymc.variational._streaming.guards import depends_on, total_size_of
from pymc.variational.minibatch_rv import get_scaling
from pymc.variational.opvi import Approximation, Group

__all__ = ["check_fit"]

_BLOCK_ROWS = 8192
"""Small batches are joined up to this, beside which a call of a function costs little."""

_BLOCK_VALUES = 2**20
"""And up to this where rows are wide, to bound the memory of a block."""

_MIN_BLOCKS = 256
"""Fewer blocks would blur where in the stream the gradient changes."""

_PAIRS = 8
"""Least number of pairs of draws at which the likelihoods are evaluated."""

_PRIOR_PAIRS = 128
"""The same of what does not depend on rows: it costs nothing beside them, and the priors of
hierarchical models are far from quadratic."""

_MOST_TIMES = 10
"""A source that gives this many times the declared rows has no end."""

LogDensity = Callable[..., tuple[np.ndarray, np.ndarray]]
"""Function from parameters, and rows, to a log density and its gradient."""


def check_fit(
    approx: Approximation,
    ds: StreamingDataset | Sequence[StreamingDataset],
    *,
    seed: int = 0,
    progressbar: bool = True,
) -> FitReport:
    """Compare a fit with what all rows of its stream say, in one pass over them.

    Where a Gaussian approximation is optimal, the gradient of the log density vanishes on
    average over it, and its curvature matches the scales. Both are computed at draws from the
    approximation, with every row counted once.

    Parameters
    ----------
    approx : MeanField or FullRank
        Approximation that :func:`pymc.fit` returned.
    ds : StreamingDataset or sequence of StreamingDataset
        The stream, or all streams, that the model observes. Buffer and position are left
        alone, and any batch may be in the buffer.
    seed : int, default 0
        Seed of the draws.
    progressbar : bool, default True
        Whether a progress bar is shown.

    Returns
    -------
    FitReport
        Report that prints as a verdict; ``report.apply(approx)`` corrects a fit that is nearly
        right.

    Raises
    ------
    StreamError
        If the stream enters the model otherwise than through likelihoods of its rows; if another
        stream was not passed, or :func:`pymc.Minibatch` draws rows; if the model takes no other
        number of rows than that of a batch; or if the log density is not finite.
    TypeError
        If *approx* is not a mean-field or full-rank Gaussian, or *ds* not a StreamingDataset.

    Notes
    -----
    The errors of the means come from the Hessian of the log density, estimated with as many pairs
    of draws as there are parameters, 8 at least; they are exact where the log density is
    quadratic. Beyond 64 parameters of a mean-field approximation, 64 pairs estimate its diagonal
    only, which serves where correlations are weak.

    *Cost*: a gradient of every row at each draw, 16 for up to 8 parameters. *Memory*: a
    few vectors of the parameters, or matrices where the Hessian is estimated, and a block of
    rows.

    References
    ----------
    Kucukelbir, A. et al. (2017). Automatic differentiation variational inference. Journal of
    Machine Learning Research 18(14), 1-45.

    Examples
    --------
    >>> import numpy as np
    >>> import pymc as pm
    >>> from pymc.variational.streaming import StreamingDataset
    >>> rows = np.random.default_rng(0).normal(1.0, 2.0, size=(10_000, 1))
    >>> ds = StreamingDataset(rows, batch_size=100)
    >>> with pm.Model():
    ...     mu = pm.Normal("mu", 0, 10)
    ...     y = pm.Normal("y", mu, 2, observed=ds.as_tensor()[:, 0], total_size=ds.total_size)
    ...     approx = pm.fit(
    ...         2_000,
    ...         callbacks=[ds.fit_callback()],
    ...         obj_optimizer=pm.adam(learning_rate=0.05),
    ...         progressbar=False,
    ...     )
    >>> check_fit(approx, ds, progressbar=False).apply(approx)
    >>> check_fit(approx, ds, progressbar=False).verdict
    'fine'
    """
    streams = as_streams(ds)
    group = gaussian_group(approx)
    prior_density, likelihoods = _split_density(group, streams)
    rng = np.random.default_rng(seed)
    probe = Probe(mean(group), scale(group), pairs=_PAIRS, rng=rng)
    prior = Probe(mean(group), scale(group), pairs=_PRIOR_PAIRS, rng=rng)
    prior.add(prior_density)
    _refuse_infinite(prior, "of what does not depend on the stream")
    with CustomProgress(
        console=Console(theme=default_progress_theme), disable=not progressbar
    ) as progress:
        task = progress.add_task("Checking", total=sum(s.total_size or 0 for s in streams) or None)
        for likelihood in likelihoods:
            likelihood.add_to(probe, lambda n: progress.update(task, advance=n))
    _refuse_infinite(probe, "of the stream's rows")
    return _report(group, [probe, prior], likelihoods)


class _Likelihood:
    """The log-likelihood of one stream, which the model scales to *total_size* rows."""

    def __init__(
        self, stream: StreamingDataset, density: LogDensity, total_size: int | None, size: int
    ):
        self.stream = stream
        self._density = density
        self._total_size = total_size
        self._gradients = Bins(size)
        """Gradient per row of consecutive blocks."""
        self._n_rows = 0
        self._block_rows = 0

    def add_to(self, probe: Probe, advance: Callable[[int], None]) -> None:
        """Add all rows to *probe*, in one pass over the stream."""
        for rows in _blocks(self.stream):
            gradient = self._add_rows(probe, rows)
            self._block_rows = self._block_rows or len(rows)
            # Blocks are compared with each other, which a shorter last one would blur.
            if len(rows) == self._block_rows:
                self._gradients.add(gradient / len(rows))
            self._n_rows += len(rows)
            self._refuse_endless()
            advance(len(rows))

    @property
    def counted(self) -> StreamRows:
        return StreamRows(str(self.stream.as_tensor().name), self._n_rows, self._total_size)

    @property
    def batch_variance(self) -> np.ndarray:
        """Variance of the gradient that one batch, scaled to all rows, gives."""
        whole = self._gradients.moments.merged()
        per_row = whole.squares[0] / max(1, whole.n[0] - 1) * self._block_rows
        return per_row * self._n_rows**2 / self.stream.batch_size

    @property
    def between_within_ratio(self) -> float:
        """Variance of the gradient between parts of the stream over that within, 0 if not known."""
        return between_within_ratio(self._gradients.moments) or 0.0

    def _add_rows(self, probe: Probe, rows: np.ndarray) -> np.ndarray:
        try:
            return probe.add(lambda theta: self._density(theta, rows))
        except (AssertionError, TypeError, ValueError) as error:
            name, batch_size = self.stream.as_tensor().name, self.stream.batch_size
            if len(rows) == batch_size:
                raise
            raise StreamError(
                f"the likelihood of {name!r} fails with {len(rows)} rows; check_fit needs a "
                f"model of any number of rows, not of the {batch_size} of a batch only: take "
                "lengths and coordinates from as_tensor().shape[0]"
            ) from error

    def _refuse_endless(self) -> None:
        declared = self.stream.total_size
        most = _MOST_TIMES * (declared or 0) + max(_BLOCK_ROWS, self.stream.batch_size)
        if declared and self._n_rows > most:
            raise StreamError(
                f"the stream {self.stream.as_tensor().name!r} has total_size={declared} but gave "
                f"{self._n_rows} rows and has not ended; pass the number of rows, and a source "
                "that ends after an epoch"
            )


def _split_density(
    group: Group, streams: Sequence[StreamingDataset]
) -> tuple[LogDensity, list[_Likelihood]]:
    """Compile the log density as likelihoods of the streams and all the rest."""
    model = group.model
    variables = [*model.free_RVs, *model.observed_RVs, *model.potentials]
    factors = dict(zip(variables, model.logp(variables, sum=False)))
    for v, factor in factors.items():
        _refuse_missing_rows(v, factor, streams)
    likelihoods = []
    for stream in streams:
        observed = [v for v in factors if depends_on(model, v, stream.as_tensor())]
        _refuse_other_uses(model, observed, streams, stream)
        terms = [factors.pop(v).sum() / _scaling(model, v) for v in observed]
        density = _compile_density(group, terms, stream.as_tensor())
        total_size = _declared_size(observed, stream)
        likelihoods.append(_Likelihood(stream, density, total_size, group.ddim))
    return _compile_density(group, [factor.sum() for factor in factors.values()]), likelihoods


def _refuse_missing_rows(
    v: Variable, factor: Variable, streams: Sequence[StreamingDataset]
) -> None:
    """Refuse a factor of rows that are drawn anew at each call, or of a stream not passed."""
    passed = [stream.as_tensor().container for stream in streams]
    for a in ancestors([factor]):
        if isinstance(a.type, RandomType):
            raise StreamError(
                f"{v.name!r} depends on random draws, as those of pm.Minibatch, but check_fit "
                "needs all rows of every likelihood; observe them through a StreamingDataset, "
                "which takes arrays too"
            )
        if hasattr(a.tag, "fit_callback") and getattr(a, "container", None) not in passed:
            raise StreamError(
                f"{v.name!r} depends on the stream {a.name!r}, which was not passed; pass all "
                "streams that the model uses"
            )


def _refuse_other_uses(
    model: Model,
    variables: Sequence[Variable],
    streams: Sequence[StreamingDataset],
    stream: StreamingDataset,
) -> None:
    """Refuse a stream that enters the model otherwise than through likelihoods of its rows."""
    name = stream.as_tensor().name
    if not variables:
        raise StreamError(
            f"no observed variable of approx.model depends on the stream {name!r}; "
            "pass the stream that was fitted"
        )
    for v in variables:
        if v not in model.observed_RVs:
            raise StreamError(
                f"{v.name!r} depends on the stream {name!r} but is not observed, so that what "
                "all rows say about it is not defined; write it as an observed variable with "
                "total_size"
            )
        if sum(depends_on(model, v, s.as_tensor()) for s in streams) > 1:
            raise StreamError(
                f"{v.name!r} depends on several streams; check_fit needs one for each"
            )


def _scaling(model: Model, rv: Variable) -> Variable | float:
    if not total_size_of(rv):
        return 1.0
    return get_scaling(rv.owner.inputs[1:], model.rvs_to_values[rv].shape)


def _declared_size(observed: Sequence[Variable], stream: StreamingDataset) -> int | None:
    """Return the total_size of the likelihoods, one that differs from the stream's if any."""
    sizes = [next(iter(total_size_of(rv)), None) for rv in observed]
    return next((size for size in sizes if size != stream.total_size), sizes[0])


def _compile_density(
    group: Group, terms: Sequence[Variable], buffer: SharedVariable | None = None
) -> LogDensity:
    """Compile the sum of *terms* and its gradient, in the flat parameters of *group*."""
    values = {v.name: v for v in group.model.value_vars}
    [total], flat = join_nonshared_inputs(
        group.model.initial_point(0),
        [pt.add(*terms)],
        [values[name] for name in group.ordering],
    )
    inputs, givens = [flat], {}
    if buffer is not None:
        rows = buffer.type("rows")
        inputs.append(rows)
        givens = {
            v: rows for v in ancestors([total]) if getattr(v, "container", None) is buffer.container
        }
    gradient = pt.grad(total, flat, disconnected_inputs="ignore")
    function = compile(inputs, [total, gradient], givens=givens, on_unused_input="ignore")
    return lambda theta, *rows: function(theta.astype(flat.dtype), *rows)


def _blocks(stream: StreamingDataset) -> Iterator[np.ndarray]:
    """Yield the batches of an epoch, joined where they are small and many."""
    rows = min(
        _BLOCK_ROWS,
        _BLOCK_VALUES // math.prod(stream.sample_shape),
        (stream.total_size or 0) // _MIN_BLOCKS,
    )
    for batches in batched(stream, max(1, rows // stream.batch_size)):
        yield np.concatenate(batches)


def _refuse_infinite(probe: Probe, part: str) -> None:
    if not probe.is_finite:
        raise StreamError(
            f"the log density {part} is not finite at draws from approx, or has no finite "
            "gradient there; run the fit for longer, or keep the default transforms, so that no "
            "draw leaves the support of its variable"
        )


def _report(group: Group, probes: Sequence[Probe], likelihoods: Sequence[_Likelihood]) -> FitReport:
    scales = scale(group)
    optimum = newton_step(mean(group), scales, probes)
    elbo, elbo_error = lower_bound(scales, probes)
    noise = np.sqrt(np.sum([part.batch_variance for part in likelihoods], axis=0))
    gradient = np.sum([probe.gradient for probe in probes], axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        signal_to_noise = np.where(noise > 0, np.abs(gradient) / noise, 0).max()
    return FitReport(
        names=names(group),
        z=optimum.z,
        s=optimum.s,
        elbo=elbo,
        elbo_error=elbo_error,
        streams=tuple(part.counted for part in likelihoods),
        clarity=float(signal_to_noise) if noise.any() else np.inf,
        disorder=max(part.between_within_ratio for part in likelihoods) or None,
        moved=all(part.stream.rows_seen > 0 for part in likelihoods),
        whole_hessian=is_dense(scales),
        optimum=optimum,
    )
