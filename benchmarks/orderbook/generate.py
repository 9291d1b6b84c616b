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
"""Make synthetic order-book messages whose regime drifts through the whole table.

    python -m benchmarks.orderbook.generate MESSAGES --messages 2_500_000 --seed 0

Markets of 15 minutes follow each other in several series, as Kalshi's do. Most messages change
a size without moving the mid. A few move it, up with probability

    sigmoid(REVERSION * (level - mid) + lead * imbalance + pull * (spread - 0.04))

where ``level``, ``lead`` and ``pull`` drift while time goes from 0 to 1 over all markets (see
`regime`), so that a posterior fitted to a window of time is wrong for the table. A move either
widens the spread by a cent, because the best order of a side goes, or narrows it at once, because
a better order comes; ``rises_by_widening`` says how often a rise is of the first kind.
"""

import gzip
import json

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numba
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.harness import followed, published, run_command, write_files
from benchmarks.orderbook.book import (
    DELTA,
    EVENT_SCHEMA,
    EXCHANGE_ZONE,
    FEATURES,
    LEVEL,
    NO,
    SNAPSHOT,
    TRADE,
    YES,
    Book,
    Events,
    close_ms,
)

__all__ = ["SERIES", "Market", "generate", "plan", "simulate", "write_rows"]

SERIES = ("KXSYNA15M", "KXSYNB15M", "KXSYNC15M", "KXSYND15M")
FIRST_OPEN_MS = 1_786_406_400_000  # 2026-08-11 00:00 UTC
QUARTER_MS = 900_000
CLOSING_MS = 1_000
MESSAGES_PER_MARKET = 100_000
FEWEST_MESSAGES = 32
BLOCK = 1 << 15
RESUBSCRIBED_EVERY = 3
N_LOST = 200
SEQ_AFTER_RESTART = 22
SIDES = "yes", "no"
AHEAD = 4

CENT = 100
DEPTH = 15
N_DRAWS = 5
MOVE_RATE = 0.07
SIZE = 6_000
REVERSION = 14.0
WIDEST = 5


class Market(NamedTuple):
    """One market to simulate; those of a window of time follow each other in number."""

    number: int
    n_windows: int
    n_messages: int
    """At least `FEWEST_MESSAGES`; the last three come after the close."""
    seed: np.random.SeedSequence

    @property
    def window(self) -> int:
        return self.number // len(SERIES)

    @property
    def open_ms(self) -> int:
        return FIRST_OPEN_MS + self.window * QUARTER_MS

    @property
    def ticker(self) -> str:
        """Name, which tells the time of the close."""
        close = datetime.fromtimestamp((self.open_ms + QUARTER_MS) / 1000, EXCHANGE_ZONE)
        series = SERIES[self.number % len(SERIES)]
        return f"{series}-{close:%y%b%d%H%M}-{close:%M}".upper()


def generate(
    destination: str | Path,
    *,
    messages: int = 2_500_000,
    seed: int = 0,
    format: str = "json",
    overwrite: bool = False,
    progressbar: bool = True,
) -> None:
    """Write so many synthetic messages: snapshots, deltas and trades.

    They are Kalshi's JSON lines in ``<market>/<date>.ndjson.gz``, or with *format* "parquet" the
    same content in columns in ``<market>/<date>.parquet``. The destination appears when all of its
    files are complete, and is replaced only with *overwrite*.
    """
    if format not in WRITERS:
        raise ValueError(f"format must be one of {', '.join(WRITERS)}, got {format}")
    suffix, write_messages = WRITERS[format]
    markets = plan(messages, seed)
    with published(destination, overwrite=overwrite) as (content, _):
        for market in followed(markets, "Generating messages", len(markets), progressbar):
            (content / market.ticker).mkdir()
            day = datetime.fromtimestamp(market.open_ms / 1000, UTC).date()
            path = content / market.ticker / f"{day}{suffix}"
            write_messages(path, market.ticker, simulate(market))


def plan(messages: int, seed: int) -> list[Market]:
    """Divide *messages* among markets, in the order of time."""
    n_windows = max(1, round(messages / MESSAGES_PER_MARKET / len(SERIES)))
    n_markets = n_windows * len(SERIES)
    if messages < FEWEST_MESSAGES * n_markets:
        raise ValueError(f"messages must be at least {FEWEST_MESSAGES * n_markets}, got {messages}")
    sizes = np.diff(np.linspace(0, messages, n_markets + 1).astype(int)).tolist()
    seeds = np.random.SeedSequence(seed).spawn(n_markets)
    return [Market(i, n_windows, sizes[i], seeds[i]) for i in range(n_markets)]


def write_rows(
    destination: str | Path, *, rows: int, seed: int, planned: int | None = None
) -> None:
    """Write the first *rows* rows that `generate` and ``fold`` would make, sorted by time.

    The markets drift through the whole table of *planned* rows, by default as many. No messages are
    on the disk, and memory is bounded: by a few windows of four markets each.
    """
    planned = rows if planned is None else planned
    if not 1 <= rows <= planned:
        raise ValueError(f"rows must lie between 1 and planned={planned}, got {rows}")
    with published(destination, overwrite=False) as (content, _):
        write_files(_first(rows, plan(_messages_for(planned), seed)), content)


def _messages_for(rows: int) -> int:
    """Give enough messages: of a hundred, 98 make rows."""
    return 1_000 + rows * 103 // 100


def _first(n_rows: int, markets: list[Market]) -> Iterator[pa.Table]:
    """Yield rows of the markets, those that are open at the same time together."""
    windows = [markets[at : at + len(SERIES)] for at in range(0, len(markets), len(SERIES))]
    with ThreadPoolExecutor(2) as pool:
        for at in range(0, len(windows), AHEAD):
            for table in pool.map(_window, windows[at : at + AHEAD]):
                yield table[:n_rows]
                n_rows -= min(n_rows, len(table))
            if n_rows == 0:
                return


def _window(markets: list[Market]) -> pa.Table:
    """Merge the rows of *markets* by time; those of the same time go by market."""
    rows = np.concatenate([_market(market) for market in markets])
    rows = rows[np.argsort(rows["recv_ms"], kind="stable")]
    return pa.table({name: rows[name].copy() for name in (*FEATURES, "up")})


def _market(market: Market) -> np.ndarray:
    """Give the rows of one market that have a label."""
    book = Book(close_ms=close_ms(market.ticker))
    return np.concatenate([book.fold(e, np.arange(len(e.kind))) for e in simulate(market)])


def _write_json(path: Path, market: str, blocks: Iterable[Events]) -> None:
    with path.open("wb") as raw, gzip.GzipFile("", "wb", 1, raw, mtime=0) as file:
        for events in blocks:
            messages = (json.dumps(m, separators=(",", ":")) for m in _messages(market, events))
            file.write("".join(f"{message}\n" for message in messages).encode())


def _messages(market: str, events: Events) -> Iterator[dict[str, Any]]:
    """Give messages with the keys of Kalshi's that a book needs, and some of those of its trades."""
    rows = zip(*(column.tolist() for column in events))
    for kind, side, price, size, seq, ts_ms, recv_ms in rows:
        body: dict[str, Any] = {"market_ticker": market}
        if kind == SNAPSHOT:
            name = "orderbook_snapshot"
            # An empty side has no key.
            for _, side, *level, _, _, _ in islice(rows, size):
                body.setdefault(f"{SIDES[side]}_dollars_fp", []).append(_decimals(*level))
        else:
            keys = ("price_dollars", "delta_fp", "side")
            if kind == TRADE:
                keys = ("yes_price_dollars", "count_fp", "taker_side")
            name = "trade" if kind == TRADE else "orderbook_delta"
            body |= {**dict(zip(keys, (*_decimals(price, size), SIDES[side]))), "ts_ms": ts_ms}
        sid = 2 if kind == TRADE else 1
        yield {"recv_ms": recv_ms, "event": {"type": name, "sid": sid, "seq": seq, "msg": body}}


def _decimals(price: int, size: int) -> tuple[str, str]:
    return f"{price / 1e4:.4f}", f"{size / 1e2:.2f}"


def _write_parquet(path: Path, market: str, blocks: Iterable[Events]) -> None:
    with pq.ParquetWriter(path, EVENT_SCHEMA, compression="zstd") as writer:
        for events in blocks:
            writer.write_batch(pa.record_batch(list(events), schema=EVENT_SCHEMA))


WRITERS = {"json": (".ndjson.gz", _write_json), "parquet": (".parquet", _write_parquet)}


def simulate(market: Market) -> Iterator[Events]:
    """Yield the messages of one market in blocks; a snapshot is a block of its own."""
    return _Simulation(market).blocks()


class _Simulation:
    """The book of one market, its clock, and its random numbers."""

    def __init__(self, market: Market) -> None:
        self.market = market
        self.rng, self.clock_rng = map(np.random.default_rng, market.seed.spawn(2))
        # The markets of a window share the socket's numbers.
        n_before = market.window * len(SERIES) * market.n_messages
        self.first_seq = 1_000_000 + market.number + n_before
        self.recv_ms = market.open_ms
        level, _, _, _, narrowest, _ = regime(market.window / market.n_windows)
        bid = int(100 * level) - narrowest // 2
        self.best = np.array([bid, 100 - bid - narrowest])
        self.sizes = np.zeros((2, 101), np.int64)
        for side, cents in enumerate(self.best):
            levels = 10 * self.rng.integers(1, SIZE // 5, DEPTH)
            self.sizes[side, cents - DEPTH + 1 : cents + 1] = levels

    def blocks(self) -> Iterator[Events]:
        n, closing = self.market.n_messages, self.market.n_messages - 3
        yield self.snapshot(0)
        resubscribes = self.market.number % RESUBSCRIBED_EVERY == 1
        starts = (1, closing // 2, closing) if resubscribes else (1, closing)
        for start, stop in pairwise(starts):
            if start > 1:
                # What happens while the socket is down shows only in the next snapshot.
                self.moves(start, N_LOST)
                self.first_seq = SEQ_AFTER_RESTART - start * len(SERIES)
                yield self.snapshot(start)
                start += 1
            for first in range(start, stop, BLOCK):
                n_moves = min(BLOCK, stop - first)
                yield Events._make([*self.moves(first, n_moves), *self.clock(first, n_moves)])
        # After the close, the lowest order of each side is cancelled, and then the book is empty.
        sides = np.array([YES, NO], np.uint8)
        lowest = (self.sizes > 0).argmax(axis=1)
        cancelled = CENT * lowest, -self.sizes[sides, lowest], *self.clock(closing, 2)
        yield Events(np.full(2, DELTA, np.uint8), sides, *cancelled)
        self.sizes[:] = 0
        yield self.snapshot(n - 1)

    def snapshot(self, at: int) -> Events:
        side, cents = self.sizes.nonzero()
        n = 1 + len(side)
        seq, _, recv_ms = (np.repeat(column, n) for column in self.clock(at, 1))
        return Events(
            np.append(SNAPSHOT, np.full(n - 1, LEVEL)).astype(np.uint8),
            np.append(0, side).astype(np.uint8),
            np.append(0, cents * CENT),
            np.append(n - 1, self.sizes[side, cents]),
            seq,
            recv_ms,
            recv_ms,
        )

    def moves(self, first: int, n: int) -> tuple[np.ndarray, ...]:
        """Simulate *n* deltas and trades: kind, side, price and size."""
        kind, side = np.full(n, DELTA, np.uint8), np.empty(n, np.uint8)
        price, size = np.empty(n, np.int64), np.empty(n, np.int64)
        window, n_windows = self.market.window, self.market.n_windows
        began, ended = window / n_windows, (window + 1) / n_windows
        times = began + (ended - began) * np.arange(first, first + n) / self.market.n_messages
        draws = self.rng.random((n, N_DRAWS))
        _simulate(times, draws, self.sizes, self.best, kind, side, price, size)
        return kind, side, price, size

    def clock(self, first: int, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Give seq, ts_ms and recv_ms of *n* messages from *first* on."""
        at, open_ms = np.arange(first, first + n), self.market.open_ms
        share = (at + self.clock_rng.random(n)) / self.market.n_messages
        ts_ms = (open_ms + (QUARTER_MS - CLOSING_MS) * share).astype(np.int64)
        ts_ms[at >= self.market.n_messages - 3] = open_ms + QUARTER_MS
        delay = self.clock_rng.integers(9, 16, n)
        recv_ms = np.maximum.accumulate(np.append(self.recv_ms, ts_ms + delay))[1:]
        self.recv_ms = recv_ms[-1]
        return self.first_seq + at * len(SERIES), ts_ms, recv_ms


@numba.njit(cache=True, nogil=True)
def regime(time):
    """Give level, lead, pull, rises_by_widening, narrowest spread in cents and lean at *time*."""
    level = 0.38 + 0.24 * time + 0.08 * np.sin(4 * np.pi * time)
    lead = 2.5 - 4.0 * time
    pull = 12.0 - 24.0 * time
    rises_by_widening = 0.85 - 0.7 * time
    narrowest = 1 + int(3.999 * time)
    lean = 0.5 * np.cos(np.pi * time)
    return level, lead, pull, rises_by_widening, narrowest, lean


@numba.njit(cache=True, nogil=True)
def _simulate(times, draws, sizes, best, kind, side, price, size):
    slot = 0
    while slot < len(times):
        draw = draws[slot]
        at_side, cents, change = 0, 0, 0
        if draw[0] < MOVE_RATE:
            at_side, cents, change = _move(times[slot], draw, sizes, best)
            if change < 0 and draw[4] < 0.5 and slot + 1 < len(times):
                # The best order goes because it is hit: its maker's opposite takes it.
                kind[slot], side[slot], size[slot] = TRADE, 1 - at_side, -change
                price[slot] = CENT * (cents if at_side == YES else 100 - cents)
                slot += 1
        if change == 0:
            at_side, cents, change = _resize(times[slot], draw, sizes, best)
        _set_size(at_side, cents, sizes[at_side, cents] + change, sizes, best)
        side[slot], price[slot], size[slot] = at_side, CENT * cents, change
        slot += 1


@numba.njit(cache=True, nogil=True)
def _move(time, draw, sizes, best):
    """Choose a delta that moves the mid; a change of 0 if the book is too thin for it."""
    level, lead, pull, rises_by_widening, narrowest, lean = regime(time)
    bid, ask = best[YES], 100 - best[NO]
    bid_size, ask_size = sizes[YES, bid], sizes[NO, best[NO]]
    imbalance = (bid_size - ask_size) / (bid_size + ask_size)
    mid, spread = (bid + ask) / 200, ask - bid
    logit = REVERSION * (level - mid) + lead * imbalance + pull * (spread / 100 - 0.04)
    rises = draw[1] * (1 + np.exp(-logit)) < 1
    widens = draw[2] < (rises_by_widening if rises else 1 - rises_by_widening)
    if spread >= narrowest + WIDEST:
        widens = False
    if spread <= narrowest:
        widens = True
    side = YES if rises != widens else NO
    if widens:
        # The next cent must have an order, well above 0.
        has_second = best[side] > DEPTH and sizes[side, best[side] - 1] > 0
        return side, best[side], -sizes[side, best[side]] if has_second else 0
    return side, best[side] + spread - narrowest, _new_size(side, lean, draw[3])


@numba.njit(cache=True, nogil=True)
def _new_size(side, lean, draw):
    favour = 1 + lean if side == YES else 1 - lean
    return 10 * (1 + int(favour * SIZE / 5 * draw * draw))


@numba.njit(cache=True, nogil=True)
def _resize(time, draw, sizes, best):
    """Choose a delta that leaves the mid where it is."""
    lean = regime(time)[5]
    side = YES if draw[1] < 0.5 else NO
    depth = 0 if draw[2] < 0.4 else 1 + int((draw[2] - 0.4) / 0.6 * DEPTH)
    cents = max(1, best[side] - depth)
    now, target = sizes[side, cents], _new_size(side, lean, draw[3])
    if now == 0 or draw[4] < 0.5:
        change = int(target - now) // 40 * 10
    else:
        change = 10 if draw[4] < 0.75 else -10
    # Keep every order: the book must not thin out, nor the mid move.
    return side, cents, change if now + change > 0 and change != 0 else 10


@numba.njit(cache=True, nogil=True)
def _set_size(side, cents, size, sizes, best):
    sizes[side, cents] = size
    best[side] = max(best[side], cents)
    while sizes[side, best[side]] == 0:
        best[side] -= 1


if __name__ == "__main__":
    run_command(generate)
