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

"""The order book as a dictionary: slow, plain, and sharing no code with what it checks."""

import gzip
import json

from fractions import Fraction
from pathlib import Path

import numpy as np

SIDES = ("yes", "no")


class NaiveBook:
    """Sizes by side and price, as exact fractions of contracts and dollars."""

    def __init__(self):
        self.sizes = {side: {} for side in SIDES}

    def snapshot(self, message):
        for side in SIDES:
            levels = message.get(f"{side}_dollars_fp", [])
            self.sizes[side] = {Fraction(price): Fraction(size) for price, size in levels}

    def delta(self, message):
        sizes, price = self.sizes[message["side"]], Fraction(message["price_dollars"])
        size = sizes.get(price, Fraction(0)) + Fraction(message["delta_fp"])
        assert size >= 0
        sizes[price] = size
        if size == 0:
            del sizes[price]

    def features(self):
        """Give mid, spread and imbalance, or the reason why there are none."""
        yes, no = (self.sizes[side] for side in SIDES)
        if not yes or not no:
            return "one_sided"
        bid, ask = max(yes), 1 - max(no)
        if bid >= ask:
            return "crossed"
        bid_size, ask_size = yes[max(yes)], no[max(no)]
        imbalance = (bid_size - ask_size) / (bid_size + ask_size)
        return (bid + ask) / 2, ask - bid, imbalance


def naive_rows(messages, close_ms):
    """Fold the messages of one market into (recv_ms, mid, spread, imbalance, up); count drops."""
    book, rows = NaiveBook(), []
    dropped = dict.fromkeys(("after_close", "one_sided", "crossed"), 0)
    for message in messages:
        kind, body = message["event"]["type"], message["event"]["msg"]
        if kind == "trade":
            continue
        book.snapshot(body) if kind == "orderbook_snapshot" else book.delta(body)
        features = book.features()
        if body.get("ts_ms", message["recv_ms"]) >= close_ms:
            dropped["after_close"] += 1
        elif isinstance(features, str):
            dropped[features] += 1
        else:
            rows.append((message["recv_ms"], *features))
    ups = naive_labels([row[1] for row in rows])
    labelled = [(*row, up) for row, up in zip(rows, ups) if up is not None]
    return labelled, dropped | {"no_later_change": len(rows) - len(labelled)}


def naive_labels(mids):
    """Look ahead from each mid for the first one that differs."""
    ahead = range(len(mids))
    later = (next((mids[j] for j in ahead[i:] if mids[j] != mids[i]), None) for i in ahead)
    return [None if mid is None else int(mid > mids[i]) for i, mid in enumerate(later)]


def as_float32(rows):
    """Round the features of labelled rows as a table of float32 does."""
    features = [[float(value) for value in row[1:4]] for row in rows]
    return np.array(features, np.float32).reshape(-1, 3), np.array([row[4] for row in rows])


def read_lines(path: Path):
    with gzip.open(path) as file:
        return [json.loads(line) for line in file]


def anova_f(column, n_blocks=20):
    """One-way F of *column* over equal blocks of consecutive rows."""
    blocks = np.array_split(column.astype(float), n_blocks)
    means = np.array([block.mean() for block in blocks])
    within = np.mean([block.var(ddof=1) for block in blocks])
    return len(blocks[0]) * means.var(ddof=1) / within
