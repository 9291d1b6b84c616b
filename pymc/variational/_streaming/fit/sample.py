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

from collections.abc import Callable, Sequence

import numpy as np

from pymc.variational._streaming.batches.window import ShuffleBuffer
from pymc.variational._streaming.dataset import StreamingDataset
from pymc.variational._streaming.fit.density import Density, sample_rows
from pymc.variational._streaming.fit.trust_region import Optimum, Pattern

__all__ = ["Sample", "random_rows"]

_MAX_VALUES = 2**22
"""Values of a sample that are held in memory, 32 MB of float64."""


def random_rows(
    stream: StreamingDataset, n_rows: int, rng: np.random.Generator
) -> tuple[np.ndarray, int]:
    """Return rows in random order, of which each row has the same chance to be one.

    Of a table that was shuffled these are the first, of another one a sample from a pass over all
    rows, so that the order of the rows does not matter.

    Returns
    -------
    rows : ndarray, shape (n_rows, *sample_shape)
        All rows, if the stream has fewer.
    """
    source = stream._source
    if (source.source if isinstance(source, ShuffleBuffer) else source).shuffled:
        return sample_rows(stream, n_rows)
    keys, kept = np.empty(0), []
    limit = 1.0
    for batch in stream:
        new = rng.random(len(batch))
        chosen = new < limit
        keys = np.concatenate([keys, new[chosen]])
        kept.append(batch[chosen])
        if len(keys) > 2 * n_rows:
            keys, kept = _smallest(keys, kept, n_rows)
            limit = keys[-1]
    return np.concatenate(_smallest(keys, kept, n_rows)[1])


def _smallest(
    keys: np.ndarray, rows: Sequence[np.ndarray], n: int
) -> tuple[np.ndarray, list[np.ndarray]]:
    order = np.argsort(keys)[:n]
    return keys[order], [np.concatenate(rows)[order]]


class Sample:
    """A log density whose likelihood is that of some rows, scaled to all.

    Parameters
    ----------
    density : Density
    rows : sequence of ndarray
        Rows of each stream.
    """

    def __init__(self, density: Density, rows: Sequence[np.ndarray]):
        self.rows = list(rows)
        self._density = density
        n_rows = [stream.total_size or len(part) for stream, part in zip(density.streams, rows)]
        self._weights = [n / len(part) for n, part in zip(n_rows, rows)]

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
        dense = Pattern.dense(len(x))
        prior = dense.differences(self._prior_gradient, x, steps)
        return self.likelihood_hessian(pattern, x, steps) + dense.assemble(prior, steps)

    def likelihood(self, x: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = 0.0, np.zeros(len(x))
        for likelihood, rows, weight in zip(self._density.likelihoods, self.rows, self._weights):
            part, part_gradient = likelihood.value_and_gradient(x, rows)
            value += weight * part
            gradient += weight * part_gradient
        return value, gradient

    def likelihood_hessian(self, pattern: Pattern, x: np.ndarray, steps: np.ndarray) -> np.ndarray:
        differences = pattern.differences(lambda y: self.likelihood(y)[1], x, steps)
        return pattern.assemble(differences, steps)

    def around(self, optimum: Optimum) -> Callable[[np.ndarray], tuple[float, np.ndarray]]:
        """Return the likelihood with the gradient and the Hessian of all rows at an optimum.

        The sample serves the rest, which is small near the optimum (Quiroz et al. 2019).
        """
        x = optimum.x
        steps = 0.03 * optimum.curvature.scale
        dense = Pattern.dense(len(x))
        slope = optimum.gradient - self.value_and_gradient(x)[1]
        bend = optimum.curvature.hessian - self.hessian(dense, x, steps)

        def corrected(y: np.ndarray) -> tuple[float, np.ndarray]:
            value, gradient = self.likelihood(y)
            more = bend @ (y - x)
            return value + (slope + more / 2) @ (y - x), gradient + slope + more

        return corrected

    def _prior_gradient(self, x: np.ndarray) -> np.ndarray:
        return self._density.prior.value_and_gradient(x)[1]
