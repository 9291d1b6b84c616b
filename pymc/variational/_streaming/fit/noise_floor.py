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
"""End a fit when its optimizer has reached its noise floor."""

from typing import Any

import numpy as np

from pymc.variational._streaming.fit.bins import Bins, merge
from pymc.variational._streaming.fit.gaussian import gaussian_group, mean
from pymc.variational._streaming.utils import positive_int
from pymc.variational.callbacks import Callback

__all__ = ["CheckNoiseFloor"]

_QUANTILE = 0.9
"""Share of the means that must have arrived; :func:`polish` finds the slowest sooner."""

_MIN_BINS = 4


class CheckNoiseFloor(Callback):
    """Callback that ends a fit when its means scatter more than they travel.

    With minibatches and a constant learning rate the means end up scattering around the optimum
    (Pflug 1990), and more steps bring them no nearer. :func:`polish` does, in a few passes. The
    scales take ten times the steps, and are not waited for: polish has them in closed form.

    Parameters
    ----------
    every : int, default 200
        Steps between two looks.

    Raises
    ------
    TypeError
        At the first step, if the approximation is not a mean-field or full-rank Gaussian.

    Notes
    -----
    Compared are the halves of the second half of all steps. A mean of the approximation has arrived
    if its averages over them differ by less than the steps scatter; 90 % must have. A steady drift
    differs by 1.7 times the scatter that it makes.

    *Memory*: 64 vectors of the means.

    References
    ----------
    Pflug, G. C. (1990). Non-asymptotic confidence bounds for stochastic approximation algorithms
    with constant step size. Monatshefte für Mathematik 110, 297-314.

    Examples
    --------
    >>> import numpy as np
    >>> import pymc as pm
    >>> from pymc.variational.streaming import CheckNoiseFloor, StreamingDataset, polish
    >>> rows = np.random.default_rng(0).normal(1.0, 2.0, size=(10_000, 1))
    >>> ds = StreamingDataset(rows, batch_size=100)
    >>> with pm.Model():
    ...     mu = pm.Normal("mu", 0, 10)
    ...     y = pm.Normal("y", mu, 2, observed=ds.as_tensor()[:, 0], total_size=ds.total_size)
    ...     approx = pm.fit(
    ...         10_000,
    ...         callbacks=[CheckNoiseFloor(), ds.fit_callback()],
    ...         obj_optimizer=pm.adam(learning_rate=0.05),
    ...         progressbar=False,
    ...     )
    >>> polish(approx, ds, progressbar=False).verdict
    'fine'
    """

    def __init__(self, every: int = 200):
        self._every = positive_int("every", every)
        self._steps = Bins()

    def __call__(self, approx: Any, losses: np.ndarray | None, i: int) -> None:
        if i == 1:
            self._steps = Bins()
        self._steps.add(mean(gaussian_group(approx)))
        if i % self._every or len(self._steps.parts) < 2 * _MIN_BINS:
            return
        parts = self._steps.after(0.5, at_least=_MIN_BINS)
        half = len(parts) // 2
        both = merge(parts)
        moved = np.abs(merge(parts[half:]).mean - merge(parts[:half]).mean)
        if np.quantile(moved - np.sqrt(both.squares / both.n), _QUANTILE) <= 0:
            raise StopIteration(f"noise floor reached at {i}")
