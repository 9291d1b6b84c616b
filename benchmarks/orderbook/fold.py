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

"""Fold order-book messages into a table of features, sorted by time.

    python -m benchmarks.orderbook.fold MESSAGES ROWS

Each delta or snapshot that leaves a book with two sides becomes a row: the columns ``mid``,
``spread`` and ``imbalance`` (float32) and ``up`` (int8), which is 1 if the next change of the
market's mid is upward and 0 if it is downward. Rows of all markets are merged by time of receipt.
A table in this order is not one to stream in small windows: shuffle it first.

Memory is bounded: by a block of messages for each worker, then by the rows of one file and 262,144
rows shared among the markets that overlap in time (1,024 for each beyond 256 of them).
The label of a row may be known only at the end of its market, so the rows of each market go to
scratch files (21 bytes a row, beside the destination) and are merged from there.
"""

import argparse
import math
import sys
import time

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rich.progress import Progress

from benchmarks.orderbook.book import ROW, Book
from benchmarks.orderbook.messages import close_ms, find_markets, read_events
from benchmarks.orderbook.publish import bar, published

__all__ = ["FoldReport", "fold", "main"]

COLUMNS = ("mid", "spread", "imbalance", "up")
LABELLED = np.dtype([*ROW.descr, ("up", "i1")])

MERGED_ROWS = 1 << 18
FEWEST_ROWS = 1 << 10
LABEL_BLOCK = 1 << 20


@dataclass(frozen=True, slots=True)
class FoldReport:
    """What a fold read, wrote and dropped.

    Every delta and snapshot leaves one state of a book:
    it is a row, or one of the states dropped for the reasons counted here.
    """

    markets: int
    """Markets read."""
    messages: int
    """Messages read: deltas, snapshots and trades."""
    deltas: int
    """Changes of one level."""
    snapshots: int
    """Whole books."""
    trades: int
    """Trades; they leave no state."""
    rows: int
    """Rows written."""
    no_later_change: int
    """States dropped because the mid of their market did not change any more."""
    one_sided: int
    """States dropped because a side of the book was empty."""
    crossed: int
    """States dropped because the bid was not below the ask."""
    after_close: int
    """States dropped because their market had closed."""
    clock_set_back: int
    """Messages received earlier than the one before them; their row takes the later time."""
    seconds: float
    """Duration."""

    def __str__(self) -> str:
        rate = self.messages / max(self.seconds, 1e-9)
        return (
            f"{self.messages:,} messages of {self.markets:,} markets in {self.seconds:.1f} s "
            f"({rate:,.0f} a second)\n"
            f"  {self.deltas:,} deltas, {self.snapshots:,} snapshots, {self.trades:,} trades\n"
            f"  {self.rows:,} rows\n"
            f"  dropped: {self.no_later_change:,} without a later change of the mid, "
            f"{self.one_sided:,} with a one-sided book, {self.crossed:,} with a crossed one, "
            f"{self.after_close:,} after the close\n"
            f"  clock set back: {self.clock_set_back:,} times"
        )


def fold(
    source: str | Path,
    destination: str | Path,
    *,
    rows_per_file: int = 1_000_000,
    workers: int = 2,
    overwrite: bool = False,
    progressbar: bool = True,
) -> FoldReport:
    """Fold the messages in *source* into Parquet files in *destination*.

    Parameters
    ----------
    source : str or Path
        Directory of ``<market>/<date>.ndjson.gz`` or ``<market>/<date>.parquet``.
    destination : str or Path
        Directory that appears when all of its files are complete.
        The names of the files sort by time.
    rows_per_file : int
        Rows of each file but the last.
    workers : int
        Markets read at the same time.
    overwrite : bool
        Replace *destination* if it exists.
    progressbar : bool
        Show the progress.

    Returns
    -------
    FoldReport

    Raises
    ------
    MessageError
        Where a message is not in Kalshi's format or contradicts the book.
    """
    began = time.perf_counter()
    if rows_per_file < 1:
        raise ValueError(f"rows_per_file must be at least 1, got {rows_per_file}")
    source, destination = Path(source), Path(destination)
    if source.resolve().is_relative_to(destination.resolve()):
        raise ValueError(f"destination must not contain the messages in {source}: {destination}")
    files = find_markets(source)
    with published(destination, overwrite=overwrite) as (content, scratch):
        with bar(progressbar) as progress:
            markets = _fold_markets(files, scratch, workers, progress)
            n_rows = sum(market.n_rows for market in markets)
            if n_rows == 0:
                raise ValueError(f"the messages in {source} make no row: no mid changes in them")
            pieces = _merged([market for market in markets if market.n_rows])
            _write_files(pieces, content, rows_per_file, progress, n_rows)
    return _report(markets, n_rows, time.perf_counter() - began)


@dataclass(frozen=True, slots=True)
class _Market:
    """The rows of one market in its scratch files."""

    order: int
    """Place of the market among all, by name."""
    rows: Path
    """File of its rows, of type `ROW`."""
    up: Path
    """File of the labels of those rows, as far as they have one."""
    counts: dict[str, int]
    """What its book counted."""

    @property
    def n_rows(self) -> int:
        return self.up.stat().st_size

    @property
    def first_ms(self) -> int:
        return int(np.fromfile(self.rows, ROW, 1)["recv_ms"][0])


def _fold_markets(
    markets: dict[str, list[Path]], scratch: Path, workers: int, progress: Progress
) -> list[_Market]:
    n_bytes = sum(file.stat().st_size for files in markets.values() for file in files)
    task = progress.add_task("Folding messages", total=n_bytes)

    def fold_one(order: int, market: str, files: list[Path]) -> _Market:
        book = Book(close_ms=close_ms(market))
        paths = scratch / f"{order}.rows", scratch / f"{order}.up"
        with paths[0].open("wb") as rows_file, paths[1].open("wb") as up_file:
            for n_read in _fold_files(book, files, rows_file, up_file):
                progress.advance(task, n_read)
        return _Market(order, *paths, book.counts)

    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(fold_one, range(len(markets)), markets.keys(), markets.values()))


def _fold_files(
    book: Book, files: list[Path], rows_file: BinaryIO, up_file: BinaryIO
) -> Iterator[int]:
    """Write rows and, as soon as they are known, their labels; yield the bytes read."""
    for file in files:
        book.start(file)
        so_far = 0
        for events, consumed in read_events(file):
            n_before = book.waiting
            rows, up, up_before = book.fold(events)
            rows.tofile(rows_file)
            if up_before >= 0:
                _write_repeated(up_file, up_before, n_before)
            up.tofile(up_file)
            yield consumed - so_far
            so_far = consumed


def _write_repeated(file: BinaryIO, label: int, n_times: int) -> None:
    """Write in pieces: all rows of a market may have waited for one change."""
    for start in range(0, n_times, LABEL_BLOCK):
        file.write(bytes([label]) * min(LABEL_BLOCK, n_times - start))


def _merged(markets: list[_Market]) -> Iterator[np.ndarray]:
    """Yield all rows by time; rows of the same time go by market, then as they came."""
    later = sorted(markets, key=lambda market: market.first_ms, reverse=True)
    cursors: list[_Cursor] = []
    while cursors or later:
        share = max(FEWEST_ROWS, MERGED_ROWS // (len(cursors) + 1))
        until = min((cursor.fill(share) for cursor in cursors), default=(math.inf, 0))
        if later and later[-1].first_ms <= until[0]:
            cursors.append(_Cursor(later.pop()))
            cursors.sort(key=lambda cursor: cursor.order)
            continue
        rows = np.concatenate([cursor.take(*until) for cursor in cursors])
        yield rows[np.argsort(rows["recv_ms"], kind="stable")]
        cursors = [cursor for cursor in cursors if cursor.n_left]


class _Cursor:
    """A place in the rows of one market, and the rows read from there on."""

    def __init__(self, market: _Market) -> None:
        self.order = market.order
        self._market = market
        self._n_read = 0
        self._rows = np.empty(0, LABELLED)

    @property
    def n_left(self) -> int:
        return self._market.n_rows - self._n_read + len(self._rows)

    def fill(self, n_rows: int) -> tuple[int, int]:
        """Read up to *n_rows* rows if none are held; give the sorting key of the last one held."""
        if not len(self._rows):
            at, market = self._n_read, self._market
            up = np.fromfile(market.up, np.int8, n_rows, offset=at)
            rows = np.fromfile(market.rows, ROW, len(up), offset=at * ROW.itemsize)
            self._rows = np.empty(len(up), LABELLED)
            for name in ("recv_ms", *COLUMNS[:-1]):
                self._rows[name] = rows[name]
            self._rows["up"] = up
            self._n_read += len(up)
        return int(self._rows["recv_ms"][-1]), self.order

    def take(self, until_ms: float, until_order: int) -> np.ndarray:
        """Give away the rows that sort up to the key (*until_ms*, *until_order*)."""
        side: Literal["left", "right"] = "right" if self.order <= until_order else "left"
        cut = np.searchsorted(self._rows["recv_ms"], until_ms, side)
        taken, self._rows = self._rows[:cut], self._rows[cut:]
        return taken


def _write_files(
    pieces: Iterator[np.ndarray],
    directory: Path,
    rows_per_file: int,
    progress: Progress,
    n_rows: int,
) -> None:
    task = progress.add_task("Merging rows", total=n_rows)
    for number, rows in enumerate(_regrouped(pieces, rows_per_file)):
        columns = {name: np.ascontiguousarray(rows[name]) for name in COLUMNS}
        pq.write_table(
            pa.table(columns), directory / f"part-{number:05}.parquet", compression="zstd"
        )
        progress.advance(task, len(rows))


def _regrouped(pieces: Iterator[np.ndarray], n_rows: int) -> Iterator[np.ndarray]:
    """Cut and join *pieces* to *n_rows* rows each, the last as short as it comes."""
    held: list[np.ndarray] = []
    n_held = 0
    for piece in pieces:
        while n_held + len(piece) >= n_rows:
            cut = n_rows - n_held
            yield np.concatenate([*held, piece[:cut]])
            held, n_held, piece = [], 0, piece[cut:]
        held.append(piece)
        n_held += len(piece)
    if n_held:
        yield np.concatenate(held)


def _report(markets: list[_Market], n_rows: int, seconds: float) -> FoldReport:
    counts = {name: sum(m.counts[name] for m in markets) for name in markets[0].counts}
    made = counts.pop("rows")
    return FoldReport(
        markets=len(markets),
        rows=n_rows,
        no_later_change=made - n_rows,
        seconds=seconds,
        **counts,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.orderbook.fold",
        description="Fold order-book messages into rows.",
    )
    parser.add_argument("source", type=Path, help="directory of messages")
    parser.add_argument("destination", type=Path, help="directory of Parquet files to make")
    parser.add_argument("--rows-per-file", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int, default=2, help="markets read at the same time")
    parser.add_argument("--overwrite", action="store_true", help="replace the destination")
    parser.add_argument("--quiet", action="store_true", help="show no progress and no report")
    options = vars(parser.parse_args(arguments))
    quiet = options.pop("quiet")
    try:
        report = fold(**options, progressbar=not quiet)
    except (OSError, ValueError) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    if not quiet:
        sys.stdout.write(f"{report}\n")


if __name__ == "__main__":
    main()
