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
"""What a fit sees of a stream, step by step."""

import gc
import sys
import time
import warnings

import cloudpickle
import numpy as np
import pytest

from pytensor.compile.sharedvalue import SharedVariable
from pytensor.graph.traversal import ancestors

import pymc as pm

from pymc.variational.streaming import (
    StreamError,
    StreamingDataset,
    StreamWarning,
)
from tests.variational.streaming.held import prefetch_threads
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


def buffer_of(model: pm.Model) -> SharedVariable:
    (buffer,) = (v for v in ancestors(model.rvs_to_values.values()) if hasattr(v, "container"))
    return buffer


class TestSteps:
    """Step k trains on batch k, from k = 0; no batch is used twice, none is skipped."""

    @pytest.mark.parametrize("prefetch", [True, False])
    def test_every_step_uses_the_next_batch(self, prefetch):
        ds = StreamingDataset(tell_tale(5), batch_size=4, prefetch=prefetch)
        with normal_model(ds):
            approx = pm.fit(12, callbacks=[ds.fit_callback()], **STANDING_STILL)
        assert batches_used(approx.hist) == [0, 1, 2, 3, 4] * 2 + [0, 1]
        assert (ds.epoch, ds.rows_seen) == (2, 48)

    def test_callbacks_before_it_see_the_batch_that_the_step_used(self):
        ds = StreamingDataset(tell_tale(5), batch_size=4)
        seen = []
        with normal_model(ds):
            approx = pm.fit(
                4,
                callbacks=[
                    lambda *_: seen.append(ds.as_tensor().get_value()[0, 0] / 1000 - 1),
                    ds.fit_callback(),
                ],
                **STANDING_STILL,
            )
        assert seen == batches_used(approx.hist)

    def test_a_fit_that_repeats_its_random_draw_is_refused(self):
        """Without a loss, as in ASVGD, PyMC 6.4 draws the same random numbers in each step."""
        ds = StreamingDataset(tell_tale(5), batch_size=4)
        with (
            normal_model(ds),
            pytest.raises(StreamError, match=r"score=False.*ASVGD.*leave score out"),
        ):
            pm.fit(3, score=False, callbacks=[ds.fit_callback()], **STANDING_STILL)

    def test_a_method_without_a_loss_or_random_draws_streams(self):
        ds = StreamingDataset(tell_tale(5), batch_size=4)
        seen = []
        with normal_model(ds):
            pm.SVGD(n_particles=3).fit(
                3,
                callbacks=[lambda *_: seen.append(ds.rows_seen), ds.fit_callback()],
                **STANDING_STILL,
            )
        assert seen == [0, 4, 8]

    def test_several_streams_keep_their_own_pace(self):
        small = StreamingDataset(tell_tale(3), batch_size=4, name="small")
        large = StreamingDataset(tell_tale(5, 2), batch_size=2, name="large")
        with pm.Model():
            mu = pm.Normal("mu")
            pm.Normal("y", mu, 1, observed=small.as_tensor()[:, 0], total_size=12)
            pm.Normal("z", mu, 1, observed=large.as_tensor()[:, 0], total_size=10)
            approx = pm.fit(
                7, callbacks=[small.fit_callback(), large.fit_callback()], **STANDING_STILL
            )
        k = np.arange(7)
        expected = 12 * (k % 3 + 1.0) ** 2 / 2 + 10 * (k % 5 + 1.0) ** 2 / 2
        largest_scale = 10 / 2
        np.testing.assert_allclose(approx.hist / 1e6 * largest_scale, expected, rtol=0.02)

    def test_a_stream_that_stands_still_beside_another_is_told_of_once(self):
        """One batch would be fitted as all rows, as where a callback was kept and not passed."""
        ds = StreamingDataset(tell_tale(5), batch_size=4, order_check="off")
        other = StreamingDataset(tell_tale(5), batch_size=4, order_check="off", name="other")
        with normal_model(ds) as model:
            pm.Normal("z", model["mu"], 1, observed=other.as_tensor()[:, 0], total_size=20)
            approx, callback, kept = pm.MeanField(), ds.fit_callback(), other.fit_callback()
        callback(approx, np.zeros(1), 1)
        with pytest.warns(StreamWarning, match=r"'other' has not moved .* pass its fit_callback"):
            callback(approx, np.zeros(2), 2)
        with warnings.catch_warnings(action="error"):
            for i in (3, 4):
                callback(approx, np.zeros(i), i)
            with model:
                pm.fit(3, callbacks=[callback, kept], **QUICK)

    @pytest.mark.parametrize("prefetch", [True, False])
    def test_refine_goes_on_after_an_interrupt_that_came_while_the_fit_waited(self, prefetch):
        interrupts = [5, 7]

        def source():
            for k, batch in enumerate(np.split(tell_tale(10), 10)):
                if k in interrupts:
                    interrupts.remove(k)
                    raise KeyboardInterrupt
                yield batch

        ds = StreamingDataset(source, batch_size=4, total_size=40, prefetch=prefetch)
        with normal_model(ds):
            inference = pm.ADVI()
            inference.fit(20, callbacks=[ds.fit_callback()], **STANDING_STILL)
            assert len(inference.hist) == 4  # PyMC forgets the loss of the last step
            inference.refine(20, progressbar=False)
            assert batches_used(inference.hist) == [0, 1, 2, 3, 4, 5]
            del inference
            gc.collect()
            assert has_no_rows(ds)
            second = pm.fit(2, callbacks=[ds.fit_callback()], **STANDING_STILL)
        assert batches_used(second.hist) == [7, 8]

    def test_refine_after_the_end_is_an_error_and_leaves_the_fit_alone(self):
        ds = StreamingDataset(tell_tale(5), batch_size=4, cycle=False)
        with normal_model(ds):
            inference = pm.ADVI()
            with pytest.warns(StreamWarning, match="ended after 5 batches"):
                inference.fit(50, callbacks=[ds.fit_callback()], **STANDING_STILL)
            with pytest.warns(StreamWarning), pytest.raises(StreamError, match="no full batch"):
                inference.refine(3, progressbar=False)
        assert all(np.isfinite(p.get_value()).all() for p in inference.approx.params)


class TestCallback:
    def test_a_loop_of_ones_own_takes_the_stream_over_with_the_batch_that_no_step_used(self):
        ds = StreamingDataset(tell_tale(5), batch_size=4)
        callback = ds.fit_callback()
        with ds:
            assert ds.advance() and ds.rows_seen == 0
            assert (ds.as_tensor().get_value() == 1_000).all()
            with normal_model(ds), pytest.raises(StreamError, match="taken the stream over"):
                pm.fit(3, callbacks=[callback], **QUICK)
            del callback
            assert ds.advance() and ds.rows_seen == 4
            assert (ds.as_tensor().get_value() == 2_000).all()

    @pytest.mark.parametrize("stop", [KeyboardInterrupt, ZeroDivisionError])
    def test_a_stopped_fit_leaves_no_thread_and_no_batch(self, stop):
        def interrupt(approx, losses, i):
            if i == 12:
                raise stop

        ds = StreamingDataset(tell_tale(500), batch_size=4, order_check="off")
        with normal_model(ds):
            try:
                pm.fit(20, callbacks=[interrupt, ds.fit_callback()], **QUICK)
            except ZeroDivisionError:
                pass
        gc.collect()
        assert not prefetch_threads()
        assert has_no_rows(ds)

    @pytest.mark.parametrize("method", [pm.ADVI, lambda: pm.SVGD(n_particles=3)])
    def test_it_is_called_once_for_each_step(self, method):
        """A second call would skip a batch in every step."""
        ds = StreamingDataset(tell_tale(5), batch_size=4)
        with normal_model(ds):
            callback = ds.fit_callback()
            again = [callback, lambda *args: callback(*args)]
            quick = {**QUICK, "obj_optimizer": pm.sgd(learning_rate=1e-6)}
            with pytest.raises(StreamError, match=r"called twice for step 1, .* to the fit once"):
                method().fit(3, callbacks=again, **quick)
            inference = method()
            for _ in range(2):
                inference.fit(1, callbacks=[ds.fit_callback()], **quick)
            inference.refine(2, progressbar=False)

    def test_it_is_passed_in_a_list(self):
        ds = StreamingDataset(tell_tale(5), batch_size=4)
        with normal_model(ds):
            with pytest.raises(TypeError, match=r"pass callbacks=\[ds\.fit_callback\(\)\]"):
                pm.fit(3, callbacks=ds.fit_callback(), **QUICK)
            pm.fit(3, callbacks=[ds.fit_callback()], **QUICK)

    @pytest.mark.parametrize("prefetch", [True, False])
    def test_an_error_of_the_source_reaches_the_fit(self, prefetch):
        def source():
            yield tell_tale(2)
            raise OSError("the disk is on fire")

        ds = StreamingDataset(source, batch_size=4, total_size=400, prefetch=prefetch)
        with normal_model(ds), pytest.raises(OSError, match="the disk is on fire"):
            pm.fit(20, callbacks=[ds.fit_callback()], **QUICK)
        assert has_no_rows(ds)

    def test_a_source_that_runs_out_is_an_error_that_pymc_does_not_swallow(self):
        ds = StreamingDataset(iter([tell_tale(3)]), batch_size=4, total_size=12)
        with normal_model(ds), pytest.raises(StreamError, match="one-shot iterator"):
            pm.fit(20, callbacks=[ds.fit_callback()], **QUICK)

    def test_the_interpreter_switches_threads_faster_while_streams_are_open(self):
        """A compiled step holds the interpreter, and the thread that reads waits for it."""
        gc.collect()  # or a stream that another test left in a traceback would be open still
        usual = sys.getswitchinterval()
        first, second = (StreamingDataset(tell_tale(3), batch_size=4) for _ in range(2))
        first.advance()
        second.advance()
        first.close()
        assert sys.getswitchinterval() < usual
        second.close()
        assert sys.getswitchinterval() == usual

    def test_a_stream_that_nothing_uses_rests_and_goes_on_with_refine(self):
        """A notebook keeps the inference, or the exception that ended a fit."""
        gc.collect()
        usual = sys.getswitchinterval()
        ds = StreamingDataset(tell_tale(7), batch_size=4)
        with normal_model(ds):
            inference = pm.ADVI()
            inference.fit(3, callbacks=[ds.fit_callback()], **STANDING_STILL)
            assert sys.getswitchinterval() < usual
            deadline = time.monotonic() + 30
            while sys.getswitchinterval() != usual and time.monotonic() < deadline:
                time.sleep(0.1)
            assert sys.getswitchinterval() == usual
            inference.refine(3, progressbar=False)
            assert sys.getswitchinterval() < usual
        assert batches_used(inference.hist) == [0, 1, 2, 3, 4, 5]
        del inference
        gc.collect()
        assert sys.getswitchinterval() == usual


class TestOffer:
    """The buffer's tag offers a fit the callback that is missing, and no second one."""

    @pytest.fixture
    def ds(self):
        with StreamingDataset(tell_tale(9), batch_size=4) as ds:
            yield ds

    @pytest.fixture
    def fit(self, ds):
        """Return a function that makes steps, and gives the numbers of the batches they used."""
        with normal_model(ds) as model:
            approx = pm.MeanField()

        def steps(n: int, *callbacks) -> list[int]:
            used = []
            for i in range(1, n + 1):
                used.append(int(ds.as_tensor().get_value()[0, 0]) // 1000 - 1)
                for callback in callbacks:
                    callback(approx, np.zeros(i), i)
            return used

        with model:
            yield steps

    def offer(self, ds):
        return ds.as_tensor().tag.fit_callback()

    def test_its_callback_drives_the_stream(self, ds, fit):
        assert fit(4, self.offer(ds)) == [0, 1, 2, 3]
        gc.collect()
        assert has_no_rows(ds)
        assert fit(2, self.offer(ds)) == [4, 5]

    def test_its_callback_leaves_the_stream_to_one_that_was_passed(self, ds, fit):
        passed = ds.fit_callback()
        assert fit(4, lambda *args: passed(*args), self.offer(ds)) == [0, 1, 2, 3]

    def test_its_callback_takes_the_stream_from_one_that_is_not_called(self, ds, fit):
        earlier = ds.fit_callback()
        callback = self.offer(ds)
        assert fit(4, callback) == [0, 1, 2, 3]
        with pytest.raises(StreamError, match="taken the stream over"):
            fit(1, earlier)

    @pytest.mark.parametrize("first_by_hand", [True, False])
    def test_its_callback_leaves_the_stream_to_a_loop_of_ones_own(self, ds, fit, first_by_hand):
        if first_by_hand:
            ds.advance()
        callback = self.offer(ds)
        used = fit(1, callback)
        for _ in range(4):
            ds.advance()
            used += fit(1, callback)
        assert used == [0, 1, 2, 3, 4]

    def test_its_callback_drives_the_stream_when_a_loop_no_longer_does(self, ds, fit):
        ds.advance()
        assert fit(5, self.offer(ds)) == [0, 0, 1, 2, 3]

    def test_it_refuses_a_wrong_model_before_the_first_step(self, ds):
        for opened in (False, True):
            with normal_model(ds, total_size=35):
                with pytest.raises(StreamError, match="has total_size=35; pass total_size=36"):
                    self.offer(ds)
            if not opened:
                ds.advance()

    def test_it_is_refused_while_the_buffer_holds_other_rows(self, ds):
        for driven in (False, True):
            callback = ds.fit_callback() if driven else None
            with ds.rows(tell_tale(2)), pytest.raises(StreamError, match="holds other rows"):
                self.offer(ds)
            del callback

    def test_a_model_without_its_dataset_has_none(self, ds):
        """Nor a batch, which a fit that asks for no offer would take for all rows."""
        with normal_model(ds) as model:
            ds.advance()
        pickled = cloudpickle.loads(cloudpickle.dumps(model))
        assert not len(buffer_of(pickled).get_value()) and len(buffer_of(model).get_value())
        dropped = normal_model(StreamingDataset(tell_tale(9), batch_size=4))
        gc.collect()
        for alone in (pickled, dropped):
            with pytest.raises(
                StreamError, match=r"'stream', whose .* is gone; keep .* as \(model, dataset\)"
            ):
                buffer_of(alone).tag.fit_callback()

    @pytest.mark.parametrize("order", [1, -1])
    def test_a_model_that_travels_with_its_dataset_keeps_it(self, ds, order):
        pair = cloudpickle.dumps((normal_model(ds), ds)[::order])
        model, other = cloudpickle.loads(pair)[::order]
        with model, other:
            callback = buffer_of(model).tag.fit_callback()
            assert (buffer_of(model).get_value() == 1_000).all()
            del callback
        assert has_no_rows(ds)
