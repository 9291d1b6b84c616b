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
"""Order is told before the first step, while rows stream, or when the fit ends."""

import subprocess
import sys

from typing import Any

import numpy as np
import pytest

import pymc as pm

from pymc.variational.streaming import (
    OrderError,
    OrderWarning,
    StreamingDataset,
    parquet_source,
    shuffle_buffer,
)
from tests.variational.streaming.order.test_order import advance_through, draw, in_sequence, write

QUICK = {"progressbar": False, "compile_kwargs": {"mode": "FAST_COMPILE"}}


def model_of(ds: StreamingDataset, column: int = 0) -> pm.Model:
    with pm.Model() as model:
        mu = pm.Normal("mu")
        pm.Normal("y", mu, observed=ds.as_tensor()[:, column], total_size=ds.total_size)
    return model


def fit(ds: StreamingDataset, n_steps: int = 40, callback: Any = None):
    with model_of(ds):
        return pm.fit(n_steps, callbacks=[callback or ds.fit_callback()], **QUICK)


class TestStreaming:
    drifting = (
        np.random.default_rng(9).normal(size=(20_000, 1)) + np.linspace(0, 2, 20_000)[:, None]
    )
    second_drifts = np.column_stack([np.random.default_rng(12).normal(size=20_000), drifting])

    def dataset(self, rows, **kwargs) -> StreamingDataset:
        buffer = shuffle_buffer(rows, buffer_size=1_000, batch_size=500, seed=0)
        return StreamingDataset(buffer, batch_size=500, **kwargs)

    def test_a_fit_of_ordered_rows_warns_once_before_the_first_step(self):
        ds = self.dataset(self.drifting)
        with pytest.warns(OrderWarning, match="20 windows of 1,000 rows") as caught:
            callback = ds.fit_callback()
        assert [w.filename for w in caught] == [__file__]
        del callback
        fit(ds)

    def test_a_fit_of_a_sequence_warns_while_it_streams(self):
        ds = self.dataset(in_sequence(self.drifting))
        ds.advance()
        with pytest.warns(OrderWarning, match="order that the stream does not mix") as caught:
            fit(ds, 100)
        assert [w.filename for w in caught] == [__file__]

    def test_raising_ends_the_fit_with_an_error(self):
        ds = self.dataset(in_sequence(self.drifting), order_check="raise")
        with pytest.raises(OrderError, match="Shuffle the table once"):
            fit(ds, 100)
        assert len(ds.as_tensor().get_value()) == 0
        with pytest.raises(OrderError):
            ds.advance()

    def test_batches_that_are_not_shuffled_are_the_windows(self):
        ds = StreamingDataset(self.drifting, batch_size=500, order_check="raise")
        with pytest.raises(OrderError, match="windows of 500 rows"):
            ds.advance()

    def test_off_is_silent_and_has_the_same_batches(self):
        def batches(order_check):
            with self.dataset(in_sequence(self.drifting), order_check=order_check) as ds:
                for _ in range(60):
                    ds.advance()
                    yield ds.as_tensor().get_value()

        unchecked = list(batches("off"))
        with pytest.warns(OrderWarning):
            np.testing.assert_array_equal(list(batches("warn")), unchecked)

    def test_prefetch_does_not_change_when_the_alarm_comes(self):
        def steps(prefetch):
            ds = self.dataset(in_sequence(self.drifting), order_check="raise", prefetch=prefetch)
            with pytest.raises(OrderError):
                advance_through(ds)
            return ds.rows_seen

        assert steps(prefetch=True) == steps(prefetch=False)

    def test_epochs_and_reopened_streams_do_not_count_twice(self):
        """The chance differences of 20 windows, counted 60 times, would be an alarm."""
        rows = np.random.default_rng(10).normal(size=(20_000, 1))
        for source in (rows, in_sequence(rows)):
            ds = self.dataset(source, order_check="raise", prefetch=False)
            for step in range(60 * 40):
                assert ds.advance()
                if step % 150 == 0:
                    ds.close()
            ds.close()

    def test_rows_that_are_known_to_be_shuffled_skip_the_sample_only(self, tmp_path):
        source = parquet_source(write(tmp_path, self.drifting, 1_000))
        source.shuffled = True
        with self.dataset(source, order_check="raise", prefetch=False) as ds:
            assert ds.advance()
            with pytest.raises(OrderError):
                advance_through(ds)

    @pytest.mark.parametrize(
        "sequential, n_steps, told",
        [(True, 3, "was not compared"), (True, 4, ""), (False, 3, "a sample of 3,840 rows only")],
    )
    def test_a_fit_that_ends_before_all_rows_were_compared_says_so(
        self, caplog, sequential, n_steps, told
    ):
        rows = draw("normal", 4_000)
        source = in_sequence(rows) if sequential else rows
        ds = StreamingDataset(source, batch_size=1_000, total_size=4_000, prefetch=False)
        with caplog.at_level("INFO", logger="pymc"):
            fit(ds, n_steps)
        found = [text for text in caplog.messages if "used 3,000 rows, less than one epoch" in text]
        assert len(found) == bool(told)
        assert all(told in text for text in found)

    def test_a_fit_that_goes_on_in_a_later_epoch_and_sees_a_part_of_it_says_so(self, caplog):
        """Of a sequence, the rest of the table was compared in another process, if at all."""
        ds = StreamingDataset(
            in_sequence(draw("normal", 4_000)), batch_size=500, total_size=4_000, prefetch=False
        )
        position = ds.state_dict() | {"epoch": 2, "offset": 1_000, "rows_seen": 9_000}
        ds.load_state_dict(position)
        fit(ds, 2)
        (text,) = (text for text in caplog.messages if "less than one epoch" in text)
        assert "The check of the order used 1,590 rows" in text and "was not compared" in text

    def test_a_short_fit_to_rows_that_are_known_to_be_shuffled_is_silent(self, tmp_path, caplog):
        source = parquet_source(write(tmp_path, draw("normal", 4_000), 1_000))
        source.shuffled = True
        with caplog.at_level("INFO", logger="pymc"):
            fit(StreamingDataset(source, batch_size=1_000, prefetch=False), 2)
        assert not [text for text in caplog.messages if "less than one epoch" in text]

    def test_an_order_that_shows_after_the_last_step_is_told_when_the_fit_ends(self):
        """The fit ends in the 19th window, and those before were compared up to the 14th."""
        rows = np.random.default_rng(11).normal(size=(20_000, 1))
        rows[17_000:] += 3
        ds = self.dataset(in_sequence(rows), total_size=20_000, prefetch=False)
        with pytest.warns(OrderWarning, match="found when the last step had been made") as caught:
            fit(ds, 37)
        assert len(caught) == 1

    def test_a_short_fit_does_not_end_the_comparison(self):
        """The rows of the fits together are in an order, those of the first are not."""
        rows = np.random.default_rng(11).normal(size=(20_000, 1))
        rows[4_000:] += 3
        ds = self.dataset(in_sequence(rows), total_size=20_000, prefetch=False)
        fit(ds, 4)
        with pytest.warns(OrderWarning):
            fit(ds, 30)

    @pytest.mark.parametrize("is_sequence", [False, True], ids=["array", "sequence"])
    @pytest.mark.parametrize("is_kept", [False, True], ids=["closed", "open"])
    def test_each_model_is_asked_of_the_rows_that_it_reads(self, is_sequence, is_kept):
        """Also after a fit of a model that does not read the column that is in an order."""
        source = in_sequence(self.second_drifts) if is_sequence else self.second_drifts
        ds = self.dataset(source, total_size=20_000)
        with model_of(ds):
            callback = ds.fit_callback()
            pm.fit(50, callbacks=[callback], **QUICK)
        if not is_kept:
            del callback
        with model_of(ds, 1), pytest.warns(OrderWarning, match="gradient of mu"):
            pm.fit(90, callbacks=[ds.fit_callback()], **QUICK)

    def test_a_model_that_is_offered_the_callback_of_a_stream_is_asked_too(self):
        """As PyMC does for a fit that passes none, while that of another fit is kept."""
        ds = self.dataset(self.second_drifts)
        with model_of(ds):
            kept = ds.fit_callback()
        with model_of(ds, 1), pytest.warns(OrderWarning, match="gradient of mu"):
            ds.as_tensor().tag.fit_callback()
        del kept

    def test_a_second_fit_of_a_model_goes_on_with_the_comparison(self, monkeypatch):
        rows = np.random.default_rng(11).normal(size=(20_000, 1))
        rows[4_000:] += 3
        ds = self.dataset(in_sequence(rows), total_size=20_000, prefetch=False)
        with pm.Model():
            mu = pm.Normal("mu")
            pm.Normal("y", mu, observed=ds.as_tensor()[:, 0], total_size=20_000)
            pm.fit(6, callbacks=[ds.fit_callback()], **QUICK)
            with pytest.warns(OrderWarning):
                pm.fit(6, callbacks=[ds.fit_callback()], **QUICK)

    def test_rows_that_a_position_passes_over_are_not_made_up(self):
        """Other rows would stand for those in the gap, and an alarm would follow."""
        rows = np.random.default_rng(0).normal(size=(200_000, 2))
        source = in_sequence(rows)
        ds = self.dataset(source, total_size=200_000, order_check="raise", prefetch=False)
        for _ in range(3):
            ds.advance()
        position = ds.state_dict()
        ds.load_state_dict(position | {"offset": 51_000, "rows_seen": 51_000})
        advance_through(ds)
        ds.close()

    def test_a_callback_that_is_kept_until_python_ends_tells_then(self):
        code = f"""if True:
            import tests
            from {__name__} import *
            rows = np.repeat([0.0, 3.0], [1_000, 19_000])[:, None] + TestStreaming.drifting
            ds = TestStreaming().dataset(in_sequence(rows), total_size=20_000)
            callback = ds.fit_callback()
            fit(ds, 4, callback)
        """
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert "found when the last step had been made" in done.stderr
        assert done.returncode == 0 and "Traceback" not in done.stderr

    def test_other_choices_are_refused(self):
        with pytest.raises(ValueError, match="is not a choice; pass 'warn', 'raise' or 'off'"):
            StreamingDataset(self.drifting, batch_size=9, order_check="maybe")

    @pytest.mark.parametrize("n_rows, batch_size", [(1, 1), (7, 3), (7, 10), (30, 1), (30, 10)])
    def test_tables_too_small_for_a_claim_pass_in_silence(self, n_rows, batch_size):
        rows = np.random.default_rng(12).normal(size=(n_rows, 2))
        ds = StreamingDataset(rows, batch_size=batch_size, order_check="raise", prefetch=False)
        with ds:
            for _ in range(3 * n_rows // batch_size + 2):
                ds.advance()
