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

import itertools
import re

from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from importlib import import_module
from multiprocessing import get_context

import numpy as np
import pytensor
import pytest

from scipy import optimize, stats
from scipy.special import expit

import pymc as pm

from pymc.variational import streaming
from pymc.variational.streaming import (
    StreamError,
    StreamingDataset,
    StreamWarning,
    shuffle_buffer,
)

check_fit = partial(streaming.check_fit, progressbar=False)


@pytest.fixture(autouse=True)
def quick_compilation(request):
    """Compile for a few calls, but where the calls are many."""
    if request.cls in (TestManyParameters, TestSamples):
        yield
    else:
        with pytensor.config.change_flags(mode="FAST_COMPILE"):
            yield


def stream(rows, batch_size: int = 150, **kwargs) -> StreamingDataset:
    rows = np.asarray(rows, "float64")
    return StreamingDataset(
        rows if rows.ndim > 1 else rows[:, None], batch_size=batch_size, **kwargs
    )


def place(approx, mean, sd) -> None:
    """Give an approximation this mean, and standard deviations or a covariance."""
    shared = approx.groups[0].shared_params
    shared["mu"].set_value(np.atleast_1d(np.asarray(mean, "float64")))
    sd = np.atleast_1d(np.asarray(sd, "float64"))
    if sd.ndim == 1:
        shared["rho"].set_value(np.log(np.expm1(sd)))
    else:
        factor = np.linalg.cholesky(sd)
        np.fill_diagonal(factor, np.log(np.expm1(np.diag(factor))))
        shared["L_tril"].set_value(factor[np.tril_indices(len(sd))])


def position(approx) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and covariance of an approximation."""
    group = approx.groups[0]
    return group.mean.eval(), group.cov.eval()


def assert_errors(report, z, s, atol) -> None:
    np.testing.assert_allclose(report.z, z, atol=atol)
    np.testing.assert_allclose(report.s, s, atol=atol)


class Regression:
    """Normal likelihood with correlated columns; the posterior is normal and known."""

    n_rows = 1_011
    prior_sd, noise_sd = 5.0, 2.0

    def __init__(self, n_columns: int = 3):
        rng = np.random.default_rng(1)
        common = rng.normal(size=(self.n_rows, 1))
        x = common + 0.2 * rng.normal(size=(self.n_rows, n_columns))
        y = x @ np.arange(1.0, n_columns + 1) + self.noise_sd * rng.normal(size=self.n_rows)
        self.rows = np.column_stack([x, y])
        self.precision = x.T @ x / self.noise_sd**2 + np.eye(n_columns) / self.prior_sd**2
        self.covariance = np.linalg.inv(self.precision)
        self.mean = self.covariance @ x.T @ y / self.noise_sd**2
        self.sd = np.sqrt(np.diag(self.covariance))
        """Of the posterior."""
        self.mean_field_sd = np.diag(self.precision) ** -0.5
        self.evidence = (
            stats.norm(x @ self.mean, self.noise_sd).logpdf(y).sum()
            + stats.norm(0, self.prior_sd).logpdf(self.mean).sum()
            - stats.multivariate_normal(self.mean, self.covariance).logpdf(self.mean)
        )

    def model(self, ds, total_size=None) -> pm.Model:
        buf = ds.as_tensor()
        n_columns = len(self.mean)
        with pm.Model() as model:
            b = pm.Normal("b", 0, self.prior_sd, shape=n_columns)
            pm.Normal(
                "y",
                buf[:, :n_columns] @ b,
                self.noise_sd,
                observed=buf[:, n_columns],
                total_size=total_size or ds.total_size,
            )
        return model


@pytest.fixture(scope="module")
def regression() -> Regression:
    return Regression()


@pytest.fixture
def fit(regression):
    """Return a stream and a mean-field approximation at the optimum."""
    ds = stream(regression.rows)
    with regression.model(ds):
        approx = pm.MeanField()
    place(approx, regression.mean, regression.mean_field_sd)
    return ds, approx


@pytest.fixture
def full_rank_fit(regression):
    ds = stream(regression.rows)
    with regression.model(ds):
        approx = pm.FullRank()
    place(approx, regression.mean, regression.covariance)
    return ds, approx


class TestNormalPosterior:
    """Everything is exact where the posterior is normal."""

    def test_a_mean_field_fit_is_measured(self, regression, fit):
        """Correlations of 0.96 make the posterior three times as wide as the approximation.

        The scales are measured against the best of the family, and the lower bound falls short
        of the evidence by the divergence.
        """
        ds, approx = fit
        off, factor = np.array([2.0, -0.3, 0.0]), np.array([3.0, 1.0, 0.5])
        sd = factor * regression.mean_field_sd
        place(approx, regression.mean + off * regression.sd, sd)
        report = check_fit(approx, ds)
        assert_errors(report, off, 1 - factor**2, 1e-8)
        assert (report.names, report.rows) == (("b[0]", "b[1]", "b[2]"), 1_011)
        moved, ratio = off * regression.sd, regression.precision @ np.diag(sd**2)
        divergence = (
            np.trace(ratio) + moved @ regression.precision @ moved - 3 - np.linalg.slogdet(ratio)[1]
        ) / 2
        assert report.elbo == pytest.approx(regression.evidence - divergence, abs=1e-4)
        np.testing.assert_allclose(report.sd, regression.sd, rtol=1e-6)

    def test_a_full_rank_approximation_has_the_covariance_of_the_posterior(self, regression, fit):
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

    def test_a_full_rank_fit_is_measured(self, regression, full_rank_fit):
        ds, approx = full_rank_fit
        off = np.array([1.0, 0.2, -1.0])
        place(approx, regression.mean + off * regression.sd, 4 * regression.covariance)
        report = check_fit(approx, ds)
        assert_errors(report, off, -3, 1e-8)
        np.testing.assert_allclose(report.sd, regression.sd, rtol=1e-6)
        place(approx, regression.mean, regression.covariance)
        report = check_fit(approx, ds)
        assert_errors(report, 0, 0, 1e-8)
        assert report.elbo == pytest.approx(regression.evidence, abs=1e-4)
        assert report.elbo_error < 1e-6

    @pytest.mark.parametrize("n_columns, batch_size", [(1, 17), (3, 2_000), (64, 150)])
    def test_batches_of_any_size_and_models_of_up_to_64_parameters(self, n_columns, batch_size):
        regression = Regression(n_columns)
        ds = stream(regression.rows, batch_size)
        with regression.model(ds):
            approx = pm.MeanField()
        off = np.linspace(-1, 1, n_columns) + 0.1
        place(approx, regression.mean + off * regression.sd, 2 * regression.mean_field_sd)
        report = check_fit(approx, ds)
        assert_errors(report, off, -3, 1e-6)
        assert report.rows == 1_011

    def test_float32(self, regression):
        with pytensor.config.change_flags(floatX="float32"):
            ds = StreamingDataset(regression.rows, batch_size=150, dtype="float32")
            with regression.model(ds):
                approx = pm.MeanField()
            shared = approx.groups[0].shared_params
            shared["mu"].set_value((regression.mean + regression.sd).astype("float32"))
            rho = np.log(np.expm1(regression.mean_field_sd))
            shared["rho"].set_value(rho.astype("float32"))
            report = check_fit(approx, ds)
        np.testing.assert_allclose(report.z, 1, atol=1e-2)
        np.testing.assert_allclose(report.s, 0, atol=1e-3)
        moved = regression.sd @ regression.precision @ regression.sd
        ratio = regression.precision @ np.diag(regression.mean_field_sd**2)
        divergence = (np.trace(ratio) + moved - 3 - np.linalg.slogdet(ratio)[1]) / 2
        assert abs(report.elbo - (regression.evidence - divergence)) < 0.01


def best_normal(log_density, start: tuple[float, float]) -> tuple[float, float]:
    """Return mean and standard deviation of the normal that maximises the lower bound."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    weights = weights / weights.sum()

    def loss(parameters):
        mean, log_sd = parameters
        return -(weights @ log_density(mean + np.exp(log_sd) * nodes)) - log_sd

    best = optimize.minimize(
        loss,
        (start[0], np.log(start[1])),
        method="Nelder-Mead",
        options={"xatol": 1e-9, "fatol": 1e-12},
    ).x
    return best[0], np.exp(best[1])


class TestOtherPosteriors:
    """The best normal approximation is found by quadrature; draws see it within 0.01."""

    def test_beta_binomial(self):
        up = np.random.default_rng(2).random(10_001) < 0.1
        ds = stream(up)
        with pm.Model():
            p = pm.Beta("p", 2, 3)
            pm.Bernoulli("up", p, observed=ds.as_tensor()[:, 0], total_size=ds.total_size)
            approx = pm.MeanField()
        a, b = 2 + up.sum(), 3 + (~up).sum()
        best = best_normal(
            lambda x: -a * np.logaddexp(0, -x) - b * np.logaddexp(0, x), (np.log(a / b), 0.03)
        )
        place(approx, *best)
        report = check_fit(approx, ds)
        assert report.names == ("p_logodds__",)
        assert_errors(report, 0, 0, 0.01)
        place(approx, best[0] + 0.5 * best[1], 1.5 * best[1])
        report = check_fit(approx, ds)
        assert_errors(report, 0.5, -1.25, 0.05)
        assert abs(report.z[0] - 0.5) < report.optimum.step_error < 0.2


def hierarchical(y, group, **kwargs) -> pm.Model:
    with pm.Model() as model:
        top = pm.Normal("top", 0, 2)
        tau = pm.HalfNormal("tau", 1)
        theta = pm.Normal("theta", top, tau, shape=(2, 3))
        pm.Normal("y", theta.ravel()[group], 1, observed=y, **kwargs)
    return model


def test_hierarchical_models_agree_with_thousands_of_draws():
    """Of independent draws; either side is off by 0.07 or less at the variance of the funnel."""
    rng = np.random.default_rng(5)
    group = rng.integers(0, 6, 503)
    y = rng.normal(rng.normal(0, 1, 6)[group], 1)
    means = np.array([y[group == g].mean() for g in range(6)])
    mean = np.array([means.mean(), np.log(means.std()), *means + rng.normal(0, 0.05, 6)])
    sd = np.array([0.3, 0.3, *[0.1] * 6])
    ds = stream(np.column_stack([y, group]), 100)
    buf = ds.as_tensor()
    with hierarchical(buf[:, 0], buf[:, 1].astype("int64"), total_size=ds.total_size):
        approx = pm.MeanField()
    place(approx, mean, sd)
    report = check_fit(approx, ds)
    assert report.names[:3] == ("top", "tau_log__", "theta[0, 0]")
    z, s = brute_force(hierarchical(y, group), mean, sd, rng.normal(size=(1_500, 8)))
    assert_errors(report, z, s, 0.15)


def brute_force(model, mean, sd, draws) -> tuple[np.ndarray, np.ndarray]:
    dlogp = model.compile_dlogp()

    def gradient(x):
        return dlogp({"top": x[0], "tau_log__": x[1], "theta": x[2:].reshape(2, 3)})

    up, down = (np.array([gradient(mean + side * sd * d) for d in draws]) for side in (1, -1))
    slopes = np.linalg.lstsq(draws * sd, (up - down) / 2)[0]
    covariance = np.linalg.inv(-(slopes + slopes.T) / 2)
    z = -covariance @ (up + down).mean(0) / 2 / np.sqrt(np.diag(covariance))
    return z, 1 + sd**2 * np.diag(slopes)


class TestStreams:
    def test_buffer_and_position_are_left_alone_and_do_not_matter(self, fit):
        ds, approx = fit
        closed = check_fit(approx, ds)
        with ds:
            for _ in range(9):
                ds.advance()
            before, state = ds.as_tensor().get_value(), ds.state_dict()
            np.testing.assert_array_equal(check_fit(approx, ds).z, closed.z)
            np.testing.assert_array_equal(ds.as_tensor().get_value(), before)
            assert ds.state_dict() == state
            ds.advance()
            assert ds.rows_seen == 1_350

    def test_other_data_and_potentials_beside_the_stream(self, regression):
        """Five more rows, and a prior's worth of precision, go into the exact posterior."""
        ds = stream(regression.rows)
        more = np.random.default_rng(6).normal(size=(5, 4))
        model = regression.model(ds)
        with model:
            data = pm.Data("more", more)
            pm.Normal("other", data[:, :3] @ model["b"], 0.5, observed=data[:, 3])
            pm.Potential("ridge", -50 * (model["b"] ** 2).sum())
            approx = pm.MeanField()
        x, y = more[:, :3], more[:, 3]
        precision = regression.precision + x.T @ x / 0.5**2 + 100 * np.eye(3)
        mean = np.linalg.solve(precision, regression.precision @ regression.mean + x.T @ y / 0.5**2)
        place(approx, mean, np.diag(precision) ** -0.5)
        assert_errors(check_fit(approx, ds), 0, 0, 1e-8)

    @pytest.fixture
    def two(self):
        """Return two streams of one mean, and the fit of their common posterior."""
        rng = np.random.default_rng(7)
        y, z = rng.normal(1, 1, 500), rng.normal(1, 2, 1_300)
        streams = [stream(y, 100, name="y"), stream(z, 130, name="z")]
        with pm.Model():
            mu = pm.Normal("mu", 0, 1)
            for ds, sd in zip(streams, (1, 2)):
                name, rows = ds.as_tensor().name, ds.as_tensor()[:, 0]
                pm.Normal(name + "_rows", mu, sd, observed=rows, total_size=ds.total_size)
            approx = pm.MeanField()
        precision = 1 + 500 + 1_300 / 4
        place(approx, (y.sum() + z.sum() / 4) / precision, precision**-0.5)
        return streams, approx

    def test_several_streams(self, two):
        """One that did not move shows, although the other did."""
        streams, approx = two
        report = check_fit(approx, streams)
        assert_errors(report, 0, 0, 1e-8)
        assert report.rows == 1_800
        assert report.verdict == "fine"
        place(approx, 9.0, 0.05)
        with streams[0] as moved:
            moved.advance()
            moved.advance()
            assert check_fit(approx, streams).verdict == "one batch"

    def test_a_stream_that_is_left_out(self, two):
        """Its buffer holds one batch, which would count as all rows.

        Transforming a model copies its shared variables.
        """
        (first, second), approx = two
        with pm.do(approx.model, {}):
            copied = pm.MeanField()
        with second:
            second.advance()
            for fitted in (approx, copied):
                with pytest.raises(
                    StreamError, match=r"'z_rows' depends on the stream 'z', .* pass"
                ):
                    check_fit(fitted, first)

    def test_minibatches_beside_the_stream(self, regression):
        ds = stream(regression.rows)
        with regression.model(ds) as model:
            batch = pm.Minibatch(np.arange(50.0), batch_size=5)
            pm.Normal("other", model["b"][0], observed=batch, total_size=50)
            approx = pm.MeanField()
        with pytest.raises(StreamError, match=r"'other' depends on random draws, .* all rows"):
            check_fit(approx, ds)

    @pytest.mark.parametrize("n_rows, meets", [(110, 1), (25_600, 100)])
    def test_a_model_of_a_fixed_number_of_rows_is_told_why(self, n_rows, meets):
        """It meets blocks of other lengths than its batches."""
        ds = stream(np.zeros(n_rows), 50)
        with pm.Model():
            mean = pm.Normal("mu") * np.ones(50)
            pm.Normal("y", mean, 1, observed=ds.as_tensor()[:, 0], total_size=n_rows)
            approx = pm.MeanField()
        with pytest.raises((AssertionError, TypeError, ValueError)) as failed:
            check_fit(approx, ds)
        note = f"'stream' is evaluated with any number of rows, here {meets}; take lengths and coordinates"
        assert note in failed.value.__notes__[-1]

    def test_draws_beyond_the_support(self):
        ds = stream(np.arange(50) % 2, 10)
        with pm.Model():
            p = pm.Uniform("p", 0, 1, default_transform=None)
            pm.Bernoulli("y", p, observed=ds.as_tensor()[:, 0], total_size=50)
            approx = pm.MeanField()
        place(approx, 0.5, 1.0)
        with pytest.raises(
            StreamError, match=r"not finite at draws .* keep the default transforms"
        ):
            check_fit(approx, ds)

    def test_a_potential_of_the_stream(self, regression):
        ds = stream(regression.rows)
        with regression.model(ds) as model:
            pm.Potential("p", (model["b"][0] * ds.as_tensor()[:, 0]).sum())
            approx = pm.MeanField()
        with pytest.raises(StreamError, match=r"'p' depends on a stream but is not observed"):
            check_fit(approx, ds)

    def test_a_stream_that_never_ends(self, regression):
        ds = StreamingDataset(
            lambda: itertools.repeat(regression.rows), batch_size=150, total_size=1_011
        )
        with regression.model(ds):
            approx = pm.MeanField()
        with pytest.raises(StreamError, match=r"total_size=1011 but gave \d+ rows and has not end"):
            check_fit(approx, ds, progressbar=False)

    def test_what_is_no_fit_or_no_dataset(self, regression, fit):
        ds, approx = fit
        with pytest.raises(TypeError, match=r"approx is str; pass what pm.fit returned"):
            check_fit("approx", ds)
        with pytest.raises(TypeError, match=r"ds=ndarray\(...\) is not a StreamingDataset"):
            check_fit(approx, regression.rows)
        with approx.model:
            particles = pm.Empirical(size=10)
        with pytest.raises(TypeError, match="neither a MeanField nor a FullRank"):
            check_fit(particles, ds)


class TestManyParameters:
    """Beyond 256 parameters nothing of the size of a Hessian is made."""

    def test_a_ridge_of_group_effects_shows_its_whole_length(self):
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

    def test_scales_of_correlated_columns_are_right_at_the_optimum(self):
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

    @pytest.mark.parametrize("n_groups", [65, 300])
    def test_the_lower_bound_is_as_exact_as_its_error_says(self, n_groups):
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


@pytest.fixture(scope="module")
def rare():
    """Return rows of a level that 1 of 3,000 rows has, and the posterior."""
    rng = np.random.default_rng(3)
    x = rng.normal(size=150_000)
    level = rng.random(len(x)) < 1 / 3_000
    design = np.column_stack([np.ones(len(x)), x, level])
    up = rng.random(len(x)) < expit(design @ [0.2, -0.5, 0.8])
    b = np.zeros(3)
    for _ in range(8):
        p = expit(design @ b)
        precision = design.T @ (design * (p * (1 - p))[:, None]) + np.eye(3) / 9
        b = b + np.linalg.solve(precision, design.T @ (up - p) - b / 9)
    return np.column_stack([x, level, up]), b, precision


class TestSamples:
    """Curvature of 150,000 rows, of which 32,768 are held in memory."""

    def fit(self, rows):
        ds = StreamingDataset(
            shuffle_buffer(rows, buffer_size=10_000, batch_size=500, seed=0),
            batch_size=500,
            order_check="off",
        )
        buf = ds.as_tensor()
        with pm.Model():
            b = pm.Normal("b", 0, 3, shape=3)
            logit = b[0] + b[1] * buf[:, 0] + b[2] * buf[:, 1]
            pm.Bernoulli("up", logit_p=logit, observed=buf[:, 2], total_size=ds.total_size)
            approx = pm.MeanField()
        return ds, approx

    def test_a_level_that_the_sample_has_few_rows_of(self, rare):
        rows, mode, precision = rare
        sd = np.diag(np.linalg.inv(precision)) ** 0.5
        ds, approx = self.fit(rows)
        place(approx, mode + np.array([0, 0.5, 2]) * sd, np.diag(precision) ** -0.5)
        report = check_fit(approx, ds)
        np.testing.assert_allclose(report.z, [0, 0.5, 2], atol=0.15)
        np.testing.assert_allclose(report.s, 0, atol=0.08)
        np.testing.assert_allclose(report.sd, sd, rtol=0.03)

    def test_a_quick_look_has_an_error_that_covers_it(self, rare):
        """Of a tenth of the rows, by which the means are known to 3 posterior sd."""
        rows, mode, precision = rare
        ds, approx = self.fit(rows)
        place(approx, mode, np.diag(precision) ** -0.5)
        report = check_fit(approx, ds, rows=15_000)
        assert report.rows == 15_000
        assert 1.5 < report.z_error < 6
        assert np.abs(report.z).max() < 3 * report.z_error
        assert report.verdict == "unknown"
        assert "Check all rows" in str(report)
        whole = check_fit(approx, ds)
        assert abs(report.elbo - whole.elbo) < 3 * report.elbo_error

    def test_workers_give_the_same_numbers(self, rare):
        ds, approx = self.fit(rare[0])
        expected = check_fit(approx, ds)
        spawn = get_context("spawn")
        processes = ProcessPoolExecutor(
            1, mp_context=spawn, initializer=import_module, initargs=("tests",)
        )
        with ThreadPoolExecutor(2) as threads, processes:
            for executor in (threads, processes):
                report = check_fit(approx, ds, executor=executor)
                np.testing.assert_array_equal(report.z, expected.z)
                assert (report.elbo, report.rows) == (expected.elbo, expected.rows)


class TestVerdict:
    @pytest.fixture
    def moved_fit(self, regression):
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
    def test_causes_are_told_apart(self, regression, moved_fit, off, factor, verdict, text):
        """The noise of one batch in twenty hides 1 sd, and not 20."""
        ds, approx = moved_fit
        move = off * regression.sd * [1, 0, 0]
        place(approx, regression.mean + move, factor * regression.mean_field_sd)
        report = check_fit(approx, ds)
        assert report.verdict == verdict
        assert re.search(text, str(report), re.DOTALL)
        assert "1,011 rows; ELBO" in str(report)

    def test_a_stream_that_never_moved_or_was_made_anew(self, regression, fit):
        ds, approx = fit
        place(approx, regression.mean + regression.sd, regression.mean_field_sd)
        report = check_fit(approx, ds)
        assert report.verdict == "one batch"
        assert "another dataset, as\nbefore a restart, use ds.load_state" in str(report)
        ds.load_state_dict(ds.state_dict() | {"offset": 150, "rows_seen": 150})
        assert check_fit(approx, ds).verdict != "one batch"

    def test_a_wrong_size_shows_in_the_rows_and_in_the_scales(self, regression):
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
        assert_errors(report, 0, 0.5, 0.05)

    def test_no_total_size(self):
        with pytest.warns(StreamWarning, match="total_size=None"):
            ds = stream(np.zeros(10), 4, total_size=None)
        with pm.Model():
            pm.Normal("y", pm.Normal("mu"), observed=ds.as_tensor()[:, 0])
            report = check_fit(pm.MeanField(), ds)
        assert report.verdict == "wrong size"
        assert "has no total_size, but the stream holds 10 rows: pass total_size=10" in str(report)

    @pytest.mark.parametrize("ordered", [True, False])
    def test_order_that_moves_the_gradient_is_found(self, regression, ordered):
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

    def test_a_distance_from_afar_may_itself_be_off(self):
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
    def test_where_there_is_no_maximum_no_fit_is_fine(self, at, prior_sd, verdict, text):
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

    def test_correlations_that_are_wrong_beside_right_scales(self, regression, full_rank_fit):
        ds, approx = full_rank_fit
        place(approx, regression.mean, np.diag(np.diag(regression.covariance)))
        report = check_fit(approx, ds)
        assert np.abs(report.s).max() < 1e-6
        assert report.verdict == "scales off"

    def test_plot_shows_every_parameter(self, fit):
        matplotlib = pytest.importorskip("matplotlib")
        matplotlib.use("Agg")
        ds, approx = fit
        report = check_fit(approx, ds)
        left, right = report.plot()
        assert [label.get_text() for label in left.get_yticklabels()] == ["b[0]", "b[1]", "b[2]"]
        for ax, values in ((left, report.z), (right, report.s)):
            np.testing.assert_array_equal(ax.collections[-1].get_offsets()[:, 0], values)
        matplotlib.pyplot.close(left.figure)
