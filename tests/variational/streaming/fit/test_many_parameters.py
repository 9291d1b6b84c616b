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
"""The check of fits of many parameters, for which nothing of the size of a Hessian is made."""

from functools import partial

import numpy as np
import pytest

from scipy import optimize, stats

import pymc as pm

from pymc.variational import streaming
from tests.variational.streaming.fit.exact import Regression, place, stream

check_fit = partial(streaming.check_fit, progressbar=False)


def test_a_vector_alone_has_no_parameter_of_its_own():
    rng = np.random.default_rng(0)
    group = np.repeat(np.arange(600), 5)
    rows = np.column_stack([group, rng.normal(size=len(group))])
    ds = stream(rows)
    with pm.Model():
        mu = pm.Normal("mu", 0, 1, shape=600)
        index = ds.as_tensor()[:, 0].astype("int64")
        y = ds.as_tensor()[:, 1]
        pm.Normal("y", mu[index], 1, observed=y, total_size=ds.total_size)
        approx = pm.MeanField()
    place(approx, np.bincount(group, rows[:, 1]) / 6, np.full(600, 6**-0.5))
    report = check_fit(approx, ds, progressbar=False)
    assert report.verdict == "fine"
    np.testing.assert_allclose(report.sd, 6**-0.5, rtol=0.05)


def test_a_ridge_of_group_effects_shows_its_whole_length():
    """The intercept and the mean of 400 effects are known to 45 sd of the approximation only.

    The sample has 80 rows of each group, and the scales still are those of all rows.
    """
    rng = np.random.default_rng(0)
    n_groups, n_rows = 400, 150_000
    group = rng.integers(0, n_groups, n_rows)
    y = 5 + rng.normal(size=n_groups)[group] + rng.normal(size=n_rows)
    ds = stream(np.column_stack([group, y]), 1_000, order_check="off")
    buf = ds.as_tensor()
    with pm.Model():
        mu = pm.Normal("mu", 0, 10)
        effect = pm.Normal("a", 0, 1, shape=n_groups)
        mean = mu + effect[buf[:, 0].astype("int64")]
        pm.Normal("y", mean, 1, observed=buf[:, 1], total_size=ds.total_size)
        approx = pm.MeanField()
    n = np.bincount(group)
    precision = np.diag(np.r_[n_rows + 0.01, n + 1])
    precision[0, 1:] = precision[1:, 0] = n
    exact = np.linalg.solve(precision, np.r_[y.sum(), np.bincount(group, y)])
    sd, weakest = np.diag(np.linalg.inv(precision)) ** 0.5, np.linalg.eigh(precision)[1][:, 0]
    for off in (0.0, 3.0):
        place(approx, exact + off * weakest * sd[0] / weakest[0], np.diag(precision) ** -0.5)
        report = check_fit(approx, ds)
        assert report.z[0] == pytest.approx(off, abs=0.05)
        assert (report.verdict == "fine") == (off == 0)
        np.testing.assert_allclose(report.s, 0, atol=4 * report.optimum.s_error.max())
        assert report.sd[0] == pytest.approx(sd[0], rel=0.05)


def test_scales_of_correlated_columns_are_right_at_the_optimum():
    regression = Regression(300)
    ds = stream(regression.rows)
    with regression.model(ds):
        approx = pm.MeanField()
    place(approx, regression.mean, regression.mean_field_sd)
    report = check_fit(approx, ds)
    assert report.verdict == "fine"
    np.testing.assert_allclose(report.s, 0, atol=0.2)
    place(approx, regression.mean + regression.sd, 1.5 * regression.mean_field_sd)
    report = check_fit(approx, ds)
    np.testing.assert_allclose(report.z, 1, atol=0.05)
    assert report.verdict == "one batch"


@pytest.mark.parametrize("n_groups", [300, 600])
def test_the_lower_bound_is_as_exact_as_its_error_says(n_groups):
    """Two Poisson counts of zero a group: the optimum and its bound are known."""
    mean, sd = optimize.fsolve(
        lambda t: [
            -2 * np.exp(t[0] + t[1] ** 2 / 2) - t[0] / 4,
            1 - 2 * t[1] ** 2 * np.exp(t[0] + t[1] ** 2 / 2) - t[1] ** 2 / 4,
        ],
        [-1.5, 1.0],
    )
    ds = stream(np.repeat(np.arange(n_groups), 2), order_check="off")
    with pm.Model():
        rate = pm.Normal("a", 0, 2, shape=n_groups)[ds.as_tensor()[:, 0].astype("int64")]
        zeros = (0 * ds.as_tensor()[:, 0]).astype("int64")
        pm.Poisson("y", pm.math.exp(rate), observed=zeros, total_size=ds.total_size)
        approx = pm.MeanField()
    place(approx, np.full(n_groups, mean), np.full(n_groups, sd))
    report = check_fit(approx, ds)
    exact = n_groups * (
        -2 * np.exp(mean + sd**2 / 2)
        + stats.norm(0, 2).logpdf(mean)
        - sd**2 / 8
        + np.log(sd * np.sqrt(2 * np.pi * np.e))
    )
    assert report.verdict == "fine"
    assert abs(report.elbo - exact) < 3 * report.elbo_error < 6
