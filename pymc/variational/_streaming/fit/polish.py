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

import math
import time

from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from functools import partial

import numpy as np

from pymc.variational._streaming.dataset import StreamingDataset
from pymc.variational._streaming.fit.check import check_fit
from pymc.variational._streaming.fit.density import Density, Term, add_up, sum_over_rows
from pymc.variational._streaming.fit.gaussian import (
    as_streams,
    gaussian_group,
    mean,
    scale,
    set_mean,
    set_scale,
)
from pymc.variational._streaming.fit.gaussian_fit import best_gaussian, best_scales, normal_draws
from pymc.variational._streaming.fit.report import FitReport
from pymc.variational._streaming.fit.sample import Sample, random_rows
from pymc.variational._streaming.fit.trust_region import Optimum, Pattern, maximize
from pymc.variational._streaming.utils import progress_bar
from pymc.variational.opvi import Approximation

__all__ = ["polish"]

_SIZES = (4_096, 32_768, 262_144)
"""Rows of the samples, each of which starts from the optimum of the one before."""

_DRAW_ROWS = 65_536
"""Rows at which likelihoods are evaluated for draws of the approximation."""

_PRIOR_PAIRS = 128
"""Least number of pairs of draws for what does not depend on rows."""

_COMPARED_PAIRS = 4
"""Pairs of draws at which the fit before and after are compared on all rows."""


def polish(
    approx: Approximation,
    ds: StreamingDataset | Sequence[StreamingDataset],
    *,
    tolerance: float = 0.05,
    max_passes: int = 50,
    seed: int = 0,
    executor: Executor | None = None,
    progressbar: bool = True,
) -> FitReport:
    """Finish a fit, or make one, by Newton steps on all rows of its stream."""
    started = time.perf_counter()
    streams, group = as_streams(ds), gaussian_group(approx)
    density = Density(group, streams)
    before = mean(group), scale(group)
    with progress_bar("Polishing", show=progressbar) as advance:
        run = _Run(density, executor, advance, max_passes)
        optimum, sample = _find_optimum(run, before[0], tolerance, np.random.default_rng(seed))
        after, stopped = _fit_gaussian(run, optimum, sample, before[1].ndim, seed)
        if run.is_better(after, before):
            set_mean(group, after[0])
            set_scale(group, after[1])
        else:
            stopped = "took back"
    report = check_fit(approx, ds, seed=seed, progressbar=progressbar)
    return report


class _Run:
    """Functions of all rows, and the number of passes that they have made."""

    def __init__(self, density: Density, executor, advance, max_passes: int):
        self.density, self._executor, self._advance = density, executor, advance
        self.max_passes = max_passes
        self.passes = 0

    def value_and_gradient(self, x: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = self._sum(partial(_value_and_gradient, x=x))
        prior, prior_gradient = self.density.prior.value_and_gradient(x)
        return value + prior, gradient + prior_gradient

    def hessian(self, pattern: Pattern, x: np.ndarray, steps: np.ndarray) -> np.ndarray:
        [columns] = self._sum(partial(_differences, x=x, steps=steps, pattern=pattern))
        whole = Pattern.dense(len(x))
        prior = whole.differences(lambda y: self.density.prior.value_and_gradient(y)[1], x, steps)
        return pattern.assemble(columns, steps) + whole.assemble(prior, steps)

    def is_better(self, after, before) -> bool:
        size = len(after[0])
        rng = np.random.default_rng(1)
        draws = (
            normal_draws(size, _COMPARED_PAIRS, rng)[:_COMPARED_PAIRS]
            if size < 500
            else rng.choice([-1.0, 1.0], (_COMPARED_PAIRS, size))
        )
        points = [
            mu + _times(s, sign * e) for mu, s in (after, before) for e in draws for sign in (1, -1)
        ]
        [values] = self._sum(partial(_values, points=points))
        values = values + [self.density.prior.value_and_gradient(x)[0] for x in points]
        entropies = [np.log(np.diag(s) if s.ndim == 2 else s).sum() for _, s in (after, before)]
        a, b = values.reshape(2, len(draws), 2).mean(axis=2) + np.array(entropies)[:, None]
        gain = a - b
        gain = gain[np.isfinite(gain)]
        error = gain.std() / math.sqrt(max(1, len(gain)))
        return np.isfinite(a).all() and (not len(gain) or gain.mean() > -2 * error - 1e-3)

    def _sum(self, function):
        self.passes += 1
        return add_up(
            sum_over_rows(self.density, function, executor=self._executor, advance=self._advance)
        )


def _times(s, e):
    return s @ e if s.ndim == 2 else s * e


def _value_and_gradient(term: Term, rows: np.ndarray, x: np.ndarray):
    return term.value_and_gradient(x, rows)


def _differences(term: Term, rows, x, steps, pattern: Pattern):
    return (pattern.differences(lambda y: term.value_and_gradient(y, rows)[1], x, steps),)


def _values(term: Term, rows, points):
    return (np.array([term.value_and_gradient(x, rows)[0] for x in points]),)


def _find_optimum(run: _Run, x, tolerance, rng) -> tuple[Optimum, Sample]:
    rows = [random_rows(stream, _SIZES[-1], rng) for stream in run.density.streams]
    x, pattern = x + 1e-3 * rng.normal(size=len(x)), Pattern.dense(len(x))
    for size in _SIZES:
        sample = Sample(run.density, [part[:size] for part in rows])
        optimum = maximize(
            sample.value_and_gradient,
            partial(sample.hessian, pattern),
            x,
            tolerance=tolerance * sample.inflation,
        )
        if sample.is_whole:
            return optimum, sample
        x = optimum.x
        if size > _SIZES[0]:
            pattern = Pattern(sample.likelihood_hessian(pattern, x, 0.03 * optimum.curvature.scale))
    optimum = maximize(
        run.value_and_gradient,
        partial(run.hessian, pattern),
        x,
        tolerance=tolerance,
        max_steps=run.max_passes,
        steps=0.03 * optimum.curvature.scale,
    )
    return optimum, sample


def _fit_gaussian(run, optimum, sample, ndim, seed):
    if not optimum.curvature.is_concave:
        return (optimum.x, None), "no optimum"
    rng = np.random.default_rng(seed)
    size = len(optimum.x)
    few = Sample(run.density, [part[:_DRAW_ROWS] for part in sample.rows])
    parts = [
        (few.around(optimum), normal_draws(size, max(8, size), rng)),
        (
            run.density.prior.value_and_gradient,
            normal_draws(size, max(_PRIOR_PAIRS, 8 * size), rng),
        ),
    ]
    q = best_gaussian(parts, optimum.x, optimum.curvature.covariance())
    if ndim == 2:
        return (q.mean, np.linalg.cholesky(q.covariance)), "converged"
    scales = 1 / np.sqrt(np.diag(np.linalg.inv(q.covariance)))
    return (q.mean, best_scales(parts, q.mean, scales)[0]), "converged"
