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
"""Tables as they come: Parquet files, or the record batches of any other source.

Dictionaries differ from batch to batch, and Arrow cannot take rows of views.  So columns of both
are read as plain values, of which a writer makes dictionaries again.
"""

import math
import os

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, groupby
from typing import Any

import numpy as np

from pymc.variational._streaming.errors import StreamError
from pymc.variational._streaming.sources.arrays import as_source
from pymc.variational._streaming.sources.base import Source
from pymc.variational._streaming.sources.parquet.files import (
    ParquetInput,
    inspect_all,
    is_local,
    is_unchanged,
    pa,
)
from pymc.variational._streaming.sources.parquet.mark import MARK_KEY
from pymc.variational._streaming.sources.parquet.parquet import read_batches
from pymc.variational._streaming.sources.parquet.paths import (
    is_path,
    list_parquet,
    resolve,
    stands_for,
)
from pymc.variational._streaming.sources.rows import (
    IN_FOLDERS,
    by_file,
    choose_columns,
    is_pandas_index,
)
from pymc.variational._streaming.sources.summary import (
    SUMMARY_KEY,
    Located,
    Summarizer,
    Summary,
    cast_exactly,
    dictionary_of,
    given_columns,
)
from pymc.variational._streaming.utils import progress_bar

__all__ = ["Batches", "Files", "Piece", "conform", "open_table", "plain_schema", "summarize"]

_PAGE_BYTES = 1 << 20
_PAGE_ROWS = 1 << 10
"""Writers end a page when it has so many bytes, but count them only every so many rows."""
_SAMPLED_GROUPS = 16
_SAMPLED_ROWS = 256
_SUMMARIZED_ROWS = 1 << 16
_PANDAS_KEY = b"pandas"

Piece = tuple[ParquetInput, tuple[int, ...]]
"""A file, and some of its row groups."""


def summarize(source: Any, *, progressbar: bool = True) -> Summary:
    """Summarize the columns of a table in one pass, or in none where its files hold the summary.

    Parameters
    ----------
    source : path_like, sequence of path_like, Source, data frame, Arrow table or reader, array
        Parquet files, as in :func:`parquet_source`, or anything else that can be streamed. What
        can be read only once is used up.
    progressbar : bool, default True
        Show the rows that are done, and how many are done per second.

    Returns
    -------
    Summary
        By column ``.rows`` and ``.nulls``, their numbers of values and of nulls or NaN; ``.min``,
        ``.max``, ``.mean`` and ``.sd`` (with divisor n - 1) of numbers, booleans and times (in
        seconds since 1970); and ``.levels``, up to 4,096 distinct strings or the values of a
        dictionary. It is shown as a table.

    Notes
    -----
    The summary of a table that :func:`preshuffle` wrote lies in its files, and only their footers
    are read. Some files of a table, or parts of a split, are read for numbers of their own.

    Memory is bounded by one batch of 65,536 rows, or those that the source gives.

    Examples
    --------
    >>> import pandas as pd
    >>> flights = pd.DataFrame({"distance": [100.0, 300.0, 200.0], "carrier": ["UA", "AA", "UA"]})
    >>> summary = summarize(flights, progressbar=False)
    >>> summary["distance"].mean, summary["distance"].sd
    (200.0, 100.0)
    >>> summary["carrier"].levels
    ('AA', 'UA')
    """
    if isinstance(source, Source) and source.summary and source.summary.rows == source.n_rows:
        return source.summary
    table = open_table(source)
    if table.summary is not None and table.summary.rows == table.n_rows:
        return table.summary
    plain, summarizer = plain_schema(table.schema), Summarizer(table.schema)
    with progress_bar("Summarizing", table.n_rows, show=progressbar) as advance:
        for where, batch in table.read(_SUMMARIZED_ROWS, advance):
            summarizer.add(conform(summarizer.add_dictionaries(batch, where), plain, where))
    return summarizer.finish()


def open_table(
    source: Any, columns: Sequence[str] | None = None, filesystem: Any = None
) -> "Files | Batches":
    """Open the paths of Parquet files, or anything else that can be streamed."""
    columns = given_columns(columns)
    if is_path(source):
        paths = source if isinstance(source, list | tuple) else [source]
        return Files(paths, columns, filesystem)
    return Batches(source, columns)


class Files:
    """Parquet files as they were when their footers were read."""

    def __init__(self, source: Sequence[Any], columns: Sequence[str] | None, filesystem: Any):
        self._source, self._filesystem = source, filesystem
        self.fs, paths = list_parquet(source, filesystem)
        more = f" and {len(source) - 1} more" if source[1:] else ""
        self.name = os.fspath(source[0]) + more
        self.row_bytes, self.page_bytes = 1.0, 0
        self.files, schemas = [], []
        found: Summary | None = None
        for file, schema, metadata in inspect_all(self.fs, paths):
            schemas.append(_choose(schema, columns, file.path))
            self._measure(metadata, set(schemas[-1].names))
            self.files.append(file)
            found = found or Summary.from_metadata(metadata.metadata, file.path)
        if columns is None:
            _refuse_partitions(paths, schemas[0].names)
        self.schema = _unify(schemas, paths)
        self.n_rows = sum(file.n_rows for file in self.files)
        self._groups = [(f, group) for f in self.files for group in range(len(f.part_rows))]
        shuffles = {file.mark and file.mark.shuffle for file in self.files}
        self.summary = found if len(shuffles) == 1 and None not in shuffles else None
        self.n_bytes = sum(file.size for file in self.files)
        self.contents = [(file.size, file.digest) for file in self.files]

    def sample(self, n_bytes: int) -> list[Located]:
        """Return the first rows of some row groups."""
        n_rows = max(1, min(_SAMPLED_ROWS, int(n_bytes / self.row_bytes)))
        filled = [(file, group) for file, group in self._groups if file.part_rows[group]]
        chosen = filled[:: math.ceil(len(filled) / _SAMPLED_GROUPS) or 1]
        return [next(self._read(file, n_rows, (group,))) for file, group in chosen]

    def cut(self, task_rows: int) -> Iterator[tuple[Piece, ...]]:
        """Cut the row groups of all files into runs of about *task_rows*, one for each task."""
        starts = np.cumsum([0, *(file.part_rows[group] for file, group in self._groups)])
        tasks = zip((starts // task_rows).tolist(), self._groups)
        for _, run in groupby(tasks, key=lambda task: task[0]):
            yield tuple(by_file(place for _, place in run))

    def read(self, batch_rows: int, advance: Callable[[float], None]) -> Iterator[Located]:
        """Yield batches of at most *batch_rows*, and tell *advance* of their rows."""
        for file in self.files:
            for where, batch in self._read(file, batch_rows):
                yield where, batch
                advance(batch.num_rows)

    def _read(
        self, file: ParquetInput, batch_rows: int, groups: Sequence[int] | None = None
    ) -> Iterator[Located]:
        return read_batches(self.fs, file, self.schema.names, batch_rows, groups)

    def require_unchanged(self) -> None:
        """Look at each file again."""
        paths = list_parquet(self._source, self._filesystem)[1]
        same = paths == [file.path for file in self.files]
        if not (same and all(is_unchanged(self.fs, file) for file in self.files)):
            raise StreamError(
                f"source={self.name!r} changed while it was being shuffled; "
                "nothing was published; run preshuffle again when it is at rest"
            )

    def refuse_overlap(
        self, fs: "pa.fs.FileSystem", destination: str, folders: Iterable[str]
    ) -> None:
        """Refuse to write where the source is read, or where a glob would look for it next time."""
        if is_local(self.fs) != is_local(fs):
            return
        real = os.path.realpath if is_local(fs) else str
        roots = [real(resolve(entry, self._filesystem)[1]) for entry in self._source]
        place = real(destination)
        files = [file.path for file in self.files if _is_inside(real(file.path), place)]
        parts = [os.path.join(place, folder, "part.parquet") for folder in folders]
        for root in roots:
            found = any(stands_for(fs, root, part) for part in parts)
            if _is_inside(place, root) or found or files:
                raise ValueError(
                    f"destination={destination!r} overlaps with source={root!r}; "
                    "write to a directory outside it"
                )

    def _measure(self, metadata: Any, columns: set[str]) -> None:
        """Learn how wide encoded rows are, and how large the pages that reading holds at once."""
        copies = 2 if is_local(self.fs) else 3  # as stored, as decoded, and in a read buffer
        for group in map(metadata.row_group, range(metadata.num_row_groups)):
            chunks = map(group.column, range(group.num_columns))
            sizes = [
                chunk.total_uncompressed_size
                for chunk in chunks  # each of a column, or of a field inside one
                if columns & {chunk.path_in_schema, chunk.path_in_schema.partition(".")[0]}
            ]
            rows = max(group.num_rows, 1)
            pages = [min(size, max(_PAGE_BYTES, _PAGE_ROWS * size // rows)) for size in sizes]
            self.row_bytes = max(self.row_bytes, sum(sizes) / rows)
            self.page_bytes = max(self.page_bytes, copies * sum(pages))


class Batches:
    """Record batches of any other source, which one thread reads once."""

    row_bytes, page_bytes, n_bytes = 1.0, 0, 0
    contents = ()

    def __init__(self, source: Any, columns: Sequence[str] | None):
        opened = as_source(source)
        self.name, self.n_rows = type(source).__name__, opened.n_rows
        self.summary = opened.summary
        batches = ((where, batch) for where, batch in opened.batches() if batch.num_rows)
        first = next(batches, None)
        if first is None:
            raise ValueError(f"source={self.name} holds no rows")
        self._batches = chain([first], batches)
        self._first, batch = first
        chosen = _choose(batch.schema, columns, self._first)
        if _PANDAS_KEY in chosen.metadata:  # which describe an index, whose order is lost
            names = [name for name in chosen.names if columns or not is_pandas_index(name)]
            chosen = _choose(chosen, names, self._first).remove_metadata()
        self.schema = result_schema([chosen])
        self._sample = batch.slice(0, _SAMPLED_ROWS)

    def sample(self, n_bytes: int) -> list[Located]:
        """Return the first rows."""
        return [(self._first, self._sample)]

    def read(self, batch_rows: int, advance: Callable[[float], None]) -> Iterator[Located]:
        """Yield batches of at most *batch_rows*, and tell *advance* of their rows."""
        for where, batch in self._batches:
            schema = _choose(batch.schema, self.schema.names, where)
            _unify([self.schema, schema], [self._first, where])
            for first in range(0, batch.num_rows, batch_rows):
                yield where, batch.slice(first, batch_rows)
            advance(batch.num_rows)


def _choose(schema: "pa.Schema", columns: Sequence[str] | None, where: str) -> "pa.Schema":
    """Return the chosen columns of a schema, without the metadata of another shuffle."""
    names = choose_columns(schema, columns, where)
    kept = {k: v for k, v in (schema.metadata or {}).items() if k not in (MARK_KEY, SUMMARY_KEY)}
    return pa.schema([schema.field(name) for name in names], kept)


def _unify(schemas: Sequence["pa.Schema"], paths: Sequence[str]) -> "pa.Schema":
    """Return one schema for all files, or name the first that differs."""
    names, merged = set(schemas[0].names), result_schema(schemas[:1])
    for schema, path in zip(schemas, paths):
        if schema.equals(schemas[0]):
            continue
        if differ := names.symmetric_difference(schema.names):
            raise ValueError(
                f"{path}: has columns {schema.names} where {paths[0]} has {schemas[0].names}; "
                f"pass columns=[...] without {sorted(differ)}"
            )
        try:
            merged = result_schema([merged, schema])
        except (pa.ArrowInvalid, pa.ArrowTypeError) as err:
            raise ValueError(
                f"{path}: its columns differ from those of {paths[0]} ({err}); "
                "write them with one type, or pass columns=[...] to leave them out"
            ) from None
    return merged


def _is_inside(path: str, folder: str) -> bool:
    return f"{path.strip('/')}/".startswith(f"{folder.strip('/')}/")


def _refuse_partitions(paths: Sequence[str], columns: Sequence[str]) -> None:
    """Refuse to lose columns that only the names of folders hold, such as ``day=1``."""
    folders = [{part for part in path.split("/")[:-1] if "=" in part} for path in paths]
    differ = folders[0].union(*folders) - folders[0].intersection(*folders)
    lost = sorted({part.partition("=")[0] for part in differ}.difference(columns))
    if lost:
        raise ValueError(
            f"{paths[0]}: the values of {lost} are {IN_FOLDERS}; columns=[...] leaves them out"
        )


def result_schema(schemas: Sequence["pa.Schema"]) -> "pa.Schema":
    """Return types that hold the values of all *schemas*, in the order of the first.

    Views become plain types, and dictionaries have int32 indices, to count the values of all.
    """
    merged, *others = map(plain_schema, schemas)
    for other in others:
        other = _joinable(other, merged)
        both = [_joinable(merged, other), other]
        merged = pa.unify_schemas(both, promote_options="permissive")
    fields = []
    for field in schemas[0]:
        plain, kinds = merged.field(field.name), [s.field(field.name).type for s in schemas]
        if all(map(pa.types.is_dictionary, kinds)):
            ordered = all(kind.ordered for kind in kinds)
            plain = plain.with_type(pa.dictionary(pa.int32(), plain.type, ordered))
        fields.append(plain.with_metadata(field.metadata))
    return pa.schema(fields, schemas[0].metadata)


def plain_schema(schema: "pa.Schema") -> "pa.Schema":
    """Return the plain types of all columns, without metadata."""
    fields = [_plain_field(field).remove_metadata() for field in schema]
    return pa.schema(fields)


def conform(batch: "pa.RecordBatch", plain: "pa.Schema", where: str) -> "pa.RecordBatch":
    """Return the columns of *plain*, found by name and converted to its types without loss."""
    columns = []
    for field in plain:
        column = batch.column(field.name)
        if pa.types.is_dictionary(column.type):
            column = dictionary_of(column).take(column.indices)
        columns.append(cast_exactly(field.name, column, field.type, where))
    return pa.RecordBatch.from_arrays(columns, schema=plain)


def _plain_field(field: "pa.Field") -> "pa.Field":
    return field.with_type(_plain_type(field.type))


def _plain_type(kind: "pa.DataType") -> "pa.DataType":
    """Return the type of the values themselves: of no dictionary and no view, nor with any inside."""
    is_: Any = pa.types
    if is_.is_dictionary(kind):
        return _plain_type(kind.value_type)
    if is_.is_string_view(kind):
        return pa.large_string()
    if is_.is_binary_view(kind):
        return pa.large_binary()
    if is_.is_struct(kind):
        return pa.struct(list(map(_plain_field, kind)))
    if is_.is_map(kind):
        return pa.map_(*map(_plain_field, (kind.key_field, kind.item_field)), kind.keys_sorted)
    if is_.is_fixed_size_list(kind):
        return pa.list_(_plain_field(kind.value_field), kind.list_size)
    lists = {
        pa.ListType: pa.list_,
        pa.LargeListType: pa.large_list,
        pa.ListViewType: pa.list_view,
        pa.LargeListViewType: pa.large_list_view,
    }
    make = lists.get(type(kind))
    return kind if make is None else make(_plain_field(kind.value_field))


def _joinable(schema: "pa.Schema", other: "pa.Schema") -> "pa.Schema":
    """Return the types of *schema*, or types with the same values that Arrow joins with *other*."""
    is_ = pa.types
    fields = []
    for field in schema:
        kind, target = field.type, other.field(field.name).type
        if is_.is_boolean(kind) and (is_.is_integer(target) or is_.is_floating(target)):
            kind = target
        elif is_.is_date(kind) and is_.is_timestamp(target):
            kind = pa.timestamp("s")
        elif is_.is_timestamp(kind) and is_.is_timestamp(target) and kind.tz and target.tz:
            kind = pa.timestamp(kind.unit, target.tz)
        fields.append(field.with_type(kind))
    return pa.schema(fields)
