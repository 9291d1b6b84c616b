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
"""Moments of a density that is near a Gaussian, by importance sampling."""

import math

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

__all__ = ["Moments", "importance_moments"]

_PAIRS = 1_000
"""Pairs of antithetic draws."""

_ENOUGH = 0.5
"""Share of effective draws at which another round would change little."""

_ROUNDS = 4


class Moments(NamedTuple):
    """Moments of a density."""

    mean: np.ndarray
    covariance: np.ndarray
    efficiency: float
    """Effective number of draws over their number, 1 for a Gaussian density."""


def importance_moments(
    log_density: Callable[[np.ndarray], float],
    mean: np.ndarray,
    covariance: np.ndarray,
    rng: np.random.Generator,
) -> Moments:
    """Return the moments of a density near N(mean, covariance).

    Each round draws from the Gaussian with the moments of the one before, until enough draws are
    effective (Cappé et al. 2004); the largest weights are truncated (Ionides 2008). Correlations
    stay as they are, and standard deviations are multiplied by ratios of weighted to unweighted
    draws, in which most of the noise cancels.
    """
    half = rng.normal(size=(_PAIRS, len(mean)))
    draws = np.concatenate([half, -half])
    best = Moments(mean, covariance, 0.0)
    for _ in range(_ROUNDS):
        offsets = draws @ np.linalg.cholesky(covariance).T
        logs = np.array([log_density(mean + offset) for offset in offsets])
        logs = np.nan_to_num(logs, nan=-np.inf) + (draws**2).sum(axis=1) / 2
        weights = np.exp(logs - logs.max())
        weights = np.minimum(weights, weights.mean() * math.sqrt(len(weights)))
        weights /= weights.sum()
        efficiency = float(1 / (weights**2).sum() / len(weights))
        if efficiency < best.efficiency:
            break
        shift = weights @ offsets
        ratio = np.sqrt((weights @ offsets**2 - shift**2) / (offsets**2).mean(axis=0))
        mean, covariance = mean + shift, covariance * np.outer(ratio, ratio)
        best = Moments(mean, covariance, efficiency)
        if efficiency > _ENOUGH:
            break
    return best
