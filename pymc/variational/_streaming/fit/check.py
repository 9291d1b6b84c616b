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
from dataclasses import dataclass
from itertools import batched
from typing import TYPE_CHECKING

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
from pymc.variational._streaming.errors import StreamError
from pymc.variational._streaming.fit.bins import Bins, merged
from pymc.variational._streaming.fit.gaussian import gaussian_group, mean_variable, names, scale
from pymc.variational._streaming.fit.newton import (
    Probe,
    disorder,
    is_dense,
    lower_bound,
    newton_step,
)
from pymc.variational._streaming.fit.report import FitReport, StreamRows
from pymc.variational._streaming.guards import depends_on, total_size_of
from pymc.variational.minibatch_rv import get_scaling
from pymc.variational.opvi import Approximation, Group

if TYPE_CHECKING:
    from pymc.variational.streaming import StreamingDataset

__all__ = ["check_fit"]

_BLOCK_ROWS = 8192
"""Small batches are joined up to this, beside which a call of a function costs little."""

_BLOCK_VALUES = 2**20
"""And up to this where rows are wide, to bound the memory of a block."""

_MIN_BLOCKS = 256
"""Fewer blocks would blur where in the stream the gradient changes."""

_PAIRS = 8
_PRIOR_PAIRS = 128
"""Priors of hierarchical models are far from quadratic, and cost nothing beside the rows."""

_MOST_TIMES = 10
"""Times the declared rows; a source that gives more has no end."""

LogDensity = Callable[..., tuple[np.ndarray, np.ndarray]]


def check_fit(
    approx: Approximation,
    ds: "StreamingDataset | Sequence[StreamingDataset]",
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
        What :func:`pymc.fit` returned.
    ds : StreamingDataset or sequence of StreamingDataset
        The stream, or all streams, that the model observes. Buffer and position are left
        alone, and any batch may be in the buffer.
    seed : int, default 0
        Of the draws.
    progressbar : bool, default True

    Returns
    -------
    FitReport
        Prints as a verdict; ``report.apply(approx)`` corrects a fit that is nearly right.

    Raises
    ------
    StreamError
        If the stream enters the model otherwise than through likelihoods of its rows, if not
        all rows of the model are there, because another stream was not passed or
        :func:`pymc.Minibatch` draws some, if the model takes no other number of rows than that
        of a batch, or if the log density is not finite.
    TypeError
        If *approx* is not a mean-field or full-rank Gaussian, or *ds* not a StreamingDataset.

    Notes
    -----
    The means' errors come from the Hessian of the log density, estimated with as many pairs of
    draws as there are parameters, 8 at least. Beyond 64 parameters of a mean-field
    approximation, 64 pairs estimate its diagonal only, which serves where correlations are
    weak. The former is exact where the log density is quadratic.

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
    streams = list(ds) if isinstance(ds, Sequence) else [ds]
    for stream in streams:
        if not hasattr(stream, "as_tensor"):
            raise TypeError(
                f"ds={type(stream).__name__}(...) is not a StreamingDataset; pass the one that "
                "was fitted"
            )
    group = gaussian_group(approx)
    rest, likelihoods = _split_density(group, streams)
    probe, prior = _probes(group, seed)
    prior.add(rest)
    _refuse_infinite(prior, "of what does not depend on the stream")
    with CustomProgress(
        console=Console(theme=default_progress_theme), disable=not progressbar
    ) as progress:
        task = progress.add_task("Checking", total=sum(s.total_size or 0 for s in streams) or None)
        passes = [
            _pass_over(likelihood, probe, lambda n: progress.update(task, advance=n))
            for likelihood in likelihoods
        ]
    _refuse_infinite(probe, "of the stream's rows")
    return _report(group, [probe, prior], passes)


@dataclass(frozen=True, slots=True)
class _Likelihood:
    """The log-likelihood of one stream."""

    stream: "StreamingDataset"
    density: LogDensity
    """From parameters and rows to the sum over rows, not scaled, and its gradient."""
    total_size: int | None
    """Rows that the model scales it to."""


@dataclass(frozen=True, slots=True)
class _Pass:
    """One pass over a stream."""

    counted: StreamRows
    gradients: Bins
    """Gradient per row of consecutive blocks."""
    noise: np.ndarray
    """Variance of the gradient that one batch, scaled to all rows, gives."""
    moved: bool
    """Whether the stream has gone beyond its first batch."""


def _split_density(
    group: Group, streams: Sequence["StreamingDataset"]
) -> tuple[LogDensity, list[_Likelihood]]:
    """Compile the log density as likelihoods of the streams and all the rest."""
    model = group.model
    variables = [*model.free_RVs, *model.observed_RVs, *model.potentials]
    factors = dict(zip(variables, model.logp(variables, sum=False)))
    for v, factor in factors.items():
        _refuse_random(v, factor)
    split = []
    for stream in streams:
        observed = [v for v in factors if depends_on(model, v, stream.as_tensor())]
        _refuse_other_uses(model, observed, streams, stream)
        terms = [factors.pop(v).sum() / _scaling(model, v) for v in observed]
        split.append(
            _Likelihood(
                stream,
                _compile_density(group, terms, stream.as_tensor()),
                _declared_size(observed, stream),
            )
        )
    for v, factor in factors.items():
        _refuse_streams(v, factor)
    return _compile_density(group, [factor.sum() for factor in factors.values()]), split


def _refuse_other_uses(
    model: Model,
    variables: Sequence[Variable],
    streams: Sequence["StreamingDataset"],
    stream: "StreamingDataset",
) -> None:
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


def _refuse_random(v: Variable, factor: Variable) -> None:
    """Refuse a factor that another call would draw anew."""
    if any(isinstance(a.type, RandomType) for a in ancestors([factor])):
        raise StreamError(
            f"{v.name!r} depends on random draws, as those of pm.Minibatch, but check_fit needs "
            "all rows of every likelihood; observe them through a StreamingDataset, which takes "
            "arrays too"
        )


def _refuse_streams(v: Variable, factor: Variable) -> None:
    """Refuse a factor of a stream that was not passed, whose buffer holds one batch or none."""
    for a in ancestors([factor]):
        if hasattr(a.tag, "fit_callback"):
            raise StreamError(
                f"{v.name!r} depends on the stream {a.name!r}, which was not passed; pass all "
                "streams that the model uses"
            )


def _scaling(model: Model, rv: Variable) -> Variable | float:
    if not total_size_of(rv):
        return 1.0
    return get_scaling(rv.owner.inputs[1:], model.rvs_to_values[rv].shape)


def _declared_size(observed: Sequence[Variable], stream: "StreamingDataset") -> int | None:
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


def _pass_over(likelihood: _Likelihood, probe: Probe, advance: Callable[[int], None]) -> _Pass:
    stream = likelihood.stream
    gradients = Bins(len(probe.gradient))
    n_rows = block_rows = 0
    for rows in _blocks(stream):
        gradient = _add_rows(probe, likelihood, rows)
        block_rows = block_rows or len(rows)
        if len(rows) == block_rows:
            gradients.add(gradient / len(rows))
        n_rows += len(rows)
        _refuse_endless(stream, n_rows)
        advance(len(rows))
    whole = merged(gradients.after(0))
    per_row = whole.squares / max(1, whole.n - 1) * block_rows
    return _Pass(
        StreamRows(str(stream.as_tensor().name), n_rows, likelihood.total_size),
        gradients,
        per_row * n_rows**2 / stream.batch_size,
        stream.rows_seen > 0,
    )


def _refuse_endless(stream: "StreamingDataset", n_rows: int) -> None:
    declared = stream.total_size
    if declared and n_rows > _MOST_TIMES * declared + max(_BLOCK_ROWS, stream.batch_size):
        raise StreamError(
            f"the stream {stream.as_tensor().name!r} has total_size={declared} but gave {n_rows} "
            "rows and has not ended; pass the number of rows, and a source that ends after an epoch"
        )


def _add_rows(probe: Probe, likelihood: _Likelihood, rows: np.ndarray) -> np.ndarray:
    try:
        return probe.add(lambda theta: likelihood.density(theta, rows))
    except (AssertionError, TypeError, ValueError) as error:
        buffer, batch_size = likelihood.stream.as_tensor(), likelihood.stream.batch_size
        if len(rows) == batch_size:
            raise
        raise StreamError(
            f"the likelihood of {buffer.name!r} fails with {len(rows)} rows; check_fit needs a "
            f"model of any number of rows, not of the {batch_size} of a batch only: take lengths "
            "and coordinates from as_tensor().shape[0]"
        ) from error


def _blocks(stream: "StreamingDataset") -> Iterator[np.ndarray]:
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


def _probes(group: Group, seed: int) -> tuple[Probe, Probe]:
    """Return the draws for the stream, and those for the rest, which cost much less each."""
    mean = np.asarray(mean_variable(group).get_value(), "float64")
    rng = np.random.default_rng(seed)
    return (
        Probe(mean, scale(group), pairs=_PAIRS, rng=rng),
        Probe(mean, scale(group), pairs=_PRIOR_PAIRS, rng=rng),
    )


def _report(group: Group, probes: Sequence[Probe], passes: Sequence[_Pass]) -> FitReport:
    mean, scales = np.asarray(mean_variable(group).get_value(), "float64"), scale(group)
    optimum = newton_step(mean, scales, probes)
    elbo, elbo_error = lower_bound(scales, probes)
    noise = np.sqrt(np.sum([p.noise for p in passes], axis=0))
    gradient = np.sum([probe.gradient for probe in probes], axis=0)
    clarity = np.abs(gradient[noise > 0]) / noise[noise > 0]
    drifts = [drift for p in passes if (drift := disorder(p.gradients)) is not None]
    return FitReport(
        names=names(group),
        z=optimum.z,
        s=optimum.s,
        elbo=elbo,
        elbo_error=elbo_error,
        streams=tuple(p.counted for p in passes),
        clarity=float(clarity.max()) if clarity.size else np.inf,
        disorder=max(drifts, default=None),
        moved=all(p.moved for p in passes),
        whole_hessian=is_dense(scales),
        optimum=optimum,
    )
