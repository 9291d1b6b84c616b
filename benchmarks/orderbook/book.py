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

"""The order book of one market, folded message by message in compiled code.

Every number is an integer, so the book is exact: prices in 1e-4 dollars, sizes in 1e-2 contracts.
A book belongs to one market and takes its messages in order of receipt.

A lost message shows where the book crosses or a size would fall below zero, and a reader may tell
of one with `Book.lose`. From then until the next snapshot the book is unknown: it makes no rows,
and rows that wait for a label get none.
"""

import re

from datetime import datetime
from typing import NamedTuple
from zoneinfo import ZoneInfo

import numba
import numpy as np
import pyarrow as pa

__all__ = ["Book", "Events", "MessageError", "close_ms"]

DELTA, SNAPSHOT, TRADE, LEVEL = range(4)
YES, NO = range(2)
EXCHANGE_ZONE = ZoneInfo("America/New_York")
# KXGOLD15M-26AUG102115-15 closes on 10 August 2026 at 21:15.
CLOSE = re.compile(r"-(\d\d(?:JAN|FEB|MAR|APR|MAY|JUN|JUL|AUG|SEP|OCT|NOV|DEC)\d{6})-")

DOLLAR = 10_000
EMPTY = 0
NO_LABEL = -1
HOLE_MS = 300_000
"""A market that is silent for longer gives no labels across the silence."""

# A mid is a multiple of 5e-5 dollars and a spread one of 1e-4, while float32 numbers below 1 lie
# at most 6e-8 apart: float32 keeps them all apart, and round(20_000 * mid) gives the integer back.
FEATURES = "mid", "spread", "imbalance"
ROW = np.dtype([("recv_ms", "i8"), *((name, "f4") for name in FEATURES), ("up", "i1")])

COUNTERS = (
    *("messages", "deltas", "snapshots", "trades", "clock_set_back", "rows", "labelled"),
    *("one_sided", "after_close", "left_out", "crossed", "below_zero", "gaps", "holes"),
)
# mid2: twice the last mid; waiting: rows with this mid, which get their label when it changes;
# earlier: the label of those of earlier calls; unknown: whether messages are missing since the last
# snapshot.
PROGRESS = ("levels_to_come", "seq", "recv_ms", "mid2", "waiting", "earlier", "unknown")
STATE = np.dtype([(name, "i8") for name in PROGRESS + COUNTERS])

FAULTS = {
    (NO_FAULT := 0): "",
    (BAD_KIND := 1): "kind must be 0 (delta), 1 (snapshot), 2 (trade) or 3 (level), it is {kind}",
    (BAD_SIDE := 2): "side must be 0 (yes) or 1 (no), it is {side}",
    (BAD_PRICE := 3): "the price must lie between $0 and $1, it is {price} times $0.0001",
    (BAD_SIZE := 4): "the size of a level must not be negative, it is {size} times 0.01 contracts",
    (BAD_SEQ := 5): "seq must grow from delta to delta, {seq} follows {last_seq}; "
    "messages are repeated or out of order",
    (BAD_LEVELS := 6): "a snapshot must be followed by its levels and nothing else may be; "
    "kind {kind} with size {size} came when {last_levels_to_come} levels were due",
}
BELOW_ZERO = 7


class MessageError(ValueError):
    """A message that cannot be what the exchange sent."""


class Events(NamedTuple):
    """Messages as parallel arrays, in the order in which they were received.

    A snapshot is one `SNAPSHOT` whose size is a number of levels, followed by that many `LEVEL`
    events; every other message is one event. ``kind`` and ``side`` are uint8, the others int64:
    prices in 1e-4 dollars, sizes in 1e-2 contracts, signed in a delta, ``seq`` is -1 if a message
    has none, and of the exchange's time and that of receipt one stands for the other.
    """

    kind: np.ndarray
    side: np.ndarray
    price: np.ndarray
    size: np.ndarray
    seq: np.ndarray
    ts_ms: np.ndarray
    recv_ms: np.ndarray


EVENT_SCHEMA = pa.schema(
    (name, pa.uint8() if name in ("kind", "side") else pa.int64()) for name in Events._fields
)


def close_ms(market: str) -> int | None:
    """Tell when *market* closes, in milliseconds since 1970, if its ticker says so."""
    if (found := CLOSE.search(market)) is None:
        return None
    try:
        close = datetime.strptime(found[1], "%y%b%d%H%M").replace(tzinfo=EXCHANGE_ZONE)
    except ValueError:
        raise MessageError(f"market {market}: its ticker names no time of close") from None
    return int(close.timestamp()) * 1000


class Book:
    """The resting orders of one market, and what was seen on the way.

    Messages later than *close_ms*, in milliseconds on the exchange's clock, make no rows and no
    labels. ``sizes`` are those at each side and price, int64 of shape (2, 10001), and ``best`` the
    highest price of each side, 0 where the side is empty.
    """

    def __init__(self, *, close_ms: int | None) -> None:
        self.sizes = np.zeros((2, DOLLAR + 1), np.int64)
        self.best = np.zeros(2, np.int64)
        self._close_ms = np.iinfo(np.int64).max if close_ms is None else close_ms
        self._state = np.zeros(1, STATE)
        self._state["unknown"] = True
        self._waiting: list[np.ndarray] = []

    @property
    def counts(self) -> dict[str, int]:
        """What was seen so far, by name."""
        return {name: int(self._state[name][0]) for name in COUNTERS}

    def lose(self) -> None:
        """Say that messages are missing here; the rows that wait get no label."""
        self._waiting.clear()
        self._state["waiting"] = 0
        self._state["gaps"] += 1 - self._state["unknown"]
        self._state["unknown"] = True

    def fold(self, events: Events, lines: np.ndarray) -> np.ndarray:
        """Take the next messages, and return the rows whose labels are now known.

        Rows wait for theirs until the mid changes. After a `MessageError`, where a message cannot
        be what was sent, the book is of no use.
        """
        rows, n_before = np.empty(len(events.kind), ROW), int(self._state["waiting"][0])
        at, fault, n_rows = _fold(events, self._close_ms, self.sizes, self.best, self._state, rows)
        if fault != NO_FAULT:
            event = {name: int(column[at]) for name, column in events._asdict().items()}
            state = {f"last_{name}": int(self._state[name][0]) for name in PROGRESS}
            raise MessageError(f"line {lines[at]}: {FAULTS[fault].format(**event, **state)}")
        self._waiting.append(rows[:n_rows].copy())
        if (n_waiting := int(self._state["waiting"][0])) > n_rows:
            return rows[:0]
        rows = np.concatenate(self._waiting)
        rows["up"][:n_before] = self._state["earlier"]
        n_done = len(rows) - n_waiting
        self._waiting = [rows[n_done:].copy()]
        return rows[:n_done][rows["up"][:n_done] != NO_LABEL]


@numba.njit(cache=True, nogil=True)
def _fold(events, close_ms, sizes, best, state, rows):
    """Write rows, and labels of those that waited; return how many rows there are."""
    book = state[0]
    n_rows = 0
    for at in range(len(events.kind)):
        kind, recv_ms = events.kind[at], events.recv_ms[at]
        if recv_ms - book.recv_ms > HOLE_MS and book.messages > 0:
            book.holes += 1
            _label(NO_LABEL, rows, n_rows, book)
        if (kind == LEVEL) != (book.levels_to_come > 0):
            return at, BAD_LEVELS, n_rows
        _count(kind, recv_ms, book)
        fault = NO_FAULT
        if kind != TRADE:
            change = events.side[at], events.price[at], events.size[at], events.seq[at]
            fault = _apply(kind, change, sizes, best, book)
            if fault != NO_FAULT and fault != BELOW_ZERO:
                return at, fault, n_rows
        if kind == TRADE or book.levels_to_come > 0:
            continue
        if not _is_row(events.ts_ms[at] >= close_ms, fault, best, book):
            if book.unknown:
                _label(NO_LABEL, rows, n_rows, book)
            continue
        mid2 = best[YES] + DOLLAR - best[NO]
        if mid2 != book.mid2:
            _label(np.int8(mid2 > book.mid2), rows, n_rows, book)
            book.mid2 = mid2
        _write_row(rows[n_rows], sizes, best, book.recv_ms)
        n_rows += 1
        book.rows += 1
        book.waiting += 1
    return -1, NO_FAULT, n_rows


@numba.njit(cache=True, nogil=True)
def _label(label, rows, n_rows, book):
    """Give all rows that wait one label."""
    for at in range(max(0, n_rows - book.waiting), n_rows):
        rows[at].up = label
    if book.waiting > n_rows:
        book.earlier = label
    if label != NO_LABEL:
        book.labelled += book.waiting
    book.waiting = 0


@numba.njit(cache=True, nogil=True)
def _apply(kind, change, sizes, best, book):
    """Change the book by one message or level; tell what is wrong with it."""
    side, price, size, seq = change
    if kind == SNAPSHOT:
        sizes[:] = 0
        best[:] = EMPTY
        book.seq = seq
        book.unknown = False
        book.levels_to_come = size
        return NO_FAULT if size >= 0 else BAD_LEVELS
    if kind != DELTA and kind != LEVEL:
        return BAD_KIND
    if side != YES and side != NO:
        return BAD_SIDE
    if price <= 0 or price >= DOLLAR:
        return BAD_PRICE
    if kind == LEVEL:
        book.levels_to_come -= 1
        return BAD_SIZE if size < 0 else _set_size(sizes[side], best, side, price, size)
    if seq >= 0:
        if seq <= book.seq:
            return BAD_SEQ
        book.seq = seq
    if book.unknown:
        return NO_FAULT
    return _set_size(sizes[side], best, side, price, sizes[side, price] + size)


@numba.njit(cache=True, nogil=True)
def _count(kind, recv_ms, book):
    book.messages += kind != LEVEL
    book.deltas += kind == DELTA
    book.snapshots += kind == SNAPSHOT
    book.trades += kind == TRADE
    # The order of the messages is right even where the recorder's clock was not.
    book.clock_set_back += recv_ms < book.recv_ms
    book.recv_ms = max(recv_ms, book.recv_ms)


@numba.njit(cache=True, nogil=True)
def _set_size(sizes, best, side, price, size):
    if size < 0:
        return BELOW_ZERO
    sizes[price] = size
    if size > 0:
        best[side] = max(best[side], price)
    elif price == best[side]:
        while price > EMPTY and sizes[price] == 0:
            price -= 1
        best[side] = price
    return NO_FAULT


@numba.njit(cache=True, nogil=True)
def _is_row(closed, fault, best, book):
    """Tell whether the book is one whose features count, and count why not."""
    one_sided = best[YES] == EMPTY or best[NO] == EMPTY
    crossed = not one_sided and best[YES] + best[NO] >= DOLLAR
    if not book.unknown:
        book.below_zero += fault == BELOW_ZERO
        book.crossed += crossed and not closed
        book.unknown = fault == BELOW_ZERO or (crossed and not closed)
    book.after_close += closed
    book.left_out += book.unknown and not closed
    book.one_sided += one_sided and not closed and not book.unknown
    return not (closed or one_sided or book.unknown)


@numba.njit(cache=True, nogil=True)
def _write_row(row, sizes, best, recv_ms):
    bid, ask = best[YES], DOLLAR - best[NO]
    bid_size, ask_size = sizes[YES, best[YES]], sizes[NO, best[NO]]
    row.recv_ms = recv_ms
    row.mid = (bid + ask) / (2 * DOLLAR)
    row.spread = (ask - bid) / DOLLAR
    row.imbalance = (bid_size - ask_size) / (bid_size + ask_size)
