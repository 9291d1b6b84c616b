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
"""The files of the result."""

import dataclasses
import os

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pymc.variational._streaming.preshuffle.plan import Part
from pymc.variational._streaming.sources.ipc import checksum, group_columns, to_metadata
from pymc.variational._streaming.sources.parquet.files import import_pyarrow
from pymc.variational._streaming.sources.parquet.mark import PreshuffleMark
from pymc.variational._streaming.sources.summary import Summary

if TYPE_CHECKING:
    import pyarrow

__all__ = ["Writer"]


@dataclass(frozen=True, slots=True)
class Writer:
    """Writes the files of the result."""

    schema: "pyarrow.Schema"
    dictionaries: Mapping[str, "pyarrow.Array"]
    """Values of the columns that are written as codes."""
    summary: Summary
    compression: str | None
    marks: Mapping[str, PreshuffleMark]
    """Mark of the first file in each folder."""

    format: str
    batch_rows: int
    """Rows of a record batch in a row-major file."""

    def name(self, part: Part) -> str:
        """Return the path of a file below the destination."""
        n_files = self.marks[part.folder].n_files
        return os.path.join(part.folder, f"part-{part.index:05}-of-{n_files:05}.{self.format}")

    def write(self, path: str, part: Part, batches: Iterable["pyarrow.RecordBatch"]) -> int:
        """Write a file of the result, flush it to the disk, and return its number of rows."""
        write = self._write_parquet if self.format == "parquet" else self._write_rows
        rows = write(path, part, batches)
        flush(path)
        return rows

    def _write_parquet(
        self, path: str, part: Part, batches: Iterable["pyarrow.RecordBatch"]
    ) -> int:
        """Write a row group for each batch."""
        rows = 0
        with (
            import_pyarrow().OSFile(path, "wb") as sink,
            import_pyarrow().parquet.ParquetWriter(
                sink,
                self.schema,
                compression=self.compression,
                use_dictionary=list(self.dictionaries) or False,
                write_statistics=False,
                write_page_checksum=True,
            ) as writer,
        ):
            for batch in batches:
                writer.write_batch(self._encode(batch), batch.num_rows)
                rows += batch.num_rows
            mark = dataclasses.replace(
                self.marks[part.folder], index=part.index, data_end=sink.tell()
            )
            writer.add_key_value_metadata(mark.to_metadata() | self.summary.to_metadata())
        return rows

    def _write_rows(self, path: str, part: Part, batches: Iterable["pyarrow.RecordBatch"]) -> int:
        """Write record batches of one size, with the columns of each dtype side by side."""
        pa, groups = import_pyarrow(), group_columns(self.schema)
        mark = dataclasses.replace(self.marks[part.folder], index=part.index)
        schema = pa.schema(
            [
                (dtype, pa.list_(pa.from_numpy_dtype(dtype), len(names)))
                for dtype, names in groups.items()
            ],
            to_metadata(self.schema, part.n_rows, self.batch_rows)
            | mark.to_metadata()
            | self.summary.to_metadata(),
        )
        options = pa.ipc.IpcWriteOptions(compression=self.compression)
        rows = 0
        with pa.OSFile(path, "wb") as sink, pa.ipc.new_file(sink, schema, options=options) as out:
            for number, arrays in enumerate(self._interleave(groups, batches)):
                lists = [
                    pa.FixedSizeListArray.from_arrays(pa.array(array.reshape(-1)), array.shape[1])
                    for array in arrays
                ]
                batch = pa.RecordBatch.from_arrays(lists, schema=schema)
                out.write_batch(batch, custom_metadata=checksum(arrays, number))
                rows += batch.num_rows
        return rows

    def _interleave(
        self, groups: Mapping[str, list[str]], batches: Iterable["pyarrow.RecordBatch"]
    ) -> Iterator[list[np.ndarray]]:
        """Yield the rows of each dtype, ``batch_rows`` at a time, in memory that is used again."""
        held = [np.empty((self.batch_rows, len(names)), dtype) for dtype, names in groups.items()]
        filled = 0
        for batch in batches:
            start = 0
            while start < batch.num_rows:
                piece = batch.slice(start, self.batch_rows - filled)
                for rows, names in zip(held, groups.values()):
                    for j, name in enumerate(names):
                        numbers = self._codes(name, piece.column(name))
                        place = slice(filled, filled + piece.num_rows)
                        rows[place, j] = numbers.to_numpy(zero_copy_only=False)
                start, filled = start + piece.num_rows, filled + piece.num_rows
                if filled == self.batch_rows:
                    yield held
                    filled = 0
        if filled:
            yield [rows[:filled] for rows in held]

    def _encode(self, batch: "pyarrow.RecordBatch") -> "pyarrow.RecordBatch":
        """Make dictionaries of the columns that are written as codes."""
        pa, columns = import_pyarrow(), []
        for column, field in zip(batch.columns, self.schema):
            if field.name in self.dictionaries:
                column = pa.DictionaryArray.from_arrays(
                    self._codes(field.name, column),
                    self.dictionaries[field.name],
                    ordered=field.type.ordered,
                )
            columns.append(column)
        return pa.RecordBatch.from_arrays(columns, schema=self.schema)

    def _codes(self, name: str, column: "pyarrow.Array") -> "pyarrow.Array":
        """Return the codes of the values of a column, or the column where it has none."""
        if name not in self.dictionaries:
            return column
        return import_pyarrow().compute.index_in(column, value_set=self.dictionaries[name])


def flush(path: str) -> None:
    """Wait until a file, or the list of names in a folder, is on the disk."""
    if os.path.isdir(path) and os.name != "posix":
        return  # Windows cannot open folders.
    handle = os.open(path, os.O_RDONLY if os.path.isdir(path) else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
