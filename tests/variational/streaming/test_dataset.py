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
"""The dataset, its callback, and what a fit sees of them."""

import copy
import gc
import itertools
import json
import logging
import pickle
import sys
import warnings

import cloudpickle
import numpy as np
import pyarrow as pa
import pytensor
import pytest

from pytensor.compile.mode import Mode
from pytensor.compile.sharedvalue import SharedVariable
from pytensor.graph.traversal import ancestors

import pymc as pm

from pymc.variational.streaming import (
    EpochAverage,
    StreamError,
    StreamingDataset,
    StreamWarning,
    parquet_source,
    shuffle_buffer,
)
from tests.variational.streaming.held import prefetch_threads
from tests.variational.streaming.strategies import numbered, write_layout

QUICK = {"compile_kwargs": {"mode": "FAST_COMPILE"}, "progressbar": False}
STANDING_STILL = {"obj_optimizer": pm.sgd(learning_rate=1e-30), **QUICK}
REWRITTEN = Mode(linker="py", optimizer="fast_run")
"""As in the default mode, the total_size scales a sum of terms, so that no terms give NaN."""


def tell_tale(n_batches: int, batch_size: int = 4) -> np.ndarray:
    """Return batches whose rows are all 1000 (k + 1), so that the loss tells the batch."""
    return np.repeat(1000.0 * np.arange(1, n_batches + 1), batch_size)[:, None]


def batches_used(losses: np.ndarray, batch_size: int = 4) -> list[int]:
    """Recover from the losses of `normal_model` which tell-tale batch each step used.

    PyMC divides the loss by the largest total_size / batch_size.
    """
    return (np.round(np.sqrt(2 * losses / batch_size) / 1000) - 1).astype(int).tolist()


def normal_model(ds: StreamingDataset, **kwargs) -> pm.Model:
    with pm.Model() as model:
        mu = pm.Normal("mu")
        kwargs = {"total_size": ds.total_size, **kwargs}
        pm.Normal("y", mu, 1, observed=ds.as_tensor()[:, 0], **kwargs)
    return model


def first_loss(mode=REWRITTEN) -> float:
    """Return the loss of the first step of a fit to which nothing adds a callback."""
    step = pm.ADVI().objective.step_function(score=True, compile_kwargs={"mode": mode})
    return float(step())


def buffer_of(model: pm.Model) -> SharedVariable:
    (buffer,) = (v for v in ancestors(model.rvs_to_values.values()) if hasattr(v, "container"))
    return buffer


def has_no_rows(ds: StreamingDataset) -> bool:
    return ds.as_tensor().get_value().shape == (0, *ds.sample_shape)


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    if prefetch_threads():  # of a stream that a cycle of references keeps, as a traceback does
        gc.collect()
    for thread in prefetch_threads():
        thread.join(30)  # closing does not wait while it compiles the loops of the order check
    assert not prefetch_threads()


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
    "Normal, only its mean streams": lambda rows, x, k: pm.Normal(
        "y", pm.Normal("m") * x, 1, observed=x * 0, total_size=9
    ),
    "Poisson": lambda rows, x, k: pm.Poisson("y", pm.HalfNormal("m"), observed=k, total_size=9),
    "Bernoulli": lambda rows, x, k: pm.Bernoulli(
        "y", logit_p=pm.Normal("m"), observed=k, total_size=9
    ),
    "Categorical": lambda rows, x, k: pm.Categorical(
        "y", pm.Dirichlet("m", np.ones(3)), observed=k, total_size=9
    ),
    "groups": lambda rows, x, k: pm.Normal(
        "y", pm.Normal("m", shape=3)[k.astype("int64")], 1, observed=x, total_size=9
    ),
    "MvNormal": lambda rows, x, k: pm.MvNormal(
        "y", pm.Normal("m", shape=2), np.eye(2), observed=rows, total_size=9
    ),
}


class TestNoRows:
    """A model whose stream has no rows fits nothing and predicts nothing."""

    @pytest.mark.parametrize(
        "name, dtype",
        [*((name, "float64") for name in LIKELIHOODS), ("Normal", "int64"), ("Poisson", "int64")],
    )
    def test_a_step_without_the_callback_has_no_loss_and_a_prediction_no_rows(self, name, dtype):
        rows = StreamingDataset(numbered(9), batch_size=3, dtype=dtype).as_tensor()
        with pm.Model():
            x = rows[:, 0].astype("float64")
            LIKELIHOODS[name](rows.astype("float64"), x, rows[:, 1])
            assert np.isnan(first_loss())
            prior = pm.sample_prior_predictive(5, compile_kwargs={"mode": "FAST_COMPILE"})
        assert prior.prior_predictive["y"].shape[:3] == (1, 5, 0)

    @pytest.mark.parametrize("mode", ["NUMBA", "CVM"])
    def test_a_compiled_step_has_no_loss_either(self, mode):
        counts = StreamingDataset(np.ones((9, 1)), batch_size=3)
        with pm.Model():
            pm.Poisson("y", pm.HalfNormal("m"), observed=counts.as_tensor()[:, 0], total_size=9)
            assert np.isnan(first_loss(mode))

    def test_nor_does_a_second_fit_without_the_callback(self):
        ds = StreamingDataset(tell_tale(3), batch_size=4)
        with normal_model(ds):
            pm.fit(3, callbacks=[ds.fit_callback()], **QUICK)
            assert has_no_rows(ds)
            assert np.isnan(first_loss())

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

    def test_infinities_of_both_signs_do_not_hide_each_other(self):
        rows = np.array([[1.0], [np.inf], [-np.inf]])
        with pytest.raises(StreamError, match="row 1 of the stream holds inf"):
            list(StreamingDataset(rows, batch_size=3))

    @pytest.mark.parametrize("kind, dtype", [("int64", "float64"), ("int32", "float32")])
    def test_a_file_of_integers_is_checked_against_the_buffer(self, tmp_path, kind, dtype):
        """The file's own type holds them, and NumPy calls the cast of int64 to float64 safe."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        beyond = {"float64": 2**53, "float32": 2**24}[dtype] + 1
        pq.write_table(pa.table({"n": np.array([1, beyond], kind)}), tmp_path / "a.parquet")
        ds = StreamingDataset(parquet_source(tmp_path), batch_size=2, dtype=dtype)
        with pytest.raises(StreamError, match=rf"holds {beyond} in column 'n', which {dtype}"):
            list(ds)

    def test_integers_beside_floats_survive_a_narrower_buffer_or_are_refused(self, tmp_path):
        """The rows are float64 already; that the column held integers is still known."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.table({"x": [0.1, 0.2], "user": [5, 2**24 + 1]}), tmp_path / "a.parquet")
        ds = StreamingDataset(parquet_source(tmp_path), batch_size=2, dtype="float32")
        with pytest.raises(StreamError, match=r"holds 16777217\.0 in column 'user', which float32"):
            list(ds)


class TestSteps:
    """Step k trains on batch k, from k = 0; no batch is used twice, none is skipped."""

    @pytest.mark.parametrize("prefetch", [True, False])
    def test_every_step_uses_the_next_batch(self, prefetch):
        ds = StreamingDataset(tell_tale(5), batch_size=4, prefetch=prefetch)
        with normal_model(ds):
            approx = pm.fit(12, callbacks=[ds.fit_callback()], **STANDING_STILL)
        assert batches_used(approx.hist) == [0, 1, 2, 3, 4] * 2 + [0, 1]
        assert (ds.epoch, ds.rows_seen) == (2, 48)

    def test_refine_goes_on_with_the_next_batch(self):
        ds = StreamingDataset(tell_tale(7), batch_size=4)
        with normal_model(ds):
            inference = pm.ADVI()
            inference.fit(3, callbacks=[ds.fit_callback()], **STANDING_STILL)
            inference.refine(3, progressbar=False)
        assert batches_used(inference.hist) == [0, 1, 2, 3, 4, 5]

    def test_a_second_fit_goes_on_with_the_batch_that_no_step_used(self):
        ds = StreamingDataset(tell_tale(7), batch_size=4)
        with normal_model(ds):
            first = pm.fit(2, callbacks=[ds.fit_callback()], **STANDING_STILL)
            second = pm.fit(2, callbacks=[ds.fit_callback()], **STANDING_STILL)
        hist = np.concatenate([first.hist, second.hist])
        assert batches_used(hist) == [0, 1, 2, 3]

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

    def test_it_keeps_the_stream_when_advance_is_refused(self):
        ds = StreamingDataset(tell_tale(5), batch_size=4)
        callback = ds.fit_callback()
        with ds.rows(tell_tale(1)), pytest.raises(StreamError, match="holds other rows"):
            ds.advance()
        with normal_model(ds):
            approx = pm.fit(3, callbacks=[callback], **STANDING_STILL)
        assert batches_used(approx.hist) == [0, 1, 2]

    def test_the_newest_owns_the_stream(self):
        ds = StreamingDataset(tell_tale(3), batch_size=4)
        old, new = ds.fit_callback(), ds.fit_callback()
        with normal_model(ds):
            with pytest.raises(StreamError, match="or a newer fit_callback"):
                old(pm.MeanField(), np.zeros(1), 1)
            del old
            assert not has_no_rows(ds)
            pm.fit(3, callbacks=[new], **QUICK)

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

    def test_a_dataset_that_is_dropped_ends_its_thread(self):
        ds = StreamingDataset(tell_tale(500), batch_size=4, order_check="off")
        ds.advance()
        assert prefetch_threads()
        del ds
        gc.collect()
        assert not prefetch_threads()

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
        with normal_model(ds) as model:
            ds.advance()
        pickled = cloudpickle.loads(cloudpickle.dumps(model))
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

    def test_an_array_that_grows_is_an_error(self):
        class Growing:
            dtype, rows = np.dtype("float64"), numbered(7).astype("float64")
            shape = property(lambda self: self.rows.shape)

            def __getitem__(self, index):
                return self.rows[index]

        array = Growing()
        ds = StreamingDataset(array, batch_size=2, total_size=7)
        array.rows = numbered(9).astype("float64")
        with ds, pytest.raises(StreamError, match="gave 9 rows in an epoch but 7 before"):
            for _ in range(10):
                ds.advance()

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

    def test_what_is_not_known_is_not_shown(self):
        ds = StreamingDataset(lambda: [np.ones((9, 20))], batch_size=2, total_size=9)
        assert "an unknown number of rows" in repr(ds)
        many = StreamingDataset(pa.table({f"c{i}": [1.0] for i in range(9)}), batch_size=1)
        assert "c7, 1 more; epoch" in repr(many)


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

    def test_a_table_smaller_than_a_batch_repeats_whole_epochs(self):
        ds = StreamingDataset(numbered(3), batch_size=7)
        with ds:
            ds.advance()
            assert ds.as_tensor().get_value()[:, 0].tolist() == [0, 1, 2, 0, 1, 2, 0]


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

    def test_logp_and_gradient_equal_those_of_the_rows_in_memory(self):
        ds = StreamingDataset(self.rows, batch_size=20)
        streamed = self.streamed(ds)
        in_memory = self.model(*self.rows[20:40].T)
        with ds:
            ds.advance()
            ds.advance()
            for one, other in zip(*map(self.value_and_gradient, (streamed, in_memory))):
                np.testing.assert_allclose(one, other)

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

    def test_a_wrong_sample_shape_of_blocks_is_refused_when_they_come(self):
        ds = StreamingDataset(lambda: [numbered(5)], batch_size=2, sample_shape=(3,), total_size=5)
        with pytest.raises(StreamError, match=r"rows of shape \(2,\); sample_shape=\(3,\)"):
            list(ds)

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
