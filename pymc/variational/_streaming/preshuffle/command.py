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

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, Task, TimeRemainingColumn
from rich.text import Text

from pymc.progress_bar import CustomProgress
from pymc.variational._streaming.errors import StreamError
from pymc.variational._streaming.preshuffle.passes import Passes, add_checksums
from pymc.variational._streaming.preshuffle.plan import (
    Plan,
    Table,
    make_plan,
    open_table,
    parse_bytes,
)
from pymc.variational._streaming.preshuffle.staging import Staging, open_staging
from pymc.variational._streaming.preshuffle.tasks import Gathered, Scattered
from pymc.variational._streaming.sources.base import positive_int
from pymc.variational._streaming.sources.parquet.files import import_pyarrow, is_local
from pymc.variational._streaming.sources.parquet.paths import Paths, resolve, stands_for

if TYPE_CHECKING:
    import pyarrow.fs

__all__ = ["PreshuffleReport", "preshuffle"]

_CODECS = ("lz4", "zstd", "snappy", "gzip", "brotli")


@dataclass(frozen=True, slots=True)
class PreshuffleReport:
    """What a shuffle did."""

    rows: int
    piles: int
    """Parts that were each permuted in memory by itself; a file of the result holds some of them."""
    bytes_read: int
    """From source and scratch."""
    bytes_written: int
    """To scratch and destination."""
    seconds: float
    peak_memory: int
    """Bytes: largest resident size of any process that took part, with all that was in it."""
    destination: str

    def __str__(self) -> str:
        return (
            f"{self.destination}: {self.rows:,} rows shuffled in {self.piles} piles, "
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
        Of the permutation. The same source, seed and memory limit give the same files.
    columns : sequence of str, optional
        The columns to keep. Default: all.
    memory_limit : int or str, default "512MB"
        By how much the memory of each process may grow, in bytes or as "512MB" or "2GiB".
    scratch : path_like, optional
        A directory or URI for rows between the two passes, which takes as much room as the
        rows uncompressed. All workers must reach it. Default: beside the destination.
    executor : concurrent.futures.Executor, optional
        Runs the tasks: threads, processes, or a cluster, such as Dask's
        ``client.get_executor()``. Default: a thread per core, at most four.
    filesystem : pyarrow.fs.FileSystem or fsspec filesystem, optional
        Where *source* and *destination* live, if they are not local and no URIs.
    compression : str, default "lz4"
        Codec of the result. lz4 costs the least when the rows are streamed.
    row_group_size : int, optional
        Rows. Default: at most 8 MB of them, and 262,144, what a source reads at a time.
    overwrite : bool, default False
        Replace what is at *destination*, after the new rows are verified; on filesystems other
        than local ones, the old files are deleted before the work.
    progressbar : bool, default True

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
        If a source file changes meanwhile or cannot be read, another run writes to
        *destination*, the disk is full, or the rows that were written are not those that were
        read. Finished tasks are kept: the same call goes on from there.

    Notes
    -----
    Every row gets an independent random pile in a first pass over the source; a second pass
    permutes each pile in memory. All permutations are equally likely. All columns keep their
    types, except that the indices of dictionary columns are at least int32, and the schema its
    metadata.

    The number of rows and an order-independent checksum over all their values, as they were
    read from the source and as they were handed to the writers of the result, are compared
    before the result appears. The pages of its files carry checksums of their own, which
    :func:`parquet_source` verifies.

    References
    ----------
    Rao, C. R. (1961). Generation of random permutations of given number of elements using
    random sampling numbers. Sankhya A 23, 305-307.
    Sandelius, M. (1962). A simple randomization procedure. Journal of the Royal Statistical
    Society B 24, 472-481.

    Examples
    --------
    >>> import pyarrow as pa
    >>> import pyarrow.parquet as pq
    >>> pq.write_table(pa.table({"time": range(1_000)}), "ordered.parquet")
    >>> preshuffle("ordered.parquet", "shuffled", seed=0, progressbar=False).rows
    1000
    """
    start = time.monotonic()
    _check_arguments(seed, columns, compression, row_group_size)
    table = open_table(source, columns, filesystem)
    fs, path = resolve(destination, filesystem)
    _check_overlap(source, filesystem, table, fs, path)
    plan = make_plan(
        table,
        seed=int(seed),
        memory_limit=parse_bytes(memory_limit),
        compression=compression,
        row_group_size=row_group_size,
    )
    room = None if scratch is None else os.fspath(scratch)
    with (
        open_staging(fs, path, overwrite=overwrite) as staging,
        _progress(plan, progressbar) as advance,
        _own_or(executor, plan) as pool,
    ):
        staging.resume(plan.shuffle + table.identity, room)
        passes = Passes(plan, staging, pool, advance, *staging.scratch(room))
        scattered, gathered = passes.run()
        _verify(plan, scattered, gathered, staging)
        _check_unchanged(table, source, columns, filesystem)
        staging.clear_scratch(room)
        staging.publish({passes.place(i)[0]: result.size for i, result in gathered.items()})
    return _report(plan, scattered, gathered, time.monotonic() - start, path)


def _check_arguments(
    seed: int, columns: Sequence[str] | None, compression: str, row_group_size: int | None
) -> None:
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or seed < 0:
        raise ValueError(f"seed={seed!r} must be a non-negative integer")
    if isinstance(columns, str):
        raise TypeError(f"columns={columns!r} is a string; pass a list of names")
    if compression not in _CODECS or not import_pyarrow().Codec.is_available(compression):
        raise ValueError(f"compression={compression!r} is not available; pass one of {_CODECS}")
    if row_group_size is not None:
        positive_int("row_group_size", row_group_size)


def _check_overlap(
    source: Paths, filesystem: Any, table: Table, fs: "pyarrow.fs.FileSystem", path: str
) -> None:
    """Refuse to write where the source is read, or where a glob would look for it next time."""
    if not table.fs.equals(fs) and not _sees(fs, table):
        return
    real = os.path.realpath if is_local(fs) else str
    entries = [source] if isinstance(source, str | os.PathLike) else source
    roots = [real(resolve(entry, filesystem)[1]) for entry in entries]
    place = real(path)
    inside = [
        root
        for root in roots
        if _is_inside(place, root) or stands_for(fs, root, f"{place}/part.parquet")
    ]
    below = [file for file in table.paths if _is_inside(real(file), place)]
    if inside or below:
        raise ValueError(
            f"destination={path!r} overlaps with source={(inside + below)[0]!r}; "
            "write to a directory outside it"
        )


def _sees(fs: "pyarrow.fs.FileSystem", table: Table) -> bool:
    """Whether a filesystem has the source too: one bucket can be opened in many ways."""
    first = table.files[0]
    try:
        return fs.get_file_info(first.path).size == first.size
    except (OSError, ValueError):  # its paths look different
        return False


def _is_inside(path: str, folder: str) -> bool:
    return f"{path.strip('/')}/".startswith(f"{folder.strip('/')}/")


def _verify(
    plan: Plan,
    scattered: dict[int, Scattered],
    gathered: dict[int, Gathered],
    staging: Staging,
) -> None:
    """Check that the rows that were written are those that were read."""
    rows = sum(result.rows for result in gathered.values())
    read, written = add_checksums(scattered.values()), add_checksums(gathered.values())
    if rows != plan.table.n_rows or read != written:
        staging.discard()
        raise StreamError(
            f"{rows} rows with checksum {written:016x} were written, {plan.table.n_rows} with "
            f"{read:016x} were read; scratch or destination is not reliable, "
            "nothing was published; check the disk and run preshuffle again"
        )


def _check_unchanged(
    table: Table, source: Paths, columns: Sequence[str] | None, filesystem: Any
) -> None:
    """Check that the source still is what was shuffled."""
    if open_table(source, columns, filesystem).identity != table.identity:
        raise StreamError(
            f"source={table.name!r} changed while it was being shuffled; "
            "nothing was published; run preshuffle again when it is at rest"
        )


def _report(
    plan: Plan,
    scattered: dict[int, Scattered],
    gathered: dict[int, Gathered],
    seconds: float,
    destination: str,
) -> PreshuffleReport:
    between = sum(result.piles.size for result in scattered.values())
    written = sum(result.size for result in gathered.values())
    peaks = [r.peak for r in scattered.values()] + [r.peak for r in gathered.values()]
    return PreshuffleReport(
        rows=plan.table.n_rows,
        piles=plan.n_piles,
        bytes_read=sum(file.size for file in plan.table.files) + between,
        bytes_written=between + written,
        seconds=seconds,
        peak_memory=max(peaks),
        destination=destination,
    )


@contextlib.contextmanager
def _own_or(executor: Executor | None, plan: Plan) -> Iterator[Executor]:
    """Use the caller's executor, or threads of our own."""
    if executor is not None:
        yield executor
        return
    with ThreadPoolExecutor(min(plan.at_once, os.cpu_count() or 1)) as pool:
        yield pool


@contextlib.contextmanager
def _progress(plan: Plan, progressbar: bool) -> Iterator[Callable[[int], None]]:
    """Show how many rows are through both passes, how fast, and how long it will take."""
    bar = CustomProgress(
        "[progress.description]{task.description}",
        BarColumn(),
        "[progress.percentage]{task.percentage:>3.0f}%",
        _RowsPerSecond(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not progressbar,
    )
    with bar:
        task = bar.add_task("Shuffling", total=plan.table.n_rows)
        yield lambda rows: bar.advance(task, rows / 2)


class _RowsPerSecond(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed or 0:,.0f} rows/s")
