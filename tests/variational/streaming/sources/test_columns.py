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
"""What columns become: numbers, and positions among the levels of a category."""

import ast

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import pymc as pm

from pymc.variational._streaming.sources import summary
from pymc.variational.streaming import (
    StreamError,
    StreamingDataset,
    arrow_source,
    parquet_source,
    preshuffle,
    shuffle_buffer,
)
from tests.variational.streaming.sources.libraries import run
from tests.variational.streaming.strategies import rows_of
from tests.variational.streaming.tell_tale import QUICK


class TestColumns:
    def write(self, path, **columns):
        pq.write_table(pa.table(columns), path)
        return path

    @pytest.mark.parametrize(
        "types, dtype",
        [
            ("int8 uint8 bool", "int16"),
            ("int16 uint16 float", "float32"),
            ("bool float", "float32"),
            ("halffloat int8", "float32"),
            ("int32 float", "float64"),
            ("int64 float", "float64"),
            ("int64", "int64"),
            ("bool", "uint8"),
            ("decimal128(9, 2) float", "float64"),
        ],
    )
    def test_rows_have_the_smallest_dtype_that_holds_all_columns(self, tmp_path, types, dtype):
        arrays = {}
        for number, name in enumerate(types.replace(", ", ",").split()):
            kind = pa.decimal128(9, 2) if name.startswith("decimal") else pa.type_for_alias(name)
            arrays[str(number)] = pa.array([0, 1, 1]).cast(pa.float64()).cast(kind)
        source = parquet_source(self.write(tmp_path / "a.parquet", **arrays))
        rows = rows_of(source)
        assert rows.dtype == dtype
        assert (rows == [[0], [1], [1]]).all()

    def test_columns_of_all_plain_types_become_rows_exactly(self):
        """More rows than are copied at a time, and columns that begin inside their buffers."""
        rng = np.random.default_rng(0)
        columns = []
        for name in ("i1", "u1", "i2", "u2", "i4", "u4"):
            limits = np.iinfo(name)
            values = rng.integers(limits.min, limits.max, 1_000, name, endpoint=True)
            values[-2:] = limits.min, limits.max
            columns.append(values)
        columns += [rng.normal(size=1_000).astype(name) for name in ("f4", "f8")]
        columns[-1][-1] = np.finfo("f8").max
        rng.shuffle(columns)
        batch = pa.record_batch([pa.array(column) for column in columns], names=list("abcdefgh"))
        rows = rows_of(arrow_source(lambda: [batch.slice(7)]))
        assert rows.dtype == "float64"
        np.testing.assert_array_equal(rows, np.stack(columns, axis=1)[7:])

    @pytest.mark.parametrize("row, column", [(0, 0), (255, 1), (256, 2), (999, 1)])
    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    def test_a_value_that_is_not_finite_is_found_wherever_it_is(self, row, column, value):
        columns = [np.zeros(1_000, dtype) for dtype in ("f8", "f4", "f8")]
        columns[column][row] = value
        batch = pa.record_batch([pa.array(values) for values in columns], names=list("abc"))
        with pytest.raises(StreamError, match=f"column '{'abc'[column]}' is {value} in row {row};"):
            rows_of(arrow_source(lambda: [batch]))

    def test_dictionaries_and_decimals_are_read_as_their_values(self, tmp_path):
        path = self.write(
            tmp_path / "a.parquet",
            group=pa.array([7, 9, 7], pa.int16()).dictionary_encode(),
            price=pa.array(["0.48", "0.52", "1"]).cast(pa.decimal128(5, 2)),
        )
        np.testing.assert_array_equal(
            rows_of(parquet_source(path)), [[7, 0.48], [9, 0.52], [7, 1.0]]
        )

    @pytest.mark.parametrize("width", [1, 3, 65])
    def test_columns_keep_their_places(self, tmp_path, width):
        """More rows than the tiles have in which columns are interleaved."""
        values = np.arange(3_000 * width, dtype="float32").reshape(3_000, width)
        path = self.write(tmp_path / "a.parquet", **{f"x{j}": values[:, j] for j in range(width)})
        np.testing.assert_array_equal(rows_of(parquet_source(path)), values)

    def test_columns_are_chosen_by_name_and_order(self, tmp_path):
        self.write(tmp_path / "a.parquet", x=[1.0], y=[2.0], z=[3.0])
        self.write(tmp_path / "b.parquet", z=[6.0], y=[5.0], x=[4.0])
        source = parquet_source(tmp_path, columns=["z", "x"])
        assert source.columns == ("z", "x")
        np.testing.assert_array_equal(rows_of(source), [[3, 1], [6, 4]])

    @pytest.mark.parametrize("names", [["x"], ["x", "y", "z"], ["X", "y"]])
    def test_files_with_other_columns_are_named(self, tmp_path, names):
        self.write(tmp_path / "a.parquet", x=[1.0], y=[2.0])
        self.write(tmp_path / "b.parquet", **{name: [1.0] for name in names})
        message = r"b.parquet: columns \[.*\] where \['x', 'y'\] came before; pass columns="
        with pytest.raises(ValueError, match=message) as error:
            parquet_source(tmp_path)
        columns = ast.literal_eval(str(error.value).partition("columns=")[2])
        assert parquet_source(tmp_path, columns=columns).n_rows == 2
        self.write(tmp_path / "b.parquet", Z=[1.0])
        with pytest.raises(ValueError, match="came before; write all with the same names"):
            parquet_source(tmp_path)

    def test_columns_are_matched_by_name_in_any_order(self, tmp_path):
        self.write(tmp_path / "a.parquet", x=[1.0], y=[2.0])
        self.write(tmp_path / "b.parquet", y=[4.0], x=[3.0])
        np.testing.assert_array_equal(rows_of(parquet_source(tmp_path)), [[1, 2], [3, 4]])
        for name in ("a", "b"):
            columns = pq.read_table(tmp_path / f"{name}.parquet")
            with pa.ipc.new_file(tmp_path / f"{name}.arrow", columns.schema) as writer:
                writer.write_table(columns)
        np.testing.assert_array_equal(rows_of(arrow_source(tmp_path)), [[1, 2], [3, 4]])

    @pytest.mark.parametrize(
        "first, second, dtype",
        [
            (pa.int32(), pa.int64(), "int64"),
            (pa.int64(), pa.int32(), "int64"),
            (pa.float32(), pa.float64(), "float64"),
            (pa.int64(), pa.float64(), "float64"),
            (pa.bool_(), pa.int8(), "int8"),
            (pa.int32(), pa.float32(), "float64"),
            (pa.decimal128(9, 2), pa.decimal128(12, 4), "float64"),
        ],
        ids=str,
    )
    def test_types_that_differ_between_files_are_widened(self, tmp_path, first, second, dtype):
        for name, kind in (("a", first), ("b", second)):
            values = pa.array([0, 1]).cast(pa.float64()).cast(kind)
            self.write(tmp_path / f"{name}.parquet", x=values)
        rows = rows_of(parquet_source(tmp_path))
        assert rows.dtype == dtype
        assert rows[:, 0].tolist() == [0, 1, 0, 1]

    def test_an_integer_that_a_wider_float_cannot_hold_is_named(self, tmp_path):
        self.write(tmp_path / "a.parquet", x=[0.5])
        self.write(tmp_path / "b.parquet", x=[2**53 + 1])
        with pytest.raises(StreamError, match=r"b.parquet: column 'x' is 9007199254740993, which"):
            rows_of(parquet_source(tmp_path))

    def test_a_column_of_nulls_is_nulls_whatever_its_type(self, tmp_path):
        self.write(tmp_path / "a.parquet", x=[0.5])
        self.write(tmp_path / "b.parquet", x=pa.nulls(1))
        with pytest.raises(StreamError, match=r"b.parquet: column 'x' is null in row 0"):
            rows_of(parquet_source(tmp_path))
        assert rows_of(parquet_source(tmp_path, invalid="drop")).tolist() == [[0.5]]

    def test_batches_of_a_wider_type_are_refused_and_of_a_narrower_one_read(self):
        wide, narrow = (pa.record_batch({"x": pa.array([1], kind)}) for kind in ("float64", "int8"))
        assert rows_of(arrow_source(lambda: [wide, narrow])).tolist() == [[1], [1]]
        with pytest.raises(ValueError, match=r"block 1: types .*double.* do not fit rows of int8"):
            rows_of(arrow_source(lambda: [narrow, wide]))

    def test_a_named_column_that_a_file_lacks_is_named(self, tmp_path):
        self.write(tmp_path / "a.parquet", x=[1.0], y=[2.0])
        self.write(tmp_path / "b.parquet", x=[1.0])
        with pytest.raises(ValueError, match=r"b.parquet: has no column 'y'; its columns are"):
            parquet_source(tmp_path, columns=["x", "y"])

    def test_columns_that_are_not_numbers_are_named_at_once(self, tmp_path):
        self.write(
            tmp_path / "a.parquet",
            x=[1.0],
            text=["a"],
            data=[b"a"],
            nested=[[1.0]],
            clock=pa.array([0], pa.time64("us")),
            coded=pa.array(["a"]).dictionary_encode(),
        )
        message = (
            r"a.parquet: not numbers: 'text' \(string\), 'data' \(binary\), 'nested' \(list.*\), "
            r"'clock' \(time64.*\), 'coded' \(string\); leave them out with columns=\['x'\] or "
            r"stream levels with categories=\['text', 'coded'\]"
        )
        with pytest.raises(ValueError, match=message):
            parquet_source(tmp_path)
        assert parquet_source(tmp_path, columns=["x"]).n_rows == 1
        both = {"columns": ["text", "coded"], "categories": ["text", "coded"]}
        assert rows_of(parquet_source(tmp_path, **both)).tolist() == [[0, 0]]

    def test_a_string_is_not_a_list_of_columns(self, tmp_path):
        self.write(tmp_path / "a.parquet", x=[1.0])
        with pytest.raises(TypeError, match="columns='x' is a string"):
            parquet_source(tmp_path, columns="x")

    def test_a_column_named_twice_is_refused(self, tmp_path):
        self.write(tmp_path / "a.parquet", x=[1.0])
        with pytest.raises(ValueError, match="names a column twice"):
            parquet_source(tmp_path, columns=["x", "x"])


CARRIERS = ["UA", "AA", "B6", "AA"]


class TestCategories:
    @pytest.fixture
    def flights(self):
        return pa.table(
            {"carrier": CARRIERS, "late": [True, False, True, True], "hour": [5, 6, 5, 7]}
        )

    @pytest.fixture(params=["parquet", "arrow", "reader", "table", "pandas", "polars"])
    def source(self, request, flights, tmp_path):
        def make(**options):
            if request.param == "parquet":
                pq.write_table(flights, tmp_path / "flights.parquet", row_group_size=3)
                return parquet_source(tmp_path, **options)
            if request.param == "arrow":
                with pa.ipc.new_file(tmp_path / "flights.arrow", flights.schema) as writer:
                    writer.write_table(flights, max_chunksize=3)
                return arrow_source(tmp_path / "flights.arrow", **options)
            if request.param == "reader":
                return arrow_source(lambda: flights.to_reader(max_chunksize=3), **options)
            if request.param == "polars":
                return arrow_source(pytest.importorskip("polars").from_arrow(flights), **options)
            return arrow_source(
                flights if request.param == "table" else flights.to_pandas(), **options
            )

        return make

    def test_they_stream_as_positions_among_sorted_levels(self, source):
        ds = StreamingDataset(source(categories=["carrier", "late"]), batch_size=4)
        assert ds.columns == ("carrier", "late", "hour")
        assert ds.coords == {"carrier": ("AA", "B6", "UA"), "late": (False, True)}
        with ds:
            ds.advance()
            rows = ds.as_tensor().get_value().tolist()
            assert rows == [[2, 1, 5], [0, 0, 6], [1, 1, 5], [0, 1, 7]]

    def test_they_are_taken_by_name(self, flights):
        ds = StreamingDataset(arrow_source(flights, categories=["carrier", "late"]), batch_size=4)
        with ds:
            ds.advance()
            assert ds.index("carrier").eval().tolist() == [2, 0, 1, 0]
            assert ds.index("carrier").dtype == "int64"
            assert ds["late"].eval().tolist() == [1, 0, 1, 1]
            assert ds[["hour", "carrier"]].eval().tolist() == [[5, 2], [6, 0], [5, 1], [7, 0]]

    def test_given_levels_keep_their_order_and_name_what_is_none_of_them(self, source):
        options = {"columns": ["carrier"], "categories": {"carrier": ["UA", "B6", "WN", "AA"]}}
        assert rows_of(source(**options))[:, 0].tolist() == [0, 3, 1, 3]
        options["categories"] = {"carrier": ["UA", "AA"]}
        with pytest.raises(
            StreamError, match=r"'carrier' is 'B6', which is none of its levels 'UA', 'AA' in row 2"
        ):
            rows_of(source(**options))

    def test_the_levels_that_were_declared_keep_their_order(self, tmp_path):
        polars = pytest.importorskip("polars")
        levels = ["WN", "UA", "B6", "AA"]
        frame = pd.DataFrame({"carrier": pd.Categorical(CARRIERS, categories=levels)})
        enum = polars.DataFrame({"carrier": polars.Series(CARRIERS, dtype=polars.Enum(levels))})
        for table in (frame, enum):
            source = arrow_source(table, categories=["carrier"])
            assert rows_of(source)[:, 0].tolist() == [1, 3, 2, 3]
            assert source.levels == {"carrier": tuple(levels)}

    def test_dictionaries_that_differ_between_batches_have_common_levels(self):
        parts = [pa.array(part).dictionary_encode() for part in (["b", "a"], ["c", "a"])]
        batches = [pa.record_batch({"x": part}) for part in parts]
        source = arrow_source(lambda: batches, categories=["x"])
        assert rows_of(source)[:, 0].tolist() == [0, 1, 2, 1]
        assert source.levels == {"x": ("b", "a", "c")}

    @pytest.mark.parametrize("encode", [False, True], ids=["plain", "dictionary"])
    def test_null_is_a_level_only_if_asked_for(self, encode):
        values = pa.array(["b", None, "a"])
        table = pa.table({"x": values.dictionary_encode() if encode else values})
        with pytest.raises(StreamError, match="x' is null, which is none of its levels 'a', 'b' "):
            rows_of(arrow_source(table, categories={"x": ["a", "b"]}))
        source = arrow_source(table, categories={"x": ["a", None, "b"]})
        assert rows_of(source)[:, 0].tolist() == [2, 1, 0]
        assert StreamingDataset(source, batch_size=3).coords == {"x": ("a", "null", "b")}
        with pytest.raises(StreamError, match="'x' is 'b', which is none of its levels 'a', None"):
            rows_of(arrow_source(table, categories={"x": ["a", None]}))

    def test_nan_is_no_level(self):
        table = pa.table({"g": [2.5, float("nan"), 1.5]})
        source = arrow_source(table, categories=["g"])
        with pytest.raises(StreamError, match=r"'g' is nan, which is none of its levels 1.5, 2.5"):
            list(source)

    def test_large_unsigned_integers_are_levels(self):
        table = pa.table({"id": pa.array([2**63 + 1, 5, 2**63 + 1], pa.uint64())})
        source = arrow_source(table, categories=["id"])
        assert np.concatenate(list(source)).ravel().tolist() == [1, 0, 1]
        assert source.levels == {"id": (5, 2**63 + 1)}
        again = arrow_source(table, categories=source.levels)
        assert np.concatenate(list(again)).ravel().tolist() == [1, 0, 1]

    def test_a_dictionary_that_holds_a_value_twice_has_it_as_one_level(self, tmp_path):
        values = pa.DictionaryArray.from_arrays(pa.array([2, 1, 0]), ["b", "a", "b"])
        table = pa.table({"x": values})
        preshuffle(table, tmp_path / "out", seed=0, progressbar=False)
        for source in (
            arrow_source(table, categories=["x"]),
            parquet_source(tmp_path / "out", categories=["x"]),
        ):
            assert sorted(rows_of(source)[:, 0]) == [0, 0, 1]
            assert source.levels == {"x": ("b", "a")}

    def test_rows_of_other_levels_are_dropped_on_demand(self, tmp_path, flights):
        pq.write_table(flights, tmp_path / "a.parquet")
        levels = {"carrier": ["AA", "UA"]}
        source = parquet_source(tmp_path, categories=levels, invalid="drop")
        assert (source.n_rows, source.n_dropped) == (3, 1)

    def test_levels_that_a_shuffle_kept_need_no_pass(self, tmp_path, flights, monkeypatch):
        pq.write_table(flights, tmp_path / "raw.parquet")
        preshuffle(tmp_path / "raw.parquet", tmp_path / "out", seed=0, progressbar=False)
        found = parquet_source(tmp_path / "raw.parquet", categories=["carrier", "late"]).levels
        monkeypatch.setattr(summary, "_add_levels", None)
        assert parquet_source(tmp_path / "out", categories=["carrier", "late"]).levels == found

    def test_levels_of_one_type_do_not_merge_values_of_another(self, tmp_path):
        """Arrow casts 2 to True, and "01" to 1, without a word."""
        for name, values in (("a", [True, False]), ("b", [2, 1])):
            pq.write_table(pa.table({"x": values}), tmp_path / f"{name}.parquet")
        with pytest.raises(
            StreamError, match=r"b.parquet: column 'x' is bool and int64 .2 would b"
        ):
            parquet_source(tmp_path, categories=["x"])
        with pytest.raises(StreamError, match=r"b.parquet: column 'x' is bool .*2 would become"):
            rows_of(parquet_source(tmp_path, categories={"x": [True, False]}))
        codes = pa.table({"x": ["1", "01"]})
        with pytest.raises(StreamError, match=r"^block 0: column 'x' is int64 .*01 would become 1"):
            rows_of(arrow_source(codes, categories={"x": [1]}))
        assert rows_of(arrow_source(codes, categories={"x": None})).tolist() == [[1], [0]]

    @pytest.mark.parametrize("make", [np.array, tuple, iter], ids=["array", "tuple", "iterator"])
    def test_their_names_come_in_any_sequence(self, flights, make):
        source = arrow_source(flights, categories=make(["carrier", "late"]))
        assert rows_of(source).tolist() == [[2, 1, 5], [0, 0, 6], [1, 1, 5], [0, 1, 7]]

    @pytest.mark.parametrize(
        "categories, error, message",
        [
            ("carrier", TypeError, "is a string; pass a list of names"),
            (["tail"], ValueError, "categories names 'tail', which is not in"),
            ({"carrier": ["AA", "AA"]}, ValueError, "holds a level twice"),
            ({"carrier": []}, ValueError, "has no levels"),
            ({"carrier": ["AA", 1]}, ValueError, "mixes levels of several types"),
            ({"carrier": [1, 2]}, StreamError, "column 'carrier' is .* and .*string"),
        ],
    )
    def test_levels_that_cannot_be_are_refused(self, source, categories, error, message):
        with pytest.raises(error, match=message):
            rows_of(source(columns=["carrier"], categories=categories))

    def test_own_rows_have_the_levels_of_the_stream(self, flights):
        buffer = shuffle_buffer(
            arrow_source(flights, categories=["carrier", "late"]), buffer_size=4, seed=0
        )
        ds = StreamingDataset(buffer, batch_size=2, order_check="off")
        with ds.rows(pd.DataFrame({"late": [True], "hour": [9], "carrier": ["UA"]})):
            assert ds.as_tensor().eval().tolist() == [[2, 1, 9]]
        with pytest.raises(KeyError, match="'hour' is not a category column; pass categories="):
            ds.index("hour")

    def test_a_model_of_groups_has_their_names(self):
        rng = np.random.default_rng(0)
        groups = rng.choice(["low", "high"], size=2_000)
        y = np.where(groups == "low", -1.0, 2.0) + rng.normal(scale=0.1, size=2_000)
        source = arrow_source(pa.table({"group": groups, "y": y}), categories=["group"])
        buffer = shuffle_buffer(source, buffer_size=2_000, seed=0)
        ds = StreamingDataset(buffer, batch_size=200, order_check="off")
        with pm.Model(coords=ds.coords):
            mu = pm.Normal("mu", 0.0, 10.0, dims="group")
            pm.Normal("y", mu[ds.index("group")], 0.1, observed=ds["y"], total_size=ds.total_size)
            approx = pm.fit(
                1_500,
                callbacks=[ds.fit_callback()],
                obj_optimizer=pm.adam(learning_rate=0.05),
                random_seed=0,
                **QUICK,
            )
        mean = approx.sample(200, random_seed=0).posterior["mu"].mean(["chain", "draw"])
        # Both are exact to 0.1 / sqrt(1000) = 0.003 posterior standard deviations of the mean.
        np.testing.assert_allclose(mean.sel(group=["low", "high"]), [-1, 2], rtol=0, atol=0.03)


class TestTables:
    def test_the_example_of_the_page_names_the_levels(self):
        found = run("sources.md", "Strings, dates and types that change")
        assert found["ds"].coords == {"carrier": ("AA", "B6", "UA")}

    @pytest.mark.parametrize(
        "names", [["x", "dtype"], ["shape", "toarray"], ["dtype", "as_tensor"]]
    )
    def test_columns_may_be_called_like_attributes_of_arrays(self, names):
        frame = pd.DataFrame({name: [1.0, 2.0, 3.0] for name in names})
        polars = pytest.importorskip("polars")
        for table in (frame, polars.from_pandas(frame), pa.Table.from_pandas(frame)):
            ds = StreamingDataset(table, batch_size=2, order_check="off")
            assert (ds.columns, ds.total_size) == (tuple(names), 3)

    def test_columns_that_pandas_numbers_are_chosen_by_number(self):
        frame = pd.DataFrame(np.arange(6.0).reshape(2, 3))
        source = arrow_source(frame, columns=[2, 0])
        assert (source.n_rows, rows_of(source).tolist()) == (2, [[2, 0], [5, 3]])
        with pytest.raises(
            ValueError, match=r"has no column '3'; its columns are \['0', '1', '2'\]"
        ):
            rows_of(arrow_source(frame, columns=[3]))

    def test_a_batch_size_is_said_once(self):
        rows = np.arange(10.0).reshape(-1, 1)
        buffer = shuffle_buffer(rows, buffer_size=5, seed=0)
        assert [len(batch) for batch in StreamingDataset(buffer, batch_size=4)] == [4, 4, 2]
        with pytest.raises(ValueError, match="batch_size is not known; pass it to shuffle_buffer"):
            next(iter(buffer))
        with pytest.raises(ValueError, match="buffer_size=5 must be at least batch_size=6"):
            StreamingDataset(buffer, batch_size=6)

    def test_several_columns_are_a_matrix_and_missing_ones_are_named(self):
        with StreamingDataset(pd.DataFrame({"x": [1], "y": [2], "z": [3]}), batch_size=1) as ds:
            ds.advance()
            assert ds[["z", "x", "y"]].eval().tolist() == [[3, 1, 2]]
        assert ds[["x", "y"]].owner.inputs[0] is ds.as_tensor(), "neighbours are not copied"
        with pytest.raises(KeyError, match="'a', 'b' is not a column of the source"):
            ds[["a", "x", "b"]]
