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
"""Rows from arrays and from iterables of blocks."""

import os

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence, Sized
from itertools import tee
from typing import Any

import numpy as np

from pymc.variational._streaming.errors import StreamError
from pymc.variational._streaming.sources.base import (
    Source,
    as_batch,
    is_arrow,
    require_finite,
)
from pymc.variational._streaming.sources.parquet.files import pa
from pymc.variational._streaming.sources.parquet.paths import is_path
from pymc.variational._streaming.sources.rows import RowFormat, choose_columns, skip_rows
from pymc.variational._streaming.sources.summary import Located, find_levels
from pymc.variational._streaming.utils import digest

__all__ = ["IterableSource", "as_source", "is_table"]

_BLOCK_BYTES = 1 << 22
_CHUNKED_BYTES = 1 << 18
"""Bytes of a block of an array that has to be decoded; the order check reads single blocks."""
_SAMPLES = 4
"""Places at which an array is sampled for its fingerprint; each may cost a chunk to decode."""
_SAMPLE_VALUES = 1024
"""Values that are hashed at each place, about."""


def as_source(data: Any) -> Source:
    """Make a source of an array, a factory, a re-iterable or a one-shot iterator of blocks."""
    if isinstance(data, Source):
        return data
    if is_path(data):
        path = data if isinstance(data, list | tuple) else os.fspath(data)
        raise TypeError(f"source={path!r} is a path; pass parquet_source({path!r})")
    if is_table(data):
        return IterableSource(lambda: data, n_rows=len(data))
    if hasattr(data, "toarray"):
        raise TypeError(
            f"source={type(data).__name__} is sparse; pass a function that yields blocks of its "
            "rows as arrays, such as data[i : i + 65_536].toarray()"
        )
    if hasattr(data, "as_tensor"):
        raise TypeError("source is a StreamingDataset; pass the source that it was made of")
    if all(hasattr(data, name) for name in ("shape", "dtype", "__getitem__")):
        return _ArraySource(data)
    if isinstance(data, Iterator):  # readers of Arrow among them
        return _OneShotSource(data)
    if callable(data) and not is_arrow(data):
        return IterableSource(data)
    if is_arrow(data) or isinstance(data, Iterable):
        return IterableSource(lambda: data)
    raise TypeError(
        f"source={type(data).__name__} is not a source; pass parquet_source(...), "
        "arrow_source(...), an array, or an iterable or factory of blocks of rows"
    )


def is_table(data: Any) -> bool:
    """Whether *data* is a table or data frame of Arrow, pandas, Polars or another library.

    Frames have attributes named like their columns, which can be "dtype" or "shape".
    """
    return is_arrow(data) and isinstance(data, Sized) and hasattr(data, "columns")


class _ArraySource(Source):
    """An array, or what can be sliced like one: zarr, h5py, xarray, dask."""

    def __init__(self, array: Any):
        first = _as_rows(np.asanyarray(array[:1]) if array.shape else array)
        if not len(first):
            raise ValueError("source=array has no rows")
        self._array = array
        chunks = getattr(array, "chunks", None)
        self._chunk = int(np.max(chunks[0])) if chunks else 1
        self._row_bytes, self._row_values = first.nbytes, first.size
        self._kind = _kind(first)
        self.n_rows = int(array.shape[0])
        self.sample_shape = first.shape[1:]
        # Now, since no other thread reads the array yet.
        self.fingerprint = digest(array.shape, str(first.dtype), *self._sample())

    def read_starts(self, rows: np.ndarray) -> np.ndarray:
        return rows - rows % self._chunk

    def blocks(
        self, epoch: int = 0, start: int = 0, *, block_rows: int | None = None
    ) -> Generator[np.ndarray]:
        block_bytes = _BLOCK_BYTES if self._chunk == 1 else _CHUNKED_BYTES
        step = max(1, block_bytes // (self._row_bytes * self._chunk)) * self._chunk
        for first in range(start - start % self._chunk, int(self._array.shape[0]), step):
            begin = max(first, start)
            block = _as_rows(np.asanyarray(self._array[begin : first + step]))
            _require_kind(block, self._kind, f"rows {begin} to {begin + len(block)}")
            require_finite(block, begin)
            if len(block):
                yield block

    def _sample(self) -> Iterator[bytes]:
        """Yield the values of a few rows, of one chunk, from each of few places."""
        assert self.n_rows is not None
        n_rows = max(1, _SAMPLE_VALUES // self._row_values)
        n_rows = min(n_rows, self._chunk) if self._chunk > 1 else n_rows
        places = np.linspace(0, self.n_rows - 1, _SAMPLES, dtype=int)
        for first in np.unique(self.read_starts(places)).tolist():
            yield np.asarray(self._array[first : first + n_rows]).tobytes()


class IterableSource(Source):
    """Blocks from whatever *make* returns; Arrow batches become rows of numbers."""

    def __init__(
        self,
        make: Callable[[], Any],
        *,
        columns: Sequence[str] | None = None,
        levels: Mapping[str, Any] | None = None,
        n_rows: int | None = None,
    ):
        self._make = make
        self._names = columns
        self._levels = dict(levels or {})
        """Levels of the category columns as Arrow arrays, None until they are found."""
        self.n_rows = n_rows
        self._format: RowFormat | None = None
        self._kind: tuple[Any, ...] | None = None
        self._probed: Any = None
        """What *make* returned to be probed, until it is called again."""

    @property
    def fingerprint(self) -> str:  # type: ignore[override]
        """Digest of what was asked for; nobody can know whether the rows are the same."""
        self._find_levels()
        levels = {name: known.to_pylist() for name, known in self._levels.items()}
        return digest(self.n_rows, self._names, levels)

    def probe(self) -> None:
        if self.sample_shape is None:
            self._find_levels()
            self._probed = self._open()
            _require_block(self._convert(self._probed))

    def blocks(
        self, epoch: int = 0, start: int = 0, *, block_rows: int | None = None
    ) -> Generator[np.ndarray]:
        self._find_levels()
        return skip_rows(self._convert(self._open()), start)

    def _open(self) -> Any:
        made, probed, self._probed = self._make(), self._probed, None
        if made is probed and isinstance(made, Iterator):
            raise StreamError(
                "source returned the iterator of an earlier pass, which has lost its first block; "
                "make a new one in each call"
            )
        return made

    def _find_levels(self) -> None:
        self._levels = find_levels(self._levels, self._first_pass, self.n_rows)

    def _first_pass(self, names: Sequence[str]) -> Iterator[Located]:
        """Yield batches whose columns hold what levels can be found of."""
        for where, batch in self.batches():
            RowFormat.from_schema(batch.schema, self._names, where, self._levels)
            yield where, batch

    def batches(self) -> Iterator[Located]:
        self._probed = self._open()
        for where, block in self._numbered(self._probed):
            batch = block if is_arrow(block) else as_batch(_as_rows(block), None)
            yield where, batch.select(choose_columns(batch.schema, self._names, where))

    def _numbered(self, made: Any) -> Iterator[tuple[str, Any]]:
        """Yield blocks after their places, and refuse to choose columns of those without names."""
        names = list(self._names or self._levels)
        for number, block in enumerate(_arrow_batches(made)):
            if names and not is_arrow(block):
                raise TypeError(
                    f"columns={names} are chosen from Arrow blocks by name, and block {number} is "
                    f"{type(block).__name__}; leave columns and categories out, and choose by "
                    "place in the function, or yield Arrow record batches"
                )
            yield f"block {number}", block

    def _convert(self, made: Any) -> Iterator[np.ndarray]:
        n_rows = 0
        for where, block in self._numbered(made):
            # An iterable may write its next block to the memory of this one.
            own = self._arrow_rows(block, where) if is_arrow(block) else [_as_rows(block).copy()]
            for rows in own:
                self._kind = self._kind or _kind(rows)
                self.sample_shape = self._kind[0]
                _require_kind(rows, self._kind, where)
                require_finite(rows, n_rows)
                n_rows += len(rows)
                self._compare(n_rows, whole=False)
                yield rows
        self._compare(n_rows, whole=True)

    def _compare(self, n_rows: int, *, whole: bool) -> None:
        """Compare the rows of a pass, or of the part that was read, with what was promised."""
        promised = n_rows if self.n_rows is None else self.n_rows
        if n_rows > promised or (whole and n_rows < promised):
            raise StreamError(
                f"source gave {n_rows} rows where n_rows={promised}; pass the number of rows of "
                "one pass, and a function that reads them all each time"
            )

    def _arrow_rows(self, batch: Any, where: str) -> Iterator[np.ndarray]:
        if self._format is None:
            self._format = RowFormat.from_schema(batch.schema, self._names, where, self._levels)
            self._format.describe(self)
        self._format.require(batch.schema, where, whole=self._names is None)
        return self._format.pieces(batch, where)


class _OneShotSource(IterableSource):
    """Blocks of an iterator, which can be read only once."""

    def __init__(self, iterator: Iterator[Any]):
        super().__init__(lambda: iterator)
        self._unread: Iterator[Any] | None = _arrow_batches(iterator)

    def probe(self) -> None:
        if self.sample_shape is None and self._unread is not None:
            first, self._unread = tee(self._unread)
            _require_block(self._convert(first))

    def _open(self) -> Iterator[Any]:
        if self._unread is None:
            raise StreamError(
                "source is a one-shot iterator and has been read; pass a function that makes "
                "a new iterator, or cycle=False for a single pass"
            )
        blocks, self._unread = self._unread, None
        return blocks

    def count(self) -> int:
        raise ValueError(
            'total_size="auto" cannot count a one-shot iterator without using it up; '
            "pass total_size=<number of rows>, or a function that makes a new iterator"
        )


def _arrow_batches(data: Any) -> Iterator[Any]:
    """Yield the record batches of all that speaks Arrow in *data*, and other blocks as they are."""
    is_one = isinstance(data, np.ndarray) or hasattr(data, "__arrow_c_stream__")
    if not is_one and not isinstance(data, Iterable):
        raise TypeError(
            f"source gave {type(data).__name__}; return a RecordBatchReader, a table, or an "
            "iterable of record batches or arrays"
        )
    for block in [data] if is_one else data:
        if hasattr(block, "__arrow_c_stream__"):
            yield from pa.RecordBatchReader.from_stream(block)
        else:
            yield pa.record_batch(block) if is_arrow(block) else block


def _as_rows(block: Any) -> np.ndarray:
    """Return a block as a plain array, or refuse it."""
    if not isinstance(block, np.ndarray) or not block.ndim:
        raise TypeError(
            f"a block of rows is {type(block).__name__}; "
            "pass arrays of shape (rows, *sample_shape) or Arrow record batches"
        )
    if block.dtype.kind not in "biuf":
        raise TypeError(f"a block of rows has dtype {block.dtype}; pass integers or floats")
    if 0 in block.shape[1:]:
        raise ValueError(f"a block has shape {block.shape}; pass rows that hold values")
    if np.ma.is_masked(block):
        raise StreamError("a block of rows has masked values; fill them or leave their rows out")
    return np.asarray(block)


def _require_block(blocks: Iterator[np.ndarray]) -> None:
    if next(blocks, None) is None:
        raise ValueError("source yields no blocks, so the shape of a row is unknown")


def _kind(rows: np.ndarray) -> tuple[Any, ...]:
    return rows.shape[1:], rows.dtype


def _require_kind(rows: np.ndarray, kind: tuple[Any, ...], where: str) -> None:
    if _kind(rows) != kind:
        raise StreamError(
            f"{where}: rows of shape {rows.shape[1:]} and type {rows.dtype} where {kind[0]} and "
            f"{kind[1]} came before; fill nulls, and convert all rows to one type"
        )
