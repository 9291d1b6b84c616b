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
"""The arguments, the state and the scaling of a dataset."""

import itertools
import json
import logging
import re
import time
import warnings

import numpy as np
import pyarrow as pa
import pytest

import pymc as pm

from pymc.variational._streaming import utils
from pymc.variational.streaming import (
    EpochAverage,
    StreamError,
    StreamingDataset,
    StreamWarning,
    arrow_source,
    parquet_source,
    shuffle_buffer,
)
from tests.variational.streaming.strategies import numbered, write_layout
from tests.variational.streaming.tell_tale import (
    QUICK,
    STANDING_STILL,
    batches_used,
    has_no_rows,
    no_thread_is_left,  # noqa: F401
    normal_model,
    tell_tale,
)

# Rows that tell the batches apart are in an order on purpose.
pytestmark = pytest.mark.filterwarnings("ignore::pymc.variational.streaming.OrderWarning")


class TestTotalSize:
    def test_auto_is_a_plain_int_that_pymc_accepts(self, tmp_path):
        write_layout(tmp_path, [[3], [4]])
        ds = StreamingDataset(parquet_source(tmp_path), batch_size=2)
        assert type(ds.total_size) is int and ds.total_size == 7

    @pytest.mark.parametrize("size", [7, np.int64(7), np.uint8(7)])
    def test_integers_become_plain_ints(self, size):
        ds = StreamingDataset(numbered(7), batch_size=np.int32(2), total_size=size)
        assert type(ds.total_size) is int and type(ds.batch_size) is int

    @pytest.mark.parametrize("size", [True, 7.0, (7,), np.bool(1), "all"])
    def test_other_types_are_refused(self, size):
        with pytest.raises(TypeError, match=r"total_size=.* must be an integer"):
            StreamingDataset(numbered(7), batch_size=2, total_size=size)

    @pytest.mark.parametrize("size", [0, -1])
    def test_other_values_are_refused(self, size):
        with pytest.raises(ValueError, match="total_size="):
            StreamingDataset(numbered(7), batch_size=2, total_size=size)

    def test_a_wrong_int_is_noticed_at_once_where_the_source_knows(self):
        with pytest.warns(StreamWarning, match="total_size=9 but the source holds 7 rows"):
            ds = StreamingDataset(numbered(7), batch_size=2, total_size=9)
        assert ds.total_size == 9

    def test_a_wrong_int_is_noticed_once_when_the_first_pass_ends(self):
        ds = StreamingDataset(lambda: [numbered(7)], batch_size=2, total_size=9)
        with ds:
            for _ in range(3):
                ds.advance()
            with pytest.warns(StreamWarning, match="total_size=9 but the source holds 7 rows"):
                ds.advance()
            for _ in range(20):
                ds.advance()

    @pytest.mark.parametrize("endless", [True, False])
    def test_more_rows_than_declared_are_noticed_once_before_the_pass_ends(self, endless):
        def blocks():
            for first in itertools.count(0, 5) if endless else range(0, 100, 5):
                yield numbered(5) + first

        with StreamingDataset(blocks, batch_size=2, total_size=9) as ds:
            for _ in range(4):
                ds.advance()
            with pytest.warns(StreamWarning, match=r"total_size=9 but .* at least 10 rows"):
                ds.advance()
            for _ in range(80):
                ds.advance()

    def test_a_declared_endless_stream_is_silent_and_counts_on(self, recwarn, caplog):
        def blocks():
            rng = np.random.default_rng(0)
            while True:
                yield rng.normal(1, 1, (50, 1))

        ds = StreamingDataset(blocks, batch_size=50, total_size=1_000, endless=True)
        average = EpochAverage(ds)
        with normal_model(ds):
            approx = pm.fit(100, callbacks=[average, ds.fit_callback()], **QUICK)
        average.apply(approx)
        assert not recwarn.list
        assert not [record for record in caplog.records if record.levelno > logging.INFO]
        assert (ds.rows_seen, ds.epoch, average.epochs) == (5_000, 5, 2)

    @pytest.mark.parametrize(
        ("source", "total_size"),
        [(numbered(7), 7), (lambda: [numbered(7)], "auto"), (lambda: [numbered(7)], None)],
        ids=["known rows", "auto", "none"],
    )
    def test_an_endless_stream_needs_a_number_of_rows(self, source, total_size):
        with pytest.raises(ValueError, match="endless=True but"):
            StreamingDataset(source, batch_size=2, total_size=total_size, endless=True)

    def test_rows_that_change_under_auto_are_an_error(self):
        tables = iter([numbered(7), numbered(7), numbered(6)])
        ds = StreamingDataset(lambda: [next(tables)], batch_size=2, sample_shape=(2,))
        with ds, pytest.raises(StreamError, match="gave 6 rows in an epoch but 7 before"):
            for _ in range(10):
                ds.advance()

    def test_none_is_unscaled_and_says_so(self):
        with pytest.warns(StreamWarning, match="total_size=None leaves the likelihood"):
            ds = StreamingDataset(tell_tale(3), batch_size=4, total_size=None)
        assert ds.total_size is None
        with normal_model(ds):
            pm.fit(2, callbacks=[ds.fit_callback()], **QUICK)


class TestShownInANotebook:
    def test_a_stream_and_its_source_say_what_they_hold(self, tmp_path):
        write_layout(tmp_path, [[7]])
        source = parquet_source(tmp_path)
        assert repr(source) == "<ParquetSource: 7 rows of row, twice>"
        ds = StreamingDataset(shuffle_buffer(source, buffer_size=4, batch_size=2), batch_size=2)
        assert repr(ds) == (
            "<StreamingDataset 'stream': batches of 2 from 7 rows of row, twice; epoch 0, 0 rows seen>"
        )
        counted = StreamingDataset(lambda: iter([np.ones((7, 1))]), batch_size=2)
        assert "batches of 2 from 7 rows of shape (1,);" in repr(counted)


def test_null_and_the_string_null_have_coordinates_of_their_own():
    source = arrow_source(pa.table({"x": ["null"]}), categories={"x": ["null", None]})
    assert StreamingDataset(source, batch_size=1).coords == {"x": ("null", "(null)")}


class TestCycle:
    def test_without_it_the_fit_stops_and_says_what_it_did(self):
        rows = np.concatenate([tell_tale(15), tell_tale(1)[:3]])
        ds = StreamingDataset(rows, batch_size=4, cycle=False)
        with normal_model(ds):
            with pytest.warns(
                StreamWarning, match="ended after 15 batches of 4 rows, with 3 rows left over"
            ):
                approx = pm.fit(50, callbacks=[ds.fit_callback()], **STANDING_STILL)
        assert batches_used(approx.hist) == list(range(14))
        assert ds.rows_seen == 60

    def test_nothing_is_said_where_every_step_was_made(self):
        ds = StreamingDataset(tell_tale(5), batch_size=4, cycle=False, order_check="off")
        with normal_model(ds), warnings.catch_warnings(action="error"):
            approx = pm.fit(5, callbacks=[ds.fit_callback()], **STANDING_STILL)
        assert batches_used(approx.hist) == [0, 1, 2, 3, 4]

    def test_without_it_advance_tells_the_end(self):
        ds = StreamingDataset(numbered(8), batch_size=4, cycle=False)
        with ds:
            assert ds.advance() and ds.advance()
            with pytest.warns(StreamWarning, match="with 0 rows left over"):
                assert not ds.advance()
            assert has_no_rows(ds)
            assert ds.epoch == 1
            with pytest.warns(StreamWarning), pytest.raises(StreamError, match="no full batch"):
                ds.advance()


class TestState:
    def test_it_is_small_plain_json(self, tmp_path):
        write_layout(tmp_path, [[20]])
        buffer = shuffle_buffer(parquet_source(tmp_path), buffer_size=8, batch_size=3, seed=1)
        ds = StreamingDataset(buffer, batch_size=3)
        with ds:
            for _ in range(9):
                ds.advance()
            state = json.loads(json.dumps(ds.state_dict()))
            expected = ds.as_tensor().get_value()
        other = StreamingDataset(buffer, batch_size=3)
        other.load_state_dict(state)
        with other:
            other.advance()
            np.testing.assert_array_equal(other.as_tensor().get_value(), expected)
        assert other.state_dict() == state

    @pytest.mark.parametrize("change", ["batch_size", "seed", "fingerprint"])
    def test_a_state_of_another_stream_is_refused(self, tmp_path, change):
        write_layout(tmp_path, [[20]])

        def dataset(batch_size=3, seed=1, buffer_size=8):
            buffer = shuffle_buffer(
                parquet_source(tmp_path), buffer_size=buffer_size, batch_size=batch_size, seed=seed
            )
            return StreamingDataset(buffer, batch_size=batch_size)

        state = dataset().state_dict()
        other = {"batch_size": 4} if change == "batch_size" else {"seed": 2}
        other = {"buffer_size": 9} if change == "fingerprint" else other
        with pytest.raises(ValueError, match=f"{change}=.* where the state was saved with"):
            dataset(**other).load_state_dict(state)


class TestScaling:
    """The stream's logp is the one that the same rows give through PyMC's own minibatches."""

    def model(self, x, y, total_size=60):
        with pm.Model() as model:
            b = pm.Normal("b", 0, 3, shape=2)
            sigma = pm.HalfNormal("sigma")
            pm.Normal("y", b[0] + b[1] * x, sigma, observed=y, total_size=total_size)
        return model

    def streamed(self, ds):
        return self.model(ds.as_tensor()[:, 0], ds.as_tensor()[:, 1], ds.total_size)

    rows = np.random.default_rng(0).normal(size=(60, 2))
    at = np.array([0.3, -0.2, 0.1])

    def value_and_gradient(self, model):
        return model.logp_dlogp_function(ravel_inputs=True, mode="FAST_COMPILE")(self.at)

    def test_logp_and_gradient_equal_those_of_pm_minibatch(self):
        """From equal rows, pm.Minibatch can draw only the batch that the stream has."""
        rows = np.tile([[0.4, -1.3]], (60, 1))
        ds = StreamingDataset(rows, batch_size=20)
        streamed = self.streamed(ds)
        drawn = self.model(*pm.Minibatch(*rows.T, batch_size=20))
        with ds:
            ds.advance()
            for one, other in zip(*map(self.value_and_gradient, (streamed, drawn))):
                np.testing.assert_allclose(one, other)

    def test_batch_gradients_of_an_epoch_average_to_the_full_gradient(self):
        buffer = shuffle_buffer(self.rows, buffer_size=30, batch_size=12, seed=0)
        ds = StreamingDataset(buffer, batch_size=12)
        streamed = self.streamed(ds)
        function = streamed.logp_dlogp_function(ravel_inputs=True, mode="FAST_COMPILE")
        gradients = []
        with ds:
            for _ in range(5):
                ds.advance()
                gradients.append(function(self.at)[1])
        _, full = self.value_and_gradient(self.model(*self.rows.T))
        np.testing.assert_allclose(np.mean(gradients, axis=0), full)


class TestArguments:
    def test_batch_sizes_of_buffer_and_dataset_agree(self):
        buffer = shuffle_buffer(numbered(9), buffer_size=8, batch_size=4)
        with pytest.raises(
            ValueError, match=r"batch_size=3 but .* batch_size=4; leave it out there"
        ):
            StreamingDataset(buffer, batch_size=3)

    def test_a_wrong_sample_shape_is_refused_with_the_columns(self, tmp_path):
        write_layout(tmp_path, [[5]])
        with pytest.raises(
            ValueError, match=r"sample_shape=\(3,\) but .* \(2,\), columns \['row', 'twice'\]"
        ):
            StreamingDataset(parquet_source(tmp_path), batch_size=2, sample_shape=(3,))

    @pytest.mark.parametrize("shape", [2, np.int64(2)])
    def test_a_sample_shape_is_a_tuple(self, shape):
        with pytest.raises(TypeError, match=r"sample_shape=2 must be a tuple; pass \(2,\)"):
            StreamingDataset(numbered(5), batch_size=2, sample_shape=shape)

    def test_rows_may_be_scalars_and_images(self):
        for shape in [(), (2, 3)]:
            ds = StreamingDataset(np.zeros((5, *shape)), batch_size=2)
            assert ds.sample_shape == shape
            assert ds.as_tensor().type.shape == (None, *shape)
            assert [batch.shape[1:] for batch in ds] == [shape] * 3

    def test_dtypes_are_numbers(self):
        with pytest.raises(TypeError, match="dtype='str' is not a number"):
            StreamingDataset(numbered(3), batch_size=2, dtype="str")

    def test_a_source_without_rows_is_refused(self):
        with pytest.raises(ValueError, match="has no rows"):
            StreamingDataset(np.empty((0, 2)), batch_size=2)
        with pytest.raises(ValueError, match="has no rows"):
            StreamingDataset(lambda: [numbered(0)], batch_size=2, sample_shape=(2,))

    def test_a_source_that_turns_empty_is_an_error(self):
        tables = iter([numbered(4)])
        ds = StreamingDataset(
            lambda: [next(tables, numbered(0))], batch_size=4, sample_shape=(2,), total_size=4
        )
        with ds, warnings.catch_warnings():
            warnings.simplefilter("ignore", StreamWarning)
            assert ds.advance()
            with pytest.raises(StreamError, match="gave no rows in epoch 1"):
                ds.advance()


class TestEpochLog:
    def run(self, caplog, *, n_epochs):
        ds = StreamingDataset(tell_tale(2), batch_size=4, order_check="off")
        with ds, caplog.at_level(logging.INFO, logger="pymc"):
            for _ in range(2 * n_epochs + 1):
                ds.advance()
        return [r.message for r in caplog.records if r.message.startswith("epoch")]

    def test_an_epoch_is_a_line_with_its_rows_rate_and_wait(self, caplog):
        lines = self.run(caplog, n_epochs=2)
        for epoch, line in enumerate(lines):
            pattern = rf"epoch {epoch}: 8 rows in \d+\.\d s \([\d,]+ rows/s\), \d+% of the time"
            assert re.match(pattern, line)
        assert len(lines) == 2

    def test_many_short_epochs_share_a_line(self, caplog, monkeypatch):
        monkeypatch.setattr(utils, "_PAUSE", 0.05)
        lines = self.run(caplog, n_epochs=2000)
        assert 10 < len(lines) < 200
        found = [list(map(int, re.findall(r"\d+", line.partition(":")[0]))) for line in lines]
        assert [span[0] for span in found] == [0, *(span[-1] + 1 for span in found[:-1])]
        rows = [int(re.search(r": ([\d,]+) rows in", line)[1].replace(",", "")) for line in lines]
        assert rows == [8 * (span[-1] - span[0] + 1) for span in found]

    def test_a_slow_source_is_waited_for(self, caplog):
        def blocks():
            for _ in range(4):
                time.sleep(0.1)
                yield np.ones((2, 2))

        ds = StreamingDataset(blocks, batch_size=2, total_size=8, order_check="off")
        with ds, caplog.at_level(logging.INFO, logger="pymc"):
            for _ in range(5):
                ds.advance()
        (line,) = [r.message for r in caplog.records if r.message.startswith("epoch")]
        assert int(re.search(r"(\d+)% of the time", line)[1]) > 60
