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
"""Dates and times become seconds since 1970."""

import datetime

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pymc.variational.streaming import (
    StreamError,
    StreamingDataset,
    arrow_source,
    parquet_source,
    preshuffle,
    summarize,
)
from tests.variational.streaming.strategies import rows_of


class TestTimes:
    def rows(self, values, kind):
        return rows_of(arrow_source(pa.table({"t": pa.array(values, kind)})))[:, 0]

    def test_they_become_seconds_since_1970(self):
        day = datetime.date(2013, 1, 1)
        seconds = (day - datetime.date(1970, 1, 1)).days * 86400
        assert self.rows([day, datetime.date(1969, 12, 31)], pa.date32()).tolist() == [
            seconds,
            -86400,
        ]
        for unit, per in (("s", 1), ("ms", 10**3), ("us", 10**6), ("ns", 10**9)):
            for zone in (None, "UTC", "Europe/Berlin"):
                kind = pa.timestamp(unit, zone)
                assert self.rows([seconds * per], kind).tolist() == [seconds]
        assert self.rows([seconds * 10**6 + 123_456], pa.timestamp("us")) == seconds + 0.123456

    @pytest.mark.parametrize(
        "ticks, unit", [(1, "ns"), (1_356_998_400_000_000_001, "ns"), (2**60 + 1, "us")]
    )
    def test_one_that_does_not_come_back_is_named(self, ticks, unit):
        with pytest.raises(StreamError, match=r"column 't' is .*, which float64 cannot hold exact"):
            self.rows([ticks], pa.timestamp(unit))

    def test_the_last_day_of_a_calendar_is_exact(self):
        end = datetime.datetime(9999, 12, 31, 23, 59, 59)
        assert self.rows([end], pa.timestamp("us")).tolist() == [253402300799]

    def test_a_date_of_milliseconds_keeps_them(self):
        ticks = pa.array([1_500, 86_400_000], pa.int64()).view(pa.date64())
        table = pa.table({"t": ticks})
        assert rows_of(arrow_source(table)).tolist() == [[1.5], [86400]]
        assert summarize(table, progressbar=False)["t"].min == 1.5

    def test_those_without_a_unit_are_right_beyond_the_range_of_nanoseconds(self, tmp_path):
        """Arrow reads INT96 as nanoseconds by default, which wrap around after 2262."""
        times = [datetime.datetime(year, 12, 31, 1, 2, 3) for year in (1600, 2026, 9999)]
        table = pa.table({"t": pa.array(times, pa.timestamp("us"))})
        pq.write_table(table, tmp_path / "a.parquet", use_deprecated_int96_timestamps=True)
        expected = self.rows(times, pa.timestamp("us")).tolist()
        assert rows_of(parquet_source(tmp_path / "a.parquet"))[:, 0].tolist() == expected
        preshuffle(tmp_path / "a.parquet", tmp_path / "out", seed=0, progressbar=False)
        shuffled = pq.read_table(tmp_path / "out")["t"]
        assert shuffled.type == pa.timestamp("us")
        assert sorted(shuffled.to_pylist()) == times

    def test_they_are_not_rounded_to_a_narrow_batch(self):
        source = arrow_source(pa.table({"t": pa.array([1_356_998_401], pa.timestamp("s"))}))
        ds = StreamingDataset(source, batch_size=1, dtype="float32")
        with pytest.raises(StreamError, match=r"holds .* in column 't', which float32 cannot"):
            ds.advance()

    def test_they_do_not_mix_with_numbers(self, tmp_path):
        pq.write_table(pa.table({"t": [1]}), tmp_path / "a.parquet")
        pq.write_table(pa.table({"t": [datetime.date(2013, 1, 1)]}), tmp_path / "b.parquet")
        with pytest.raises(ValueError, match=r"b.parquet: column 't' has times where it had none"):
            parquet_source(tmp_path)

    def test_times_of_a_zone_do_not_mix_with_those_of_none(self, tmp_path):
        """The same hour would be two times, some hours apart."""
        hour = pa.array([0], pa.timestamp("s"))
        pq.write_table(pa.table({"t": hour}), tmp_path / "a.parquet")
        zoned = hour.cast(pa.timestamp("s", "America/New_York"))
        pq.write_table(pa.table({"t": zoned}), tmp_path / "b.parquet")
        with pytest.raises(ValueError, match=r"b.parquet: column 't' .* without a zone beside"):
            parquet_source(tmp_path)
        with pytest.raises(StreamError, match=r"b.parquet: column 't' .* without a zone beside"):
            parquet_source(tmp_path, categories=["t"])
        for rows, own, has in ((hour, zoned, "a"), (zoned, hour, "no")):
            ds = StreamingDataset(pa.table({"t": rows}), batch_size=1)
            with pytest.raises(ValueError, match=f"rows has {has} time zone in 't'"):
                ds.rows(pa.table({"t": own}))
            with ds.rows(pa.table({"t": rows})):
                assert ds.as_tensor().get_value() == 0
