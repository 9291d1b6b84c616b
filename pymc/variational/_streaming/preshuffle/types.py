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
"""Arrow types that can be taken apart and put together again by rows.

Dictionaries differ from batch to batch, and Arrow cannot take rows of views.  So columns of both
are shuffled as plain values, and become what they were when the result is written.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from pymc.variational._streaming.sources.parquet.files import import_pyarrow

if TYPE_CHECKING:
    import pyarrow

__all__ = [
    "add_dictionaries",
    "dictionaries_of",
    "dictionary_columns",
    "plain_schema",
    "restore",
    "to_plain",
]


def plain_schema(schema: "pyarrow.Schema") -> "pyarrow.Schema":
    """Return *schema* with plain types, and without metadata."""
    is_dictionary = import_pyarrow().types.is_dictionary
    fields = []
    for field in schema:
        kind = field.type.value_type if is_dictionary(field.type) else field.type
        fields.append(field.with_type(_plain(kind)).remove_metadata())
    return import_pyarrow().schema(fields)


def to_plain(batch: "pyarrow.RecordBatch", plain: "pyarrow.Schema") -> "pyarrow.RecordBatch":
    """Convert a batch to the types of *plain*."""
    columns = [_cast(column, field.type) for column, field in zip(batch.columns, plain)]
    return import_pyarrow().RecordBatch.from_arrays(columns, schema=plain)


def restore(
    batch: "pyarrow.RecordBatch",
    schema: "pyarrow.Schema",
    dictionaries: Mapping[str, "pyarrow.Array"],
) -> "pyarrow.RecordBatch":
    """Convert a batch of plain types to *schema*, with these dictionaries."""
    pa = import_pyarrow()
    columns = []
    for column, field in zip(batch.columns, schema):
        if field.name in dictionaries:
            values = dictionaries[field.name]
            indices = pa.compute.index_in(column, value_set=values).cast(field.type.index_type)
            column = pa.DictionaryArray.from_arrays(
                indices, values.cast(field.type.value_type), ordered=field.type.ordered
            )
        columns.append(_cast(column, field.type))
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def dictionary_columns(schema: "pyarrow.Schema") -> list[str]:
    """Return the names of the columns that are dictionaries themselves."""
    is_dictionary = import_pyarrow().types.is_dictionary
    return [field.name for field in schema if is_dictionary(field.type)]


def dictionaries_of(batch: "pyarrow.RecordBatch") -> dict[str, "pyarrow.Array"]:
    """Return the values of each dictionary column."""
    return {name: batch[name].dictionary for name in dictionary_columns(batch.schema)}


def add_dictionaries(
    known: dict[str, "pyarrow.Array"], found: Mapping[str, "pyarrow.Array"]
) -> None:
    """Append to each dictionary of *known* the values that only *found* has.

    A partition meets values in random order, but the order of categories has a meaning: it is
    that of their first appearance in the source.
    """
    pa = import_pyarrow()
    for name, values in found.items():
        before = known.setdefault(name, values)
        if not values.equals(before):
            new = values.filter(pa.compute.invert(pa.compute.is_in(values, value_set=before)))
            known[name] = pa.concat_arrays([before, new]) if len(new) else before


def _cast(array: "pyarrow.Array", target: "pyarrow.DataType") -> "pyarrow.Array":
    return array if array.type.equals(target) else array.cast(target)


def _plain(kind: "pyarrow.DataType") -> "pyarrow.DataType":
    pa = import_pyarrow()
    is_ = pa.types
    if is_.is_dictionary(kind):
        if kind.ordered:  # by values that a partition meets in another order
            raise ValueError(f"columns must not hold nested {kind}; decode it first")
        return _plain(kind.value_type)
    if is_.is_string_view(kind):
        return pa.large_string()
    if is_.is_binary_view(kind):
        return pa.large_binary()
    if is_.is_map(kind):
        return pa.map_(_plain_field(kind.key_field), _plain_field(kind.item_field))
    if is_.is_struct(kind):
        return pa.struct([_plain_field(field) for field in kind])
    if is_.is_list(kind):
        return pa.list_(_plain_field(kind.value_field))
    if is_.is_large_list(kind):
        return pa.large_list(_plain_field(kind.value_field))
    if is_.is_fixed_size_list(kind):
        return pa.list_(_plain_field(kind.value_field), kind.list_size)
    return kind


def _plain_field(field: "pyarrow.Field") -> "pyarrow.Field":
    return field.with_type(_plain(field.type))
