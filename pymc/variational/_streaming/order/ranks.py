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
"""Whether groups of units differ more than random groups would, by ranks.

Of shuffled rows, all arrangements of the units in groups are equally likely, whatever the
distribution of their values, and ranks have the same distribution for all: heavy tails and rare
events need no care.  Ties are broken at random, which keeps that exact.
"""

from typing import NamedTuple

import numpy as np

from scipy.special import betainc, gammaincc, gammaln, ndtri

__all__ = ["ALPHA", "Differences", "compare_groups", "variance_components"]

ALPHA = 3e-5
"""Probability of a false alarm that each check of a data set may spend."""

_EXTREMES = (6, 12, 24, 48)
"""Numbers of the highest and of the lowest units that are looked for in one group."""
_JOINED = 4
"""Number of adjacent units, and groups, that are compared as one, too: a slow drift hides in the noise
of small groups, and rare values in units most of which have none."""


class Differences(NamedTuple):
    """Differences between groups, in each coordinate of the units, shape (n_coordinates,) each."""

    p_value: np.ndarray
    """Least one of the tests of the coordinate, times their number."""
    pooled: float
    """P-value of all coordinates together."""
    within: np.ndarray
    """Variance of the units within groups."""
    ratio: np.ndarray
    """Variance of the groups' true means, over that within groups."""
    rank_ratio: np.ndarray
    """The same ratio of the normal scores of the ranks."""


def compare_groups(units: np.ndarray, groups: np.ndarray, seed: int = 0) -> Differences:
    """Compare groups of units.

    The normal scores of the ranks are compared by an analysis of variance (van der Waerden's
    test): the share of their variance that lies between random groups has a Beta distribution.
    All coordinates are pooled by the sum of their squares, a weighted sum of chi-squares, whose
    first three cumulants a gamma distribution has, too.  A change of few units hardly shows in
    that; so the highest and the lowest units are counted in each group.  All this is done at two sizes
    of *units*, shape (n_units, n_coordinates), and of groups, whose numbers ascend.
    """
    rng = np.random.default_rng(seed)
    groups = np.unique(groups, return_inverse=True)[1]
    scores = _scores(units, rng)
    tests = [_test(*scores, groups)]
    n = len(units) // _JOINED * _JOINED
    of_joined = groups[:n:_JOINED] // _JOINED
    if 1 < np.unique(of_joined).size < len(of_joined):
        joined = units[:n].reshape(-1, _JOINED, units.shape[1]).sum(axis=1)
        tests.append(_test(*_scores(joined, rng), of_joined))
    single, pooled = (np.minimum(2 * np.min(p, axis=0), 1) for p in zip(*tests))
    between, within = variance_components(units, groups)
    rank_ratio = np.divide(*variance_components(scores[1], groups))
    return Differences(single, float(pooled), within, between / within, rank_ratio)


def _scores(units: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return the ranks in each coordinate, with ties in random order, and their normal scores."""
    shuffled = rng.permutation(len(units))
    order = shuffled[np.argsort(units[shuffled], axis=0, kind="stable")]
    ranks = np.empty(units.shape, np.int64)
    np.put_along_axis(ranks, order, np.arange(len(units))[:, None], axis=0)
    return ranks, ndtri((np.arange(len(units)) + 0.5) / len(units))[ranks]


def _test(ranks: np.ndarray, scores: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, float]:
    """Return p-values of each coordinate, shape (n_coordinates,), and of all together."""
    between, total, k = _squares(scores, groups)
    by_score = betainc((len(scores) - k) / 2, (k - 1) / 2, 1 - np.minimum(between / total, 1))
    single = 2 * np.minimum(by_score, _count_extremes(ranks, groups))
    return single, _pool(scores, between.sum(), total[0], k)


def variance_components(values: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the variance of the groups' true means, and that of values within groups."""
    between, total, k = _squares(values, groups)
    n = len(values)
    within = np.maximum(total - between, 1e-12 * total + 1e-300) / (n - k)
    return np.maximum(between / (k - 1) - within, 0) * k / n, within


def _squares(values: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """Return the sums of squares between groups and in total, and the number of groups."""
    sizes = np.bincount(groups)
    sums = np.add.reduceat(values, np.flatnonzero(np.diff(groups, prepend=-1)))
    centre = values.mean(axis=0)
    between = ((sums / sizes[:, None] - centre) ** 2 * sizes[:, None]).sum(axis=0)
    return between, ((values - centre) ** 2).sum(axis=0), len(sizes)


def _count_extremes(ranks: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Return a bound on the probability that so many of the extremes lie in any one group."""
    n, n_columns = ranks.shape
    starts = np.flatnonzero(np.diff(groups, prepend=-1))
    sizes = np.diff(starts, append=n)[:, None]
    log_p = np.zeros(n_columns)
    for m in (m for m in _EXTREMES if m <= n / 4):
        for extreme in (ranks < m, ranks >= n - m):
            count = np.add.reduceat(extreme, starts, dtype=float)
            # The expected number of sets of so many extremes that lie wholly in the group.
            sets = _log_choose(m, count) + _log_choose(sizes, count) - _log_choose(n, count)
            log_p = np.minimum(log_p, sets.min(axis=0))
    return np.minimum(2 * len(_EXTREMES) * len(starts) * np.exp(log_p), 1)


def _log_choose(n, k):
    return gammaln(n + 1.0) - gammaln(k + 1.0) - gammaln(n - k + 1.0)


def _pool(scores: np.ndarray, between: float, total: float, k: int) -> float:
    """Return the p-value of the sum of *between* over all coordinates."""
    weights = np.linalg.eigvalsh(scores.T @ scores / total)
    mean, variance, third = (weights**power @ np.full(len(weights), k - 1) for power in (1, 2, 3))
    shape = variance**3 / (2 * third**2)
    standard = (between / total * (len(scores) - 1) - mean) / np.sqrt(2 * variance)
    return float(gammaincc(shape, np.maximum(shape + standard * np.sqrt(shape), 0)))
