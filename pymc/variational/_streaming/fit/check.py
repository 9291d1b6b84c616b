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

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import batched
from typing import NamedTuple

import numpy as np
import pytensor.tensor as pt

from pytensor.compile.sharedvalue import SharedVariable
from pytensor.graph.basic import Variable
from pytensor.graph.traversal import ancestors
from pytensor.tensor.random.type import RandomType

from pymc.model.core import Model
from pymc.pytensorf import compile, join_nonshared_inputs
from pymc.variational._streaming.dataset import StreamingDataset
from pymc.variational._streaming.errors import StreamError
from pymc.variational._streaming.fit.bins import Bins, merge
from pymc.variational._streaming.fit.gaussian import as_streams, gaussian_group, mean, names, scale
from pymc.variational._streaming.fit.newton import (
    Probe,
    between_within_ratio,
    lower_bound,
    newton_step,
)
from pymc.variational._streaming.fit.report import FitReport, StreamRows
from pymc.variational._streaming.guards import depends_on, total_size_of
from pymc.variational._streaming.utils import progress_bar
from pymc.variational.minibatch_rv import get_scaling
from pymc.variational.opvi import Approximation, Group

__all__ = ["check_fit"]

_BLOCK_VALUES = 2**16
"""Small batches are joined up to this: calls then cost little, and a block little memory."""

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
"""Function from rows, if any, and parameters to a log density and its gradient."""


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
        stream was not passed, or :func:`pymc.Minibatch` draws rows; or if the log density is not
        finite.
    TypeError
        If *approx* is not a mean-field or full-rank Gaussian, or *ds* not a StreamingDataset.

    Notes
    -----
    The errors of the means come from the Hessian of the log density, estimated with as many pairs
    of draws as there are parameters, 8 at least; they are exact where the log density is
    quadratic. Beyond 64 parameters of a mean-field approximation, 64 pairs estimate its diagonal
    only, which serves where correlations are weak.

    *Cost*: a gradient of every row at each draw, 16 for up to 8 parameters. *Memory*: a few
    vectors of the parameters, or matrices where the Hessian is estimated, and a block of rows.

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
    likelihoods, rest = _split_density(group, streams)
    rng = np.random.default_rng(seed)
    probe = Probe(mean(group), scale(group), pairs=_PAIRS, rng=rng)
    prior = Probe(mean(group), scale(group), pairs=_PRIOR_PAIRS, rng=rng)
    prior.add(rest)
    n_rows = sum(stream.total_size or 0 for stream in streams)
    with progress_bar("Checking", n_rows or None, show=progressbar) as advance:
        passes = [_read(*part, probe, advance) for part in zip(streams, likelihoods)]
    return _report(group, [probe, prior], passes, moved=all(s.rows_seen > 0 for s in streams))


class _Likelihood(NamedTuple):
    """The log-likelihood of a stream's rows, and the number of rows to which it is scaled."""

    density: LogDensity
    total_size: int | None


class _Pass(NamedTuple):
    """What one pass over the rows of a stream has given, besides their sums."""

    counted: StreamRows
    batch_variance: np.ndarray
    """Variance of the gradient that one batch, scaled to all rows, gives."""
    between_within_ratio: float
    """Variance of the gradient between parts of the stream over that within them."""


def _split_density(
    group: Group, streams: Sequence[StreamingDataset]
) -> tuple[list[_Likelihood], LogDensity]:
    """Compile the log density as likelihoods of the streams and all the rest."""
    model = group.model
    variables = [*model.free_RVs, *model.observed_RVs, *model.potentials]
    factors = dict(zip(variables, model.logp(variables, sum=False)))
    _refuse_other_uses(model, factors, streams)
    likelihoods = []
    for stream in streams:
        buffer = stream.as_tensor()
        observed = [v for v in factors if depends_on(model, v, buffer)]
        if not observed:
            raise StreamError(
                f"no observed variable of approx.model depends on the stream {buffer.name!r}; "
                "pass the stream that was fitted"
            )
        terms = [factors.pop(v).sum() / _scaling(model, v) for v in observed]
        sizes = {next(iter(total_size_of(rv)), None) for rv in observed}
        total_size = (sizes - {stream.total_size} or sizes).pop()
        density = _compile_density(group, terms, buffer)
        likelihoods.append(_Likelihood(density, total_size))
    return likelihoods, _compile_density(group, [factor.sum() for factor in factors.values()])


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


def _scaling(model: Model, rv: Variable) -> Variable | float:
    if not total_size_of(rv):
        return 1.0
    return get_scaling(rv.owner.inputs[1:], model.rvs_to_values[rv].shape)


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
        inputs = [rows, flat]
        givens = {
            v: rows for v in ancestors([total]) if getattr(v, "container", None) is buffer.container
        }
    gradient = pt.grad(total, flat, disconnected_inputs="ignore")
    return compile(
        inputs,
        [total, gradient],
        givens=givens,
        on_unused_input="ignore",
        allow_input_downcast=True,
    )


def _read(
    stream: StreamingDataset,
    likelihood: _Likelihood,
    probe: Probe,
    advance: Callable[[int], None],
) -> _Pass:
    """Add all rows of a stream to *probe*, in one pass."""
    name = str(stream.as_tensor().name)
    gradients = Bins()
    n_rows = block_rows = 0
    for rows in _blocks(stream):
        try:
            gradient = probe.add(partial(likelihood.density, rows))
        except (AssertionError, TypeError, ValueError) as error:
            error.add_note(
                f"check_fit evaluates the likelihood of {name!r} with any number of rows, here "
                f"{len(rows)}; take lengths and coordinates from as_tensor().shape[0]"
            )
            raise
        block_rows = block_rows or len(rows)
        # Blocks are compared with each other, which a shorter last one would blur.
        if len(rows) == block_rows:
            gradients.add(gradient / len(rows))
        n_rows += len(rows)
        advance(len(rows))
    whole = merge(gradients.parts)
    per_row = whole.squares / max(1, whole.n - 1) * block_rows
    return _Pass(
        counted=StreamRows(name, n_rows, likelihood.total_size),
        batch_variance=per_row * n_rows**2 / stream.batch_size,
        between_within_ratio=between_within_ratio(gradients.parts),
    )


def _blocks(stream: StreamingDataset) -> Iterator[np.ndarray]:
    """Yield the batches of an epoch, joined where they are small and many."""
    declared = stream.total_size or 0
    rows = min(_BLOCK_VALUES // math.prod(stream.sample_shape), declared // _MIN_BLOCKS)
    n_rows = 0
    for batches in batched(stream, max(1, rows // stream.batch_size)):
        n_rows += sum(map(len, batches))
        if declared and n_rows > _MOST_TIMES * declared + stream.batch_size:
            raise StreamError(
                f"the stream {stream.as_tensor().name!r} has total_size={declared} but gave "
                f"{n_rows} rows and has not ended; pass the number of rows, and a source that "
                "ends after an epoch"
            )
        yield np.concatenate(batches)


def _report(
    group: Group, probes: Sequence[Probe], passes: Sequence[_Pass], *, moved: bool
) -> FitReport:
    scales = scale(group)
    optimum = newton_step(mean(group), scales, probes)
    elbo, elbo_error = lower_bound(scales, probes)
    noise = np.sqrt(np.sum([part.batch_variance for part in passes], axis=0))
    gradient = np.sum([probe.gradient for probe in probes], axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        signal_to_noise = np.where(noise > 0, np.abs(gradient) / noise, 0).max()
    return FitReport(
        names=names(group),
        z=optimum.z,
        s=optimum.s,
        elbo=elbo,
        elbo_error=elbo_error,
        streams=tuple(part.counted for part in passes),
        clarity=float(signal_to_noise) if noise.any() else np.inf,
        disorder=max(part.between_within_ratio for part in passes) or None,
        moved=moved,
        start=mean(group),
        optimum=optimum,
    )
