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
"""Finish a fit, or make one, by Newton steps on all rows of its stream."""

import itertools
import math
import time

from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from scipy.linalg import hadamard

from pymc.variational._streaming.dataset import StreamingDataset
from pymc.variational._streaming.fit.check import measure
from pymc.variational._streaming.fit.gaussian import (
    Polished,
    as_streams,
    gaussian_group,
    marginal_sd,
    place,
    refuse_endless,
    scale,
)
from pymc.variational._streaming.fit.mean_field import (
    MeanField,
    Part,
    best_mean_field,
    expected,
    moment_draws,
)
from pymc.variational._streaming.fit.moments import fit_moments
from pymc.variational._streaming.fit.newton import MAX_DENSE
from pymc.variational._streaming.fit.report import COMPARE, POLISH_AGAIN, FitReport
from pymc.variational._streaming.fit.sample import Sample
from pymc.variational._streaming.fit.search import (
    SEVERAL_MODES,
    SIZES,
    PassesSpent,
    Search,
    find_mode,
    mirrored,
    note_flat,
)
from pymc.variational._streaming.utils import positive_int, progress_bar
from pymc.variational.opvi import Approximation, Group

__all__ = ["polish"]

_JITTER = 1e-3
"""Size of the first random step, which leaves a point of symmetry."""

_FAR_STARTS = 20
"""Random points that are tried where there is no finite gradient near *approx*."""

_FIRST_SCALE = 0.05
"""Largest scale at which a fit of many parameters begins."""

_DRAWS_OF_SCALES = 32
"""Absolute values of the draws that give scales by the curvature of a whole sample."""

_MAX_CORRECTIONS = 16
"""Passes in which a sample is corrected; a few are enough where it has the curvature."""

_MAX_SHIFT = 0.2
"""Standard deviations by which a posterior that is no Gaussian may move a mean."""

_ROUNDING = 1e-11
"""Relative error of the bound."""


def polish(
    approx: Approximation,
    ds: StreamingDataset | Sequence[StreamingDataset],
    *,
    tolerance: float = 0.05,
    max_passes: int = 200,
    seed: int = 0,
    executor: Executor | None = None,
    progressbar: bool = True,
) -> FitReport:
    """Finish a fit, or make one, by Newton steps on all rows of its stream.

    It finds the maximum of the posterior density on growing samples of the rows and then on all of
    them, and around it the posterior's means, standard deviations and correlations. The
    approximation is changed only for the better.

    Parameters
    ----------
    approx : MeanField or FullRank
        Approximation that :func:`pymc.fit` returned, or a new one, ``pm.MeanField(model=model)``.
        It gets the means; a mean-field one gets the scales that are best for its family, which are
        narrower than the posterior where parameters are correlated, and a full-rank one the
        posterior's covariance.
    ds : StreamingDataset or sequence of StreamingDataset
        The stream, or all streams, that the model observes. Buffer and position are left alone.
    tolerance : float, default 0.05
        Standard deviations of the posterior below which a step ends the search.
    max_passes : int, default 200
        Passes over all rows after which the search ends with the best fit so far.
    seed : int, default 0
        Seed of draws and samples.
    executor : concurrent.futures.Executor, optional
        Where parts of the rows are read, as in :func:`check_fit`. Default: this process.
    progressbar : bool, default True
        Whether a progress bar is shown, with the standard deviations to go.

    Returns
    -------
    FitReport
        Report of :func:`check_fit` on the result, with ``passes``, ``seconds`` and ``notes``.
        ``report.sd`` are the posterior's standard deviations, and ``report.full_rank()`` is an
        approximation with its covariance.

    Raises
    ------
    StreamError
        If the stream enters the model otherwise than through likelihoods of its rows, if another
        stream was not passed, or if a stream was declared endless.
    TypeError
        If *approx* is not a mean-field or full-rank Gaussian, or *ds* not a StreamingDataset.
    KeyboardInterrupt
        If it is interrupted; *approx* then has the best fit so far.

    Notes
    -----
    *Order*: samples are drawn from the whole table, each row with the same chance, unless
    :func:`preshuffle` has shuffled it; and all rows count in the end. So ordered rows do no harm.

    *Cost*: some three passes for the gradient and mostly one for the Hessian, which takes two
    gradients of each row for each parameter, or for each set of parameters without second
    derivatives among them; beyond 512 parameters, 16 or 32 gradients of each row in each of some
    five passes, as long as a sample in memory has many rows for each parameter. *Memory*: a sample
    of up to 32 MB of rows, a block of rows for each part, and matrices of the parameters, or beyond
    512 parameters some hundred vectors.

    The verdict says so where the posterior is not near a Gaussian or does not fall off, or a second
    mode is as high.

    References
    ----------
    Giordano, R., Broderick, T. & Jordan, M. I. (2018). Covariances, robustness, and variational
    Bayes. Journal of Machine Learning Research 19(51), 1-49.

    Giordano, R., Ingram, M. & Broderick, T. (2024). Black box variational inference with a
    deterministic objective: faster, more accurate, and even more black box. Journal of Machine
    Learning Research 25(18), 1-39.

    Opper, M. & Archambeau, C. (2009). The variational Gaussian approximation revisited. Neural
    Computation 21(3), 786-792.

    Rue, H., Martino, S. & Chopin, N. (2009). Approximate Bayesian inference for latent Gaussian
    models by using integrated nested Laplace approximations. Journal of the Royal Statistical
    Society, Series B 71(2), 319-392.

    Shamir, O., Srebro, N. & Zhang, T. (2014). Communication-efficient distributed optimization
    using an approximate Newton-type method. Proceedings of the 31st International Conference on
    Machine Learning, 1000-1008.

    Examples
    --------
    >>> import numpy as np
    >>> import pymc as pm
    >>> from pymc.variational.streaming import StreamingDataset, polish
    >>> rows = np.random.default_rng(0).normal(1.0, 2.0, size=(10_000, 1))
    >>> ds = StreamingDataset(rows, batch_size=100)
    >>> with pm.Model() as model:
    ...     mu = pm.Normal("mu", 0, 10)
    ...     y = pm.Normal("y", mu, 2, observed=ds.as_tensor()[:, 0], total_size=ds.total_size)
    >>> approx = pm.MeanField(model=model)
    >>> report = polish(approx, ds, progressbar=False)
    >>> report.sd.round(3)
    array([0.02])
    """
    started = time.perf_counter()
    streams, group = as_streams(ds), gaussian_group(approx)
    refuse_endless(streams, "polish", "save some of its rows, and fit a StreamingDataset of these")
    quiet = np.errstate(over="ignore", invalid="ignore")
    with progress_bar("Polishing", show=progressbar) as advance, quiet:
        run = Search(
            group,
            streams,
            tolerance=tolerance,
            max_passes=positive_int("max_passes", max_passes),
            rng=np.random.default_rng(seed),
            executor=executor,
            advance=advance,
        )
        remedy = _search(run, group)
        note_flat(run)
        if run.best is not None and run.is_better(run.best):
            place(group, *run.best, run.known())
        else:
            run.covariance = None
            run.notes.append("no better fit was found, and approx is left as it was")
    report = _measured(
        run, group, remedy=remedy, executor=executor, seed=seed, progressbar=progressbar
    )
    shifts = np.abs(report.optimum.shifts)
    if len(shifts) and shifts.max() > _MAX_SHIFT:
        name = run.names[run.shared[int(np.argmax(shifts))]]
        why = f"it moves the mean of {name} by about {shifts.max():.2g} sd"
        run.note_not_gaussian(why, COMPARE)
    return replace(
        report,
        moved=True,
        passes=run.passes + 1,
        seconds=time.perf_counter() - started,
        found=run.found,
        notes=tuple(run.notes),
    )


def _search(run: Search, group: Group) -> str:
    """Find the best fit within the passes that are allowed, and return what to do if it is off."""
    most, remedy = run.max_passes, run.remedy()
    try:
        _find(run)
    except PassesSpent:
        run.notes.append(f"the search was ended by max_passes={most}")
        remedy = POLISH_AGAIN
    except KeyboardInterrupt:
        if run.best is not None:
            after, before = run.sample.values([run.best[0], run.before[0]])
            best = run.before if after < before else run.best
            place(group, *best, Polished(np.ones(run.density.size)))
        raise
    run.max_passes = math.inf
    return remedy


def _find(run: Search) -> None:
    """Find the best fit, and keep it in *run*."""
    jitter = _JITTER * run.rng.normal(size=run.density.size)
    is_dense = len(jitter) <= MAX_DENSE
    run.sample = Sample.draw(run.density, run.rng, SIZES[-1] if is_dense else None)
    x = _finite_start(run, jitter)
    if not is_dense:
        _fit_mean_field(run, x)
        return
    run.mode = mode = find_mode(run, x)
    if not mode.curvature.is_concave:
        worst = int(np.argmax(np.abs(mode.curvature.vectors[:, 0])))
        run.notes.append(f"the log density is not concave where it ends, along {run.names[worst]}")
    elif fit_moments(run, mode):
        return
    run.note_not_gaussian("it has no best Gaussian", run.remedy())
    _fit_few_rows(run, MeanField(mode.x, mode.curvature.scale, np.inf))


def _finite_start(run: Search, jitter: np.ndarray) -> np.ndarray:
    """Return a point near that of *approx* with a finite gradient: large features may need it."""
    few, at = run.sample.first(SIZES[0]), np.nan_to_num(run.before[0])
    near = (share * jitter for share in np.geomspace(1, 1e-12, 13))
    far = (run.rng.normal(size=len(at)) for _ in range(_FAR_STARTS))
    for offset in itertools.chain(near, far):
        if np.isfinite(few.value_and_gradient(at + offset)[1]).all():
            return at + offset
    raise run.density.not_finite(COMPARE)


def _fit_few_rows(run: Search, q: MeanField) -> None:
    """Fit a mean-field Gaussian by samples, where there is nothing better."""
    draws = _signs(len(q.mean), 32, run.rng)
    prior = partial(expected, run.prior, _signs(len(q.mean), 64, run.rng))
    for n_rows in SIZES[:2]:
        parts: list[Any] = [partial(run.sample.first(n_rows).expected, draws), prior]
        q = best_mean_field(parts, q, tolerance=run.tolerance, show=run.show)
    run.keep_independent(q)


def _signs(size: int, pairs: int, rng: np.random.Generator) -> np.ndarray:
    """Return half of antithetic draws of signs, of which up to *pairs* parameters are orthogonal."""
    return hadamard(pairs)[:, rng.permutation(size) % pairs] * rng.choice([-1.0, 1.0], size)


def _fit_mean_field(run: Search, x: np.ndarray) -> None:
    """Fit a mean-field Gaussian of many parameters, on a sample and then on all rows.

    The shared parameters are held at first: the scale of a group's effects would else shrink to
    those of the start.
    """
    draws = moment_draws(len(x), 4, run.rng, run.shared)
    prior = partial(expected, run.prior, moment_draws(len(x), 16, run.rng, run.shared))
    parts: list[Any] = [partial(run.sample.expected, draws), prior]
    q = MeanField(x, np.fmin(marginal_sd(run.before[1]), _FIRST_SCALE), np.inf)
    q = best_mean_field(parts, q, tolerance=1.0, show=run.show, held=run.shared)
    curvature = -sum(part(q.mean, q.scales)[2] for part in parts)  # in units of the scales
    q = q._replace(scales=q.scales / np.sqrt(np.maximum(curvature, 1)))
    inflation = run.sample.inflation
    show = run.keep_independent if inflation == 1 else run.show
    q = best_mean_field(parts, q, tolerance=run.tolerance * inflation, show=show)
    heights = partial(map, lambda x: sum(part(x, q.scales)[0] for part in parts))
    if mirrored(run.names, q.mean, q.scales, heights):
        run.found["several modes"] = SEVERAL_MODES
    if inflation == 1:
        # Correlated parameters whose draws are not orthogonal make noise in the scales.
        draws = moment_draws(len(x), _DRAWS_OF_SCALES, run.rng, run.shared)
        precision = -run.sample.expected(draws, q.mean, q.scales)[2] - prior(q.mean, q.scales)[2]
        run.keep_independent(q._replace(scales=q.scales / np.sqrt(np.clip(precision, 0.25, 4))))
    else:
        q = _fit_by_corrections(run, draws, prior, q)
        if q.distance >= run.tolerance:
            parts[0] = partial(run.expected, draws)
            best_mean_field(parts, q, tolerance=run.tolerance, show=run.keep_independent)


def _fit_by_corrections(run: Search, draws: np.ndarray, prior: Part, q: MeanField) -> MeanField:
    """Fit a mean-field Gaussian to all rows by passes that correct their sample.

    Where this does not end, for lack of rows in the sample, its distance is above the tolerance.
    """
    best = q = q._replace(distance=np.inf)
    bound = -np.inf
    for _ in range(_MAX_CORRECTIONS):
        rows = run.expected(draws, q.mean, q.scales, run.shared)
        last, bound = bound, rows[0] + prior(q.mean, q.scales)[0] + np.log(q.scales).sum()
        if not bound > last - _ROUNDING * abs(bound):
            break
        run.keep_independent(best := q)
        parts = [run.sample.corrected(draws, q, run.shared, rows), prior]
        tolerance = max(run.tolerance, min(1, q.distance / 4))
        new = best_mean_field(parts, q, tolerance=tolerance, show=run.show)
        q = new.measured_from(q)
        if q.distance < run.tolerance:
            run.keep_independent(q)
            return q
    return best


def _measured(run: Search, group: Group, **kwargs: Any) -> FitReport:
    """Check the result, which has the covariance of the posterior if that was found."""
    if run.covariance is None:
        scales, sample = scale(group), None if scale(group).ndim == 2 else run.sample
        return measure(group, run.density, scales, sample=sample, shared=run.shared, **kwargs)
    scales = np.linalg.cholesky(run.covariance)
    report = measure(group, run.density, scales, target=run.target, **kwargs)
    optimum = report.optimum._replace(covariance=run.covariance)
    return replace(report, sd=np.sqrt(np.diag(run.covariance)), optimum=optimum)
