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
"""Read Kalshi's order-book messages from files.

>>> for file in find_files(directory):
...     for part in read_parts(file):
...         book.fold(part.events, part.lines)

A file holds one JSON message a line, plain or compressed, of any number of markets, or, as Parquet
with the columns of `Events`, those of the market that its directory is named after.
Prices and sizes never pass through floating point where they are written as strings.
"""

import contextlib
import json
import re
import zlib

from collections import Counter
from collections.abc import Callable, Iterator
from decimal import Decimal
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from benchmarks.orderbook.book import (
    DELTA,
    EVENT_SCHEMA,
    LEVEL,
    NO,
    SNAPSHOT,
    TRADE,
    YES,
    Events,
    MessageError,
)

__all__ = ["DamageError", "Part", "find_files", "first_ms", "read_parts"]

TYPES = pa.array(["orderbook_delta", "orderbook_snapshot", "trade"])
SIDES = pa.array(["yes", "no"])
PRICE, SIZE = pa.decimal128(18, 4), pa.decimal128(18, 2)
FORMATS = re.compile(r"\.parquet$|\.(ndjson|jsonl)(\.gz|\.zst)?$")
CODECS = {".gz": "gzip", ".zst": "zstd"}
GZIP = import_module("isal.igzip" if find_spec("isal") else "gzip")
UNREADABLE = pa.ArrowException, OSError, EOFError, UnicodeError, zlib.error
BLOCK_BYTES, PIECE_BYTES = 1 << 24, 1 << 18
NEWLINE = ord("\n")
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
BLOCK_EVENTS = 1 << 16
LATEST_MS = 1 << 43
SECONDS = 10**9, 10**10
"""Times between them are seconds since 1970, of the years 2001 to 2286."""
LOSSY = 1_000
"""A subscription is wholly in a file if its numbers skip once in so many messages at most."""


BODY = {"market_ticker": "VARCHAR", "side": "VARCHAR", "ts_ms": "DOUBLE"}
BODY |= {"price_dollars": "VARCHAR", "delta_fp": "VARCHAR"}
EVENT = {"type": "VARCHAR", "seq": "BIGINT", "msg": BODY}
STRUCTURE = json.dumps({"recv_ms": "DOUBLE", "event": EVENT})
TIMES = "ts_ms", "recv_ms"
UNREAD = r'(?i)"type"\s*:\s*"orderbook_'
FLATTEN = f"unnest(json_transform(line, '{STRUCTURE}'), recursive := true)"


class DamageError(MessageError):
    """A file that cannot be read to its end."""


class Part(NamedTuple):
    """Consecutive messages of one market in a file."""

    market: str
    events: Events
    lines: np.ndarray
    """int64, the number of each event's line in the file, or of its row in a Parquet file."""
    others: Counter
    """Types of messages passed over since the last part."""
    gap: bool
    """Whether messages of the file's subscription are missing before this part."""


def find_files(directory: str | Path) -> list[Path]:
    """List the message files below *directory*; hidden ones, such as ``._`` files, are not."""
    directory = Path(directory)
    found = sorted(file for file in directory.rglob("*") if file.is_file())
    visible = [file for file in found if not file.name.startswith(".")]
    files = [file for file in visible if FORMATS.search(file.name)]
    if not files:
        kinds = Counter("".join(file.suffixes[-2:]) or file.name for file in visible)
        holds = ", ".join(f"{n} {kind}" for kind, n in kinds.most_common(5)) or "no files"
        raise FileNotFoundError(
            f"no messages in {directory}; pass a directory of .ndjson or .jsonl files, "
            f"also as .gz or .zst, or .parquet; it holds {holds}"
        )
    return files


def first_ms(path: Path) -> int:
    """Return the time of receipt of the first messages, by which files are read in order."""
    try:
        if path.suffix == ".parquet":
            with pq.ParquetFile(path) as file:
                (time,) = next(file.iter_batches(1, columns=["recv_ms"]))["recv_ms"].to_pylist()
            return time or 0
        with _opened(path) as file:
            found = re.search(rb'"recv_ms"\s*:\s*"?(\d+)', file.read(1 << 16))
        return int(found[1]) if found else 0
    except (*UNREADABLE, KeyError, StopIteration):
        return 0  # reading it tells what is wrong


def read_parts(path: Path, *, salvage: bool = False) -> Iterator[Part]:
    """Read one file of messages in bounded memory.

    Parameters
    ----------
    path : Path
        File of messages.
    salvage : bool
        Read a damaged file to its last whole line before the error is raised.

    Raises
    ------
    DamageError
        Where the file cannot be read on.
    MessageError
        Where a message of an order book is not in Kalshi's format.
    """
    try:
        yield from _read_parquet(path) if path.suffix == ".parquet" else _read_json(path, salvage)
    except UNREADABLE as error:
        raise DamageError(f"{path} is damaged or cut short: {error}") from error


def _read_parquet(path: Path) -> Iterator[Part]:
    n_before = 0
    with pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 16) as file:
        if not file.schema_arrow.equals(EVENT_SCHEMA):
            columns = EVENT_SCHEMA.to_string(), file.schema_arrow.to_string()
            raise MessageError("{} must have the columns {}, it has {}".format(path, *columns))
        for batch in file.iter_batches(BLOCK_EVENTS, use_threads=False):
            if any(column.null_count for column in batch.columns):
                raise MessageError(f"{path}: no column must hold nulls")
            lines = np.arange(n_before + 1, n_before + len(batch) + 1)
            n_before += len(batch)
            events = Events(*(column.to_numpy() for column in batch.columns))
            _check_times(path, lines, recv_ms=events.recv_ms, ts_ms=events.ts_ms)
            yield Part(path.parent.name, events, lines, Counter(), False)


def _check_times(path: Path, lines: np.ndarray, **times: np.ndarray) -> None:
    for name, each in times.items():
        if SECONDS[1] <= each.min() <= each.max() < LATEST_MS:
            continue
        wrong = ~((each >= 0) & (each < LATEST_MS)) | ((each >= SECONDS[0]) & (each < SECONDS[1]))
        if wrong.any():
            at = wrong.argmax()
            reason = f"{name} must be milliseconds since 1970, it is {each[at]:.0f}"
            raise MessageError(f"{path}, line {lines[at]}: {reason}")


def _opened(path: Path) -> Any:
    if path.suffix in CODECS and path.stat().st_size == 0:
        raise OSError("it is empty")
    return pa.input_stream(path, compression=CODECS.get(path.suffix))


def _read_json(path: Path, salvage: bool) -> Iterator[Part]:
    reader = _LineReader(path)
    for text, ends in _whole_lines(path, salvage):
        yield from reader.parts(text, ends)


def _whole_lines(path: Path, salvage: bool) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield whole lines, and where each ends, in an array that is used again for the next ones."""
    text, n = np.empty(BLOCK_BYTES + PIECE_BYTES + 1, np.uint8), 0
    ends: list[np.ndarray] = []
    for n_read in _reads(path, salvage, lambda: text[n : n + PIECE_BYTES]):
        # A piece fits into the processor's cache.
        ends.append(np.flatnonzero(text[n : n + n_read] == NEWLINE) + n + 1)
        n += n_read
        if n_read and n < BLOCK_BYTES:
            continue
        found = np.concatenate(ends)
        if len(found):
            yield text[: found[-1]], found
            text[: n - found[-1]] = text[found[-1] : n]
            n, ends = n - found[-1], []
        elif n >= BLOCK_BYTES:
            raise DamageError(f"{path}: a line must be shorter than {BLOCK_BYTES} bytes")
    if n and text[n - 1] != NEWLINE:
        text[n], ends = NEWLINE, [*ends, np.array([n + 1])]
    if ends:
        found = np.concatenate(ends)
        yield text[: found[-1]], found


def _reads(path: Path, salvage: bool, room: Callable[[], np.ndarray]) -> Iterator[int]:
    """Fill the start of *room* again and again, and give the bytes of each read; 0 is before damage."""
    n_before = 0
    try:
        with _opened(path) as plain, GZIP.open(path) if path.suffix == ".gz" else plain as file:
            while n := file.readinto(room()):
                if n_before == 0 and room()[:3].tobytes() == BYTE_ORDER_MARK:
                    room()[:3] = ord(" ")
                n_before += n
                yield n
    except UNREADABLE:
        # A read that fails gives nothing, so what came before the damage is read in small pieces.
        if salvage:
            with _opened(path) as file, contextlib.suppress(*UNREADABLE):
                while n_before:
                    n_before -= len(file.read(min(n_before, BLOCK_BYTES)))
                while n := file.readinto(room()[:64]):
                    yield n
            yield 0
        raise


class _LineReader:
    """Turns blocks of lines into parts, and follows the numbers of each subscription."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._n_lines = 0
        self._last_seq: int | None = None
        self._n_steps = self._n_skips = 0

    def parts(self, text: np.ndarray, ends: np.ndarray) -> Iterator[Part]:
        texts, numbers = self._lines(text, ends)
        damage = ""
        try:
            table = _queried(texts, FLATTEN)
        except duckdb.Error:
            texts, numbers, damage = self._valid(texts, numbers)
            table = _queried(texts, FLATTEN)
        kind = pc.index_in(table["type"], TYPES)
        others = Counter(table["type"].filter(pc.is_null(kind)).to_pylist())
        if others:
            known = pc.is_valid(kind)
            other = ~known.to_numpy(zero_copy_only=False)
            unread = pc.match_substring_regex(texts.filter(pa.array(other)), UNREAD)
            if pc.any(unread).as_py():
                number = numbers[other][unread.index(True).as_py()]
                self._fail(number, "not as Kalshi sends it and recorders write it")
            table, kind, texts = (rows.filter(known) for rows in (table, kind, texts))
            numbers = numbers[~other]
        if len(table):
            yield from self._split(table, kind.to_numpy().astype(np.uint8), texts, numbers, others)
        elif others:
            yield Part("", _NOTHING, numbers, others, False)
        if damage:
            raise DamageError(damage)

    def _lines(self, text: np.ndarray, ends: np.ndarray) -> tuple[pa.Array, np.ndarray]:
        starts = np.concatenate([[0], ends]).astype(np.int32)
        lines = pa.StringArray.from_buffers(len(ends), pa.py_buffer(starts), pa.py_buffer(text))
        numbers = np.arange(self._n_lines + 1, self._n_lines + len(ends) + 1)
        self._n_lines += len(ends)
        return lines, numbers

    def _valid(self, lines: pa.Array, numbers: np.ndarray) -> tuple[pa.Array, np.ndarray, str]:
        """Give the lines with text up to the first that is not JSON, and say which that is."""
        told = pc.not_equal(pc.utf8_trim_whitespace(lines), "")
        lines, numbers = lines.filter(told), numbers[told.to_numpy(zero_copy_only=False)]
        valid = _queried(lines, "json_valid(line)")[0].to_numpy()
        if valid.all():
            return lines, numbers, ""
        n_valid = int(valid.argmin())
        damage = f"{self.path}, line {numbers[n_valid]}: not a message"
        return lines.slice(0, n_valid), numbers[:n_valid], damage

    def _split(
        self, table: pa.Table, kind: np.ndarray, texts: pa.Array, lines: np.ndarray, others: Counter
    ) -> Iterator[Part]:
        """Divide messages by market, and where others are missing before them."""
        market = _one(table["market_ticker"]).dictionary_encode()
        self._check(market.is_null(), lines, "market_ticker", "a name", market)
        names, codes = market.dictionary.to_pylist(), market.indices.to_numpy()
        events = self._events(table, kind, lines)
        skips = self._skips(events)
        events, at = self._with_levels(events, texts, lines)
        codes, lines = codes[at], lines[at]
        skips = np.flatnonzero(skips[at] & (events.kind != LEVEL))
        for start, stop in pairwise(sorted({0, *skips.tolist(), len(codes)})):
            gap = start in skips
            for code, rows in _by_code(codes[start:stop]):
                part = Events(*(column[start:stop][rows] for column in events))
                yield Part(names[code], part, lines[start:stop][rows], others, gap)
                others, gap = Counter(), False

    def _events(self, table: pa.Table, kind: np.ndarray, lines: np.ndarray) -> Events:
        deltas = kind == DELTA
        ts_ms, recv_ms = (pc.fill_null(table[name], np.nan).to_numpy() for name in TIMES)
        recv_ms = np.where(np.isnan(recv_ms), ts_ms, recv_ms)
        ts_ms = np.where(deltas & ~np.isnan(ts_ms), ts_ms, recv_ms)
        _check_times(self.path, lines, recv_ms=recv_ms, ts_ms=ts_ms)
        sides = pc.fill_null(pc.index_in(table["side"], SIDES), -1).to_numpy()
        self._check(deltas & (sides < 0), lines, "side", "one of ['yes', 'no']", table["side"])
        return Events(
            kind=kind,
            side=np.where(deltas, sides, 0).astype(np.uint8),
            price=self._scaled(table, "price_dollars", PRICE, deltas, lines),
            size=self._scaled(table, "delta_fp", SIZE, deltas, lines),
            seq=np.array(pc.fill_null(table["seq"], -1)),
            ts_ms=ts_ms.astype(np.int64),
            recv_ms=recv_ms.astype(np.int64),
        )

    def _scaled(
        self, table: pa.Table, name: str, to: pa.DataType, deltas: np.ndarray, lines: np.ndarray
    ) -> np.ndarray:
        """Read decimals of deltas as multiples of the unit of *to*, exactly."""
        column = _one(table[name])
        if not deltas.all():
            column = pc.if_else(deltas, column, "0")
        try:
            integers = column.cast(to)
            if not integers.null_count:
                return np.frombuffer(integers.buffers()[1], np.int64)[: 2 * len(deltas) : 2].copy()
        except pa.ArrowInvalid:
            pass  # of other forms, or not a number
        values = column.to_pylist()
        read = [_integer(value, to.scale) for value in values]
        wrong = [each is None for each in read]
        self._check(wrong, lines, name, f"a number of {to.scale} decimals", values)
        return np.array(read, np.int64)

    def _check(self, wrong: Any, lines: np.ndarray, name: str, rule: str, values: Any) -> None:
        """Refuse messages by a mask of those that are wrong."""
        if (wrong := np.asarray(wrong)).any():
            at = int(wrong.argmax())
            self._fail(lines[at], f"event.msg.{name} must be {rule}, it is {values[at]}")

    def _skips(self, events: Events) -> np.ndarray:
        """Tell before which deltas messages are missing, if the whole subscription is here.

        Markets of a subscription share its numbers, so a file with some of them skips all the time.
        """
        skips = np.zeros(len(events.kind), bool)
        rows = np.flatnonzero((events.kind != TRADE) & (events.seq >= 0))
        if len(rows):
            seq = events.seq[rows]
            steps = np.diff(seq, prepend=seq[0] - 1 if self._last_seq is None else self._last_seq)
            # A snapshot may open a new count.
            skips[rows] = (steps > 1) & (events.kind[rows] == DELTA)
            self._last_seq = int(seq[-1])
            self._n_steps += len(rows)
            self._n_skips += int(skips.sum())
        few = self._n_skips <= 1 + self._n_steps // LOSSY and 3 * self._n_skips < self._n_steps
        return skips & few

    def _with_levels(
        self, events: Events, texts: pa.Array, lines: np.ndarray
    ) -> tuple[Events, np.ndarray | slice]:
        """Insert the levels of each snapshot behind it; also tell which message each comes from."""
        snapshots = np.flatnonzero(events.kind == SNAPSHOT)
        if not len(snapshots):
            return events, slice(None)
        levels = [self._levels(texts[at].as_py(), lines[at]) for at in snapshots.tolist()]
        counts = np.zeros(len(events.kind), np.int64)
        counts[snapshots] = events.size[snapshots] = [len(each) for each in levels]
        at = np.repeat(np.arange(len(counts)), 1 + counts)
        events = Events(*(column[at] for column in events))
        inserted = np.ones(len(at), bool)
        inserted[np.cumsum(1 + counts) - counts - 1] = False
        side, price, size = np.array([*chain(*levels)], np.int64).reshape(-1, 3).T
        events.kind[inserted] = LEVEL
        events.side[inserted], events.price[inserted], events.size[inserted] = side, price, size
        return events, at

    def _levels(self, text: str, line: int) -> list[tuple]:
        """Read the levels of one snapshot: sides, prices and sizes."""
        body, levels = json.loads(text, parse_float=Decimal)["event"]["msg"], []
        for side, name in ((YES, "yes"), (NO, "no")):
            found = body.get(f"{name}_dollars_fp") or body.get(f"{name}_dollars") or ()
            if not found and body.get(name):
                self._fail(line, f"levels must be dollars, the snapshot has only the key {name!r}")
            try:
                levels += [(side, _integer(price, 4), _integer(size, 2)) for price, size in found]
            except (ValueError, TypeError):
                levels.append((side, None, None))
            if any(None in level for level in levels):
                reason = f"must be [price, size] of 4 and 2 decimals, they are {found}"
                self._fail(line, f"the levels of a snapshot {reason}")
        return levels

    def _fail(self, line: int, reason: str) -> NoReturn:
        raise MessageError(f"{self.path}, line {line}: {reason}")


_NOTHING = Events(*(np.empty(0, field.type.to_pandas_dtype()) for field in EVENT_SCHEMA))


@cache
def _connection() -> duckdb.DuckDBPyConnection:
    return duckdb.connect(config={"threads": 1})


def _queried(lines: pa.Array, expressions: str) -> pa.Table:
    messages = pa.table({"line": lines.cast(pa.string_view())})
    rows = _connection().cursor().sql(f"SELECT {expressions} FROM messages")
    return rows.to_arrow_table().combine_chunks()


def _integer(value: object, scale: int) -> int | None:
    """Give a number as a multiple of its unit, if it is exactly one."""
    try:
        scaled = Decimal(str(value)).scaleb(scale)
        return int(scaled) if abs(scaled) < 10**18 and scaled == int(scaled) else None
    except ArithmeticError:
        return None


def _by_code(codes: np.ndarray) -> list[tuple[int, np.ndarray | slice]]:
    """Give each code and its rows."""
    if not codes.any():
        return [(0, slice(None))]
    order = np.argsort(codes, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(codes[order])) + 1)
    return [(codes[rows[0]], rows) for rows in groups]


def _one(column: pa.ChunkedArray) -> pa.Array:
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
