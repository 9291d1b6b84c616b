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
"""Kalshi's order-book messages: files of them, and arrays of integers.

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

from collections import Counter
from collections.abc import Callable, Iterator
from datetime import datetime
from decimal import Decimal, InvalidOperation
from functools import cache
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, NamedTuple, NoReturn
from zoneinfo import ZoneInfo

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
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
    "DamageError",
    "Events",
    "MessageError",
    "Part",
    "close_ms",
    "find_files",
    "first_ms",
    "read_parts",
]

DELTA, SNAPSHOT, TRADE, LEVEL = range(4)
YES, NO = range(2)
TYPES = pa.array(["orderbook_delta", "orderbook_snapshot", "trade"])
SIDES = pa.array(["yes", "no"])
PRICE, SIZE = pa.decimal128(18, 4), pa.decimal128(18, 2)
EXCHANGE_ZONE = ZoneInfo("America/New_York")
MONTHS = ["JAN", "FEB", "MAR", "APR", "MAY", "JUN", "JUL", "AUG", "SEP", "OCT", "NOV", "DEC"]

FORMATS = re.compile(r"\.parquet$|\.(ndjson|jsonl)(\.gz|\.zst)?$")
CODECS = {".gz": "gzip", ".zst": "zstd"}
BLOCK_BYTES = 1 << 24
NEWLINE = ord("\n")
BLOCK_EVENTS = 1 << 16
LATEST_MS = 1 << 43
LOSSY = 1_000
"""A subscription is wholly in a file if its numbers skip once in so many messages at most."""


class MessageError(ValueError):
    """A message that cannot be what the exchange sent."""


class DamageError(MessageError):
    """A file that cannot be read to its end."""


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
    """int64, the number of the message on its channel; -1 if it has none."""
    ts_ms: np.ndarray
    """int64, the exchange's time; the time of receipt where a message has none."""
    recv_ms: np.ndarray
    """int64, the local time of receipt; the exchange's time where a message has none."""


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
    consumed: int
    """Bytes of the file read so far."""


EVENT_SCHEMA = pa.schema(
    [("kind", pa.uint8()), ("side", pa.uint8())]
    + [(name, pa.int64()) for name in ("price", "size", "seq", "ts_ms", "recv_ms")]
)
BODY = {"market_ticker": "VARCHAR", "side": "VARCHAR", "ts_ms": "DOUBLE"}
BODY |= {"price_dollars": "VARCHAR", "delta_fp": "VARCHAR"}
EVENT = {"type": "VARCHAR", "seq": "BIGINT", "msg": BODY}
STRUCTURE = json.dumps({"recv_ms": "DOUBLE", "event": EVENT})
FLATTEN = f"unnest(json_transform(line, '{STRUCTURE}'), recursive := true)"


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


def close_ms(market: str) -> int | None:
    """Tell when *market* closes, in milliseconds since 1970, if its ticker says so.

    ``KXGOLD15M-26AUG102115-15`` closes on 10 August 2026 at 21:15 Eastern time.
    """
    found = re.search(r"-(\d\d)([A-Z]{3})(\d\d)(\d\d)(\d\d)-", market)
    if found is None or found[2] not in MONTHS:
        return None
    year, day, hour, minute = (int(found[i]) for i in (1, 3, 4, 5))
    month = MONTHS.index(found[2]) + 1
    try:
        close = datetime(2000 + year, month, day, hour, minute, tzinfo=EXCHANGE_ZONE)
    except ValueError as error:
        raise MessageError(f"market {market}: its ticker names no time of close: {error}") from None
    return int(close.timestamp()) * 1000


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
    except (pa.ArrowException, OSError, KeyError, StopIteration):
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
    return _read_parquet(path) if path.suffix == ".parquet" else _read_json(path, salvage)


def _read_parquet(path: Path) -> Iterator[Part]:
    size, n_before = path.stat().st_size, 0
    try:
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
                consumed = size * n_before // file.metadata.num_rows
                yield Part(path.parent.name, events, lines, Counter(), False, consumed)
    except (pa.ArrowException, OSError) as error:
        raise DamageError(f"{path} is damaged or cut short: {error}") from error


def _opened(path: Path) -> Any:
    return pa.input_stream(path, compression=CODECS.get(path.suffix))


def _read_json(path: Path, salvage: bool) -> Iterator[Part]:
    reader = _LineReader(path)
    try:
        for text, ends, consumed in _whole_lines(path, salvage):
            yield from reader.parts(text, ends, consumed)
    except OSError as error:
        raise DamageError(f"{path} is damaged or cut short: {error}") from error


def _whole_lines(path: Path, salvage: bool) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
    """Yield whole lines, where each ends, and the bytes of the file read so far.

    The array is used again for the next lines.
    """
    text, n = np.empty(2 * BLOCK_BYTES + 1, np.uint8), 0
    with path.open("rb") as raw, pa.input_stream(raw, compression=CODECS.get(path.suffix)) as file:
        for n_read in _reads(path, file, salvage, lambda: text[n : n + BLOCK_BYTES]):
            ends = np.flatnonzero(text[n : n + n_read] == NEWLINE) + n + 1
            n += n_read
            if len(ends):
                yield text[: ends[-1]], ends, raw.tell()
                text[: n - ends[-1]] = text[ends[-1] : n]
                n -= ends[-1]
            if n > BLOCK_BYTES:
                raise DamageError(f"{path}: a line must be shorter than {BLOCK_BYTES} bytes")
        text[n] = NEWLINE
        yield text[: n + 1], np.array([n + 1]), raw.tell()


def _reads(path: Path, file: Any, salvage: bool, room: Callable[[], np.ndarray]) -> Iterator[int]:
    """Fill the start of *room* again and again, and give the bytes of each read."""
    n_before = 0
    try:
        while n := file.readinto(room()):
            n_before += n
            yield n
    except OSError:
        # A read that fails gives nothing, so what came before the damage is read in small pieces.
        if salvage:
            with _opened(path) as again, contextlib.suppress(OSError):
                while n_before:
                    n_before -= len(again.read(min(n_before, BLOCK_BYTES)))
                while n := again.readinto(room()[:64]):
                    yield n
        raise


class _LineReader:
    """Turns blocks of lines into parts, and follows the numbers of each subscription."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._n_lines = 0
        self._last_seq: int | None = None
        self._n_steps = self._n_skips = 0

    def parts(self, text: np.ndarray, ends: np.ndarray, consumed: int) -> Iterator[Part]:
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
            table, kind, texts = (rows.filter(known) for rows in (table, kind, texts))
            numbers = numbers[known.to_numpy()]
        if len(table):
            codes = kind.to_numpy().astype(np.uint8)
            yield from self._split(table, codes, texts, numbers, others, consumed)
        elif others:
            yield Part("", _NOTHING, numbers, others, False, consumed)
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
        self,
        table: pa.Table,
        kind: np.ndarray,
        texts: pa.Array,
        lines: np.ndarray,
        others: Counter,
        consumed: int,
    ) -> Iterator[Part]:
        """Divide messages by market, and where others are missing before them."""
        market = _one(table["market_ticker"]).dictionary_encode()
        if market.null_count:
            self._fail(
                lines[_first(market.is_null())], "the message has no event.msg.market_ticker"
            )
        names, codes = market.dictionary.to_pylist(), market.indices.to_numpy()
        events = self._events(table, kind, lines)
        skips = self._skips(events)
        events, at = self._with_levels(events, texts, lines)
        codes, lines = codes[at], lines[at]
        skips = np.flatnonzero(skips[at] & (events.kind != LEVEL))
        for start, stop in pairwise(sorted({0, *skips.tolist(), len(at)})):
            for number, rows in enumerate(_by_code(codes[start:stop])):
                rows = start + rows
                part = Events(*(column[rows] for column in events))
                gap = start in skips and number == 0
                yield Part(names[codes[rows[0]]], part, lines[rows], others, gap, consumed)
                others = Counter()

    def _events(self, table: pa.Table, kind: np.ndarray, lines: np.ndarray) -> Events:
        deltas = kind == DELTA
        ts_ms, recv_ms = (_floats(table[name]) for name in ("ts_ms", "recv_ms"))
        recv_ms = np.where(np.isnan(recv_ms), ts_ms, recv_ms)
        timeless = ~((recv_ms >= 0) & (recv_ms < LATEST_MS))
        if timeless.any():
            self._fail(lines[timeless.argmax()], "recv_ms must be milliseconds since 1970")
        sides = pc.fill_null(pc.index_in(table["side"], SIDES), -1).to_numpy()
        if (unknown := deltas & (sides < 0)).any():
            at = unknown.argmax()
            reason = f"event.msg.side must be one of ['yes', 'no'], it is {table['side'][at]}"
            self._fail(lines[at], reason)
        return Events(
            kind=kind,
            side=np.where(deltas, sides, 0).astype(np.uint8),
            price=self._scaled(table, "price_dollars", PRICE, deltas, lines),
            size=self._scaled(table, "delta_fp", SIZE, deltas, lines),
            seq=pc.fill_null(table["seq"], -1).to_numpy(),
            ts_ms=np.where(deltas & ~np.isnan(ts_ms), ts_ms, recv_ms).astype(np.int64),
            recv_ms=recv_ms.astype(np.int64),
        )

    def _scaled(
        self, table: pa.Table, name: str, to: pa.DataType, deltas: np.ndarray, lines: np.ndarray
    ) -> np.ndarray:
        """Read decimals of deltas as multiples of the unit of *to*, exactly."""
        column = _one(table[name])
        if not deltas.all():
            column = pc.if_else(deltas, column, None)
        if column.null_count > len(deltas) - deltas.sum():
            at = (deltas & pc.is_null(column).to_numpy(zero_copy_only=False)).argmax()
            self._fail(lines[at], f"the message has no event.msg.{name}")
        try:
            integers = np.frombuffer(column.cast(to).buffers()[1], np.int64)[::2]
        except pa.ArrowInvalid:
            for at in np.flatnonzero(deltas):
                if not _is_decimal(column[at].as_py(), to.scale):
                    reason = f"must be a number of {to.scale} decimals, it is {column[at]}"
                    self._fail(lines[at], f"event.msg.{name} {reason}")
            raise
        return np.where(deltas, integers[: len(deltas)], 0)

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
    ) -> tuple[Events, np.ndarray]:
        """Insert the levels of each snapshot behind it; also tell which message each comes from."""
        snapshots = np.flatnonzero(events.kind == SNAPSHOT)
        if not len(snapshots):
            return events, np.arange(len(events.kind))
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

    def _levels(self, text: str, line: int) -> list[tuple[int, int, int]]:
        """Read the levels of one snapshot: sides, prices and sizes."""
        body, levels = json.loads(text, parse_float=Decimal)["event"]["msg"], []
        for side, name in ((YES, "yes"), (NO, "no")):
            found = body.get(f"{name}_dollars_fp", body.get(f"{name}_dollars"))
            if found is None and body.get(name):
                self._fail(line, f"levels must be dollars, the snapshot has only the key {name!r}")
            for level in found or ():
                if not isinstance(level, list) or len(level) != 2:
                    self._fail(line, f"each level must be [price, size], one is {level}")
                for value, unit in zip(level, (PRICE, SIZE)):
                    if not _is_decimal(value, unit.scale):
                        reason = f"a level must have {unit.scale} decimals, one has {value}"
                        self._fail(line, reason)
                price, size = (Decimal(str(value)) for value in level)
                levels.append((side, int(price.scaleb(4)), int(size.scaleb(2))))
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


def _is_decimal(value: object, scale: int) -> bool:
    """Tell whether *value* is a number of at most *scale* decimals and 18 digits."""
    try:
        scaled = Decimal(str(value)).scaleb(scale)
        return abs(scaled) < 10**18 and scaled == scaled.to_integral_value()
    except InvalidOperation:
        return False


def _by_code(codes: np.ndarray) -> list[np.ndarray]:
    """Give the rows of each code."""
    order = np.argsort(codes, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(codes[order])) + 1)


def _one(column: pa.ChunkedArray) -> pa.Array:
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column


def _floats(column: pa.ChunkedArray) -> np.ndarray:
    return pc.fill_null(column, np.nan).to_numpy()


def _first(mask: pa.Array) -> int:
    return int(mask.to_numpy(zero_copy_only=False).argmax())
