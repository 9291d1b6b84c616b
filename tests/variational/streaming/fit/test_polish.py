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
"""Polished fits against exact posteriors."""

import itertools

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytensor
import pytest

import pymc as pm

from pymc.variational._streaming.fit import search
from pymc.variational.streaming import (
    CheckNoiseFloor,
    StreamError,
    StreamingDataset,
    check_fit,
    polish,
)
from tests.variational.streaming.fit.exact import place, position

MODE = "NUMBA"
N_ROWS = 300_000
"""More than a sample, so that the last steps are on all rows."""


@pytest.fixture(scope="module")
def logistic():
    """Return rows in order of time with a rare level, and the exact posterior by Newton."""
    rng = np.random.default_rng(0)
    time = np.linspace(-1, 1, N_ROWS)
    rare = np.zeros(N_ROWS)
    rare[rng.choice(N_ROWS, 60, replace=False)] = 1
    x = time + rng.normal(size=N_ROWS)
    p = 1 / (1 + np.exp(-(-0.5 + 0.4 * x + 0.8 * rare + np.sin(3 * time))))
    rows = np.column_stack([x, rare, rng.random(N_ROWS) < p]).astype("float64")
    design = np.column_stack([np.ones(N_ROWS), rows[:, :2]])
    b = np.zeros(3)
    for _ in range(20):
        p = 1 / (1 + np.exp(-design @ b))
        hessian = design.T @ (design * (p * (1 - p))[:, None]) + np.eye(3) / 9
        b = b + np.linalg.solve(hessian, design.T @ (rows[:, 2] - p) - b / 9)
    return rows, b, np.linalg.inv(hessian)


def logistic_model(rows, prior=None):
    ds = StreamingDataset(rows, batch_size=1_000, order_check="off")
    with pm.Model() as model:
        b = pm.Flat("b", shape=3) if prior else pm.Normal("b", 0, 3, shape=3)
        r = ds.as_tensor()
        logit = b[0] + b[1] * r[:, 0] + b[2] * r[:, 1]
        pm.Bernoulli("y", logit_p=logit, observed=r[:, 2], total_size=ds.total_size)
    return ds, model


@pytest.fixture(scope="module")
def polished(logistic):
    """Polish within a limit on passes, and let workers go on where it ended."""
    ds, model = logistic_model(logistic[0])
    approx = pm.MeanField(model=model)
    positions = [position(approx)[0]]
    limited = polish(approx, ds, max_passes=2, progressbar=False)
    positions.append(position(approx)[0])
    with ThreadPoolExecutor(2) as executor:
        report = polish(approx, ds, executor=executor, progressbar=False)
    return report, approx, limited, positions


def test_new_approximation_ends_at_the_posterior_of_ordered_rows(logistic, polished):
    _, mode, covariance = logistic
    report, approx, limited, _ = polished
    sd = np.sqrt(np.diag(covariance))
    # The mode of 60 rows is some 0.1 sd from their mean.
    np.testing.assert_allclose((position(approx)[0] - mode) / sd, 0, atol=0.15)
    np.testing.assert_allclose(report.sd, sd, rtol=0.05)
    assert report.verdict == "fine"
    assert limited.passes + report.passes < 12
    assert (report.notes, report.found) == ((), {})


def test_full_rank_approximation_has_the_covariance_of_the_posterior(logistic, polished):
    report, approx, *_ = polished
    mean, covariance = position(report.full_rank())
    np.testing.assert_allclose(mean, position(approx)[0])
    np.testing.assert_allclose(covariance, report.covariance())
    squares = np.outer(*2 * [np.sqrt(np.diag(logistic[2]))])
    np.testing.assert_allclose(covariance / squares, logistic[2] / squares, atol=0.05)


def test_a_row_costs_the_gradients_of_one_hessian(logistic, monkeypatch):
    calls, term, read = [], search.Term, search.sum_over_rows
    evaluate = term.value_and_gradient

    def counted(*args, **kwargs):
        with monkeypatch.context() as patch:
            patch.setattr(term, "value_and_gradient", lambda *a: calls.append(a) or evaluate(*a))
            return read(*args, **kwargs)

    monkeypatch.setattr(search, "sum_over_rows", counted)
    monkeypatch.setattr("pymc.variational._streaming.fit.polish.SIZES", (4_096, 16_384))
    # Coefficients are correlated, and no level is rare.
    ds, model = logistic_model(logistic[0] + np.tile([[30, 1, 0], [30, 0, 0]], (N_ROWS // 2, 1)))
    assert polish(pm.MeanField(model=model), ds, progressbar=False).verdict == "fine"
    assert 7 * N_ROWS < sum(len(rows) for *_, rows in calls) <= 11 * N_ROWS


def test_a_limit_on_passes_is_reported_and_leaves_no_worse_fit(logistic, polished):
    _, mode, covariance = logistic
    limited, (before, after) = polished[2:]
    assert "ended by max_passes=2" in str(limited)
    assert "Call polish(approx, ds) with a higher max_passes" in str(limited)
    offs = [np.abs(x - mode) / np.sqrt(np.diag(covariance)) for x in (after, before)]
    assert offs[0].max() <= offs[1].max()


def test_separated_outcomes_without_a_prior_are_told_of(logistic):
    rows = logistic[0][:2_000].copy()
    rows[:, 2] = rows[:, 0] > 0.1
    ds, model = logistic_model(rows, prior="flat")
    report = polish(pm.MeanField(model=model), ds, progressbar=False)
    assert report.verdict == "flat direction"
    assert "does not fall off along b[" in str(report)
    assert "Give it a narrower prior" in str(report)


def test_a_sum_of_parameters_without_priors_is_called_what_the_check_calls_it():
    """Two directions are told apart: one that nothing is known of, and one by its priors alone."""
    ds = StreamingDataset(np.random.default_rng(0).normal(size=(20_000, 1)), batch_size=100)

    def two_means(prior):
        with pm.Model() as model:
            a, b = prior("a"), prior("b")
            pm.Normal("y", a + b, 2, observed=ds.as_tensor()[:, 0], total_size=ds.total_size)
        return pm.MeanField(model=model)

    report = polish(two_means(pm.Flat), ds, progressbar=False)
    assert report.verdict == "flat direction"
    for _ in range(2):  # as a fit does
        ds.advance()
    assert check_fit(two_means(pm.Flat), ds, progressbar=False).verdict == report.verdict
    report = polish(two_means(lambda name: pm.Normal(name, 0, 10)), ds, progressbar=False)
    assert report.verdict == "fine"
    np.testing.assert_allclose(report.sd, 10 / np.sqrt(2), rtol=0.01)


def test_units_of_features_do_not_matter(logistic):
    """Far from the mode of huge features, the likelihood has no curvature, or no finite one."""
    unit = 1e9
    rows = logistic[0][:2_000] * np.array([unit, 1, 1])
    ds, model = logistic_model(rows)
    approx = pm.MeanField(model=model)
    report = polish(approx, ds, progressbar=False)
    design, b = np.column_stack([np.ones(2_000), logistic[0][:2_000, :2]]), np.zeros(3)
    prior = np.array([1 / 9, 0, 1 / 9])
    for _ in range(20):
        p = 1 / (1 + np.exp(-design @ b))
        hessian = design.T @ (design * (p * (1 - p))[:, None]) + np.diag(prior)
        b = b + np.linalg.solve(hessian, design.T @ (rows[:, 2] - p) - prior * b)
    sd = np.sqrt(np.diag(np.linalg.inv(hessian)))
    units = np.array([1, unit, 1])
    common = slice(2)  # few of these rows have the rare level, whose posterior is skewed
    np.testing.assert_allclose(((position(approx)[0] * units - b) / sd)[common], 0, atol=0.1)
    np.testing.assert_allclose((report.sd * units)[common], sd[common], rtol=0.02)
    assert report.verdict == "fine"


def test_units_of_values_do_not_matter():
    rows = 1e12 * np.random.default_rng(0).normal(3, 1, size=(500, 1))
    ds = StreamingDataset(rows, batch_size=100)
    with pm.Model() as model:
        mu, sigma = pm.Normal("mu", 0, 1e13), pm.HalfNormal("sigma", 1e13)
        pm.Normal("y", mu, sigma, observed=ds.as_tensor()[:, 0], total_size=ds.total_size)
    report = polish(pm.MeanField(model=model), ds, progressbar=False)
    assert report.verdict == "fine"
    np.testing.assert_allclose(
        report.sd, [rows.std() / np.sqrt(500), 1 / np.sqrt(1_000)], rtol=0.02
    )


def test_a_fit_starts_elsewhere_where_the_gradient_is_not_finite():
    """That of a censored Weibull variable overflows where this model starts."""
    rng = np.random.default_rng(0)
    rows = np.minimum(3 * rng.weibull(1.5, size=500), 4.0)[:, None]
    ds = StreamingDataset(rows, batch_size=100)
    with pm.Model() as model:
        lifetime = pm.Weibull.dist(pm.HalfNormal("k", 5), pm.math.exp(pm.Normal("a", 0, 5)))
        y, size = ds.as_tensor()[:, 0], ds.total_size
        pm.Censored("y", lifetime, lower=None, upper=4.0, observed=y, total_size=size)
    approx = pm.MeanField(model=model)
    report = polish(approx, ds, progressbar=False)
    assert report.verdict == "fine"
    assert position(approx)[0] == pytest.approx(np.log([1.5, 3]), abs=0.15)


def test_a_multivariate_likelihood_needs_no_fit_before():
    """Before one the buffer holds no rows, on which linear algebra cannot be evaluated.

    A fit that diverged is as good as none.
    """
    rows = np.random.default_rng(0).normal(1.0, 1.0, size=(1_000, 2))
    ds = StreamingDataset(rows, batch_size=100)
    with pm.Model() as model:
        mu = pm.Normal("mu", 0, 10, shape=2)
        pm.MvNormal("y", mu, cov=np.eye(2), observed=ds.as_tensor(), total_size=ds.total_size)
    approx = pm.MeanField(model=model)
    place(approx, [np.nan, np.nan], [1.0, np.nan])
    report = polish(approx, ds, progressbar=False)
    assert report.verdict == "fine"
    np.testing.assert_allclose(position(approx)[0], rows.mean(axis=0), atol=0.1 * report.sd[0])
    np.testing.assert_allclose(report.sd, 1 / np.sqrt(1_000), rtol=0.01)


def test_priors_can_be_variables_of_pymc_dims():
    """Their log density is no tensor, but a variable with dimensions."""
    pmd = pytest.importorskip("pymc.dims")
    rows = np.random.default_rng(0).normal(1.0, 1.0, size=(1_000, 1))
    ds = StreamingDataset(rows, batch_size=100)
    with pm.Model() as model:
        mu, y = pmd.Normal("mu", mu=0, sigma=10), ds.as_tensor()[:, 0]
        pm.Normal("y", mu.values, 1, observed=y, total_size=ds.total_size)
    report = polish(pm.MeanField(model=model), ds, progressbar=False)
    assert report.verdict == "fine"
    np.testing.assert_allclose(report.sd, 1 / np.sqrt(1_000), rtol=0.01)


def test_random_starts_without_a_gradient_are_passed_over():
    """The scale of effects of a censored Weibull variable overflows at one of them."""
    rng, n = np.random.default_rng(7), 300
    group, time = rng.integers(8, size=n), 3 * rng.weibull(1.4, size=n)
    limit = rng.uniform(1, 10, size=n)
    rows = np.column_stack([group, np.minimum(time, limit), limit])
    ds = StreamingDataset(rows, batch_size=100, order_check="off")
    with pm.Model() as model:
        r, spread = ds.as_tensor(), pm.HalfNormal("spread", 1)
        effect = pm.Normal("effect", 0, spread, shape=8)[r[:, 0].astype("int64")]
        scale = pm.math.exp(pm.Normal("a", 0, 2) + effect)
        lifetime = pm.Weibull.dist(alpha=pm.HalfNormal("k", 3), beta=scale)
        size = ds.total_size
        pm.Censored("y", lifetime, lower=None, upper=r[:, 2], observed=r[:, 1], total_size=size)
    report = polish(pm.MeanField(model=model), ds, progressbar=False)
    assert np.isfinite(report.z).all()


def test_a_stream_without_end_is_refused():
    def blocks():
        rng = np.random.default_rng(0)
        while True:
            yield rng.normal(1, 2, size=(500, 1))

    def fitted(ds):
        with pm.Model():
            mu = pm.Normal("mu", 0, 10)
            pm.Normal("y", mu, 2, observed=ds.as_tensor()[:, 0], total_size=ds.total_size)
            return polish(pm.MeanField(), ds, progressbar=False)

    with pytest.raises(StreamError, match="'stream' has no end; save some of its rows, and fit a"):
        fitted(StreamingDataset(blocks, batch_size=100, total_size=10_000, endless=True))
    saved = np.concatenate([*itertools.islice(blocks(), 20)])
    assert fitted(StreamingDataset(saved, batch_size=100)).verdict == "fine"


def normal_hierarchy(n_groups: int, n_rows: int, centred: bool = True):
    """Return rows of groups, and the exact moments of their posterior.

    Given the spread of the effects it is normal; the spread is integrated over a grid.
    """
    rng = np.random.default_rng(1)
    group = rng.integers(n_groups, size=n_rows)
    y = rng.normal(size=n_groups)[group] + 2 + 2 * rng.normal(size=n_rows)
    size, total = np.bincount(group, minlength=n_groups), np.bincount(group, y, n_groups)
    low = -1.5 if n_groups > 10 else -14.0
    log_spreads = np.linspace(low, 1.6, int(40 * (1.6 - low)))
    logp, first, second = [], [], []
    for tau in np.exp(-2 * log_spreads):
        precision = np.diag(np.r_[1 / 100 + n_groups * tau, size / 4 + tau])
        precision[0, 1:] = precision[1:, 0] = -tau
        covariance = np.linalg.inv(precision)
        mean = covariance @ np.r_[0, total / 4]
        fit = (n_groups * np.log(tau) + np.linalg.slogdet(covariance)[1] + mean[1:] @ total / 4) / 2
        logp.append(fit - 1 / tau / 2 - np.log(tau) / 2)  # a half-normal prior, on the log scale
        if not centred:
            standardize = np.sqrt(tau) * (np.eye(n_groups + 1) - np.eye(n_groups + 1)[[0]])
            standardize[0] = np.eye(n_groups + 1)[0]
            mean, covariance = standardize @ mean, standardize @ covariance @ standardize.T
        first.append(mean)
        second.append(np.diag(covariance) + mean**2)
    weights = np.exp(logp - np.max(logp))
    weights = weights / weights.sum()
    spread = weights @ log_spreads
    mean = np.insert(weights @ first, 1, spread)
    sd = np.sqrt(np.insert(weights @ second, 1, weights @ log_spreads**2) - mean**2)
    return np.column_stack([group, y]), mean, sd


def new_hierarchy(rows, n_groups: int, centred: bool = True):
    """Return a stream of such rows, and an approximation that was not fitted."""
    ds = StreamingDataset(rows, batch_size=100)
    with pm.Model() as model:
        mu, spread = pm.Normal("mu", 0, 10), pm.HalfNormal("spread", 1)
        shape = {"shape": n_groups}
        a = (
            pm.Normal("a", mu, spread, **shape)
            if centred
            else mu + spread * pm.Normal("z", **shape)
        )
        r = ds.as_tensor()
        pm.Normal("y", a[r[:, 0].astype("int64")], 2, observed=r[:, 1], total_size=ds.total_size)
    return ds, pm.MeanField(model=model)


@pytest.mark.parametrize(
    "n_groups, n_rows, centred",
    [(50, 1_000, True), (600, 3_000, True), (50, 60_000, False), (20, 1_000, False)],
)
def test_a_hierarchy_ends_at_the_posterior(n_groups, n_rows, centred):
    """Of many parameters, the scale of the effects seems surer unless their scales follow it.

    Non-centred, many rows pin the scale times its effects, on a curved ridge in their product.
    """
    rows, mean, sd = normal_hierarchy(n_groups, n_rows, centred)
    ds, approx = new_hierarchy(rows, n_groups, centred)
    # At this seed an effect seems to stand for the scale.
    report = polish(approx, ds, seed=2, progressbar=False)
    assert report.names[:2] == ("mu", "spread_log__")
    np.testing.assert_allclose((position(approx)[0] - mean) / sd, 0, atol=0.1)
    np.testing.assert_allclose(report.sd, sd, rtol=0.1)
    assert report.verdict == "fine"
    full = report.full_rank(["mu"])
    assert {group.ddim for group in full.groups} == {1, n_groups + 1}
    with pytensor.config.change_flags(mode="FAST_COMPILE"):
        draws = full.sample(4_000, random_seed=0)["posterior"]
    assert float(draws["mu"].std()) == pytest.approx(sd[0], rel=0.1)
    effects = draws["a" if centred else "z"].std(("chain", "draw"))
    np.testing.assert_allclose(effects, sd[2:], rtol=0.15)


@pytest.mark.parametrize("centred", [True, False])
def test_few_groups_leave_their_mean_a_tail_and_a_check_agrees(centred):
    """The sd of that mean is proportional to the spread, which six groups leave unsure."""
    rows, mean, sd = normal_hierarchy(6, 300, centred)
    ds, approx = new_hierarchy(rows, 6, centred)
    for report in (polish(approx, ds, progressbar=False), check_fit(approx, ds, progressbar=False)):
        assert report.verdict == "fine"
        np.testing.assert_allclose((position(approx)[0] - mean) / sd, 0, atol=0.02)
        np.testing.assert_allclose(report.sd, sd, rtol=0.03)


def test_a_long_tail_is_told_of_and_measured():
    """Three groups of thirty rows hardly say that their spread is not zero."""
    rows, mean, sd = normal_hierarchy(3, 90, centred=False)
    ds, approx = new_hierarchy(rows, 3, centred=False)
    report = polish(approx, ds, progressbar=False)
    assert report.verdict == "not Gaussian" and "spread_log__ has skewness" in str(report)
    np.testing.assert_allclose((position(approx)[0] - mean) / sd, 0, atol=0.05)
    np.testing.assert_allclose(report.sd, sd, rtol=0.06)


def test_the_noise_of_many_groups_does_not_enter_what_they_share():
    """The check's sample has 16 rows of each group, which would make sigma 6 % less sure.

    Unused columns keep the samples small. Groups of 60 rows say next to nothing of each other.
    """
    rng, n_groups, n_rows = np.random.default_rng(0), 3_000, 180_000
    group = rng.permutation(n_rows) % n_groups
    y = (rng.normal(size=n_groups)[group] + 2 * rng.normal(size=n_rows)).astype("float32")
    rows = np.zeros((n_rows, 48), "float32")
    rows[:, 0], rows[:, 1] = group, y
    ds = StreamingDataset(rows, batch_size=1_000, order_check="off")
    r = ds.as_tensor()
    with pm.Model() as model:
        effect = pm.Normal("effect", pm.Normal("mu", 0, 3), pm.HalfNormal("spread", 1), shape=3_000)
        sigma = pm.HalfNormal("sigma", 3)
        pm.Normal(
            "y", effect[r[:, 0].astype("int64")], sigma, observed=r[:, 1], total_size=ds.total_size
        )
    approx = pm.MeanField(model=model)
    report = polish(approx, ds, progressbar=False)
    assert report.verdict == "fine"
    within = y - (np.bincount(group, y) / 60)[group]
    log_sigma, freedom = np.log(within @ within / (n_rows - n_groups)) / 2, n_rows - n_groups
    assert approx.mean.eval()[-1] == pytest.approx(log_sigma, abs=0.1 / np.sqrt(2 * freedom))
    assert report.sd[-1] == pytest.approx(1 / np.sqrt(2 * freedom), rel=0.01)
    np.testing.assert_allclose(report.sd[2:-1], (60 / 4 + 1) ** -0.5, rtol=0.02)
    assert report.passes <= 8


def test_an_interrupt_keeps_the_fit(logistic):
    epochs = iter(range(3))

    def blocks():
        if next(epochs) == 2:
            raise KeyboardInterrupt
        yield logistic[0][:1_000]

    ds = StreamingDataset(blocks, batch_size=100, total_size=1_000)
    with pm.Model() as model:
        mu = pm.Normal("mu", 0, 10)
        pm.Normal("y", mu, 1, observed=ds.as_tensor()[:, 0], total_size=ds.total_size)
    approx = pm.MeanField(model=model)
    with pytest.raises(KeyboardInterrupt):
        polish(approx, ds, progressbar=False)
    assert np.isfinite(position(approx)[0]).all()


def test_a_fit_ends_at_the_noise_floor_of_its_means():
    """The scale, which polish finds in closed form, is still on its way; polishing again is idle."""
    rows = np.random.default_rng(0).normal(1.0, 2.0, size=(100_000, 1))
    ds = StreamingDataset(rows, batch_size=1_000)
    with pm.Model():
        mu = pm.Normal("mu", 0, 10)
        pm.Normal("y", mu, 2, observed=ds.as_tensor()[:, 0], total_size=ds.total_size)
        approx = pm.fit(
            10_000,
            callbacks=[CheckNoiseFloor(), ds.fit_callback()],
            obj_optimizer=pm.adam(learning_rate=0.02),
            random_seed=0,
            progressbar=False,
        )
    sd = 2 / np.sqrt(len(rows))
    assert 200 <= len(approx.hist) <= 1_000
    assert abs(position(approx)[0][0] - rows.mean()) < 10 * sd
    assert position(approx)[1][0, 0] ** 0.5 > 2 * sd
    report = polish(approx, ds, progressbar=False)
    assert abs(position(approx)[0][0] - rows.mean()) < 0.1 * report.sd[0]
    np.testing.assert_allclose(report.sd, sd, rtol=0.01)
    polished = position(approx)[0]
    assert polish(approx, ds, progressbar=False).verdict == "fine"
    np.testing.assert_allclose(position(approx)[0], polished, atol=0.1 * sd)


def test_a_noise_floor_is_of_gaussian_approximations():
    with pm.Model():
        pm.Normal("mu")
        particles = pm.Empirical(size=10)
    with pytest.raises(TypeError, match="neither a MeanField nor a FullRank"):
        CheckNoiseFloor()(particles, None, 1)
