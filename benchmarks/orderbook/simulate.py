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

"""One synthetic market: an order book that moves by a rule which drifts with time.

>>> for events in simulate(market):
...     book.fold(events)

Most messages change a size without moving the mid. A few move it, up with probability

    sigmoid(REVERSION * (level - mid) + lead * imbalance + pull * (spread - 0.04))

where ``level``, ``lead`` and ``pull`` change between time 0 and 1 (see `regime`). A move either
widens the spread by a cent, because the best order of a side goes, or narrows it at once, because
a better order comes; ``rises_by_widening`` says how often a rise is of the first kind. Where rises
are single cents and falls are several, most rows lie before a rise though the mid stays in place.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numba
import numpy as np

from benchmarks.orderbook.book import DELTA, LEVEL, NO, SNAPSHOT, TRADE, YES, Events

__all__ = ["FEWEST_MESSAGES", "Market", "regime", "simulate"]

FEWEST_MESSAGES = 32
BLOCK = 1 << 15
N_LOST = 200
SEQ_AFTER_RESTART = 22

CENT = 100
DEPTH = 15
N_DRAWS = 5
MOVE_RATE = 0.07
SIZE = 6_000
REVERSION = 14.0
WIDEST = 5
CLOSING_MS = 1_000


@dataclass(frozen=True, slots=True)
class Market:
    """What is to be simulated."""

    ticker: str
    """Name; it tells the time of the close."""
    open_ms: int
    """Time of the first message."""
    close_ms: int
    """Time of the close; three messages come after it."""
    n_messages: int
    """Messages in total, at least `FEWEST_MESSAGES`."""
    seq: tuple[int, int]
    """Number of the first message on the socket, and the step to the next one."""
    span: tuple[float, float]
    """Place of the market in the drift, which goes from 0 to 1."""
    resubscribes: bool
    """Whether the socket is lost midway and a second snapshot opens a new one."""
    seed: np.random.SeedSequence
    """Source of its random numbers."""


def simulate(market: Market) -> Iterator[Events]:
    """Yield the messages of one market in blocks; a snapshot is a block of its own."""
    if market.n_messages < FEWEST_MESSAGES:
        raise ValueError(f"n_messages must be at least {FEWEST_MESSAGES}, got {market.n_messages}")
    return _blocks(market)


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


def _blocks(market: Market) -> Iterator[Events]:
    draws_seed, clock_seed = market.seed.spawn(2)
    clock, rng = _Clock(market, clock_seed), np.random.default_rng(draws_seed)
    sizes, best = _open_book(market, rng)
    last = market.n_messages - 3
    bounds = (1, last // 2, last) if market.resubscribes else (1, last)
    yield _snapshot(sizes, clock.events(0, 1))
    for start, stop in pairwise(bounds):
        if start > 1:
            # What happens while the socket is down shows only in the next snapshot.
            _moves(market, sizes, best, rng, start, N_LOST)
            clock.restart(start)
            yield _snapshot(sizes, clock.events(start, 1))
            start += 1
        for first in range(start, stop, BLOCK):
            n = min(BLOCK, stop - first)
            columns = _moves(market, sizes, best, rng, first, n)
            yield Events._make([*columns, *clock.events(first, n)])
    yield from _closing(market, sizes, clock)


class _Clock:
    """Sequence numbers and times of the messages of one market."""

    def __init__(self, market: Market, seed: np.random.SeedSequence) -> None:
        self._market = market
        self._rng = np.random.default_rng(seed)
        self._first_seq, self._step = market.seq
        self._recv_ms = market.open_ms

    def restart(self, at: int) -> None:
        """Begin a new count of messages, on a new socket, with message *at*."""
        self._first_seq = SEQ_AFTER_RESTART - at * self._step

    def events(self, first: int, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Give seq, ts_ms and recv_ms of *n* messages from *first* on."""
        market = self._market
        at = np.arange(first, first + n)
        last_ms = market.close_ms - CLOSING_MS
        share = (at + self._rng.random(n)) / market.n_messages
        ts_ms = (market.open_ms + (last_ms - market.open_ms) * share).astype(np.int64)
        ts_ms[at >= market.n_messages - 3] = market.close_ms
        delay = self._rng.integers(9, 16, n)
        recv_ms = np.maximum.accumulate(np.append(self._recv_ms, ts_ms + delay))[1:]
        self._recv_ms = recv_ms[-1]
        return self._first_seq + at * self._step, ts_ms, recv_ms


def _open_book(market: Market, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Make a book of `DEPTH` levels a side around the level of the regime."""
    level, _, _, _, narrowest, _ = regime(market.span[0])
    bid = int(100 * level) - narrowest // 2
    best = np.array([bid, 100 - bid - narrowest])
    sizes = np.zeros((2, 101), np.int64)
    for side in (YES, NO):
        sizes[side, best[side] - DEPTH + 1 : best[side] + 1] = 10 * rng.integers(
            1, SIZE // 5, DEPTH
        )
    return sizes, best


def _snapshot(sizes: np.ndarray, when: tuple[np.ndarray, ...]) -> Events:
    side, cents = sizes.nonzero()
    n = 1 + len(side)
    seq, _, recv_ms = (np.repeat(column, n) for column in when)
    return Events(
        np.append(SNAPSHOT, np.full(n - 1, LEVEL)).astype(np.uint8),
        np.append(0, side).astype(np.uint8),
        np.append(0, cents * CENT),
        np.append(n - 1, sizes[side, cents]),
        seq,
        recv_ms,
        recv_ms,
    )


def _moves(
    market: Market,
    sizes: np.ndarray,
    best: np.ndarray,
    rng: np.random.Generator,
    first: int,
    n: int,
) -> tuple[np.ndarray, ...]:
    """Simulate *n* deltas and trades: kind, side, price and size."""
    kind, side = np.full(n, DELTA, np.uint8), np.empty(n, np.uint8)
    price, size = np.empty(n, np.int64), np.empty(n, np.int64)
    began, ended = market.span
    times = began + (ended - began) * np.arange(first, first + n) / market.n_messages
    _simulate(times, rng.random((n, N_DRAWS)), sizes, best, kind, side, price, size)
    return kind, side, price, size


def _closing(market: Market, sizes: np.ndarray, clock: _Clock) -> Iterator[Events]:
    """Cancel the lowest order of each side after the close, then show an empty book."""
    sides = np.array([YES, NO], np.uint8)
    lowest = (sizes > 0).argmax(axis=1)
    when = clock.events(market.n_messages - 3, 2)
    yield Events(np.full(2, DELTA, np.uint8), sides, CENT * lowest, -sizes[sides, lowest], *when)
    yield _snapshot(np.zeros_like(sizes), clock.events(market.n_messages - 1, 1))


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
        return side, best[side], -sizes[side, best[side]] if _has_second(side, sizes, best) else 0
    return side, best[side] + spread - narrowest, _new_size(side, lean, draw[3])


@numba.njit(cache=True, nogil=True)
def _has_second(side, sizes, best):
    """Tell whether the next cent below the best of *side* has an order, well above 0."""
    return best[side] > DEPTH and sizes[side, best[side] - 1] > 0


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
