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
"""Hypothesis strategies, and the tables that they describe."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hypothesis import strategies as st

# Rows per row group, per file.  Empty row groups and files, single rows and uneven groups are
# drawn on purpose: each has its own way of losing or repeating rows at a boundary.
row_groups = st.lists(st.sampled_from([0, 1, 2, 3, 7, 16, 40]), min_size=0, max_size=4)
layouts = st.lists(row_groups, min_size=1, max_size=4).filter(lambda files: sum(map(sum, files)))

# Sizes that divide the number of rows and that do not, and batches larger than the table.
batch_sizes = st.integers(1, 50)
seeds = st.integers(0, 2**63)


@st.composite
def buffers(draw: st.DrawFn) -> tuple[int, int]:
    """Draw a batch size, and a buffer size that holds such a batch."""
    batch_size = draw(batch_sizes)
    return batch_size, draw(st.integers(batch_size, 120))


def cut(n_rows: int, sizes: list[int]) -> list[np.ndarray]:
    """Cut rows 0, ..., n_rows - 1 into blocks of these sizes, again and again."""
    blocks, first = [], 0
    while first < n_rows:
        for size in sizes:
            blocks.append(numbered(n_rows)[first : first + size])
            first += size
    return blocks


def numbered(n_rows: int) -> np.ndarray:
    """Return rows that tell their own position, twice, so that torn rows show."""
    position = np.arange(n_rows, dtype="int32")
    return np.column_stack([position, 2 * position])


def table(n_rows: int) -> pa.Table:
    """Return `numbered` as an Arrow table."""
    rows = numbered(n_rows)
    return pa.table({"row": rows[:, 0], "twice": rows[:, 1]})


def rows_of(source: Iterable[np.ndarray]) -> np.ndarray:
    """Return all rows of a source that can be read."""
    return np.concatenate(list(source))


def write_layout(folder: Path, layout: list[list[int]]) -> int:
    """Write numbered rows as Parquet files with these row groups; return how many rows."""
    n_rows = sum(map(sum, layout))
    rows, first = table(n_rows), 0
    for number, groups in enumerate(layout):
        with pq.ParquetWriter(folder / f"{number:03}.parquet", rows.schema) as writer:
            for size in groups:
                writer.write_table(rows.slice(first, size), row_group_size=max(size, 1))
                first += size
    return n_rows
