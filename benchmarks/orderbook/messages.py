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

"""Kalshi's order-book messages: as lines of JSON, as Parquet, and as arrays of integers.

A directory of messages holds one directory for each market, and in it files whose names sort
by time: ``<market>/<date>.ndjson.gz`` as they come from the WebSocket, or
``<market>/<date>.parquet`` with the columns of `Events`.

>>> for events, _ in read_events(path):
...     events.price.max()

Prices and sizes never pass through floating point.
Anything in a message that the order book does not need is left unread.
"""

import gzip
import re
import zlib

from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import NamedTuple, NoReturn
from zoneinfo import ZoneInfo

import numba
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json
import pyarrow.parquet as pq

__all__ = [
    "DELTA",
    "EVENT_SCHEMA",
    "EXCHANGE_ZONE",
    "LEVEL",
    "MONTHS",
    "NO",
    "SNAPSHOT",
    "TRADE",
    "YES",
    "Events",
    "MessageError",
    "close_ms",
    "find_markets",
    "read_events",
]

DELTA, SNAPSHOT, TRADE, LEVEL = range(4)
YES, NO = range(2)
PRICE_DECIMALS, SIZE_DECIMALS = 4, 2

TYPES = pa.array(["orderbook_delta", "orderbook_snapshot", "trade"])
SIDES = pa.array(["yes", "no"])
EXCHANGE_ZONE = ZoneInfo("America/New_York")
MONTHS = ["JAN", "FEB", "MAR", "APR", "MAY", "JUN", "JUL", "AUG", "SEP", "OCT", "NOV", "DEC"]

BLOCK_BYTES = 1 << 22
BLOCK_EVENTS = 1 << 16
LONGEST_LINE = 1 << 20

MINUS, POINT, ZERO = b"-.0"


class MessageError(ValueError):
    """A message that cannot be what the exchange sent."""


class Events(NamedTuple):
    """Messages as parallel arrays, in the order in which they were received.

    A snapshot is one `SNAPSHOT` whose size is a number of levels, followed by that many `LEVEL`
    events; every other message is one event.
    """

    kind: np.ndarray
    """uint8: `DELTA`, `SNAPSHOT`, `TRADE` or `LEVEL`."""
    side: np.ndarray
    """uint8: `YES` or `NO`."""
    price: np.ndarray
    """int64, in 1e-4 dollars."""
    size: np.ndarray
    """int64, in 1e-2 contracts; signed in a delta."""
    seq: np.ndarray
    """int64, the number of the message on its channel."""
    ts_ms: np.ndarray
    """int64, the exchange's time; of a snapshot, which has none, the time of receipt."""
    recv_ms: np.ndarray
    """int64, the local time of receipt."""


EVENT_SCHEMA = pa.schema(
    [
        ("kind", pa.uint8()),
        ("side", pa.uint8()),
        ("price", pa.int64()),
        ("size", pa.int64()),
        ("seq", pa.int64()),
        ("ts_ms", pa.int64()),
        ("recv_ms", pa.int64()),
    ]
)
LEVELS = pa.list_(pa.list_(pa.string()))
JSON_SCHEMA = pa.schema(
    {
        "recv_ms": pa.int64(),
        "event": pa.struct(
            {
                "type": pa.string(),
                "seq": pa.int64(),
                "msg": pa.struct(
                    {
                        "market_ticker": pa.string(),
                        "yes_dollars_fp": LEVELS,
                        "no_dollars_fp": LEVELS,
                        "price_dollars": pa.string(),
                        "delta_fp": pa.string(),
                        "side": pa.string(),
                        "ts_ms": pa.int64(),
                    }
                ),
            }
        ),
    }
)


def find_markets(directory: str | Path) -> dict[str, list[Path]]:
    """List the message files of every market below *directory*, in the order of their names."""
    directory = Path(directory)
    files = [*directory.glob("*/*.ndjson.gz"), *directory.glob("*/*.parquet")]
    markets: dict[str, list[Path]] = {}
    for file in sorted(files):
        markets.setdefault(file.parent.name, []).append(file)
    if not markets:
        raise FileNotFoundError(
            f"no <market>/<date>.ndjson.gz or <market>/<date>.parquet in {directory}; "
            "pass a directory of order-book messages"
        )
    return markets


def close_ms(market: str) -> int | None:
    """Tell when *market* closes, in milliseconds since 1970, if its ticker says so.

    ``KXGOLD15M-26AUG102115-15`` closes on 10 August 2026 at 21:15 Eastern time.
    """
    found = re.search(r"-(\d\d)([A-Z]{3})(\d\d)(\d\d)(\d\d)-", market)
    if found is None or found[2] not in MONTHS:
        return None
    year, day, hour, minute = (int(found[i]) for i in (1, 3, 4, 5))
    month = MONTHS.index(found[2]) + 1
    close = datetime(2000 + year, month, day, hour, minute, tzinfo=EXCHANGE_ZONE)
    return int(close.timestamp()) * 1000


def read_events(path: Path) -> Iterator[tuple[Events, int]]:
    """Read one file of messages in bounded memory.

    Yields
    ------
    events : Events
        The next messages; a snapshot may end in a later block than it began.
    consumed : int
        Bytes of the file read so far.

    Raises
    ------
    MessageError
        Where a line is not a message in Kalshi's format.
    """
    return _read_parquet(path) if path.suffix == ".parquet" else _read_json(path)


def _read_parquet(path: Path) -> Iterator[tuple[Events, int]]:
    size, done = path.stat().st_size, 0
    with pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 16) as file:
        if not file.schema_arrow.equals(EVENT_SCHEMA):
            raise MessageError(
                f"{path} must have the columns {EVENT_SCHEMA.to_string()}, "
                f"it has {file.schema_arrow.to_string()}"
            )
        for batch in file.iter_batches(BLOCK_EVENTS, use_threads=False):
            done += len(batch)
            yield _from_batch(batch, path), size * done // file.metadata.num_rows


def _from_batch(batch: pa.RecordBatch, path: Path) -> Events:
    for name, column in zip(batch.schema.names, batch.columns):
        if column.null_count:
            raise MessageError(f"{path}: column {name} must not hold nulls")
    return Events(*(column.to_numpy() for column in batch.columns))


def _read_json(path: Path) -> Iterator[tuple[Events, int]]:
    n_lines = 0
    with path.open("rb") as raw, gzip.open(raw) as file:
        for text in _whole_lines(file, path):
            lines = _Lines(path, text, n_lines)
            yield lines.events(), raw.tell()
            n_lines += len(lines)


def _whole_lines(file: gzip.GzipFile, path: Path) -> Iterator[bytes]:
    """Cut the text into blocks that end where a line ends."""
    rest = b""
    try:
        while block := file.read(BLOCK_BYTES):
            whole, newline, rest = (rest + block).rpartition(b"\n")
            if len(rest) > LONGEST_LINE:
                raise MessageError(f"{path}: a line must be shorter than {LONGEST_LINE} bytes")
            if newline:
                yield whole + newline
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise MessageError(f"{path} is damaged or cut short: {error}") from error
    if rest:
        yield rest


class _Lines:
    """A block of lines on its way from text to `Events`."""

    def __init__(self, path: Path, text: bytes, n_before: int) -> None:
        self.path = path
        self.n_before = n_before
        self.columns = self._parse(text)
        self.kind = self._codes("event.type", TYPES)

    def __len__(self) -> int:
        return len(self.columns)

    def events(self) -> Events:
        self._check_ticker()
        deltas, recv_ms = self.kind == DELTA, self._integers("recv_ms")
        events = Events(
            kind=self.kind,
            side=self._codes("event.msg.side", SIDES, deltas),
            price=self._decimals("event.msg.price_dollars", PRICE_DECIMALS, deltas),
            size=self._decimals("event.msg.delta_fp", SIZE_DECIMALS, deltas),
            seq=self._integers("event.seq"),
            ts_ms=np.where(deltas, self._integers("event.msg.ts_ms", deltas), recv_ms),
            recv_ms=recv_ms,
        )
        snapshots = np.flatnonzero(self.kind == SNAPSHOT)
        return self._with_levels(events, snapshots) if len(snapshots) else events

    def _parse(self, text: bytes) -> pa.RecordBatch:
        try:
            table = _parse_json(text)
        except pa.ArrowInvalid:
            table = None
        n_lines = text.count(b"\n") + (not text.endswith(b"\n"))
        if table is None or len(table) != n_lines:
            self._name_bad_line(text)
        return table

    def _name_bad_line(self, text: bytes) -> NoReturn:
        for row, line in enumerate(text.removesuffix(b"\n").split(b"\n")):
            try:
                n_messages = len(_parse_json(line))
            except pa.ArrowInvalid as error:
                self._fail(row, f"not a message: {error}")
            if n_messages != 1:
                self._fail(row, f"each line must be one message, this one holds {n_messages}")
        raise AssertionError("a block failed whose every line is well-formed")

    def _fail(self, row: int, reason: str) -> NoReturn:
        raise MessageError(f"{self.path}, line {self.n_before + row + 1}: {reason}")

    def _check_ticker(self) -> None:
        market = self.path.parent.name
        ticker = self.columns["event.msg.market_ticker"]
        wrong = pc.fill_null(pc.not_equal(ticker, market), True).to_numpy(zero_copy_only=False)
        if wrong.any():
            row = int(wrong.argmax())
            self._fail(row, f"the market must be that of the directory, it is {ticker[row]}")

    def _wanted(self, name: str, rows: np.ndarray | None) -> tuple[pa.Array, np.ndarray]:
        """Take a column, and the *rows* (all, if None) in which it must have a value."""
        column = self.columns[name]
        rows = np.ones(len(self), bool) if rows is None else rows
        missing = rows & column.is_null().to_numpy(zero_copy_only=False)
        if missing.any():
            self._fail(int(missing.argmax()), f"the message has no {name}")
        return column, rows

    def _integers(self, name: str, rows: np.ndarray | None = None) -> np.ndarray:
        return pc.fill_null(self._wanted(name, rows)[0], 0).to_numpy()

    def _codes(self, name: str, values: pa.Array, rows: np.ndarray | None = None) -> np.ndarray:
        column, rows = self._wanted(name, rows)
        codes = pc.fill_null(pc.index_in(column, values), len(values)).to_numpy()
        unknown = rows & (codes == len(values))
        if unknown.any():
            row = int(unknown.argmax())
            self._fail(row, f"{name} must be one of {values.to_pylist()}, it is {column[row]}")
        return np.where(rows, codes, 0).astype(np.uint8)

    def _decimals(self, name: str, decimals: int, rows: np.ndarray) -> np.ndarray:
        column, rows = self._wanted(name, rows)
        integers, bad = _from_strings(column, decimals, rows)
        if bad >= 0:
            self._fail(bad, f"{name} must be a number of {decimals} decimals, it is {column[bad]}")
        return integers

    def _with_levels(self, events: Events, snapshots: np.ndarray) -> Events:
        """Insert the levels of each snapshot behind it."""
        levels = [self._levels(row) for row in snapshots.tolist()]
        counts = np.array([len(side) for side, _, _ in levels])
        side, price, size = (np.concatenate(parts) for parts in zip(*levels))
        owner = np.repeat(snapshots, counts)
        events.size[snapshots] = counts
        inserted = Events(
            np.full(len(owner), LEVEL, np.uint8),
            side,
            price,
            size,
            *(column[owner] for column in (events.seq, events.ts_ms, events.recv_ms)),
        )
        return Events(*(np.insert(a, owner + 1, b) for a, b in zip(events, inserted)))

    def _levels(self, row: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Read the levels of one snapshot: sides, prices and sizes."""
        sides = [
            self.columns[f"event.msg.{name}_dollars_fp"][row].as_py() or []
            for name in ("yes", "no")
        ]
        levels = [level or () for side in sides for level in side]
        if any(len(level) != 2 for level in levels):
            self._fail(row, f"each level must be [price, size], the snapshot holds {levels}")
        price, size = (
            self._level_numbers(row, [level[i] for level in levels], decimals)
            for i, decimals in enumerate((PRICE_DECIMALS, SIZE_DECIMALS))
        )
        codes = np.array([YES, NO], np.uint8)
        return np.repeat(codes, [len(side) for side in sides]), price, size

    def _level_numbers(self, row: int, strings: list[str | None], decimals: int) -> np.ndarray:
        every = np.ones(len(strings), bool)
        integers, bad = _from_strings(pa.array(strings, pa.string()), decimals, every)
        if bad >= 0:
            self._fail(row, f"a level must have {decimals} decimals, one has {strings[bad]}")
        return integers


def _parse_json(text: bytes) -> pa.RecordBatch:
    """Parse lines into flat columns with dotted names."""
    table = pa.json.read_json(
        pa.BufferReader(text),
        pa.json.ReadOptions(block_size=LONGEST_LINE),
        pa.json.ParseOptions(JSON_SCHEMA, unexpected_field_behavior="ignore"),
    )
    return table.flatten().flatten().combine_chunks().to_batches()[0]


def _from_strings(column: pa.Array, decimals: int, rows: np.ndarray) -> tuple[np.ndarray, int]:
    """Scale decimal strings to integers exactly; also give the first row that is not one, or -1."""
    _, offsets, data = column.buffers()
    offsets = np.frombuffer(offsets, np.int32)[column.offset : column.offset + len(column) + 1]
    text = np.frombuffer(data if data is not None else b"", np.uint8)
    integers = np.zeros(len(column), np.int64)
    return integers, _scale(text, offsets, rows, decimals, integers)


@numba.njit(cache=True, nogil=True)
def _scale(text, offsets, rows, decimals, integers):
    for row in range(len(rows)):
        if rows[row]:
            start, stop = offsets[row], offsets[row + 1]
            negative = start < stop and text[start] == MINUS
            start += negative
            point = stop - decimals - 1
            # 17 digits are below 2^63
            if point <= start or stop - start > 18 or text[point] != POINT:
                return row
            value = np.int64(0)
            for at in range(start, stop):
                if at != point:
                    digit = np.int64(text[at]) - ZERO
                    if digit < 0 or digit > 9:
                        return row
                    value = 10 * value + digit
            integers[row] = -value if negative else value
    return -1
