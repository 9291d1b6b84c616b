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
"""Columns of Arrow tables become the same rows, whatever their types."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pymc.variational._streaming.sources.rows import PIECE_ROWS
from pymc.variational.streaming import StreamError, parquet_source, shuffle_buffer

DTYPES = "int8", "uint8", "int16", "uint16", "int32", "uint32", "float32", "float64"
N_ROWS = PIECE_ROWS + 1_000
"""More than are read at a time."""


def windows(buffer, start):
    return [rows.copy() for rows in buffer.blocks(3, start) if len(rows)]


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    """Return a table of every plain type, and its folder."""
    rng = np.random.default_rng(0)
    columns = {dtype: rng.integers(0, 100, N_ROWS).astype(dtype) for dtype in DTYPES}
    folder = tmp_path_factory.mktemp("book")
    pq.write_table(pa.table(columns), folder / "book.parquet", row_group_size=100_000)
    return columns, folder


@pytest.mark.parametrize("names", [DTYPES, ["float32", "int8", "uint16"]])
@pytest.mark.parametrize("start", [0, 300_001])
def test_windows_are_those_of_the_rows(book, names, start):
    columns, folder = book
    source = parquet_source(folder, columns=names)
    rows = np.stack([columns[name] for name in names], axis=1, dtype=np.result_type(*names))
    sizes = {"buffer_size": 70_001, "batch_size": 64, "seed": 5}
    expected = windows(shuffle_buffer(rows, **sizes), start)
    found = windows(shuffle_buffer(source, **sizes), start)
    assert [len(window) for window in found] == [len(window) for window in expected]
    for one, other in zip(found, expected):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("n_columns", [1, 2, 3, 4, 65])
def test_any_number_of_columns(tmp_path, n_columns):
    rows = np.arange(1_000 * n_columns, dtype="float32").reshape(1_000, n_columns)
    table = pa.table({f"c{j}": rows[:, j] for j in range(n_columns)})
    pq.write_table(table, tmp_path / "x.parquet")
    (found,) = shuffle_buffer(parquet_source(tmp_path), buffer_size=1_000, batch_size=1_000, seed=0)
    np.testing.assert_array_equal(found[np.argsort(found[:, 0])], rows)


@pytest.mark.parametrize("value", [None, np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("row", [0, 5_000, PIECE_ROWS + 1])
def test_a_value_that_is_refused_is_named(tmp_path, value, row):
    values = np.arange(N_ROWS, dtype="float64").astype(object)
    values[row] = value
    table = pa.table({"x": pa.array(values, "float64")})
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=200_000)
    source = parquet_source(tmp_path)
    buffer = shuffle_buffer(source, buffer_size=2_500, batch_size=100, seed=0)
    with pytest.raises(StreamError) as caught:
        list(buffer)
    group, place = divmod(row, 200_000)
    name = "null" if value is None else value
    assert f"column 'x' is {name} in row {place} of row group {group}" in str(caught.value)


def test_rows_that_are_dropped_leave_the_others(tmp_path):
    values = np.arange(10_000, dtype="float32")
    values[[3, 7_000]] = np.nan
    pq.write_table(pa.table({"x": values}), tmp_path / "x.parquet")
    source = parquet_source(tmp_path, invalid="drop")
    buffer = shuffle_buffer(source, buffer_size=9_998, batch_size=100, seed=0)
    (window,) = (rows for rows in buffer.blocks() if len(rows))
    np.testing.assert_array_equal(np.sort(window[:, 0]), np.delete(values, [3, 7_000]))


@pytest.mark.parametrize(
    "group_rows, expected",
    [
        (100_000, [200_000, 150_000]),
        (300_000, [150_000, 150_000, 50_000]),
        (PIECE_ROWS // 8, [PIECE_ROWS, 9]),
    ],
)
def test_reads_end_where_row_groups_do(tmp_path, group_rows, expected):
    n_rows = sum(expected)
    with pq.ParquetWriter(tmp_path / "x.parquet", pa.schema({"x": "int8"})) as writer:
        writer.write_table(pa.table({"x": np.zeros(n_rows, "int8")}), row_group_size=group_rows)
    assert [len(piece) for piece in parquet_source(tmp_path).blocks()] == expected


@pytest.mark.parametrize("kind", ["bool", "float16", "int64", "decimal", "dictionary"])
def test_other_types_take_the_long_way(tmp_path, kind):
    numbers = pa.array(np.arange(6) % 2, "int64")
    made = {
        "decimal": lambda: numbers.cast(pa.decimal128(19, 0)),
        "dictionary": lambda: numbers.cast("float32").dictionary_encode(),
        "float16": lambda: pa.array(np.arange(6) % 2, pa.float16()),
    }
    column = made.get(kind, lambda: numbers.cast(kind))()
    pq.write_table(pa.table({"x": column}), tmp_path / "x.parquet")
    source = parquet_source(tmp_path)
    (window,) = shuffle_buffer(source, buffer_size=6, batch_size=6, seed=0)
    assert sorted(window[:, 0]) == [0, 0, 0, 1, 1, 1]
