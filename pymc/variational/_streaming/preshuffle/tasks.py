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
"""The two kinds of tasks of a shuffle on disk, which any executor can run."""

import contextlib
import dataclasses
import itertools
import math
import sys
import threading
import uuid

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pymc.variational._streaming.errors import StreamError
from pymc.variational._streaming.preshuffle.checksum import checksum_rows
from pymc.variational._streaming.preshuffle.dictionaries import (
    Dictionaries,
    dictionary_columns,
    read_dictionaries,
    write_dictionaries,
)
from pymc.variational._streaming.preshuffle.permute import generator, permute_rows
from pymc.variational._streaming.preshuffle.piles import (
    MAX_PILES,
    Extent,
    PileFile,
    concatenate,
    locate_pile,
    read_pile,
    write_catalog,
    write_piles,
)
from pymc.variational._streaming.preshuffle.plain import restore, to_plain
from pymc.variational._streaming.preshuffle.plan import MOST_AT_ONCE, Piece
from pymc.variational._streaming.sources.parquet.files import import_pyarrow, inspect, read_batches
from pymc.variational._streaming.sources.parquet.mark import PreshuffleMark

if TYPE_CHECKING:
    import pyarrow
    import pyarrow.fs

__all__ = [
    "GatherTask",
    "Gathered",
    "ScatterTask",
    "Scattered",
    "Scratch",
    "gather",
    "scatter",
]

_LABELS, _ORDER, _SUBLABELS = range(3)
"""What random numbers are for; the first word of their place."""

_SAMPLED_ROWS = 1 << 14
_REPEATS = 8
"""Values of a column of numbers must occur so often, on average, to be written as a dictionary."""

_memory = threading.BoundedSemaphore(MOST_AT_ONCE)
_entrance = threading.Lock()
"""An executor may have more threads than tasks that fit in the process's memory."""


@dataclass(frozen=True, slots=True)
class Scratch:
    """Where rows lie between the passes, and how much a task may hold of them."""

    fs: "pyarrow.fs.FileSystem"
    folder: str
    schema: "pyarrow.Schema"
    """Of the rows, in plain types."""
    at_once: int
    """Tasks in one process."""
    block_bytes: int
    batch_rows: int
    seed: int


@dataclass(frozen=True, slots=True)
class ScatterTask:
    """Row groups to be scattered to piles."""

    index: int
    fs: "pyarrow.fs.FileSystem"
    pieces: tuple[Piece, ...]
    columns: tuple[str, ...] | None
    n_piles: int
    scratch: Scratch


@dataclass(frozen=True, slots=True)
class Scattered:
    """What a scatter task leaves behind."""

    rows: int
    checksum: int
    piles: PileFile
    dictionaries: str | None
    """Path of the values of dictionary columns."""
    peak: int
    """Bytes: the largest resident size of the process so far."""


@dataclass(frozen=True, slots=True)
class GatherTask:
    """Piles to be permuted, each for itself, and written to one file."""

    index: int
    """Of the file."""
    piles: range
    catalog: str
    """Path of the list of scatter files."""
    dictionaries: str | None
    scratch: Scratch
    fs: "pyarrow.fs.FileSystem"
    path: str
    draft: str | None
    """Where to write the file before it is moved to *path*, if the filesystem can move."""
    schema: "pyarrow.Schema"
    compression: str
    row_group_rows: int
    mark: PreshuffleMark


@dataclass(frozen=True, slots=True)
class Gathered:
    """What was handed to the writer of a file."""

    rows: int
    checksum: int
    size: int
    """Bytes of the file."""
    peak: int


def scatter(task: ScatterTask) -> Scattered:
    """Read row groups, and write their rows grouped by pile."""
    scratch = task.scratch
    # A task that is run twice at once, or outlives its run, must not touch another's file.
    path = f"{scratch.folder}/{task.index:05}-{uuid.uuid4().hex}"
    with _share_of_memory(scratch.at_once), _deleted_on_error(scratch.fs, path + ".piles"):
        seen = _Seen(scratch.schema)
        piles = write_piles(
            scratch.fs,
            path + ".piles",
            (batch for piece in task.pieces for batch in _read(task, piece, seen)),
            scratch.schema,
            n_piles=task.n_piles,
            rng=generator(scratch.seed, _LABELS, task.index),
            block_bytes=scratch.block_bytes,
        )
        dictionaries = None
        if seen.dictionaries.values:
            dictionaries = path + ".dictionaries"
            write_dictionaries(scratch.fs, dictionaries, seen.dictionaries.values)
        return Scattered(seen.rows, seen.checksum, piles, dictionaries, _peak_memory())


def gather(task: GatherTask) -> Gathered:
    """Write piles, each in random order, as a Parquet file."""
    with _share_of_memory(task.scratch.at_once):
        # All that may be missing is looked up before the file is begun: on an object store there
        # is no draft, and what was there is replaced.
        found = {p: locate_pile(task.scratch.fs, task.catalog, p) for p in task.piles}
        paths = [task.dictionaries] if task.dictionaries else []
        dictionaries = read_dictionaries(task.scratch.fs, paths).values
        path = task.draft or task.path
        with _deleted_on_error(task.fs, path):
            seen = _write(task, path, found, dictionaries)
            size = _check_footer(task, path, seen)
        if task.draft:
            task.fs.move(path, task.path)
        return Gathered(seen.rows, seen.checksum, size, _peak_memory())


@contextlib.contextmanager
def _share_of_memory(at_once: int) -> Iterator[None]:
    """Wait until fewer than *at_once* tasks run in this process."""
    shares = MOST_AT_ONCE // at_once
    with _entrance:
        for _ in range(shares):
            _memory.acquire()
    try:
        yield
    finally:
        if shares > 1:
            # Memory is tight, and an allocator keeps what each thread of the executor had.
            import_pyarrow().default_memory_pool().release_unused()
        _memory.release(shares)


@contextlib.contextmanager
def _deleted_on_error(fs: "pyarrow.fs.FileSystem", path: str) -> Iterator[None]:
    """Leave no half of a file on a disk that may be full."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            fs.delete_file(path)
        raise


class _Seen:
    """What the rows that pass add up to."""

    def __init__(self, plain: "pyarrow.Schema"):
        self.plain = plain
        self.rows = self.checksum = 0
        self.dictionaries = Dictionaries()

    def add(self, batch: "pyarrow.RecordBatch") -> "pyarrow.RecordBatch":
        """Count a batch in, and return it in plain types."""
        for name in dictionary_columns(batch.schema):
            self.dictionaries.add(name, batch[name].dictionary)
        batch = to_plain(batch, self.plain)
        self.rows += batch.num_rows
        self.checksum = (self.checksum + checksum_rows(batch)) % (1 << 64)
        return batch


def _read(task: ScatterTask, piece: Piece, seen: _Seen) -> Iterator["pyarrow.RecordBatch"]:
    file, groups = piece
    batches = read_batches(
        task.fs,
        file,
        columns=task.columns,
        row_groups=groups,
        batch_rows=task.scratch.batch_rows,
    )
    for _, batch in batches:
        yield seen.add(batch)


def _shuffle(
    scratch: Scratch, extents: list[Extent], place: tuple[int, ...], rows: int
) -> Iterator["pyarrow.RecordBatch"]:
    """Yield the rows of the pile at *place* in random order, at most *rows* at a time.

    A pile that memory cannot hold is scattered again, into piles of its own.
    """
    size = sum(extent.size for extent in extents)
    n_rows = sum(extent.rows for extent in extents)
    batches = read_pile(scratch.fs, extents, scratch.schema)
    if size > scratch.block_bytes and n_rows > 1:
        n_piles = min(math.ceil(1.5 * size / scratch.block_bytes), n_rows, MAX_PILES)
        yield from _shuffle_again(scratch, batches, n_piles, place, rows)
    elif n_rows:
        pile = concatenate(list(batches))
        yield from permute_rows(pile, generator(scratch.seed, _ORDER, *place), rows)


def _shuffle_again(
    scratch: Scratch,
    batches: Iterator["pyarrow.RecordBatch"],
    n_piles: int,
    place: tuple[int, ...],
    rows: int,
) -> Iterator["pyarrow.RecordBatch"]:
    path = f"{scratch.folder}/{uuid.uuid4().hex}"
    piles = write_piles(
        scratch.fs,
        path + ".piles",
        batches,
        scratch.schema,
        n_piles=n_piles,
        rng=generator(scratch.seed, _SUBLABELS, *place),
        block_bytes=scratch.block_bytes,
    )
    write_catalog(scratch.fs, path + ".catalog", [piles])
    for pile in range(n_piles):
        extents = locate_pile(scratch.fs, path + ".catalog", pile)
        yield from _shuffle(scratch, extents, (*place, pile), rows)
    scratch.fs.delete_file(path + ".piles")
    scratch.fs.delete_file(path + ".catalog")


def _write(
    task: GatherTask,
    path: str,
    piles: Mapping[int, list[Extent]],
    dictionaries: Mapping[str, "pyarrow.Array"],
) -> _Seen:
    """Write a file, and count what is handed to its writer."""
    seen = _Seen(task.scratch.schema)
    batches = (
        batch
        for pile, extents in piles.items()
        for batch in _shuffle(task.scratch, extents, (pile,), task.row_group_rows)
    )
    first = next(batches, None)
    with (
        task.fs.open_output_stream(path) as sink,
        _open_writer(sink, task, first) as writer,
    ):
        for batch in itertools.chain([] if first is None else [first], batches):
            batch = restore(batch, task.schema, dictionaries)
            seen.add(batch)
            writer.write_batch(batch, batch.num_rows)
        mark = dataclasses.replace(task.mark, index=task.index, data_end=sink.tell())
        writer.add_key_value_metadata(mark.to_metadata())
    return seen


def _open_writer(sink: Any, task: GatherTask, first: "pyarrow.RecordBatch | None") -> Any:
    names = {*dictionary_columns(task.schema), *_repetitive_columns(first)}
    return import_pyarrow().parquet.ParquetWriter(
        sink,
        task.schema,
        compression=task.compression,
        use_dictionary=sorted(names) or False,
        write_statistics=False,
        write_page_checksum=True,
    )


def _repetitive_columns(batch: "pyarrow.RecordBatch | None") -> list[str]:
    """Return the names of columns whose pages are smaller, and faster to read, as dictionaries."""
    if batch is None:
        return []
    pa = import_pyarrow()
    sample = batch.slice(0, _SAMPLED_ROWS)
    numbers = [field.name for field in sample.schema if _is_number(field.type)]
    distinct = {name: pa.compute.count_distinct(sample[name]).as_py() for name in numbers}
    return [name for name, n in distinct.items() if n * _REPEATS <= sample.num_rows]


def _is_number(kind: "pyarrow.DataType") -> bool:
    types = import_pyarrow().types
    return types.is_integer(kind) or types.is_floating(kind)


def _check_footer(task: GatherTask, path: str, seen: _Seen) -> int:
    """Check that a file ends with a footer for all its rows, and return its size."""
    known, _ = inspect(task.fs, path)
    if known.n_rows != seen.rows:
        raise StreamError(f"{path}: holds {known.n_rows} rows, {seen.rows} were written")
    return known.size


def _peak_memory() -> int:
    """Return the largest resident size of this process so far, in bytes; 0 where unknown.

    ``ru_maxrss`` of a process that was started by another begins at the size of that one.
    """
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) << 10
    try:
        import resource
    except ImportError:
        return 0
    unit = 1 if sys.platform == "darwin" else 1 << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
