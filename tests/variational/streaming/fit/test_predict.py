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
import gc

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytensor
import pytest
import xarray as xr

from scipy.stats import binom, norm

import pymc as pm

from pymc.variational.streaming import (
    StreamError,
    StreamingDataset,
    arrow_source,
    log_score,
    predict,
    shuffle_buffer,
)

RNG = np.random.default_rng(5)
N_ROWS = 10_000
TABLE = pa.table(
    {
        "group": np.arange(N_ROWS) % 3,
        "x": RNG.normal(size=N_ROWS),
        "y": RNG.normal(size=N_ROWS),
        "count": RNG.binomial(10, 0.3, N_ROWS),
    }
)
GROUPS, X, Y, COUNTS = (column.to_numpy() for column in TABLE.columns)
SOME = slice(0, 4_000)
"""Rows of several blocks."""
OTHER_GROUP = TABLE[:5].set_column(0, "group", pa.array([3, 0, 1, 2, 0]))
MEANS, SD = np.array([-1.0, 0.5, 2.0]), 0.7
"""Means and standard deviation of the approximation of each group's parameter."""


@pytest.fixture(scope="module")
def ds() -> StreamingDataset:
    return StreamingDataset(TABLE, batch_size=1_000, total_size=N_ROWS)


@pytest.fixture(scope="module")
def approx(ds) -> pm.MeanField:
    """Return an approximation that is known, of a model with groups and two observed variables."""
    other = StreamingDataset(TABLE.select(["x"]), batch_size=10, total_size=N_ROWS, name="other")
    with pm.Model(coords={"group": list("abc")}) as model:
        effect = pm.Normal("effect", 0, 1, dims="group")
        mean = pm.Deterministic("mean", effect[ds["group"].astype("int64")] + ds["x"])
        pm.Deterministic("both", pm.math.stack([mean, 2 * mean], axis=1))
        pm.Deterministic("total", effect.sum())
        pm.Deterministic("range", ds["x"].max())
        pm.Deterministic("centred", ds["x"] - ds["x"].mean())
        pm.Deterministic("by_group", effect * ds["x"].mean())
        pm.Deterministic("across", pm.math.stack([mean, mean, mean]))
        pm.Deterministic("joint", ds["x"] + other["x"].mean())
        pm.Normal("y", mean, 2, observed=ds["y"], total_size=ds.total_size)
        pm.Binomial("count", 10, 0.3, observed=ds["count"], total_size=ds.total_size)
        pm.Normal("z", effect[0], 1, observed=other["x"], total_size=other.total_size)
    model.streams = ds, other
    approx = pm.MeanField(model=model)
    set_approx(approx, SD)
    return approx


def set_approx(approx, sd: float) -> None:
    parameters = approx.groups[0].shared_params
    parameters["mu"].set_value(MEANS)
    parameters["rho"].set_value(np.full(3, np.log(np.expm1(sd))))


def test_log_score_is_the_exact_predictive_density_of_each_row_once(ds, approx):
    score = log_score(approx, TABLE[SOME], ds=ds, draws=1_000, progressbar=False)
    exact = norm.logpdf(Y, MEANS[GROUPS] + X, np.hypot(2, SD)) + binom.logpmf(COUNTS, 10, 0.3)
    exact = exact[SOME]
    assert score.rows == len(exact)
    assert score.mean == pytest.approx(exact.mean(), abs=5 * 0.4 / np.sqrt(1_000))
    assert score.se == pytest.approx(exact.std() / np.sqrt(len(exact)), rel=0.1)


def test_the_score_of_rows_that_cannot_be_is_minus_infinity(ds, approx):
    """They lie in several blocks."""
    counts = np.r_[11, COUNTS[1:-1], 11]
    impossible = TABLE.set_column(3, "count", pa.array(counts))
    score = log_score(approx, impossible, ds=ds, progressbar=False)
    assert score.mean == -np.inf and score.rows == N_ROWS


def test_the_noise_of_few_rows_is_independent_of_the_parameters(ds, approx, tmp_path):
    """There are as many rows as parameters, so that the same random numbers would meet."""
    to = tmp_path / "p.parquet"
    predict(approx, TABLE[:3], to=to, var_names=["y"], ds=ds, draws=2_000, progressbar=False)
    np.testing.assert_allclose(pq.read_table(to)["y_sd"], np.hypot(2, SD), rtol=0.1)


def test_rows_may_take_the_place_of_any_stream_of_the_model(approx):
    other = approx.model.streams[1]
    score = log_score(approx, X[:, None], ds=other, draws=1_000, progressbar=False)
    exact = norm.logpdf(X, MEANS[0], np.hypot(1, SD))
    assert score.mean == pytest.approx(exact.mean(), abs=5 * 0.8 / np.sqrt(1_000))


def test_predictions_describe_the_draws_of_each_row_in_order(ds, approx, tmp_path):
    to = tmp_path / "predictions.parquet"
    names = ["y", "mean", "both"]
    predict(approx, TABLE[SOME], to=to, var_names=names, ds=ds, draws=1_000, progressbar=False)
    predicted = pq.read_table(to)
    centre = (MEANS[GROUPS] + X)[SOME]
    tolerance = 6 * SD / np.sqrt(1_000)
    np.testing.assert_allclose(predicted["mean_mean"], centre, atol=tolerance)
    np.testing.assert_allclose(predicted["both[1]_mean"], 2 * centre, atol=2 * tolerance)
    np.testing.assert_allclose(predicted["mean_sd"], SD, rtol=0.15)
    noisy = np.hypot(2, SD)
    np.testing.assert_allclose(predicted["y_sd"], noisy, rtol=0.15)
    expected = centre + noisy * norm.ppf(0.95)
    assert np.mean(predicted["y_q95"].to_numpy() - expected) == pytest.approx(0, abs=tolerance)
    assert [path.name for path in tmp_path.iterdir()] == [to.name]


def test_rows_are_predicted_in_blocks_and_by_name(ds, approx, tmp_path, monkeypatch):
    set_approx(approx, 1e-8)
    shuffled = TABLE.select(["y", "count", "x", "group"])
    to = tmp_path / "predictions.parquet"
    predict(approx, shuffled, to=to, var_names=["mean"], ds=ds, draws=1_000, progressbar=False)
    set_approx(approx, SD)
    table = pq.ParquetFile(to)
    assert table.num_row_groups > 5
    np.testing.assert_allclose(table.read()["mean_mean"], MEANS[GROUPS] + X, atol=1e-6)


def test_nothing_is_left_of_predictions_that_failed(ds, approx, tmp_path):
    bad = TABLE.set_column(1, "x", pa.array(np.r_[X[:-1], np.nan]))
    with pytest.raises(StreamError, match="is nan in row 9999"):
        predict(approx, bad, to=tmp_path / "p.parquet", ds=ds, progressbar=False)
    assert not list(tmp_path.iterdir())


def test_an_existing_file_is_replaced_only_if_asked_for(ds, approx, tmp_path):
    to = tmp_path / "p.parquet"
    to.write_text("precious")
    few = TABLE[:3]
    with pytest.raises(FileExistsError, match="overwrite=True"):
        predict(approx, few, to=to, ds=ds, progressbar=False)
    assert to.read_text() == "precious"
    predict(approx, few, to=to, ds=ds, overwrite=True, progressbar=False)
    assert pq.read_table(to).num_rows == 3


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("total", StreamError, "does not depend on the rows"),
        ("range", StreamError, "one value or vector per row"),
        ("centred", StreamError, "depends on that row alone"),
        ("by_group", StreamError, "one value or vector per row"),
        ("across", StreamError, "another axis"),
        ("joint", StreamError, "depends on the stream 'other' too"),
        ("absent", KeyError, "absent"),
    ],
)
def test_what_has_no_value_per_row_is_refused(ds, approx, tmp_path, name, error, message):
    """There are three rows, as many as a vector has that is none of rows."""
    rows = TABLE[:3]
    with pytest.raises(error, match=message):
        predict(approx, rows, to=tmp_path / "p", var_names=[name], ds=ds, progressbar=False)


def test_columns_that_a_prediction_does_not_read_may_be_missing(ds, approx, tmp_path):
    new = TABLE.drop_columns(["y", "count"])
    to = tmp_path / "p.parquet"
    options = {"to": to, "ds": ds, "overwrite": True, "progressbar": False}
    found = []
    for rows in (TABLE, new, arrow_source(new.select(["x", "group"]))):
        predict(approx, rows, **options)
        found.append(pq.read_table(to))
    assert found[0] == found[1] == found[2]
    with pytest.raises(ValueError, match=r"none of \['x'\]"):
        predict(approx, arrow_source(new.drop_columns(["x"])), **options)


def test_one_draw_is_refused(ds, approx, tmp_path):
    with pytest.raises(ValueError, match="draws=1 gives no standard deviation"):
        predict(approx, TABLE, to=tmp_path / "p", ds=ds, draws=1, progressbar=False)


def test_a_folder_is_no_file(ds, approx, tmp_path):
    with pytest.raises(IsADirectoryError, match="pass the name of a file"):
        predict(approx, TABLE, to=tmp_path, ds=ds, overwrite=True, progressbar=False)


@pytest.fixture(scope="module")
def train():
    table = pa.table({"level": list("abc") * 10, "y": np.zeros(30)})
    return arrow_source(table, categories=["level"])


@pytest.fixture(scope="module")
def fitted(train):
    ds = StreamingDataset(train, batch_size=10)
    with pm.Model(coords=ds.coords) as model:
        effect = pm.Normal("effect", 0, 1, dims="level")
        pm.Normal("y", effect[ds.index("level")], 1, observed=ds["y"], total_size=30)
    approx = pm.MeanField(model=model)
    approx.groups[0].shared_params["mu"].set_value([-5.0, 0.0, 5.0])
    approx.groups[0].shared_params["rho"].set_value(np.full(3, -20.0))
    approx.ds = ds
    return approx


class TestCategories:
    """A table has its own levels, whose positions need not be those of the stream."""

    ROWS = pa.table({"level": ["b", "c", "b"], "y": [0.0, 5.0, 0.0]})

    def test_levels_are_matched_by_name(self, train, fitted):
        """Each row lies at the mean of its level."""
        encoded = self.ROWS.set_column(0, "level", self.ROWS["level"].dictionary_encode())
        other_order = arrow_source(self.ROWS.select(["y", "level"]), categories=train.levels)
        for rows in (self.ROWS, encoded, self.ROWS.select(["y", "level"]), other_order):
            score = log_score(fitted, rows, progressbar=False)
            assert score.mean == pytest.approx(norm.logpdf(0))

    @pytest.mark.parametrize(
        ("rows", "categories", "found"),
        [
            (ROWS, ["level"], "'b', 'c'"),
            (ROWS, {"level": list("cba")}, "'c', 'b', 'a'"),
            (ROWS.set_column(0, "level", pa.array([1, 2, 1])), None, "no levels"),
        ],
        ids=["found", "in another order", "positions"],
    )
    def test_other_levels_are_refused(self, train, fitted, rows, categories, found):
        source = arrow_source(rows, categories=categories)
        message = rf"rows has (levels )?{found} of 'level' .* pass categories=train.levels"
        with pytest.raises(ValueError, match=message):
            log_score(fitted, source, progressbar=False)
        with pytest.raises(ValueError, match=message), fitted.ds.rows(source):
            pass


def test_the_stream_must_be_named_where_there_are_two(approx):
    with pytest.raises(StreamError, match=r"observes 2 streams .* pass ds="):
        log_score(approx, TABLE)


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        (TABLE[:0], ValueError, "no blocks"),
        (TABLE.drop_columns(["x"]), Exception, "x"),
        (OTHER_GROUP, StreamError, "row 0 .* holds 3.0 in column 'group', which indexes an axis"),
        (shuffle_buffer(TABLE, buffer_size=9, batch_size=3), TypeError, "pass the source"),
    ],
    ids=["empty", "without a column", "another group", "shuffled"],
)
def test_unusable_rows_are_refused(ds, approx, rows, error, message):
    with pytest.raises(error, match=message):
        log_score(approx, rows, ds=ds, progressbar=False)


def test_a_score_prints_as_a_line(ds, approx):
    score = log_score(approx, TABLE[:10], ds=ds, progressbar=False)
    assert str(score).startswith("log score -") and str(score).endswith("per row, 10 rows")


def test_saved_draws_open_again_without_invented_rows(approx, tmp_path):
    with pytensor.config.change_flags(mode="NUMBA"):  # in Python a maximum of no rows is an error
        trace = approx.sample(10, random_seed=1)
    trace.to_zarr(tmp_path / "trace.zarr", consolidated=False)
    opened = xr.open_datatree(tmp_path / "trace.zarr", engine="zarr", consolidated=False)
    assert list(opened.posterior["effect"].coords["group"].values) == list("abc")
    assert opened.posterior["mean"].sizes["mean_dim_0"] == 0
    assert opened.observed_data["y"].size == 0


def test_a_dataset_that_is_gone_is_named(tmp_path):
    ds = StreamingDataset(np.ones((10, 1)), batch_size=5)
    with pm.Model() as model:
        pm.Normal("y", pm.Normal("mu"), 1, observed=ds.as_tensor()[:, 0], total_size=ds.total_size)
    del ds
    gc.collect()
    with pytest.raises(StreamError, match=r"StreamingDataset of approx.model is gone; keep a ref"):
        predict(pm.MeanField(model=model), np.ones((3, 1)), to=tmp_path / "p.parquet")
