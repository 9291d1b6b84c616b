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
import itertools
import math
import os
import sys
import threading
import uuid

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pymc.variational._streaming.errors import StreamError
from pymc.variational._streaming.preshuffle.plan import MAX_AT_ONCE, MAX_PARTITIONS, Part, Plan
from pymc.variational._streaming.preshuffle.write import Writer
from pymc.variational._streaming.sources.parquet.files import pa
from pymc.variational._streaming.sources.parquet.parquet import read_batches
from pymc.variational._streaming.sources.summary import Located, Summarizer
from pymc.variational._streaming.sources.tables import Piece, conform
from pymc.variational._streaming.utils import crc_of_sums

__all__ = ["Done", "gather", "scatter", "scatter_pieces"]

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
    partition_rows: Any = 0
    """Rows of each partition, after the first pass."""
    summary: Summarizer | None = None

    def add(self, later: "Done") -> None:
        """Add what the next task left behind."""
        self.rows += later.rows
        self.bytes += later.bytes
        self.peak = max(self.peak, later.peak)
        self.paths += later.paths
        self.partition_rows = self.partition_rows + later.partition_rows
        if self.summary is None or later.summary is None:
            self.summary = self.summary or later.summary
        else:
            self.summary.merge(later.summary)


def scatter(plan: Plan, folder: str, index: int, batches: Iterable[Located]) -> Done:
    """Write each row to a random partition of a scratch file."""
    path = f"{folder}/{index:06}.rows"
    summary = Summarizer(plan.schema)
    plain = (
        conform(summary.add_dictionaries(batch, where), plan.plain, where)
        for where, batch in batches
    )
    blocks = map(summary.add, _join(plain, plan.block_bytes))
    with _memory_for_a_task(plan.at_once):
        rng = _generator(plan.seed, _LABELS, index)
        counts = _scatter_rows(path, blocks, plan.n_partitions, rng)
        size = os.path.getsize(path)
        return Done(summary.rows, size, _peak_memory(), [path], counts, summary)


def scatter_pieces(
    plan: Plan, folder: str, index: int, fs: "pa.fs.FileSystem", pieces: Sequence[Piece]
) -> Done:
    """Scatter row groups of files."""
    names = plan.schema.names
    read = (read_batches(fs, file, names, plan.batch_rows, groups) for file, groups in pieces)
    return scatter(plan, folder, index, itertools.chain.from_iterable(read))


def gather(plan: Plan, folder: str, scattered: Sequence[str], part: Part, writer: Writer) -> Done:
    """Write some partitions of the scattered rows, each in random order, to a file."""
    path = f"{folder}/{uuid.uuid4().hex}"
    with _memory_for_a_task(plan.at_once):
        batches = (
            batch
            for partition, start, stop in part.pieces
            for batch in _between(_shuffle(plan, scattered, (partition,)), start, stop)
        )
        rows = writer.write(path, part, batches)
        return Done(rows, os.path.getsize(path), _peak_memory(), [path])


@contextlib.contextmanager
def _memory_for_a_task(at_once: int) -> Iterator[None]:
    """Wait until fewer than *at_once* tasks run in this process."""
    with _slots[at_once]:
        try:
            yield
        finally:
            if at_once < MAX_AT_ONCE:
                # Memory is tight, and an allocator keeps what each thread of the executor had.
                pa.default_memory_pool().release_unused()


def _peak_memory() -> int:
    """Return the largest resident size of this process so far, in bytes; 0 on Windows."""
    try:
        import resource
    except ImportError:
        return 0
    unit = 1 if sys.platform == "darwin" else 1 << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _generator(seed: int, *key: int) -> np.random.Generator:
    """Make the generator for one purpose and task, whoever runs it."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))


def _scatter_rows(
    path: str,
    blocks: Iterable["pa.RecordBatch"],
    n_partitions: int,
    rng: np.random.Generator,
) -> np.ndarray:
    """Write a scratch file, holding each block twice; return the rows of each partition."""
    index, total = [], np.zeros(n_partitions, np.int64)
    narrow = np.uint8 if n_partitions <= 256 else np.uint16  # a radix sort of bytes is faster
    with pa.OSFile(path, "wb") as sink:
        for block in blocks:
            labels = rng.integers(0, n_partitions, block.num_rows, dtype=np.uint16)
            counts = np.bincount(labels, minlength=n_partitions)
            block = _take(block, np.argsort(labels.astype(narrow), kind="stable"))
            index.append(_write_block(sink, block, counts))
            del block  # its memory is free while the next one is read
            total += counts
        start = sink.tell()
        # For each partition, the messages of all blocks, so that a reader finds them together.
        by_partition = np.array(index, _MESSAGE).reshape(len(index), n_partitions).T
        sink.write(np.ascontiguousarray(by_partition).tobytes())
        sink.write(np.array([start, len(index)], "<i8").tobytes())
    return total


def _join(batches: Iterable["pa.RecordBatch"], block_bytes: int) -> Iterator["pa.RecordBatch"]:
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


def _write_block(sink: Any, block: "pa.RecordBatch", counts: np.ndarray) -> np.ndarray:
    """Write a message for each partition that has some of the sorted rows of *block*."""
    messages = np.zeros(len(counts), _MESSAGE)
    first = 0
    for partition in np.flatnonzero(counts):
        rows = int(counts[partition])
        data = block.slice(first, rows).serialize()
        messages[partition] = sink.tell(), data.size, rows, _checksum(data)
        sink.write(data)
        first += rows
    return messages


def _find_messages(paths: Sequence[str], partition: int) -> list[tuple[str, np.ndarray]]:
    """Return where the rows of one partition are in each scratch file."""
    found = []
    for path in paths:
        with pa.OSFile(path) as file:
            start, n_blocks = np.frombuffer(file.read_at(16, file.size() - 16), "<i8").tolist()
            length = n_blocks * _MESSAGE.itemsize
            index = np.frombuffer(file.read_at(length, start + partition * length), _MESSAGE)
            found.append((path, index[index["size"] > 0]))
    return found


def _read_messages(
    found: list[tuple[str, np.ndarray]], schema: "pa.Schema"
) -> Iterator["pa.RecordBatch"]:
    """Yield the rows of messages in the order in which they were scattered."""
    for path, messages in found:
        with pa.OSFile(path) as file:
            for offset, size, _, crc in messages.tolist():
                data = file.read_at(size, offset)
                if _checksum(data) != crc:
                    raise StreamError(
                        f"{path}: rows between the two passes are not those that were written; "
                        "nothing was published; check the disk, or pass another scratch=..."
                    )
                yield pa.ipc.read_record_batch(data, schema)


def _shuffle(
    plan: Plan, paths: Sequence[str], place: tuple[int, ...]
) -> Iterator["pa.RecordBatch"]:
    """Yield the rows of a partition in random order, at most those of a row group at a time.

    A partition that memory cannot hold is scattered again, into partitions of its own; *place*
    are the numbers of the partitions that it is a part of, and its own.
    """
    found = _find_messages(paths, place[-1])
    size, n_rows = (sum(int(m[name].sum()) for _, m in found) for name in ("size", "rows"))
    batches = _read_messages(found, plan.plain)
    if size > plan.block_bytes and n_rows > 1:
        path = f"{os.path.dirname(paths[0])}/{uuid.uuid4().hex}"
        n_partitions = min(math.ceil(1.5 * size / plan.block_bytes), n_rows, MAX_PARTITIONS)
        labels = _generator(plan.seed, _SUBLABELS, *place)
        _scatter_rows(path, _join(batches, plan.block_bytes), n_partitions, labels)
        for partition in range(n_partitions):
            yield from _shuffle(plan, [path], (*place, partition))
        os.remove(path)
    elif n_rows:
        rows = _concatenate(list(batches))
        order = _generator(plan.seed, _ORDER, *place).permutation(rows.num_rows)
        for chosen in np.array_split(order, math.ceil(len(order) / plan.row_group_rows)):
            yield _take(rows, chosen)


def _between(
    batches: Iterable["pa.RecordBatch"], start: int, stop: int
) -> Iterator["pa.RecordBatch"]:
    """Yield rows *start* to *stop* of all *batches*."""
    for batch in batches:
        if start < batch.num_rows and stop > 0:
            yield batch.slice(max(start, 0), min(stop, batch.num_rows) - max(start, 0))
        start, stop = start - batch.num_rows, stop - batch.num_rows


def _take(rows: "pa.RecordBatch", places: np.ndarray) -> "pa.RecordBatch":
    """Return rows in another order, whose places are known to be right."""
    return pa.compute.take(rows, pa.array(places), boundscheck=False)


def _checksum(message: "pa.Buffer") -> int:
    return crc_of_sums(np.frombuffer(message, np.uint8))


def _concatenate(batches: list["pa.RecordBatch"]) -> "pa.RecordBatch":
    """Join batches into one, and release them."""
    table = pa.Table.from_batches(batches).combine_chunks()
    batches.clear()
    return table.to_batches()[0]
