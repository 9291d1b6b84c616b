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

import re

from functools import partial

import numpy as np
import pytest

import pymc as pm

from pymc.variational import streaming
from pymc.variational.streaming import StreamError, StreamWarning
from tests.variational.streaming.fit.exact import place, position, stream

check_fit = partial(streaming.check_fit, progressbar=False)


def test_a_full_rank_approximation_has_the_covariance_of_the_posterior(regression, fit):
    """It is ready for predictions; the mean-field fit is up to 3 times too narrow."""
    ds, approx = fit
    report = check_fit(approx, ds)
    assert report.verdict == "fine"
    ratio = (regression.sd / regression.mean_field_sd).max()
    assert report.narrowness == pytest.approx(ratio, rel=1e-6)
    assert f"fine, but the family is up to {ratio:.3g} times too narrow" in str(report)
    assert "Use report.full_rank()" in str(report)
    mean, covariance = position(report.full_rank())
    np.testing.assert_allclose(mean, regression.mean)
    np.testing.assert_allclose(covariance, regression.covariance, rtol=1e-6)
    place(approx, regression.mean + 1, regression.mean_field_sd)
    with pytest.raises(StreamError, match="approx has changed since it was checked"):
        report.full_rank()
    with pytest.raises(StreamError, match=r"not at its optimum .*; Call polish"):
        check_fit(approx, ds).full_rank()


@pytest.fixture
def moved_fit(regression):
    ds = stream(regression.rows, 50)
    with regression.model(ds), ds:
        approx = pm.MeanField()
        ds.advance()
        ds.advance()
        yield ds, approx


@pytest.mark.parametrize(
    "off, factor, verdict, text",
    [
        (0.2, 1.04, "fine", "at most 0.2 posterior sd off, the scales 4 %"),
        (0.2, 1.1, "scales off", r"scales off by up to a factor of 1.1\.\nCall polish"),
        (1.0, 1.1, "last-iterate noise", "is 1 posterior sd off, .*\nCall polish"),
        (20.0, 1.1, "not converged", "is 20 posterior sd off, and the scales are off by"),
        (0.1, 5.0, "not converged", "scales are off by up to a factor of 5"),
    ],
)
def test_causes_are_told_apart(regression, moved_fit, off, factor, verdict, text):
    """The noise of one batch in twenty hides 1 sd, and not 20."""
    ds, approx = moved_fit
    move = off * regression.sd * [1, 0, 0]
    place(approx, regression.mean + move, factor * regression.mean_field_sd)
    report = check_fit(approx, ds)
    assert report.verdict == verdict
    assert re.search(text, str(report), re.DOTALL)
    assert "1,011 rows; ELBO" in str(report)


def test_a_stream_that_never_moved_or_was_made_anew(regression, fit):
    ds, approx = fit
    place(approx, regression.mean + regression.sd, regression.mean_field_sd)
    report = check_fit(approx, ds)
    assert report.verdict == "one batch"
    assert "another dataset, as\nbefore a restart, use ds.load_state" in str(report)
    ds.load_state_dict(ds.state_dict() | {"offset": 150, "rows_seen": 150})
    assert check_fit(approx, ds).verdict != "one batch"


def test_a_wrong_size_shows_in_the_rows_and_in_the_scales(regression):
    wrong = 2 * regression.n_rows
    ds = stream(regression.rows)
    with regression.model(ds, total_size=wrong):
        approx = pm.MeanField()
    weight = wrong / ds.total_size
    prior = np.eye(3) / regression.prior_sd**2
    precision = weight * (regression.precision - prior) + prior
    mean = weight * np.linalg.solve(precision, regression.precision @ regression.mean)
    place(approx, mean, np.diag(precision) ** -0.5)
    report = check_fit(approx, ds)
    assert report.verdict == "wrong size"
    assert f"total_size={wrong:,}, but the stream holds 1,011 rows" in str(report)
    np.testing.assert_allclose(report.s, 0.5, atol=0.05)
    np.testing.assert_allclose(report.z, 0, atol=0.05)


def test_no_total_size():
    with pytest.warns(StreamWarning, match="total_size=None"):
        ds = stream(np.zeros(10), 4, total_size=None)
    with pm.Model():
        pm.Normal("y", pm.Normal("mu"), observed=ds.as_tensor()[:, 0])
        report = check_fit(pm.MeanField(), ds)
    assert report.verdict == "wrong size"
    assert "has no total_size, but the stream holds 10 rows: pass total_size=10" in str(report)


@pytest.mark.parametrize("ordered", [True, False])
def test_order_that_moves_the_gradient_is_found(regression, ordered):
    residual = regression.rows[:, 3] - regression.rows[:, :3] @ regression.mean
    noise = np.random.default_rng(8).normal(0, 1, len(residual))
    order = np.argsort(residual * regression.rows[:, 0] + noise)
    rows = regression.rows[order] if ordered else regression.rows
    ds = stream(rows, 10, order_check="off")
    with regression.model(ds), ds:
        approx = pm.MeanField()
        ds.advance()
        ds.advance()
        place(approx, regression.mean + 3 * regression.sd, regression.mean_field_sd)
        report = check_fit(approx, ds)
    assert report.verdict == ("ordered rows" if ordered else "last-iterate noise")
    assert ("times as much along the" in str(report)) == ordered


def test_a_distance_from_afar_may_itself_be_off():
    """The log-likelihood of a Poisson rate is far from quadratic at a tenth of the rate."""
    ds = stream(np.full(1_000, 20.0))
    with pm.Model():
        rate = pm.LogNormal("rate", 0, 3)
        pm.Poisson(
            "y", rate, observed=ds.as_tensor()[:, 0].astype("int64"), total_size=ds.total_size
        )
        approx = pm.MeanField()
    place(approx, np.log(2.0), 0.05)
    assert "z may itself be off by" in str(check_fit(approx, ds))


@pytest.mark.parametrize(
    "at, prior_sd, verdict, text",
    [
        (0.0, 1.0, "not concave", r"not concave around the fit, .*\nCall polish\(approx, ds\)"),
        (0.0, 1e9, "flat direction", "leave x open: .*\nGive it a narrower prior"),
    ],
)
def test_where_there_is_no_maximum_no_fit_is_fine(at, prior_sd, verdict, text):
    """Between two modes, and where neither rows nor prior say anything."""
    ds = stream(np.zeros(40), 10)
    with pm.Model(), ds:
        x = pm.Normal("x", 0, prior_sd)
        mean = x**2 - 1 if verdict == "not concave" else 0 * x
        if verdict == "flat direction":
            mean = mean + pm.Normal("mu")
        pm.Normal("y", mean, 0.1, observed=ds.as_tensor()[:, 0], total_size=ds.total_size)
        approx = pm.MeanField()
        ds.advance()
        ds.advance()
        place(approx, np.zeros(approx.ndim), np.full(approx.ndim, 0.02))
        report = check_fit(approx, ds)
    assert report.verdict == verdict
    assert re.search(text, str(report), re.DOTALL)
    with pytest.raises(StreamError, match="not at its optimum"):
        report.full_rank()


def test_correlations_that_are_wrong_beside_right_scales(regression, full_rank_fit):
    ds, approx = full_rank_fit
    place(approx, regression.mean, np.diag(np.diag(regression.covariance)))
    report = check_fit(approx, ds)
    assert np.abs(report.s).max() < 1e-6
    assert report.verdict == "scales off"


def test_plot_shows_every_parameter(fit):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    ds, approx = fit
    report = check_fit(approx, ds)
    left, right = report.plot()
    assert [label.get_text() for label in left.get_yticklabels()] == ["b[0]", "b[1]", "b[2]"]
    for ax, values in ((left, report.z), (right, report.s)):
        np.testing.assert_array_equal(ax.collections[-1].get_offsets()[:, 0], values)
    matplotlib.pyplot.close(left.figure)
