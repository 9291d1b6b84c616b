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

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pymc.variational._streaming.preshuffle.plan import Part
from pymc.variational._streaming.preshuffle.types import encode
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
    summary: Summary
    compression: str
    marks: Mapping[str, PreshuffleMark]
    """Mark of the first file in each folder."""

    def name(self, part: Part) -> str:
        """Return the path of a file below the destination."""
        n_files = self.marks[part.folder].n_files
        return os.path.join(part.folder, f"part-{part.index:05}-of-{n_files:05}.parquet")

    def write(self, path: str, part: Part, batches: Iterable["pyarrow.RecordBatch"]) -> int:
        """Write a Parquet file with a row group for each batch; return its number of rows."""
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
                writer.write_batch(encode(batch, self.schema, self.dictionaries), batch.num_rows)
                rows += batch.num_rows
            mark = dataclasses.replace(
                self.marks[part.folder], index=part.index, data_end=sink.tell()
            )
            writer.add_key_value_metadata(mark.to_metadata() | self.summary.to_metadata())
        flush(path)
        return rows


def flush(path: str) -> None:
    """Wait until a file, or the list of names in a folder, is on the disk."""
    if os.path.isdir(path) and os.name != "posix":
        return  # Windows cannot open folders.
    handle = os.open(path, os.O_RDONLY if os.path.isdir(path) else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
