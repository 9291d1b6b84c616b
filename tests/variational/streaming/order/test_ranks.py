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
"""All shuffled rows give the statistic of ranks the same distribution."""

import numpy as np
import pytest

from scipy import stats

from pymc.variational._streaming.order.ranks import compare_groups

MARGINALS = {
    "Cauchy": lambda rng, shape: rng.standard_cauchy(shape),
    "one in 1,000": lambda rng, shape: rng.random(shape) < 1e-3,
}
LEVELS = 0.3, 0.1, 0.03, 0.01
REPEATS = 1_500


@pytest.mark.parametrize("marginal", MARGINALS.values(), ids=MARGINALS)
@pytest.mark.parametrize("n_groups, size", [(20, 16), (2, 20)])
def test_alarms_of_shuffled_units_are_as_rare_as_they_claim_to_be(marginal, n_groups, size):
    """Binomial upper bounds at a false-alarm rate of 1e-5 for each level."""
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(n_groups), size)
    found = [compare_groups(marginal(rng, (len(groups), 3)), groups, i) for i in range(REPEATS)]
    for level in LEVELS:
        most = stats.binom.isf(1e-5, REPEATS, level)
        assert sum(3 * f.p_value.min() < level for f in found) <= most
        assert sum(f.pooled < level for f in found) <= most


def test_correlated_coordinates_are_pooled_at_the_same_level():
    rng = np.random.default_rng(1)
    groups = np.repeat(np.arange(20), 16)
    mixing = rng.normal(size=(12, 3)) @ rng.normal(size=(3, 12)) + 0.1 * np.eye(12)
    pooled = [
        compare_groups(rng.standard_t(2, (320, 12)) @ mixing, groups, i).pooled
        for i in range(REPEATS)
    ]
    for level in LEVELS:
        assert np.sum(np.array(pooled) < level) <= stats.binom.isf(1e-5, REPEATS, level)


@pytest.mark.parametrize("n_changed", [8, 16])
def test_few_units_that_differ_in_one_group_are_seen(n_changed):
    """All arrangements of 8 units in 20 groups of 32 put them into one with p = 1e-10."""
    groups = np.repeat(np.arange(20), 32)
    units = np.random.default_rng(3).normal(size=(640, 1))
    units[-n_changed:] += 10
    assert compare_groups(units, groups).p_value[0] < 1e-4


def test_a_change_of_many_coordinates_shows_in_all_together():
    rng = np.random.default_rng(4)
    groups = np.repeat(np.arange(20), 16)
    units = rng.normal(size=(320, 100)) + 0.3 * rng.choice([-1, 1], 100) * (groups > 9)[:, None]
    found = compare_groups(units, groups)
    assert found.pooled < 1e-8 < found.p_value.min()


def test_components_are_those_of_one_way_analysis_of_variance():
    rng = np.random.default_rng(5)
    groups = np.repeat(np.arange(200), 50)
    units = rng.normal(size=(10_000, 1)) + rng.normal(0, 0.5, 200)[groups, None]
    found = compare_groups(units, groups)
    assert found.within[0] == pytest.approx(1.0, rel=0.06)
    assert found.ratio[0] == pytest.approx(0.25, rel=0.4)


@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize("n_groups", range(2, 10))
def test_any_few_groups_are_compared(n_groups, size):
    groups = np.repeat(np.arange(n_groups), size)
    units = np.random.default_rng(6).normal(size=(len(groups), 2))
    found = compare_groups(units, groups)
    assert np.isfinite([*found.p_value, found.pooled]).all()
