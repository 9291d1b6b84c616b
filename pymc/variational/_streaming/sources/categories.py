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
"""Category columns, whose values stream as positions among the levels of the column."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pymc.variational._streaming.errors import StreamError
from pymc.variational._streaming.sources.base import shorten
from pymc.variational._streaming.sources.parquet.files import import_pyarrow
from pymc.variational._streaming.sources.summary import Summary
from pymc.variational._streaming.utils import progress_bar

if TYPE_CHECKING:
    import pyarrow

__all__ = [
    "Categories",
    "describe_levels",
    "encode",
    "find_levels",
    "given_levels",
    "levels_of",
]

Categories = Sequence[str] | Mapping[str, Sequence[Any]]


def given_levels(categories: Categories | None) -> dict[str, Any]:
    """Return the levels of each category column as an Arrow array, None where none are given."""
    if isinstance(categories, str):
        raise TypeError(f"categories={categories!r} is a string; pass a list of names")
    if not isinstance(categories, Mapping):
        return dict.fromkeys(categories or ())
    for name, levels in categories.items():
        if isinstance(levels, str):
            raise TypeError(f"categories[{name!r}]={levels!r} is a string; pass a list of levels")
    return {name: _as_levels(name, list(levels)) for name, levels in categories.items()}


class LevelFinder:
    """Collects the levels of columns: sorted values, or those of a dictionary in its order.

    An order that was declared, as in a pandas Categorical or a Polars Enum, is kept, with the
    levels that no row has.
    """

    def __init__(self, names: Sequence[str]):
        self._levels: dict[str, Any] = dict.fromkeys(names)
        self._ordered: set[str] = set()

    def add(self, batch: "pyarrow.RecordBatch") -> None:
        """Add the levels of the rows of a batch, or of its dictionaries."""
        pa = import_pyarrow()
        for name, known in self._levels.items():
            array = batch.column(name)
            is_dictionary = pa.types.is_dictionary(array.type)
            values = _plain(array.dictionary if is_dictionary else array.unique()).drop_null()
            if pa.types.is_floating(values.type):
                values = values.filter(pa.compute.is_finite(values))
            if is_dictionary:
                self._ordered.add(name)
            if known is not None:
                values = _cast(name, values, known.type)
                new = values.filter(pa.compute.invert(pa.compute.is_in(values, value_set=known)))
                values = pa.concat_arrays([known, new])
            if len(values) or known is not None:
                self._levels[name] = values

    def finish(self) -> dict[str, Any]:
        """Return the levels of each column."""
        for name, values in self._levels.items():
            if values is None:
                raise ValueError(f"column {name!r} holds nulls only, so it has no levels")
            if name not in self._ordered:
                self._levels[name] = values.take(import_pyarrow().compute.sort_indices(values))
        return self._levels


def find_levels(
    levels: Mapping[str, Any],
    read: Callable[[list[str]], Iterable["pyarrow.RecordBatch"]],
    n_rows: int | None,
) -> dict[str, Any]:
    """Return the levels that are known, and those of other columns from one pass over *n_rows*."""
    missing = [name for name, known in levels.items() if known is None]
    if not missing:
        return dict(levels)
    finder = LevelFinder(missing)
    with progress_bar(f"Finding levels of {', '.join(missing)}", n_rows) as add:
        for batch in read(missing):
            finder.add(batch)
            add(batch.num_rows)
    return {**levels, **finder.finish()}


def levels_of(summary: Summary) -> dict[str, Any]:
    """Return the levels of the columns that :func:`preshuffle` kept in the summary of a table."""
    kept = {name: column.levels for name, column in summary.items()}
    return {name: _as_levels(name, list(levels)) for name, levels in kept.items() if levels}


def encode(name: str, array: "pyarrow.Array", levels: "pyarrow.Array") -> "pyarrow.Array":
    """Return the positions of values among *levels*, and null for values that are none of them.

    Null is a value like any other.
    """
    pa: Any = import_pyarrow()
    if not pa.types.is_dictionary(array.type):
        return pa.compute.index_in(_cast(name, _plain(array), levels.type), value_set=levels)
    codes = encode(name, array.dictionary, levels).take(array.indices)
    of_null = pa.compute.index_in(pa.nulls(1, levels.type), value_set=levels)[0]
    return pa.compute.if_else(array.indices.is_null(), of_null, codes)


def describe_levels(levels: "pyarrow.Array") -> str:
    """Show some levels."""
    return ", ".join(shorten([repr(level) for level in levels.to_pylist()], 4))


def _as_levels(name: str, levels: list[Any]) -> "pyarrow.Array":
    pa = import_pyarrow()
    try:
        array = _plain(pa.array(levels))
    except (pa.ArrowInvalid, pa.ArrowTypeError) as err:
        raise ValueError(f"categories[{name!r}] mixes levels of several types ({err})") from None
    if not levels or len(array.unique()) < len(levels):
        problem = "holds a level twice" if levels else "has no levels"
        raise ValueError(f"categories[{name!r}] {problem}; pass each level once")
    return array


def _plain(array: "pyarrow.Array") -> "pyarrow.Array":
    """Return values with one type for all strings, and one for all integers but the largest."""
    pa: Any = import_pyarrow()
    is_, kind = pa.types, array.type
    if is_.is_string(kind) or is_.is_string_view(kind):
        return array.cast(pa.large_string())
    return array.cast(pa.int64()) if is_.is_integer(kind) and not is_.is_uint64(kind) else array


def _cast(name: str, values: "pyarrow.Array", kind: "pyarrow.DataType") -> "pyarrow.Array":
    pa = import_pyarrow()
    try:
        return values if values.type == kind else values.cast(kind)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as err:
        raise StreamError(
            f"column {name!r} holds {values.type} where its levels are {kind} ({err}); "
            "write it with one type"
        ) from None
