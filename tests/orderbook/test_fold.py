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

import gzip
import json
import os

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from benchmarks.orderbook import book as book_module
from benchmarks.orderbook import fold as fold_module
from benchmarks.orderbook import messages as messages_module
from benchmarks.orderbook.book import ROW, Book
from benchmarks.orderbook.fold import fold, main
from benchmarks.orderbook.messages import (
    DELTA,
    EVENT_SCHEMA,
    LEVEL,
    NO,
    SNAPSHOT,
    TRADE,
    YES,
    Events,
    MessageError,
    close_ms,
    find_markets,
    read_events,
)
from tests.orderbook.naive import (
    SIDES,
    NaiveBook,
    anova_f,
    as_float32,
    naive_labels,
    naive_rows,
    read_lines,
)

CLOSE_MS = 1_786_410_900_000
MARKET = "KXSYNA15M-26AUG102115-15"
KALSHI = Path(os.environ.get("KALSHI_DATA", ""))
"""Captures, which are not part of the repository."""

with_captures = pytest.mark.skipif(
    not os.environ.get("KALSHI_DATA"), reason="set KALSHI_DATA to a folder of captures"
)

# Few prices make levels meet, on one side and across; the ends of the range are among them.
prices = st.sampled_from([1, 4700, 4800, 4801, 5000, 5200, 5300, 9999])
sizes = st.one_of(st.integers(1, 3), st.integers(1, 10**11))
sides = st.sampled_from([YES, NO])


def dollars(price):
    return f"{price // 10_000}.{price % 10_000:04}"


def contracts(size):
    return f"{'-' * (size < 0)}{abs(size) // 100}.{abs(size) % 100:02}"


def snapshot(recv_ms, seq, yes=(), no=(), *, market=MARKET):
    message = {"market_ticker": market, "market_id": "0"}
    for key, levels in (("yes_dollars_fp", yes), ("no_dollars_fp", no)):
        if levels:
            message[key] = [[dollars(price), contracts(size)] for price, size in levels]
    event = {"type": "orderbook_snapshot", "sid": 1, "seq": seq, "msg": message}
    return {"recv_ms": recv_ms, "event": event}


def delta(recv_ms, seq, side, price, size, *, ts_ms=None, market=MARKET):
    message = {"market_ticker": market, "market_id": "0", "price_dollars": dollars(price)}
    message |= {"delta_fp": contracts(size), "side": SIDES[side], "ts": "2026-08-11T01:00:00.5Z"}
    message["ts_ms"] = recv_ms if ts_ms is None else ts_ms
    event = {"type": "orderbook_delta", "sid": 1, "seq": seq, "msg": message}
    return {"recv_ms": recv_ms, "event": event}


def trade(recv_ms, seq, *, market=MARKET):
    message = {"trade_id": "0", "market_ticker": market, "yes_price_dollars": "0.4800"}
    message |= {"count_fp": "1.00", "taker_side": "yes", "ts": recv_ms // 1000, "ts_ms": recv_ms}
    return {"recv_ms": recv_ms, "event": {"type": "trade", "sid": 2, "seq": seq, "msg": message}}


def write_lines(directory, messages, *, market=MARKET, day="2026-08-11"):
    path = Path(directory, market, f"{day}.ndjson.gz")
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt") as file:
        file.writelines(f"{json.dumps(message)}\n" for message in messages)
    return path


def as_events(rows):
    columns = zip(*rows) if rows else [()] * len(Events._fields)
    return Events(*(np.array(c, f.type.to_pandas_dtype()) for c, f in zip(columns, EVENT_SCHEMA)))


def read_rows(directory):
    return pq.read_table(directory)


def assert_equal_rows(table, features, up):
    columns = [table[name].to_numpy() for name in ("mid", "spread", "imbalance")]
    np.testing.assert_array_equal(np.column_stack(columns), features)
    np.testing.assert_array_equal(table["up"].to_numpy(), up)


class BookMachine(RuleBasedStateMachine):
    """Messages go to a dictionary at once, and to the compiled book in blocks of any size."""

    def __init__(self):
        super().__init__()
        self.naive, self.book = NaiveBook(), Book(close_ms=CLOSE_MS)
        self.queue, self.rows, self.expected = [], [], []
        self.up, self.seq, self.now, self.has_snapshot = [], 0, 0, False

    def observe(self, ts_ms):
        features = self.naive.features()
        if ts_ms < CLOSE_MS and not isinstance(features, str):
            self.expected.append((self.now, *features))

    def enqueue(self, kind, side=0, price=0, size=0, ts_ms=None):
        ts_ms = self.now if ts_ms is None else ts_ms
        self.queue.append((kind, side, price, size, self.seq, ts_ms, self.now))

    @rule(yes=st.dictionaries(prices, sizes), no=st.dictionaries(prices, sizes))
    def snapshot(self, yes, no):
        self.has_snapshot = True
        # A new subscription counts from anywhere.
        self.seq = 5
        levels = [(side, *level) for side, m in ((YES, yes), (NO, no)) for level in m.items()]
        self.enqueue(SNAPSHOT, size=len(levels))
        for level in levels:
            self.enqueue(LEVEL, *level)
        self.naive.snapshot(snapshot(0, 0, list(yes.items()), list(no.items()))["event"]["msg"])
        self.observe(self.now)

    @precondition(lambda self: self.has_snapshot)
    @rule(side=sides, price=prices, size=sizes, gap=st.integers(1, 3), late=st.booleans())
    def add(self, side, price, size, gap, late):
        self.change(side, price, size, gap, CLOSE_MS - 1 if late else None)

    @precondition(lambda self: any(self.naive.sizes.values()))
    @rule(data=st.data(), whole=st.booleans())
    def reduce(self, data, whole):
        levels = [(i, price) for i, s in enumerate(SIDES) for price in self.naive.sizes[s]]
        side, price = data.draw(st.sampled_from(sorted(levels)))
        size = int(100 * self.naive.sizes[SIDES[side]][price])
        size = size if whole else data.draw(st.integers(1, size))
        self.change(side, int(10_000 * price), -size, 1, None)

    def change(self, side, price, size, gap, ts_ms):
        self.seq += gap
        self.enqueue(DELTA, side, price, size, ts_ms)
        self.naive.delta(delta(0, 0, side, price, size)["event"]["msg"])
        self.observe(self.now if ts_ms is None else ts_ms)

    @rule()
    def trade(self):
        self.enqueue(TRADE)

    @rule(pause=st.sampled_from([0, 1, CLOSE_MS // 4]))
    def wait(self, pause):
        self.now += pause

    @rule(share=st.floats(0, 1))
    def fold_some(self, share):
        n = int(share * len(self.queue))
        n_waiting = self.book.waiting
        rows, up, up_before = self.book.fold(as_events(self.queue[:n]))
        self.queue = self.queue[n:]
        self.rows += [tuple(row) for row in rows.tolist()]
        self.up += [up_before] * (n_waiting if up_before >= 0 else 0) + up.tolist()

    @rule()
    def settle(self):
        self.fold_some(1.0)
        sizes = [
            {int(price): int(self.book.sizes[side, price]) for price in row.nonzero()[0]}
            for side, row in enumerate(self.book.sizes)
        ]
        assert sizes == [
            {int(10_000 * price): int(100 * size) for price, size in self.naive.sizes[s].items()}
            for s in SIDES
        ]
        assert self.book.best.tolist() == [max(levels, default=0) for levels in sizes]

    def teardown(self):
        self.settle()
        labels = naive_labels([row[1] for row in self.expected])
        expected = [
            (row[0], *map(float, np.float32([*map(float, row[1:])]))) for row in self.expected
        ]
        assert self.rows == expected
        assert self.up == [label for label in labels if label is not None]
        assert self.book.waiting == labels.count(None)


BookMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestBookAgainstDictionary = BookMachine.TestCase


START = snapshot(1000, 1, [(4800, 100)], [(4800, 100)])
GOOD = [START, delta(1001, 2, YES, 4900, 500), delta(1002, 3, YES, 4900, -500), trade(1002, 1)]


def altered(message, **changes):
    """Copy a message with other values in its body; None takes the key away."""
    message = json.loads(json.dumps(message))
    body = message["event"]["msg"] | changes
    message["event"]["msg"] = {key: value for key, value in body.items() if value is not None}
    return message


FAULTY = {
    "not json": ('{"recv_ms":10', "not a message"),
    "blank line": ("", "not a message"),
    "two messages in a line": (json.dumps(GOOD[2]) * 2, "each line must be one message"),
    "price a number": (altered(GOOD[2], price_dollars=0.49), "not a message"),
    "unknown side": (altered(GOOD[2], side="maybe"), r"side must be one of \['yes', 'no'\]"),
    "no side": (altered(GOOD[2], side=None), "has no event.msg.side"),
    "no price": (altered(GOOD[2], price_dollars=None), "has no event.msg.price_dollars"),
    "no time": (altered(GOOD[2], ts_ms=None), "has no event.msg.ts_ms"),
    "price of 1": (altered(GOOD[2], price_dollars="1.0000"), r"between \$0 and \$1, it is 10000"),
    "price below 0": (altered(GOOD[2], price_dollars="-0.4900"), "it is -4900"),
    "huge price": (altered(GOOD[2], price_dollars="900000000000.4900"), "it is 9000000000004900"),
    "price of two decimals": (altered(GOOD[2], price_dollars="0.49"), "number of 4 decimals"),
    "price without a point": (altered(GOOD[2], price_dollars="049000"), "number of 4 decimals"),
    "price in letters": (altered(GOOD[2], price_dollars="0.49o0"), "it is 0.49o0"),
    "size of three decimals": (altered(GOOD[2], delta_fp="1.000"), "number of 2 decimals"),
    "size beyond int64": (altered(GOOD[2], delta_fp="9" * 20 + ".00"), "number of 2 decimals"),
    "negative size": (altered(GOOD[2], delta_fp="-5.01"), "a size must not fall below 0, -501"),
    "repeated": (GOOD[1], "seq must grow from delta to delta, 2 follows 2"),
    "other market": (altered(GOOD[2], market_ticker="KX"), "the market must be that of the dir"),
    "level without size": (altered(START, yes_dollars_fp=[["0.4800"]]), "must be .price, size."),
    "null level": (altered(START, no_dollars_fp=[None]), "must be .price, size."),
    "null size": (altered(START, no_dollars_fp=[["0.4800", None]]), "2 decimals, one has None"),
    "negative level": (altered(START, no_dollars_fp=[["0.4800", "-1.00"]]), "must not fall below"),
    "other type": (
        {"recv_ms": 1, "event": {"type": "ticker", "seq": 9, "msg": {"market_ticker": MARKET}}},
        "event.type must be one of",
    ),
}


@pytest.mark.parametrize("line, reason", FAULTY.values(), ids=FAULTY)
@pytest.mark.parametrize("block_bytes", [1 << 22, 200], ids=["one block", "many blocks"])
def test_faulty_lines_are_named(tmp_path, monkeypatch, line, reason, block_bytes):
    monkeypatch.setattr(messages_module, "BLOCK_BYTES", block_bytes)
    path = write_lines(tmp_path / "in", [])
    lines = [json.dumps(GOOD[0]), json.dumps(GOOD[1]), line, json.dumps(GOOD[3])]
    lines[2] = line if isinstance(line, str) else json.dumps(line)
    with gzip.open(path, "wt") as file:
        file.write("\n".join(lines) + "\n")
    with pytest.raises(MessageError, match=f"{path}, line 3: .*{reason}"):
        fold(tmp_path / "in", tmp_path / "out", progressbar=False)
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_delta_before_any_snapshot_is_refused(tmp_path):
    write_lines(tmp_path / "in", GOOD[1:])
    with pytest.raises(MessageError, match=r"line 1: a delta must follow a snapshot"):
        fold(tmp_path / "in", tmp_path / "out", progressbar=False)


def test_a_line_of_the_second_file_is_named_by_its_place_there(tmp_path):
    write_lines(tmp_path / "in", GOOD)
    path = write_lines(tmp_path / "in", [GOOD[1]], day="2026-08-12")
    with pytest.raises(MessageError, match=f"{path}, line 1: seq must grow"):
        fold(tmp_path / "in", tmp_path / "out", progressbar=False)


@pytest.mark.parametrize("n_bytes", [-1, -12], ids=["in the trailer", "in the text"])
def test_truncated_file_is_named(tmp_path, n_bytes):
    path = write_lines(tmp_path / "in", GOOD)
    path.write_bytes(path.read_bytes()[:n_bytes])
    with pytest.raises(MessageError, match=f"{path} is damaged or cut short"):
        fold(tmp_path / "in", tmp_path / "out", progressbar=False)


FAULTY_EVENTS = {
    "kind": ((4, YES, 4800, 1, 9, 0, 0), "kind must be 0 .delta., .* it is 4"),
    "side": ((DELTA, 2, 4800, 1, 9, 0, 0), "side must be 0 .yes. or 1 .no., it is 2"),
    "stray level": (
        (LEVEL, YES, 4800, 1, 9, 0, 0),
        "kind 3 with size 1 came when 0 levels were due",
    ),
    "negative count of levels": (
        (SNAPSHOT, 0, 0, -1, 9, 0, 0),
        "kind 1 with size -1 came when -1 levels",
    ),
}


@pytest.mark.parametrize("row, reason", FAULTY_EVENTS.values(), ids=FAULTY_EVENTS)
def test_faulty_rows_of_parquet_messages_are_named(tmp_path, row, reason):
    rows = [(SNAPSHOT, 0, 0, 1, 1, 0, 0), (LEVEL, NO, 4800, 1, 1, 0, 0), row]
    path = tmp_path / "in" / MARKET / "2026-08-11.parquet"
    path.parent.mkdir(parents=True)
    pq.write_table(pa.table(list(as_events(rows)), schema=EVENT_SCHEMA), path)
    with pytest.raises(MessageError, match=f"{path}, line [12]: .*{reason}"):
        fold(tmp_path / "in", tmp_path / "out", progressbar=False)


def test_snapshot_without_all_its_levels_is_refused():
    book = Book(close_ms=None)
    with pytest.raises(MessageError, match="kind 0 with size 1 came when 2 levels were due"):
        book.fold(as_events([(SNAPSHOT, 0, 0, 2, 1, 0, 0), (DELTA, YES, 4800, 1, 2, 0, 0)]))


def test_parquet_without_the_columns_of_events_is_refused(tmp_path):
    path = tmp_path / MARKET / "2026-08-11.parquet"
    path.parent.mkdir(parents=True)
    pq.write_table(pa.table({"price": [1]}), path)
    with pytest.raises(MessageError, match="must have the columns"):
        list(read_events(path))
    nulls = pa.table([[None]] * len(EVENT_SCHEMA), schema=EVENT_SCHEMA)
    pq.write_table(nulls, path)
    with pytest.raises(MessageError, match="column kind must not hold nulls"):
        list(read_events(path))


@given(
    numbers=st.lists(st.tuples(st.integers(1, 9999), st.integers(-(10**15), 10**15)), min_size=1),
    levels=st.lists(st.tuples(st.integers(1, 9999), st.integers(0, 10**15))),
)
def test_numbers_are_read_exactly(tmp_path_factory, numbers, levels):
    """Sizes reach beyond 2^53, the integers that a float keeps apart."""
    deltas = [delta(1000, i + 2, YES, *number) for i, number in enumerate(numbers)]
    path = write_lines(tmp_path_factory.mktemp("in"), [*deltas, snapshot(1, 1, (), levels)])
    ((events, consumed),) = read_events(path)
    assert list(zip(events.price.tolist(), events.size.tolist())) == [
        *numbers,
        (0, len(levels)),
        *levels,
    ]
    assert consumed == path.stat().st_size


def test_label_is_the_next_change_of_the_own_market(tmp_path):
    """Rows wait over changes that leave the mid, over one-sided books and over other markets."""
    other = "KXSYNB15M-26AUG102115-15"
    write_lines(
        tmp_path / "in",
        [
            snapshot(1000, 1, [(4800, 100)], [(4800, 100)]),
            delta(1001, 2, YES, 4700, 100),
            delta(1005, 3, NO, 4800, -100),
            delta(1006, 4, NO, 4600, 100),
            delta(1007, 5, YES, 4800, -100),
            delta(1009, 6, YES, 4600, 100),
        ],
    )
    write_lines(
        tmp_path / "in",
        [
            snapshot(1001, 1, [(2000, 100)], [(2000, 300)], market=other),
            delta(1006, 2, NO, 2100, 100, market=other),
        ],
        market=other,
    )
    report = fold(tmp_path / "in", tmp_path / "out", progressbar=False)
    features = np.array(
        [[0.50, 0.04, 0], [0.50, 0.04, 0], [0.50, 0.60, -0.5], [0.51, 0.06, 0]], np.float32
    )
    assert_equal_rows(read_rows(tmp_path / "out"), features, [1, 1, 0, 0])
    assert (report.rows, report.one_sided, report.no_later_change) == (4, 1, 3)


def test_nothing_after_the_close_makes_a_row_or_a_label(tmp_path):
    """The exchange's clock decides, so that a message that was late on the way still counts."""
    write_lines(
        tmp_path / "in",
        [
            snapshot(CLOSE_MS - 9, 1, [(4800, 100)], [(4800, 100)]),
            delta(CLOSE_MS + 5, 2, YES, 4900, 100, ts_ms=CLOSE_MS - 1),
            delta(CLOSE_MS + 6, 3, YES, 4950, 100, ts_ms=CLOSE_MS),
            snapshot(CLOSE_MS + 7, 4),
        ],
    )
    report = fold(tmp_path / "in", tmp_path / "out", progressbar=False)
    assert (report.rows, report.after_close, report.no_later_change) == (1, 2, 1)
    assert read_rows(tmp_path / "out")["up"].to_pylist() == [1]


def test_close_is_read_from_the_ticker_in_eastern_time():
    assert close_ms(MARKET) == CLOSE_MS
    assert close_ms("KXGOLD15M-26JAN102115-15") == 1_768_097_700_000
    assert close_ms("KXHIGHNY-26AUG10-T75") is None


def test_crossed_books_make_no_row(tmp_path):
    write_lines(tmp_path / "in", [*GOOD, delta(1003, 4, YES, 5200, 1), delta(1004, 5, NO, 4900, 1)])
    with pytest.raises(FileExistsError):
        (tmp_path / "out").mkdir()
        fold(tmp_path / "in", tmp_path / "out", progressbar=False)
    report = fold(tmp_path / "in", tmp_path / "out", overwrite=True, progressbar=False)
    assert (report.rows, report.crossed, report.no_later_change) == (2, 2, 1)


def test_clock_set_back_keeps_the_order_of_receipt(tmp_path):
    late = delta(900, 4, YES, 4900, 500)
    write_lines(tmp_path / "in", [*GOOD, late, delta(1003, 5, YES, 4900, -500)])
    report = fold(tmp_path / "in", tmp_path / "out", progressbar=False)
    assert report.clock_set_back == 1
    assert read_rows(tmp_path / "out")["up"].to_pylist() == [1, 0, 1, 0]


markets_of_rows = st.lists(
    st.lists(st.integers(0, 12), min_size=1, max_size=30).map(sorted), min_size=1, max_size=6
)


@given(times=markets_of_rows, block=st.integers(1, 5))
def test_merge_is_a_stable_sort_by_time(tmp_path_factory, times, block):
    """Blocks of few rows end within runs of equal times, where an order is easily lost."""
    scratch = tmp_path_factory.mktemp("scratch")
    markets, expected = [], []
    for order, recv_ms in enumerate(times):
        rows = np.zeros(len(recv_ms), ROW)
        rows["recv_ms"], rows["mid"], rows["spread"] = recv_ms, order, range(len(rows))
        market = fold_module._Market(order, scratch / f"{order}.rows", scratch / f"{order}.up", {})
        rows.tofile(market.rows)
        (rows["spread"] % 2).astype(np.int8).tofile(market.up)
        markets.append(market)
        expected += [(t, order, i, i % 2) for i, t in enumerate(recv_ms)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fold_module, "MERGED_ROWS", block)
        patch.setattr(fold_module, "FEWEST_ROWS", block)
        pieces = list(fold_module._merged(markets))
    merged = np.concatenate(pieces)[["recv_ms", "mid", "spread", "up"]].tolist()
    assert merged == sorted(expected)
    assert max(map(len, pieces)) <= 2 * block * len(markets)


@given(lengths=st.lists(st.integers(0, 20)), n_rows=st.integers(1, 9))
def test_files_hold_the_rows_asked_for(lengths, n_rows):
    rows = np.arange(sum(lengths))
    pieces = np.split(rows, np.cumsum(lengths)[:-1]) if lengths else []
    files = list(fold_module._regrouped(iter(pieces), n_rows))
    assert [len(file) for file in files[:-1]] == [n_rows] * (len(files) - 1)
    np.testing.assert_array_equal(np.concatenate([*files, []]), rows)


def test_labels_of_a_mid_that_never_changed_before_are_written_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(fold_module, "LABEL_BLOCK", 7)
    monkeypatch.setattr(messages_module, "BLOCK_BYTES", 999)
    still = [delta(1001 + i, 2 + i, YES, 4700, 1) for i in range(100)]
    write_lines(tmp_path / "in", [START, *still, delta(1200, 200, NO, 4900, 1)])
    report = fold(tmp_path / "in", tmp_path / "out", rows_per_file=40, progressbar=False)
    assert report.rows == 101
    assert read_rows(tmp_path / "out")["up"].to_pylist() == [0] * 101
    files = sorted((tmp_path / "out").iterdir())
    assert [pq.read_metadata(file).num_rows for file in files] == [40, 40, 21]


def test_table_has_exactly_the_columns_of_the_model(tmp_path):
    write_lines(tmp_path / "in", GOOD)
    fold(tmp_path / "in", tmp_path / "out", progressbar=False)
    schema = read_rows(tmp_path / "out").schema
    assert schema.names == ["mid", "spread", "imbalance", "up"]
    assert schema.types == [pa.float32()] * 3 + [pa.int8()]


def test_float32_keeps_every_mid_apart():
    mid2 = np.arange(2, 2 * book_module.DOLLAR - 1)
    mids = (mid2 / (2 * book_module.DOLLAR)).astype(np.float32)
    np.testing.assert_array_equal(np.round(mids.astype(float) * 2 * book_module.DOLLAR), mid2)


def test_destination_must_not_exist_nor_hold_the_messages(tmp_path):
    write_lines(tmp_path / "in", GOOD)
    (tmp_path / "out").mkdir()
    with pytest.raises(FileExistsError, match="out exists; choose another name"):
        fold(tmp_path / "in", tmp_path / "out", progressbar=False)
    with pytest.raises(ValueError, match="destination must not contain the messages"):
        fold(tmp_path / "in", tmp_path / "in", overwrite=True, progressbar=False)
    fold(tmp_path / "in", tmp_path / "out", overwrite=True, progressbar=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]


def test_messages_without_a_change_of_the_mid_are_an_error(tmp_path):
    write_lines(tmp_path / "in", [START])
    with pytest.raises(ValueError, match="make no row"):
        fold(tmp_path / "in", tmp_path / "out", progressbar=False)
    with pytest.raises(FileNotFoundError, match="pass a directory of order-book messages"):
        fold(tmp_path / "nothing", tmp_path / "out", progressbar=False)


def test_command_line_prints_the_report(tmp_path, capsys):
    write_lines(tmp_path / "in", GOOD)
    main([str(tmp_path / "in"), str(tmp_path / "out")])
    assert "4 messages of 1 markets" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="1"):
        main([str(tmp_path / "in"), str(tmp_path / "out")])
    assert "exists" in capsys.readouterr().err


@with_captures
def test_real_captures_fold_like_the_dictionary(tmp_path):
    report = fold(KALSHI, tmp_path / "out", progressbar=False)
    assert (report.messages, report.deltas) == (691_010, 679_985)
    states = report.rows + report.no_later_change + report.one_sided + report.crossed
    assert states + report.after_close == report.deltas + report.snapshots

    table = read_rows(tmp_path / "out")
    shuffled = np.random.default_rng(0).permutation(len(table))
    for name, least in (("mid", 10_000), ("spread", 1_000), ("imbalance", 300), ("up", 50)):
        column = table[name].to_numpy()
        assert anova_f(column) > least
        # F(19, 675,000) exceeds 3.5 with probability 2e-7.
        assert anova_f(column[shuffled]) < 3.5


@with_captures
def test_rows_of_a_real_capture_are_those_of_the_dictionary(tmp_path):
    market, (file,) = min(find_markets(KALSHI).items(), key=lambda item: item[1][0].stat().st_size)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / market).symlink_to(file.parent)
    report = fold(tmp_path / "in", tmp_path / "out", progressbar=False)
    rows, dropped = naive_rows(read_lines(file), close_ms(market))
    assert_equal_rows(read_rows(tmp_path / "out"), *as_float32(rows))
    assert {name: getattr(report, name) for name in dropped} == dropped
