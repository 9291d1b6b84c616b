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
"""The search for the best fit on all rows of a stream."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from pymc.variational._streaming.fit.gaussian import marginal_sd
from pymc.variational._streaming.fit.mean_field import (
    MeanField,
    best_mean_field,
    expected,
    sign_draws,
)
from pymc.variational._streaming.fit.moments import fit_along_path, fit_along_ridge, fit_around
from pymc.variational._streaming.fit.report import Finding
from pymc.variational._streaming.fit.sample import Sample
from pymc.variational._streaming.fit.search import (
    MAX_DENSE,
    NON_CENTRED,
    SIZES,
    Fit,
    Search,
    family,
)
from pymc.variational._streaming.fit.trust_region import RELATIVE_STEP, Mode, Pattern, maximize

__all__ = ["find_fit", "note_flat"]

_OTHER_STARTS = 2
"""Random points from which a second mode is looked for."""

_MODE_GAP = 5.0
"""Log density by which another mode may be lower and still matter."""

_JITTER = 1e-3
"""Size of the first random step, which leaves a point of symmetry."""

_FIRST_SCALE = 0.05
"""Largest scale at which a fit of many parameters begins."""

_SEPARATE = 5.0
"""Standard deviations beyond which two optima are two."""

_FAR = 10.0
"""Standard deviations at which the density of a posterior must have fallen."""

_OPEN = 1e-5
"""Precision of a direction, relative to the largest, from which on it may be open."""

_WIDE = 1e3
"""Distance over which the density does not fall along an open direction."""

_RISE = 5.0
"""Log density by which it has risen there where it has no maximum, as in a funnel."""


def find_fit(run: Search, before: Fit, tolerance: float, rng: np.random.Generator) -> None:
    """Find the best fit, and keep it in *run*."""
    x = before[0] + _JITTER * rng.normal(size=len(before[0]))
    is_dense, is_full = len(x) <= MAX_DENSE, before[1].ndim == 2
    run.sample = Sample.draw(run.density, rng, SIZES[-1] if is_dense else None)
    if not is_dense:
        scales = np.minimum(marginal_sd(before[1]), _FIRST_SCALE)
        _fit_mean_field(run, MeanField(x, scales, np.inf), is_full, tolerance, rng)
        return
    mode = _find_mode(run, x, is_full, tolerance, rng)
    _note_open(run, mode)
    if mode.curvature.is_concave:
        found = mode.x, mode.curvature.covariance()
        if fit_along_path(run, mode, is_full, rng) or fit_around(run, mode, found, is_full, rng):
            return
    else:
        worst = int(np.argmax(np.abs(mode.curvature.vectors[:, 0])))
        run.notes.append(f"the log density is not concave where it ends, along {run.names[worst]}")
    if not fit_along_ridge(run, mode, is_full, rng):
        run.note_not_gaussian("it has no best Gaussian", run.remedy())
        _fit_few_rows(run, MeanField(mode.x, mode.curvature.scale, np.inf), is_full, tolerance, rng)


def _note_open(run: Search, mode: Mode) -> None:
    """Note a direction that neither rows nor priors say anything about."""
    values, vectors = mode.curvature.values, mode.curvature.vectors
    if abs(values[0]) > _OPEN * values[-1]:
        return
    far = mode.curvature.scale * vectors[:, 0]
    far *= _WIDE / np.abs(far).max()
    sample = run.sample.first(SIZES[0])
    top, *heights = (sample.value_and_gradient(mode.x + s * far)[0] for s in (0, 1, -1))
    if min(heights) > top - 1:
        run.found["flat direction"] = _flat(run.names[int(np.argmax(np.abs(far)))])


def _flat(name: str) -> Finding:
    text = f"the posterior does not fall off along {name}, and may have no mean"
    return Finding(text, "Give it a narrower prior.")


def _find_mode(
    run: Search, x: np.ndarray, is_full: bool, tolerance: float, rng: np.random.Generator
) -> Mode:
    """Maximize the log density on growing samples, and then on all rows."""
    run.pattern, steps = Pattern.dense(len(x)), None
    for size in SIZES:
        sample = run.sample.first(size)
        find = partial(
            maximize,
            sample.value_and_gradient,
            partial(sample.hessian, run.pattern),
            tolerance=tolerance * sample.inflation,
            show=run.show,
        )
        mode = find(x)
        if size == SIZES[0]:
            mode = _highest_mode(run, find, x, mode, rng)
        if sample.is_whole:
            return mode
        x, steps = mode.x, RELATIVE_STEP * mode.curvature.scale
        if size > SIZES[0]:
            run.pattern = Pattern(sample.likelihood_hessian(run.pattern, x, steps))

    def keep(mode: Mode) -> None:
        run.show(mode)
        if mode.curvature.is_concave:
            run.best = mode.x, family(mode.curvature.covariance(), is_full)

    return maximize(
        run.value_and_gradient,
        run.hessian,
        x,
        tolerance=tolerance,
        steps=steps,
        show=keep,
    )


def _highest_mode(
    run: Search, find: Callable[..., Mode], x: np.ndarray, mode: Mode, rng: np.random.Generator
) -> Mode:
    """Return the highest mode from some starts, and note that there are several."""
    for _ in range(_OTHER_STARTS):
        other = find(x + rng.normal(size=len(x)), max_steps=50)
        low, high = sorted((mode, other), key=lambda mode: mode.log_evidence)
        gap = high.log_evidence - low.log_evidence
        if gap < _MODE_GAP and low.curvature.distance(other.x - mode.x) > _SEPARATE:
            run.found["several modes"] = Finding(
                "the posterior has another mode that is as high, and means and standard deviations "
                "are those of one",
                "Order or bound the parameters, so that one mode is left.",
            )
            return high
        mode = high if np.isfinite(high.log_evidence) else mode
    return mode


def _fit_few_rows(
    run: Search, q: MeanField, is_full: bool, tolerance: float, rng: np.random.Generator
) -> None:
    """Fit a mean-field Gaussian by samples, where there is nothing better."""
    draws = sign_draws(len(q.mean), 32, rng)
    prior = run.prior_expected(sign_draws(len(q.mean), 64, rng))
    for n_rows in SIZES[:2]:
        parts: list[Any] = [partial(expected, run.sample.first(n_rows).likelihood, draws), prior]
        q = best_mean_field(parts, q, tolerance=tolerance, show=run.show)
    run.best = q.mean, np.diag(q.scales) if is_full else q.scales


def _fit_mean_field(
    run: Search, q: MeanField, is_full: bool, tolerance: float, rng: np.random.Generator
) -> None:
    """Fit a mean-field Gaussian of many parameters, on all rows."""
    size = len(q.mean)
    draws = sign_draws(size, 4 if len(run.shared) < 4 else 8, rng, run.shared)
    prior = run.prior_expected(sign_draws(size, 16, rng, run.shared))

    def keep(q: MeanField) -> None:
        run.show(q)
        run.best = q.mean, np.diag(q.scales) if is_full else q.scales

    parts: list[Any] = [partial(expected, run.sample.likelihood, draws), prior]
    show = keep if run.sample.is_whole else run.show
    q = best_mean_field(parts, q, tolerance=tolerance, show=show)
    if not run.sample.is_whole:
        parts = [partial(run.expected, draws), prior]
        best_mean_field(parts, q, tolerance=tolerance, show=keep)


def note_flat(run: Search) -> None:
    """Note a direction in which the density has not fallen far from the mean."""
    if run.best is None or len(run.best[0]) > MAX_DENSE:
        return
    (mean, scale), sample = run.best, run.sample.first(SIZES[0])
    covariance = np.diag(marginal_sd(scale) ** 2) if run.covariance is None else run.covariance
    values, vectors = np.linalg.eigh(covariance)
    axes = (vectors * np.sqrt(values)).T[::-1]
    offsets = [_FAR * sign * axis for axis in axes for sign in (1, -1)]
    top = sample.value_and_gradient(mean)[0]
    flat = [v for v in offsets if sample.value_and_gradient(mean + v)[0] > top - 1]
    if not flat:
        return
    # The sample may lack the few rows that decide, and a mean-field fit the width.
    offsets = [share * offset for offset in flat for share in (1, 3)]
    heights = run.values([mean, *(mean + offset for offset in offsets)])
    near, far = np.nan_to_num(heights[1:] - heights[0], nan=-np.inf).reshape(-1, 2).T
    worst = int(np.argmax(near))
    name = run.names[int(np.argmax(np.abs(flat[worst])))]
    if near[worst] > _RISE and far[worst] > near[worst] + _RISE:
        run.found["not Gaussian"] = Finding(
            f"the posterior density rises without end along {name}, a funnel of a scale and of "
            "what it scales",
            NON_CENTRED,
        )
    elif min(near[worst], far[worst]) > -1:
        run.found["flat direction"] = _flat(name)
