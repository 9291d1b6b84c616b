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
"""The log density on all rows of a stream, and what a search for the best fit has found."""

import math

from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from functools import partial
from typing import Any

import numpy as np

from pytensor.graph.traversal import ancestors

from pymc.variational._streaming.fit.density import Density, Term, add_up, sum_over_rows
from pymc.variational._streaming.fit.gaussian import log_volume, times
from pymc.variational._streaming.fit.mean_field import (
    MeanField,
    expected,
    sign_draws,
)
from pymc.variational._streaming.fit.report import COMPARE, Finding, Verdict
from pymc.variational._streaming.fit.sample import Known, Sample
from pymc.variational._streaming.fit.trust_region import (
    Mode,
    Pattern,
)

__all__ = ["MAX_DENSE", "NON_CENTRED", "SIZES", "Fit", "PassesSpent", "Search", "family"]

MAX_DENSE = 500
"""Parameters up to which the whole Hessian is held."""

_MAX_SHARED = 8
"""Scalars among many parameters whose standard deviations are computed one by one."""

SIZES = (4_096, 32_768, 262_144)
"""Rows of the samples, each of which starts from the optimum of the one before."""

_COMPARED_PAIRS = 4
"""Pairs of draws at which the fit before and after are compared on all rows."""

NON_CENTRED = (
    "Write variables whose prior depends on another one non-centred: a standard normal variable "
    "times the scale."
)

Fit = tuple[np.ndarray, np.ndarray]
"""Means, and scales in the form of the approximation."""


class PassesSpent(Exception):
    """As many passes were made as are allowed."""


class Search:
    """The log density on all rows, and what a run of :func:`polish` has found so far."""

    def __init__(
        self,
        density: Density,
        names: Sequence[str],
        executor: Executor | None,
        advance: Callable[..., None],
        max_passes: float,
    ):
        self.density, self.names, self.max_passes = density, names, max_passes
        self.prior = density.prior.value_and_gradient
        self._executor, self._advance = executor, advance
        self.passes = 0
        self.sample = Sample(density, [], [])
        self.shared = [k for k, name in enumerate(names) if "[" not in name][:_MAX_SHARED]
        """Scalars, on which others may depend."""
        self.pattern = Pattern.dense(0)
        """Pattern of the Hessian of the likelihood."""
        self.best: Fit | None = None
        self.covariance: np.ndarray | None = None
        self.known: Known | None = None
        """What serves for the curvature when the fit is checked."""
        self.found: dict[Verdict, Finding] = {}
        self.notes: list[str] = []

    def value_and_gradient(self, x: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = self.sum(lambda term, rows: term.value_and_gradient(x, rows))
        prior, prior_gradient = self.prior(x)
        return value + prior, gradient + prior_gradient

    def hessian(self, x: np.ndarray, steps: np.ndarray) -> np.ndarray:
        pattern = self.pattern

        def differences(term: Term, rows: np.ndarray) -> tuple[np.ndarray]:
            return (pattern.differences(lambda y: term.value_and_gradient(y, rows)[1], x, steps),)

        [columns] = self.sum(differences)
        return pattern.assemble(columns, steps) + self.sample.prior_hessian(x, steps)

    def values(self, points: Sequence[np.ndarray]) -> np.ndarray:
        def of_rows(term: Term, rows: np.ndarray) -> tuple[np.ndarray]:
            return (np.array([term.value_and_gradient(x, rows)[0] for x in points]),)

        [values] = self.sum(of_rows)
        return values + [self.prior(x)[0] for x in points]

    def expected(self, draws: np.ndarray, mean: np.ndarray, scales: np.ndarray) -> Any:
        def of_rows(term: Term, rows: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
            return expected(partial(term.value_and_gradient, rows=rows), draws, mean, scales)

        return self.sum(of_rows)

    def prior_expected(self, draws: np.ndarray) -> Callable[..., Any]:
        return partial(expected, self.prior, draws)

    def is_higher(self, x: np.ndarray, y: np.ndarray) -> bool:
        """Whether the density of the sample is higher at *x* than at *y*."""
        return not self.sample.value_and_gradient(x)[0] < self.sample.value_and_gradient(y)[0]

    def is_better(self, after: Fit, before: Fit, rng: np.random.Generator) -> bool:
        """Whether the evidence lower bound on all rows has not fallen, at the same draws."""
        draws = sign_draws(len(after[0]), _COMPARED_PAIRS, rng)
        fits, signs = (after, before), (1, -1)
        points = [x + s * times(scale, d) for x, scale in fits for d in draws for s in signs]
        bounds = self.values(points).reshape(2, len(draws), 2).mean(axis=2)
        bounds = bounds + np.array([[log_volume(scale)] for _, scale in fits])
        gain = (bounds[0] - bounds[1])[np.isfinite(bounds[1])]
        error = gain.std() / math.sqrt(max(1, len(gain)))
        is_finite = bool(np.isfinite(bounds[0]).all())
        return is_finite and (not len(gain) or gain.mean() > -2 * error - 1e-3)

    def remedy(self) -> str:
        """Return what to do about a posterior that is not near a Gaussian."""
        free = self.density.model.free_RVs
        scaled = self.density.size <= MAX_DENSE and any(
            set(free) & set(ancestors(rv.owner.inputs)) for rv in free
        )
        return NON_CENTRED if scaled else COMPARE

    def note_not_gaussian(self, why: str, remedy: str) -> None:
        text = f"the posterior is not near a Gaussian ({why}), and means and sd may be off"
        self.found.setdefault("not Gaussian", Finding(text, remedy))

    def keep(self, mean: np.ndarray, covariance: np.ndarray, is_full: bool) -> None:
        """Keep moments of the posterior."""
        self.covariance, self.best = covariance, (mean, family(covariance, is_full))

    def show(self, found: Mode | MeanField) -> None:
        self._advance(0, f"Polishing, {found.distance:.2g} sd to go")

    def sum(self, function: Callable[[Term, np.ndarray], tuple[Any, ...]]) -> Any:
        if self.passes >= self.max_passes:
            raise PassesSpent
        parts = sum_over_rows(
            self.density, function, executor=self._executor, advance=self._advance
        )
        self.passes += 1
        return add_up(parts)


def family(covariance: np.ndarray, is_full: bool) -> np.ndarray:
    """Return the scales of the Gaussian nearest to one of this covariance."""
    if is_full:
        return np.linalg.cholesky(covariance)
    return 1 / np.sqrt(np.diag(np.linalg.inv(covariance)))
