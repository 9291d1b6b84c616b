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
"""Rows side by side in Arrow files, and what reads them."""

import os

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from pymc.variational.streaming import (
    StreamError,
    arrow_source,
    parquet_source,
    preshuffle,
)
from tests.variational.streaming.preshuffle.preshuffled import cut_small, digests

N_ROWS = 3000


@pytest.fixture
def frame():
    rows = np.arange(N_ROWS)
    return pd.DataFrame(
        {
            "x": np.float32(rows / 8),
            "carrier": pd.Categorical.from_codes(rows % 3, ["UA", "AA", "DL"]),
            "y": np.float32(-rows),
            "small": np.int8(rows % 100),
            "up": rows % 2 == 0,
            "dest": np.array(["b", "a"])[rows % 2],
        }
    )


@pytest.fixture
def small_tasks(monkeypatch):
    cut_small(monkeypatch.setattr, files=4)
    monkeypatch.setattr("pymc.variational._streaming.preshuffle.command.PIECE_ROWS", 70)


def shuffle(source, destination, **options):
    options = {"seed": 0, "progressbar": False, "format": "arrow"} | options
    return preshuffle(source, destination, **options)


def rows_of(source):
    return np.concatenate(list(source.blocks()))


@pytest.mark.usefixtures("small_tasks")
class TestRows:
    @pytest.mark.parametrize("compression", [None, "lz4", "zstd"])
    def test_they_come_under_their_names_in_the_order_of_the_parquet_result(
        self, tmp_path, frame, compression
    ):
        shuffle(frame, tmp_path / "out", compression=compression)
        source = arrow_source(tmp_path / "out")
        assert (source.columns, source.n_rows) == (tuple(frame), N_ROWS)
        assert source.integral == (False, True, False, True, True, True)
        rows = rows_of(source)
        x = rows[:, 0] * 8
        assert sorted(x) == list(range(N_ROWS))
        expected = [x / 8, x % 3, -x, x % 100, x % 2 == 0, x % 2 == 0]
        np.testing.assert_array_equal(rows, np.transpose(expected))
        shuffle(frame, tmp_path / "parquet", format="parquet")
        numbers = ["y", "x", "small"]
        same = rows_of(parquet_source(tmp_path / "parquet", columns=numbers))
        np.testing.assert_array_equal(
            rows_of(arrow_source(tmp_path / "out", columns=numbers)), same
        )

    def test_codes_are_places_in_the_levels_of_the_summary(self, tmp_path, frame):
        shuffle(frame, tmp_path / "out")
        summary = arrow_source(tmp_path / "out").summary
        assert summary["carrier"].levels == ("UA", "AA", "DL")
        assert summary["dest"].levels == ("a", "b")

    @pytest.mark.parametrize(
        "values",
        [[0.5, 2.5, 1.5], [1, 2, 0], [2**40, 3, 2**40], [True, False, True]],
        ids=["fractions", "small", "large", "booleans"],
    )
    def test_dictionaries_of_numbers_are_their_values(self, tmp_path, values):
        table = pa.table({"row": [0, 1, 2], "x": pa.array(values).dictionary_encode()})
        shuffle(table, tmp_path / "out")
        source = arrow_source(tmp_path / "out")
        assert not source.levels
        assert sorted(map(tuple, rows_of(source))) == list(enumerate(values))
        with pytest.raises(ValueError, match="'x' was written with no levels; leave other"):
            arrow_source(tmp_path / "out", categories=["x"])

    def test_they_are_read_from_any_row_on_and_in_part(self, tmp_path, frame):
        shuffle(frame, tmp_path / "out")
        source = arrow_source(tmp_path / "out")
        rows = rows_of(source)
        for start in (0, 1, 69, 70, 1999, N_ROWS - 1):
            found = np.concatenate(list(source.blocks(0, start)))
            np.testing.assert_array_equal(found, rows[start:])
            (first,) = source.read_starts(np.array([start]))
            assert 0 <= start - first < 70

    def test_one_dtype_in_its_own_order_is_not_copied(self, tmp_path):
        shuffle(np.random.default_rng(0).normal(size=(N_ROWS, 5)), tmp_path / "out")
        for block in arrow_source(tmp_path / "out"):
            assert block.base is not None

    def test_the_same_call_gives_the_same_bytes(self, tmp_path, frame):
        for name in ("one", "two"):
            shuffle(frame, tmp_path / name, split={"a": 0.5, "b": 0.5})
        assert digests(tmp_path / "one" / "a") == digests(tmp_path / "two" / "a")
        assert digests(tmp_path / "one" / "b") == digests(tmp_path / "two" / "b")

    def test_a_shuffled_table_is_shuffled_again(self, tmp_path, frame):
        shuffle(frame, tmp_path / "out")
        source = arrow_source(tmp_path / "out")
        shuffle(source, tmp_path / "again", format="parquet", seed=1)
        again = parquet_source(tmp_path / "again", categories=list(source.levels))
        assert again.levels == source.levels
        found = rows_of(again)
        assert sorted(map(tuple, found)) == sorted(map(tuple, rows_of(source)))


@pytest.mark.usefixtures("small_tasks")
class TestGuarantees:
    def test_marks_are_checked_as_those_of_parquet_files(self, tmp_path, frame):
        shuffle(frame, tmp_path / "out")
        files = sorted((tmp_path / "out").iterdir())
        source = arrow_source(files)
        assert source.shuffled and source.mark.n_rows == N_ROWS
        with pytest.raises(
            StreamError, match=rf"1 of the {len(files)} files of its shuffle are missing"
        ):
            arrow_source(files[1:])
        assert arrow_source(files[1:], partial=True).n_rows < N_ROWS

    @pytest.mark.parametrize("place", [0.1, 0.4, 0.7, 0.95])
    def test_a_flipped_bit_is_found(self, tmp_path, frame, place):
        shuffle(frame[["x", "y"]], tmp_path / "out")
        file = min((tmp_path / "out").iterdir())
        expected = rows_of(arrow_source(tmp_path / "out"))
        data = bytearray(file.read_bytes())
        data[int(place * len(data))] ^= 16
        file.write_bytes(data)
        try:
            found = rows_of(arrow_source(tmp_path / "out"))
        except (StreamError, ValueError):
            return
        np.testing.assert_array_equal(found, expected)

    def test_rows_that_another_program_wrote_back_are_refused(self, tmp_path, frame):
        shuffle(frame, tmp_path / "out")
        file = min((tmp_path / "out").iterdir())
        with pa.ipc.open_file(file.read_bytes()) as reader:
            table = reader.read_all()
        with pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table.take(np.arange(len(table))[::-1]))
        with pytest.raises(StreamError, match="record batch 0 is not what preshuffle wrote"):
            rows_of(arrow_source(tmp_path / "out"))

    @pytest.mark.parametrize("change", ["rewritten", "cut", "changed in place"])
    def test_a_file_that_changes_is_named(self, tmp_path, frame, change):
        shuffle(frame, tmp_path / "out")
        shuffle(frame, tmp_path / "other", seed=1)
        source = arrow_source(tmp_path / "out")
        file = min((tmp_path / "out").iterdir())
        blocks = source.blocks()
        next(blocks)
        other = bytearray(min((tmp_path / "other").iterdir()).read_bytes())
        if change == "changed in place":
            other = bytearray(file.read_bytes())
            other[len(other) // 2] ^= 16
        file.write_bytes(other[: len(other) // 2] if change == "cut" else other)
        with pytest.raises(StreamError, match=r"part-00000.* changed while it was read; make"):
            list(blocks)
        message = (
            "not a readable Arrow IPC" if change == "cut" else "changed since the source was made"
        )
        with pytest.raises(StreamError, match=rf"part-00000.* {message}"):
            list(source.blocks())

    def test_another_time_alone_is_no_change(self, tmp_path, frame):
        """Batches have checksums, so that the size and the end of a file are enough to know it."""
        shuffle(frame, tmp_path / "out")
        source = arrow_source(tmp_path / "out")
        blocks = source.blocks()
        next(blocks)
        for file in (tmp_path / "out").iterdir():
            os.utime(file, (0, 0))
        assert len(list(blocks)) > 1
        assert len(rows_of(source)) == N_ROWS
        assert arrow_source(tmp_path / "out").fingerprint == source.fingerprint

    @pytest.mark.parametrize(
        ["column", "error", "message"],
        [
            ([None, 1.0], StreamError, "'bad' holds 1 nulls or NaN.*filter such rows"),
            ([np.inf, 1.0], StreamError, "'bad' holds 0 nulls or NaN, and 1.0 to inf"),
            ([[1], [2]], ValueError, "'bad' has type list.*leave it out with columns="),
            (
                pa.array([0, 1], pa.timestamp("s")).dictionary_encode(),
                ValueError,
                "'bad' has type dictionary.*timestamp.*leave it out with columns=",
            ),
        ],
    )
    def test_what_it_cannot_hold_is_refused_with_a_remedy(self, tmp_path, column, error, message):
        table = pa.table({"row": [0, 1], "bad": column})
        with pytest.raises(error, match=message):
            shuffle(table, tmp_path / "out")
        assert list(tmp_path.iterdir()) == []
        assert shuffle(table, tmp_path / "out", columns=["row"]).rows == 2

    def test_too_many_levels_are_refused(self, tmp_path):
        table = pa.table({"text": [f"word-{i}" for i in range(5000)]})
        with pytest.raises(StreamError, match="'text' has more than 4,096 levels; leave it out"):
            shuffle(table, tmp_path / "out")

    def test_integers_that_the_rows_cannot_hold_are_refused(self, tmp_path):
        table = pa.table({"id": [2**60, 1], "x": [0.5, 1.0]})
        shuffle(table, tmp_path / "out")
        with pytest.raises(
            ValueError, match="'id' holds 1152921504606846976, which float64 cannot"
        ):
            arrow_source(tmp_path / "out")
        assert rows_of(arrow_source(tmp_path / "out", columns=["id"])).max() == 2**60

    def test_a_wrong_format_is_refused(self, tmp_path, frame):
        with pytest.raises(ValueError, match="format='csv' is not a choice"):
            shuffle(frame, tmp_path / "out", format="csv")
        with pytest.raises(ValueError, match="compression='gzip' is not available"):
            shuffle(frame, tmp_path / "out", compression="gzip")


def test_it_is_suggested_for_wide_tables_of_numbers(tmp_path, caplog):
    wide = pa.table({f"x{j}": [0.5, 1.0] for j in range(20)})
    with caplog.at_level("INFO", logger="pymc"):
        shuffle(wide.select(range(10)), tmp_path / "narrow", format="parquet")
        shuffle(
            wide.append_column("name", pa.array(["a", "b"])), tmp_path / "text", format="parquet"
        )
        shuffle(wide, tmp_path / "arrow")
        assert "several times as fast" not in caplog.text
        shuffle(wide, tmp_path / "wide", format="parquet")
    assert '20 columns of numbers; format="arrow" lets arrow_source read' in caplog.text
    assert len(arrow_source(tmp_path / "arrow").columns) == 20
