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

import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import harness
from benchmarks.orderbook import fold as fold_module
from benchmarks.orderbook.book import ROW
from benchmarks.orderbook.fold import merged

markets_of_rows = st.lists(
    st.lists(st.tuples(st.integers(0, 12), st.integers(0, 1)), min_size=1, max_size=30).map(sorted),
    min_size=1,
    max_size=6,
)


@given(markets=markets_of_rows, block=st.integers(1, 5))
@settings(max_examples=50)
def test_merge_is_a_stable_sort_by_time(tmp_path_factory, markets, block):
    """Blocks of few rows end within runs of equal times, where an order is easily lost."""
    scratch = tmp_path_factory.mktemp("scratch")
    files, expected = [], []
    for order, values in enumerate(markets):
        rows = np.zeros(len(values), ROW)
        rows["recv_ms"], rows["up"] = zip(*values)
        rows["mid"], rows["spread"] = order, range(len(rows))
        files.append(scratch / str(order))
        rows.tofile(files[-1])
        expected += [(t, order, i, up) for i, (t, up) in enumerate(values)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fold_module, "MERGED_ROWS", block)
        patch.setattr(fold_module, "FEWEST_ROWS", block)
        table = pa.concat_tables(merged(files))
    assert list(zip(*(table[name].to_pylist() for name in ("mid", "spread", "up")))) == [
        row[1:] for row in sorted(expected)
    ]


def test_two_thousand_markets_at_the_same_time_merge_in_two_seconds(tmp_path):
    rng, files = np.random.default_rng(0), []
    for number in range(2_000):
        rows = np.zeros(500, ROW)
        rows["recv_ms"] = np.sort(rng.integers(0, 900_000, len(rows)))
        files.append(tmp_path / str(number))
        rows.tofile(files[-1])
    began = time.process_time()
    pieces = [len(piece) for piece in merged(files)]
    assert time.process_time() - began < 2
    assert sum(pieces) == 1_000_000


@given(lengths=st.lists(st.integers(0, 20), min_size=1), n_rows=st.integers(1, 9))
@settings(max_examples=20)
def test_files_hold_the_rows_asked_for(tmp_path_factory, lengths, n_rows):
    folder = tmp_path_factory.mktemp("files")
    table = pa.table({"mid": np.arange(sum(lengths))})
    starts = np.cumsum([0, *lengths])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness, "ROWS_PER_FILE", n_rows)
        harness.write_files((table[start:][:n] for start, n in zip(starts, lengths)), folder)
    files = [pq.read_table(file) for file in sorted(folder.iterdir())]
    assert [len(file) for file in files[:-1]] == [n_rows] * (len(files) - 1)
    assert len(files[-1]) <= n_rows
    assert pa.concat_tables(files).equals(table)
