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
"""Which files a path stands for, and which folders are no plain folders of files."""

import glob
import ntpath
import os
import shutil
import zipfile

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
import pytest

from pymc.variational._streaming.sources.parquet import paths, remote
from pymc.variational.streaming import (
    StreamError,
    StreamWarning,
    arrow_source,
    parquet_source,
    preshuffle,
)
from tests.variational.streaming.strategies import numbered, rows_of, table, write_layout


class TestPaths:
    @pytest.fixture
    def folder(self, tmp_path):
        (tmp_path / "day=1").mkdir()
        (tmp_path / "day=2").mkdir()
        pq.write_table(table(9).slice(0, 4), tmp_path / "day=1" / "a.parquet")
        pq.write_table(table(9).slice(4, 2), tmp_path / "day=1" / "b.parquet")
        pq.write_table(table(9).slice(6), tmp_path / "day=2" / "a.parquet")
        (tmp_path / "_temporary.parquet").write_bytes(b"not Parquet")
        (tmp_path / "day=2" / ".hidden.parquet").write_bytes(b"not Parquet")
        (tmp_path / "README.txt").write_text("not data")
        return tmp_path

    @pytest.mark.parametrize(
        "path, n_rows",
        [
            ("", 9),
            ("day=1/b.parquet", 2),
            ("day=*", 9),
            ("day=1/*.parquet", 6),
            ("**/a.parquet", 7),
            ("day=[2-9]/?.parquet", 3),
            ("d*", 9),
            ("**/*.parquet", 9),
        ],
    )
    def test_a_directory_a_file_and_a_glob_are_paths(self, folder, path, n_rows):
        assert parquet_source(folder / path).n_rows == n_rows
        assert parquet_source(str(folder / path)).n_rows == n_rows

    def test_files_come_in_order_of_name_and_a_list_in_its_own(self, folder):
        np.testing.assert_array_equal(rows_of(parquet_source(folder)), numbered(9))
        listed = parquet_source([folder / "day=2", folder / "day=1" / "a.parquet"])
        assert rows_of(listed)[:, 0].tolist() == [6, 7, 8, 0, 1, 2, 3]

    def test_uris_and_filesystems_lead_to_the_same_rows(self, folder):
        local = pa.fs.LocalFileSystem()
        root, name = os.path.split(folder)
        for source in (
            parquet_source(folder.as_uri()),
            parquet_source(folder, filesystem=local),
            parquet_source(name, filesystem=pa.fs.SubTreeFileSystem(root, local)),
        ):
            np.testing.assert_array_equal(rows_of(source), numbered(9))

    def test_fsspec_filesystems_and_uris_lead_to_the_same_rows(self, folder):
        fsspec = pytest.importorskip("fsspec")
        memory = fsspec.filesystem("memory")
        memory.pipe("/streaming/a.parquet", (folder / "day=1" / "a.parquet").read_bytes())
        for source in (
            parquet_source("/streaming", filesystem=memory),
            parquet_source("memory://streaming/a.parquet"),
        ):
            np.testing.assert_array_equal(rows_of(source), numbered(4))

    def test_what_a_filesystem_does_not_know_is_asked_once(self, folder, monkeypatch):
        waits = []
        monkeypatch.setattr(remote.time, "sleep", waits.append)
        with zipfile.ZipFile(folder / "a.zip", "w") as archive:
            archive.write(folder / "day=1" / "a.parquet", "a.parquet")
        zipped = pytest.importorskip("fsspec").filesystem("zip", fo=str(folder / "a.zip"))
        np.testing.assert_array_equal(
            rows_of(parquet_source("a.parquet", filesystem=zipped)), numbered(4)
        )
        assert not waits

    @pytest.mark.parametrize("path", ["b/in", "b/in/*.parquet", "/b/i?/*", "memory://b/in/**/a*"])
    def test_a_filesystem_knows_a_path_by_any_spelling(self, path):
        memory = pytest.importorskip("fsspec").filesystem("memory")
        with memory.open("/b/in/a.parquet", "wb") as file:
            pq.write_table(table(5), file)
        assert parquet_source(path, filesystem=memory).n_rows == 5

    def test_relative_paths_stay_where_they_were(self, folder, monkeypatch):
        monkeypatch.chdir(folder)
        local = parquet_source("day=1", filesystem=pa.fs.LocalFileSystem())
        monkeypatch.chdir("day=2")
        np.testing.assert_array_equal(rows_of(local), numbered(6))

    def test_hidden_files_are_data_where_they_are_spelled_out(self, folder):
        write_layout(folder / "day=1", [[1, 2]])
        for hidden in ("_old", ".tmp"):
            (folder / hidden).mkdir()
            write_layout(folder / hidden, [[100]])
            assert parquet_source(folder / hidden).n_rows == 100
            assert parquet_source(folder / f"{hidden[:2]}*" / "*.parquet").n_rows == 100
        assert parquet_source(folder / "**" / "*.parquet").n_rows == 12
        assert parquet_source(folder / "*" / "*").n_rows == 12

    def test_folders_may_be_called_like_files(self, tmp_path):
        (tmp_path / "in[1]" / "a.parquet").mkdir(parents=True)
        write_layout(tmp_path / "in[1]" / "a.parquet", [[3], [4]])
        assert parquet_source(tmp_path / "in[1]").n_rows == 7
        assert parquet_source(tmp_path / "i*").n_rows == 7

    def test_files_that_come_twice_are_refused(self, folder):
        with pytest.raises(ValueError, match=r"names .*b.parquet more than once"):
            parquet_source([folder / "day=1", folder / "day=1" / "b.parquet"])
        (folder / "day=2" / "again.parquet").symlink_to(folder / "day=1" / "a.parquet")
        with pytest.raises(ValueError, match=r"names .*a.parquet more than once, as .*again"):
            parquet_source(folder)

    def test_links_that_lead_up_or_nowhere_are_noticed(self, folder):
        (folder / "day=1" / "up").symlink_to("..")
        with pytest.raises(ValueError, match=r"more than once, as .*up/day=1"):
            parquet_source(folder)
        (folder / "day=1" / "up").unlink()
        (folder / "day=2" / "gone.parquet").symlink_to("nowhere")
        with pytest.raises(StreamError, match=r"gone\.parquet: not a readable Parquet file"):
            parquet_source(folder)

    def test_folders_that_cannot_be_read_are_no_empty_ones(self, folder, monkeypatch):
        scandir = os.scandir

        def refuse(path):
            if str(path).endswith("day=2"):
                raise PermissionError(13, "Permission denied", path)
            return scandir(path)

        monkeypatch.setattr(os, "scandir", refuse)
        with pytest.raises(PermissionError, match="day=2"):
            parquet_source(folder)

    def test_a_folder_of_another_format_names_its_reader(self, folder):
        parquet, arrow = folder / "day=1", folder / "rows"
        preshuffle(parquet, arrow, seed=0, format="arrow", progressbar=False)
        with pytest.raises(ValueError, match="but Arrow IPC files; pass it to arrow_source"):
            parquet_source(arrow)
        with pytest.raises(ValueError, match="but Parquet files; pass it to parquet_source"):
            arrow_source(parquet)
        with pytest.raises(ValueError, match="has the name of Arrow IPC; pass it to arrow_source"):
            parquet_source(sorted(arrow.iterdir()))
        with pytest.raises(ValueError, match="has the name of Parquet; pass it to parquet_source"):
            arrow_source(parquet / "a.parquet")
        assert arrow_source(arrow).n_rows == parquet_source(parquet).n_rows

    def test_missing_paths_and_empty_directories_are_named(self, folder):
        with pytest.raises(FileNotFoundError, match=r"path='.*nowhere' does not exist"):
            parquet_source(folder / "nowhere")
        (folder / "empty").mkdir()
        with pytest.raises(ValueError, match=r"path='.*empty' holds no file whose .* in \.parquet"):
            parquet_source(folder / "empty")
        with pytest.raises(ValueError, match=r"path='.*\*\.csv' holds no file"):
            parquet_source(folder / "*.csv")
        for wrong in (None, b"a.parquet", pd.DataFrame({0: [1]}), [3]):
            with pytest.raises(TypeError, match=f"path={type(wrong).__name__} is no path; pass"):
                parquet_source(wrong)
        with pytest.raises(ValueError, match=r"path=\[\] names no file"):
            parquet_source([])


LOGS = {
    "Delta": "_delta_log/00000000000000000000.json",
    "Iceberg": "metadata/00000-0a1b.metadata.json",
    "Hudi": ".hoodie/hoodie.properties",
    "Spark stream": "_spark_metadata/0",
}


class TestTables:
    """Only the log of such a table says which of its files hold rows that count."""

    @pytest.fixture(params=LOGS)
    def root(self, request, tmp_path):
        root = tmp_path / "lake" / "ticks"
        for part in ("data/day=1", "data/day=2"):
            (root / part).mkdir(parents=True)
            write_layout(root / part, [[3]])
        write_layout(root, [[4]])
        log = root / LOGS[request.param]
        log.parent.mkdir()
        log.write_text("{}")
        return root

    @pytest.mark.parametrize("path", ["", "data", "data/day=2", "*.parquet", "**/*.parquet", "d*"])
    def test_their_folders_are_refused_with_the_reader_to_use(self, root, path):
        message = r"ticks: is (a|an|the) .*; read it with arrow_source\(lambda: "
        with pytest.raises(ValueError, match=message):
            parquet_source(root / path)
        with pytest.raises(ValueError, match=message):
            preshuffle(root / path, root.parent / "out", seed=0)

    def test_the_reader_to_use_is_one_that_a_source_takes(self, root):
        """A stand-in for the libraries has any attribute, and gives itself when it is called."""

        class Library:
            __getattr__ = __call__ = lambda self, *_: self

        def source_of(read):
            assert isinstance(read(), Library)
            return arrow_source(lambda: pa.table({"x": [1.0, 2.0]}))

        with pytest.raises(ValueError) as caught:
            parquet_source(root)
        advice = str(caught.value).partition("read it with ")[2]
        libraries = dict.fromkeys(["deltalake", "hudi", "spark", "catalog"], Library())
        source = eval(advice, {"arrow_source": source_of, "name": "ticks", **libraries})
        assert np.concatenate(list(source.blocks())).ravel().tolist() == [1.0, 2.0]

    def test_they_are_found_on_object_stores_and_from_above(self, root):
        with pytest.raises(ValueError, match=r"ticks: is .*arrow_source"):
            parquet_source(root.parent)
        memory = pytest.importorskip("fsspec").filesystem("memory")
        for file in root.rglob("*"):
            if file.is_file():
                memory.pipe(f"/{root.parent.name}/{file.relative_to(root)}", file.read_bytes())
        with pytest.raises(ValueError, match=r": is .*arrow_source"):
            parquet_source(f"/{root.parent.name}", filesystem=memory)

    def test_files_that_are_listed_are_read(self, root):
        """A library that knows the table gives the names of the files that count."""
        assert parquet_source([root / "000.parquet"]).n_rows == 4

    def test_leftovers_of_spark_and_hive_and_other_metadata_are_no_tables(self, tmp_path):
        for day in (1, 2):
            (tmp_path / f"day={day}").mkdir()
            write_layout(tmp_path / f"day={day}", [[3, day]])
        for name in ("_SUCCESS", "_metadata", "._SUCCESS.crc", ".000.parquet.crc", "README.md"):
            (tmp_path / name).write_text("")
        for name in ("_temporary/0", "metadata", "schema"):
            (tmp_path / name).mkdir(parents=True)
        (tmp_path / "metadata" / "columns.json").write_text("{}")
        assert parquet_source(tmp_path).n_rows == 9


class TestLookAlikes:
    def write(self, folder, *names):
        for i, name in enumerate(names):
            rows = pa.table({"x": np.arange(i, 10.0 + i)})
            pq.write_table(rows, folder / name, compression="none")

    @pytest.mark.parametrize(
        "name", ["b.PARQUET", "b.pq", "b.parq", "b.parquet.gz", "000001_0", "b.parquet.bak"]
    )
    def test_files_that_are_left_out_are_named(self, tmp_path, name):
        self.write(tmp_path, "a.parquet", name)
        (tmp_path / "notes.txt").write_text("not data")
        with pytest.warns(StreamWarning, match=f"leaves out {name}, which may be Parquet too"):
            assert parquet_source(tmp_path).n_rows == 10
        assert parquet_source([tmp_path / "a.parquet", tmp_path / name]).n_rows == 20
        assert parquet_source(tmp_path / "*.parquet").n_rows == 10

    @pytest.mark.parametrize("names", [["000000_0", "000001_0"], ["A.PARQUET"], ["a.pq"]])
    def test_a_folder_of_them_alone_is_refused_by_name(self, tmp_path, names):
        self.write(tmp_path, *names)
        with pytest.raises(ValueError, match=rf"in \.parquet, but {names[0]}.*; pass a list"):
            parquet_source(tmp_path)
        assert parquet_source([tmp_path / name for name in names]).n_rows == 10 * len(names)

    def test_many_are_counted(self, tmp_path):
        self.write(tmp_path, "a.parquet", *(f"{i}.pq" for i in range(9)))
        with pytest.warns(StreamWarning, match=r"leaves out 0.pq, 1.pq, 2.pq, 6 more, which"):
            parquet_source(tmp_path)

    def test_arrow_files_are_named_too(self, tmp_path):
        self.write(tmp_path, "a.parquet")
        for name in ("a.arrow", "b.ARROW"):
            with pa.ipc.new_file(tmp_path / name, table(3).schema) as writer:
                writer.write_table(table(3))
        with pytest.warns(StreamWarning, match=r"leaves out b.ARROW, which may be Arrow IPC too"):
            arrow_source(tmp_path)

    def test_a_copy_of_a_file_is_named(self, tmp_path):
        self.write(tmp_path, "a.parquet", "b.parquet")
        parquet_source(tmp_path)
        shutil.copy(tmp_path / "a.parquet", tmp_path / "c.parquet")
        with pytest.warns(StreamWarning, match=r"c\.parquet looks like a copy of .*a\.parquet"):
            parquet_source(tmp_path)
        (tmp_path / "c.parquet").unlink()
        parquet_source(tmp_path)

    def test_other_rows_under_an_equal_footer_are_no_copy(self, tmp_path):
        for i in range(3):
            values = pa.table({"x": np.arange(i, 10.0 + i)})
            options = {"write_statistics": False, "compression": "none", "use_dictionary": False}
            pq.write_table(values, tmp_path / f"{i}.parquet", **options)
        assert parquet_source(tmp_path).n_rows == 30


class TestPathsOfWindows:
    """The rules of Windows for names, applied here; only the file system is missing."""

    @pytest.mark.parametrize(
        "path, expected",
        [
            ("C:\\data\\*.parquet", "C:/data/*.parquet"),
            ("C:/data/day=1/", "C:/data/day=1"),
            ("C:\\", "C:/"),
            ("\\\\server\\share\\a\\..\\b", "//server/share/b"),
        ],
    )
    def test_they_are_spelled_with_slashes(self, path, expected):
        assert paths.local_path(path, ntpath) == expected

    @pytest.mark.parametrize("path", ["C:\\data", "C://data", "d:/x"])
    def test_a_drive_is_no_scheme(self, path):
        filesystem, _ = paths.resolve(path)
        assert isinstance(filesystem, pa.fs.LocalFileSystem)

    @pytest.mark.parametrize(
        "pattern, fixed, file",
        [
            ("C:/*.parquet", "C:/", "C:/a.parquet"),
            ("C:/data/d*/a?.parquet", "C:/data/", "C:/data/day=1/a1.parquet"),
            ("//server/share/**/*.parquet", "//server/share/", "//server/share/x/y/a.parquet"),
            (glob.escape("C:/in[1]"), "C:/", "C:/in[1]/x/a.parquet"),
        ],
    )
    def test_globs_match_below_drives_and_shares(self, pattern, fixed, file):
        assert paths.fixed_folder(pattern) == fixed
        folder, _, name = file.rpartition("/")
        parts = paths._parts(pattern)
        assert paths._selects(parts, file, (".parquet",))
        assert not paths._selects(parts, f"{folder}/_{name}", (".parquet",))

    def test_a_backslash_is_part_of_a_name_elsewhere(self):
        assert paths.local_path("/data/a\\b", os.path) == "/data/a\\b"
