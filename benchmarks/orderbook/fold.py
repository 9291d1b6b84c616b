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

Memory is bounded: by two blocks of messages, one book (160 kB) for each market of a file, 21 bytes
for each row that waits for a label, and twice 262,144 rows shared among the markets that overlap
in time (1,024 for each beyond 256 of them).
Rows go to scratch files (21 bytes a row, beside the destination) until all of them are known.
After a kill, the same call goes on with the file that was being read.
"""

import contextlib
import pickle
import time
import zlib

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa

from benchmarks.harness import followed, published, run_command, write_files
from benchmarks.orderbook.book import (
    COUNTERS,
    DELTA,
    FEATURES,
    ROW,
    Book,
    Events,
    MessageError,
    close_ms,
)
from benchmarks.orderbook.reading import DamageError, Gap, Part, find_files, first_ms, read_parts

__all__ = ["FoldReport", "fold", "merged"]

NAMED = 10
MERGED_ROWS = 1 << 18
FEWEST_ROWS = 1 << 10
ORDER_BITS = 20
NEVER = np.iinfo(np.int64).max


class FoldReport(SimpleNamespace):
    """What a fold read, wrote and dropped, as numbers by name.

    Every delta and snapshot leaves one state of a book: it is one of the ``rows``, or it is dropped
    because no known change of the mid follows (``no_later_change``), a side of the book was empty
    (``one_sided``), the market had closed (``after_close``), or messages are missing since its last
    snapshot (``left_out``). ``others`` are messages that were passed over, by type, and
    ``findings`` files that were damaged and the first files in which a lost message showed.
    """

    def __str__(self) -> str:
        def told(*names: str) -> str:
            return ", ".join(f"{getattr(self, name):,} {name.replace('_', ' ')}" for name in names)

        lines = [
            f"{told('messages')} of {told('markets')} in {self.seconds:.1f} s "
            f"({self.messages / max(self.seconds, 1e-9):,.0f} a second)",
            f"  {told('deltas', 'snapshots', 'trades')}",
            f"  {told('rows')}",
            f"  dropped: {told('no_later_change', 'one_sided', 'after_close', 'left_out')}",
            f"  lost messages: {told('crossed', 'below_zero', 'gaps', 'holes')}",
            f"  {told('clock_set_back')}",
            *(f"  {n:,} passed over of type {kind}" for kind, n in self.others.items()),
            *(f"  {finding}" for finding in self.findings),
        ]
        return "\n".join(lines)


def fold(
    source: str | Path,
    destination: str | Path,
    *,
    workers: int = 2,
    keep_going: bool = False,
    overwrite: bool = False,
    progressbar: bool = True,
) -> FoldReport:
    """Fold the messages in *source* into Parquet files, named by time, in *destination*.

    The source is a directory of files of messages: ``.ndjson`` or ``.jsonl``, also with ``.gz`` or
    ``.zst``, of any markets in any folders, or ``<market>/<date>.parquet``. With two *workers*, a
    thread of its own reads ahead. With *keep_going*, damaged files are read to their last whole
    line; otherwise they are refused with a `MessageError` that names all of them, as are messages
    that are not in Kalshi's format or are there twice.
    """
    began = time.perf_counter()
    source, destination = Path(source), Path(destination)
    if source.resolve().is_relative_to(destination.resolve()):
        raise ValueError(f"destination must not contain the messages in {source}: {destination}")
    files = sorted(find_files(source), key=lambda file: (first_ms(file), file))
    with published(destination, overwrite=overwrite) as (content, scratch):
        folder = _Folder(scratch, keep_going)
        n_done = folder.resume(files)
        for file in followed(files[n_done:], "Folding messages", len(files) - n_done, progressbar):
            folder.fold(file, workers)
        report = folder.report()
        report.seconds = time.perf_counter() - began
        if not report.rows:
            raise ValueError(
                f"the messages in {source} make no row: no mid changes in them\n{report}"
            )
        write_files(merged(folder.rows()), content)
    report.seconds = time.perf_counter() - began
    return report


class _Folder:
    """The markets folded so far; after each file, what it changed is added to a log on the disk."""

    def __init__(self, scratch: Path, keep_going: bool) -> None:
        self._scratch = scratch
        self._keep_going = keep_going
        self._saved: dict[str, bytes] = {}
        self._live: dict[str, _Market] = {}
        self._others: Counter = Counter()
        self._findings: list[str] = []
        self._errors: list[str] = []

    def resume(self, files: list[Path]) -> int:
        """Take up the state after the last file that was read; return how many were."""
        with (self._scratch / "log").open("a+b") as log:
            log.seek(0)
            n_done = end = 0
            with contextlib.suppress(EOFError, pickle.UnpicklingError):
                for file in files:
                    signature, states, others, findings = pickle.load(log)
                    if signature != self._signature(file):
                        break
                    self._saved |= states
                    self._others, self._findings = others, findings
                    n_done, end = n_done + 1, log.tell()
            log.truncate(end)
        for state in self._saved.values():
            _load(state).cut()
        return n_done

    def fold(self, file: Path, workers: int) -> None:
        try:
            for part in _ahead(read_parts(file, salvage=self._keep_going), workers):
                if isinstance(part, Part):
                    self._market(part.market).fold(file, part)
                elif isinstance(part, Gap):
                    self._lose(file)
                else:
                    self._others.update(part)
        except DamageError as error:
            if self._keep_going:
                self._findings.append(str(error))
                self._lose(file)
            else:
                self._errors.append(str(error))
        except MessageError as error:
            self._errors.append(str(error))
        for name, market in self._live.items():
            if market.n_lost():
                self._findings.append(f"{file}: messages of {name} are missing")
        self._save(file)

    def report(self) -> FoldReport:
        if self._errors:
            raise MessageError("\n".join(self._errors))
        counts = Counter(dict.fromkeys(COUNTERS, 0))
        for state in self._saved.values():
            counts.update(_load(state).book.counts)
        made, rows = counts.pop("rows"), counts.pop("labelled")
        more = len(self._findings) - NAMED
        return FoldReport(
            markets=len(self._saved),
            rows=rows,
            no_later_change=made - rows,
            others=dict(self._others.most_common()),
            findings=(*self._findings[:NAMED], *[f"and {more:,} more files"] * (more > 0)),
            **counts,
        )

    def rows(self) -> list[Path]:
        """List the files of the markets that have rows, in the order of their names."""
        markets = [_load(self._saved[name]) for name in sorted(self._saved)]
        return [market.rows for market in markets if market.book.counts["labelled"]]

    def _market(self, name: str) -> "_Market":
        if name not in self._live:
            number = len({*self._saved, *self._live})
            state = self._saved.get(name)
            self._live[name] = _load(state) if state else _Market(name, self._scratch / str(number))
        return self._live[name]

    def _lose(self, file: Path) -> None:
        """Take messages to be missing in every market that *file* may hold."""
        for name, state in self._saved.items():
            if not self._live or _load(state).file.parent == file.parent:
                self._market(name)
        for market in self._live.values():
            market.book.lose()

    def _save(self, file: Path) -> None:
        states = {name: zlib.compress(pickle.dumps(m), 1) for name, m in self._live.items()}
        self._saved |= states
        self._live.clear()
        if not self._errors:
            with (self._scratch / "log").open("ab") as log:
                pickle.dump((self._signature(file), states, self._others, self._findings), log)

    def _signature(self, file: Path) -> tuple:
        return str(file), file.stat().st_size, file.stat().st_mtime_ns, self._keep_going


class _Market:
    """The book of one market, and the scratch file of its rows in order of time."""

    def __init__(self, name: str, path: Path) -> None:
        self.name = name
        self.book = Book(close_ms=close_ms(name))
        self.rows = path
        self.file = self._file_before = path
        self._first_ms = self._exchange_ms = self._exchange_ms_before = -1
        self._n_lost = 0
        path.unlink(missing_ok=True)

    def fold(self, file: Path, part: Part) -> None:
        self._follow(file, part.events)
        try:
            rows = self.book.fold(part.events, part.lines)
        except MessageError as error:
            raise MessageError(f"{file}, {error}") from None
        with self.rows.open("ab") as scratch:
            rows.tofile(scratch)

    def n_lost(self) -> int:
        """Return how many lost messages have shown since this was asked last."""
        counts, before = self.book.counts, self._n_lost
        self._n_lost = counts["crossed"] + counts["below_zero"] + counts["gaps"]
        return self._n_lost - before

    def cut(self) -> None:
        """Drop what was written to the scratch file after this state was saved."""
        with self.rows.open("ab") as scratch:
            scratch.truncate(self.book.counts["labelled"] * ROW.itemsize)

    def _follow(self, file: Path, events: Events) -> None:
        """Refuse a file whose messages are not later than those of the file before it."""
        again = False
        if file != self.file:
            again = events.recv_ms[0] == self._first_ms
            self.file, self._file_before = file, self.file
            self._first_ms, self._exchange_ms_before = events.recv_ms[0], self._exchange_ms
        exchange_ms = events.ts_ms[events.kind == DELTA]
        if again or (exchange_ms[:1] < self._exchange_ms_before).any():
            raise MessageError(
                f"{file} and {self._file_before} hold messages of {self.name} from the same time; "
                "take one of them away"
            )
        if len(exchange_ms):
            self._exchange_ms = max(self._exchange_ms, exchange_ms[-1])


def _load(state: bytes) -> _Market:
    return pickle.loads(zlib.decompress(state))


def _ahead(parts: Iterator, workers: int) -> Iterator:
    """Read the next part in a thread of its own while one is folded."""
    if workers == 1:
        yield from parts
        return
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, parts, None)
        while (part := coming.result()) is not None:
            coming = pool.submit(next, parts, None)
            yield part


def merged(markets: list[Path]) -> Iterator[pa.Table]:
    """Yield all rows by time; rows of the same time go by market, then as they came.

    The files are read in blocks, in the order of the blocks' first rows, so that rows before the
    first of the next block are complete.
    """
    n_rows = [market.stat().st_size // ROW.itemsize for market in markets]
    first = np.sort([_key(market, order, 0) for order, market in enumerate(markets)])
    last = np.sort([_key(market, order, n_rows[order] - 1) for order, market in enumerate(markets)])
    n_open = np.arange(1, len(markets) + 1) - np.searchsorted(last, first)
    n = max(FEWEST_ROWS, MERGED_ROWS // int(n_open.max()))
    blocks = sorted(
        (_key(market, order, start), order, start)
        for order, market in enumerate(markets)
        for start in range(0, n_rows[order], n)
    )
    pool, n_pooled, n_kept = [np.empty(0, ROW)], 0, 0
    for (_, order, start), next_key in zip(blocks, [*(key for key, *_ in blocks[1:]), NEVER]):
        pool.append(_read(markets[order], order, start, n))
        n_pooled += len(pool[-1])
        # Sorting so many at a time takes a time that does not grow with the number of markets.
        if n_pooled > 2 * max(n_kept, MERGED_ROWS) or next_key == NEVER:
            rows = np.concatenate(pool)
            rows = rows[np.argsort(rows["recv_ms"], kind="stable")]
            cut = int(np.searchsorted(rows["recv_ms"], next_key))
            yield pa.table({name: rows[name][:cut].copy() for name in (*FEATURES, "up")})
            pool, n_pooled, n_kept = [rows[cut:]], len(rows) - cut, len(rows) - cut


def _key(market: Path, order: int, at: int) -> int:
    """Return the time of one row, then the order of its market, as one number."""
    return int(_read(market, order, at, 1)["recv_ms"][0])


def _read(market: Path, order: int, start: int, n: int) -> np.ndarray:
    rows = np.fromfile(market, ROW, n, offset=start * ROW.itemsize)
    rows["recv_ms"] = rows["recv_ms"] << ORDER_BITS | order
    return rows


if __name__ == "__main__":
    run_command(fold)
