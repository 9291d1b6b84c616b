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
"""What a source makes of 60 random files, whole and damaged.

`python -m tests.variational.streaming.sources.fuzz` makes more of them.
"""

import sys

from collections import Counter
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pymc.variational.streaming import StreamError, parquet_source, preshuffle
from tests.variational.streaming.sources.fuzz import FAULTS, run
from tests.variational.streaming.sources.fuzz_files import damage, make_case, regions

FIRST, N_FILES = 100, 60


@pytest.fixture(scope="module")
def outcomes():
    return list(run(FIRST, FIRST + N_FILES))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
class TestRandomFiles:
    def test_each_gives_its_rows_or_an_error_that_names_it(self, outcomes):
        """Except where a contradictory footer ends the process inside pyarrow, by pyarrow alone."""
        assert [one["number"] for one in outcomes] == list(range(FIRST, FIRST + N_FILES))
        assert not [one for one in outcomes if one["outcome"] in FAULTS]

    def test_page_checksums_leave_no_wrong_rows(self, outcomes):
        assert not [
            one for one in outcomes if one["checksums"] and one["outcome"].startswith("wrong")
        ]

    def test_wrong_rows_come_from_page_data_alone(self, outcomes):
        counts = Counter(one["outcome"] for one in outcomes)
        wrong = {outcome for outcome in counts if outcome.startswith("wrong")}
        assert wrong <= {"wrong rows after damage to page data"}
        assert counts["right rows"] > N_FILES / 10

    def test_memory_does_not_follow_what_a_file_claims(self, outcomes):
        assert max(one.get("peak_mb", 0) for one in outcomes) < 100


def test_the_harness_makes_the_same_files_again_and_names_what_it_damaged():
    changed = Counter()
    for number in range(30):
        case = make_case(number)
        assert make_case(number) == case
        changed[regions(case.content, damage(case, number))] += 1
    assert {"page data", "footer", "nothing"} <= changed.keys()


def test_a_footer_that_takes_one_column_for_another_is_refused(tmp_path):
    """No checksum of a page shows it, since the page is whole, and pyarrow reads it."""
    path, rng = tmp_path / "a.parquet", np.random.default_rng(0)
    table = pa.table({name: rng.random(2000) for name in "xyz"})
    pq.write_table(table, path, use_dictionary=False, compression="none", write_page_checksum=True)
    assert len(list(parquet_source(path))) == 1
    chunks = map(pq.read_metadata(path).row_group(0).column, (1, 2))
    y, z = (_encode(chunk.data_page_offset) for chunk in chunks)
    content = path.read_bytes()
    start = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    path.write_bytes(content[:start] + content[start:].replace(z, y))
    found = pq.read_table(path, page_checksum_verification=True)
    assert found["z"].equals(found["y"])
    with pytest.raises(StreamError, match=r"a\.parquet: .*its footer puts a column at bytes"):
        list(parquet_source(path))
    with pytest.raises(StreamError, match=r"a\.parquet: .*its footer puts a column at bytes"):
        preshuffle(path, tmp_path / "out", seed=0, progressbar=False)


def _encode(number: int) -> bytes:
    """Encode an integer as Thrift's compact protocol does."""
    number, encoded = 2 * number, []
    while number > 127:
        encoded.append(number % 128 + 128)
        number //= 128
    return bytes([*encoded, number])


@pytest.mark.parametrize("names", [["s.x", "s"], ["s", "s.x"]], ids=["flat first", "struct first"])
def test_a_column_is_not_a_field_with_the_same_path(tmp_path, names):
    columns = {"s.x": pa.array([1.0, 2.0]), "s": pa.array([{"x": 8.0}, {"x": 9.0}])}
    pq.write_table(pa.table({name: columns[name] for name in names}), tmp_path / "a.parquet")
    source = parquet_source(tmp_path, columns=["s.x"])
    np.testing.assert_array_equal(np.concatenate(list(source)), [[1], [2]])


def test_nulls_in_decimals_of_few_digits_are_refused_by_place(tmp_path):
    values = pa.array([Decimal("0.25"), None], pa.decimal128(3, 2))
    pq.write_table(pa.table({"x": values}), tmp_path / "a.parquet")
    with pytest.raises(StreamError, match=r"column 'x' is null in row 1 of row group 0"):
        list(parquet_source(tmp_path))
    assert parquet_source(tmp_path, invalid="drop").n_rows == 1


def test_files_of_other_writers_hold_what_the_footer_check_asks_for(tmp_path):
    """Row groups without rows have no place, and nested columns have values of their own."""
    schema = pa.schema([("x", pa.float64()), ("list", pa.list_(pa.int64())), ("text", pa.string())])
    rows = pa.table({"x": [1.0, 2.0], "list": [[1, 2, 3], None], "text": ["a", None]}, schema)
    with pq.ParquetWriter(tmp_path / "a.parquet", schema) as writer:
        for part in (rows.slice(0, 0), rows, rows.slice(0, 0), rows.slice(0, 1)):
            writer.write_table(part)
    assert parquet_source(tmp_path, columns=["x"]).n_rows == 3


def test_a_corrupt_pre_shuffle_mark_is_named(tmp_path):
    schema = pa.schema([("x", pa.float64())], metadata={b"pymc.preshuffle": b'{"version": '})
    pq.write_table(pa.table({"x": [1.0]}, schema), tmp_path / "a.parquet")
    with pytest.raises(StreamError, match=r"a\.parquet: its pre-shuffle mark cannot be read"):
        parquet_source(tmp_path)
