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
"""The values of dictionary columns, collected from all files in order of appearance.

A pile meets values in random order, but the order of categories means something, at least where
the type says that it does.
"""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from pymc.variational._streaming.sources.parquet.files import import_pyarrow

if TYPE_CHECKING:
    import pyarrow
    import pyarrow.fs

__all__ = ["Dictionaries", "dictionary_columns", "read_dictionaries", "write_dictionaries"]


class Dictionaries:
    """The distinct values of each dictionary column, as they first appear."""

    def __init__(self) -> None:
        self.values: dict[str, pyarrow.Array] = {}
        self._last: dict[str, pyarrow.Array] = {}

    def add(self, name: str, values: "pyarrow.Array") -> None:
        """Append those of *values* that are new."""
        if name not in self.values:
            self.values[name] = self._last[name] = values
        if self._last[name].equals(values):
            return
        pa = import_pyarrow()
        self._last[name] = values
        known = self.values[name]
        new = values.filter(pa.compute.invert(pa.compute.is_in(values, value_set=known)))
        self.values[name] = pa.concat_arrays([known, new])

    @property
    def nbytes(self) -> int:
        return sum(values.nbytes for values in self.values.values())


def dictionary_columns(schema: "pyarrow.Schema") -> list[str]:
    """Return the names of the columns that are dictionaries themselves."""
    is_dictionary = import_pyarrow().types.is_dictionary
    return [field.name for field in schema if is_dictionary(field.type)]


def write_dictionaries(
    fs: "pyarrow.fs.FileSystem", path: str, values: Mapping[str, "pyarrow.Array"]
) -> None:
    """Write dictionaries of any lengths as one row of lists."""
    pa = import_pyarrow()
    lists = [pa.LargeListArray.from_arrays([0, len(v)], v) for v in values.values()]
    batch = pa.RecordBatch.from_arrays(lists, names=list(values))
    with fs.open_output_stream(path) as sink, pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)


def read_dictionaries(fs: "pyarrow.fs.FileSystem", paths: Iterable[str]) -> Dictionaries:
    """Read dictionaries and merge them in the order of *paths*."""
    pa = import_pyarrow()
    merged = Dictionaries()
    for path in paths:
        with fs.open_input_stream(path) as source:
            row = pa.ipc.open_stream(source).read_next_batch()
        for name in row.schema.names:
            merged.add(name, row[name].flatten())
    return merged
