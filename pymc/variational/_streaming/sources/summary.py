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
"""What the columns of a table hold: levels, and summaries that the metadata of its files keep."""

import dataclasses
import json
import math

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from pymc.variational._streaming.errors import StreamError
from pymc.variational._streaming.sources.base import shorten
from pymc.variational._streaming.sources.parquet.files import pa
from pymc.variational._streaming.utils import progress_bar

__all__ = [
    "PER_SECOND",
    "SUMMARY_KEY",
    "Categories",
    "ColumnSummary",
    "Located",
    "Summarizer",
    "Summary",
    "cast_exactly",
    "describe_levels",
    "dictionary_of",
    "encode",
    "find_levels",
    "given_columns",
    "given_levels",
    "is_text",
]

Categories = Sequence[str] | Mapping[str, Sequence[Any] | None]
Located = tuple[str, "pa.RecordBatch"]
"""A record batch, after the name of its file or its place in the source."""

SUMMARY_KEY = b"pymc.summary"
MAX_LEVELS = 4096
"""Largest number of levels that metadata hold; a column of strings with more counts as text."""
_FIGURES = ("rows", "nulls", "min", "max", "mean", "sd")
_SHOWN_LEVELS = 4
PER_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}


@dataclass(frozen=True, slots=True)
class ColumnSummary:
    """What one column of a table holds."""

    type: str
    """Arrow type of the column."""
    rows: int
    """Number of values that are neither null nor NaN."""
    nulls: int
    """Number of values that are null or NaN."""
    min: float | None = None
    """Least value; None for a column that holds no numbers. Times are seconds since 1970."""
    max: float | None = None
    """Greatest value."""
    mean: float | None = None
    """Arithmetic mean."""
    sd: float | None = None
    """Sample standard deviation, with divisor *rows* - 1."""
    levels: tuple[Any, ...] | None = None
    """Distinct values of a column of strings or booleans, sorted, or of a dictionary, in its order.
    None for other columns, and where there are more than 4,096."""


@dataclass(frozen=True, slots=True, repr=False)
class Summary(Mapping[str, ColumnSummary]):
    """Summary of a table by column, such as ``summary["distance"].mean``."""

    rows: int
    """Number of rows of the table."""
    columns: dict[str, ColumnSummary]

    def __getitem__(self, name: str) -> ColumnSummary:
        if name not in self.columns:
            raise KeyError(f"no column {name!r}; the columns are {list(self.columns)}")
        return self.columns[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.columns)

    def __len__(self) -> int:
        return len(self.columns)

    def select(self, columns: Iterable[str]) -> "Summary":
        """Return the summary of some columns."""
        return Summary(self.rows, {name: self.columns[name] for name in columns})

    def to_metadata(self) -> dict[bytes, bytes]:
        """Return the key and the value for the metadata of a file."""
        return {SUMMARY_KEY: json.dumps(dataclasses.asdict(self)).encode()}

    @classmethod
    def from_metadata(cls, metadata: Mapping[bytes, bytes] | None, path: str) -> "Summary | None":
        """Read what :meth:`to_metadata` wrote to the file at *path*; None if it did not."""
        entry = (metadata or {}).get(SUMMARY_KEY)
        if entry is None:
            return None
        try:
            values = json.loads(entry)
            for kept in values["columns"].values():
                kept["levels"] = None if kept["levels"] is None else tuple(kept["levels"])
            columns = {name: ColumnSummary(**kept) for name, kept in values["columns"].items()}
            return cls(values["rows"], columns)
        except (KeyError, TypeError, ValueError) as err:
            raise StreamError(f"{path}: its summary cannot be read ({err})") from err

    def __repr__(self) -> str:
        return self._as_text().to_string()

    def _repr_html_(self) -> str:
        return self._as_text().to_html()

    def _as_text(self) -> pd.DataFrame:
        """Return what is shown of each column."""
        return pd.DataFrame.from_dict(
            {name: _describe(column) for name, column in self.columns.items()},
            orient="index",
            columns=[*_FIGURES, "levels"],
        )


class Summarizer:
    """A summary in the making; those of the parts of a table can be merged in their order."""

    def __init__(self, schema: "pa.Schema"):
        self.rows = 0
        self._columns = [_Column(field.name, field.type) for field in schema]
        self._encoded = [column for column in self._columns if pa.types.is_dictionary(column.kind)]

    def add(self, batch: "pa.RecordBatch") -> "pa.RecordBatch":
        """Add and return rows, whose dictionaries were decoded after :meth:`add_dictionaries`."""
        self.rows += batch.num_rows
        for column, values in zip(self._columns, batch.columns):
            column.add(values)
        return batch

    def add_dictionaries(self, batch: "pa.RecordBatch", where: str) -> "pa.RecordBatch":
        """Add the dictionaries of a batch, which is returned, without its rows."""
        for column in self._encoded:
            array = batch.column(column.name)
            # A column that is a dictionary in the first batch can be plain in others.
            is_plain = not pa.types.is_dictionary(array.type)
            values = (array.unique() if is_plain else dictionary_of(array)).drop_null()
            column.add_levels(cast_exactly(column.name, values, column.kind.value_type, where))
        return batch

    def merge(self, later: "Summarizer") -> None:
        """Add the rows that follow."""
        self.rows += later.rows
        for column, other in zip(self._columns, later._columns):
            column.merge(other)

    def dictionaries(self) -> dict[str, "pa.Array"]:
        """Return the values of each dictionary column, in the order of their first appearance."""
        return {column.name: column.levels for column in self._encoded}

    def finish(self) -> Summary:
        return Summary(self.rows, {column.name: column.finish() for column in self._columns})


@dataclass(slots=True)
class _Column:
    """Moments and levels of a part of a column (Chan, Golub and LeVeque 1983)."""

    name: str
    kind: "pa.DataType"
    n: int = 0
    nulls: int = 0
    low: Any = math.inf
    high: Any = -math.inf
    mean: float = 0.0
    m2: float = 0.0
    """Sum of the squared differences from the mean."""
    levels: Any = None
    """Distinct values as an Arrow array."""
    is_text: bool = False
    """Whether a column of strings has too many distinct values to be kept."""

    def add(self, array: "pa.Array") -> None:
        """Add the values of a batch."""
        pc = pa.compute
        n_rows = len(array)
        array = array.drop_null() if array.null_count else array
        numbers = _as_numbers(array)
        if numbers is None:
            if is_text(self.kind) and not self.is_text:
                self.add_levels(array.unique())
            self.merge(_Column(self.name, self.kind, len(array), n_rows - len(array)))
            return
        values = numbers.to_numpy()
        if len(values) and np.isnan(values.max()):
            numbers = numbers.filter(pc.invert(pc.is_nan(numbers)))
            values = numbers.to_numpy()
        part = _Column(self.name, self.kind, len(values), n_rows - len(values))
        if len(values):
            part.low, part.high = values.min().item(), values.max().item()
            with np.errstate(all="ignore"):  # infinities, and sums that are beyond float64
                part.mean = float(values.mean(dtype=np.float64))
            part.m2 = pc.variance(numbers).as_py() * len(values)
        self.merge(part)

    def merge(self, other: "_Column") -> None:
        """Add what a later part of the column holds."""
        self.nulls += other.nulls
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)
        if other.n:
            n, step = self.n + other.n, other.mean - self.mean
            self.m2 += other.m2 + step * (step * self.n * other.n / n)
            self.mean, self.n = self.mean + step * other.n / n, n
        self.is_text |= other.is_text
        if other.levels is not None:
            self.add_levels(other.levels)

    def add_levels(self, values: "pa.Array") -> None:
        """Append the values that are new; strings are forgotten when they are too many."""
        self.levels = _append_new(self.levels, values)
        if is_text(self.kind) and (self.is_text or len(self.levels) > MAX_LEVELS):
            self.levels, self.is_text = None, True

    def finish(self) -> ColumnSummary:
        summary = ColumnSummary(str(self.kind), self.n, self.nulls, levels=self._kept_levels())
        if not self.n or self.low == math.inf == -self.high:
            return summary
        sd = math.sqrt(self.m2 / (self.n - 1)) if self.n > 1 else math.nan
        return dataclasses.replace(summary, min=self.low, max=self.high, mean=self.mean, sd=sd)

    def _kept_levels(self) -> tuple[Any, ...] | None:
        if pa.types.is_boolean(self.kind):
            return False, True
        if self.levels is None or len(self.levels) > MAX_LEVELS:
            return None
        levels = self.levels.drop_null().to_pylist()
        if not all(isinstance(level, str | int | float) for level in levels):
            return None
        return tuple(levels if pa.types.is_dictionary(self.kind) else sorted(levels))


def _describe(column: ColumnSummary) -> list[str]:
    """Return the figures and the first levels of a column as text."""
    unit = {"date": "D", "timestamp": "m"}.get(column.type.partition("[")[0].strip("3264"))
    levels = column.levels or ()
    shown = ", ".join(str(level) or "''" for level in levels[:_SHOWN_LEVELS])
    if len(levels) > _SHOWN_LEVELS:
        shown += f", ... ({len(levels)})"
    places = (_format(value, unit) for value in (column.min, column.max, column.mean))
    return [_format(column.rows), _format(column.nulls), *places, _format(column.sd), shown]


def _format(value: float | None, unit: str | None = None) -> str:
    if value is None:
        return ""
    if unit and math.isfinite(value):
        return str(np.datetime64(math.floor(value), "s").astype(f"datetime64[{unit}]"))
    return f"{value:,}" if isinstance(value, int) else f"{value:,.6g}"


def _as_numbers(array: "pa.Array") -> Any:
    """Return values without nulls as numbers, times in seconds; None for values of other kinds."""
    is_, kind = pa.types, array.type
    if is_.is_date(kind):
        array = array.cast(pa.timestamp("ms"))
    if unit := getattr(array.type, "unit", None):
        ticks = array.view(f"int{array.type.bit_width}").to_numpy()
        return pa.array(ticks / PER_SECOND[unit])
    if is_.is_boolean(kind):
        return array.cast(pa.uint8())
    if is_.is_decimal(kind) or is_.is_float16(kind):
        return array.cast(pa.float64())
    return array if is_.is_integer(kind) or is_.is_floating(kind) else None


def given_columns(columns: Sequence[str] | None) -> list[str] | None:
    """Return the names that are asked for, None for all."""
    if isinstance(columns, str):
        raise TypeError(f"columns={columns!r} is a string; pass a list of names")
    return None if columns is None else list(columns)


def given_levels(categories: Categories | None) -> dict[str, Any]:
    """Return the levels of each category column as an Arrow array, None where none are given."""
    if isinstance(categories, str):
        raise TypeError(f"categories={categories!r} is a string; pass a list of names")
    if not isinstance(categories, Mapping):
        return dict.fromkeys(() if categories is None else categories)
    for name, levels in categories.items():
        if isinstance(levels, str):
            raise TypeError(f"categories[{name!r}]={levels!r} is a string; pass a list of levels")
    return {
        name: None if levels is None else _as_levels(name, list(levels))
        for name, levels in categories.items()
    }


def find_levels(
    levels: Mapping[str, Any],
    read: Callable[[list[str]], Iterable[Located]],
    n_rows: int | None,
) -> dict[str, Any]:
    """Return the levels that are known, and those of other columns from one pass over *n_rows*.

    They are sorted, or in the order that a dictionary declares, as of a pandas Categorical or a
    Polars Enum, with the levels that no row has.
    """
    missing = [name for name, known in levels.items() if known is None]
    if not missing:
        return dict(levels)
    found: dict[str, Any] = dict.fromkeys(missing)
    ordered = set()
    with progress_bar(f"Finding levels of {', '.join(missing)}", n_rows) as add:
        for where, batch in read(missing):
            for name in missing:
                array = batch.column(name)
                found[name] = _add_levels(name, found[name], array, where)
                if pa.types.is_dictionary(array.type):
                    ordered.add(name)
            add(batch.num_rows)
    for name, values in found.items():
        if values is None:
            raise ValueError(f"column {name!r} holds nulls only, so it has no levels")
        if name not in ordered:
            found[name] = values.take(pa.compute.sort_indices(values))
    return {**levels, **found}


def _add_levels(name: str, known: Any, array: "pa.Array", where: str) -> Any:
    """Return the levels that are known, if any, and those that *array* or its dictionary adds."""
    values = array.dictionary if pa.types.is_dictionary(array.type) else array.unique()
    values = _unify(values).drop_null()
    if pa.types.is_floating(values.type):
        values = values.filter(pa.compute.is_finite(values))
    if known is not None:
        values = cast_exactly(name, values, known.type, where)
    return _append_new(known, values) if len(values) else known


def encode(name: str, array: "pa.Array", levels: "pa.Array", where: str) -> "pa.Array":
    """Return the positions of values among *levels*, and null for values that are none of them.

    Null is a value like any other.
    """
    if not pa.types.is_dictionary(array.type):
        values = cast_exactly(name, _unify(array), levels.type, where)
        return pa.compute.index_in(values, value_set=levels)
    codes = encode(name, array.dictionary, levels, where).take(array.indices)
    of_null = pa.compute.index_in(pa.nulls(1, levels.type), value_set=levels)[0]
    return pa.compute.if_else(array.indices.is_null(), of_null, codes)


def describe_levels(levels: Sequence[Any] | None) -> str:
    """Say which levels there are."""
    shown = ", ".join(shorten([repr(level) for level in levels or ()], 4))
    return f"levels {shown}" if levels else "no levels"


def _as_levels(name: str, levels: list[Any]) -> "pa.Array":
    is_large = any(isinstance(level, int | np.integer) and level >= 2**63 for level in levels)
    try:
        array = _unify(pa.array(levels, pa.uint64() if is_large else None))
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError) as err:
        raise ValueError(f"categories[{name!r}] mixes levels of several types ({err})") from None
    if not levels or len(array.unique()) < len(levels):
        problem = "holds a level twice" if levels else "has no levels"
        raise ValueError(f"categories[{name!r}] {problem}; pass each level once")
    return array


def _unify(array: "pa.Array") -> "pa.Array":
    """Return values with one type for all strings, and one for all integers but the largest."""
    is_, kind = pa.types, array.type
    if is_text(kind):
        return array.cast(pa.large_string())
    return array.cast(pa.int64()) if is_.is_integer(kind) and not is_.is_uint64(kind) else array


def cast_exactly(name: str, values: "pa.Array", kind: "pa.DataType", where: str) -> "pa.Array":
    """Return the values of a column in another type, from which all of them can be got back.

    Arrow casts 2 to True, "01" to 1, times to dates, and float64 to float32 without a word, and
    takes times without a zone for those of UTC.
    """
    if values.type.equals(kind):
        return values
    is_primitive, is_temporal = pa.types.is_primitive, pa.types.is_temporal
    has_zone = [getattr(one, "tz", None) is not None for one in (values.type, kind)]
    try:
        if is_temporal(kind) and is_temporal(values.type) and has_zone[0] != has_zone[1]:
            raise pa.ArrowInvalid("times without a zone beside some with one")
        found = values.cast(kind)
        if (is_primitive(kind) or is_primitive(values.type)) and values.null_count < len(values):
            changed = np.flatnonzero(~_equal(found.cast(values.type), values))
            if len(changed):
                raise pa.ArrowInvalid(f"{values[changed[0]]} would become {found[changed[0]]}")
        return found
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as err:
        raise StreamError(
            f"{where}: column {name!r} is {kind} and {values.type} ({err}); "
            "write it with one type that holds all values"
        ) from None


def _equal(one: "pa.Array", other: "pa.Array") -> np.ndarray:
    """Tell where two arrays of one type hold the same, be it NaN or null."""
    if not pa.types.is_floating(one.type):
        return pa.compute.equal(one, other).fill_null(True).to_numpy(zero_copy_only=False)
    one, other = (a.cast(pa.float64()).to_numpy(zero_copy_only=False) for a in (one, other))
    return (one == other) | np.isnan(other)


def _append_new(known: Any, values: "pa.Array") -> "pa.Array":
    """Return the values that are known, if any, and after them the others, each once."""
    if known is None:
        return values.unique()
    if values.equals(known):
        return known
    new = values.filter(pa.compute.invert(pa.compute.is_in(values, value_set=known)))
    return pa.concat_arrays([known, new.unique()])


def dictionary_of(array: "pa.DictionaryArray") -> "pa.Array":
    """Return the values of a dictionary, which Arrow could not take if they were views."""
    values = array.dictionary
    return values.cast(pa.large_string()) if pa.types.is_string_view(values.type) else values


def is_text(kind: "pa.DataType") -> bool:
    is_ = pa.types
    return is_.is_string(kind) or is_.is_large_string(kind) or is_.is_string_view(kind)
