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
"""Models that use streams in more than the simplest way, and rows in the place of a batch.

The script of docs/source/streaming/models.md is run once; its models are compared with the same in memory.
"""

import contextlib
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytensor
import pytest

import pymc as pm

from pymc.model.transform.optimization import freeze_dims_and_data
from pymc.variational.streaming import (
    StreamError,
    StreamingDataset,
    parquet_source,
    summarize,
)
from tests.variational.streaming.sources.libraries import ROOT

pytestmark = pytest.mark.filterwarnings("ignore:Numba will use object mode:UserWarning")


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> dict:
    """Return what the script of the page defines."""
    text = (ROOT / "docs/source/streaming/models.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    names: dict = {}
    with contextlib.chdir(tmp_path_factory.mktemp("page")):
        exec(compile("\n".join(blocks), "models.md", "exec"), names)
        names["predicted"] = pq.read_table("predictions.parquet")
    return names


def in_memory(table: pa.Table) -> pm.Model:
    """Return the page's first model, of rows in memory."""
    with pm.Model(coords={"group": list("abcde")}) as model:
        alpha = pm.Normal("alpha", 0, 2, dims="group")
        slope = pm.Normal("slope")
        mean = alpha[table["group"].to_numpy()] + slope * table["x"].to_numpy()
        pm.Normal("y", mean, 1, observed=table["y"].to_numpy())
    return model


class TestGroups:
    def test_the_fit_is_near_the_exact_posterior(self, page):
        """Both in posterior sd, which an Adam step of 0.05 exceeds several times."""
        group, x, y = (page[name] for name in ("group", "x", "y"))
        design = np.column_stack([np.eye(5)[group], x])
        precision = design.T @ design + np.diag([0.25] * 5 + [1.0])
        exact = np.linalg.solve(precision, design.T @ y)
        np.testing.assert_allclose(page["approx"].mean.eval(), exact, atol=0.15)

    def test_values_and_gradients_are_those_of_the_rows_in_memory(self, page):
        ds, model, table = page["ds"], page["model"], page["table"]
        plain = in_memory(table)
        point = {"alpha": np.linspace(-1, 1, 5), "slope": np.array(0.3)}
        expected = (
            plain.compile_logp()(point),
            plain.compile_dlogp()(point),
        )
        logp, dlogp = model.compile_logp(), model.compile_dlogp()
        with ds.rows(table):
            np.testing.assert_allclose(logp(point), expected[0])
            np.testing.assert_allclose(dlogp(point), expected[1])
        gradients = []
        for batch in ds:
            with ds.rows(batch):
                gradients.append(dlogp(point))
        np.testing.assert_allclose(np.mean(gradients, axis=0), expected[1])

    @pytest.mark.parametrize("dtype, limit", [("float32", 2**24), ("float64", 2**53)])
    def test_indices_survive_the_buffer_or_are_refused(self, dtype, limit):
        exact = np.array([[limit - 1], [limit]])
        ds = StreamingDataset(exact, batch_size=2, dtype=dtype)
        with ds:
            ds.advance()
            index = ds.as_tensor()[:, 0].astype("int64").eval()
            assert index.tolist() == [limit - 1, limit]
        with pytest.raises(StreamError, match=f"holds {limit + 1} .* cannot hold exactly"):
            ds.rows(exact + 1)


class TestNumbersFromRows:
    """An HSGP takes the middle of its inputs, and with *c* their range, when it is built."""

    N = 2_000
    X = np.random.default_rng(0).uniform(0, 10, N)
    TABLE = pa.table({"x": X, "y": np.sin(X)})

    def process(self, **options) -> pm.gp.HSGP:
        covariance = pm.gp.cov.ExpQuad(1, ls=pm.LogNormal("ls", 0, 0.1))
        return pm.gp.HSGP(m=[5], cov_func=covariance, **options)

    @pytest.mark.parametrize("part", ["process", "centre", "prior"])
    def test_those_of_a_stream_without_rows_are_told_from_ties(self, part):
        ds = StreamingDataset(self.TABLE, batch_size=100)
        with pm.Model(), np.errstate(all="ignore"), pytensor.config.change_flags(mode="NUMBA"):
            if part == "process":
                mean = self.process(L=[7.0]).prior("f", X=ds[["x"]])
            else:
                x = ds["x"].eval()
                centre = x.sum() / np.float64(len(x))
                mean = pm.Normal("b", 0 if part == "centre" else centre) * (ds["x"] - centre)
            pm.Normal("y", mean, 1, observed=ds["y"], total_size=ds.total_size)
            with pytest.raises(StreamError, match=r"holds NaN, .* 'stream' .* within `with ds.row"):
                ds.fit_callback()

    def test_the_remedy_gives_the_process_of_all_rows(self):
        ds = StreamingDataset(self.TABLE, batch_size=100)
        summary = summarize(self.TABLE, progressbar=False)
        ends = np.array([(summary[name].min, summary[name].max) for name in ds.columns]).T

        def build(x, y, rows) -> pm.Model:
            with pm.Model() as model:
                with rows:
                    f = self.process(c=1.5).prior("f", X=x)
                pm.Normal("y", f, 0.1, observed=y, total_size=self.N)
            return model

        streamed = build(ds[["x"]], ds["y"], ds.rows(ends))
        with streamed:
            ds.fit_callback()
        y = self.TABLE["y"].to_numpy()
        resident = build(self.X[:, None], y, contextlib.nullcontext())
        point = {name: value + 1 for name, value in resident.initial_point().items()}
        expected = resident.compile_logp()(point)
        with ds.rows(self.TABLE):
            np.testing.assert_allclose(streamed.compile_logp()(point), expected)


class TestAfterTheFit:
    def test_predictions_are_those_of_the_model_in_memory(self, page):
        with in_memory(page["held_out"]):
            expected = pm.sample_posterior_predictive(
                page["trace"], random_seed=3, progressbar=False
            )
        found = page["predictions"].posterior_predictive["y"]
        np.testing.assert_allclose(found, expected.posterior_predictive["y"])

    def test_log_likelihoods_are_those_of_the_model_in_memory_once_unscaled(self, page):
        with in_memory(page["held_out"]):
            expected = pm.compute_log_likelihood(
                page["trace"], extend_inferencedata=False, progressbar=False
            )
        np.testing.assert_allclose(page["log_likelihood"]["y"], expected["y"])

    def test_dimensions_follow_the_rows(self, page):
        with page["named"], page["ds"].rows(page["held_out"]):
            prior = pm.sample_prior_predictive(2, random_seed=0)
        assert prior.prior["mean"].sizes["row"] == prior.prior_predictive["y"].sizes["row"] == 200


class TestOtherDataBesideStreams:
    def test_each_likelihood_is_scaled_by_its_own_rows(self, page):
        joint, ds, visits = page["joint"], page["ds"], page["visits"]
        rows = np.column_stack([page["group"], page["x"], page["y"]])[:700]
        counts = np.arange(30).reshape(-1, 1)
        point = {"level": np.array(0.2)}
        with ds.rows(rows), visits.rows(counts):
            y, n_visits = (joint.compile_fn(joint.logp(joint[v])) for v in ("y", "visits"))
            found = y(point), n_visits(point)
        normal = pm.logp(pm.Normal.dist(0.2 + rows[:, 1], 1), rows[:, 2]).eval().mean() * 20_000
        poisson = pm.logp(pm.Poisson.dist(np.exp(0.7)), counts).eval().mean() * 3_000
        np.testing.assert_allclose(found, [normal, poisson])

    def test_the_joint_fit_took_batches_of_both_streams(self, page):
        assert page["ds"].rows_seen == (1_000 + 200) * 500
        assert page["visits"].rows_seen == 200 * 100
        assert np.isfinite(page["both"].hist).all()

    def test_images_are_rows(self, page):
        images, pixels = page["images"], page["pixels"]
        np.testing.assert_array_equal(np.concatenate(list(pixels)), images)
        logp = page["pictures"].compile_fn(page["pictures"].logp(page["pictures"]["pixels"]))
        with page["pictures"]:
            callback = pixels.fit_callback()
        with pixels.rows(images[:30]):
            scaled = logp({"mean": np.eye(8)})
        expected = pm.logp(pm.Normal.dist(np.eye(8), 1), images[:30]).sum() * (2_000 / 30)
        np.testing.assert_allclose(scaled, expected.eval())
        del callback


class TestTransformedModels:
    """A model that PyMC has made of another one is fitted as if it had been written so."""

    TRANSFORMS = {
        "freeze_dims_and_data": freeze_dims_and_data,
        "do a number": lambda model: pm.do(model, {"offset": 0.0}),
        "do a column": lambda model: pm.do(model, {"x": model["column"]}),
    }

    @pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
    def test_its_likelihood_is_that_of_the_batch(self, transform):
        rows = np.random.default_rng(0).normal(size=(60, 2))
        with StreamingDataset(rows, batch_size=12) as ds:
            with pm.Model() as model:
                column = pm.Deterministic("column", ds.as_tensor()[:, 0])
                x, offset = pm.Data("x", np.zeros(12)), pm.Data("offset", 0.0)
                mean = pm.Normal("a") + x * 0 + column + offset
                pm.Normal("y", mean, 1, observed=ds.as_tensor()[:, 1], total_size=ds.total_size)
            with transform(model) as transformed:
                callback = ds.fit_callback()
                pm.fit(1, callbacks=[callback], progressbar=False)
                logp = transformed.compile_logp(vars=transformed.observed_RVs)({"a": 0.0})
            x, y = rows[12:24].T
            exact = 5 * (-((y - x) ** 2) / 2 - np.log(2 * np.pi) / 2).sum()
            np.testing.assert_allclose(logp, exact)


class TestRowsInThePlaceOfABatch:
    @pytest.fixture
    def ds(self):
        rows = pa.table({"x": np.arange(12.0), "n": np.arange(12)})
        with StreamingDataset(rows, batch_size=4, name="rows") as ds:
            yield ds

    def buffer(self, ds) -> np.ndarray:
        return ds.as_tensor().get_value()

    def test_they_leave_the_stream_where_it_was(self, ds):
        ds.advance()
        for first in (0, 4, 8):
            with ds.rows(np.zeros((3, 2))):
                assert self.buffer(ds).tolist() == [[0, 0]] * 3
            assert self.buffer(ds)[:, 0].tolist() == [first, first + 1, first + 2, first + 3]
            ds.advance()

    def test_the_batch_is_put_back_after_an_error(self, ds):
        ds.advance()
        batch = self.buffer(ds)
        with contextlib.suppress(ZeroDivisionError), ds.rows(np.zeros((3, 2))):
            raise ZeroDivisionError
        np.testing.assert_array_equal(self.buffer(ds), batch)

    def test_a_stream_that_is_closed_meanwhile_leaves_no_rows(self, ds):
        """As when the callback of a fit is collected: the old batch would be a stale one."""
        ds.advance()
        with ds.rows(np.zeros((3, 2))):
            ds.close()
            assert self.buffer(ds).tolist() == [[0, 0]] * 3
        assert self.buffer(ds).shape == (0, 2)
        ds.advance()
        assert self.buffer(ds)[0, 0] == 0

    @pytest.mark.parametrize("move", ["advance", "fit_callback"])
    def test_the_stream_does_not_move_meanwhile(self, ds, move):
        ds.advance()
        with ds.rows(np.zeros((3, 2))):
            with pytest.raises(StreamError, match=r"leave the `with ds\.rows"):
                getattr(ds, move)()
            with pytest.raises(StreamError, match=r"leave the `with ds\.rows"):
                ds.rows(np.zeros((3, 2)))
        assert self.buffer(ds)[0, 0] == 0

    def test_tables_are_read_by_the_names_of_columns(self, ds):
        table = pa.table({"n": [1, 2], "other": ["a", "b"], "x": [0.5, 1.5]})
        for rows in (table, table.to_pandas()):
            with ds.rows(rows):
                assert self.buffer(ds).tolist() == [[0.5, 1], [1.5, 2]]
        with pytest.raises(ValueError, match="no column 'n'"):
            ds.rows(table.select(["x"]))

    def test_sources_must_have_the_columns_of_the_stream(self, ds, tmp_path):
        pq.write_table(pa.table({"n": [1, 2], "x": [0.5, 1.5]}), tmp_path / "a.parquet")
        with ds.rows(parquet_source(tmp_path)):
            assert self.buffer(ds).tolist() == [[0.5, 1], [1.5, 2]]
        with pytest.raises(ValueError, match=r"has columns \['n'\], and none of \['x'\]"):
            ds.rows(parquet_source(tmp_path, columns=["n"]))

    @pytest.mark.parametrize(
        "rows, message",
        [
            (np.zeros((3, 3)), r"rows of shape \(3,\); sample_shape=\(2,\) was expected"),
            (np.array([[0.0, np.nan]]), "holds nan in column"),
            (pa.table({"x": [None, 1.0], "n": [1, 2]}), "column 'x' is null in row 0"),
            (np.zeros((0, 2)), "has no rows"),
            ("held_out/", "is a path; pass parquet_source"),
        ],
        ids=["shape", "NaN", "null", "none", "path"],
    )
    def test_they_are_checked_as_those_of_a_batch_are(self, ds, rows, message):
        ds.advance()
        batch = self.buffer(ds)
        with pytest.raises((StreamError, ValueError, TypeError), match=message):
            ds.rows(rows)
        np.testing.assert_array_equal(self.buffer(ds), batch)
