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
"""Arrow columns to rows of numbers, exactly or not at all, and sources of such rows in files."""

import re

from abc import abstractmethod
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, groupby
from typing import Any, NamedTuple

import numpy as np

from pymc.variational._streaming.errors import StreamError
from pymc.variational._streaming.sources.base import Source, is_finite, value_type
from pymc.variational._streaming.sources.parquet.files import pa
from pymc.variational._streaming.sources.summary import (
    PER_SECOND,
    describe_levels,
    encode,
    is_text,
)

__all__ = [
    "IN_FOLDERS",
    "PIECE_ROWS",
    "FileSource",
    "RowFormat",
    "by_file",
    "choose_columns",
    "exact_limit",
    "is_pandas_index",
    "piece_rows",
    "skip_rows",
]

IN_FOLDERS = (
    "only in the names of folders; pass "
    'pyarrow.dataset.dataset(path, partitioning="hive").scanner().to_reader() to preshuffle, '
    "which writes them as columns"
)
_PANDAS_INDEX = re.compile(r"__index_level_\d+__")
PIECE_ROWS = 1 << 18
_PIECE_VALUES = 1 << 20
"""What is decoded or converted at a time, at most.  Each call gives up the interpreter lock, and
then waits for the step that compiled code makes meanwhile: few calls keep a stream ahead."""
_FEW_COLUMNS = 8
"""Copying more columns one by one takes longer than to join and to transpose them."""


def is_pandas_index(column: str) -> bool:
    """Tell whether pandas made a column of an index without a name."""
    return _PANDAS_INDEX.fullmatch(column) is not None


def exact_limit(dtype: np.dtype) -> float:
    """Return the n up to which *dtype* holds every integer; infinite for integer types."""
    return 2 ** (np.finfo(dtype).nmant + 1) if dtype.kind == "f" else np.inf


def piece_rows(n_columns: int) -> int:
    """Return how many rows to decode or convert at a time."""
    return max(1, min(_PIECE_VALUES // n_columns, PIECE_ROWS))


class _Type(NamedTuple):
    """What the values of a column become."""

    dtype: np.dtype
    integral: bool = False
    """Whether the values must survive every later cast: integers, levels and times."""
    is_time: bool | str | None = False
    """Whether the values are seconds since 1970, "UTC" where their zone is known; None where all
    are null."""

    def join(self, other: "_Type") -> "_Type":
        """Return what holds the values of both exactly."""
        is_time = self.is_time if other.is_time is None else other.is_time
        dtype = np.result_type(self.dtype, other.dtype)
        return _Type(dtype, self.integral and other.integral, is_time)


@dataclass(frozen=True)
class RowFormat:
    """The columns of a stream, frozen by name and type."""

    columns: tuple[str, ...]
    types: tuple[_Type, ...]
    levels: Mapping[str, Any]
    """Levels of the category columns as Arrow arrays; None until they are found."""

    @cached_property
    def dtype(self) -> np.dtype:
        """The smallest type that holds all columns exactly; 64-bit integers are checked by value."""
        common = np.result_type(*(kind.dtype for kind in self.types))
        return np.dtype({"bool": "uint8", "float16": "float32"}.get(common.name, common))

    @cached_property
    def integral(self) -> tuple[bool, ...]:
        """Which columns hold integers, and so must survive every later cast."""
        return tuple(kind.integral for kind in self.types)

    @classmethod
    def from_schema(
        cls,
        schema: "pa.Schema",
        columns: Sequence[str] | None,
        where: str,
        levels: Mapping[str, Any] | None = None,
    ) -> "RowFormat":
        """Freeze the *columns* (default: all) of *schema*, or refuse those of *where* by name."""
        names, levels = choose_columns(schema, columns, where), levels or {}
        index = [name for name in names if is_pandas_index(name)]
        if columns is None and index:
            raise ValueError(
                f"{where}: column {index[0]!r} is pandas' index; drop it with "
                f"reset_index(drop=True), or pass columns={[n for n in names if n not in index]}"
            )
        for name in levels.keys() - set(names):
            raise ValueError(f"{where}: categories names {name!r}, which is not in {list(names)}")
        return cls(names, _types(schema, names, where, levels), levels)

    def widen(self, schema: "pa.Schema", where: str, *, whole: bool) -> "RowFormat":
        """Return the format that also holds these columns of *schema*, all of it if *whole*."""
        if whole and sorted(schema.names) != sorted(self.columns):
            shared = [name for name in self.columns if name in schema.names]
            remedy = f"pass columns={shared}" if shared else "write all with the same names"
            raise ValueError(
                f"{where}: columns {schema.names} where {list(self.columns)} came before; {remedy}"
            )
        names = choose_columns(schema, self.columns, where)
        types = _types(schema, names, where, self.levels)
        for name, mine, other in zip(self.columns, self.types, types):
            if None not in (mine.is_time, other.is_time) and mine.is_time != other.is_time:
                raise ValueError(
                    f"{where}: column {name!r} has times where it had none before, or times "
                    "without a zone beside some with one; write the files with one type"
                )
        return replace(self, types=tuple(map(_Type.join, self.types, types)))

    def require(self, schema: "pa.Schema", where: str, *, whole: bool) -> None:
        """Raise ValueError unless rows of *schema* keep their names and fit ``dtype``."""
        if self.widen(schema, where, whole=whole).dtype != self.dtype:
            raise ValueError(
                f"{where}: types {schema.types} do not fit rows of {self.dtype}, as they came "
                "before; cast all batches to one schema"
            )

    def with_levels(self, levels: Mapping[str, Any]) -> "RowFormat":
        """Return the format with these levels of all category columns."""
        types = (
            _level_type(levels[name]) if name in levels else kind
            for name, kind in zip(self.columns, self.types)
        )
        return replace(self, types=tuple(types), levels=levels)

    def describe(self, source: Source) -> None:
        """Tell what the columns of a source are, once the levels are known."""
        source.columns, source.sample_shape = self.columns, (len(self.columns),)
        source.integral = self.integral
        source.times = {
            n: kind.is_time for n, kind in zip(self.columns, self.types) if kind.is_time
        }
        source.levels = {n: tuple(levels.to_pylist()) for n, levels in self.levels.items()}

    def pieces(self, batch: "pa.RecordBatch", where: str) -> Iterator[np.ndarray]:
        """Yield the rows of *batch* in bounded pieces; an invalid value is a StreamError."""
        size = piece_rows(len(self.columns))
        for first in range(0, batch.num_rows, size):
            piece = batch.slice(first, size)
            rows, bad = self.to_rows(piece, where)
            if bad is not None:
                row, fault = self.fault(piece, bad)
                raise StreamError(
                    f"{where}: {fault} in row {first + row}; "
                    "repair or filter the rows before they are streamed"
                )
            yield rows

    def to_rows(self, batch: "pa.RecordBatch", where: str) -> tuple[np.ndarray, np.ndarray | None]:
        """Interleave the columns of *batch*, and mark values that are not finite or exact, if any."""
        arrays = [self._numbers(name, batch.column(name), where) for name in self.columns]
        # Nulls become zeros here.
        filled = [a.fill_null(pa.scalar(0).cast(a.type)) if a.null_count else a for a in arrays]
        values = [array.to_numpy(zero_copy_only=False) for array in filled]
        rows = _interleave(values, self.dtype)
        invalid = [self._invalid(j, *pair) for j, pair in enumerate(zip(arrays, values))]
        if is_finite(rows) and not any(mask.any() for mask in invalid):
            return rows, None
        bad = ~np.isfinite(rows)
        for j, mask in enumerate(invalid):
            bad[:, j] |= mask
        return rows, bad if bad.any() else None

    def fault(self, batch: "pa.RecordBatch", bad: np.ndarray) -> tuple[int, str]:
        """Return the row of the first bad value of *batch*, and what is wrong with it."""
        row, j = (int(i) for i in np.argwhere(bad)[0])
        name = self.columns[j]
        scalar, is_time = batch.column(name)[row], self.types[j].is_time
        value = scalar.cast(pa.string()).as_py() if is_time else scalar.as_py()
        problem, shown = "", "null" if value is None else value
        if name in self.levels:
            shown = shown if value is None else repr(value)
            levels = self.levels[name].to_pylist()
            problem = f", which is none of its {describe_levels(levels)}"
        elif value is not None and (is_time or np.isfinite(float(value))):
            problem = f", which {self.dtype} cannot hold exactly"
        return row, f"column {name!r} is {shown}{problem}"

    def _invalid(self, j: int, array: "pa.Array", values: np.ndarray) -> np.ndarray | np.bool:
        """Mark the nulls of a column, and the integers that ``dtype`` may not hold.

        One that arrives as a float, as decimals do, was rounded already at the limit or beyond.
        """
        mask = array.is_null().to_numpy(zero_copy_only=False) if array.null_count else np.False_
        is_integer = values.dtype.kind in "iu"
        if values.itemsize == 8 and self.dtype.kind == "f" and (is_integer or self.integral[j]):
            limit = exact_limit(self.dtype) - (not is_integer)
            mask = mask | (values > limit) | (values < -limit)
        return mask

    def _numbers(self, name: str, array: "pa.Array", where: str) -> "pa.Array":
        """Return numbers, and null for what is no number or none of the levels."""
        if name in self.levels:
            return encode(name, array, self.levels[name], where)
        if pa.types.is_dictionary(array.type):
            array = array.dictionary_decode()  # a value can be null in the dictionary itself
        if pa.types.is_temporal(array.type):
            return _seconds(array)
        if pa.types.is_decimal(array.type):
            return array.cast(pa.float64())
        return array.cast(pa.int8()) if pa.types.is_null(array.type) else array


class FileSource(Source):
    """Rows of files in parts, row groups or record batches, which are read from their start on."""

    _part_name = "record batch"

    def _set_files(self, files: Sequence[Any]) -> None:
        """Take files, which know their ``path`` and their ``part_rows``."""
        self._files = files
        self._parts = [(file, part) for file in files for part in range(len(file.part_rows))]
        self._set_rows([file.part_rows[part] for file, part in self._parts])

    def _set_rows(self, part_rows: Sequence[int]) -> None:
        self._part_rows = np.array(part_rows, np.int64)
        self.n_rows = int(self._part_rows.sum())
        if not self.n_rows:
            raise ValueError(
                f"{self._files[0].path}: no rows to stream in {len(self._files)} file(s)"
            )

    def locate(self, epoch: int, start: int, stop: int) -> str:
        order = self._order(epoch)
        starts = self._starts(order)
        ends = start, min(stop, starts[-1]) - 1
        if start > ends[1]:  # of a batch that runs into the next epoch
            return ""
        places = np.searchsorted(starts[1:], ends, side="right")
        (file, part), (last, _) = (self._parts[order[place]] for place in places)
        if ends[0] == ends[1]:
            row = start - starts[places[0]]
            return f" (row {row} of {self._part_name} {part} of {file.path})"
        return f" (in {file.path}" + (")" if file is last else f" to {last.path})")

    @abstractmethod
    def _read(
        self, file: Any, parts: Sequence[int], block_rows: int | None
    ) -> Iterator[np.ndarray]:
        """Read parts of a file, one after the other."""

    def _order(self, epoch: int) -> np.ndarray:
        """Return the parts of all files in the order of an epoch."""
        if self.seed is None:
            return np.arange(len(self._parts))
        sequence = np.random.SeedSequence(self.seed, spawn_key=(epoch,))
        return np.random.default_rng(sequence).permutation(len(self._parts))

    def _starts(self, order: np.ndarray) -> np.ndarray:
        """Return the first row of each part that is read in *order*, and the number of all rows."""
        return np.cumsum(np.append(0, self._part_rows[order]))

    def read_starts(self, rows: np.ndarray) -> np.ndarray:
        starts = self._starts(self._order(0))
        return starts[np.searchsorted(starts[1:], rows, side="right")]

    def blocks(
        self, epoch: int = 0, start: int = 0, *, block_rows: int | None = None
    ) -> Generator[np.ndarray]:
        order = self._order(epoch)
        starts = self._starts(order)
        first = int(np.searchsorted(starts[1:], start, side="right"))
        places = (self._parts[part] for part in order[first:])
        blocks = (self._read(file, parts, block_rows) for file, parts in by_file(places))
        return skip_rows(chain.from_iterable(blocks), start - int(starts[first]))


def by_file(places: Iterable[tuple[Any, int]]) -> Iterator[tuple[Any, tuple[int, ...]]]:
    """Join parts that follow each other in one file, which are read in one go."""
    for _, some in groupby(places, key=lambda place: place[0].path):
        files, parts = zip(*some)
        yield files[0], parts


def skip_rows(blocks: Iterator[np.ndarray], n: int) -> Generator[np.ndarray]:
    """Yield what follows the first *n* rows, without empty blocks."""
    for block in blocks:
        size = len(block)
        if size > n:
            yield block[n:] if n else block
        del block  # while the next one is read
        n = max(0, n - size)


def choose_columns(
    schema: "pa.Schema", columns: Sequence[str] | None, where: str
) -> tuple[str, ...]:
    """Return *columns*, by default all, each of which must be there once."""
    names = tuple(schema.names if columns is None else map(str, columns))  # pandas has numbers
    if not names:
        raise ValueError(f"{where}: no columns to stream; columns={columns!r}")
    for name in names:
        if len(schema.get_all_field_indices(name)) != 1:
            if f"/{name}=" in where:
                raise ValueError(f"{where}: the values of {name!r} are {IN_FOLDERS}")
            problem = "more than one column" if name in schema.names else "no column"
            raise ValueError(f"{where}: has {problem} {name!r}; its columns are {schema.names}")
    if len(set(names)) < len(names):
        raise ValueError(f"{where}: columns={list(names)} names a column twice")
    return names


def _types(
    schema: "pa.Schema", names: Sequence[str], where: str, levels: Mapping[str, Any]
) -> tuple[_Type, ...]:
    """Return the types of these columns, or name all that cannot be used."""
    kinds = {name: value_type(schema.field(name).type) for name in names}
    types = {name: _number_type(kind) for name, kind in kinds.items() if name not in levels}
    unusable = [name for name, kind in types.items() if kind is None]
    unusable += [name for name in levels if pa.types.is_nested(kinds[name])]
    if unusable:
        found = ", ".join(f"{name!r} ({kinds[name]})" for name in unusable)
        usable = [name for name in names if name not in unusable]
        text = [name for name in unusable if is_text(kinds[name])]
        remedies = [f"leave them out with columns={usable}"] if usable else []
        remedies += [f"stream levels with categories={text}"] if text else []
        remedy = f"{' or '.join(remedies)}, which arrow_source and parquet_source take"
        raise ValueError(
            f"{where}: not numbers: {found}; {remedy if remedies else 'write them as numbers'}"
        )
    return tuple(types.get(name) or _level_type(levels[name]) for name in names)


def _level_type(levels: Any) -> _Type:
    return _Type(np.min_scalar_type(0 if levels is None else len(levels) - 1), True)


def _number_type(kind: "pa.DataType") -> _Type | None:
    """Return what the values of an Arrow type become, None if they are no numbers."""
    is_ = pa.types
    if is_.is_null(kind):
        return _Type(np.dtype(bool), True, None)
    if is_.is_timestamp(kind) or is_.is_date(kind):
        return _Type(np.dtype(float), True, "UTC" if getattr(kind, "tz", None) else True)
    if is_.is_decimal(kind):
        return _Type(np.dtype(float), kind.scale <= 0)
    if is_.is_integer(kind) or is_.is_boolean(kind) or is_.is_floating(kind):
        return _Type(np.dtype(kind.to_pandas_dtype()), not is_.is_floating(kind))
    return None


def _seconds(array: "pa.Array") -> "pa.Array":
    """Return times as seconds since 1970, and null for those that cannot be got back exactly."""
    if pa.types.is_date(array.type):
        array = array.cast(pa.timestamp("ms"))
    unit = PER_SECOND[array.type.unit]
    is_null = array.is_null().to_numpy(zero_copy_only=False)
    ticks = array.cast(pa.int64()).fill_null(0).to_numpy()
    lost = np.zeros(len(ticks), bool)
    if unit == 10**9:  # a float64 holds microseconds of this time, but not nanoseconds
        lost, ticks, unit = ticks % 1000 != 0, ticks // 1000, 10**6
    seconds = ticks / unit
    lost |= np.rint(seconds * unit).astype(np.int64) != ticks
    return pa.array(seconds, mask=lost | is_null)


def _interleave(values: Sequence[np.ndarray], dtype: np.dtype) -> np.ndarray:
    """Return the rows of some columns."""
    if len(values) <= _FEW_COLUMNS:
        return np.stack(values, axis=1, dtype=dtype, casting="unsafe")
    columns = np.concatenate(values, dtype=dtype, casting="unsafe").reshape(len(values), -1)
    return np.ascontiguousarray(columns.T)
