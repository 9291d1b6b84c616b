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
"""What the buffer of a dataset holds, with rows and without."""

import copy
import pickle

import numpy as np
import pytensor
import pytest

from pytensor.compile.mode import Mode

import pymc as pm

from pymc.exceptions import SamplingError
from pymc.variational.streaming import (
    StreamError,
    StreamingDataset,
    parquet_source,
    shuffle_buffer,
)
from tests.variational.streaming.strategies import numbered, write_layout
from tests.variational.streaming.tell_tale import (
    has_no_rows,
    no_thread_is_left,  # noqa: F401
    normal_model,
    tell_tale,
)

MODE = "NUMBA"
REWRITTEN = Mode(linker="py", optimizer="fast_run")
"""As in the default mode, the total_size scales a sum of terms, so that no terms give NaN."""


def first_loss(mode=REWRITTEN) -> float:
    """Return the loss of the first step of a fit to which nothing adds a callback."""
    step = pm.ADVI().objective.step_function(score=True, compile_kwargs={"mode": mode})
    return float(step())


class TestBuffer:
    @pytest.mark.parametrize("dtype", ["float32", "float64", "int64", "uint8"])
    def test_it_has_no_rows_until_streaming_starts_and_after_it_ends(self, dtype):
        ds = StreamingDataset(numbered(10), batch_size=4, dtype=dtype)
        buffer = ds.as_tensor()
        assert buffer.dtype == buffer.get_value().dtype == dtype
        assert buffer.type.shape == (None, 2)
        assert has_no_rows(ds)
        ds.advance()
        np.testing.assert_array_equal(buffer.get_value(), numbered(10)[:4])
        ds.close()
        assert has_no_rows(ds)

    def test_a_shallow_copy_would_share_it_and_is_refused(self):
        with StreamingDataset(numbered(10), batch_size=4) as ds:
            ds.advance()
            with pytest.raises(TypeError, match="a shallow copy would share"):
                copy.copy(ds)
            assert not has_no_rows(ds)

    def test_a_copy_that_was_made_while_it_held_other_rows_is_free(self):
        ds = StreamingDataset(numbered(10), batch_size=4)
        with ds.rows(np.zeros((2, 2))):
            twin = pickle.loads(pickle.dumps(ds))
        with twin:
            assert twin.advance()

    def test_floats_default_to_floatx(self):
        with pytensor.config.change_flags(floatX="float32"):
            assert StreamingDataset(numbered(3), batch_size=2).as_tensor().dtype == "float32"
        assert StreamingDataset(numbered(3), batch_size=2).as_tensor().dtype == "float64"

    def test_columns_have_names(self, tmp_path):
        write_layout(tmp_path, [[5, 5]])
        ds = StreamingDataset(parquet_source(tmp_path), batch_size=4)
        assert ds.columns == ("row", "twice")
        with ds:
            ds.advance()
            assert ds["twice"].eval(mode="FAST_COMPILE").tolist() == [0, 2, 4, 6]
        with pytest.raises(KeyError, match=r"'thrice' is not a column .* \['row', 'twice'\]"):
            ds["thrice"]
        for key in ("row", 0, (slice(None), 0)):
            with pytest.raises(KeyError, match=r"names \[\]; slice ds.as_tensor\(\) by position"):
                StreamingDataset(numbered(3), batch_size=2)[key]

    def test_batches_do_not_alias_the_users_array(self):
        rows = np.arange(8.0)[:, None]
        ds = StreamingDataset(rows, batch_size=8, prefetch=False)
        with ds:
            ds.advance()
            rows[:] = -1
            assert ds.as_tensor().get_value().ravel().tolist() == list(range(8))


LIKELIHOODS = {
    "Normal": lambda rows, x, k: pm.Normal("y", pm.Normal("m"), 1, observed=x, total_size=9),
    "Poisson": lambda rows, x, k: pm.Poisson("y", pm.HalfNormal("m"), observed=k, total_size=9),
    "Bernoulli": lambda rows, x, k: pm.Bernoulli(
        "y", logit_p=pm.Normal("m"), observed=k, total_size=9
    ),
    "MvNormal": lambda rows, x, k: pm.MvNormal(
        "y", pm.Normal("m", shape=2), np.eye(2), observed=rows, total_size=9
    ),
}


class TestNoRows:
    """A model whose stream has no rows fits nothing and predicts nothing."""

    @pytest.mark.parametrize(
        "name, dtype",
        [
            ("Normal", "float64"),
            ("MvNormal", "float64"),
            ("Bernoulli", "int64"),
            ("Poisson", "int64"),
        ],
    )
    def test_a_step_without_the_callback_has_no_loss_and_a_prediction_no_rows(self, name, dtype):
        rows = StreamingDataset(numbered(9), batch_size=3, dtype=dtype).as_tensor()
        with pm.Model():
            x = rows[:, 0].astype("float64")
            LIKELIHOODS[name](rows.astype("float64"), x, rows[:, 1])
            assert np.isnan(first_loss())
            prior = pm.sample_prior_predictive(5, compile_kwargs={"mode": "FAST_COMPILE"})
        assert prior.prior_predictive["y"].shape[:3] == (1, 5, 0)

    def test_a_compiled_step_has_no_loss_either(self):
        counts = StreamingDataset(np.ones((9, 1)), batch_size=3)
        with pm.Model():
            pm.Poisson("y", pm.HalfNormal("m"), observed=counts.as_tensor()[:, 0], total_size=9)
            assert np.isnan(first_loss("NUMBA"))

    def test_nuts_and_map_name_the_variable_that_has_no_rows(self):
        """With a batch in the buffer they would take it for all rows, which limits.md says."""
        counts = StreamingDataset(np.ones((9, 1)), batch_size=3)
        quick = {"progressbar": False, "compile_kwargs": {"mode": REWRITTEN}}
        with pm.Model():
            pm.Poisson("y", pm.HalfNormal("m"), observed=counts.as_tensor()[:, 0], total_size=9)
            with pytest.raises(SamplingError, match=r"'y': .*nan"):
                pm.sample(1, tune=1, chains=1, cores=1, **quick)
            with (
                pytest.raises(SamplingError, match=r"'y': .*nan"),
                pytest.warns(FutureWarning),
            ):
                pm.find_MAP(**quick)

    def test_a_step_that_needs_two_streams_has_no_loss_without_one(self):
        ds = StreamingDataset(tell_tale(3), batch_size=4)
        counts = StreamingDataset(tell_tale(5), batch_size=4, dtype="int32", name="counts")
        with normal_model(ds) as model, ds:
            pm.Poisson(
                "z", pm.math.exp(model["mu"]), observed=counts.as_tensor()[:, 0], total_size=20
            )
            ds.advance()
            assert np.isnan(first_loss())

    def test_a_stream_that_nothing_scales_is_missed_when_its_callback_is(self):
        """Without rows, a Potential is 0, and the fit would go on without it."""
        ds = StreamingDataset(tell_tale(3), batch_size=4)
        other = StreamingDataset(tell_tale(5), batch_size=4, name="other")
        with normal_model(ds) as model:
            rows = other.as_tensor()[:, 0]
            pm.Potential("z", pm.logp(pm.Normal.dist(model["mu"], 1), rows).sum())
            callback = ds.fit_callback()
            approx = pm.MeanField()
            with pytest.raises(StreamError, match=r"also uses the stream 'other', .* no rows"):
                callback(approx, np.zeros(1), 1)
            other.advance()
            callback(approx, np.zeros(1), 1)


class TestExactValues:
    @pytest.mark.parametrize(
        "value, dtype, row_dtype",
        [
            (np.nan, "float64", "float64"),
            (np.inf, "float32", "float64"),
            (-np.inf, "float64", "float32"),
            (1e39, "float32", "float64"),
            (2**53 + 1, "float64", "int64"),
            (2**24 + 1, "float32", "int32"),
            (0.5, "int32", "float64"),
            (2**31, "int32", "int64"),
            (np.nan, "int64", "float32"),
        ],
    )
    def test_what_the_buffer_cannot_hold_is_refused_with_its_place(self, value, dtype, row_dtype):
        rows = np.zeros((10, 2), row_dtype)
        rows[7, 1] = value
        ds = StreamingDataset(rows, batch_size=3, dtype=dtype)
        with pytest.raises(StreamError, match=r"row 7 of the stream holds .* in column"):
            list(ds)

    @pytest.mark.parametrize(
        "value, dtype, row_dtype",
        [
            (0.1, "float32", "float64"),
            (1e-320, "float32", "float64"),
            (2**53, "float64", "int64"),
            (2**24, "float32", "int32"),
            (2.0**60, "float32", "float64"),
            (-(2**31), "int32", "int64"),
            (3e38, "float64", "float32"),
            (1e308, "float64", "float64"),
        ],
    )
    def test_what_it_holds_or_rounds_as_a_float_is_accepted(self, value, dtype, row_dtype):
        rows = np.full((3, 1), value, row_dtype)
        (batch,) = StreamingDataset(rows, batch_size=3, dtype=dtype)
        np.testing.assert_array_equal(batch, rows.astype(dtype))

    def test_integers_beside_floats_survive_a_narrower_buffer_or_are_refused(self, tmp_path):
        """The rows are float64 already; that the column held integers is still known."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        for name, user in (("a", 4), ("b", 2**24 + 1)):
            table = pa.table({"x": [0.1, 0.2], "user": [5, user]})
            pq.write_table(table, tmp_path / f"{name}.parquet", row_group_size=1)
        source = parquet_source(tmp_path)
        for rows, place in (
            (source, r"row 3 of the stream \(row 0 of row group 1 of .*b.parquet\)"),
            (shuffle_buffer(source, buffer_size=2), r"row . of the stream \(in .*b.parquet\)"),
            (shuffle_buffer(source, buffer_size=4), r"stream \(in .*a.parquet to .*b.parquet\)"),
        ):
            ds = StreamingDataset(rows, batch_size=2, dtype="float32")
            message = rf"{place} holds 16777217\.0 in column 'user', which float32"
            with pytest.raises(StreamError, match=message):
                list(ds)
