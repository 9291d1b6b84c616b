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
import os
import time

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pymc.variational._streaming.errors import StreamError
from pymc.variational._streaming.preshuffle.passes import Done, gather, scatter
from pymc.variational._streaming.preshuffle.plan import (
    Plan,
    cut_files,
    is_unchanged,
    make_plan,
    parse_bytes,
)
from pymc.variational._streaming.preshuffle.publish import open_workspace, publish
from pymc.variational._streaming.sources.parquet.files import ParquetInput, import_pyarrow, is_local
from pymc.variational._streaming.sources.parquet.paths import Paths, resolve, stands_for
from pymc.variational._streaming.utils import draw_seed, positive_int, progress_bar

if TYPE_CHECKING:
    import pyarrow.fs

__all__ = ["PreshuffleReport", "preshuffle"]

_CODECS = ("lz4", "zstd", "snappy", "gzip", "brotli")


@dataclass(frozen=True, slots=True)
class PreshuffleReport:
    """What a shuffle did."""

    rows: int
    piles: int
    """Partitions that were each permuted by itself; a file of the result holds some of them."""
    bytes_read: int
    """From source and scratch."""
    bytes_written: int
    """To scratch and destination."""
    seconds: float
    peak_memory: int
    """Largest resident size of any process that took part, in bytes, with all that was in it."""
    destination: str

    def __str__(self) -> str:
        return (
            f"{self.destination}: {self.rows:,} rows shuffled in {self.piles} partitions, "
            f"{self.bytes_read / 1e9:.2f} GB read, {self.bytes_written / 1e9:.2f} GB written, "
            f"{self.seconds:.1f} s ({self.rows / self.seconds:,.0f} rows/s), "
            f"peak memory {self.peak_memory / 1e9:.2f} GB"
        )


def preshuffle(
    source: Paths,
    destination: str | os.PathLike,
    *,
    seed: int,
    columns: Sequence[str] | None = None,
    memory_limit: int | str = "512MB",
    scratch: str | os.PathLike | None = None,
    executor: Executor | None = None,
    filesystem: Any = None,
    compression: str = "lz4",
    row_group_size: int | None = None,
    overwrite: bool = False,
    progressbar: bool = True,
) -> PreshuffleReport:
    """Write all rows of Parquet files in uniformly random order.

    Parameters
    ----------
    source : path_like or sequence of path_like
        A Parquet file, a directory, a glob, or a list of these; local or a URI.
    destination : path_like
        A directory for the result; local or a URI. It appears when all is done, at once.
    seed : int
        Seed of the permutation. The same source, seed and memory limit give the same files.
    columns : sequence of str, optional
        The columns to keep. Default: all.
    memory_limit : int or str, default "512MB"
        By how much the memory of each process may grow, in bytes or as "512MB" or "2GiB".
    scratch : path_like, optional
        A directory or URI, which all workers reach, for rows between the two passes, and for a
        result that is uploaded. Default: beside a local *destination*, else the directory for
        temporary files.
    executor : concurrent.futures.Executor, optional
        Runs the tasks: threads, processes, or a cluster, such as Dask's
        ``client.get_executor()``. Default: a thread per core, at most four.
    filesystem : pyarrow.fs.FileSystem or fsspec filesystem, optional
        Where *source* and *destination* are, if they are not local and no URIs.
    compression : str, default "lz4"
        Codec of the result. lz4 costs the least when the rows are streamed.
    row_group_size : int, optional
        Largest number of rows in a row group. Default: at most 8 MB of them, and 262,144, what a
        source reads at a time.
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
        If a source file changes or cannot be read, another run writes to *destination*, or a disk
        fails. Nothing is published then, and nothing is left: the same call starts over.

    Notes
    -----
    Every row gets an independent random partition in a first pass over the source; a second pass
    permutes each partition in memory. All permutations are equally likely. All columns keep their
    types, except that the indices of dictionary columns are at least int32, and the schema its
    metadata.

    Rows between the passes and pages of the result carry checksums, which are verified when they
    are read. Before the result appears, the number of its rows is compared with that of the source.

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
    if compression not in _CODECS or not import_pyarrow().Codec.is_available(compression):
        raise ValueError(f"compression={compression!r} is not available; pass one of {_CODECS}")
    if row_group_size is not None:
        positive_int("row_group_size", row_group_size)
    plan, files = make_plan(
        source,
        columns,
        filesystem,
        seed=draw_seed(seed),
        memory_limit=parse_bytes(memory_limit),
        compression=compression,
        row_group_size=row_group_size,
    )
    fs, path = resolve(destination, filesystem)
    if is_local(plan.fs) == is_local(fs):
        _refuse_overlap(source, filesystem, files, fs, path)
    n_rows = plan.mark.n_rows
    threads = min(plan.at_once, os.cpu_count() or 1)
    with (
        open_workspace(fs, path, scratch=scratch, overwrite=overwrite) as work,
        ThreadPoolExecutor(threads)
        if executor is None
        else contextlib.nullcontext(executor) as pool,
        progress_bar("Shuffling", n_rows, show=progressbar) as advance,
    ):
        pieces = enumerate(cut_files(files, plan.task_rows))
        scattered = _run(scatter, pool, [(plan, work, *piece) for piece in pieces], advance)
        _require_small(scattered, plan)
        shared = len(scattered.paths), scattered.dictionaries
        parts = range(plan.mark.n_files)
        gathered = _run(gather, pool, [(plan, work, part, *shared) for part in parts], advance)
        if not n_rows == scattered.rows == gathered.rows:
            raise StreamError(
                f"the source has {n_rows} rows, {scattered.rows} were read, "
                f"{gathered.rows} are in the result; nothing was published; "
                "check the disk and run preshuffle again"
            )
        if not is_unchanged(plan.fs, files, source, filesystem):
            raise StreamError(
                f"source={plan.mark.source!r} changed while it was being shuffled; "
                "nothing was published; run preshuffle again when it is at rest"
            )
        publish(work, gathered.paths)
    return PreshuffleReport(
        rows=n_rows,
        piles=plan.n_partitions,
        bytes_read=sum(file.size for file in files) + scattered.bytes,
        bytes_written=scattered.bytes + gathered.bytes,
        seconds=time.monotonic() - start,
        peak_memory=max(scattered.peak, gathered.peak),
        destination=path,
    )


def _run(
    function: Callable[..., Done],
    pool: Executor,
    tasks: list[tuple],
    advance: Callable[[float], None],
) -> Done:
    """Run all tasks of a pass; if one fails, those that have not started never do."""
    total, futures = Done(), deque[Future]()
    try:
        for task in tasks:
            futures.append(pool.submit(function, *task))
        while futures:
            done = futures[0].result()
            futures.popleft()
            total.add(done)
            advance(done.rows / 2)  # every row is in two passes
        return total
    except BaseException as err:
        for future in futures:
            future.cancel()
        wait(futures)
        if isinstance(err, StreamError) or not isinstance(err, Exception):
            raise
        text = f"{type(err).__name__}: {str(err).strip().partition(chr(10))[0]}"
        raise StreamError(
            f"preshuffle stopped ({text}); nothing was published; remove the cause and run it again"
        ) from err


def _require_small(scattered: Done, plan: Plan) -> None:
    """Refuse dictionaries that a task of the second pass could not hold."""
    size = sum(values.nbytes for values in scattered.dictionaries.values())
    if size > plan.block_bytes:
        raise StreamError(
            f"dictionary columns {list(scattered.dictionaries)} have {size} bytes of distinct "
            f"values, memory_limit leaves {plan.block_bytes}; raise it, or decode them"
        )


def _refuse_overlap(
    source: Paths,
    filesystem: Any,
    files: list[ParquetInput],
    fs: "pyarrow.fs.FileSystem",
    path: str,
) -> None:
    """Refuse to write where the source is read, or where a glob would look for it next time."""
    real = os.path.realpath if is_local(fs) else str
    entries = [source] if isinstance(source, str | os.PathLike) else source
    roots = [real(resolve(entry, filesystem)[1]) for entry in entries]
    place = real(path)
    inside = [
        root
        for root in roots
        if _is_inside(place, root) or stands_for(fs, root, f"{place}/part.parquet")
    ]
    below = [file.path for file in files if _is_inside(real(file.path), place)]
    if inside or below:
        raise ValueError(
            f"destination={path!r} overlaps with source={(inside + below)[0]!r}; "
            "write to a directory outside it"
        )


def _is_inside(path: str, folder: str) -> bool:
    return f"{path.strip('/')}/".startswith(f"{folder.strip('/')}/")
