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

"""Order-book messages as lines of JSON, key by key as Kalshi's WebSocket sends them.

>>> write_json(directory / market / "2026-08-11.ndjson.gz", market, blocks)

Only what a recorder adds and what the order book needs comes from the events;
identifiers and the microseconds of a time stamp are made up from the sequence numbers.
"""

import gzip
import json
import re
import uuid

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numba
import numpy as np

from benchmarks.orderbook.messages import DELTA, LEVEL, NO, SNAPSHOT, YES, Events

__all__ = ["write_json"]

# Private-use characters stand for the fields of a message.
FIELDS = [chr(0xE000 + i) for i in range(11)]
RECV_MS, SEQ, PRICE, OPPOSITE, SIZE, SIDE, BOOK_SIDE, TIME, TS_MS, TS, TRADE_ID = FIELDS
DELTA_LINE = (
    f'{{"recv_ms":{RECV_MS},"event":{{"type":"orderbook_delta","sid":1,"seq":{SEQ},"msg":{{'
    '"market_ticker":"MARKET","market_id":"ID",'
    f'"price_dollars":"{PRICE}","delta_fp":"{SIZE}","side":"{SIDE}",'
    f'"ts":"{TIME}","ts_ms":{TS_MS}}}}}}}\n'
)
TRADE_LINE = (
    f'{{"recv_ms":{RECV_MS},"event":{{"type":"trade","sid":2,"seq":{SEQ},"msg":{{'
    f'"trade_id":"{TRADE_ID}","market_ticker":"MARKET",'
    f'"yes_price_dollars":"{PRICE}","no_price_dollars":"{OPPOSITE}","count_fp":"{SIZE}",'
    f'"taker_side":"{SIDE}","taker_outcome_side":"{SIDE}","taker_book_side":"{BOOK_SIDE}",'
    f'"ts":{TS},"ts_ms":{TS_MS}}}}}}}\n'
)
LONGEST_FIELDS = 192


def write_json(path: Path, market: str, blocks: Iterable[Events]) -> None:
    """Write messages as gzipped lines of JSON; each snapshot must be a block of its own."""
    delta, trade = _template(DELTA_LINE, market), _template(TRADE_LINE, market)
    with path.open("wb") as raw, gzip.GzipFile("", "wb", 1, raw, mtime=0) as file:
        for events in blocks:
            if len(events.kind) and events.kind[0] == SNAPSHOT:
                file.write(_snapshot_line(market, events))
            else:
                file.write(_lines(events, delta, trade))


class _Template(NamedTuple):
    """A line cut at its fields, each of which follows the piece of the same number."""

    text: np.ndarray
    """uint8, the pieces end to end."""
    ends: np.ndarray
    """int64, where each piece ends."""
    fields: np.ndarray
    """int64, which field follows; the last piece has none."""


def _template(line: str, market: str) -> _Template:
    line = line.replace("ID", _market_id(market)).replace("MARKET", market)
    pieces = re.split(f"([{''.join(FIELDS)}])", line)
    text, fields = pieces[::2], pieces[1::2]
    return _Template(
        np.frombuffer("".join(text).encode(), np.uint8),
        np.cumsum([len(piece) for piece in text]),
        np.array([FIELDS.index(field) for field in fields]),
    )


def _market_id(market: str) -> str:
    return str(uuid.uuid5(uuid.NAMESPACE_DNS, market))


def _snapshot_line(market: str, events: Events) -> bytes:
    message: dict[str, object] = {"market_ticker": market, "market_id": _market_id(market)}
    for side, key in ((YES, "yes_dollars_fp"), (NO, "no_dollars_fp")):
        rows = (events.kind == LEVEL) & (events.side == side)
        levels = zip(events.price[rows].tolist(), events.size[rows].tolist())
        # An empty side has no key.
        if rows.any():
            message[key] = [[_fixed(price, 4), _fixed(size, 2)] for price, size in levels]
    event = {"type": "orderbook_snapshot", "sid": 1, "seq": int(events.seq[0]), "msg": message}
    line = {"recv_ms": int(events.recv_ms[0]), "event": event}
    return json.dumps(line, separators=(",", ":")).encode() + b"\n"


def _fixed(value: int, decimals: int) -> str:
    whole, fraction = divmod(value, 10**decimals)
    return f"{whole}.{fraction:0{decimals}}"


def _lines(events: Events, delta: _Template, trade: _Template) -> memoryview:
    longest = max(len(delta.text), len(trade.text)) + LONGEST_FIELDS
    text = np.empty(len(events.kind) * longest, np.uint8)
    return text[: _fill_templates(text, events, delta, trade)].data


@numba.njit(cache=True, nogil=True)
def _fill_templates(text, events, delta, trade):
    at = 0
    for i in range(len(events.kind)):
        template = delta if events.kind[i] == DELTA else trade
        start = 0
        for piece, end in enumerate(template.ends):
            for byte in template.text[start:end]:
                text[at] = byte
                at += 1
            start = end
            if piece < len(template.fields):
                at = _put_field(text, at, template.fields[piece], events, i)
    return at


@numba.njit(cache=True, nogil=True)
def _put_field(text, at, field, events, i):
    recv_ms, seq, price, opposite, size, side, book_side, time, ts_ms, ts, _ = range(11)
    if field == recv_ms:
        return _put_int(text, at, events.recv_ms[i], 1)
    if field == seq:
        return _put_int(text, at, events.seq[i], 1)
    if field == price:
        return _put_fixed(text, at, events.price[i], 4)
    if field == opposite:
        return _put_fixed(text, at, 10_000 - events.price[i], 4)
    if field == size:
        return _put_fixed(text, at, events.size[i], 2)
    if field == side:
        return _put(text, at, b"yes" if events.side[i] == YES else b"no")
    if field == book_side:
        return _put(text, at, b"bid" if events.side[i] == YES else b"ask")
    if field == time:
        return _put_time(text, at, events.ts_ms[i], events.seq[i])
    if field == ts_ms:
        return _put_int(text, at, events.ts_ms[i], 1)
    if field == ts:
        return _put_int(text, at, events.ts_ms[i] // 1000, 1)
    return _put_uuid(text, at, events.seq[i], events.ts_ms[i])


@numba.njit(cache=True, nogil=True)
def _put(text, at, piece):
    for byte in piece:
        text[at] = byte
        at += 1
    return at


@numba.njit(cache=True, nogil=True)
def _put_int(text, at, value, width):
    """Write *value* in at least *width* digits."""
    power = 1
    while width > 1 or value // power >= 10:
        power *= 10
        width -= 1
    while power > 0:
        text[at] = 48 + value // power % 10
        at += 1
        power //= 10
    return at


@numba.njit(cache=True, nogil=True)
def _put_fixed(text, at, value, decimals):
    if value < 0:
        at = _put(text, at, b"-")
        value = -value
    at = _put_int(text, at, value // 10**decimals, 1)
    at = _put(text, at, b".")
    return _put_int(text, at, value % 10**decimals, decimals)


@numba.njit(cache=True, nogil=True)
def _put_time(text, at, ts_ms, seq):
    """Write a time as Go's RFC 3339 does, without the zeros at the end of the fraction."""
    seconds = ts_ms // 1000
    year, month, day = _civil(seconds // 86_400)
    at = _put_int(text, at, year, 4)
    for mark, number in (
        (b"-", month),
        (b"-", day),
        (b"T", seconds // 3600 % 24),
        (b":", seconds // 60 % 60),
        (b":", seconds % 60),
    ):
        at = _put_int(text, _put(text, at, mark), number, 2)
    microseconds = ts_ms % 1000 * 1000 + seq * 7919 % 1000
    if microseconds > 0:
        at = _put_int(text, _put(text, at, b"."), microseconds, 6)
        while text[at - 1] == 48:
            at -= 1
    return _put(text, at, b"Z")


@numba.njit(cache=True, nogil=True)
def _civil(days):
    """Convert days since 1970 to a date of the Gregorian calendar, counting years from March."""
    days += 719_468
    era, day = days // 146_097, days % 146_097
    year = (day - day // 1460 + day // 36_524 - day // 146_096) // 365
    day -= 365 * year + year // 4 - year // 100
    month = (5 * day + 2) // 153
    day -= (153 * month + 2) // 5
    month = month + 3 if month < 10 else month - 9
    return 400 * era + year + (month <= 2), month, day + 1


@numba.njit(cache=True, nogil=True)
def _put_uuid(text, at, seq, ts_ms):
    bits = np.uint64(seq)
    for i in range(32):
        if i in (8, 12, 16, 20):
            at = _put(text, at, b"-")
        # One step of a linear congruential generator gives one digit.
        bits = bits * np.uint64(6364136223846793005) + np.uint64(2 * ts_ms + 1)
        digit = bits >> np.uint64(60)
        text[at] = digit + (48 if digit < 10 else 87)
        at += 1
    return at
