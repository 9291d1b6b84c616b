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
"""The log density of a model on some rows of its streams, or by what some say of all."""

import math

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from scipy.sparse import csr_array, diags_array

from pymc.variational._streaming.batches.window import ShuffleBuffer
from pymc.variational._streaming.contract import Contract
from pymc.variational._streaming.dataset import StreamingDataset
from pymc.variational._streaming.fit.density import Density, Term, add_up
from pymc.variational._streaming.fit.gaussian import times
from pymc.variational._streaming.fit.mean_field import MeanField, Part, expected
from pymc.variational._streaming.fit.trust_region import differences

__all__ = ["Corrected", "LogDensity", "Sample", "expected_of_rows"]

_MAX_VALUES = 2**22
"""Values of a sample that are held in memory, 32 MB of float64."""

_MAX_FACTOR = 4.0
"""Ratio of a second derivative of all rows to that of the sample up to which it is rescaled."""

_BLOCKS = 1024
"""Blocks in which parameters are looked for that few rows depend on."""


class LogDensity:
    """A log density whose likelihood is a sum over rows."""

    def __init__(self, density: Density):
        self.density = density
        self.prior = density.prior.value_and_gradient

    def sum(self, function: Callable[[Term, np.ndarray], tuple[Any, ...]]) -> Any:
        """Return the sums of a function of a likelihood and a block of its rows."""
        raise NotImplementedError

    def likelihood(self, x: np.ndarray) -> tuple[float, np.ndarray]:
        return self.sum(lambda term, rows: term.value_and_gradient(x, rows))

    def likelihood_hessian(self, x: np.ndarray, steps: np.ndarray) -> np.ndarray:
        pattern = self.density.pattern

        def of_rows(term: Term, rows: np.ndarray) -> tuple[np.ndarray]:
            return (pattern.differences(lambda y: term.value_and_gradient(y, rows)[1], x, steps),)

        [columns] = self.sum(of_rows)
        return pattern.assemble(columns, steps)

    def expected(
        self,
        draws: np.ndarray,
        mean: np.ndarray,
        scales: np.ndarray,
        places: Sequence[int] = (),
    ) -> Any:
        """Return the likelihood's expected value and gradients, as :func:`expected` does."""
        ask = partial(expected_of_rows, draws=draws, mean=mean, scales=scales, places=places)
        return self.sum(ask)

    def value_and_gradient(self, x: np.ndarray) -> tuple[float, np.ndarray]:
        (value, gradient), (more, slope) = self.likelihood(x), self.prior(x)
        return value + more, gradient + slope

    def hessian(self, x: np.ndarray, steps: np.ndarray) -> np.ndarray:
        """Return the Hessian, shape (d, d), by differences of gradients over *steps*."""
        of_prior = differences(lambda y: self.prior(y)[1], x, steps)
        return self.likelihood_hessian(x, steps) + of_prior

    def values(self, points: Sequence[np.ndarray]) -> np.ndarray:
        def of_rows(term: Term, rows: np.ndarray) -> tuple[np.ndarray]:
            return (np.array([term.value_and_gradient(x, rows)[0] for x in points]),)

        [values] = self.sum(of_rows)
        return values + [self.prior(x)[0] for x in points]


class Sample(LogDensity):
    """A log density whose likelihood is that of some *rows* of each stream, scaled to its total."""

    def __init__(self, density: Density, rows: Sequence[np.ndarray], totals: Sequence[int]):
        super().__init__(density)
        self._rows, self._totals = rows, totals
        self._weights = [total / len(part) for total, part in zip(totals, rows)]

    @classmethod
    def draw(cls, density: Density, rng: np.random.Generator, n_rows: int | None) -> "Sample":
        """Draw rows of each stream, as many as memory is spent on if *n_rows* is None."""
        rows, totals = [], []
        for number, stream in enumerate(density.streams):
            most = _MAX_VALUES // math.prod(stream.sample_shape)
            contract_of = partial(density.contract, number)
            part, total = _random_rows(stream, min(most, n_rows or most), rng, contract_of)
            rows.append(part)
            totals.append(total)
        return cls(density, rows, totals)

    def first(self, n_rows: int) -> "Sample":
        """Return a smaller sample, of the first rows of each stream."""
        return Sample(self.density, [part[:n_rows] for part in self._rows], self._totals)

    @property
    def n_rows(self) -> int:
        return sum(map(len, self._rows))

    @property
    def relative_error(self) -> float:
        """Relative error of its sums by the choice of rows, 0 where it has all."""
        sizes = [len(rows) for rows, weight in zip(self._rows, self._weights) if weight > 1]
        return 1 / math.sqrt(min(sizes)) if sizes else 0.0

    @property
    def inflation(self) -> float:
        """Standard deviation of its optimum, in those of the posterior of all rows; 1 if whole."""
        return max(1.0, *self._weights) ** 0.5

    def sum(self, function: Callable[[Term, np.ndarray], tuple[Any, ...]]) -> Any:
        terms = zip(self.density.likelihoods, self._rows, self._weights)
        return add_up([w * value for value in function(term, rows)] for term, rows, w in terms)

    def correction(
        self,
        draws: np.ndarray,
        mean: np.ndarray,
        scales: np.ndarray,
        places: list[int],
        rows: Sequence[Any],
    ) -> tuple[Any, np.ndarray]:
        """Return addends and factors that make second derivatives those of all *rows*.

        Those of single parameters are, and those of some *places* with all others; the sample has
        the rest of the curvature (Shamir, Srebro and Zhang 2014). The *rows* are what
        :meth:`expected` returns of all rows, for the same arguments.
        """
        _, _, true, *columns = rows
        _, _, sampled, *others = self.expected(draws, mean, scales, places)
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = np.where(true == sampled, 1, true / sampled)
            known = (ratio > 1 / _MAX_FACTOR) & (ratio < _MAX_FACTOR)
            addends = np.where(known, 0, np.minimum(true, 0) / scales**2)
        factors = np.sqrt(np.where(known, ratio, 0))
        if not places:
            return addends, factors
        border = np.array(columns) - factors[places, None] * np.array(others) * factors
        border[:, places] /= 2  # they are both rows and columns
        border[range(len(places)), places] = 0
        unit = np.ones(len(places)), (places, range(len(places)))
        half = csr_array(unit, (len(mean), len(places))) @ csr_array(border)
        return half + half.T + diags_array(addends), factors

    def corrected(
        self, draws: np.ndarray, q: MeanField, places: list[int], rows: Sequence[Any]
    ) -> Part:
        """Return expected values of this sample with the derivatives of all *rows* at *q*.

        The *rows* are what :meth:`expected` returns of all rows at *q*.
        """
        value, by_mean, by_scale, *_ = rows
        correction = self.correction(draws, q.mean, q.scales, places, rows)
        likelihood = Corrected(self, q.mean, value, by_mean, *correction).likelihood
        _, at_mean, at_scale = expected(likelihood, draws, q.mean, q.scales)
        tilt, tilt_of_scale = by_mean - at_mean, by_scale - at_scale

        def part(mean: np.ndarray, scales: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
            value, slope, slope_of_scale = expected(likelihood, draws, mean, scales)
            value += tilt @ (mean - q.mean) + tilt_of_scale @ np.log(scales / q.scales)
            return value, slope + tilt, slope_of_scale + tilt_of_scale

        return part

    def is_rare(self, x: np.ndarray) -> list[np.ndarray]:
        """Return on which parameters few rows of each stream depend, each of shape (d,)."""
        rare = []
        for likelihood, rows, weight in zip(self.density.likelihoods, self._rows, self._weights):
            blocks = np.array_split(rows, min(len(rows), _BLOCKS)) if weight > 1 else []
            without = np.zeros(len(x))
            for block in blocks:
                without += likelihood.value_and_gradient(x, block)[1] == 0
            rare.append(without > len(blocks) / 2)
        return rare


class Corrected(LogDensity):
    """The log density of a sample, with the likelihood of all rows and its gradient at a point.

    What is left to the sample is small near the optimum (Quiroz et al. 2019). Rows and columns of
    its Hessian are multiplied by *factors*, and the *difference* to the Hessian of all rows, which
    may be sparse, or its diagonal, is added.
    """

    def __init__(
        self,
        sample: Sample,
        x: np.ndarray,
        value: float,
        gradient: np.ndarray,
        difference: Any,
        factors: np.ndarray | float = 1.0,
    ):
        super().__init__(sample.density)
        self.sample, self.difference = sample, difference
        self._x, self._factors = x, factors
        at, slope = sample.likelihood(x)
        self._gap, self._slope = value - at, gradient - factors * slope

    def likelihood(self, x: np.ndarray) -> tuple[float, np.ndarray]:
        step = x - self._x
        value, gradient = self.sample.likelihood(self._x + self._factors * step)
        more = times(self.difference, step)
        value += self._gap + (self._slope + more / 2) @ step
        return value, self._factors * gradient + self._slope + more

    def likelihood_hessian(self, x: np.ndarray, steps: np.ndarray) -> np.ndarray:
        return self.sample.likelihood_hessian(x, steps) + self.difference

    def values(self, points: Sequence[np.ndarray]) -> np.ndarray:
        return np.array([self.value_and_gradient(x)[0] for x in points])


def expected_of_rows(term: Term, rows: np.ndarray, **kwargs: Any) -> tuple[Any, ...]:
    """Return what :func:`expected` returns of the likelihood of some rows."""
    return expected(partial(term.value_and_gradient, rows=rows), **kwargs)


def _random_rows(
    stream: StreamingDataset,
    n_rows: int,
    rng: np.random.Generator,
    contract_of: Callable[[np.ndarray], Contract],
) -> tuple[np.ndarray, int]:
    """Return rows in random order, all if the stream has fewer, and the number of all rows.

    Of a table that was shuffled they are the first. Of another one, each row has the same chance in
    a pass over all, so that no order of the rows can matter.
    """
    source = stream._source
    table = source.source if isinstance(source, ShuffleBuffer) else source
    if table.shuffled and table.n_rows is not None:
        rows = next(stream._read_once(source, n_rows))
        contract_of(rows).check(rows)
        return rows, table.n_rows
    keys, kept, limit, total = np.empty(0), [], 1.0, 0
    for batch in stream:
        contract_of(batch).check(batch, total)
        new = rng.random(len(batch))
        keys = np.concatenate([keys, new[new < limit]])
        kept.append(batch[new < limit])
        total += len(batch)
        if len(keys) > 2 * n_rows:
            keys, kept = _smallest(keys, kept, n_rows)
            limit = keys[-1]
    return _smallest(keys, kept, n_rows)[1][0], total


def _smallest(
    keys: np.ndarray, rows: Sequence[np.ndarray], n: int
) -> tuple[np.ndarray, list[np.ndarray]]:
    order = np.argsort(keys)[:n]
    return keys[order], [np.concatenate(rows)[order]]
