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
import shutil
import time

from itertools import count
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from benchmarks.orderbook import fold as fold_module
from benchmarks.orderbook import merge as merge_module
from benchmarks.orderbook import reading as reading_module
from benchmarks.orderbook.book import DOLLAR, HOLE_MS, NO_LABEL, ROW, UNKNOWN, Book
from benchmarks.orderbook.fold import fold, main
from benchmarks.orderbook.merge import Sorted, merged, regrouped
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
)
from benchmarks.orderbook.reading import find_files, read_parts
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
START_MS = CLOSE_MS - 900_000
MARKET = "KXSYNA15M-26AUG102115-15"
OTHER = "KXSYNB15M-26AUG102115-15"
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


def message(kind, recv_ms, seq, **body):
    return {"recv_ms": recv_ms, "event": {"type": kind, "sid": 1, "seq": seq, "msg": body}}


def snapshot(recv_ms, seq, yes=(), no=(), *, market=MARKET):
    levels = {"yes_dollars_fp": yes, "no_dollars_fp": no}
    keys = {k: [[dollars(p), contracts(s)] for p, s in v] for k, v in levels.items() if v}
    return message("orderbook_snapshot", recv_ms, seq, market_ticker=market, **keys)


def delta(recv_ms, seq, side, price, size, *, ts_ms=None, market=MARKET):
    body = {"price_dollars": dollars(price), "delta_fp": contracts(size), "side": SIDES[side]}
    body |= {"ts_ms": recv_ms if ts_ms is None else ts_ms}
    return message("orderbook_delta", recv_ms, seq, market_ticker=market, **body)


def trade(recv_ms, seq, *, market=MARKET):
    return message("trade", recv_ms, seq, market_ticker=market, count_fp="1.00", ts_ms=recv_ms)


def altered(original, **changes):
    """Copy a message with other values in its body; None takes the key away."""
    copy = json.loads(json.dumps(original))
    body = copy["event"]["msg"] | changes
    copy["event"]["msg"] = {key: value for key, value in body.items() if value is not None}
    return copy


def numbered(messages, numbers):
    """Give messages other numbers, without which a loss does not show at once."""
    return [m | {"event": m["event"] | {"seq": seq}} for m, seq in zip(messages, numbers)]


def as_lines(messages):
    return [each if isinstance(each, str) else json.dumps(each) for each in messages]


def write_lines(directory, messages, *, market=MARKET, name="2026-08-11.ndjson.gz"):
    path = Path(directory, market, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(f"{line}\n" for line in as_lines(messages)).encode()
    codec = {".gz": "gzip", ".zst": "zstd"}.get(path.suffix)
    with pa.output_stream(path, compression=codec) as file:
        file.write(text)
    return path


def as_events(rows):
    columns = zip(*rows) if rows else [()] * len(Events._fields)
    return Events(*(np.array(c, f.type.to_pandas_dtype()) for c, f in zip(columns, EVENT_SCHEMA)))


def read_rows(directory):
    return pq.read_table(directory)


def folded(tmp_path, **options):
    """Fold ``in``; return the report and the table, and hold that nothing else is left."""
    report = fold(tmp_path / "in", tmp_path / "out", overwrite=True, progressbar=False, **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]
    states = report.rows + report.no_later_change + report.one_sided + report.after_close
    assert states + report.left_out == report.deltas + report.snapshots
    return report, read_rows(tmp_path / "out")


def refused(tmp_path, match, error=MessageError, **options):
    """Hold that ``in`` is refused and that nothing is left of the attempt."""
    with pytest.raises(error, match=match) as caught:
        fold(tmp_path / "in", tmp_path / "out", progressbar=False, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    return str(caught.value)


def assert_equal_rows(table, features, up):
    columns = [table[name].to_numpy() for name in ("mid", "spread", "imbalance")]
    np.testing.assert_array_equal(np.column_stack(columns), features)
    np.testing.assert_array_equal(table["up"].to_numpy(), up)


class BookMachine(RuleBasedStateMachine):
    """Messages go to a dictionary at once, and to the compiled book in blocks of any size."""

    def __init__(self):
        super().__init__()
        self.naive, self.book = NaiveBook(), Book(close_ms=CLOSE_MS)
        self.queue, self.rows, self.up = [], [], []
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
        self.up += [NO_LABEL] * self.book.lose()
        self.known = False
        self.runs.append([])

    @rule(share=st.floats(0, 1))
    def fold_some(self, share):
        n = int(share * len(self.queue))
        n_waiting = self.book.waiting
        rows, up, up_before = self.book.fold(as_events(self.queue[:n]), np.arange(n))
        self.queue = self.queue[n:]
        self.rows += [tuple(row) for row in rows.tolist()]
        self.up += [up_before] * (n_waiting if up_before != UNKNOWN else 0) + up.tolist()

    def teardown(self):
        self.fold_some(1.0)
        expected = []
        for run in self.runs:
            labels = naive_labels([row[1] for row in run])
            rows = [(row[0], *map(float, np.float32([*map(float, row[1:])]))) for row in run]
            expected += [(*row, up) for row, up in zip(rows, labels) if up is not None]
        waiting = [(*row, up) for row, up in zip(self.rows, self.up) if up != NO_LABEL]
        assert waiting == expected
        counts = self.book.counts
        assert counts["labelled"] == len(expected)
        assert counts["rows"] == len(self.rows) == len(self.up) + self.book.waiting
        if self.known:
            assert [dict(zip(s.nonzero()[0], s[s > 0])) for s in self.book.sizes] == [
                {int(10_000 * p): int(100 * s) for p, s in self.naive.sizes[side].items()}
                for side in SIDES
            ]


BookMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestBookAgainstDictionary = BookMachine.TestCase


START = snapshot(START_MS, 1, [(4800, 100)], [(4800, 100)])
GOOD = [
    START,
    delta(START_MS + 1, 2, YES, 4900, 500),
    delta(START_MS + 2, 3, YES, 4900, -500),
    trade(START_MS + 2, 1),
]
GOOD_UP = [1, 0]


READ_ALIKE = {
    "numbers": [
        altered(START, yes_dollars_fp=[[0.48, 1]], no_dollars_fp=[[0.48, 1.0]]),
        altered(GOOD[1], price_dollars=0.49, delta_fp=5),
        altered(GOOD[2], price_dollars=0.4900),
    ],
    "few decimals": [START, altered(GOOD[1], price_dollars=".49", delta_fp="5"), GOOD[2]],
    "spaces": [START, altered(GOOD[1], price_dollars=" 0.49", delta_fp="5.00 "), *GOOD[2:]],
    "a byte order mark": [f"\ufeff{json.dumps(START)}", *GOOD[1:]],
    "many decimals": [
        START,
        altered(GOOD[1], price_dollars="0.490000000", delta_fp="5.000"),
        *GOOD[2:],
    ],
    "other keys of a snapshot": [
        altered(START, yes_dollars_fp=None, yes_dollars=[["0.48", "1"]]),
        *GOOD[1:],
    ],
    "no ts_ms": [START, altered(GOOD[1], ts_ms=None), *GOOD[2:]],
    "no recv_ms": [START, GOOD[1] | {"recv_ms": None}, *GOOD[2:]],
    "recv_ms a float": [START, GOOD[1] | {"recv_ms": START_MS + 1.25}, *GOOD[2:]],
    "recv_ms a string": [START, GOOD[1] | {"recv_ms": str(START_MS + 1)}, *GOOD[2:]],
    "no seq": numbered(GOOD, [None] * 4),
    "further keys": [altered(m, new={"a": [1]}, ts="2026-08-11T01:00:00.5Z") for m in GOOD],
    "blank lines": ["", *GOOD[:1], "  ", "", *as_lines(GOOD[1:]), "", " \t"],
    "carriage returns": [f"{line}\r" for line in as_lines(GOOD)],
    "other frames": [
        {"recv_ms": 1, "event": {"type": "subscribed", "id": 1, "msg": {"sid": 1}}},
        *GOOD[:2],
        {"recv_ms": 1, "event": {"type": "error", "msg": {"code": 6}}},
        {"recv_ms": 1, "event": {"type": "error", "msg": "a string"}},
        {"hello": 1},
        *GOOD[2:],
    ],
}


@pytest.mark.parametrize("messages", READ_ALIKE.values(), ids=READ_ALIKE)
def test_variants_of_the_wire_format_are_read_alike(tmp_path, messages):
    write_lines(tmp_path / "in", messages)
    report, table = folded(tmp_path)
    features = np.array([[0.50, 0.04, 0], [0.505, 0.03, 2 / 3]], np.float32)
    assert_equal_rows(table, features, GOOD_UP)
    assert table.schema.types == [pa.float32()] * 3 + [pa.int8()]
    assert report.findings == ()
    frames = {"subscribed": 1, "error": 2, None: 1} if {"hello": 1} in messages else {}
    assert report.others == frames


@pytest.mark.parametrize(
    "name",
    ["a.ndjson", "a.jsonl", "a.jsonl.gz", "a.ndjson.zst", "deep/er/a.ndjson.gz"],
)
def test_files_are_found_and_read_in_any_form_and_folder(tmp_path, name):
    write_lines(tmp_path / "in", GOOD, name=name)
    write_lines(tmp_path / "in", ["binary"], name="._a.ndjson")
    assert folded(tmp_path)[1]["up"].to_pylist() == GOOD_UP


def test_several_markets_in_a_file_are_those_of_files_of_their_own(tmp_path):
    others = [altered(m, market_ticker=OTHER) for m in GOOD]
    write_lines(tmp_path / "in", GOOD)
    write_lines(tmp_path / "in", others, market=OTHER)
    _, apart = folded(tmp_path)
    shutil.rmtree(tmp_path / "in")
    mixed = numbered([m for pair in zip(GOOD, others) for m in pair], count(1))
    write_lines(tmp_path / "in", mixed, market="all")
    report, together = folded(tmp_path)
    assert (report.markets, report.gaps) == (2, 0)
    assert together.equals(apart)


FAULTY = {
    "two messages in a line": (json.dumps(GOOD[2]) * 2, "not a message"),
    "not json": ('{"recv_ms":10', "not a message"),
    "unknown side": (altered(GOOD[2], side="maybe"), r"side must be one of .*it is maybe"),
    "no side": (altered(GOOD[2], side=None), "side must be one of"),
    "no market": (altered(GOOD[2], market_ticker=None), "event.msg.market_ticker must be a name"),
    "no price": (
        altered(GOOD[2], price_dollars=None),
        "price_dollars must be a number .*it is None",
    ),
    "price of 1": (altered(GOOD[2], price_dollars="1.0000"), r"between \$0 and \$1, it is 10000"),
    "price below 0": (altered(GOOD[2], price_dollars="-0.4900"), "it is -4900"),
    "price of five decimals": (altered(GOOD[2], price_dollars="0.48001"), "of 4 decimals"),
    "price in letters": (altered(GOOD[2], price_dollars="0.49o0"), "it is 0.49o0"),
    "size of three decimals": (altered(GOOD[2], delta_fp="1.001"), "number of 2 decimals"),
    "size beyond int64": (altered(GOOD[2], delta_fp="9" * 20 + ".00"), "number of 2 decimals"),
    "no time": (altered(GOOD[2], ts_ms=None) | {"recv_ms": None}, "must be milliseconds"),
    "seconds": (GOOD[2] | {"recv_ms": START_MS // 1000}, "recv_ms must be milliseconds"),
    "ts_ms in seconds": (altered(GOOD[2], ts_ms=START_MS // 1000), "ts_ms must be milliseconds"),
    "no envelope": (GOOD[2]["event"], "not as Kalshi sends it"),
    "upper case": (json.dumps(GOOD[2]).upper(), "not as Kalshi sends it"),
    "microseconds": (GOOD[2] | {"recv_ms": START_MS * 1000}, "must be milliseconds"),
    "repeated": (GOOD[1], "seq must grow from delta to delta, 2 follows 2"),
    "cents": (altered(START, yes_dollars_fp=None, yes=[[48, 1]]), "levels must be dollars"),
    "level without size": (altered(START, yes_dollars_fp=[["0.4800"]]), "must be .price, size."),
    "null level": (altered(START, no_dollars_fp=[None]), "must be .price, size."),
    "null size": (altered(START, no_dollars_fp=[["0.4800", None]]), "4 and 2 decimals"),
    "negative level": (altered(START, no_dollars_fp=[["0.4800", "-1.00"]]), "not be negative"),
}


@pytest.mark.parametrize("line, reason", FAULTY.values(), ids=FAULTY)
def test_lines_that_would_make_the_book_wrong_are_named(tmp_path, line, reason):
    path = write_lines(tmp_path / "in", [*GOOD[:2], line, GOOD[3]])
    refused(tmp_path, f"{path}, line 3: .*{reason}")


@pytest.mark.parametrize(
    "row, reason",
    [
        ((4, YES, 4800, 1, 9, 0, 0), "kind must be 0 .delta., .* it is 4"),
        ((DELTA, 2, 4800, 1, 9, 0, 0), "side must be 0 .yes. or 1 .no., it is 2"),
        ((LEVEL, YES, 4800, 1, 9, 0, 0), "kind 3 with size 1 came when 0 levels were due"),
        ((SNAPSHOT, 0, 0, -1, 9, 0, 0), "kind 1 with size -1 came when -1 levels"),
    ],
)
def test_faulty_rows_of_parquet_messages_are_named(tmp_path, row, reason):
    rows = [(SNAPSHOT, 0, 0, 1, 1, 0, 0), (LEVEL, NO, 4800, 1, 1, 0, 0), row]
    path = tmp_path / "in" / MARKET / "2026-08-11.parquet"
    path.parent.mkdir(parents=True)
    pq.write_table(pa.table(list(as_events(rows)), schema=EVENT_SCHEMA), path)
    refused(tmp_path, f"{path}, line 3: .*{reason}")
    pq.write_table(pa.table({"price": [1]}), path)
    refused(tmp_path, "must have the columns")
    pq.write_table(pa.table([[None]] * len(EVENT_SCHEMA), schema=EVENT_SCHEMA), path)
    refused(tmp_path, "no column must hold nulls")


@given(
    numbers=st.lists(st.tuples(st.integers(1, 9999), st.integers(-(10**15), 10**15)), min_size=1),
    levels=st.lists(st.tuples(st.integers(1, 9999), st.integers(0, 10**15))),
)
@settings(max_examples=30)
def test_numbers_are_read_exactly(tmp_path_factory, numbers, levels):
    """Sizes reach beyond 2^53, the integers that a float keeps apart."""
    deltas = [delta(1000, i + 2, YES, *number) for i, number in enumerate(numbers)]
    path = write_lines(tmp_path_factory.mktemp("in"), [*deltas, snapshot(1, 1, (), levels)])
    ((_, events, lines, *_),) = read_parts(path)
    read = list(zip(events.price.tolist(), events.size.tolist()))
    assert read == [*numbers, (0, len(levels)), *levels]
    assert lines.tolist() == [*range(1, len(numbers) + 1)] + [len(numbers) + 1] * (1 + len(levels))


RUN = [delta(START_MS + 10 + i, 2 + i, YES, 4900, 100 if i % 2 == 0 else -100) for i in range(40)]
"""The mid rises and falls with each message."""


class TestRepeatedMessages:
    @pytest.mark.parametrize(
        "name",
        ["2026-08-11 (1).ndjson.gz", "copy/2026-08-11.jsonl"],
    )
    def test_a_copy_of_a_file_is_refused_and_both_are_named(self, tmp_path, name):
        paths = [write_lines(tmp_path / "in", [START, *RUN], name=n) for n in ("a.ndjson", name)]
        text = refused(tmp_path, "from the same time; take one of them away")
        assert all(str(path) in text for path in paths)
        paths[0].unlink()
        assert folded(tmp_path)[0].messages == 41

    def test_a_second_recorder_is_refused_whatever_its_numbers_and_its_clock(self, tmp_path):
        write_lines(tmp_path / "in", [START, *RUN], name="a.ndjson")
        theirs = [m | {"recv_ms": m["recv_ms"] + 3_600_000} for m in [START, *RUN]]
        theirs = numbered(theirs, count(700))
        write_lines(tmp_path / "in", theirs, market="other-recorder", name="b.ndjson")
        refused(tmp_path, "from the same time")

    def test_json_beside_parquet_is_refused(self, tmp_path):
        path = write_lines(tmp_path / "in", [START, *RUN])
        ((_, events, *_),) = read_parts(path)
        table = pa.table(list(events), schema=EVENT_SCHEMA)
        pq.write_table(table, path.with_name("2026-08-11.parquet"))
        refused(tmp_path, "2026-08-11.parquet.* hold messages of .* from the same time")

    def test_a_file_that_overlaps_another_is_refused(self, tmp_path):
        write_lines(tmp_path / "in", [START, *RUN[:30]], name="a.ndjson")
        write_lines(
            tmp_path / "in", [START | {"recv_ms": START_MS + 25}, *RUN[25:]], name="b.ndjson"
        )
        refused(tmp_path, "from the same time")

    def test_files_that_follow_each_other_are_one_market_whatever_their_names(self, tmp_path):
        write_lines(tmp_path / "in", [START, *RUN])
        whole = folded(tmp_path)[1]
        shutil.rmtree(tmp_path / "in")
        write_lines(tmp_path / "in", [START, *RUN[:13]], name="part-9.ndjson")
        write_lines(tmp_path / "in", RUN[13:], name="part-10.ndjson")
        assert folded(tmp_path)[1].equals(whole)


class TestLostMessages:
    def test_a_size_below_zero_leaves_rows_out_until_the_next_snapshot(self, tmp_path):
        after = [delta(START_MS + 60 + i, 91 + i, NO, 4900, 100 - 200 * (i % 2)) for i in range(4)]
        again = snapshot(START_MS + 59, 90, [(4800, 100)], [(4800, 100)])
        sparse = numbered(RUN, count(2, 2))
        write_lines(tmp_path / "in", [START, *sparse[:4], *sparse[5:], again, *after])
        report, table = folded(tmp_path)
        assert (report.below_zero, report.crossed, report.gaps) == (1, 0, 0)
        assert report.left_out == 35
        assert table["up"].to_pylist() == [1, 0, 1, 0, 0, 1, 0, 1]
        assert "messages of KXSYNA15M" in report.findings[0] and "2026-08-11" in report.findings[0]
        assert "35 left out" in str(report)

    def test_a_crossed_book_leaves_rows_out(self, tmp_path):
        crossing = [delta(START_MS + 60, 42, NO, 5200, 1), delta(START_MS + 61, 43, NO, 5200, -1)]
        write_lines(tmp_path / "in", [START, *RUN, *crossing])
        report, table = folded(tmp_path)
        assert (report.crossed, report.left_out, report.below_zero) == (1, 2, 0)
        assert len(table) == 40

    def test_a_gap_of_a_whole_subscription_is_told(self, tmp_path):
        """The lost message would not show otherwise: the size grows on."""
        quiet = [delta(START_MS + 60 + i, 42 + i, YES, 4700, 100) for i in range(40)]
        write_lines(tmp_path / "in", [START, *RUN, *quiet[:20], *quiet[21:]])
        report, table = folded(tmp_path)
        assert (report.gaps, report.left_out, len(table)) == (1, 19, 40)

    def test_a_gap_is_told_for_every_market_of_the_file(self, tmp_path):
        numbers = count(1)
        both = [
            snapshot(START_MS, next(numbers), [(4800, 100)], [(4800, 100)], market=m)
            for m in (MARKET, OTHER)
        ]
        for i in range(20):
            size = 100 - 200 * (i % 2)
            for market in (MARKET, OTHER):
                both.append(delta(START_MS + 1 + i, next(numbers), YES, 4900, size, market=market))
        del both[22]
        write_lines(tmp_path / "in", both)
        report, table = folded(tmp_path)
        assert report.gaps == 2
        assert len(table) == 20

    def test_a_part_of_a_subscription_skips_numbers_without_an_alarm(self, tmp_path):
        write_lines(tmp_path / "in", [START, *numbered(RUN, (5 + i + i // 3 for i in count()))])
        report, _ = folded(tmp_path)
        assert report.gaps == report.left_out == 0

    def test_a_silence_gives_no_label_across_it(self, tmp_path):
        late = [m | {"recv_ms": m["recv_ms"] + HOLE_MS + 1} for m in RUN[20:]]
        market = "KXDAILY-T1"
        write_lines(
            tmp_path / "in", [altered(m, market_ticker=market) for m in [START, *RUN[:20], *late]]
        )
        report, table = folded(tmp_path)
        assert (report.holes, report.no_later_change, len(table)) == (1, 2, 39)

    @with_captures
    def test_four_of_five_lost_deltas_of_a_real_window_are_told(self):
        """86 % of 900 were; 240 of this probability give fewer than 192 with probability 0.01."""
        rng, told = np.random.default_rng(0), 0
        for file in find_files(KALSHI):
            parts = list(read_parts(file))
            events = Events(*(np.concatenate(c) for c in zip(*(part.events for part in parts))))
            for at in rng.choice(np.flatnonzero(events.kind == DELTA), 40):
                book = Book(close_ms=close_ms(parts[0].market))
                rest = Events(*(np.delete(column, at) for column in events))
                book.fold(rest, np.arange(len(rest.kind)))
                told += book.counts["crossed"] + book.counts["below_zero"] > 0
        assert told >= 192


class TestDamage:
    def damaged(self, tmp_path):
        for market in (MARKET, OTHER):
            lines = [altered(m, market_ticker=market) for m in [START, *RUN]]
            path = write_lines(tmp_path / "in", lines, market=market)
            whole = path.read_bytes()
            path.write_bytes(
                whole[:-12]
                if market == MARKET
                else gzip.compress(b"\n".join(line.encode() for line in as_lines(lines))[:-9])
            )
        write_lines(tmp_path / "in", [altered(m, market_ticker="KXC") for m in GOOD], market="KXC")

    def test_all_damaged_files_are_named_at_once(self, tmp_path):
        self.damaged(tmp_path)
        text = refused(tmp_path, "is damaged or cut short")
        assert text.count("\n") == 1
        assert MARKET in text and f"{OTHER}/2026-08-11.ndjson.gz, line 41: not a message" in text

    def test_an_empty_file_is_damaged_only_where_it_should_be_compressed(self, tmp_path):
        path = write_lines(tmp_path / "in", GOOD)
        path.with_name("2026-08-12.ndjson").touch()
        assert folded(tmp_path)[0].findings == ()
        path.with_name("2026-08-13.ndjson.gz").touch()
        shutil.rmtree(tmp_path / "out")
        refused(tmp_path, "2026-08-13.ndjson.gz is damaged or cut short: it is empty")

    def test_keep_going_reads_each_to_its_last_whole_line(self, tmp_path):
        self.damaged(tmp_path)
        report, table = folded(tmp_path, keep_going=True)
        assert 50 < report.messages < 86
        assert report.markets == 3
        assert sum("damaged" in each or "not a message" in each for each in report.findings) == 2
        assert len(table) == report.messages - 1 - report.no_later_change

    def test_what_follows_a_damaged_file_is_left_out_until_a_snapshot(self, tmp_path):
        first = write_lines(tmp_path / "in", [START, *RUN[:20]], name="1.ndjson")
        write_lines(tmp_path / "in", RUN[20:], name="2.ndjson")
        first.write_bytes(first.read_bytes()[:-9])
        report, table = folded(tmp_path, keep_going=True)
        assert (report.left_out, report.gaps, len(table)) == (20, 1, 19)

    def test_blocks_of_any_size_and_any_gzip_give_the_same_rows(self, tmp_path, monkeypatch):
        self.damaged(tmp_path)
        whole = folded(tmp_path, keep_going=True)[1]
        monkeypatch.setattr(reading_module, "BLOCK_BYTES", 777)
        monkeypatch.setattr(reading_module, "PIECE_BYTES", 50)
        monkeypatch.setattr(reading_module, "GZIP", gzip)
        monkeypatch.setattr(merge_module, "MERGED_ROWS", 7)
        monkeypatch.setattr(merge_module, "FEWEST_ROWS", 3)
        monkeypatch.setattr(fold_module, "LABEL_BLOCK", 2)
        assert folded(tmp_path, keep_going=True, workers=1)[1].equals(whole)

    def test_a_killed_fold_goes_on_with_the_file_it_was_reading(self, tmp_path, monkeypatch):
        for number, market in enumerate(["KXA", "KXB", "KXC"]):
            lines = [altered(m, market_ticker=market) for m in [START, *RUN]]
            lines = [m | {"recv_ms": m["recv_ms"] + number} for m in lines]
            write_lines(tmp_path / "in", lines[:20], market=market, name="1.ndjson")
            write_lines(tmp_path / "in", lines[20:], market=market, name="2.ndjson")
        whole = folded(tmp_path)[1]
        shutil.rmtree(tmp_path / "out")
        read, kill_at = [], 5

        def killed(path, **options):
            read.append(path)
            if len(read) == kill_at:
                raise KeyboardInterrupt
            return read_parts(path, **options)

        monkeypatch.setattr(fold_module, "read_parts", killed)
        with pytest.raises(KeyboardInterrupt):
            fold(tmp_path / "in", tmp_path / "out", progressbar=False)
        assert {path.name for path in tmp_path.iterdir()} == {"in", ".out.unfinished"}
        report, table = folded(tmp_path)
        assert len(read) == 7
        assert report.messages == 123 and table.equals(whole)

    def test_a_changed_file_is_read_again_after_a_kill(self, tmp_path, monkeypatch):
        path = write_lines(tmp_path / "in", GOOD)
        with monkeypatch.context() as patch:
            patch.setattr(fold_module, "_write_files", raise_interrupt)
            with pytest.raises(KeyboardInterrupt):
                fold(tmp_path / "in", tmp_path / "out", progressbar=False)
        write_lines(tmp_path / "in", [START, *RUN], name=path.name)
        assert folded(tmp_path)[0].messages == 41


def raise_interrupt(*arguments):
    raise KeyboardInterrupt


def test_close_is_read_from_the_ticker_in_eastern_time(tmp_path):
    assert close_ms(MARKET) == CLOSE_MS
    assert close_ms("KXGOLD15M-26JAN102115-15") == 1_768_097_700_000
    assert close_ms("KXHIGHNY-26AUG10-T75") is None
    wrong = "KXFOO-26AUG109999-X"
    write_lines(tmp_path / "in", [altered(m, market_ticker=wrong) for m in GOOD])
    refused(tmp_path, f"market {wrong}: its ticker names no time of close: hour must be in")


def test_clock_set_back_keeps_the_order_of_receipt(tmp_path):
    late = delta(START_MS - 100, 4, YES, 4900, 500)
    write_lines(tmp_path / "in", [*GOOD, late, delta(START_MS + 3, 5, YES, 4900, -500)])
    report, table = folded(tmp_path)
    assert report.clock_set_back == 1
    assert table["up"].to_pylist() == [1, 0, 1, 0]


markets_of_rows = st.lists(
    st.lists(st.tuples(st.integers(0, 12), st.integers(-1, 1)), min_size=1, max_size=30).map(
        sorted
    ),
    min_size=1,
    max_size=6,
)


@given(markets=markets_of_rows, block=st.integers(1, 5))
@settings(max_examples=50)
def test_merge_is_a_stable_sort_by_time(tmp_path_factory, markets, block):
    """Blocks of few rows end within runs of equal times, where an order is easily lost."""
    scratch = tmp_path_factory.mktemp("scratch")
    files, expected = [], []
    for order, values in enumerate(markets):
        rows = np.zeros(len(values), ROW)
        rows["recv_ms"], rows["mid"], rows["spread"] = (
            [time for time, _ in values],
            order,
            range(len(rows)),
        )
        files.append(Sorted(scratch / f"{order}.rows", scratch / f"{order}.up"))
        rows.tofile(files[-1].rows)
        np.array([up for _, up in values], np.int8).tofile(files[-1].up)
        expected += [(t, order, i, up) for i, (t, up) in enumerate(values) if up >= 0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merge_module, "MERGED_ROWS", block)
        patch.setattr(merge_module, "FEWEST_ROWS", block)
        table = pa.concat_tables(merged(files))
    assert list(zip(*(table[name].to_pylist() for name in ("mid", "spread", "up")))) == [
        row[1:] for row in sorted(expected)
    ]


def test_two_thousand_markets_at_the_same_time_merge_in_two_seconds(tmp_path):
    rng, files = np.random.default_rng(0), []
    for number in range(2_000):
        rows = np.zeros(500, ROW)
        rows["recv_ms"] = START_MS + np.sort(rng.integers(0, 900_000, len(rows)))
        files.append(Sorted(tmp_path / f"{number}.rows", tmp_path / f"{number}.up"))
        rows.tofile(files[-1].rows)
        np.ones(len(rows), np.int8).tofile(files[-1].up)
    began = time.process_time()
    pieces = [len(piece) for piece in merged(files)]
    assert time.process_time() - began < 2
    assert sum(pieces) == 1_000_000


@given(lengths=st.lists(st.integers(0, 20)), n_rows=st.integers(1, 9))
def test_files_hold_the_rows_asked_for(lengths, n_rows):
    table = pa.table({"row": np.arange(sum(lengths))})
    starts = np.cumsum([0, *lengths])
    pieces = [table.slice(start, n) for start, n in zip(starts, lengths)]
    files = list(regrouped(iter(pieces), count(n_rows, n_rows)))
    assert [len(file) for file in files[:-1]] == [n_rows] * (len(files) - 1)
    assert [row for file in files for row in file["row"].to_pylist()] == table["row"].to_pylist()


def test_float32_keeps_every_mid_apart():
    mid2 = np.arange(2, 2 * DOLLAR - 1)
    mids = (mid2 / (2 * DOLLAR)).astype(np.float32)
    np.testing.assert_array_equal(np.round(mids.astype(float) * 2 * DOLLAR), mid2)


def test_destination_must_not_exist_nor_hold_the_messages(tmp_path):
    write_lines(tmp_path / "in", GOOD)
    (tmp_path / "out").mkdir()
    with pytest.raises(FileExistsError, match="out exists; choose another name"):
        fold(tmp_path / "in", tmp_path / "out", progressbar=False)
    with pytest.raises(ValueError, match="destination must not contain the messages"):
        fold(tmp_path / "in", tmp_path / "in", overwrite=True, progressbar=False)
    folded(tmp_path)


def test_a_directory_without_messages_or_changes_is_refused_and_says_what_it_holds(tmp_path):
    write_lines(tmp_path / "in", [START])
    refused(tmp_path, "make no row", ValueError)
    shutil.rmtree(tmp_path / "in")
    (tmp_path / "in").mkdir()
    refused(tmp_path, "it holds no files", FileNotFoundError)
    for name in ("a.csv", "b.csv", "c.ndjson.bz2"):
        (tmp_path / "in" / name).touch()
    refused(tmp_path, r"it holds 2 \.csv, 1 \.ndjson\.bz2", FileNotFoundError)


def test_command_line_prints_the_report(tmp_path, capsys):
    write_lines(tmp_path / "in", GOOD)
    main([str(tmp_path / "in"), str(tmp_path / "out"), "--keep-going"])
    assert "4 messages of 1 markets" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="1"):
        main([str(tmp_path / "in"), str(tmp_path / "out")])
    assert "exists" in capsys.readouterr().err


@with_captures
def test_real_captures_fold_to_the_rows_they_always_did(tmp_path):
    report = fold(KALSHI, tmp_path / "out", progressbar=False)
    assert (report.messages, report.deltas, report.rows) == (691_010, 679_985, 675_622)
    assert (report.left_out, report.holes) == (0, 0)
    table = read_rows(tmp_path / "out")
    assert sum(table["up"].to_pylist()) == 339_144
    shuffled = np.random.default_rng(0).permutation(len(table))
    for name, least in (("mid", 10_000), ("spread", 1_000), ("imbalance", 300), ("up", 50)):
        column = table[name].to_numpy()
        assert anova_f(column) > least
        # F(19, 675,000) exceeds 3.5 with probability 2e-7.
        assert anova_f(column[shuffled]) < 3.5


@with_captures
def test_rows_of_a_real_capture_are_those_of_the_dictionary(tmp_path):
    file = min(find_files(KALSHI), key=lambda path: path.stat().st_size)
    shutil.copytree(file.parent, tmp_path / "in" / file.parent.name)
    report, table = folded(tmp_path)
    rows, dropped = naive_rows(read_lines(file), close_ms(file.parent.name))
    assert_equal_rows(table, *as_float32(rows))
    assert {name: getattr(report, name) for name in dropped} == dropped
