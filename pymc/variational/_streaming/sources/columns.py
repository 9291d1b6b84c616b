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
"""Columns of numbers that are not put side by side yet."""

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from pymc.variational._streaming.sources.parquet.files import import_pyarrow

if TYPE_CHECKING:
    import pyarrow

__all__ = ["Columns", "Layout", "as_rows"]

_TILE_VALUES = 1 << 14
"""Put side by side at a time: few enough for the cache."""


@dataclass(frozen=True, slots=True)
class Layout:
    """The types of plain columns: numbers that every wider float holds."""

    kinds: np.ndarray
    """Place of each column's type in ``compiled.PLAIN``."""
    dtype: np.dtype
    """Of the rows; it can hold all values, as far as they are finite."""

    @classmethod
    def of(cls, types: Sequence["pyarrow.DataType"], dtype: np.dtype) -> "Layout | None":
        """Return the layout of columns of these types, or None if one of them is not plain."""
        kinds = [_plain_types().get(kind.id) for kind in types]
        return None if None in kinds else cls(np.array(kinds), dtype)


class Columns:
    """Rows of a record batch, which are put side by side when it is known where.

    Compiled code takes the values from where Arrow has them.

    Parameters
    ----------
    batch : pyarrow.RecordBatch
    layout : Layout
        Of its columns.
    otherwise : callable, optional
        Returns all rows of the batch, or raises: for values that are missing or not finite.
    """

    __slots__ = ("_otherwise", "_owner", "_places", "_start", "_stop", "layout")

    def __init__(
        self,
        batch: "pyarrow.RecordBatch",
        layout: Layout,
        otherwise: Callable[[], np.ndarray] | None = None,
    ):
        self._owner = batch
        self._places = _places(batch)
        self._start, self._stop = 0, batch.num_rows
        self.layout = layout
        self._otherwise = otherwise

    def __len__(self) -> int:
        return self._stop - self._start

    def __getitem__(self, rows: slice) -> "Columns":
        rest = copy(self)
        start, stop, _ = rows.indices(len(self))
        rest._start, rest._stop = self._start + start, self._start + stop
        return rest

    def interleave(self) -> np.ndarray | None:
        """Return the rows, shape (n, n_columns); None if a value is missing or not finite."""
        from pymc.variational._streaming.batches.compiled import interleave

        rows = np.empty((len(self), len(self.layout.kinds)), self.layout.dtype)
        complete = interleave(self._places, self.layout.kinds, self._start, rows)
        return rows if complete else None

    def rows(self) -> np.ndarray:
        """Return the rows, shape (n, n_columns), or raise."""
        rows = self.interleave()
        if rows is not None:
            return rows
        assert self._otherwise is not None
        return self._otherwise()[self._start : self._stop]

    def insert(self, window: np.ndarray, n: int, key: np.uint64) -> bool:
        """Put rows into a window of which *n* rows are there, and leave them out here.

        Parameters
        ----------
        window : ndarray of unsigned int, shape (size, words)
        n, key
            See ``compiled.insert_shuffled``.

        Returns
        -------
        bool
            Whether all went in that there was room for; if not, the next ones are missing or not
            finite.
        """
        from pymc.variational._streaming.batches.compiled import insert_columns

        n_columns = len(self.layout.kinds)
        tile = np.empty((-(-_TILE_VALUES // n_columns), n_columns), self.layout.dtype)
        words = tile.view(window.dtype)
        stop = min(self._stop, self._start + len(window) - n)
        columns = self._places, self.layout.kinds
        self._start = insert_columns(window, n, key, *columns, self._start, stop, tile, words)
        return self._start == stop


def as_rows(piece: np.ndarray | Columns) -> np.ndarray:
    """Put columns side by side, and leave rows as they are."""
    return piece.rows() if isinstance(piece, Columns) else piece


def _places(batch: "pyarrow.RecordBatch") -> np.ndarray:
    """Return where the columns of a batch are, as compiled code takes it.

    Arrow's C data interface would take one call, but that one gives up the interpreter lock, and
    then waits for it.
    """
    places = np.empty((batch.num_columns, 3), np.int64)
    for place, column in zip(places, batch.columns):
        validity, values = column.buffers()
        place[:] = values.address, validity.address if validity else 0, column.offset
    return places


@cache
def _plain_types() -> dict[int, int]:
    """Return the place of each plain type of Arrow's in ``compiled.PLAIN``."""
    from pymc.variational._streaming.batches.compiled import PLAIN

    from_numpy = import_pyarrow().from_numpy_dtype
    return {from_numpy(np.dtype(name)).id: kind for kind, name in enumerate(PLAIN)}
