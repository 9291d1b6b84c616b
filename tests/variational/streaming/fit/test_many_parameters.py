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
"""Fits of many parameters, for which nothing of the size of a Hessian is made."""

from functools import partial

import numpy as np
import pytest

from scipy import optimize, stats

import pymc as pm

from pymc.variational import streaming
from tests.variational.streaming.fit.exact import Regression, place, stream

MODE = "NUMBA"

check_fit = partial(streaming.check_fit, progressbar=False)
polish = partial(streaming.polish, progressbar=False)


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
    """The intercept and the mean of 600 effects are known to 16 sd of the approximation only.

    The sample has 55 rows of each group, and the scales still are those of all rows.
    """
    rng = np.random.default_rng(0)
    n_groups, n_rows = 600, 150_000
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
    regression = Regression(600)
    ds = stream(regression.rows)
    with regression.model(ds):
        approx = pm.MeanField()
    place(approx, regression.mean, regression.mean_field_sd)
    report = check_fit(approx, ds)
    assert report.verdict == "fine"
    np.testing.assert_allclose(report.s, 0, atol=0.2)
    place(approx, regression.mean + regression.sd, 1.5 * regression.mean_field_sd)
    report = check_fit(approx, ds)
    # The precisions of the rest are spread, and only their mean is known.
    np.testing.assert_allclose(report.z, 1, atol=0.1)
    assert report.verdict == "one batch"


def test_the_lower_bound_is_as_exact_as_its_error_says():
    """Two Poisson counts of zero a group: the optimum and its bound are known."""
    mean, sd = optimize.fsolve(
        lambda t: [
            -2 * np.exp(t[0] + t[1] ** 2 / 2) - t[0] / 4,
            1 - 2 * t[1] ** 2 * np.exp(t[0] + t[1] ** 2 / 2) - t[1] ** 2 / 4,
        ],
        [-1.5, 1.0],
    )
    n_groups = 600
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


def moments(log_density, x) -> tuple[float, float]:
    """Return mean and standard deviation of a density on a grid."""
    weights = np.exp(log_density - np.max(log_density))
    mean = np.average(x, weights=weights)
    return mean, np.average((x - mean) ** 2, weights=weights) ** 0.5


def test_scales_of_effects_in_a_vector_have_the_sd_of_the_posterior():
    """Given the scales everything is normal, and they are integrated over a grid."""
    rng, n_groups, n_rows = np.random.default_rng(4), 300, 12_000
    group, x = rng.integers(n_groups, size=n_rows), rng.normal(size=n_rows)
    design, effects = np.column_stack([np.ones(n_rows), x]), rng.normal(size=(n_groups, 2))
    y = (design * effects[group] * [0.8, 0.4]).sum(axis=1) + rng.normal(size=n_rows)
    ds = stream(np.column_stack([group, x, y]), order_check="off")
    with pm.Model() as model:
        r, tau = ds.as_tensor(), pm.HalfNormal("tau", 1, shape=2)
        b = pm.Normal("b", 0, tau, shape=(n_groups, 2))[r[:, 0].astype("int64")]
        mean = b[:, 0] + b[:, 1] * r[:, 1]
        pm.Normal("y", mean, 1, observed=r[:, 2], total_size=ds.total_size)
    approx = pm.MeanField(model=model)
    report = polish(approx, ds)
    squares, sums = np.zeros((n_groups, 2, 2)), np.zeros((n_groups, 2))
    np.add.at(squares, group, design[:, :, None] * design[:, None])
    np.add.at(sums, group, design * y[:, None])
    grid = np.log([[0.8], [0.4]]) + np.linspace(-0.4, 0.4, 41)
    logp = np.empty((41, 41))
    for i, j in np.ndindex(logp.shape):
        log_tau = np.array([grid[0, i], grid[1, j]])
        covariance = np.linalg.inv(squares + np.diag(np.exp(-2 * log_tau)))
        fit = (
            np.linalg.slogdet(covariance)[1].sum()
            + (sums[:, None] @ covariance @ sums[..., None]).sum()
        )
        logp[i, j] = fit / 2 + (log_tau - n_groups * log_tau - np.exp(2 * log_tau) / 2).sum()
    for k in (0, 1):
        mean, sd = moments(np.logaddexp.reduce(logp, axis=1 - k), grid[k])
        assert report.names[k] == f"tau_log__[{k}]"
        assert approx.mean.eval()[k] == pytest.approx(mean, abs=0.1 * sd)
        assert report.sd[k] == pytest.approx(sd, rel=0.1)
    assert "not Gaussian" not in report.found


def test_a_mean_that_no_gaussian_has_is_told_of():
    """Two counts say little of a group: its density is skewed, and the more the wider."""
    rng, n_groups = np.random.default_rng(0), 1_000
    group = np.repeat(np.arange(n_groups), 2)
    y = rng.poisson(np.exp(0.7 * rng.normal(size=n_groups))[group])
    ds = stream(np.column_stack([group, y]), order_check="off")
    with pm.Model() as model:
        level = pm.Normal("level", 0, pm.HalfNormal("spread", 1), shape=n_groups)
        index, counts = (ds.as_tensor()[:, k].astype("int64") for k in (0, 1))
        pm.Poisson("y", pm.math.exp(level[index]), observed=counts, total_size=ds.total_size)
    approx = pm.MeanField(model=model)
    report = polish(approx, ds)
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    log_spread = np.linspace(-0.8, 0.2, 201)
    x = np.exp(log_spread)[:, None] * nodes
    logp = log_spread - np.exp(2 * log_spread) / 2
    for count, n in zip(*np.unique(np.bincount(group, y), return_counts=True)):
        logp += n * np.log(np.exp(count * x - 2 * np.exp(x)) @ weights)
    mean, sd = moments(logp, log_spread)
    assert report.names[0] == "spread_log__"
    assert abs(approx.mean.eval()[0] - mean) > 0.2 * sd
    assert report.verdict == "not Gaussian"
    assert "the mean of spread_log__ by about" in str(report)


def test_crossed_effects_have_the_sd_of_the_posterior():
    """Level and effects of users and items are known together only; everything is normal."""
    rng, n_users, n_items, n_rows = np.random.default_rng(0), 300, 250, 20_000
    user, item = rng.integers(n_users, size=n_rows), rng.integers(n_items, size=n_rows)
    y = 1 + rng.normal(size=n_users)[user] + rng.normal(size=n_items)[item]
    y += rng.normal(size=n_rows)
    ds = stream(np.column_stack([user, item, y]), 1_000, order_check="off")
    with pm.Model() as model:
        place, other = (ds.as_tensor()[:, k].astype("int64") for k in (0, 1))
        mean = pm.Normal("level", 0, 10) + pm.Normal("a", shape=n_users)[place]
        mean, y_rows = mean + pm.Normal("b", shape=n_items)[other], ds.as_tensor()[:, 2]
        pm.Normal("y", mean, 1, observed=y_rows, total_size=ds.total_size)
    approx = pm.MeanField(model=model)
    report = polish(approx, ds)
    precision = np.diag(np.r_[0.01, np.ones(n_users + n_items)])
    places = np.column_stack([np.zeros(n_rows, int), 1 + user, 1 + n_users + item])
    for j, k in np.ndindex(3, 3):
        np.add.at(precision, (places[:, j], places[:, k]), 1)
    sums = np.bincount(places.ravel(), np.repeat(y, 3))
    sd = np.diag(np.linalg.inv(precision)) ** 0.5
    z = (approx.mean.eval() - np.linalg.solve(precision, sums)) / sd
    np.testing.assert_allclose(z, 0, atol=0.1)
    np.testing.assert_allclose(report.sd, sd, rtol=0.05)
    assert report.verdict == "fine"
