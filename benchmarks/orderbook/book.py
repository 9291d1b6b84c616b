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

>>> book = Book(close_ms=close_ms(market))
>>> for part in read_parts(path):
...     rows, labels = book.fold(part.events, part.lines)

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
CLOSE = re.compile(r"-(\d\d(?:JAN|FEB|MAR|APR|MAY|JUN|JUL|AUG|SEP|OCT|NOV|DEC)\d{6})-")

DOLLAR = 10_000
EMPTY = 0
NO_LABEL = -1
HOLE_MS = 300_000
"""A market that is silent for longer gives no labels across the silence."""

# A mid is a multiple of 5e-5 dollars and a spread one of 1e-4, while float32 numbers below 1 lie
# at most 6e-8 apart: float32 keeps them all apart, and round(20_000 * mid) gives the integer back.
FEATURES = "mid", "spread", "imbalance"
ROW = np.dtype([("recv_ms", "i8"), *((name, "f4") for name in FEATURES)])

COUNTERS = (
    *("messages", "deltas", "snapshots", "trades", "clock_set_back", "rows", "labelled"),
    *("one_sided", "after_close", "left_out", "crossed", "below_zero", "gaps", "holes"),
)
# mid2: twice the last mid; waiting: rows with this mid, which get their label when it changes;
# unknown: whether messages are missing since the last snapshot.
PROGRESS = ("levels_to_come", "seq", "recv_ms", "mid2", "waiting", "unknown")
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


EVENT_SCHEMA = pa.schema(
    [("kind", pa.uint8()), ("side", pa.uint8())]
    + [(name, pa.int64()) for name in ("price", "size", "seq", "ts_ms", "recv_ms")]
)


def close_ms(market: str) -> int | None:
    """Tell when *market* closes, in milliseconds since 1970, if its ticker says so.

    ``KXGOLD15M-26AUG102115-15`` closes on 10 August 2026 at 21:15 Eastern time.
    """
    if (found := CLOSE.search(market)) is None:
        return None
    try:
        close = datetime.strptime(found[1], "%y%b%d%H%M").replace(tzinfo=EXCHANGE_ZONE)
    except ValueError:
        raise MessageError(f"market {market}: its ticker names no time of close") from None
    return int(close.timestamp()) * 1000


class Book:
    """The resting orders of one market, and what was seen on the way.

    Parameters
    ----------
    close_ms : int or None
        When the market closes, in milliseconds since 1970 on the exchange's clock.
        Later messages make no rows and no labels. None means that it stays open.

    Attributes
    ----------
    sizes : ndarray of int64, shape (2, 10001)
        Size at each side and price.
    best : ndarray of int64, shape (2,)
        Highest price of each side, 0 where the side is empty.
    """

    def __init__(self, *, close_ms: int | None) -> None:
        self.sizes = np.zeros((2, DOLLAR + 1), np.int64)
        self.best = np.zeros(2, np.int64)
        self._close_ms = np.iinfo(np.int64).max if close_ms is None else close_ms
        self._state = np.zeros(1, STATE)
        self._state["unknown"] = True

    @property
    def waiting(self) -> int:
        """Rows that were made and have no label yet."""
        return int(self._state["waiting"][0])

    @property
    def counts(self) -> dict[str, int]:
        """What was seen so far, by name."""
        return {name: int(self._state[name][0]) for name in COUNTERS}

    def lose(self) -> np.ndarray:
        """Say that messages are missing here; return the labels of the rows that wait: none."""
        labels = np.full(self.waiting, NO_LABEL, np.int8)
        self._state["waiting"] = 0
        self._state["gaps"] += 1 - self._state["unknown"]
        self._state["unknown"] = True
        return labels

    def fold(self, events: Events, lines: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Take the next messages.

        Returns
        -------
        rows : ndarray of ROW
            The features of each book state with two sides.
        labels : ndarray of int8
            Labels of the rows that waited longest; the others wait for the next change of the mid.
            Rows that can have no label have -1.

        Raises
        ------
        MessageError
            Where a message cannot be what the exchange sent. The book is of no use after that.
        """
        n = len(events.kind)
        rows, labels, lengths = np.empty(n, ROW), np.empty(n, np.int8), np.empty(n, np.int64)
        at, fault, n_rows, n_runs = _fold(
            events, self._close_ms, self.sizes, self.best, self._state, rows, labels, lengths
        )
        if fault != NO_FAULT:
            event = {name: int(column[at]) for name, column in events._asdict().items()}
            state = {f"last_{name}": int(self._state[name][0]) for name in PROGRESS}
            raise MessageError(f"line {lines[at]}: {FAULTS[fault].format(**event, **state)}")
        return rows[:n_rows], np.repeat(labels[:n_runs], lengths[:n_runs])


@numba.njit(cache=True, nogil=True)
def _fold(events, close_ms, sizes, best, state, rows, labels, lengths):
    """Write rows, and runs of labels of the rows that wait; return how many there are of both."""
    book = state[0]
    n_rows = n_runs = 0
    for at in range(len(events.kind)):
        kind, recv_ms = events.kind[at], events.recv_ms[at]
        if recv_ms - book.recv_ms > HOLE_MS and book.messages > 0:
            book.holes += 1
            n_runs = _label(NO_LABEL, labels, lengths, n_runs, book)
        if (kind == LEVEL) != (book.levels_to_come > 0):
            return at, BAD_LEVELS, n_rows, n_runs
        _count(kind, recv_ms, book)
        fault = NO_FAULT
        if kind != TRADE:
            change = events.side[at], events.price[at], events.size[at], events.seq[at]
            fault = _apply(kind, change, sizes, best, book)
            if fault != NO_FAULT and fault != BELOW_ZERO:
                return at, fault, n_rows, n_runs
        if kind == TRADE or book.levels_to_come > 0:
            continue
        if not _is_row(events.ts_ms[at] >= close_ms, fault, best, book):
            if book.unknown:
                n_runs = _label(NO_LABEL, labels, lengths, n_runs, book)
            continue
        mid2 = best[YES] + DOLLAR - best[NO]
        if mid2 != book.mid2:
            n_runs = _label(np.int8(mid2 > book.mid2), labels, lengths, n_runs, book)
            book.mid2 = mid2
        _write_row(rows[n_rows], sizes, best, book.recv_ms)
        n_rows += 1
        book.rows += 1
        book.waiting += 1
    return -1, NO_FAULT, n_rows, n_runs


@numba.njit(cache=True, nogil=True)
def _label(label, labels, lengths, n_runs, book):
    """Give all rows that wait one label, if there are any; return the number of runs."""
    if book.waiting == 0:
        return n_runs
    labels[n_runs], lengths[n_runs] = label, book.waiting
    if label != NO_LABEL:
        book.labelled += book.waiting
    book.waiting = 0
    return n_runs + 1


@numba.njit(cache=True, nogil=True)
def _apply(kind, change, sizes, best, book):
    """Change the book by one message or level; tell what is wrong with it."""
    side, price, size, seq = change
    if kind == SNAPSHOT:
        _clear(sizes, best)
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
def _clear(sizes, best):
    for side in (YES, NO):
        sizes[side, : best[side] + 1] = 0
        best[side] = EMPTY


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
