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
"""Files of rows scattered to piles, which give back each pile by itself.

A scatter file is a sequence of blocks, each sorted by pile: an Arrow IPC message for every pile
that has rows in the block.  An index at the end tells where they are, so that the messages of one
pile can be read without the others.
"""

import json

from collections.abc import Iterable, Iterator
from dataclasses import astuple, dataclass
from itertools import groupby, pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pymc.variational._streaming.preshuffle.permute import draw_labels, group_rows
from pymc.variational._streaming.sources.parquet.files import import_pyarrow

if TYPE_CHECKING:
    import pyarrow
    import pyarrow.fs

__all__ = [
    "MAX_PILES",
    "Extent",
    "PileFile",
    "concatenate",
    "locate_pile",
    "read_pile",
    "write_catalog",
    "write_piles",
]

MAX_PILES = 1 << 12
"""Of one file; a message of fewer rows would cost more than its rows."""
_ENTRY = np.dtype([("offset", "<i8"), ("size", "<i8"), ("rows", "<i8")])


@dataclass(frozen=True, slots=True)
class PileFile:
    """Where the piles of one scatter file are."""

    path: str
    size: int
    """Bytes."""
    n_blocks: int
    index: int
    """Byte at which the index starts: for each pile, an entry for each block."""


class Extent(NamedTuple):
    """A message with rows of one pile."""

    path: str
    offset: int
    size: int
    rows: int


def write_piles(
    fs: "pyarrow.fs.FileSystem",
    path: str,
    batches: Iterable["pyarrow.RecordBatch"],
    schema: "pyarrow.Schema",
    *,
    n_piles: int,
    rng: np.random.Generator,
    block_bytes: int,
) -> PileFile:
    """Scatter rows to random piles, holding about *block_bytes* of them twice."""
    pa = import_pyarrow()
    index, held, size = [], [], 0
    with fs.open_output_stream(path) as sink:
        writer = pa.ipc.new_stream(sink, schema)
        empty = [pa.nulls(0, field.type) for field in schema]
        writer.write_batch(pa.RecordBatch.from_arrays(empty, schema=schema))
        for batch in batches:
            held.append(batch)
            size += batch.nbytes
            if size >= block_bytes:
                index.append(_write_block(writer, sink, held, n_piles, rng))
                size = 0
        if held:
            index.append(_write_block(writer, sink, held, n_piles, rng))
        start = sink.tell()
        by_pile = np.array(index, _ENTRY).reshape(len(index), n_piles).T
        sink.write(np.ascontiguousarray(by_pile).tobytes())
        return PileFile(path, sink.tell(), len(index), start)


def write_catalog(fs: "pyarrow.fs.FileSystem", path: str, files: Iterable[PileFile]) -> None:
    """Write down where the piles of many scatter files are."""
    with fs.open_output_stream(path) as sink:
        sink.write(json.dumps([astuple(file) for file in files]).encode())


def locate_pile(fs: "pyarrow.fs.FileSystem", catalog: str, pile: int) -> list[Extent]:
    """Find the rows of one pile in all scatter files of a catalog."""
    with fs.open_input_stream(catalog) as source:
        files = [PileFile(*values) for values in json.loads(source.read())]
    located = []
    for file in files:
        with fs.open_input_file(file.path) as handle:
            length = file.n_blocks * _ENTRY.itemsize
            index = np.frombuffer(handle.read_at(length, file.index + pile * length), _ENTRY)
        located += [Extent(file.path, *entry) for entry in index.tolist() if entry[-1]]
    return located


def read_pile(
    fs: "pyarrow.fs.FileSystem", extents: Iterable[Extent], schema: "pyarrow.Schema"
) -> Iterator["pyarrow.RecordBatch"]:
    """Yield the rows of one pile in the order in which they were scattered."""
    pa = import_pyarrow()
    for path, group in groupby(extents, key=lambda extent: extent.path):
        with fs.open_input_file(path) as handle:
            for extent in group:
                data = handle.read_at(extent.size, extent.offset)
                yield pa.ipc.read_record_batch(pa.py_buffer(data), schema)


def concatenate(batches: list["pyarrow.RecordBatch"]) -> "pyarrow.RecordBatch":
    """Join batches into one, and let go of them."""
    joined = import_pyarrow().Table.from_batches(batches).combine_chunks()
    batches.clear()
    return joined.to_batches()[0]


def _write_block(
    writer: Any, sink: Any, held: list["pyarrow.RecordBatch"], n_piles: int, rng: Any
) -> list[tuple[int, int, int]]:
    block = concatenate(held)
    labels = draw_labels(rng, block.num_rows, n_piles)
    block, bounds = group_rows(block, labels, n_piles)
    entries = []
    for first, end in pairwise(bounds.tolist()):
        offset = sink.tell()
        if end > first:
            writer.write_batch(block.slice(first, end - first))
        entries.append((offset, sink.tell() - offset, end - first))
    return entries
