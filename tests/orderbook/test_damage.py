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
import shutil

import pytest

from benchmarks.orderbook import fold as fold_module
from benchmarks.orderbook import reading as reading_module
from benchmarks.orderbook.fold import fold
from benchmarks.orderbook.reading import read_parts
from tests.orderbook.wire import (
    GOOD,
    MARKET,
    OTHER,
    RUN,
    START,
    altered,
    as_lines,
    folded,
    refused,
    write_lines,
)


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

    @pytest.mark.parametrize("at, n_read", [(10, 0), (-8, 41)], ids=["in the data", "in the sum"])
    def test_a_changed_byte_is_told_and_what_precedes_it_is_read(self, tmp_path, at, n_read):
        path = write_lines(tmp_path / "in", [START, *RUN])
        write_lines(tmp_path / "in", [altered(m, market_ticker=OTHER) for m in GOOD], market=OTHER)
        changed = bytearray(path.read_bytes())
        changed[at] ^= 0xFF
        path.write_bytes(changed)
        refused(tmp_path, f"{path} is damaged or cut short")
        assert folded(tmp_path, keep_going=True)[0].messages == n_read + len(GOOD)

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
        monkeypatch.setattr(reading_module, "GZIP", gzip)
        monkeypatch.setattr(fold_module, "MERGED_ROWS", 7)
        monkeypatch.setattr(fold_module, "FEWEST_ROWS", 3)
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
            patch.setattr(fold_module, "write_files", raise_interrupt)
            with pytest.raises(KeyboardInterrupt):
                fold(tmp_path / "in", tmp_path / "out", progressbar=False)
        write_lines(tmp_path / "in", [START, *RUN], name=path.name)
        assert folded(tmp_path)[0].messages == 41


def raise_interrupt(*arguments):
    raise KeyboardInterrupt
