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
"""What other sources accept, and how they name the place of what they refuse."""

import contextlib
import sys
import warnings

from functools import partial

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.feather
import pytest
import scipy.sparse

from pymc.variational._streaming.sources import arrays as sources
from pymc.variational._streaming.sources.arrays import as_source
from pymc.variational.streaming import (
    OrderError,
    StreamError,
    StreamingDataset,
    StreamWarning,
    arrow_source,
    parquet_source,
    shuffle_buffer,
    summarize,
)
from tests.variational.streaming.strategies import numbered, rows_of, table


def test_pyarrow_is_asked_for_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with StreamingDataset(numbered(4), batch_size=2) as ds:
        assert ds.advance()
    with pytest.raises(ImportError, match="needs pyarrow; install it with"):
        parquet_source("rows/")


class TestOtherSources:
    def test_arrays_memory_maps_factories_and_lists_are_sources(self, tmp_path):
        rows = numbered(10)
        np.save(tmp_path / "rows.npy", rows)
        for source in (
            rows,
            np.load(tmp_path / "rows.npy", mmap_mode="r"),
            lambda: iter([rows[:3], rows[3:]]),
            lambda: rows,
            [rows[:3], rows[3:]],
            iter([rows[:3], rows[3:]]),
            table(10),
            [table(10).slice(0, 3), table(10).slice(3)],
            iter([table(10).slice(0, 3), table(10).slice(3)]),
            arrow_source(lambda: table(10).to_reader(max_chunksize=4)),
            arrow_source(lambda: table(10)),
            arrow_source(lambda: table(10).to_batches()),
        ):
            ds = StreamingDataset(source, batch_size=5, total_size=10)
            np.testing.assert_array_equal(np.concatenate(list(ds)), rows)

    def test_arrow_sources_read_anew_each_epoch(self):
        source = arrow_source(lambda: table(7).to_reader(), columns=["twice"])
        ds = StreamingDataset(source, batch_size=7)
        with ds:
            for _ in range(3):
                ds.advance()
                assert ds.as_tensor().get_value()[:, 0].tolist() == list(range(0, 14, 2))

    @pytest.mark.parametrize(
        "make",
        [lambda: iter([numbered(10)]), lambda: table(10).to_reader(max_chunksize=4)],
        ids=["iterator", "reader"],
    )
    def test_a_one_shot_iterator_is_read_once_and_never_counted(self, make):
        with StreamingDataset(make(), batch_size=5, total_size=10) as ds:
            ds.advance()
            assert ds.as_tensor().get_value()[:, 0].tolist() == [0, 1, 2, 3, 4]
            ds.advance()
            with pytest.raises(StreamError, match="one-shot iterator and has been read"):
                ds.advance()
        with pytest.raises(ValueError, match=r'total_size="auto" cannot count a one-shot'):
            StreamingDataset(make(), batch_size=4)

    @pytest.mark.parametrize("source", [numbered(30), table(30)], ids=["array", "table"])
    def test_the_rows_of_a_reader_can_be_put_in_the_buffer(self, source):
        ds = StreamingDataset(source, batch_size=5)
        with ds.rows(table(30).to_reader(max_chunksize=10)):
            np.testing.assert_array_equal(ds.as_tensor().get_value(), numbered(30))

    def test_factories_are_counted_in_one_pass(self, caplog):
        with caplog.at_level("INFO", logger="pymc"):
            ds = StreamingDataset(lambda: [numbered(10), numbered(5)], batch_size=4)
        assert ds.total_size == 15
        assert "counted 15 rows" in caplog.text

    @pytest.mark.parametrize(
        "source, message",
        [
            ("folder", r"source='folder' is a path; pass parquet_source\('folder'\)"),
            (5, "source=int is not a source"),
            (
                StreamingDataset(np.zeros((9, 1)), batch_size=3),
                "source is a StreamingDataset; pass",
            ),
            (np.array(["a"]), "dtype <U1; pass integers or floats"),
            (np.array(5.0), "a block of rows is ndarray"),
            ([[1, 2]], "a block of rows is list"),
            (np.zeros((5, 0)), r"a block has shape \(1, 0\); pass rows that hold values"),
            (pa.array([1]), "is not a source|a block of rows"),
        ],
    )
    def test_other_things_are_refused(self, source, message):
        with pytest.raises((TypeError, ValueError), match=message):
            StreamingDataset(source, batch_size=1)

    @pytest.mark.parametrize(
        "second",
        [np.zeros((2, 3), "int32"), np.zeros((2, 2), "float64")],
        ids=["shape", "dtype"],
    )
    def test_blocks_are_alike(self, second):
        ds = StreamingDataset([numbered(2), second], batch_size=2, total_size=4)
        with pytest.raises(StreamError, match=r"block 1: rows of shape .* came before"):
            list(ds)

    def test_a_null_that_a_dictionary_holds_is_refused(self):
        values = pa.DictionaryArray.from_arrays(pa.array([0, 1, 2], "int8"), [10.0, None, 30.0])
        rows = pa.table({"x": values, "y": [1.0, 2.0, 3.0]})
        with pytest.raises(StreamError, match="column 'x' is null in row 1"):
            list(arrow_source(lambda: rows))

    def test_the_index_of_pandas_is_no_column(self, tmp_path):
        frame = pd.DataFrame({"x": [1.0, 2.0, 3.0], "up": [0, 1, 1]}).iloc[[2, 0, 1]]
        frame.to_parquet(tmp_path / "a.parquet")
        for source in (lambda: parquet_source(tmp_path), lambda: arrow_source(lambda: frame)):
            with pytest.raises(
                ValueError,
                match=r"'__index_level_0__' is pandas' index; drop it .* columns=\['x', 'up'\]",
            ):
                StreamingDataset(source(), batch_size=2)
        assert parquet_source(tmp_path, columns=["x", "up"]).columns == ("x", "up")
        assert StreamingDataset(frame.reset_index(drop=True), batch_size=2).columns == ("x", "up")

    def test_invalid_arrow_values_are_refused_with_their_place(self):
        batches = [table(2), table(2).set_column(1, "twice", [pa.array([1, None], pa.int32())])]
        ds = StreamingDataset(batches, batch_size=2, total_size=4)
        with pytest.raises(StreamError, match="block 1: column 'twice' is null in row 1"):
            list(ds)

    def test_a_reader_is_no_factory(self):
        with pytest.raises(TypeError, match="make_reader=RecordBatchReader is not callable"):
            arrow_source(table(3).to_reader())

    @pytest.mark.parametrize("made", [None, 3, object()])
    def test_a_function_that_returns_no_rows_is_named(self, made):
        for source in (lambda: made, arrow_source(lambda: made)):
            with pytest.raises(TypeError, match=f"source gave {type(made).__name__}; return a"):
                StreamingDataset(source, batch_size=2)

    def test_a_list_of_batches_is_no_list_of_paths(self):
        batches = table(4).to_batches()
        with pytest.raises(TypeError, match="make_reader=list is not callable; pass a function"):
            arrow_source(batches)
        assert len(rows_of(arrow_source(lambda: batches))) == 4
        with pytest.raises(TypeError, match=r"source=\['a'\] is a path; pass parquet_source"):
            StreamingDataset(["a"], batch_size=2)

    def test_sparse_rows_are_made_dense_in_blocks(self):
        data = scipy.sparse.csr_array(np.eye(4))
        with pytest.raises(TypeError, match=r"csr_array is sparse; pass a function .* data\[i : i"):
            StreamingDataset(data, batch_size=2)
        ds = StreamingDataset(
            lambda: (data[i : i + 3].toarray() for i in range(0, data.shape[0], 3)), batch_size=4
        )
        np.testing.assert_array_equal(next(iter(ds)), np.eye(4))

    @pytest.mark.parametrize("make", [np.array, pd.Index, iter], ids=["array", "index", "iterator"])
    def test_names_of_columns_come_in_any_sequence(self, make):
        source = arrow_source(table(3), columns=make(["twice"]))
        for _ in range(2):
            assert rows_of(source).tolist() == [[0], [2], [4]]

    @pytest.mark.parametrize("promised", [6, 8])
    @pytest.mark.parametrize("total_size", ["auto", "as promised"])
    def test_a_pass_that_breaks_its_promise_of_rows_is_an_error(self, promised, total_size):
        source = arrow_source(lambda: table(7).to_reader(max_chunksize=2), n_rows=promised)
        size = promised if total_size == "as promised" else total_size
        for rows in (source, shuffle_buffer(source, buffer_size=100, batch_size=7, seed=0)):
            ds = StreamingDataset(rows, batch_size=7, total_size=size, order_check="off")
            with ds, pytest.raises(StreamError, match=rf"gave .* rows .*n_rows={promised}; pass"):
                for _ in range(3):
                    ds.advance()

    def test_a_promise_of_rows_is_a_positive_integer(self):
        ds = StreamingDataset(arrow_source(lambda: table(7), n_rows=np.int64(7)), batch_size=7)
        assert type(ds.total_size) is int
        for wrong in (0, True, 7.0):
            with pytest.raises((TypeError, ValueError), match="n_rows="):
                arrow_source(lambda: table(7), n_rows=wrong)

    @pytest.mark.parametrize("make", [iter, lambda blocks: pa.table(blocks[0]).to_reader()])
    def test_an_iterator_that_was_looked_at_is_not_read_as_if_it_were_new(self, make):
        iterator = make([table(5), table(5)])
        with pytest.raises(StreamError, match=r"iterator of an earlier pass.* make a new one in"):
            list(StreamingDataset(lambda: iterator, batch_size=5, total_size=10))

    def test_a_reader_that_is_handed_out_twice_is_noticed(self):
        """The first reading, of the columns, has taken rows that the epoch will lack."""
        reader = table(7).to_reader(max_chunksize=2)
        ds = StreamingDataset(
            arrow_source(lambda: reader, n_rows=7), batch_size=7, order_check="off"
        )
        with ds, pytest.raises(StreamError, match="returned the iterator of an earlier pass"):
            ds.advance()

    def test_huge_record_batches_are_converted_in_pieces(self):
        rows = table(600_000)
        blocks = list(arrow_source(lambda: rows.to_batches()))
        assert max(map(len, blocks)) <= 1 << 18
        np.testing.assert_array_equal(np.concatenate(blocks), numbered(600_000))
        values = pa.array([*range(199_999), None])
        source = arrow_source(lambda: pa.table({"x": values}))
        with pytest.raises(StreamError, match="block 0: column 'x' is null in row 199999;"):
            list(source)

    def test_record_batches_of_other_libraries_are_read(self):
        class Batch:
            def __init__(self, batch):
                self._batch = batch

            def __arrow_c_array__(self, requested_schema=None):
                return self._batch.__arrow_c_array__(requested_schema)

        source = arrow_source(lambda: map(Batch, table(7).to_batches(max_chunksize=3)))
        np.testing.assert_array_equal(rows_of(source), numbered(7))

    @pytest.mark.parametrize("shuffled", [False, True])
    def test_a_series_whose_slices_differ_in_type_is_refused(self, monkeypatch, shuffled):
        """Slices without nulls come as integers, the others as floats."""
        monkeypatch.setattr(sources, "_BLOCK_BYTES", 40)
        rows = pd.Series([*range(25), None, *range(10)], dtype="Int32").to_frame("x")["x"]
        source = shuffle_buffer(rows, buffer_size=20, batch_size=5, seed=0) if shuffled else rows
        ds = StreamingDataset(source, batch_size=5, order_check="off")
        with pytest.raises(
            StreamError, match=r"rows 20 to 30: .*float64 where .*int32 came before; fill"
        ):
            list(ds)

    def test_columns_are_not_chosen_from_arrays(self):
        for option in ({"columns": ["twice"]}, {"categories": {"twice": [0, 2, 4, 6]}}):
            source = arrow_source(lambda: [numbered(4)], **option)
            for use in (partial(StreamingDataset, batch_size=2, total_size=4), summarize):
                with pytest.raises(TypeError, match=r"columns=\['twice'\] .* by name, and block 0"):
                    use(source)

    def test_a_column_that_a_block_lacks_is_named(self):
        for use in (rows_of, summarize):
            with pytest.raises(ValueError, match=r"block 0: has no column 'up'; its columns are"):
                use(arrow_source(lambda: table(4), columns=["up"]))

    def test_masked_values_are_refused(self):
        rows = np.ma.masked_array(numbered(4).astype(float), mask=numbered(4) == 2)
        for source in (rows, lambda: [rows[:1], rows[1:]]):
            ds = StreamingDataset(source, batch_size=2, total_size=4)
            with pytest.raises(StreamError, match="masked values; fill them or leave"):
                list(ds)
        unmasked = StreamingDataset(np.ma.masked_array(numbered(4)), batch_size=4)
        assert type(next(iter(unmasked))) is np.ndarray


class Chunked:
    """What zarr, h5py, xarray and dask arrays have in common."""

    def __init__(self, rows: np.ndarray, chunks):
        self._rows, self.chunks = rows, chunks
        self.shape, self.dtype = rows.shape, rows.dtype
        self.read: list[slice] = []

    def __getitem__(self, rows: slice) -> np.ndarray:
        self.read.append(rows)
        return self._rows[rows]


class TestChunkedArrays:
    @pytest.mark.parametrize(
        "chunks", [(300_000, 2), ((300_000, 300_000, 100_000), (2,)), None], ids=str
    )
    def test_whole_chunks_are_read_from_any_row_on(self, chunks):
        rows = numbered(700_000)
        for start in (0, 1, 300_000, 300_001, 699_999):
            array = Chunked(rows, chunks)
            ds = StreamingDataset(array, batch_size=1_000)
            assert (ds.total_size, ds.sample_shape) == (700_000, (2,))
            array.read.clear()
            blocks = list(ds._source.blocks(0, start))
            np.testing.assert_array_equal(np.concatenate(blocks), rows[start:])
            if chunks is not None:
                assert all(read.start % 300_000 == 0 for read in array.read[1:])

    def test_a_shuffled_stream_goes_on_at_the_end_of_an_epoch(self):
        rows = numbered(10)
        array = Chunked(rows, (3, 2))
        assert not list(as_source(array).blocks(0, 10))
        buffer = shuffle_buffer(array, buffer_size=5, batch_size=5, seed=0)
        with StreamingDataset(buffer, batch_size=5, order_check="off") as ds:
            ds.load_state_dict({**ds.state_dict(), "offset": 10})
            assert ds.advance()
            block = ds.as_tensor().get_value()
        assert {tuple(row) for row in block} <= {tuple(row) for row in rows[:5]}

    def test_xarray_and_dask_arrays_are_sources(self):
        xr = pytest.importorskip("xarray")
        rows = np.arange(640.0).reshape(10, 8, 8)
        arrays = [xr.DataArray(rows, dims=("sample", "y", "x"))]
        with contextlib.suppress(ImportError):
            from dask.array import from_array

            arrays.append(from_array(rows, chunks=(3, 8, 8)))
        for array in arrays:
            ds = StreamingDataset(array, batch_size=5, sample_shape=(8, 8))
            np.testing.assert_array_equal(np.concatenate(list(ds)), rows)

    def test_their_order_is_checked_before_the_fit(self):
        rng = np.random.default_rng(0)
        sorted_rows = np.sort(rng.normal(size=(400_000, 1)), axis=0)
        array = Chunked(sorted_rows, (10_000, 1))
        buffer = shuffle_buffer(array, buffer_size=20_000, batch_size=1_000, seed=0)
        ds = StreamingDataset(buffer, batch_size=1_000, order_check="raise", prefetch=False)
        with pytest.raises(OrderError):
            ds.advance()


class TestFingerprint:
    """A position means nothing in other rows."""

    def resume(self, first, second):
        state = StreamingDataset(first, batch_size=5, total_size=100).state_dict()
        StreamingDataset(second, batch_size=5, total_size=100).load_state_dict(state)

    @pytest.mark.parametrize(
        "other",
        [numbered(100) + 1, numbered(100)[::-1], numbered(100).astype("int64"), [numbered(100)]],
        ids=["values", "order", "dtype", "no array"],
    )
    @pytest.mark.parametrize("chunked", [True, False])
    def test_a_stream_is_not_resumed_on_other_rows(self, other, chunked):
        if chunked and isinstance(other, np.ndarray):
            rows, other = Chunked(numbered(100), (30, 2)), Chunked(other, (30, 2))
        else:
            rows = numbered(100)
        with pytest.raises(ValueError, match=r"fingerprint=.* make the dataset as it was then"):
            self.resume(rows, other)

    @pytest.mark.parametrize("shuffled", [True, False])
    def test_a_longer_array_is_another_one(self, shuffled):
        sources = [numbered(n) for n in (100, 101)]
        if shuffled:
            sources = [shuffle_buffer(s, buffer_size=20, batch_size=5, seed=0) for s in sources]
        with pytest.raises(ValueError, match="fingerprint="), warnings.catch_warnings():
            warnings.simplefilter("ignore", StreamWarning)  # of total_size
            self.resume(*sources)

    def test_other_levels_of_a_function_are_another_stream(self):
        """In which the same row would be of another group."""
        one, other, again = (
            arrow_source(partial(pa.table, {"x": list(groups)}), categories={"x": list(levels)})
            for groups, levels in (("ab", "ab"), ("ab", "ba"), ("ba", "ab"))
        )
        self.resume(one, again)
        with pytest.raises(ValueError, match=r"fingerprint=.* make the dataset as it was then"):
            self.resume(one, other)

    def test_the_same_rows_are_known_in_another_process(self, tmp_path):
        np.save(tmp_path / "rows.npy", numbered(100))
        self.resume(numbered(100), np.load(tmp_path / "rows.npy", mmap_mode="r"))
        self.resume([numbered(100)], [numbered(100)])

    @pytest.mark.parametrize("shape", [(1_000_000,), (3_000, 1_000), (20, 64, 64)], ids=str)
    def test_few_chunks_and_values_are_read(self, shape):
        array = Chunked(np.zeros(shape, "float32"), (10, *shape[1:]))
        StreamingDataset(array, batch_size=1)
        chunks = [(rows.start or 0) // 10 for rows in array.read]
        assert chunks == [(rows.stop - 1) // 10 for rows in array.read]
        assert len(set(chunks)) <= 4
