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
"""The log density on a sample of the rows of its streams, in memory."""

import math

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from pymc.variational._streaming.batches.window import ShuffleBuffer
from pymc.variational._streaming.contract import Contract
from pymc.variational._streaming.dataset import StreamingDataset
from pymc.variational._streaming.fit.density import Density, sample_rows
from pymc.variational._streaming.fit.ridge import RidgeTransform
from pymc.variational._streaming.fit.trust_region import RELATIVE_STEP, Function, Pattern

__all__ = ["Known", "Sample"]

_MAX_VALUES = 2**22
"""Values of a sample that are held in memory, 32 MB of float64."""

_BLOCKS = 1024
"""Blocks in which parameters are looked for that few rows depend on."""


class Sample:
    """A log density whose likelihood is that of some rows, scaled to all.

    Parameters
    ----------
    density : Density
    rows : sequence of ndarray
        Rows of each stream, in random order.
    totals : sequence of int
        Number of all rows of each stream.
    """

    def __init__(self, density: Density, rows: Sequence[np.ndarray], totals: Sequence[int]):
        self._density, self._rows, self._totals = density, rows, totals
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
        return Sample(self._density, [part[:n_rows] for part in self._rows], self._totals)

    def alone(self) -> "Sample":
        """Return the log density of these rows alone, which is wider than that of all."""
        return Sample(self._density, self._rows, [len(part) for part in self._rows])

    @property
    def n_rows(self) -> int:
        return sum(map(len, self._rows))

    @property
    def relative_error(self) -> float:
        """Relative error of its sums by the choice of rows, 0 where it has all."""
        sizes = [len(rows) for rows, weight in zip(self._rows, self._weights) if weight > 1]
        return 1 / math.sqrt(min(sizes)) if sizes else 0.0

    @property
    def is_whole(self) -> bool:
        """Whether these are all rows."""
        return max(self._weights) <= 1

    @property
    def inflation(self) -> float:
        """Standard deviation of the optimum of a sample, in those of the posterior of all rows."""
        return max(self._weights) ** 0.5

    def value_and_gradient(self, x: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = self.likelihood(x)
        prior, prior_gradient = self._density.prior.value_and_gradient(x)
        return value + prior, gradient + prior_gradient

    def hessian(self, pattern: Pattern, x: np.ndarray, steps: np.ndarray) -> np.ndarray:
        """Return the Hessian, of whose likelihood the *pattern* is known."""
        return self.likelihood_hessian(pattern, x, steps) + self.prior_hessian(x, steps)

    def prior_hessian(self, x: np.ndarray, steps: np.ndarray) -> np.ndarray:
        gradient = self._density.prior.value_and_gradient
        return Pattern.dense(len(x)).hessian(lambda y: gradient(y)[1], x, steps)

    def likelihood(self, x: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = 0.0, np.zeros(len(x))
        for likelihood, rows, weight in zip(self._density.likelihoods, self._rows, self._weights):
            part, part_gradient = likelihood.value_and_gradient(x, rows)
            value += weight * part
            gradient += weight * part_gradient
        return value, gradient

    def likelihood_hessian(self, pattern: Pattern, x: np.ndarray, steps: np.ndarray) -> np.ndarray:
        return pattern.hessian(lambda y: self.likelihood(y)[1], x, steps)

    def is_rare(self, x: np.ndarray) -> list[np.ndarray]:
        """Return on which parameters few rows of each stream depend, each of shape (d,)."""
        rare = []
        for likelihood, rows, weight in zip(self._density.likelihoods, self._rows, self._weights):
            blocks = np.array_split(rows, min(len(rows), _BLOCKS)) if weight > 1 else []
            without = np.zeros(len(x))
            for block in blocks:
                without += likelihood.value_and_gradient(x, block)[1] == 0
            rare.append(without > len(blocks) / 2)
        return rare

    def around(
        self,
        x: np.ndarray,
        value: float,
        gradient: np.ndarray,
        difference: np.ndarray | None,
        transform: RidgeTransform | None = None,
    ) -> Function:
        """Return the likelihood with that of all rows, and its gradient and Hessian, at *x*.

        The sample serves the rest, which is small near the optimum (Quiroz et al. 2019). It is a
        function of the coordinates of *transform*, if that is given: along a ridge the difference to
        all rows is quadratic in these only.
        """
        at, slope = self.likelihood(x)
        gap = _Quadratic(x, value - at, gradient - slope, difference)
        likelihood: Function = self.likelihood
        if transform is not None:
            likelihood, straight = transform.straighten(likelihood), transform.straighten(gap.at)
            y = transform.coordinates(x)
            steps = RELATIVE_STEP * np.sqrt(np.diag(transform.covariance))
            hessian = Pattern.dense(len(x)).hessian(lambda y: straight(y)[1], y, steps)
            gap = _Quadratic(y, *straight(y), hessian)

        def corrected(y: np.ndarray) -> tuple[float, np.ndarray]:
            (value, gradient), (more, slope) = likelihood(y), gap.at(y)
            return value + more, gradient + slope

        return corrected


class Known(NamedTuple):
    """What :func:`polish` knows of the curvature around a fit."""

    sample: Sample
    difference: np.ndarray
    """What the Hessian of all rows exceeds that of the sample by."""
    transform: RidgeTransform | None = None
    """Coordinates in which the posterior is near a Gaussian, if they are not the parameters."""
    straight: tuple[np.ndarray, np.ndarray] | None = None
    """Mean and covariance of that Gaussian."""


class _Quadratic(NamedTuple):
    """A quadratic function, or a linear one without Hessian."""

    x: np.ndarray
    value: float
    gradient: np.ndarray
    hessian: np.ndarray | None

    def at(self, y: np.ndarray) -> tuple[float, np.ndarray]:
        step = y - self.x
        more = 0 if self.hessian is None else self.hessian @ step
        return self.value + (self.gradient + more / 2) @ step, self.gradient + more


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
        rows = sample_rows(stream, n_rows)
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
