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
"""Rows that the user puts in the place of a batch."""

from typing import Any

import numpy as np

from pymc.variational._streaming.batches.rebatch import Chunk, cast, read_epochs
from pymc.variational._streaming.sources.arrays import as_source
from pymc.variational._streaming.sources.arrow import arrow_source
from pymc.variational._streaming.sources.base import Source, is_arrow
from pymc.variational._streaming.sources.parquet.files import import_pyarrow

__all__ = ["given_rows"]


def given_rows(
    rows: Any, columns: tuple[str, ...] | None, sample_shape: tuple[int, ...], dtype: np.dtype
) -> np.ndarray:
    """Return all of *rows*, checked and cast as those of a batch are.

    Parameters
    ----------
    rows : ndarray, Arrow table or Source
    columns : tuple of str or None
        Columns of the stream, by whose names a table is read.
    sample_shape : tuple of int
    dtype : dtype
    """
    source: Source
    if is_arrow(rows) and columns is not None:
        whole = import_pyarrow().table(rows)  # a reader gives its rows only once
        source = arrow_source(lambda: whole, columns=columns)
    else:
        source = as_source(rows)
    source.probe()
    if columns is not None and source.columns not in (None, columns):
        raise ValueError(
            f"rows has columns {source.columns} where the stream has {columns}; "
            "pass columns=[...] to the source"
        )
    items = read_epochs(source, sample_shape, dtype, cycle=False)
    return np.concatenate([cast(item.rows, dtype) for item in items if isinstance(item, Chunk)])
