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
are shuffled as plain values; dictionary columns are encoded again when the result is written.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pymc.variational._streaming.errors import StreamError
from pymc.variational._streaming.sources.parquet.files import import_pyarrow
from pymc.variational._streaming.sources.summary import dictionary_of

if TYPE_CHECKING:
    import pyarrow

__all__ = ["conform", "encode", "plain_schema", "result_schema"]


def result_schema(schemas: Sequence["pyarrow.Schema"]) -> "pyarrow.Schema":
    """Return types that hold the values of all *schemas*, in the order of the first.

    Views become plain types, and dictionaries have int32 indices, to count the values of all.
    """
    pa = import_pyarrow()
    merged = pa.unify_schemas([plain_schema(s) for s in schemas], promote_options="permissive")
    fields = []
    for field in schemas[0]:
        plain, kinds = merged.field(field.name), [s.field(field.name).type for s in schemas]
        if all(map(pa.types.is_dictionary, kinds)):
            ordered = all(kind.ordered for kind in kinds)
            plain = plain.with_type(pa.dictionary(pa.int32(), plain.type, ordered))
        fields.append(plain.with_metadata(field.metadata))
    return pa.schema(fields, schemas[0].metadata)


def plain_schema(schema: "pyarrow.Schema") -> "pyarrow.Schema":
    """Return the plain types of all columns, without metadata."""
    fields = [_plain_field(field).remove_metadata() for field in schema]
    return import_pyarrow().schema(fields)


def conform(batch: "pyarrow.RecordBatch", plain: "pyarrow.Schema") -> "pyarrow.RecordBatch":
    """Return the columns of *plain*, found by name and converted to its types without loss."""
    pa, columns = import_pyarrow(), []
    for field in plain:
        column = batch.column(field.name)
        if pa.types.is_dictionary(column.type):
            column = dictionary_of(column).take(column.indices)
        try:
            columns.append(column if column.type.equals(field.type) else column.cast(field.type))
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as err:
            raise StreamError(
                f"column {field.name!r} is {field.type} and {column.type} ({err}); "
                "write it with one type that holds all values"
            ) from None
    return pa.RecordBatch.from_arrays(columns, schema=plain)


def encode(
    batch: "pyarrow.RecordBatch",
    schema: "pyarrow.Schema",
    dictionaries: Mapping[str, "pyarrow.Array"],
) -> "pyarrow.RecordBatch":
    """Encode the dictionary columns of *schema* with these dictionaries."""
    pa = import_pyarrow()
    columns = []
    for column, field in zip(batch.columns, schema):
        if field.name in dictionaries:
            values = dictionaries[field.name]
            indices = pa.compute.index_in(column, value_set=values)
            column = pa.DictionaryArray.from_arrays(indices, values, ordered=field.type.ordered)
        columns.append(column)
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def _plain(kind: "pyarrow.DataType") -> "pyarrow.DataType":
    pa = import_pyarrow()
    is_: Any = pa.types
    if is_.is_dictionary(kind):
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
