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

A file holds one JSON message a line, plain or compressed, of any number of markets, or, as Parquet
with the columns of `Events`, those of the market that its directory is named after.
Prices and sizes never pass through floating point where they are written as strings.
"""

import contextlib
import gzip
import io
import json
import re
import zlib

from collections import Counter
from collections.abc import Iterator
from decimal import Decimal
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, NamedTuple

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
from benchmarks.orderbook.columns import MESSAGES, visible_files

__all__ = ["DamageError", "Gap", "Part", "find_files", "first_ms", "read_parts"]

TYPES = pa.array(["orderbook_delta", "orderbook_snapshot", "trade"])
SIDES = pa.array(["yes", "no"])
PRICE, SIZE = pa.decimal128(18, 4), pa.decimal128(18, 2)
FAST = find_spec("isal") is not None
GZIP = import_module("isal.igzip" if FAST else "gzip")
ISAL_ERROR = import_module("isal.isal_zlib" if FAST else "zlib").error
UNREADABLE = pa.ArrowException, OSError, EOFError, UnicodeError, zlib.error, ISAL_ERROR
BLOCK_BYTES = 1 << 24
NEWLINE = ord("\n")
BLANK = " \t\r\n\ufeff"
"""What may surround a message: white space, or the byte order mark of a file."""
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


class Gap:
    """Messages of the file's subscription are missing here."""


def find_files(directory: str | Path) -> list[Path]:
    """List the message files below *directory*."""
    endings = *MESSAGES, ".parquet"
    return visible_files(Path(directory), endings, "messages (.ndjson or .jsonl, also .gz or .zst)")


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


def read_parts(path: Path, *, salvage: bool = False) -> Iterator[Part | Counter | Gap]:
    """Read one file of messages in bounded memory.

    Yields parts of messages, how many of other types were passed over, and where messages are
    missing. Raises a `DamageError` where the file cannot be read on, with *salvage* after its last
    whole line, and a `MessageError` where a message of a book is not in Kalshi's format.
    """
    try:
        if path.suffix == ".parquet":
            yield from _read_parquet(path)
            return
        reader = _LineReader(path)
        for text in _blocks(path, salvage):
            yield from reader.parts(text)
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
            yield Part(path.parent.name, events, lines)


def _check_times(path: Path, lines: np.ndarray, **times: np.ndarray) -> None:
    for name, each in times.items():
        seconds = (each >= SECONDS[0]) & (each < SECONDS[1])
        right = (each >= 0) & (each < LATEST_MS) & ~seconds
        if not right.all():
            at = right.argmin()
            reason = f"{name} must be milliseconds since 1970, it is {each[at]:.0f}"
            raise MessageError(f"{path}, line {lines[at]}: {reason}")


def _opened(path: Path) -> Any:
    if path.suffix in (".gz", ".zst") and path.stat().st_size == 0:
        raise OSError("it is empty")
    return GZIP.open(path) if path.suffix == ".gz" else io.BufferedReader(pa.input_stream(path))


def _blocks(path: Path, salvage: bool) -> Iterator[bytes | memoryview]:
    """Yield blocks of whole lines in memory that is used again, with *salvage* up to damage."""
    position, block = 0, memoryview(np.empty(2 * BLOCK_BYTES, "B"))  # type: ignore[arg-type]
    try:
        with _opened(path) as file:
            while piece := file.read(BLOCK_BYTES):
                rest = file.readline(BLOCK_BYTES)
                n = len(piece) + len(rest)
                block[: len(piece)], block[len(piece) : n] = piece, rest
                yield block[:n]
                position += n
    except UNREADABLE:
        if salvage and (text := _salvaged(path, position)):
            yield text
        raise


def _salvaged(path: Path, position: int) -> bytes:
    """Read whole lines from *position* on in small pieces, since a read that fails gives nothing."""
    text = bytearray()
    # Of what comes before damage, isal loses more than the standard library does.
    file: Any = gzip.open(path) if path.suffix == ".gz" else pa.input_stream(path)
    with file, contextlib.suppress(*UNREADABLE):
        while position and (piece := file.read(min(position, BLOCK_BYTES))):
            position -= len(piece)
        while piece := file.read1(64):
            text += piece
    return bytes(text[: text.rfind(b"\n") + 1])


class _LineReader:
    """Turns blocks of lines into parts, and follows the numbers of each subscription."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._n_lines = 0
        self._last_seq: int | None = None
        self._n_steps = self._n_skips = 0

    def parts(self, text: bytes | memoryview) -> Iterator[Part | Counter | Gap]:
        ends = np.flatnonzero(np.frombuffer(text, np.uint8) == NEWLINE) + 1
        if text[-1] != NEWLINE:  # the last line of a file
            ends = np.append(ends, len(text))
        starts = np.concatenate([[0], ends]).astype(np.int32)
        lines = pa.StringArray.from_buffers(len(ends), pa.py_buffer(starts), pa.py_buffer(text))
        numbers = np.arange(self._n_lines + 1, self._n_lines + len(ends) + 1)
        self._n_lines += len(ends)
        damage = ""
        try:
            messages = _queried(FLATTEN, lines, numbers)
        except duckdb.Error:
            lines, numbers, damage = self._valid(lines, numbers)
            messages = _queried(FLATTEN, lines, numbers)
        known = pc.is_in(messages["type"], TYPES)
        if not pc.all(known).as_py():
            yield self._passed_over(messages.filter(pc.invert(known)))
            messages = messages.filter(known)
        if len(messages):
            yield from self._split(messages)
        if damage:
            raise DamageError(damage)

    def _valid(self, lines: pa.Array, numbers: np.ndarray) -> tuple[pa.Array, np.ndarray, str]:
        """Give the lines with text up to the first that is not JSON, and say which that is."""
        lines = pc.utf8_trim(lines, BLANK)
        told = pc.not_equal(lines, "")
        lines, numbers = lines.filter(told), numbers[told.to_numpy(zero_copy_only=False)]
        valid = _queried("json_valid(line) AS valid", lines, numbers)["valid"]
        if (n_valid := valid.index(False).as_py()) < 0:
            return lines, numbers, ""
        damage = f"{self.path}, line {numbers[n_valid]}: not a message"
        return lines[:n_valid], numbers[:n_valid], damage

    def _passed_over(self, messages: pa.RecordBatch) -> Counter:
        """Count messages of other types, unless they are those of a book in another form."""
        unread = pc.match_substring_regex(messages["line"], UNREAD)
        self._check(unread, messages, "not as Kalshi sends it and recorders write it")
        return Counter(messages["type"].to_pylist())

    def _split(self, messages: pa.RecordBatch) -> Iterator[Part | Gap]:
        """Divide messages by market, and where others are missing before them."""
        market = messages["market_ticker"].dictionary_encode()
        self._check(market.is_null(), messages, "event.msg.market_ticker must be a name")
        events = self._events(messages)
        skips = self._skips(events)
        events, at = self._with_levels(events, messages)
        codes, lines = market.indices.to_numpy()[at], messages["number"].to_numpy()[at]
        skips = np.flatnonzero(skips[at] & (events.kind != LEVEL))
        for start, stop in pairwise(sorted({0, *skips.tolist(), len(codes)})):
            if start in skips:
                yield Gap()
            for code in np.flatnonzero(np.bincount(codes[start:stop])):
                rows = start + np.flatnonzero(codes[start:stop] == code)
                part = Events(*(column[rows] for column in events))
                yield Part(market.dictionary[int(code)].as_py(), part, lines[rows])

    def _events(self, messages: pa.RecordBatch) -> Events:
        kind = pc.index_in(messages["type"], TYPES).to_numpy().astype(np.uint8)
        deltas = kind == DELTA
        ts_ms, recv_ms = (pc.fill_null(messages[name], np.nan).to_numpy() for name in TIMES)
        recv_ms = np.where(np.isnan(recv_ms), ts_ms, recv_ms)
        ts_ms = np.where(deltas & ~np.isnan(ts_ms), ts_ms, recv_ms)
        _check_times(self.path, messages["number"].to_numpy(), recv_ms=recv_ms, ts_ms=ts_ms)
        sides = pc.fill_null(pc.index_in(messages["side"], SIDES), -1).to_numpy()
        rule = "event.msg.side must be one of ['yes', 'no'], it is {side}"
        self._check(deltas & (sides < 0), messages, rule)
        return Events(
            kind=kind,
            side=np.where(deltas, sides, 0).astype(np.uint8),
            price=self._scaled(messages, "price_dollars", PRICE, deltas),
            size=self._scaled(messages, "delta_fp", SIZE, deltas),
            seq=np.array(pc.fill_null(messages["seq"], -1)),
            ts_ms=ts_ms.astype(np.int64),
            recv_ms=recv_ms.astype(np.int64),
        )

    def _scaled(
        self, messages: pa.RecordBatch, name: str, to: pa.DataType, deltas: np.ndarray
    ) -> np.ndarray:
        """Read decimals of deltas as multiples of the unit of *to*, exactly."""
        column = messages[name]
        if not deltas.all():
            column = pc.if_else(deltas, column, "0")
        try:
            integers = column.cast(to)
            if not integers.null_count:
                return np.frombuffer(integers.buffers()[1], np.int64)[: 2 * len(deltas) : 2].copy()
        except pa.ArrowInvalid:
            pass  # of other forms, or not a number
        read = [_integer(value, to.scale) for value in column.to_pylist()]
        rule = f"event.msg.{name} must be a number of {to.scale} decimals, it is {{{name}}}"
        self._check([each is None for each in read], messages, rule)
        return np.array(read, np.int64)

    def _check(self, wrong: Any, messages: pa.RecordBatch, rule: str) -> None:
        """Refuse messages by a mask of those that are wrong."""
        if (wrong := np.asarray(wrong)).any():
            (message,) = messages[int(wrong.argmax()) :][:1].to_pylist()
            raise MessageError(f"{self.path}, line {message['number']}: {rule.format(**message)}")

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
        self, events: Events, messages: pa.RecordBatch
    ) -> tuple[Events, np.ndarray | slice]:
        """Insert the levels of each snapshot behind it; also tell which message each comes from."""
        snapshots = np.flatnonzero(events.kind == SNAPSHOT)
        if not len(snapshots):
            return events, slice(None)
        levels = [self._levels(messages[int(at) :][:1]) for at in snapshots]
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

    def _levels(self, snapshot: pa.RecordBatch) -> list[tuple]:
        """Read the levels of one snapshot: sides, prices and sizes."""
        body = json.loads(snapshot["line"][0].as_py(), parse_float=Decimal)["event"]["msg"]
        levels: list[tuple] = []
        for side, name in ((YES, "yes"), (NO, "no")):
            found = body.get(f"{name}_dollars_fp") or body.get(f"{name}_dollars") or ()
            rule = f"levels must be dollars, the snapshot has only the key {name!r}"
            self._check([not found and bool(body.get(name))], snapshot, rule)
            try:
                levels += [(side, _integer(price, 4), _integer(size, 2)) for price, size in found]
            except (ValueError, TypeError):
                levels.append((side, None, None))
            rule = "the levels of a snapshot must be [price, size] of 4 and 2 decimals: {line}"
            self._check([any(None in level for level in levels)], snapshot, rule)
        return levels


@cache
def _connection() -> duckdb.DuckDBPyConnection:
    return duckdb.connect(config={"threads": 1})


def _queried(expressions: str, lines: pa.Array, numbers: np.ndarray) -> pa.RecordBatch:
    """Give what DuckDB makes of the lines, and these with their numbers."""
    texts = pa.table({"line": lines.cast(pa.string_view())})
    found = _connection().cursor().sql(f"SELECT {expressions} FROM texts").to_arrow_table()
    columns = [*(column.combine_chunks() for column in found.columns), lines, pa.array(numbers)]
    return pa.record_batch(columns, [*found.column_names, "line", "number"])


def _integer(value: object, scale: int) -> int | None:
    """Give a number as a multiple of its unit, if it is exactly one."""
    try:
        scaled = Decimal(str(value)).scaleb(scale)
        return int(scaled) if abs(scaled) < 10**18 and scaled == int(scaled) else None
    except ArithmeticError:
        return None
