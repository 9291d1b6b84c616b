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
"""Splits, sources that are not Parquet files, and the summary of what was shuffled."""

import logging

from itertools import chain
from unittest.mock import Mock

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pymc.variational._streaming.preshuffle import cli, passes
from pymc.variational.streaming import (
    StreamError,
    arrow_source,
    parquet_source,
    summarize,
)
from tests.variational.streaming.preshuffle.preshuffled import (
    cut_small,
    digests,
    rows_in_order,
    shuffle,
)

N_ROWS = 5000
CARRIERS = ["UA", "AA", "DL", "B6"]
SPLIT = {"train": 0.9, "valid": 0.1}


@pytest.fixture
def frame():
    rng = np.random.default_rng(0)
    carriers = np.array(CARRIERS)
    return pd.DataFrame(
        {
            "row": np.arange(N_ROWS),
            "distance": rng.gamma(2.0, 500.0, N_ROWS),
            "carrier": pd.Categorical(carriers[rng.integers(0, 3, N_ROWS)], categories=carriers),
            "dest": carriers[rng.integers(0, 4, N_ROWS)],
            "delay": np.where(rng.random(N_ROWS) < 0.1, np.nan, rng.normal(size=N_ROWS)),
        }
    )


class TestSplit:
    @pytest.mark.parametrize(
        ["block", "again"],
        [(1 << 17, False), (1 << 14, True)],
        ids=["in memory", "scattered again"],
    )
    def test_every_row_is_in_exactly_one_part_of_exactly_the_size_asked_for(
        self, tmp_path, monkeypatch, frame, block, again
    ):
        cut_small(monkeypatch.setattr, block=block)
        shuffled = Mock(wraps=passes._shuffle)
        monkeypatch.setattr(passes, "_shuffle", shuffled)
        split = {"a": 0.333, "b": 0.5, "c": 0.167}
        for name in ("out", "again"):
            assert shuffle(frame, tmp_path / name, split=split).rows == N_ROWS
        places = [call.args[-1] for call in shuffled.call_args_list]
        assert any(len(place) > 1 for place in places) == again
        rows = {part: rows_in_order(tmp_path / "out" / part) for part in split}
        assert [len(found) for found in rows.values()] == [1665, 2500, 835]
        assert sorted(chain.from_iterable(rows.values())) == list(range(N_ROWS))
        for part in split:
            assert digests(tmp_path / "out" / part) == digests(tmp_path / "again" / part)

    def test_parts_are_runs_of_the_permutation_and_so_random_samples(self, tmp_path, frame):
        shuffle(frame, tmp_path / "out", split=SPLIT)
        shuffle(frame, tmp_path / "whole")
        parts = [rows_in_order(tmp_path / "out" / part) for part in SPLIT]
        assert list(chain.from_iterable(parts)) == rows_in_order(tmp_path / "whole")

    def test_each_part_is_a_whole_marked_table_and_both_together_are_refused(self, tmp_path, frame):
        shuffle(frame, tmp_path / "out", split=SPLIT)
        for part, n_rows in (("train", 4500), ("valid", 500)):
            source = parquet_source(tmp_path / "out" / part, columns=["row"])
            assert source.n_rows == source.mark.n_rows == n_rows
        with pytest.raises(StreamError, match="to two parts of a split; pass one of them"):
            parquet_source(tmp_path / "out", columns=["row"])

    def test_the_command_line_splits_too(self, tmp_path, frame):
        frame.to_parquet(tmp_path / "in.parquet")
        places = [str(tmp_path / "in.parquet"), str(tmp_path / "out")]
        options = ["--seed", "0", "--split", "train=0.9,valid=0.1", "--quiet"]
        assert cli.main(["preshuffle", *places, *options]) == 0
        shuffle(tmp_path / "in.parquet", tmp_path / "same", split=SPLIT)
        for part in SPLIT:
            assert digests(tmp_path / "out" / part) == digests(tmp_path / "same" / part)


def test_files_are_held_out_of_a_shuffled_table_when_that_is_asked_for(
    tmp_path, monkeypatch, frame
):
    cut_small(monkeypatch.setattr)
    shuffle(frame, tmp_path / "out")
    files = sorted((tmp_path / "out").iterdir())
    with pytest.raises(
        StreamError, match=r"1 of the .* missing; pass all of them, or partial=True"
    ):
        parquet_source(files[:-1], columns=["row"])
    train, valid = (
        parquet_source(paths, columns=["row"], partial=True) for paths in (files[:-1], files[-1:])
    )
    assert train.shuffled and valid.shuffled
    assert train.n_rows + valid.n_rows == N_ROWS


def tables(frame, name):
    table = pa.Table.from_pandas(frame, preserve_index=False)
    return {
        "pandas": frame,
        "Polars": pl.from_pandas(frame).cast({"carrier": pl.Enum(CARRIERS)}),
        "table": table,
        "reader": table.to_reader(max_chunksize=700),
        "function": lambda: table.to_reader(max_chunksize=700),
        "batches": table.to_batches(max_chunksize=700),
        "generator": (batch for batch in table.to_batches(max_chunksize=700)),
    }[name]


class TestSources:
    @pytest.mark.parametrize(
        "name",
        ["pandas", "Polars", "table", "reader", "function", "batches", "generator"],
    )
    def test_any_table_keeps_its_columns_and_categories(self, tmp_path, monkeypatch, frame, name):
        cut_small(monkeypatch.setattr)
        assert shuffle(tables(frame, name), tmp_path / "out").rows == N_ROWS
        found = pq.read_table(tmp_path / "out").sort_by("row").to_pandas()
        assert list(found["carrier"].cat.categories) == ["UA", "AA", "DL", "B6"]
        pd.testing.assert_frame_equal(found, frame, check_dtype=False, check_categorical=False)
        assert rows_in_order(tmp_path / "out") != list(range(N_ROWS))
        assert parquet_source(tmp_path / "out", columns=["row"]).mark is not None

    def test_sources_and_arrays_are_read_too(self, tmp_path, frame):
        source = parquet_source(_written(tmp_path / "in.parquet", frame), columns=["row"])
        shuffle(source, tmp_path / "source")
        assert sorted(rows_in_order(tmp_path / "source")) == list(range(N_ROWS))
        table = pa.table({"y": [1.0, 2.0], "row": [0, 1], "x": [0.5, 0.5]})
        with pa.OSFile(str(tmp_path / "in.arrow"), "wb") as file:
            with pa.ipc.new_file(file, table.schema) as writer:
                writer.write_table(table)
        for number, made in enumerate((lambda: table.to_reader(), tmp_path / "in.arrow")):
            shuffle(arrow_source(made, columns=["x", "row"]), tmp_path / str(number))
            assert pq.read_table(tmp_path / str(number)).column_names == ["x", "row"]
        shuffle(np.arange(200.0).reshape(100, 2), tmp_path / "array")
        assert sorted(rows_in_order(tmp_path / "array", "1")) == list(range(1, 200, 2))

    def test_the_index_of_a_filtered_frame_is_left_out(self, tmp_path, frame):
        shuffle(frame[frame["row"] % 2 == 0], tmp_path / "out")
        assert pq.read_table(tmp_path / "out").column_names == list(frame)

    @pytest.mark.parametrize("kind", [pa.string(), pa.large_string()], ids=str)
    def test_a_dictionary_that_is_plain_or_of_another_type_later_keeps_all_values(
        self, tmp_path, kind
    ):
        first = pa.record_batch({"row": [0, 1], "g": pa.array(["a", "b"]).dictionary_encode()})
        later = pa.array(["c", "a"], kind)
        for name, values in (("plain", later), ("encoded", later.dictionary_encode())):
            batches = [first, pa.record_batch({"row": [2, 3], "g": values})]
            assert summarize(batches)["g"].levels == ("a", "b", "c")
            shuffle(batches, tmp_path / name)
            found = pq.read_table(tmp_path / name).sort_by("row")
            assert found["g"].to_pylist() == ["a", "b", "c", "a"]

    def test_batches_that_lose_a_column_or_change_its_values_are_refused(self, tmp_path):
        for second, message in (
            (pa.record_batch({"y": [1]}), r"block 1: has no column 'x'; its columns are \['y'\]"),
            (pa.record_batch({"x": [1.5]}), "column 'x' is int64 and double .*truncated"),
            (pa.record_batch({"x": ["1"]}), "block 1: its columns differ .*int64 vs string"),
        ):
            with pytest.raises(StreamError, match=message):
                shuffle([pa.record_batch({"x": [1]}), second], tmp_path / "out")
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        "first, second, exact",
        [
            (pa.array([True]), pa.array([2]), pa.array([1])),
            (pa.array([0.5], pa.float32()), pa.array([0.1]), pa.array([0.25, np.nan])),
            (
                pa.array([1], pa.date32()),
                pa.array([86_401], pa.timestamp("s")),
                pa.array([86_400], pa.timestamp("s")),
            ),
            (pa.array([1]).cast(pa.decimal128(21, 2)), pa.array([0.125]), pa.array([0.25])),
        ],
        ids=["booleans", "floats", "dates", "decimals"],
    )
    def test_values_that_a_cast_would_change_in_silence_are_refused(
        self, tmp_path, first, second, exact
    ):
        batches = [pa.record_batch({"x": values}) for values in (first, second, exact)]
        with pytest.raises(StreamError, match=r"^block 1: column 'x' is .* would .*with one t"):
            shuffle(batches, tmp_path / "out")
        assert shuffle([batches[0], batches[2]], tmp_path / "out").rows == 1 + len(exact)

    def test_a_promise_of_rows_is_kept_or_nothing_is_published(self, tmp_path, frame):
        source = arrow_source(lambda: pa.table({"row": [1, 2]}), n_rows=3)
        with pytest.raises(StreamError, match="has 3 rows, 2 were read"):
            shuffle(source, tmp_path / "out")


def _written(path, frame):
    frame.to_parquet(path)
    return path


@pytest.mark.parametrize(
    ["first", "second", "kind"],
    [
        (pa.array([1], pa.int32()), pa.array([2], pa.int64()), pa.int64()),
        (pa.array([1], pa.float32()), pa.array([2], pa.float64()), pa.float64()),
        (pa.array([1], pa.int64()), pa.array([None], pa.float64()), pa.float64()),
        (pa.array([1.0]), pa.nulls(1), pa.float64()),
        (pa.array(["a"]), pa.array(["b"]).dictionary_encode(), pa.string()),
        (pa.array([True]), pa.array([5], pa.int8()), pa.int8()),
        (pa.array([0.5]), pa.array([True]), pa.float64()),
        (pa.array([0.5], pa.float16()), pa.array([0.25], pa.float32()), pa.float32()),
        (
            pa.array([10**9], pa.timestamp("us", "UTC")),
            pa.array([10**6], pa.timestamp("ms", "Asia/Tokyo")),
            pa.timestamp("us", "UTC"),
        ),
    ],
    ids=[
        *("integers", "floats", "nulls as floats", "all null", "dictionary"),
        *("booleans", "booleans later", "half floats", "zones"),
    ],
)
def test_types_that_differ_between_files_are_widened(tmp_path, first, second, kind):
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table({"x": first, "row": [0]}), tmp_path / "in" / "a.parquet")
    pq.write_table(pa.table({"row": [1], "x": second}), tmp_path / "in" / "b.parquet")
    shuffle(tmp_path / "in", tmp_path / "out")
    found = pq.read_table(tmp_path / "out").sort_by("row")
    assert found["x"].type == kind
    assert found["x"].to_pylist() == [first[0].as_py(), second[0].as_py()]


def test_dates_beside_times_become_times(tmp_path):
    (tmp_path / "in").mkdir()
    for name, values in (
        ("a", pa.array([1], pa.date32())),
        ("b", pa.array([1], pa.timestamp("us"))),
    ):
        pq.write_table(pa.table({"x": values}), tmp_path / "in" / f"{name}.parquet")
    shuffle(tmp_path / "in", tmp_path / "out")
    found = pq.read_table(tmp_path / "out")["x"].cast(pa.int64())
    assert sorted(found.to_pylist()) == [1, 86_400 * 10**6]


def test_integers_that_widening_would_change_are_refused(tmp_path):
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table({"x": [2**53 + 1]}), tmp_path / "in" / "a.parquet")
    pq.write_table(pa.table({"x": [0.5]}), tmp_path / "in" / "b.parquet")
    with pytest.raises(
        StreamError,
        match=r"a.parquet: column .x. is double and int64 \(Integer value 9007199254740993",
    ):
        shuffle(tmp_path / "in", tmp_path / "out")
    with pytest.raises(StreamError, match=r"b.parquet: column 'x' is int64 and double \(.*0\.5"):
        shuffle(parquet_source(tmp_path / "in"), tmp_path / "out")


def test_tables_that_differ_in_one_digit_are_two_shuffles(tmp_path):
    """Their files fit each other in all but the rows."""
    for name, value in (("a", 1.0), ("b", 1.0 + 1e-15)):
        shuffle(pa.table({"x": [0.0, value, 2.0]}), tmp_path / name)
    one, other = (parquet_source(tmp_path / name).mark.shuffle for name in "ab")
    assert one != other


class TestSummary:
    def check(self, summary, frame):
        for name in ("row", "distance", "delay"):
            column, values = summary[name], frame[name]
            expected = values.min(), values.max(), values.mean(), values.std()
            found = column.min, column.max, column.mean, column.sd
            np.testing.assert_allclose(found, expected, rtol=1e-12)
            assert (column.rows, column.nulls) == (values.count(), values.isna().sum())
        assert summary["carrier"].levels == ("UA", "AA", "DL", "B6")
        assert summary["dest"].levels == ("AA", "B6", "DL", "UA")
        assert summary["distance"].levels is None

    @pytest.mark.parametrize("name", ["pandas", "Polars", "generator"])
    def test_one_pass_over_any_table_summarizes_it(self, frame, name):
        summary = summarize(tables(frame, name))
        assert summary.rows == N_ROWS
        self.check(summary, frame)

    def test_a_shuffled_table_carries_its_summary(self, tmp_path, monkeypatch, frame):
        cut_small(monkeypatch.setattr)
        frame.to_parquet(tmp_path / "in.parquet")
        shuffle(tmp_path / "in.parquet", tmp_path / "out")
        with monkeypatch.context() as patch:
            patch.setattr(pq.ParquetFile, "iter_batches", None)
            summary = summarize(tmp_path / "out")
            source = parquet_source(tmp_path / "out", columns=["distance"])
            assert summarize(source)["distance"] == summary["distance"]
            assert list(summarize(source)) == ["distance"]
        self.check(summary, frame)

    @pytest.mark.parametrize("partial", [False, True], ids=["split", "partial"])
    def test_a_part_is_read_for_numbers_of_its_own_and_has_the_levels_of_all(
        self, tmp_path, monkeypatch, frame, partial
    ):
        cut_small(monkeypatch.setattr)
        frame.loc[0, "carrier"] = "B6"
        split = {"train": 1 - 1 / N_ROWS, "valid": 1 / N_ROWS}
        shuffle(frame, tmp_path / "out", split=None if partial else split)
        files = sorted((tmp_path / "out").iterdir())[:1] if partial else tmp_path / "out" / "valid"
        rows = pq.read_table(files)["row"].to_pylist()
        columns = ["row"]
        summary = summarize(parquet_source(files, columns=columns, partial=partial))
        assert summary["row"].mean == pytest.approx(np.mean(rows))

    @pytest.mark.parametrize("shuffled", [False, True])
    def test_categories_are_shown_by_their_levels(self, tmp_path, frame, shuffled):
        path = tmp_path / "in.parquet"
        frame.to_parquet(path)
        if shuffled:
            shuffle(path, tmp_path / "out")
            path = tmp_path / "out"
        source = parquet_source(path, columns=["row", "carrier"], categories=["carrier"])
        summary = summarize(source)
        assert summary["carrier"].levels == source.levels["carrier"] == ("UA", "AA", "DL", "B6")
        assert summary["carrier"].mean is None and summary["row"].mean == frame["row"].mean()

    def test_it_is_shown_as_a_table(self, frame):
        summary = summarize(frame)
        lines = repr(summary).splitlines()
        assert lines[0].split() == ["rows", "nulls", "min", "max", "mean", "sd", "levels"]
        assert lines[1].split()[:5] == ["row", "5,000", "0", "0", "4,999"]
        assert "UA, AA, DL, B6" in repr(summary)
        assert summary._repr_html_().count("<tr") == 1 + len(frame.columns)
        with pytest.raises(KeyError, match="no column 'speed'; the columns are"):
            summary["speed"]

    def test_text_has_no_levels(self):
        table = pa.table({"text": [f"word-{i}" for i in range(5000)], "few": ["a", None] * 2500})
        summary = summarize(table.to_batches(max_chunksize=1000))
        assert summary["text"].levels is None
        assert (summary["few"].levels, summary["few"].nulls) == (("a",), 2500)

    def test_numbers_near_the_end_of_float64_are_no_error(self, tmp_path):
        table = pa.table({"x": [0.1, 1e300, -1e300]})
        shuffle(table, tmp_path / "out")
        for source in (table, tmp_path / "out", table.to_batches(max_chunksize=1)):
            found = summarize(source)["x"]
            assert (found.min, found.max, found.sd) == (-1e300, 1e300, np.inf)

    def test_numbers_far_from_zero_keep_their_digits(self):
        values = 1e9 + np.random.default_rng(0).normal(size=100_000)
        found = summarize(pa.table({"x": values}).to_batches(max_chunksize=777))["x"]
        assert found.sd == pytest.approx(values.std(ddof=1), rel=1e-9)

    def test_times_are_seconds_and_shown_as_dates(self, tmp_path):
        times = pd.to_datetime(["2026-01-01", "2026-01-03"])
        table = pa.table({"t": times, "d": pa.array(times).cast(pa.date32())})
        for name in ("t", "d"):
            column = summarize(table)[name]
            assert column.max - column.min == 2 * 86400
            assert column.min == times[0].timestamp()
        assert "2026-01-02T00:00 " in repr(summarize(table))  # the mean
        shuffle(table, tmp_path / "out")
        source = parquet_source(tmp_path / "out", columns=["d"], invalid="drop")
        assert " 2026-01-02 " in repr(summarize(source))


@pytest.mark.parametrize("kind", [pa.dictionary(pa.int32(), pa.string()), pa.string_view()])
@pytest.mark.parametrize(
    "nest",
    [
        lambda words: pa.ListArray.from_arrays([0, 2, 2, 3], words),
        lambda words: pa.FixedSizeListArray.from_arrays(words, 1),
        lambda words: pa.StructArray.from_arrays([words, words], ["a", "b"]),
        lambda words: pa.MapArray.from_arrays([0, 1, 1, 3], ["k", "l", "m"], words),
    ],
    ids=["list", "fixed size", "struct", "map"],
)
def test_dictionaries_and_views_inside_of_others_become_plain(tmp_path, nest, kind):
    words = pa.array(["a", None, "b"])
    table = pa.table({"row": [0, 1, 2], "words": nest(words.cast(kind))})
    shuffle(table, tmp_path / "out")
    found = pq.read_table(tmp_path / "out").sort_by("row")
    assert found["words"].to_pylist() == nest(words).to_pylist()


def test_dictionaries_of_batches_may_differ_in_type_and_hold_nulls(tmp_path):
    words = [pa.array(["a", "b"]), pa.array(["b", "c"], pa.large_string())]
    with_null = pa.DictionaryArray.from_arrays([0, 1, None], pa.array(["d", None]))
    columns = [*(values.dictionary_encode() for values in words), with_null]
    shuffle([pa.record_batch({"word": column}) for column in columns], tmp_path / "out")
    found = pq.read_table(tmp_path / "out")["word"]
    assert sorted(map(str, found.to_pylist())) == ["None", "None", "a", "b", "b", "c", "d"]


def test_each_pass_is_told_of_in_one_line(tmp_path, frame, caplog):
    with caplog.at_level(logging.INFO, logger="pymc"):
        shuffle(frame, tmp_path / "out")
    assert [record.levelname for record in caplog.records] == ["INFO"] * 2
    for record, verb in zip(caplog.records, ("scattered", "wrote")):
        assert record.getMessage().startswith(f"preshuffle {verb} 5,000 rows in ")
