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
"""``polish`` of posteriors that are not near a Gaussian."""

import numpy as np
import pytest

from scipy.special import polygamma

import pymc as pm

from pymc.variational.streaming import (
    StreamError,
    StreamingDataset,
    check_fit,
    polish,
)
from tests.variational.streaming.fit.exact import position

MODE = "NUMBA"


def funnel(ds, centred: bool) -> pm.Model:
    """Return a model of nine values that no row is about, and of the scale of these."""
    with pm.Model() as model:
        width = pm.Normal("width", 0, 3)
        if centred:
            pm.Normal("x", 0, pm.math.exp(width / 2), shape=9)
        else:
            pm.Deterministic("x", pm.math.exp(width / 2) * pm.Normal("z", 0, 1, shape=9))
        pm.Normal("y", pm.Normal("mu"), 1, observed=ds.as_tensor()[:, 0], total_size=ds.total_size)
    return model


def test_a_funnel_is_told_of_and_its_remedy_ends_right():
    """No Gaussian has the standard deviations of a funnel; non-centred, it is one."""
    rows = np.random.default_rng(0).normal(size=(2_000, 1))
    ds = StreamingDataset(rows, batch_size=100)
    report = polish(pm.MeanField(model=funnel(ds, centred=True)), ds, progressbar=False)
    assert report.verdict == "not Gaussian"
    assert "rises without end along width, a funnel of a scale" in str(report)
    assert "non-centred: a standard normal variable times the scale" in str(report)
    with pytest.raises(StreamError, match="the fit is not at its optimum"):
        report.full_rank()
    report = polish(pm.MeanField(model=funnel(ds, centred=False)), ds, progressbar=False)
    assert report.verdict == "fine"
    np.testing.assert_allclose(report.sd[1:-1], 1, rtol=0.01)
    assert report.sd[0] == pytest.approx(3, rel=0.01)


def test_a_skewed_posterior_is_told_of():
    """That of a rate of no events is exponential, and its logarithm has skewness -1.14."""
    ds = StreamingDataset(np.zeros((1_000, 1)), batch_size=100)
    with pm.Model() as model:
        rate, counts = pm.Exponential("rate", 1), ds.as_tensor()[:, 0].astype("int64")
        pm.Poisson("y", rate, observed=counts, total_size=ds.total_size)
    approx = pm.MeanField(model=model)
    report = polish(approx, ds, progressbar=False)
    assert position(approx)[0][0] == pytest.approx(-np.euler_gamma - np.log(1_001), abs=0.15)
    assert report.verdict == "not Gaussian"
    assert "rate_log__ has skewness -" in str(report)
    assert "Compare with pm.sample on a part of the rows" in str(report)


@pytest.mark.parametrize("family", [pm.MeanField, pm.FullRank])
def test_a_posterior_with_tails_ends_fine_and_a_check_agrees(family):
    """The mean of few normal rows has a t distribution, wider than the nearest Gaussian."""
    n = 12
    y = np.random.default_rng(n).normal(size=(n, 1))
    ds = StreamingDataset(y, batch_size=5, order_check="off")
    with pm.Model() as model:
        mu, sigma = pm.Flat("mu"), pm.HalfFlat("sigma")
        pm.Normal("y", mu, sigma, observed=ds.as_tensor()[:, 0], total_size=n)
    approx = family(model=model)
    exact = [y.std() * np.sqrt(1 / (n - 4)), np.sqrt(polygamma(1, n / 2 - 1)) / 2]
    for report in (polish(approx, ds, progressbar=False), check_fit(approx, ds, progressbar=False)):
        assert report.verdict == "fine"
        np.testing.assert_allclose(report.sd, exact, rtol=0.05)
        full = report.full_rank()
        np.testing.assert_allclose(np.diag(position(full)[1]) ** 0.5, report.sd)
    if family is pm.MeanField:
        report = check_fit(full, ds, progressbar=False)
        assert report.verdict == "fine"
        np.testing.assert_allclose(report.sd, exact, rtol=0.05)


@pytest.mark.parametrize("rows", [[3.0], [-5.0, -5.3, 6.0, 6.4, 5.9]], ids=["one", "two clumps"])
def test_heavy_tails_are_told_of(rows):
    """The sd of one Cauchy variable with this prior is 4.0; that of the nearest Gaussian is 1.6."""
    ds = StreamingDataset(np.array(rows)[:, None], batch_size=1)
    with pm.Model() as model:
        location, y = pm.Normal("location", 0, 20), ds.as_tensor()[:, 0]
        pm.Cauchy("y", location, 1, observed=y, total_size=ds.total_size)
    report = polish(pm.MeanField(model=model), ds, progressbar=False)
    assert report.verdict == "not Gaussian"
    assert "slowly along location" in str(report) or "location has skewness" in str(report)
    if len(rows) == 1:
        np.testing.assert_allclose(report.sd, 3.97, rtol=0.1)


def test_moments_are_those_of_a_skewed_posterior():
    """Its curvature changes by a third of itself within a step that needs no new one."""
    ds = StreamingDataset(np.zeros((20, 1)), batch_size=10)
    with pm.Model() as model:
        logit, event = pm.Normal("logit", 0, 3), ds.as_tensor()[:, 0]
        pm.Bernoulli("y", logit_p=logit, observed=event, total_size=ds.total_size)
    approx = pm.MeanField(model=model)
    report = polish(approx, ds, progressbar=False)
    x = np.linspace(-30, 15, 10_001)
    weights = np.exp(-(x**2) / 18 - 20 * np.logaddexp(0, x))
    mean = np.average(x, weights=weights)
    sd = np.sqrt(np.average((x - mean) ** 2, weights=weights))
    assert approx.mean.eval()[0] == pytest.approx(mean, abs=0.02 * sd)
    assert report.sd[0] == pytest.approx(sd, rel=0.04)


@pytest.mark.parametrize("n_users, n_items", [(60, 10), (500, 40)])
def test_factors_whose_signs_can_change_have_several_modes(n_users, n_items):
    """Of few parameters and of many; the sign of the level is known."""
    rng, n_rows = np.random.default_rng(0), 50 * n_users
    user, item = rng.integers(n_users, size=n_rows), rng.integers(n_items, size=n_rows)
    product = rng.normal(size=n_users)[user] * rng.normal(size=n_items)[item]
    y = 0.5 + product + rng.normal(size=n_rows)
    ds = StreamingDataset(np.column_stack([user, item, y]), batch_size=500, order_check="off")
    with pm.Model() as model:
        place, other = (ds.as_tensor()[:, k].astype("int64") for k in (0, 1))
        a, b = pm.Normal("a", shape=n_users)[place], pm.Normal("b", shape=n_items)[other]
        mean, y = pm.Normal("level") + a * b, ds.as_tensor()[:, 2]
        pm.Normal("y", mean, 1, observed=y, total_size=ds.total_size)
    report = polish(pm.MeanField(model=model), ds, progressbar=False)
    assert report.verdict == "several modes"


def test_a_second_mode_is_told_of():
    rows = np.random.default_rng(0).normal(2.0, 1.0, size=(5_000, 1))
    ds = StreamingDataset(rows, batch_size=100)
    with pm.Model() as model:
        mu = pm.Normal("mu", 0, 3)
        pm.Normal("y", mu**2, 1, observed=ds.as_tensor()[:, 0], total_size=ds.total_size)
    report = polish(pm.MeanField(model=model), ds, seed=2, progressbar=False)
    assert report.verdict == "several modes"
    assert "another mode that is as high" in str(report)
    assert "Order or bound the parameters" in str(report)
