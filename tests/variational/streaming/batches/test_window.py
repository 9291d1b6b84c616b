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
"""Conservation, determinism and bounds of the shuffle and of the batches."""

import itertools
import runpy
import tempfile
import threading
import time

from pathlib import Path

import numba
import numpy as np
import pytest

from hypothesis import given, settings
from hypothesis import strategies as st
from numba.core import caching
from scipy import stats

from pymc.variational._streaming.batches import compiled
from pymc.variational._streaming.sources.base import Source
from pymc.variational.streaming import (
    StreamError,
    StreamingDataset,
    parquet_source,
    shuffle_buffer,
)
from tests.variational.streaming.strategies import (
    batch_sizes,
    buffers,
    cut,
    layouts,
    numbered,
    seeds,
    write_layout,
)

block_sizes = st.lists(st.integers(0, 30), min_size=1, max_size=4).filter(any)
n_rows_ = st.integers(1, 200)
few_examples = settings(max_examples=50)
"""For tests that write files in each."""


def drain(ds: StreamingDataset, n_batches: int, pause: float = 0.0) -> np.ndarray:
    """Return the rows of the next *n_batches* batches, each taken after *pause* seconds of use."""
    with ds:
        batches = []
        for _ in range(n_batches):
            assert ds.advance()
            time.sleep(pause)  # in which a thread reads as far ahead as it may
            batches.append(ds.as_tensor().get_value())
    assert all(len(batch) == ds.batch_size for batch in batches)
    rows = np.concatenate(batches)
    np.testing.assert_array_equal(rows[:, 1], 2 * rows[:, 0])
    return rows[:, 0].astype(int)


def batches_of(n_epochs: int, n_rows: int, batch_size: int) -> int:
    """Return how many full batches these epochs hold."""
    return n_epochs * n_rows // batch_size


def assert_epochs_are_whole(stream: np.ndarray, n_rows: int) -> None:
    """Every row exactly once per epoch; of the last, begun one, each at most once."""
    for first in range(0, len(stream), n_rows):
        epoch = stream[first : first + n_rows]
        if len(epoch) == n_rows:
            np.testing.assert_array_equal(np.sort(epoch), np.arange(n_rows))
        else:
            assert len(np.unique(epoch)) == len(epoch)


class TestConservation:
    @few_examples
    @given(layout=layouts, sizes=buffers(), seed=seeds, shuffle_row_groups=st.booleans())
    def test_every_row_appears_once_per_epoch_of_shuffled_files(
        self, layout, sizes, seed, shuffle_row_groups
    ):
        batch_size, buffer_size = sizes
        with tempfile.TemporaryDirectory() as folder:
            n_rows = write_layout(Path(folder), layout)
            source = parquet_source(folder, shuffle_row_groups=shuffle_row_groups, seed=seed)
            buffer = shuffle_buffer(
                source, buffer_size=buffer_size, batch_size=batch_size, seed=seed
            )
            ds = StreamingDataset(buffer, batch_size=batch_size, prefetch=False, order_check="off")
            stream = drain(ds, batches_of(3, n_rows, batch_size) + 1)
        assert ds.total_size == n_rows
        assert_epochs_are_whole(stream, n_rows)

    @given(n_rows=n_rows_, blocks=block_sizes, batch_size=batch_sizes)
    def test_every_row_appears_once_per_epoch_of_plain_blocks(self, n_rows, blocks, batch_size):
        ds = StreamingDataset(
            cut(n_rows, blocks), batch_size=batch_size, prefetch=False, order_check="off"
        )
        stream = drain(ds, batches_of(3, n_rows, batch_size) + 1)
        np.testing.assert_array_equal(stream, np.arange(len(stream)) % n_rows)

    @few_examples
    @given(layout=layouts, batch_size=batch_sizes)
    def test_files_that_are_not_shuffled_come_in_order_and_end_with_a_short_batch(
        self, layout, batch_size
    ):
        with tempfile.TemporaryDirectory() as folder:
            n_rows = write_layout(Path(folder), layout)
            ds = StreamingDataset(
                parquet_source(folder), batch_size=batch_size, prefetch=False, order_check="off"
            )
            stream = drain(ds, 2 + n_rows // batch_size)
            batches = list(ds)
        np.testing.assert_array_equal(stream, np.arange(len(stream)) % n_rows)
        lengths = [len(batch) for batch in batches]
        assert lengths[:-1] == [batch_size] * (len(lengths) - 1)
        np.testing.assert_array_equal(np.concatenate(batches), numbered(n_rows))


class TestDeterminism:
    @given(n_rows=n_rows_, sizes=buffers(), seed=seeds, blocks=block_sizes)
    def test_prefetch_and_block_sizes_do_not_change_the_batches(self, n_rows, sizes, seed, blocks):
        batch_size, buffer_size = sizes

        def stream(data, prefetch):
            buffer = shuffle_buffer(data, buffer_size=buffer_size, batch_size=batch_size, seed=seed)
            ds = StreamingDataset(
                buffer, batch_size=batch_size, prefetch=prefetch, order_check="off"
            )
            return drain(ds, batches_of(2, n_rows, batch_size) + 1)

        expected = stream(numbered(n_rows), prefetch=False)
        np.testing.assert_array_equal(stream(cut(n_rows, blocks), prefetch=True), expected)

    @few_examples
    @given(
        layout=layouts,
        sizes=buffers(),
        seed=seeds,
        stop=st.integers(1, 12),
        shuffle_row_groups=st.booleans(),
    )
    def test_a_resumed_stream_starts_with_the_current_batch(
        self, layout, sizes, seed, stop, shuffle_row_groups
    ):
        batch_size, buffer_size = sizes

        def dataset():
            source = parquet_source(folder, shuffle_row_groups=shuffle_row_groups, seed=seed)
            buffer = shuffle_buffer(
                source, buffer_size=buffer_size, batch_size=batch_size, seed=seed
            )
            return StreamingDataset(
                buffer, batch_size=batch_size, prefetch=False, order_check="off"
            )

        with tempfile.TemporaryDirectory() as folder:
            write_layout(Path(folder), layout)
            whole = drain(dataset(), stop + 8)
            stopped, resumed = dataset(), dataset()
            drain(stopped, stop)
            resumed.load_state_dict(stopped.state_dict())
            rest = drain(resumed, 9)
        assert resumed.rows_seen == (stop + 7) * batch_size
        np.testing.assert_array_equal(rest, whole[(stop - 1) * batch_size :])

    def test_epochs_and_windows_have_permutations_of_their_own(self):
        """A sum of seed, epoch and window, or a list of them, would make some of these equal."""
        buffers = [
            shuffle_buffer(numbered(128), buffer_size=64, batch_size=8, seed=seed)
            for seed in (0, 1)
        ]
        windows = [
            np.concatenate(list(buffer.blocks(epoch)))[first : first + 64, 0] - first
            for buffer, epoch, first in itertools.product(buffers, (0, 1, 2), (0, 64))
        ]
        assert len({tuple(window) for window in windows}) == 12

    def test_a_seed_is_drawn_once_and_shown(self):
        first, second = (
            shuffle_buffer(numbered(64), buffer_size=64, batch_size=64) for _ in range(2)
        )
        again = shuffle_buffer(numbered(64), buffer_size=64, batch_size=64, seed=first.seed)
        assert first.seed != second.seed
        np.testing.assert_array_equal(*(np.concatenate(list(b)) for b in (first, again)))
        assert StreamingDataset(first, batch_size=64).seed == first.seed

    def test_global_random_state_is_neither_used_nor_changed(self):
        buffer = shuffle_buffer(numbered(64), buffer_size=64, batch_size=64, seed=3)
        np.random.seed(0)
        state = np.random.get_state()[1].copy()
        first = np.concatenate(list(buffer))
        np.testing.assert_array_equal(np.random.get_state()[1], state)
        np.random.seed(1)
        np.testing.assert_array_equal(np.concatenate(list(buffer)), first)


class TestReadingAhead:
    """What a thread may do while the batches before are still in use."""

    def test_a_window_stays_as_it_is_while_it_is_used(self):
        buffer = shuffle_buffer(cut(400, [10]), buffer_size=100, batch_size=50, seed=0)
        alone, ahead = (
            StreamingDataset(buffer, batch_size=50, prefetch=prefetch, order_check="off")
            for prefetch in (False, True)
        )
        np.testing.assert_array_equal(drain(ahead, 25, pause=0.01), drain(alone, 25))

    def test_a_loader_may_use_one_array_for_all_its_blocks(self):
        def blocks():
            block = np.empty((10, 2))
            for first in range(0, 100, 10):
                block[:, 0] = np.arange(first, first + 10)
                block[:, 1] = 2 * block[:, 0]
                yield block

        ds = StreamingDataset(blocks, batch_size=4, order_check="off")
        np.testing.assert_array_equal(drain(ds, 25, pause=0.005), np.arange(100))

    @pytest.mark.parametrize("prefetch", [False, True])
    def test_a_batch_of_many_blocks_keeps_rows_that_are_overwritten(self, prefetch):
        """A source may reuse the memory of a block when the next block but one is asked for."""

        class DoubleBuffered(Source):
            n_rows, sample_shape = 30, (2,)

            def blocks(self, epoch=0, start=0, *, block_rows=None):
                buffers = np.empty((2, 3, 2))
                for number, first in enumerate(range(start, 30, 3)):
                    buffers[number % 2] = numbered(30)[first : first + 3]
                    yield buffers[number % 2]

        ds = StreamingDataset(DoubleBuffered(), batch_size=10, order_check="off", prefetch=prefetch)
        np.testing.assert_array_equal(drain(ds, 3), np.arange(30))

    def test_the_next_epoch_is_read_before_this_one_ends(self):
        """Or every epoch would begin with a pause in which a window fills."""
        opened = threading.Semaphore(0)

        def blocks():
            opened.release()
            return cut(30, [10])

        buffer = shuffle_buffer(blocks, buffer_size=10, batch_size=10, seed=0)
        with StreamingDataset(buffer, batch_size=10, total_size=30, order_check="off") as ds:
            while opened.acquire(blocking=False):  # of the probe
                pass
            for _ in range(3):
                assert ds.advance()
            assert ds.epoch == 0
            assert opened.acquire(timeout=10)
            assert opened.acquire(timeout=10)

    def test_blocks_are_not_held_after_their_rows_were_taken(self):
        buffer = shuffle_buffer(cut(400, [10]), buffer_size=100, batch_size=50, seed=0)
        pauses = [rows for rows in buffer.blocks() if not len(rows)]
        assert len(pauses) == 40
        assert all(rows.base is None for rows in pauses)

    def test_closing_does_not_wait_for_a_window_to_fill(self):
        read = 0

        def blocks():
            nonlocal read
            for block in cut(2_000, [10]):
                if read >= 1_000:
                    time.sleep(0.02)
                read += len(block)
                yield block

        buffer = shuffle_buffer(blocks, buffer_size=1_000, batch_size=10, seed=0)
        ds = StreamingDataset(buffer, batch_size=10, total_size=2_000, order_check="off")
        read = 0
        with ds:
            ds.advance()
            while read == 1_000:  # the next window has not begun
                time.sleep(0.001)
        assert 1_000 < read < 1_500


class TestBuffer:
    @given(n_rows=n_rows_, sizes=buffers(), seed=seeds)
    def test_rows_stay_in_their_window(self, n_rows, sizes, seed):
        batch_size, buffer_size = sizes
        buffer = shuffle_buffer(
            numbered(n_rows), buffer_size=buffer_size, batch_size=batch_size, seed=seed
        )
        stream = np.concatenate(list(buffer))[:, 0]
        np.testing.assert_array_equal(stream // buffer_size, np.arange(n_rows) // buffer_size)

    @given(n_rows=n_rows_, sizes=buffers(), blocks=block_sizes)
    def test_rows_held_are_at_most_two_windows_and_one_block(self, n_rows, sizes, blocks):
        batch_size, buffer_size = sizes
        read = 0

        def counted():
            nonlocal read
            for block in cut(n_rows, blocks):
                read += len(block)
                yield block

        buffer = shuffle_buffer(counted, buffer_size=buffer_size, batch_size=batch_size, seed=0)
        emitted = 0
        for rows in buffer.blocks():
            assert read - emitted <= 2 * buffer_size + max(blocks)
            emitted += len(rows)
        assert emitted == n_rows

    def test_every_order_of_a_window_is_equally_likely(self):
        """Chi-square over the 24 orders of 4 rows; false-alarm rate 1e-6."""
        counts: dict[tuple, int] = {}
        buffer = shuffle_buffer(numbered(4), buffer_size=4, batch_size=4, seed=20)
        for epoch in range(12_000):
            order = tuple(next(rows for rows in buffer.blocks(epoch) if len(rows))[:, 0])
            counts[order] = counts.get(order, 0) + 1
        assert stats.chisquare([*counts.values(), *[0] * (24 - len(counts))]).pvalue > 1e-6

    def test_every_row_is_as_likely_at_every_place_of_a_window(self):
        """Chi-square over tenths of a window that fills from uneven blocks; false alarms 1e-6."""
        buffer = shuffle_buffer(cut(300, [7, 150, 1]), buffer_size=300, batch_size=300, seed=0)
        epochs = [
            next(rows for rows in buffer.blocks(epoch) if len(rows))[:, 0] for epoch in range(2_000)
        ]
        table = np.histogram2d(np.tile(np.arange(300), 2_000), np.ravel(epochs), bins=10)[0]
        # Rows and columns are fixed, so 9 * 9 degrees of freedom remain.
        statistic = ((table - 6_000) ** 2 / 6_000).sum()
        low, high = stats.chi2.ppf([5e-7, 1 - 5e-7], 81)
        assert low < statistic < high

    def test_the_order_does_not_depend_on_whether_the_number_of_rows_is_known(self):
        rows = np.arange(10)[:, None]
        found = [
            np.concatenate(list(shuffle_buffer(source, buffer_size=6, batch_size=4, seed=3)))[:, 0]
            for source in (rows, cut(10, [3, 1]), cut(10, [7]))
        ]
        np.testing.assert_array_equal(found, [[2, 3, 0, 5, 1, 4, 8, 6, 9, 7]] * 3)

    def test_random_numbers_are_those_of_splitmix64(self):
        """The first ones of its reference implementation for the seed 1234567."""
        numbers = [compiled._number(np.uint64(1234567), np.uint64(k)) for k in (1, 2, 3)]
        assert numbers == [6457827717110365317, 3203168211198807973, 9817491932198370423]

    @pytest.mark.parametrize(
        "dtype, shape",
        [
            ("uint8", ()),
            ("uint8", (3,)),
            ("int16", (3,)),
            ("float32", (3,)),
            ("float32", (2, 2)),
            ("float64", (2, 4)),
        ],
    )
    def test_rows_of_any_width_stay_whole(self, dtype, shape):
        """They are moved as integers of 1 to 8 bytes; two of these have a loop of their own."""
        rows = np.random.default_rng(0).integers(0, 200, (500, *shape)).astype(dtype)
        buffer = shuffle_buffer(rows, buffer_size=300, batch_size=7, seed=0)
        found = np.concatenate(list(buffer))
        assert found.dtype == rows.dtype
        assert sorted(row.tolist() for row in found) == sorted(row.tolist() for row in rows)

    @pytest.mark.parametrize("prefetch", [True, False])
    def test_rows_before_a_fault_are_streamed(self, prefetch):
        def blocks():
            yield from cut(30, [10])
            raise OSError("the cable is out")

        buffer = shuffle_buffer(blocks, buffer_size=10, batch_size=5, seed=0)
        ds = StreamingDataset(
            buffer, batch_size=5, total_size=40, order_check="off", prefetch=prefetch
        )
        assert len(drain(ds, 6)) == 30
        with pytest.raises(OSError, match="cable"):
            drain(ds, 2)

    @pytest.mark.parametrize(
        "block, message",
        [
            (np.zeros((5, 3), "int32"), r"shape \(3,\); sample_shape=\(2,\)"),
            (np.full((5, 2), np.nan), "float64"),
        ],
        ids=["shape", "dtype"],
    )
    def test_blocks_of_another_kind_are_refused(self, block, message):
        class Changing(Source):
            def blocks(self, epoch=0, start=0):
                yield from (np.zeros((5, 2), "int32"), block)

        buffer = shuffle_buffer(Changing(), buffer_size=20, batch_size=5, seed=0)
        with pytest.raises((StreamError, TypeError), match=message):
            list(buffer)

    def test_loops_are_compiled_where_nothing_can_be_kept_on_disk(self, monkeypatch):
        """Such as in a container whose user has no home."""
        cache = getattr(caching, "CacheImpl", None) or caching._CacheImpl  # its older name
        monkeypatch.setattr(cache, "_locator_classes", [])
        with pytest.raises(RuntimeError, match="no locator"):
            numba.njit(cache=True)(lambda: None)
        insert = runpy.run_path(compiled.__file__)["insert_shuffled"]
        window, rows = np.zeros((4, 1), "u8"), np.arange(4, dtype="u8")[:, None]
        insert(window, 0, rows, np.uint64(3))
        assert sorted(window[:, 0]) == [0, 1, 2, 3]

    def test_two_iterations_do_not_disturb_each_other(self):
        buffer = shuffle_buffer(numbered(100), buffer_size=30, batch_size=7, seed=0)
        expected = np.concatenate(list(buffer))
        pairs = list(zip(buffer, buffer))
        for stream in zip(*pairs):
            np.testing.assert_array_equal(np.concatenate(stream), expected)

    def test_rows_and_columns_of_the_source_are_passed_on(self, tmp_path):
        write_layout(tmp_path, [[5, 5]])
        buffer = shuffle_buffer(parquet_source(tmp_path), buffer_size=4, batch_size=2, seed=9)
        assert (buffer.n_rows, buffer.columns, buffer.seed) == (10, ("row", "twice"), 9)

    @pytest.mark.parametrize(
        "arguments, message",
        [
            ({"buffer_size": 3}, "buffer_size=3 must be at least batch_size=4"),
            ({"buffer_size": 2**32}, "buffer_size=4294967296 must be at most 4294967295"),
            ({"batch_size": 0}, "batch_size=0 must be at least 1"),
            ({"seed": -1}, "seed=-1 must be a non-negative integer or None"),
        ],
    )
    def test_impossible_sizes_and_seeds_are_refused(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            shuffle_buffer(numbered(9), **{"buffer_size": 4, "batch_size": 4, **arguments})

    @pytest.mark.parametrize("size", [True, 4.0])
    def test_sizes_are_integers(self, size):
        with pytest.raises(TypeError, match="must be an integer"):
            shuffle_buffer(numbered(9), buffer_size=8, batch_size=size)
