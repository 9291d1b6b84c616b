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
import datetime
import decimal

import numpy as np
import pyarrow as pa
import pytest

from hypothesis import given
from hypothesis import strategies as st

from pymc.variational._streaming.preshuffle.checksum import checksum_rows
from tests.variational.streaming.preshuffle.preshuffled import every_type

WORD = 1 << 64

TABLE = every_type(40)
COLUMNS = pytest.mark.parametrize("name", TABLE.column_names)


def batch(name: str) -> pa.RecordBatch:
    return TABLE.select([name]).combine_chunks().to_batches()[0]


@COLUMNS
def test_order_does_not_matter(name):
    order = np.random.default_rng(0).permutation(TABLE.num_rows)
    assert checksum_rows(batch(name)) == checksum_rows(batch(name).take(pa.array(order)))


@COLUMNS
@given(cut=st.integers(0, 40))
def test_checksums_of_slices_add_up(name, cut):
    whole = batch(name)
    parts = checksum_rows(whole.slice(0, cut)) + checksum_rows(whole.slice(cut))
    assert parts % WORD == checksum_rows(whole)


@COLUMNS
def test_equal_values_in_other_buffers_have_the_same_checksum(name):
    """What lies under a null, or before an offset, is no value."""
    rows = [batch(name).slice(k, 1) for k in range(TABLE.num_rows)]
    rebuilt = pa.Table.from_batches(rows).combine_chunks().to_batches()[0]
    assert checksum_rows(batch(name)) == checksum_rows(rebuilt)


def changes() -> list:
    """Return pairs of columns that differ a little."""
    day = datetime.date(2026, 1, 1)
    return [
        ([1, 2], [1, 3]),
        ([1, None], [1, 0]),
        ([1.0, 0.0], [1.0, -0.0]),
        ([True, False], [True, True]),
        (["a", ""], ["a", None]),
        (["a", "b"], ["a", "b\0"]),
        (["12345678", "x"], ["12345678\0", "x"]),
        (["ab", "c"], ["a", "bc"]),
        (["abcdefgh12345678"], ["12345678abcdefgh"]),
        ([[1, 2], [3]], [[1], [2, 3]]),
        ([[1, 2]], [[2, 1]]),
        ([[]], [None]),
        ([[[1, 2], [3]]], [[[1], [2, 3]]]),
        ([[[1, 2], [3, 4]]], [[[1, 3], [2, 4]]]),
        ([{"x": 1, "y": 2}], [{"x": 2, "y": 1}]),
        ([{"x": None, "y": 2}], [{"x": 2, "y": None}]),
        ([{"x": 1}, None], [{"x": 1}, {"x": None}]),
        ([decimal.Decimal("1.25")], [decimal.Decimal("1.26")]),
        ([day], [day + datetime.timedelta(1)]),
    ]


@pytest.mark.parametrize("before, after", changes(), ids=str)
def test_any_change_shows(before, after):
    kind = pa.array(before + after).type
    columns = [pa.record_batch({"c": pa.array(v, kind)}) for v in (before, after)]
    assert checksum_rows(columns[0]) != checksum_rows(columns[1])


def test_rows_torn_apart_show():
    """Each column by itself has the same values."""
    n = 1000
    whole = pa.record_batch({"a": np.arange(n), "b": np.arange(n) % 7})
    torn = pa.record_batch({"a": np.arange(n), "b": np.roll(np.arange(n) % 7, 1)})
    assert checksum_rows(whole) != checksum_rows(torn)


def test_swapped_columns_show():
    a, b = np.arange(100), np.arange(100)[::-1].copy()
    one, other = pa.record_batch({"a": a, "b": b}), pa.record_batch({"a": b + 1, "b": a})
    assert checksum_rows(one) != checksum_rows(other)


@pytest.mark.parametrize("bit", range(0, 64, 7))
def test_one_flipped_bit_among_many_rows_shows(bit):
    values = np.random.default_rng(0).integers(0, 1 << 62, 100_000).astype(np.uint64)
    flipped = values.copy()
    flipped[77_777] ^= np.uint64(1 << bit)
    one, other = pa.record_batch({"a": values}), pa.record_batch({"a": flipped})
    assert checksum_rows(one) != checksum_rows(other)
