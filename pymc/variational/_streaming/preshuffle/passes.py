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
"""The two passes of an exact shuffle on disk, as tasks that any executor can run.

Giving every row a random partition, independently, and then permuting each partition, puts the
partitions one after the other in a uniformly random permutation of all rows.
Partitions of a fixed size would not: two neighbours would be kept apart too often.

A scratch file is a sequence of blocks, each sorted by partition: an Arrow IPC message for every
partition that has rows in the block.  An index at the end tells where the messages are, so that
those of one partition can be read without the others, and which checksums they must have.
"""

import contextlib
import dataclasses
import math
import sys
import threading
import uuid
import zlib

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pymc.variational._streaming.errors import StreamError
from pymc.variational._streaming.preshuffle.plan import (
    MAX_AT_ONCE,
    MAX_PARTITIONS,
    Piece,
    Plan,
    read_piece,
)
from pymc.variational._streaming.preshuffle.publish import Workspace, flush
from pymc.variational._streaming.preshuffle.types import (
    add_dictionaries,
    dictionaries_of,
    dictionary_columns,
    restore,
    to_plain,
)
from pymc.variational._streaming.sources.parquet.files import import_pyarrow, inspect, is_local

if TYPE_CHECKING:
    import pyarrow
    import pyarrow.fs

__all__ = ["Done", "gather", "scatter"]

_LABELS, _ORDER, _SUBLABELS = range(3)
"""What random numbers are for: the first word of each spawn key."""
_MESSAGE = np.dtype([("offset", "<i8"), ("size", "<i8"), ("rows", "<i8"), ("crc", "<i8")])

_slots = {n: threading.Semaphore(n) for n in range(1, MAX_AT_ONCE + 1)}
"""By the number of tasks that memory holds: an executor may have more threads in one process."""


@dataclass(slots=True)
class Done:
    """What one task of a pass, or several in their order, left behind."""

    rows: int = 0
    bytes: int = 0
    """Size of the files at *paths*."""
    peak: int = 0
    """Largest resident size of a process so far, in bytes."""
    paths: list[str] = field(default_factory=list)
    dictionaries: dict[str, "pyarrow.Array"] = field(default_factory=dict)
    """Values of the dictionary columns that were read, as they appeared."""

    def add(self, later: "Done") -> None:
        self.rows += later.rows
        self.bytes += later.bytes
        self.peak = max(self.peak, later.peak)
        self.paths += later.paths
        add_dictionaries(self.dictionaries, later.dictionaries)


def scatter(plan: Plan, work: Workspace, index: int, pieces: Sequence[Piece]) -> Done:
    """Read row groups, and write each row to a random partition of a scratch file."""
    dictionaries: dict[str, pyarrow.Array] = {}

    def read() -> Iterator["pyarrow.RecordBatch"]:
        for piece in pieces:
            for batch in read_piece(plan.fs, piece, plan.schema.names, plan.batch_rows):
                add_dictionaries(dictionaries, dictionaries_of(batch))
                yield to_plain(batch, plan.plain)

    path = _scratch_path(work, index)
    labels = _generator(plan.mark.seed, _LABELS, index)
    with _memory_for_a_task(plan.at_once):
        rows, size = _scatter_rows(
            work.scratch_fs, path, read(), plan.n_partitions, labels, plan.block_bytes
        )
        return Done(rows, size, _peak_memory(), [path], dictionaries)


def gather(
    plan: Plan,
    work: Workspace,
    index: int,
    n_scattered: int,
    dictionaries: Mapping[str, "pyarrow.Array"],
) -> Done:
    """Write some partitions of *n_scattered* scratch files, each in random order, to a file."""
    paths = [_scratch_path(work, task) for task in range(n_scattered)]
    partitions = range(plan.n_partitions)[index * plan.partitions_per_file :]
    batches = (
        restore(batch, plan.schema, dictionaries)
        for partition in partitions[: plan.partitions_per_file]
        for batch in _shuffle(plan, work, paths, (partition,))
    )
    path = f"{work.parts}/{uuid.uuid4().hex}.parquet"
    with _memory_for_a_task(plan.at_once):
        _write_part(plan, work.parts_fs, path, index, batches)
        if is_local(work.parts_fs):
            flush(path)
        written, _ = inspect(work.parts_fs, path)
        return Done(written.n_rows, written.size, _peak_memory(), [path])


@contextlib.contextmanager
def _memory_for_a_task(at_once: int) -> Iterator[None]:
    """Wait until fewer than *at_once* tasks run in this process."""
    with _slots[at_once]:
        try:
            yield
        finally:
            if at_once < MAX_AT_ONCE:
                # Memory is tight, and an allocator keeps what each thread of the executor had.
                import_pyarrow().default_memory_pool().release_unused()


def _peak_memory() -> int:
    """Return the largest resident size of this process so far, in bytes; 0 on Windows."""
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss would begin at the size of the process that started this one
        lines = (line.split() for line in status.read_text().splitlines())
        return next((int(line[1]) << 10 for line in lines if line[0] == "VmHWM:"), 0)
    if sys.platform == "win32":
        return 0
    import resource

    unit = 1 if sys.platform == "darwin" else 1 << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _scratch_path(work: Workspace, index: int) -> str:
    return f"{work.scratch}/{index:06}.rows"


def _generator(seed: int, *key: int) -> np.random.Generator:
    """Make the generator for one purpose and task, whoever runs it."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))


def _scatter_rows(
    fs: "pyarrow.fs.FileSystem",
    path: str,
    batches: Iterable["pyarrow.RecordBatch"],
    n_partitions: int,
    rng: np.random.Generator,
    block_bytes: int,
) -> tuple[int, int]:
    """Write a scratch file, holding about *block_bytes* of rows twice; return its rows and size."""
    index, rows = [], 0
    with fs.open_output_stream(path) as sink:
        for block in _join(batches, block_bytes):
            labels = rng.integers(0, n_partitions, block.num_rows, dtype=np.uint16)
            counts = np.bincount(labels, minlength=n_partitions)
            block = _take(block, np.argsort(labels, kind="stable"))
            index.append(_write_block(sink, block, counts))
            rows += block.num_rows
        start = sink.tell()
        # For each partition, the messages of all blocks, so that a reader finds them together.
        by_partition = np.array(index, _MESSAGE).reshape(len(index), n_partitions).T
        sink.write(np.ascontiguousarray(by_partition).tobytes())
        sink.write(np.array([start, len(index)], "<i8").tobytes())
        return rows, sink.tell()


def _join(
    batches: Iterable["pyarrow.RecordBatch"], block_bytes: int
) -> Iterator["pyarrow.RecordBatch"]:
    """Join batches to blocks of at least *block_bytes*; the last one may be smaller."""
    held, size = [], 0
    for batch in batches:
        held.append(batch)
        size += batch.nbytes
        if size >= block_bytes:
            yield _concatenate(held)
            size = 0
    if held:
        yield _concatenate(held)


def _write_block(sink: Any, block: "pyarrow.RecordBatch", counts: np.ndarray) -> np.ndarray:
    """Write a message for each partition that has some of the sorted rows of *block*."""
    messages = np.zeros(len(counts), _MESSAGE)
    first = 0
    for partition in np.flatnonzero(counts):
        rows = int(counts[partition])
        data = block.slice(first, rows).serialize()
        messages[partition] = sink.tell(), data.size, rows, zlib.crc32(data)
        sink.write(data)
        first += rows
    return messages


def _find_messages(
    fs: "pyarrow.fs.FileSystem", paths: Sequence[str], partition: int
) -> list[tuple[str, np.ndarray]]:
    """Return where the rows of one partition are in each scratch file."""
    found = []
    for path in paths:
        with fs.open_input_file(path) as file:
            start, n_blocks = np.frombuffer(file.read_at(16, file.size() - 16), "<i8").tolist()
            length = n_blocks * _MESSAGE.itemsize
            index = np.frombuffer(file.read_at(length, start + partition * length), _MESSAGE)
            found.append((path, index[index["size"] > 0]))
    return found


def _read_messages(
    fs: "pyarrow.fs.FileSystem", found: list[tuple[str, np.ndarray]], schema: "pyarrow.Schema"
) -> Iterator["pyarrow.RecordBatch"]:
    """Yield the rows of messages in the order in which they were scattered."""
    for path, messages in found:
        with fs.open_input_file(path) as file:
            for offset, size, _, crc in messages.tolist():
                data = file.read_at(size, offset)
                if zlib.crc32(data) != crc:
                    raise StreamError(
                        f"{path}: rows between the two passes are not those that were written; "
                        "nothing was published; check the disk, or pass another scratch=..."
                    )
                yield import_pyarrow().ipc.read_record_batch(data, schema)


def _shuffle(
    plan: Plan, work: Workspace, paths: Sequence[str], place: tuple[int, ...]
) -> Iterator["pyarrow.RecordBatch"]:
    """Yield the rows of a partition in random order, at most those of a row group at a time.

    A partition that memory cannot hold is scattered again, into partitions of its own; *place*
    are the numbers of the partitions that it is a part of, and its own.
    """
    found = _find_messages(work.scratch_fs, paths, place[-1])
    size, n_rows = (sum(int(m[name].sum()) for _, m in found) for name in ("size", "rows"))
    batches = _read_messages(work.scratch_fs, found, plan.plain)
    if size > plan.block_bytes and n_rows > 1:
        path = f"{work.scratch}/{uuid.uuid4().hex}.rows"
        n_partitions = min(math.ceil(1.5 * size / plan.block_bytes), n_rows, MAX_PARTITIONS)
        labels = _generator(plan.mark.seed, _SUBLABELS, *place)
        _scatter_rows(work.scratch_fs, path, batches, n_partitions, labels, plan.block_bytes)
        for partition in range(n_partitions):
            yield from _shuffle(plan, work, [path], (*place, partition))
        work.scratch_fs.delete_file(path)
    elif n_rows:
        rows = _concatenate(list(batches))
        order = _generator(plan.mark.seed, _ORDER, *place).permutation(rows.num_rows)
        for chosen in np.array_split(order, math.ceil(len(order) / plan.row_group_rows)):
            yield _take(rows, chosen)


def _concatenate(batches: list["pyarrow.RecordBatch"]) -> "pyarrow.RecordBatch":
    """Join batches into one, and release them."""
    joined = import_pyarrow().Table.from_batches(batches).combine_chunks()
    batches.clear()
    return joined.to_batches()[0]


def _take(batch: "pyarrow.RecordBatch", order: np.ndarray) -> "pyarrow.RecordBatch":
    pa = import_pyarrow()
    places = pa.array(order)
    columns = [pa.compute.take(column, places, boundscheck=False) for column in batch.columns]
    return pa.RecordBatch.from_arrays(columns, schema=batch.schema)


def _write_part(
    plan: Plan,
    fs: "pyarrow.fs.FileSystem",
    path: str,
    index: int,
    batches: Iterable["pyarrow.RecordBatch"],
) -> None:
    """Write a Parquet file of the result, with a row group for each batch."""
    with (
        fs.open_output_stream(path) as sink,
        import_pyarrow().parquet.ParquetWriter(
            sink,
            plan.schema,
            compression=plan.compression,
            use_dictionary=dictionary_columns(plan.schema) or False,
            write_statistics=False,
            write_page_checksum=True,
        ) as writer,
    ):
        for batch in batches:
            writer.write_batch(batch, batch.num_rows)
        mark = dataclasses.replace(plan.mark, index=index, data_end=sink.tell())
        writer.add_key_value_metadata(mark.to_metadata())
