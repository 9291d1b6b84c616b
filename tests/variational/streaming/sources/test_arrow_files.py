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
"""Which Arrow IPC files a source accepts, and how it names the place of what it refuses."""

import os

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pytest

from pymc.variational.streaming import (
    StreamError,
    arrow_source,
)
from tests.variational.streaming.held import open_files
from tests.variational.streaming.strategies import numbered, rows_of, table


class TestArrowFiles:
    def write(self, path, rows, max_chunksize=3, **options):
        with pa.ipc.new_file(path, rows.schema, **options) as writer:
            writer.write_table(rows, max_chunksize=max_chunksize)
        return path

    @pytest.fixture
    def folder(self, tmp_path):
        (tmp_path / "day=1").mkdir()
        self.write(tmp_path / "day=1" / "a.arrow", table(20).slice(0, 8))
        self.write(tmp_path / "day=1" / "b.feather", table(20).slice(8, 0))
        lz4 = pa.ipc.IpcWriteOptions(compression="lz4")
        self.write(tmp_path / "day=1" / "c.feather", table(20).slice(8, 5), options=lz4)
        pyarrow.feather.write_feather(table(20).slice(13), str(tmp_path / "d.ipc"))
        (tmp_path / "README.txt").write_text("not data")
        return tmp_path

    @pytest.mark.parametrize(
        "path, n_rows",
        [("", 20), ("d.ipc", 7), ("day=1/*.feather", 5), ("**/a.arrow", 8)],
    )
    def test_a_directory_a_file_and_a_glob_are_paths(self, folder, path, n_rows):
        source = arrow_source(folder / path)
        assert (source.n_rows, source.columns) == (n_rows, ("row", "twice"))
        assert len(rows_of(source)) == n_rows

    def test_reading_starts_at_any_row(self, folder):
        source = arrow_source([folder / "day=1", str(folder / "d.ipc")])
        for start in range(21):
            rest = np.concatenate([np.empty((0, 2)), *source.blocks(0, start)])
            np.testing.assert_array_equal(rest, numbered(20)[start:])
        entries = source.read_starts(np.arange(20))
        assert (entries <= np.arange(20)).all()
        assert sorted(set(entries)) == [0, 3, 6, 8, 11, 13]

    def test_columns_are_chosen_by_name_and_order(self, folder):
        self.write(folder / "e.arrow", table(20).select(["twice", "row"]))
        source = arrow_source(folder, columns=["twice"])
        assert source.n_rows == 40
        assert rows_of(source)[20:, 0].tolist() == list(range(0, 40, 2))
        with pytest.raises(ValueError, match=r"d.ipc: has no column 'up'; its columns are"):
            arrow_source(folder, columns=["up"])

    def test_invalid_values_are_refused_with_their_place(self, folder):
        odd = table(5).set_column(1, "twice", [pa.array([0, 1, 2, 3, None], pa.int32())])
        self.write(folder / "e.arrow", odd)
        with pytest.raises(
            StreamError, match=r"e.arrow: record batch 1: column 'twice' is null in row 1;"
        ):
            rows_of(arrow_source(folder))

    @pytest.mark.parametrize(
        "change, message",
        [
            (lambda path: os.utime(path), "changed since the source was made"),
            (lambda path: path.unlink(), "not a readable Arrow IPC file"),
            (lambda path: os.truncate(path, 300), "not a readable Arrow IPC file"),
            (lambda path: path.write_bytes(b""), "not a readable Arrow IPC file"),
        ],
        ids=["touched", "removed", "truncated", "emptied"],
    )
    def test_files_that_change_are_named(self, folder, change, message):
        source = arrow_source(folder)
        rows_of(source)
        change(folder / "day=1" / "c.feather")
        with pytest.raises(StreamError, match=f"c.feather: {message}"):
            rows_of(source)

    def test_a_file_that_is_truncated_while_it_is_read_is_an_error(self, tmp_path):
        """Through a memory map it would be the end of the process."""
        path = self.write(tmp_path / "a.arrow", table(100_000), max_chunksize=1_000)
        blocks = iter(arrow_source(path))
        next(blocks)
        os.truncate(path, 4_096)
        with pytest.raises(StreamError, match=r"a\.arrow: changed while it was read; make"):
            list(blocks)

    def test_a_file_that_is_rewritten_while_it_is_read_is_an_error(self, tmp_path):
        path = self.write(tmp_path / "a.arrow", table(9))
        blocks = iter(arrow_source(path))
        next(blocks)
        with open(path, "r+b") as file:
            file.write(path.read_bytes())
        os.utime(path)
        with pytest.raises(StreamError, match=r"a\.arrow: changed while it was read; make"):
            list(blocks)

    @pytest.mark.parametrize("scheme", ["memory", "s3"])
    def test_files_that_are_not_local_are_refused(self, tmp_path, scheme):
        path = self.write(tmp_path / "a.arrow", table(9))
        for uri in (f"{scheme}:/{path}", [path, f"{scheme}:/{path}"]):
            with pytest.raises(ValueError, match=rf"'{scheme}://.* is not local; pass a function"):
                arrow_source(uri)
        assert arrow_source(f"file://{path}").n_rows == 9

    def test_what_is_no_arrow_file_is_named(self, folder):
        with pa.ipc.new_stream(folder / "e.arrow", table(3).schema) as writer:
            writer.write_table(table(3))
        with pytest.raises(StreamError, match=r"e.arrow: not a readable .* without footer goes"):
            arrow_source(folder)
        for path, message in (
            (folder / "nowhere", "nowhere' does not exist"),
            (folder / "*.md", "holds no file whose name ends in .arrow or"),
            ([], "names no file"),
            (folder / "day=1" / "b.feather", "b.feather: no rows to stream"),
        ):
            with pytest.raises((ValueError, FileNotFoundError), match=message):
                arrow_source(path)
        with pytest.raises(ValueError, match="n_rows=9 but the files hold 7"):
            arrow_source(folder / "d.ipc", n_rows=9)

    def test_an_abandoned_iteration_leaves_no_open_file(self, folder):
        blocks = iter(arrow_source(folder))
        next(blocks)
        assert any(str(folder) in file for file in open_files())
        blocks.close()
        assert not any(str(folder) in file for file in open_files())

    def test_flipped_bytes_give_rows_or_a_named_error(self, tmp_path):
        """IPC has no checksums, so a flip in the data itself cannot be seen."""
        rng = np.random.default_rng(0)
        path = self.write(
            tmp_path / "a.arrow",
            pa.table({"x": rng.normal(size=50), "n": pa.array([5] * 50).dictionary_encode()}),
            max_chunksize=20,
        )
        content = path.read_bytes()
        for place in rng.integers(0, len(content), 300):
            broken = bytearray(content)
            broken[place] ^= 1 << rng.integers(8)
            path.write_bytes(broken)
            try:
                assert rows_of(arrow_source(path)).shape[1] == 2
            except (StreamError, ValueError) as err:
                assert "a.arrow" in str(err)
