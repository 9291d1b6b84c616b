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
"""An exactly uniform shuffle of all rows on disk, once, so that any window of them is random.

>>> from pymc.variational.streaming import preshuffle
>>> preshuffle("raw/", "shuffled/", seed=0)  # doctest: +SKIP

A table that fits in memory does not need it: ``pm.Minibatch`` draws from all rows.
"""

import contextlib
import logging
import os
import re
import time
import weakref

from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Executor, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from pymc.variational._streaming.errors import StreamError
from pymc.variational._streaming.preshuffle.passes import Done, gather, scatter, scatter_pieces
from pymc.variational._streaming.preshuffle.plan import (
    Part,
    Plan,
    cut_parts,
    make_plan,
    parse_bytes,
)
from pymc.variational._streaming.preshuffle.write import (
    Workspace,
    Writer,
    flush,
    open_workspace,
    publish,
    refuse_to_replace,
)
from pymc.variational._streaming.sources.arrow import group_columns
from pymc.variational._streaming.sources.parquet.files import pa, warn_of_copies
from pymc.variational._streaming.sources.parquet.mark import PreshuffleMark, check_marks
from pymc.variational._streaming.sources.parquet.paths import resolve
from pymc.variational._streaming.sources.rows import PIECE_ROWS
from pymc.variational._streaming.sources.summary import Summary
from pymc.variational._streaming.sources.tables import Batches, Files, open_table
from pymc.variational._streaming.utils import digest, draw_seed, progress_bar

__all__ = ["PreshuffleReport", "preshuffle"]

_log = logging.getLogger(__name__)
_CODECS = {
    "parquet": ("lz4", "zstd", "snappy", "gzip", "brotli"),
    "arrow": (None, "lz4", "zstd"),
}
_WIDE = 16
"""Columns of numbers from which on row-major files are read at least twice as fast."""
_begun: "weakref.WeakSet[Iterator[Any]]" = weakref.WeakSet()
"""Iterators that a run has read from, so that the next run would miss rows."""


@dataclass(frozen=True, slots=True, repr=False)
class PreshuffleReport:
    """What a shuffle did. It prints as one line."""

    rows: int
    piles: int
    """Partitions that were each permuted by itself; a file of the result holds some of them."""
    bytes_read: int
    """From source files and scratch."""
    bytes_written: int
    """To scratch and destination."""
    seconds: float
    peak_memory: int
    """Largest resident size of any process that took part, in bytes, with all that was in it."""
    destination: str

    def __repr__(self) -> str:
        return (
            f"{self.destination}: {self.rows:,} rows shuffled in {self.piles} partitions, "
            f"{self.bytes_read / 1e9:.2f} GB read, {self.bytes_written / 1e9:.2f} GB written, "
            f"{self.seconds:.1f} s ({self.rows / self.seconds:,.0f} rows/s), "
            f"peak memory {self.peak_memory / 1e9:.2f} GB"
        )


def preshuffle(
    source: Any,
    destination: str | os.PathLike,
    *,
    seed: int,
    columns: Sequence[str] | None = None,
    split: Mapping[str, float] | None = None,
    memory_limit: int | str = "512MB",
    scratch: str | os.PathLike | None = None,
    executor: Executor | None = None,
    filesystem: Any = None,
    format: Literal["parquet", "arrow"] = "parquet",
    compression: str | None = None,
    overwrite: bool = False,
    progressbar: bool = True,
) -> PreshuffleReport:
    """Write all rows of a table in uniformly random order.

    Parameters
    ----------
    source : path_like, sequence of path_like, data frame, Arrow table or reader, array or Source
        Parquet files: a file, a directory, a glob, or a list of these, local or a URI, which all
        workers read. Or anything else that can be streamed, which is read once, by one thread: a
        data frame, an Arrow table or reader, an iterable of record batches, an array.
    destination : path_like
        A directory for the result; local or a URI. It appears when all is done, at once.
    seed : int
        Seed of the permutation. The same source, seed and memory limit give the same files.
    columns : sequence of str, optional
        The columns to keep. Default: all.
    split : mapping from str to float, optional
        What fraction of the rows goes to each of several folders below *destination*, such as
        ``{"train": 0.9, "valid": 0.1}``. Every row goes to exactly one. Default: no folders.
    memory_limit : int or str, default "512MB"
        By how much the memory of each process may grow, in bytes or as "512MB" or "2GiB".
    scratch : path_like, optional
        A directory, which all workers reach, for rows between the two passes, and for a result
        that is uploaded. Default: beside a local *destination*, else the directory for temporary
        files.
    executor : concurrent.futures.Executor, optional
        Runs the tasks: threads, processes, or a cluster, such as Dask's
        ``client.get_executor()``. Default: a thread per core, at most four.
    filesystem : pyarrow.fs.FileSystem or fsspec filesystem, optional
        Where *source* and *destination* are, if they are not local and no URIs.
    format : {"parquet", "arrow"}, default "parquet"
        "arrow" writes the rows of each dtype side by side, for :func:`arrow_source`, which reads
        wide rows several times as fast. All columns must then hold numbers, booleans, or up to
        4,096 levels, and no null, NaN or infinity.
    compression : str, optional
        Codec of the result. Default: lz4 for Parquet, which costs the least when the rows are
        streamed, and none for "arrow", which knows lz4 and zstd.
    overwrite : bool, default False
        Replace what is at *destination*, when the new rows are complete.
    progressbar : bool, default True
        Show the rows that are done, and how many are done per second.

    Returns
    -------
    PreshuffleReport

    Raises
    ------
    FileExistsError
        If *destination* exists and is not empty, and *overwrite* is not set.
    ValueError
        If an argument is wrong, *destination* and *source* overlap, or *memory_limit* is too
        small; the message says how much is enough.
    StreamError
        If the source changes or cannot be read, another run writes to *destination*, or a disk
        fails. Nothing is published then, and nothing is left: the same call starts over.

    Notes
    -----
    Every row gets an independent random partition in a first pass over the source; a second pass
    permutes each partition in memory. All permutations are equally likely. The parts of a split
    are runs of the permutation, and so random samples, of exactly the sizes asked for.

    All columns keep their types, except that dictionary columns have int32 indices, views and
    dictionaries inside of other types become plain, and types that differ between files are
    widened. The files also hold the summary of all rows that :func:`summarize` returns.

    References
    ----------
    Rao, C. R. (1961). Generation of random permutations of given number of elements using
    random sampling numbers. Sankhya A, 23, 305-307.
    Sandelius, M. (1962). A simple randomization procedure. Journal of the Royal Statistical
    Society B, 24, 472-481.

    Examples
    --------
    >>> import pyarrow as pa
    >>> import pyarrow.parquet as pq
    >>> pq.write_table(pa.table({"time": range(1_000)}), "ordered.parquet")
    >>> preshuffle("ordered.parquet", "shuffled", seed=0, progressbar=False).rows
    1000
    """
    start = time.monotonic()
    codec = _choose_codec(format, compression)
    fractions = {"": 1.0} if split is None else _check_split(split)
    seed, limit = draw_seed(seed), parse_bytes(memory_limit)
    fs, path = resolve(destination, filesystem)
    if isinstance(source, Iterator):
        _begin(source, fs, path, overwrite=overwrite)
    table = open_table(source, columns, filesystem)
    if format == "arrow":
        group_columns(table.schema)
    plan = make_plan(table, seed=seed, memory_limit=limit)
    if isinstance(table, Files):
        _check_files(table, fs, path, fractions)
    threads = ThreadPoolExecutor(min(plan.at_once, os.cpu_count() or 1))
    with (
        open_workspace(fs, path, scratch=scratch, overwrite=overwrite) as work,
        threads if executor is None else contextlib.nullcontext(executor) as pool,
        progress_bar("Shuffling", table.n_rows, show=progressbar) as advance,
    ):
        scattered = _scatter(table, plan, work, pool, advance)
        middle = _log_pass("scattered", scattered.rows, start)
        row_bytes = scattered.bytes / scattered.rows
        parts = cut_parts(scattered.partition_rows.tolist(), fractions, row_bytes)
        writer = _make_writer(table, plan, scattered, parts, format, codec)
        tasks = ((plan, work.parts, scattered.paths, part, writer) for part in parts)
        # This thread waits for the disk while the workers write other files.
        gathered = _run(gather, pool, tasks, advance, finish=flush)
        _log_pass("wrote", gathered.rows, middle)
        _require_all_rows(table, scattered, gathered)
        publish(work, dict(zip(map(writer.name, parts), gathered.paths)))
    _suggest_rows(path, writer)
    return PreshuffleReport(
        rows=gathered.rows,
        piles=plan.n_partitions,
        bytes_read=table.n_bytes + scattered.bytes,
        bytes_written=scattered.bytes + gathered.bytes,
        seconds=time.monotonic() - start,
        peak_memory=max(scattered.peak, gathered.peak),
        destination=path,
    )


def _begin(
    rows: Iterator[Any], fs: "pa.fs.FileSystem", destination: str, *, overwrite: bool
) -> None:
    """Refuse a destination before rows are lost for it, and an iterator that a run has begun."""
    refuse_to_replace(fs, destination, overwrite=overwrite)
    if rows in _begun:
        raise StreamError(
            "source is an iterator that an earlier run has read from, so that rows are missing; "
            "make a new one, or pass a function that makes it"
        )
    with contextlib.suppress(TypeError):  # no weak reference can be made to a map, for instance
        _begun.add(rows)


def _check_files(
    table: Files, fs: "pa.fs.FileSystem", destination: str, folders: Iterable[str]
) -> None:
    """Refuse a destination among the files, and a shuffle that is not whole; warn of copies."""
    table.refuse_overlap(fs, destination, folders)
    shuffles = defaultdict(list)
    for file in table.files:
        shuffles[file.mark and file.mark.shuffle].append(file)
    for files in shuffles.values():
        check_marks(files)
    warn_of_copies(table.fs, table.files)


def _choose_codec(format: str, compression: str | None) -> str | None:
    if format not in _CODECS:
        raise ValueError(f"format={format!r} is not a choice; pass 'parquet' or 'arrow'")
    codec = _CODECS[format][0] if compression is None else compression
    if codec not in _CODECS[format] or (codec and not pa.Codec.is_available(codec)):
        raise ValueError(
            f"compression={compression!r} is not available; pass one of {_CODECS[format]}"
        )
    return codec


def _require_all_rows(table: Files | Batches, scattered: Done, gathered: Done) -> None:
    """Raise StreamError unless all rows of a source that is still the same are in the result."""
    n_rows = scattered.rows if table.n_rows is None else table.n_rows
    if not n_rows == scattered.rows == gathered.rows:
        raise StreamError(
            f"the source has {n_rows} rows, {scattered.rows} were read, "
            f"{gathered.rows} are in the result; nothing was published; "
            "check the disk and run preshuffle again"
        )
    if isinstance(table, Files):
        table.require_unchanged()


def _suggest_rows(path: str, writer: Writer) -> None:
    """Tell of the format for wide tables of numbers."""
    is_wide = writer.format == "parquet" and len(writer.summary) >= _WIDE
    if is_wide and all(column.min is not None for column in writer.summary.values()):
        _log.info(
            f"{path} has {len(writer.summary)} columns of numbers; "
            'format="arrow" lets arrow_source read them several times as fast'
        )


def _check_split(split: Mapping[str, float]) -> dict[str, float]:
    """Return the fractions of a split by folder, or refuse them."""
    if not isinstance(split, Mapping):
        raise TypeError(
            f'split={split!r} has no names; pass such as {{"train": 0.9, "valid": 0.1}}'
        )
    for folder, fraction in split.items():
        if not fraction > 0:
            raise ValueError(f"split={dict(split)}: {folder!r} must be more than 0")
        if not isinstance(folder, str) or not re.fullmatch(r"[^._/\\][^/\\]*", folder):
            raise ValueError(
                f"split={dict(split)}: {folder!r} is not a name for a folder of data; "
                'pass names such as "train" and "valid"'
            )
    if abs(sum(split.values()) - 1) > 1e-9:
        raise ValueError(
            f"split={dict(split)} adds up to {sum(split.values()):g}; pass fractions that add up to 1"
        )
    return dict(split)


def _scatter(
    table: Files | Batches,
    plan: Plan,
    work: Workspace,
    pool: Executor,
    advance: Callable[[float], None],
) -> Done:
    """Run the first pass: tasks for files, but one in this thread for what only it can read."""
    if isinstance(table, Files):
        pieces = enumerate(table.cut(plan.task_rows))
        tasks = ((plan, work.scratch, index, table.fs, run) for index, run in pieces)
        done = _run(scatter_pieces, pool, tasks, advance)
    else:
        batches = table.read(plan.batch_rows, lambda n: advance(n / 2))
        with _as_stream_error("run it again, with a new iterator if the source was one"):
            done = scatter(plan, work.scratch, 0, batches)
    assert done.summary is not None
    dictionaries = done.summary.dictionaries()
    size = sum(values.nbytes for values in dictionaries.values())
    if size > plan.block_bytes:
        raise StreamError(
            f"dictionary columns {list(dictionaries)} have {size} bytes of distinct "
            f"values, memory_limit leaves {plan.block_bytes}; raise it, or decode them"
        )
    return done


def _make_writer(
    table: Files | Batches,
    plan: Plan,
    scattered: Done,
    parts: Sequence[Part],
    format: str,
    compression: str | None,
) -> Writer:
    """Return what writes the files, with a mark for each folder."""
    assert scattered.summary is not None
    summary, dictionaries = scattered.summary.finish(), scattered.summary.dictionaries()
    if format == "arrow":
        dictionaries = _find_levels(summary, plan.plain)
    fingerprint = digest(table.contents, summary.to_metadata())
    marks = {
        folder: PreshuffleMark(
            shuffle=digest(fingerprint, plan, format, compression, parts, folder),
            seed=plan.seed,
            source=table.name,
            fingerprint=fingerprint,
            n_rows=sum(part.n_rows for part in parts if part.folder == folder),
            n_files=sum(part.folder == folder for part in parts),
            index=0,
        )
        for folder in {part.folder: None for part in parts}
    }
    # Whoever reads a record batch waits for the interpreter lock a few times, whatever its size.
    batch_rows = min(2 * plan.row_group_rows, PIECE_ROWS)
    return Writer(plan.schema, dictionaries, summary, compression, marks, format, batch_rows)


def _find_levels(summary: Summary, plain: "pa.Schema") -> dict[str, "pa.Array"]:
    """Return the levels of all columns that are no numbers; refuse what has no code or number."""
    levels = {}
    for name, column in summary.items():
        ends = [0 if end is None else end for end in (column.min, column.max)]
        if column.nulls or not np.isfinite(ends).all():
            raise StreamError(
                f"column {name!r} holds {column.nulls} nulls or NaN, and {column.min} to "
                f'{column.max}; filter such rows, or pass format="parquet"'
            )
        if column.min is None:
            if column.levels is None:
                raise StreamError(
                    f"column {name!r} has more than 4,096 levels; leave it out with columns=[...], "
                    'or pass format="parquet"'
                )
            levels[name] = pa.array(column.levels, plain.field(name).type)
    return levels


def _run(
    function: Callable[..., Done],
    pool: Executor,
    tasks: Iterable[tuple],
    advance: Callable[[float], None],
    finish: Callable[[str], None] = lambda path: None,
) -> Done:
    """Run all tasks of a pass, and *finish* each file; after a failure no other task starts."""
    total, futures = Done(), deque[Future]()
    with _as_stream_error():
        try:
            for task in tasks:
                futures.append(pool.submit(function, *task))
            while futures:
                done = futures[0].result()
                futures.popleft()
                for path in done.paths:
                    finish(path)
                total.add(done)
                advance(done.rows / 2)  # every row is in two passes
        finally:
            for future in futures:
                future.cancel()
            wait(futures)
    return total


def _log_pass(verb: str, rows: int, start: float) -> float:
    """Tell of a pass that began at *start*, and return the time."""
    now = time.monotonic()
    rate = rows / max(now - start, 1e-9)
    _log.info(f"preshuffle {verb} {rows:,} rows in {now - start:.1f} s ({rate:,.0f} rows/s)")
    return now


@contextlib.contextmanager
def _as_stream_error(remedy: str = "run it again") -> Iterator[None]:
    try:
        yield
    except StreamError:
        raise
    except Exception as err:
        text = f"{type(err).__name__}: {str(err).strip().partition(chr(10))[0]}"
        if isinstance(err, CancelledError):
            text = "a task was cancelled, as when the scheduler of a cluster is lost"
        raise StreamError(
            f"preshuffle stopped ({text}); nothing was published; remove the cause and {remedy}"
        ) from err
