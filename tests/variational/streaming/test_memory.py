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
"""Memory does not grow with rows, files, row groups or epochs."""

import sys

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.variational.streaming.resident import SLACK, growth_mb

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
]


def write(path: Path, n_rows: int, n_columns: int, row_group: int) -> None:
    """Write incompressible float32 columns."""
    rng = np.random.default_rng(0)
    columns = {f"x{j}": rng.random(n_rows, dtype="float32") for j in range(n_columns)}
    pq.write_table(pa.table(columns), path, use_dictionary=False, row_group_size=row_group)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> float:
    """Return the growth for a table that fits its buffer twice."""
    folder = tmp_path_factory.mktemp("small")
    write(folder / "a.parquet", 400_000, 4, 100_000)
    return growth_mb(folder, buffer_size=200_000)


def test_many_rows_in_one_row_group_cost_no_more_than_few(tmp_path, small):
    write(tmp_path / "a.parquet", 5_000_000, 4, 5_000_000)
    assert growth_mb(tmp_path, buffer_size=200_000) < small + SLACK


def test_wide_rows_in_one_row_group_cost_no_more_than_few(tmp_path):
    """Each of 64 columns holds a page of 1 MB, however many pages follow."""
    growths = []
    for n_rows in (200_000, 800_000):
        folder = tmp_path / str(n_rows)
        folder.mkdir()
        write(folder / "a.parquet", n_rows, 64, n_rows)
        growths.append(growth_mb(folder, buffer_size=100_000))
    assert growths[1] < growths[0] + SLACK


def test_many_small_files_cost_no_more_than_one(tmp_path, small):
    for number in range(1_000):
        write(tmp_path / f"{number:04}.parquet", 500, 4, 500)
    assert growth_mb(tmp_path, buffer_size=200_000) < small + SLACK


def test_epochs_cost_nothing(tmp_path, small):
    write(tmp_path / "a.parquet", 400_000, 4, 100_000)
    assert growth_mb(tmp_path, buffer_size=200_000, n_epochs=20) < small + SLACK
