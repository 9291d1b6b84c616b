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
from pymc.variational._streaming.sources.summary import (
    Summary,
    append_new,
    is_dictionary,
    is_text,
)
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


def find_levels(
    levels: Mapping[str, Any],
    read: Callable[[list[str]], Iterable["pyarrow.RecordBatch"]],
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
        for batch in read(missing):
            for name in missing:
                array = batch.column(name)
                found[name] = _add_levels(name, found[name], array)
                if is_dictionary(array.type):
                    ordered.add(name)
            add(batch.num_rows)
    for name, values in found.items():
        if values is None:
            raise ValueError(f"column {name!r} holds nulls only, so it has no levels")
        if name not in ordered:
            found[name] = values.take(import_pyarrow().compute.sort_indices(values))
    return {**levels, **found}


def _add_levels(name: str, known: Any, array: "pyarrow.Array") -> Any:
    """Return the levels that are known, if any, and those that *array* or its dictionary adds."""
    pa = import_pyarrow()
    values = array.dictionary if is_dictionary(array.type) else array.unique()
    values = _plain(values).drop_null()
    if pa.types.is_floating(values.type):
        values = values.filter(pa.compute.is_finite(values))
    if known is None:
        return values if len(values) else None
    return append_new(known, _cast(name, values, known.type))


def levels_of(summary: Summary) -> dict[str, Any]:
    """Return the levels of the columns that :func:`preshuffle` kept in the summary of a table."""
    kept = {name: column.levels for name, column in summary.items()}
    return {name: _as_levels(name, list(levels)) for name, levels in kept.items() if levels}


def encode(name: str, array: "pyarrow.Array", levels: "pyarrow.Array") -> "pyarrow.Array":
    """Return the positions of values among *levels*, and null for values that are none of them.

    Null is a value like any other.
    """
    pa: Any = import_pyarrow()
    if not is_dictionary(array.type):
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
    if is_text(kind):
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
