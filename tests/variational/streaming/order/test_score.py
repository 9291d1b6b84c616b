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
"""Windows are compared by the model's own score, before the first step and in the stream."""

import logging
import pickle

from functools import cache

import numpy as np
import pyarrow as pa
import pytensor
import pytensor.tensor as pt
import pytest

import pymc as pm

from pymc.variational.streaming import (
    OrderError,
    StreamingDataset,
    arrow_source,
    check_order,
    shuffle_buffer,
)
from tests.variational.streaming.order.test_order import in_sequence

MODE = "NUMBA"
N_ROWS = 200_000
WINDOW = 10_000
FLIP = np.where(np.arange(N_ROWS) < N_ROWS / 2, 1, -1)
"""Sign of a relation that reverses halfway through the table."""


def group_means_flip(rng, n_groups=50, spread=0.5):
    """Their sum, and that of their products with the number of the group, stay the same."""
    group, number = rng.integers(0, n_groups, N_ROWS), np.arange(n_groups) - (n_groups - 1) / 2
    effect = rng.normal(0, spread, n_groups)
    effect -= effect.mean()
    effect -= (effect @ number) / (number @ number) * number
    return np.column_stack([group, effect[group] * FLIP + rng.normal(size=N_ROWS)])


def observe_groups(x, n_groups=50):
    means = pm.Normal("mean", 0, 1, shape=n_groups)
    pm.Normal("y", means[x[:, 0].astype("int64")], 1, observed=x[:, 1], total_size=N_ROWS)


def quadratic_flips(rng):
    x = rng.normal(size=N_ROWS)
    return np.column_stack([x, 0.5 * FLIP * (x**2 - 1) + rng.normal(size=N_ROWS)])


def observe_quadratic(x):
    b = pm.Normal("b", 0, 10, shape=3)
    curve = b[0] + b[1] * x[:, 0] + b[2] * x[:, 0] ** 2
    pm.Normal("y", curve, 1, observed=x[:, 1], total_size=N_ROWS)


def one_slope_of_63_flips(rng):
    x = rng.normal(size=(N_ROWS, 64))
    x[:, 0] += 0.5 * FLIP * x[:, 31]
    return x


def observe_slopes(x):
    slopes = pm.Normal("slope", 0, 1, shape=63)
    pm.Normal("y", pt.dot(x[:, 1:], slopes), 1, observed=x[:, 0], total_size=N_ROWS)


def large_claims_inflate(rng):
    """One row in twenty has a claim; those beyond the 89th percentile grow eightfold."""
    claim, amount = rng.random(N_ROWS) < 0.05, rng.exponential(1, N_ROWS)
    amount += np.maximum(amount - 2.2, 0) * np.where(FLIP < 0, 7, 0)
    return np.column_stack([claim, amount * claim])


def observe_claims(x):
    log_mean = pm.Normal("log_mean", 0, 5)

    def logp(value, log_mean, claim):
        return claim * (-log_mean - value * pt.exp(-log_mean))

    pm.CustomDist("y", log_mean, x[:, 0], logp=logp, observed=x[:, 1], total_size=N_ROWS)


def rare_events_in_one_place(rng):
    y = (np.arange(N_ROWS) // 4_000 == 17) & (rng.random(N_ROWS) < 0.03)
    return np.column_stack([rng.normal(size=N_ROWS), y])


def observe_events(x):
    b = pm.Normal("b", 0, 3, shape=2)
    logit = b[0] + b[1] * x[:, 0]
    pm.Bernoulli("y", logit_p=logit, observed=x[:, 1], total_size=N_ROWS)


def last_two_percent_shift(rng):
    return rng.normal(3.0 * (np.arange(N_ROWS) >= 0.98 * N_ROWS))[:, None]


def observe_mean(x):
    pm.Normal("y", pm.Normal("mu", 0, 10), 1, observed=x[:, 0], total_size=N_ROWS)


def observe_500_groups(x):
    observe_groups(x, 500)


CASES = {
    "group means flip": (group_means_flip, observe_groups),
    "500 group means flip": (lambda rng: group_means_flip(rng, 500, 1.0), observe_500_groups),
    "quadratic flips": (quadratic_flips, observe_quadratic),
    "one slope of 63 flips": (one_slope_of_63_flips, observe_slopes),
    "large claims inflate": (large_claims_inflate, observe_claims),
    "rare events in one place": (rare_events_in_one_place, observe_events),
    "last two percent shift": (last_two_percent_shift, observe_mean),
}


@cache
def model_of(observe, width):
    """Return a model that observes a stream of rows of this width, and the stream."""
    ds = StreamingDataset(np.zeros((1, width)), batch_size=1, total_size=1, order_check="off")
    with pm.Model() as model:
        observe(ds.as_tensor())
    return model, ds


@pytest.mark.parametrize("make, observe", CASES.values(), ids=CASES)
class TestModels:
    def test_orders_that_bias_the_model_are_found_and_shuffled_rows_pass(self, make, observe):
        rows = make(np.random.default_rng(0))
        model, _ = model_of(observe, rows.shape[1])
        shuffled = np.random.default_rng(1).permutation(rows)
        # numba would take longer for a product of matrices than the test does.
        mode = "FAST_COMPILE" if observe is observe_slopes else pytensor.config.mode
        for kind in (lambda x: x, in_sequence):
            with pytensor.config.change_flags(mode=mode):
                report = check_order(kind(rows), model=model, buffer_size=WINDOW)
                of_shuffled = check_order(kind(shuffled), model=model, buffer_size=WINDOW)
            assert report.ordered
            assert report.p_value < 0.5 * report.threshold
            assert "gradient of" in report.feature
            assert not of_shuffled.ordered


class TestScore:
    def test_the_drift_is_that_of_the_posterior_mean(self):
        """The windows' own means, with the posterior sd 1 / √N; 2 % for the sampled rows."""
        shift = np.repeat(np.random.default_rng(2).permutation(np.linspace(-1, 1, 20)), WINDOW)
        rows = np.random.default_rng(3).normal(shift)[:, None]
        model, _ = model_of(observe_mean, 1)
        report = check_order(rows, model=model, buffer_size=WINDOW)
        exact = np.linspace(-1, 1, 20).std(ddof=1) * np.sqrt(N_ROWS)
        assert report.drift == pytest.approx(exact, rel=0.02)

    @pytest.mark.parametrize("is_sequence", [False, True])
    def test_columns_that_the_model_does_not_read_take_no_part(self, is_sequence):
        rng = np.random.default_rng(4)
        constant_at_first = np.arange(N_ROWS) > N_ROWS / 2
        x = np.column_stack([np.arange(N_ROWS), constant_at_first, rng.normal(size=(N_ROWS, 2))])

        def observe(x):
            b, x = pm.Normal("b"), x.astype("float32")  # all columns at once
            pm.Normal("y", b * x[:, 2], 1, observed=x[:, -1], total_size=N_ROWS)

        model, _ = model_of(observe, 4)
        rows = in_sequence(x) if is_sequence else x
        assert not check_order(rows, model=model, buffer_size=WINDOW).ordered
        assert check_order(rows, buffer_size=WINDOW).ordered

    def test_an_index_that_is_out_of_range_is_not_followed(self):
        """numba would read and write other memory; the stream refuses the row by name."""
        rows = group_means_flip(np.random.default_rng(0))
        rows[::7, 0] += 1e12
        model, _ = model_of(observe_groups, 2)
        assert check_order(rows, model=model, buffer_size=WINDOW).ordered

    def test_a_model_of_one_batch_length_is_judged_by_its_columns(self, caplog):
        rows = np.random.default_rng(5).normal(np.linspace(0, 1, 20_000))[:, None]
        ds = StreamingDataset(rows, batch_size=500, order_check="raise")
        with pm.Model(), caplog.at_level(logging.INFO, logger="pymc"):
            mu = pm.Normal("mu") + np.zeros(500)
            pm.Normal("y", mu, observed=ds.as_tensor()[:, 0], total_size=ds.total_size)
            with pytest.raises(OrderError, match="'column 0'"):
                ds.fit_callback()
        assert "judged by their columns" in caplog.text

    @pytest.mark.parametrize("case", ["slow drift of a generator", "last rows of an array"])
    def test_what_no_sample_shows_is_found_in_the_first_epoch(self, case):
        """A drift by 25 posterior sd to either side, or a shift of few rows by 3 sd of a row."""
        rows = np.random.default_rng(9).normal(size=(N_ROWS, 1))
        if case == "last rows of an array":
            rows[-WINDOW // 20 :] += 3
            source = rows
        else:
            source = in_sequence(rows + np.linspace(-25, 25, N_ROWS)[:, None] / np.sqrt(N_ROWS))
        buffer = shuffle_buffer(source, buffer_size=WINDOW, seed=0)
        ds = StreamingDataset(buffer, batch_size=2_000, total_size=N_ROWS, order_check="raise")
        with ds, pm.Model():
            observe_mean(ds.as_tensor())
            callback = ds.fit_callback()
            with pytest.raises(OrderError, match="gradient of mu"):
                while ds.epoch < 1:
                    ds.advance()
        del callback

    def test_rows_of_other_columns_than_those_of_the_model_are_refused(self):
        rng = np.random.default_rng(10)
        table = pa.table({name: rng.normal(size=20_000) for name in ("id", "x", "y")})
        ds = StreamingDataset(arrow_source(table, columns=["x", "y"]), batch_size=500)
        with pm.Model() as model:
            slope = pm.Normal("slope")
            pm.Normal("o", slope * ds["x"], observed=ds["y"], total_size=ds.total_size)
        for columns in (None, ["y", "x"], ["x"]):
            with pytest.raises(ValueError, match=r"where the stream of the model has \('x', 'y'\)"):
                check_order(arrow_source(table, columns=columns), model=model)
        assert not check_order(arrow_source(table, columns=["x", "y"]), model=model).ordered

    def test_a_model_without_a_stream_is_refused(self):
        with pm.Model() as model:
            pm.Normal("y", observed=np.zeros(3))
        with pytest.raises(ValueError, match="the model observes 0 streams"):
            check_order(np.zeros((9, 1)), model=model)


def test_a_dataset_with_a_model_can_be_pickled():
    ds = StreamingDataset(np.random.default_rng(7).normal(size=(4_000, 1)), batch_size=500)
    with pm.Model():
        mu = pm.Normal("mu")
        pm.Normal("y", mu, observed=ds.as_tensor()[:, 0], total_size=ds.total_size)
        callback = ds.fit_callback()
    del callback
    assert pickle.loads(pickle.dumps(ds)).advance()


def test_a_table_is_read_by_the_names_of_its_columns():
    rng = np.random.default_rng(8)
    table = pa.table({"id": np.arange(40_000), "y": rng.normal(size=40_000)})
    ds = StreamingDataset(
        shuffle_buffer(table, buffer_size=4_000, batch_size=500, seed=0),
        batch_size=500,
        total_size=40_000,
        order_check="raise",
    )
    with pm.Model():
        mu = pm.Normal("mu")
        pm.Normal("y", mu, observed=ds["y"], total_size=ds.total_size)
        callback = ds.fit_callback()
    while ds.epoch < 1:
        ds.advance()
    del callback
