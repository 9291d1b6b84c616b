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

from functools import partial

import numpy as np
import pytensor
import pytensor.tensor as pt
import pytest

from scipy import optimize

import pymc as pm

from pymc.variational import streaming
from pymc.variational.streaming import StreamError, StreamingDataset
from tests.variational.streaming.fit.exact import place, stream

check_fit = partial(streaming.check_fit, progressbar=False)
polish = partial(streaming.polish, progressbar=False)


def assert_errors(report, z, s, atol) -> None:
    np.testing.assert_allclose(report.z, z, atol=atol)
    np.testing.assert_allclose(report.s, s, atol=atol)


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
    def test_beta_binomial(self):
        """The best normal approximation is found by quadrature; draws see it within 0.01."""
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

    @pytest.mark.parametrize(
        "length, message",
        [
            (50, r"for a batch of 8 rows .*leave out what has another length"),
            (8, "with any number of rows, here 1; take lengths and coordinates"),
        ],
        ids=["of the batches", "of the rows that are tried"],
    )
    def test_a_model_of_a_fixed_number_of_rows_is_told_why(self, length, message):
        """It meets blocks of other lengths than its batches."""
        ds = stream(np.zeros(110), 50)
        with pm.Model():
            mean = pm.Normal("mu") * np.ones(length)
            pm.Normal("y", mean, 1, observed=ds.as_tensor()[:, 0], total_size=110)
            approx = pm.MeanField()
        with pytest.raises((AssertionError, TypeError, ValueError, StreamError)) as failed:
            check_fit(approx, ds)
        told = [str(failed.value), *getattr(failed.value, "__notes__", ())]
        assert re.search(message, "\n".join(told), re.DOTALL)

    def test_draws_beyond_the_support(self):
        ds = stream(np.arange(50) % 2, 10)
        with pm.Model():
            p = pm.Uniform("p", 0, 1, default_transform=None)
            pm.Bernoulli("y", p, observed=ds.as_tensor()[:, 0], total_size=50)
            approx = pm.MeanField()
        place(approx, 0.5, 1.0)
        with pytest.raises(StreamError, match=r"not finite at draws .* call polish\(approx, ds\)"):
            check_fit(approx, ds)
        assert polish(approx, ds).verdict == "fine"

    @pytest.mark.parametrize("finish", [check_fit, polish])
    @pytest.mark.parametrize(
        "bad, observed",
        [
            (-1, lambda mu, y: pm.Poisson("y", pt.exp(mu), observed=y, total_size=50)),
            (-1, lambda mu, y: pm.Normal("y", mu + pt.log(y), 1, observed=y, total_size=50)),
            (0, lambda mu, y: pm.Gamma("y", pt.exp(mu), 1, observed=y, total_size=50)),
        ],
        ids=["support", "logarithm", "pole"],
    )
    def test_a_row_without_a_likelihood_is_named_where_no_fit_was_made(self, finish, bad, observed):
        rows = np.arange(50.0) % 3 + 1
        rows[37] = bad
        ds = stream(rows, 10, order_check="off")
        with pm.Model():
            observed(pm.Normal("mu"), ds.as_tensor()[:, 0])
            approx = pm.MeanField()
        with pytest.raises(StreamError, match=r"row 37 of the stream .*leave such rows out"):
            finish(approx, ds)

    @pytest.mark.parametrize(
        "start, remedy",
        [(1.0, "set initval of the parameters on which"), (5.0, r"compare with pm\.sample on a")],
    )
    def test_a_support_that_depends_on_a_parameter_has_no_gaussian(self, start, remedy):
        """A start outside of the support is no fault of the rows."""
        ds = stream(np.random.default_rng(0).uniform(0, 3, 100), 50)
        with pm.Model():
            y, top = ds.as_tensor()[:, 0], pm.HalfNormal("top", 10, initval=start)
            pm.Uniform("y", 0, top, observed=y, total_size=100)
            approx = pm.MeanField()
        with pytest.raises(StreamError, match=remedy):
            polish(approx, ds)

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

    @pytest.mark.parametrize("n_rows", [5_000, 1_000_000])
    def test_a_stream_declared_endless_needs_rows(self, n_rows):
        """The rows that are read stand for 10,000, of whose posterior the sd is 0.02."""

        def blocks():
            rng = np.random.default_rng(9)
            while True:
                yield rng.normal(1, 2, size=(5_000, 1))

        ds = StreamingDataset(blocks, batch_size=100, total_size=10_000, endless=True)
        with pm.Model():
            mu = pm.Normal("mu", 0, 10)
            pm.Normal("y", mu, 2, observed=ds.as_tensor()[:, 0], total_size=ds.total_size)
            approx = pm.MeanField()
        place(approx, 1.0, 0.02)
        with pytest.raises(StreamError, match="'stream' has no end; pass rows=, the number"):
            check_fit(approx, ds)
        report = check_fit(approx, ds, rows=n_rows)
        assert report.rows == n_rows
        assert report.z_error == pytest.approx(100 / n_rows**0.5, rel=0.4)
        assert abs(report.z[0]) < 3 * report.z_error
        assert report.verdict == ("unknown" if n_rows == 5_000 else "fine")
        step = "Make more steps, or check more rows."
        assert (step in str(report)) == (n_rows == 5_000)
        place(approx, 1.0, 0.2)
        assert step in str(check_fit(approx, ds, rows=5_000))

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
