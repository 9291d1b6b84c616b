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

from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from scipy.sparse import issparse
from scipy.stats import f as f_distribution

from pymc.variational._streaming.dataset import StreamingDataset
from pymc.variational._streaming.fit.density import Density, Part, Term, add_up, sum_over_rows
from pymc.variational._streaming.fit.gaussian import (
    as_streams,
    gaussian_group,
    marginal_sd,
    mean,
    names,
    polished,
    refuse_endless,
    scale,
)
from pymc.variational._streaming.fit.mean_field import moment_draws
from pymc.variational._streaming.fit.newton import Optimum, Rows, find_optimum, is_dense
from pymc.variational._streaming.fit.report import GO_ON, POLISH, FitReport, StreamRows
from pymc.variational._streaming.fit.ridge import Target
from pymc.variational._streaming.fit.sample import Corrected, Sample, expected_of_rows
from pymc.variational._streaming.fit.trust_region import RELATIVE_STEP, Function
from pymc.variational._streaming.utils import positive_int, progress_bar
from pymc.variational.opvi import Approximation, Group

__all__ = ["check_fit", "measure"]

_SAMPLE_VALUES = 2**23
"""Values of rows up to which a sample is held in memory."""

_MIN_BLOCKS = 256
"""Blocks into which few rows are cut, so that the variance among blocks is known."""

_FALSE_ALARM = 1e-6
"""Probability at which rows in random order are taken for ordered ones."""

_MIN_RATIO = 5.0
"""Variance ratio below which an order of the rows is not worth a word."""


def check_fit(
    approx: Approximation,
    ds: StreamingDataset | Sequence[StreamingDataset],
    *,
    rows: int | None = None,
    executor: Executor | None = None,
    seed: int = 0,
    progressbar: bool = True,
) -> FitReport:
    """Compare a fit with what all rows of its stream say, in one pass over them.

    Where a Gaussian approximation is optimal, the gradient of the log density vanishes on
    average over it, and its curvature matches the scales. The gradient comes from all rows, each
    counted once, and the curvature from a sample of them.

    Parameters
    ----------
    approx : MeanField or FullRank
        Approximation that :func:`pymc.fit` returned.
    ds : StreamingDataset or sequence of StreamingDataset
        The stream, or all streams, that the model observes. Buffer and position are left
        alone, and any batch may be in the buffer.
    rows : int, optional
        Number of rows of each stream to read, for a quick look with an error. Default: all. A
        stream without end needs it.
    executor : concurrent.futures.Executor, optional
        Reads parts of the source: threads, processes, or a cluster, such as Dask's
        ``client.get_executor(pure=False)``. The numbers do not depend on it. Sources that can only
        be read from their beginning are read here. Default: this process.
    seed : int, default 0
        Seed of the draws.
    progressbar : bool, default True
        Whether a progress bar is shown.

    Returns
    -------
    FitReport
        Report that prints as a verdict and one next step.

    Raises
    ------
    StreamError
        If the stream enters the model otherwise than through likelihoods of its rows; if another
        stream was not passed, or :func:`pymc.Minibatch` draws rows; if a stream has no end and
        *rows* is None; or if the log density is not finite.
    TypeError
        If *approx* is not a mean-field or full-rank Gaussian, or *ds* not a StreamingDataset.

    Notes
    -----
    The expected log density and its Hessian come from antithetic pairs of draws, as many as there
    are parameters, 8 at least. They are exact where the log density is quadratic. Beyond 512
    parameters of a mean-field approximation, products of the Hessian with vectors take its
    place. Parameters of which the sample has few rows, such as the effects of
    rare levels, get their second derivatives from another pass over all rows.

    The posterior's standard deviations are those of linear response: of the inverse of the
    expected Hessian. Those of a fit that :func:`polish` left, and that is as it was, keep what that
    found beyond the nearest Gaussian, such as the tails or a curved path, and the verdict what it
    found doubtful.

    *Cost*: a gradient of every row, and the sample. *Memory*: 64 MB of rows, and 100 vectors of
    the parameters, or matrices where the whole Hessian is estimated.

    References
    ----------
    Giordano, R., Broderick, T. & Jordan, M. I. (2018). Covariances, robustness, and variational
    Bayes. Journal of Machine Learning Research 19(51), 1-49.

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
    ...         200,
    ...         callbacks=[ds.fit_callback()],
    ...         obj_optimizer=pm.adam(learning_rate=0.05),
    ...         progressbar=False,
    ...     )
    >>> check_fit(approx, ds, progressbar=False).verdict
    'not converged'
    """
    streams = as_streams(ds)
    if rows is None:
        refuse_endless(streams, "check_fit", "pass rows=, the number of rows to look at")
    group = gaussian_group(approx)
    if rows is not None:
        rows = positive_int("rows", rows)
    known = polished(group)
    report = measure(
        group,
        Density(group, streams),
        (scale(group).T / known.widening).T,
        rows=rows,
        target=known.target,
        remedy=GO_ON if any(stream._endless for stream in streams) else POLISH,
        executor=executor,
        seed=seed,
        progressbar=progressbar,
    )
    return replace(report, sd=report.sd * known.widening, found=known.found)


@np.errstate(over="ignore", invalid="ignore")
def measure(
    group: Group,
    density: Density,
    scales: np.ndarray,
    *,
    rows: int | None = None,
    target: Target | None = None,
    sample: Sample | None = None,
    shared: Sequence[int] = (),
    remedy: str = POLISH,
    executor: Executor | None,
    seed: int,
    progressbar: bool,
) -> FitReport:
    """Compare the Gaussian with the mean of *group*, and these scales, with all rows.

    The curvature near the mean is that of a *sample*, or of one that is drawn, and what is measured
    is the Gaussian of a *target* in its coordinates, with its sample if it has one.
    Of many parameters, the *shared* ones get exact standard deviations. The *remedy* is what to do
    where the Gaussian is off.
    """
    at, rng = mean(group), np.random.default_rng(seed)
    prior: Function = density.prior.value_and_gradient
    n_known = sum(min(stream.total_size or 0, rows or math.inf) for stream in density.streams)
    with progress_bar("Checking", int(n_known) or None, show=progressbar) as advance:
        read = partial(_read_all, density, rows=rows, executor=executor, advance=advance)
        given = target.density if target else None
        n_kept = 0 if given or sample else _sample_size(density.streams, scales)
        passes = read(partial(_score, x=at), keep=n_kept, min_blocks=_MIN_BLOCKS)
        if given:
            sample, error = given.sample, 0.0
            addends, factors = given.difference, 1.0
        else:
            sample = sample or _sample(density, passes)
            error = sample.relative_error
            sd = marginal_sd(scales)
            addends, factors = _correction(sample, passes, at, sd, shared, read, rng)
    value = sum(part.weight * part.sums[0] for part in passes)
    gradient = sum(part.weight * part.sums[1] for part in passes)
    corrected = Corrected(sample, at, value, gradient, addends, factors)
    gradient = gradient + prior(at)[1]
    likelihood: Function = corrected.likelihood
    if target is not None:
        target = target._replace(density=corrected)
        at, scales = target.mean, np.linalg.cholesky(target.covariance)
        likelihood, prior = target.likelihood, target.prior
    optimum = find_optimum(at, scales, Rows(likelihood, prior, sample.n_rows, error, shared), rng)
    if issparse(addends) and optimum.precisions[0] <= 0:
        # Columns of all rows beside those of a sample need not make a precision.
        diagonal = addends.diagonal()
        plain = Corrected(sample, at, value, gradient - prior(at)[1], diagonal, factors)
        rows_of_sample = Rows(plain.likelihood, prior, sample.n_rows, error, shared)
        optimum = find_optimum(at, scales, rows_of_sample, rng)
    if not (np.isfinite(optimum.step).all() and np.isfinite(optimum.elbo)):
        raise density.not_finite(remedy)
    if target is not None:
        optimum = optimum._replace(principal_s=optimum.s)
    report = _report(group, density, scales, passes, gradient, optimum)
    return replace(report, remedy=remedy)


def _report(
    group: Group,
    density: Density,
    scales: np.ndarray,
    passes: Sequence["_Pass"],
    gradient: np.ndarray,
    optimum: Optimum,
) -> FitReport:
    sd = marginal_sd(scales) if np.isnan(optimum.sd).any() else optimum.sd
    return FitReport(
        names=names(group),
        z=-optimum.step / sd,
        s=optimum.s,
        sd=optimum.sd,
        family_sd=marginal_sd(scale(group)),
        z_error=max(part.step_error(optimum) for part in passes),
        elbo=optimum.elbo,
        elbo_error=math.hypot(optimum.elbo_error, *(part.value_error() for part in passes)),
        streams=tuple(
            StreamRows(part.name, part.n_rows, size, part.unread == 0)
            for part, size in zip(passes, density.total_sizes)
        ),
        signal_to_noise=_signal_to_noise(gradient, passes),
        between_within_ratio=max(part.between_within_ratio() for part in passes) or None,
        moved=all(stream.rows_seen > 0 for stream in density.streams),
        group=group,
        start=mean(group),
        optimum=optimum,
    )


class _Pass:
    """Sums over what has been read of a stream: value, gradient, and its squares by block."""

    def __init__(self, stream: StreamingDataset, parts: Sequence[Part], rows: int | None):
        self.name, self.batch_size = str(stream.as_tensor().name), stream.batch_size
        self.parts = list(parts)
        self.sums = add_up(part.sums for part in parts)
        self.n_rows = sum(part.n_rows for part in parts)
        self.n_blocks = sum(part.n_blocks for part in parts)
        self.total = self.n_rows
        """Number of rows that the stream has, or stands for if it has no end."""
        if stream._endless:
            self.total = stream.total_size or self.n_rows
        elif rows is not None and self.n_rows >= rows:
            self.total = max(rows, stream._source.n_rows or stream.total_size or rows)
        self.weight = self.total / self.n_rows
        self.unread = 1.0 if stream._endless else 1 - self.n_rows / self.total
        """Share of the rows that were not read."""

    def row_variances(self) -> tuple[float, np.ndarray]:
        """Return the variances of value and gradient of a row, by the scatter of blocks."""
        sums, squares = self.sums[:2], self.sums[2:]
        value, gradient = (
            np.maximum(square - total**2 / self.n_rows, 0) / max(1, self.n_blocks - 1)
            for total, square in zip(sums, squares)
        )
        return value, gradient

    def value_error(self) -> float:
        """Return the error of the log-likelihood where not all rows were read."""
        variance = self.row_variances()[0]
        return self.total * math.sqrt(variance / self.n_rows * self.unread)

    def step_error(self, optimum: Optimum) -> float:
        """Return the error of the means, in posterior sd, where not all rows were read."""
        if self.unread == 0:
            return 0.0
        steps = [optimum.solve(self.total / p.n_rows * p.sums[1]) for p in self.parts]
        variance = np.var(steps, axis=0, ddof=1) / len(steps) * self.unread
        return float(np.sqrt(variance / optimum.sd**2).max())

    def between_within_ratio(self) -> float:
        """Return the variance of the gradient between parts over that within them, at most.

        It is about 1 for rows in random order, and 0 is returned if such rows would reach it by
        chance.
        """
        _, gradient, _, squares = self.sums
        by_part = sum(part.sums[1] ** 2 / part.n_rows for part in self.parts)
        between = len(self.parts) - 1
        within = self.n_blocks - len(self.parts)
        if min(between, within) < 7:
            return 0.0
        with np.errstate(all="ignore"):
            ratio = (by_part - gradient**2 / self.n_rows) / between
            ratio = float(np.nan_to_num(ratio / ((squares - by_part) / within)).max())
        chance = f_distribution.sf(ratio, between, within) * len(gradient)
        return ratio if ratio > _MIN_RATIO and chance < _FALSE_ALARM else 0.0


def _signal_to_noise(gradient: np.ndarray, passes: Sequence[_Pass]) -> float:
    """Return the gradient of all rows beside the scatter of that of a batch, at most."""
    variances = (p.total**2 * p.row_variances()[1] / p.batch_size for p in passes)
    noise = np.sqrt(sum(variances))
    known = noise > 0
    return float((np.abs(gradient[known]) / noise[known]).max()) if known.any() else np.inf


def _read_all(
    density: Density, function: Callable[..., Any], rows: int | None, **kwargs: Any
) -> list[_Pass]:
    """Return what one pass over all streams gives."""
    parts = sum_over_rows(density, function, rows=rows, **kwargs)
    return [
        _Pass(stream, [part for part in parts if part.stream == i], rows)
        for i, stream in enumerate(density.streams)
    ]


def _score(term: Term, rows: np.ndarray, x: np.ndarray) -> tuple[Any, ...]:
    value, gradient = term.value_and_gradient(x, rows)
    return value, gradient, value**2 / len(rows), gradient**2 / len(rows)


def _sample_size(streams: Sequence[StreamingDataset], scales: np.ndarray) -> int:
    """Return a number of rows that fits memory and costs less than a pass over millions."""
    size = len(scales)
    values = max(math.prod(stream.sample_shape) for stream in streams)
    wanted = max(2**15, 16 * size)
    if is_dense(scales):  # a pair of draws for each parameter
        affordable = min(2**21 // (size * values), 2**15)
        wanted = max(affordable, min(64 * size, 2**13), 16 * size)
    return min(wanted, _SAMPLE_VALUES // values)


def _sample(density: Density, passes: Sequence[_Pass]) -> Sample:
    rows = [np.concatenate([part.first_rows for part in each.parts]) for each in passes]
    return Sample(density, rows, [each.total for each in passes])


def _correction(
    sample: Sample,
    passes: Sequence[_Pass],
    x: np.ndarray,
    sd: np.ndarray,
    shared: Sequence[int],
    read: Callable[..., list[_Pass]],
    rng: np.random.Generator,
) -> tuple[Any, Any]:
    """Return addends and factors that make second derivatives at *x* those of all rows.

    Those of parameters of which the sample has few rows are corrected, and those of the *shared*
    ones with all others: the noise of a sample in them adds up over many parameters. Only if there
    are such, all rows are read again.
    """
    few = [rare & (part.sums[3] > 0) for rare, part in zip(sample.is_rare(x), passes)]
    chosen, places = np.any(few, axis=0), list(shared) if sample.relative_error else []
    chosen[places] = True
    if not chosen.any():
        return np.zeros(len(x)), 1.0
    scales = np.where(chosen, RELATIVE_STEP * sd, 0)
    draws = moment_draws(len(x), 1, rng, places)
    ask = partial(expected_of_rows, draws=draws, mean=x, scales=scales, places=places)
    rows = add_up([part.weight * total for total in part.sums] for part in read(ask))
    return sample.correction(draws, x, scales, places, rows)
