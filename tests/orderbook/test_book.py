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

import numpy as np

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from benchmarks.orderbook.book import (
    DELTA,
    DOLLAR,
    HOLE_MS,
    LEVEL,
    NO,
    SNAPSHOT,
    TRADE,
    YES,
    Book,
)
from tests.orderbook.naive import SIDES, NaiveBook, naive_labels
from tests.orderbook.wire import CLOSE_MS, as_events, delta, snapshot

# Few prices make levels meet, on one side and across; the ends of the range are among them.
prices = st.sampled_from([1, 4700, 4800, 4801, 5000, 5200, 5300, 9999])
sizes = st.one_of(st.integers(1, 3), st.integers(1, 10**11))
sides = st.sampled_from([YES, NO])


class BookMachine(RuleBasedStateMachine):
    """Messages go to a dictionary at once, and to the compiled book in blocks of any size."""

    def __init__(self):
        super().__init__()
        self.naive, self.book = NaiveBook(), Book(close_ms=CLOSE_MS)
        self.queue, self.rows = [], []
        self.runs = [[]]
        self.seq, self.now, self.known = 0, 1, False

    def observe(self, ts_ms):
        features = self.naive.features()
        if ts_ms < CLOSE_MS and features == "crossed":
            self.known = False
            self.runs.append([])
        elif ts_ms < CLOSE_MS and self.known and features != "one_sided":
            self.runs[-1].append((self.now, *features))

    def enqueue(self, kind, side=0, price=0, size=0, ts_ms=None):
        ts_ms = self.now if ts_ms is None else ts_ms
        self.queue.append((kind, side, price, size, self.seq, ts_ms, self.now))

    @rule(yes=st.dictionaries(prices, sizes), no=st.dictionaries(prices, sizes))
    def snapshot(self, yes, no):
        self.known = True
        # A new subscription counts from anywhere.
        self.seq = 5
        levels = [(side, *level) for side, m in ((YES, yes), (NO, no)) for level in m.items()]
        self.enqueue(SNAPSHOT, size=len(levels))
        for level in levels:
            self.enqueue(LEVEL, *level)
        self.naive.snapshot(snapshot(0, 0, list(yes.items()), list(no.items()))["event"]["msg"])
        self.observe(self.now)

    @rule(side=sides, price=prices, size=sizes, gap=st.integers(1, 3), late=st.booleans())
    def add(self, side, price, size, gap, late):
        self.change(side, price, size, gap, CLOSE_MS - 1 if late else None)

    @precondition(lambda self: self.known and any(self.naive.sizes.values()))
    @rule(data=st.data(), whole=st.booleans())
    def reduce(self, data, whole):
        levels = [(i, price) for i, s in enumerate(SIDES) for price in self.naive.sizes[s]]
        side, price = data.draw(st.sampled_from(sorted(levels)))
        size = int(100 * self.naive.sizes[SIDES[side]][price])
        size = size if whole else data.draw(st.integers(1, size))
        self.change(side, int(10_000 * price), -size, 1, None)

    @precondition(lambda self: self.known)
    @rule(side=sides, price=prices)
    def reduce_below_zero(self, side, price):
        self.seq += 1
        self.enqueue(DELTA, side, price, -(10**13))
        self.known = False
        self.runs.append([])

    def change(self, side, price, size, gap, ts_ms):
        self.seq += gap
        self.enqueue(DELTA, side, price, size, ts_ms)
        if self.known:
            self.naive.delta(delta(0, 0, side, price, size)["event"]["msg"])
            self.observe(self.now if ts_ms is None else ts_ms)

    @rule()
    def trade(self):
        self.enqueue(TRADE)

    @rule(pause=st.sampled_from([0, 1, HOLE_MS, HOLE_MS + 1, CLOSE_MS // 4]))
    def wait(self, pause):
        self.now += pause
        if pause > HOLE_MS and self.seq:
            self.enqueue(TRADE)
            self.runs.append([])

    @precondition(lambda self: self.queue)
    @rule()
    def lose(self):
        self.fold_some(1.0)
        self.book.lose()
        self.known = False
        self.runs.append([])

    @rule(share=st.floats(0, 1))
    def fold_some(self, share):
        n = int(share * len(self.queue))
        self.rows += self.book.fold(as_events(self.queue[:n]), np.arange(n)).tolist()
        self.queue = self.queue[n:]

    def teardown(self):
        self.fold_some(1.0)
        expected = []
        for run in self.runs:
            labels = naive_labels([row[1] for row in run])
            rows = [(row[0], *map(float, np.float32([*map(float, row[1:])]))) for row in run]
            expected += [(*row, up) for row, up in zip(rows, labels) if up is not None]
        assert self.rows == expected
        counts = self.book.counts
        assert counts["labelled"] == len(expected)
        assert counts["rows"] == sum(map(len, self.runs))
        if self.known:
            assert [dict(zip(s.nonzero()[0], s[s > 0])) for s in self.book.sizes] == [
                {int(10_000 * p): int(100 * s) for p, s in self.naive.sizes[side].items()}
                for side in SIDES
            ]


BookMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestBookAgainstDictionary = BookMachine.TestCase


def test_float32_keeps_every_mid_apart():
    mid2 = np.arange(2, 2 * DOLLAR - 1)
    mids = (mid2 / (2 * DOLLAR)).astype(np.float32)
    np.testing.assert_array_equal(np.round(mids.astype(float) * 2 * DOLLAR), mid2)
