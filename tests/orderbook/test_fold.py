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


import json
import os
import shutil

from itertools import count
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.harness import run_command
from benchmarks.orderbook.book import (
    DELTA,
    EVENT_SCHEMA,
    HOLE_MS,
    LEVEL,
    NO,
    SNAPSHOT,
    YES,
    Book,
    Events,
    close_ms,
)
from benchmarks.orderbook.fold import fold
from benchmarks.orderbook.reading import find_files, read_parts
from tests.orderbook.naive import anova_f, as_float32, naive_rows, read_lines
from tests.orderbook.wire import (
    CLOSE_MS,
    GOOD,
    MARKET,
    OTHER,
    RUN,
    START,
    START_MS,
    altered,
    as_events,
    as_lines,
    assert_equal_rows,
    delta,
    folded,
    numbered,
    read_rows,
    refused,
    snapshot,
    write_lines,
)

KALSHI = Path(os.environ.get("KALSHI_DATA", ""))
"""Captures, which are not part of the repository."""

with_captures = pytest.mark.skipif(
    not os.environ.get("KALSHI_DATA"), reason="set KALSHI_DATA to a folder of captures"
)


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
    report, table = folded(tmp_path, messages)
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


def later(messages, ms):
    return [m | {"recv_ms": m["recv_ms"] + ms} for m in messages]


AGAIN = {
    "a copy": ("2026-08-11 (1).ndjson.gz", [START, *RUN]),
    "a copy elsewhere": ("copy/2026-08-11.jsonl", [START, *RUN]),
    "another recorder, its numbers and clock": (
        "b.ndjson",
        numbered(later([START, *RUN], 3_600_000), count(700)),
    ),
    "an overlap": ("b.ndjson", [*later([START], 25), *RUN[25:]]),
    "the same as Parquet": ("2026-08-11.parquet", None),
}


class TestRepeatedMessages:
    @pytest.mark.parametrize("name, messages", AGAIN.values(), ids=AGAIN)
    def test_messages_of_the_same_time_are_refused_and_both_files_named(
        self, tmp_path, name, messages
    ):
        first = write_lines(tmp_path / "in", [START, *RUN], name="a.ndjson")
        second = first.parent / name
        if messages is None:
            ((_, events, *_),) = read_parts(first)
            pq.write_table(pa.table(list(events), schema=EVENT_SCHEMA), second)
        else:
            write_lines(tmp_path / "in", messages, name=name)
        text = refused(tmp_path, "from the same time; take one of them away")
        assert str(first) in text and str(second) in text
        second.unlink()
        assert folded(tmp_path)[0].messages == 41

    def test_files_that_follow_each_other_are_one_market_whatever_their_names(self, tmp_path):
        whole = folded(tmp_path, [START, *RUN])[1]
        shutil.rmtree(tmp_path / "in")
        write_lines(tmp_path / "in", [START, *RUN[:13]], name="part-9.ndjson")
        write_lines(tmp_path / "in", RUN[13:], name="part-10.ndjson")
        assert folded(tmp_path)[1].equals(whole)


class TestLostMessages:
    def test_a_size_below_zero_leaves_rows_out_until_the_next_snapshot(self, tmp_path):
        after = [delta(START_MS + 60 + i, 91 + i, NO, 4900, 100 - 200 * (i % 2)) for i in range(4)]
        again = snapshot(START_MS + 59, 90, [(4800, 100)], [(4800, 100)])
        sparse = numbered(RUN, count(2, 2))
        report, table = folded(tmp_path, [START, *sparse[:4], *sparse[5:], again, *after])
        assert (report.below_zero, report.crossed, report.gaps) == (1, 0, 0)
        assert report.left_out == 35
        assert table["up"].to_pylist() == [1, 0, 1, 0, 0, 1, 0, 1]
        assert "messages of KXSYNA15M" in report.findings[0] and "2026-08-11" in report.findings[0]
        assert "35 left out" in str(report)

    def test_a_crossed_book_leaves_rows_out(self, tmp_path):
        crossing = [delta(START_MS + 60, 42, NO, 5200, 1), delta(START_MS + 61, 43, NO, 5200, -1)]
        report, table = folded(tmp_path, [START, *RUN, *crossing])
        assert (report.crossed, report.left_out, report.below_zero) == (1, 2, 0)
        assert len(table) == 40

    def test_a_gap_of_a_whole_subscription_is_told(self, tmp_path):
        """The lost message would not show otherwise: the size grows on."""
        quiet = [delta(START_MS + 60 + i, 42 + i, YES, 4700, 100) for i in range(40)]
        report, table = folded(tmp_path, [START, *RUN, *quiet[:20], *quiet[21:]])
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
        report, table = folded(tmp_path, both)
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


def test_close_is_read_from_the_ticker_in_eastern_time(tmp_path):
    assert close_ms(MARKET) == CLOSE_MS
    assert close_ms("KXGOLD15M-26JAN102115-15") == 1_768_097_700_000
    assert close_ms("KXHIGHNY-26AUG10-T75") is None
    wrong = "KXFOO-26AUG109999-X"
    refused(
        tmp_path,
        messages=[altered(m, market_ticker=wrong) for m in GOOD],
        match=f"market {wrong}: its ticker names no time of close",
    )


def test_clock_set_back_keeps_the_order_of_receipt(tmp_path):
    late = delta(START_MS - 100, 4, YES, 4900, 500)
    report, table = folded(tmp_path, [*GOOD, late, delta(START_MS + 3, 5, YES, 4900, -500)])
    assert report.clock_set_back == 1
    assert table["up"].to_pylist() == [1, 0, 1, 0]


def test_destination_must_not_exist_nor_hold_the_messages(tmp_path):
    write_lines(tmp_path / "in", GOOD)
    (tmp_path / "out").mkdir()
    with pytest.raises(FileExistsError, match="out exists; choose another name"):
        fold(tmp_path / "in", tmp_path / "out", progressbar=False)
    with pytest.raises(ValueError, match="destination must not contain the messages"):
        fold(tmp_path / "in", tmp_path / "in", overwrite=True, progressbar=False)
    folded(tmp_path)


def test_a_directory_without_messages_or_changes_is_refused_and_says_what_it_holds(tmp_path):
    refused(tmp_path, messages=[START], match="make no row", error=ValueError)
    shutil.rmtree(tmp_path / "in")
    (tmp_path / "in").mkdir()
    refused(tmp_path, "it holds no files", FileNotFoundError)
    for name in ("a.csv", "b.csv", "c.ndjson.bz2"):
        (tmp_path / "in" / name).touch()
    refused(tmp_path, r"it holds 2 \.csv, 1 \.ndjson\.bz2", FileNotFoundError)


def test_command_line_prints_the_report(tmp_path, capsys):
    write_lines(tmp_path / "in", GOOD)
    run_command(fold, [str(tmp_path / "in"), str(tmp_path / "out"), "--keep-going"])
    assert "4 messages of 1 markets" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="1"):
        run_command(fold, [str(tmp_path / "in"), str(tmp_path / "out")])
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
