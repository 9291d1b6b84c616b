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
"""Forked and spawned processes, interrupts, reads that block, and many datasets in a row."""

import contextlib
import gc
import os
import pickle
import signal
import sys
import threading
import time

import numpy as np
import pytest

import pymc as pm

from pymc.variational.streaming import (
    StreamError,
    StreamingDataset,
    parquet_source,
    shuffle_buffer,
)
from tests.variational.streaming.held import open_files, prefetch_threads
from tests.variational.streaming.preshuffle.killed import in_child
from tests.variational.streaming.strategies import numbered, write_layout

TIMEOUT = 60


def dataset(folder, **kwargs) -> StreamingDataset:
    buffer = shuffle_buffer(parquet_source(folder), buffer_size=300, batch_size=50, seed=0)
    return StreamingDataset(buffer, batch_size=50, order_check="off", **kwargs)


def next_batch(ds: StreamingDataset) -> list:
    ds.advance()
    return ds.as_tensor().get_value().tolist()


def unpickled_batches(pickled: bytes) -> list:
    buffer, ds = pickle.loads(pickled)
    assert buffer is ds.as_tensor()
    assert buffer.get_value().shape == (0, 2)
    with ds:
        return [next_batch(ds) for _ in range(10)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows")
    write_layout(path, [[100] * 20])
    return path


@pytest.fixture(scope="module")
def fitted():
    """Return an inference whose step is compiled, and its stream.

    What is there already is hidden from the garbage collector, which would take most of the time.
    """
    ds = StreamingDataset(np.ones((4_000, 1)), batch_size=4, order_check="off")
    with pm.Model():
        mu = pm.Normal("mu")
        pm.Normal("y", mu, 1, observed=ds.as_tensor()[:, 0], total_size=ds.total_size)
        inference = pm.ADVI()
        inference.fit(0, progressbar=False, compile_kwargs={"mode": "FAST_COMPILE"})
        inference.state = inference.state._replace(callbacks=[])
    gc.collect()
    gc.freeze()
    yield inference, ds
    gc.unfreeze()


class TestCopy:
    @pytest.mark.parametrize("streaming", [False, True])
    def test_a_copy_goes_on_from_the_batch_that_was_current(self, folder, streaming):
        """The thread and the files stay behind, and the copy's buffer has no rows at first."""
        ds = dataset(folder)
        with ds:
            if streaming:
                for _ in range(7):
                    ds.advance()
            pickled = pickle.dumps((ds.as_tensor(), ds))
            found = unpickled_batches(pickled)
            if streaming:
                assert found[0] == ds.as_tensor().get_value().tolist()
                assert found[1:] == [next_batch(ds) for _ in range(9)]
            else:
                assert found == [next_batch(ds) for _ in range(10)]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
class TestFork:
    def test_a_stream_that_was_open_is_refused_and_can_be_opened_anew(self, folder):
        """Its thread stays in the parent, and a child that waited for it would wait for ever."""
        expected = []
        with dataset(folder) as whole:
            expected = [next_batch(whole) for _ in range(12)]

        with dataset(folder) as ds:
            for _ in range(5):
                ds.advance()

            def child():
                signal.alarm(TIMEOUT)
                with pytest.raises(StreamError, match="opened before this process was forked"):
                    for _ in range(100):
                        ds.advance()
                position = ds.rows_seen // 50
                assert next_batch(ds) == expected[position]
                assert next_batch(ds) == expected[position + 1]
                ds.close()

            assert in_child(child) == 0
            assert [next_batch(ds) for _ in range(7)] == expected[5:]

    def test_a_child_may_close_it_or_leave_it(self, folder):
        with dataset(folder) as ds:
            first = next_batch(ds)

            def close():
                signal.alarm(TIMEOUT)
                ds.close()
                assert next_batch(ds) == first

            assert in_child(close) == 0
            assert in_child(lambda: None) == 0
            assert ds.as_tensor().get_value().tolist() == first


class TestInterrupt:
    """Jupyter's stop button is a KeyboardInterrupt in the main thread, between any two lines."""

    def go_on(self, inference, ds, n, end):
        """Make steps, as `Inference.fit` would without compiling anew.

        *end* ends the interrupts: Python swallows one that falls into the finalizer, which
        closes the stream when the fit is over.
        """
        ds.load_state_dict({**ds.state_dict(), "epoch": 0, "offset": 0, "rows_seen": 0})
        callback = ds.fit_callback()
        callback.check = lambda factors: None  # it compiles anew each time
        inference.state = inference.state._replace(callbacks=[callback])
        try:
            del callback
            inference.refine(n, progressbar=False)
        finally:
            try:
                end()
            finally:  # the interrupt can fall into that
                inference.state = inference.state._replace(callbacks=[])

    def check(self, inference, ds):
        """A usable approximation, no thread, no batch, and a stream that goes on."""
        gc.collect()
        assert all(np.isfinite(p.get_value()).all() for p in inference.approx.params)
        assert not prefetch_threads()
        assert sys.getswitchinterval() > 1e-3
        assert ds.as_tensor().get_value().shape == (0, 1)
        with ds:
            assert ds.advance()
            before = ds.rows_seen
            assert ds.advance() and ds.rows_seen == before + 4
            assert (ds.as_tensor().get_value() == 1).all()

    def test_between_any_two_lines_of_the_stream(self, fitted):
        inference, ds = fitted
        moment, interrupts = 0, 0
        while True:
            left = [moment]

            def on_line(frame, event, arg, left=left):
                if event == "line":
                    left[0] -= 1
                    if left[0] == -1:
                        raise KeyboardInterrupt
                return on_line

            def on_call(frame, event, arg, on_line=on_line):
                name = frame.f_code.co_filename
                ours = "_streaming" in name or name.endswith("variational/streaming.py")
                return on_line if ours else None

            sys.settrace(on_call)
            try:
                self.go_on(inference, ds, 12, lambda: sys.settrace(None))
            except KeyboardInterrupt:
                pass
            finally:
                sys.settrace(None)
            self.check(inference, ds)
            if left[0] >= 0:
                break
            moment, interrupts = moment + 3, interrupts + 1
        assert interrupts > 100
        assert np.isfinite(inference.approx.sample(10).posterior["mu"]).all()


class BlockedRead:
    """Blocks of a file, the second of which comes when it is released."""

    def __init__(self, path):
        self.path = str(path)
        self.reached, self.released = threading.Event(), threading.Event()
        self._alone = threading.Lock()

    def __call__(self):
        with self._in_one_thread(), open(self.path) as file:
            rows = np.loadtxt(file)
            yield rows[:10]
            self.reached.set()
            assert self.released.wait(TIMEOUT)
            yield rows[10:]

    @contextlib.contextmanager
    def _in_one_thread(self):
        assert self._alone.acquire(blocking=False), "read by two threads at a time"
        try:
            yield
        finally:
            self._alone.release()

    def release_and_wait(self):
        self.released.set()
        deadline = time.monotonic() + TIMEOUT
        while prefetch_threads() and time.monotonic() < deadline:
            time.sleep(0.01)


@pytest.fixture
def blocked(tmp_path):
    """Return a stream whose first batch is current while the read of the second blocks."""
    gc.collect()  # the streams of other tests
    assert not prefetch_threads()
    np.savetxt(tmp_path / "rows.txt", numbered(20))
    source = BlockedRead(tmp_path / "rows.txt")
    ds = StreamingDataset(
        source, batch_size=10, sample_shape=(2,), total_size=20, order_check="off"
    )
    ds.advance()
    assert source.reached.wait(TIMEOUT)
    yield ds, source
    source.release_and_wait()


@pytest.fixture
def interruptible():
    """A process that was started in the background may ignore the signal."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class TestBlockedRead:
    """Such as one from a network drive that does not answer."""

    @pytest.mark.skipif(sys.platform == "win32", reason="sends signals")
    def test_an_interrupt_returns_within_a_second_and_the_stream_goes_on(
        self, blocked, interruptible
    ):
        ds, source = blocked
        sent = []

        def interrupt():
            sent.append(time.monotonic())
            os.kill(os.getpid(), signal.SIGINT)

        kill = threading.Timer(0.1, interrupt)
        kill.start()
        with pytest.raises(KeyboardInterrupt):
            ds.advance()
        assert time.monotonic() - sent[0] < 1
        assert sys.getswitchinterval() > 1e-3
        # The next read waits for the one that blocks: a source is read by one thread at a time.
        threading.Timer(0.1, source.released.set).start()
        assert next_batch(ds) == numbered(20)[10:].tolist()
        assert next_batch(ds) == numbered(20)[:10].tolist()
        assert len(prefetch_threads()) == 1
        ds.close()
        assert not prefetch_threads()

    def test_closing_returns_within_a_second_and_the_thread_ends_after_its_read(self, blocked):
        ds, source = blocked
        start = time.monotonic()
        ds.close()
        assert time.monotonic() - start < 1
        assert sys.getswitchinterval() > 1e-3
        assert ds.as_tensor().get_value().shape == (0, 2)
        source.release_and_wait()
        assert not prefetch_threads()
        if sys.platform == "linux":
            assert source.path not in open_files()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_many_datasets_leave_nothing_behind(folder):
    def left():
        gc.collect()
        return len(os.listdir("/proc/self/fd")), threading.active_count()

    def use():
        with dataset(folder) as ds:
            ds.advance()

    use()
    before = left()
    for _ in range(50):
        use()
    assert left() == before
