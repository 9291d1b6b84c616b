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
"""Which destinations a shuffle takes, and that it leaves the others as they are."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pymc.variational.streaming import parquet_source
from tests.variational.streaming.preshuffle.preshuffled import (
    digests,
    numbered,
    rows_in_order,
    shuffle,
)


@pytest.mark.parametrize("inside", ["in", "in/below", "."])
def test_a_destination_that_overlaps_the_source_is_refused(tmp_path, inside):
    source = numbered(tmp_path / "in", 100)
    with pytest.raises(ValueError, match=r"overlaps with source=.*; write to a directory outside"):
        shuffle(source, tmp_path / inside, overwrite=True)


def test_a_glob_that_would_find_the_parts_of_a_split_is_refused(tmp_path):
    """The next shuffle of it would use every row twice."""
    (tmp_path / "data" / "a").mkdir(parents=True)
    numbered(tmp_path / "data" / "a" / "b", 100)
    options = {"split": {"train": 0.5, "valid": 0.5}}
    with pytest.raises(ValueError, match=r"overlaps with source=.*; write to a directory outside"):
        shuffle(tmp_path / "data" / "*" / "*" / "*.parquet", tmp_path / "data" / "out", **options)


@pytest.mark.parametrize(
    "source, destination",
    [
        ("/b/in", "b/in"),
        ("b/in", "/b/in/below"),
        ("memory://b/in", "b/in"),
        ("b/in/*.parquet", "memory://b/in"),
        ("b/*", "b/out"),
        ("b/**/*.parquet", "b/out"),
    ],
)
def test_no_spelling_hides_that_places_overlap(source, destination):
    memory = pytest.importorskip("fsspec").filesystem("memory")
    with memory.open("/b/in/a.parquet", "wb") as file:
        pq.write_table(pa.table({"row": range(100)}), file)
    with pytest.raises(ValueError, match="overlaps with source="):
        shuffle(source, destination, filesystem=memory, overwrite=True)
    assert pq.read_metadata(memory.open("/b/in/a.parquet")).num_rows == 100


def test_a_shuffle_on_a_store_takes_the_place_of_another_or_of_itself():
    memory = pytest.importorskip("fsspec").filesystem("memory")
    with memory.open("/c/in/a.parquet", "wb") as file:
        pq.write_table(pa.table({"row": range(100)}), file)
    for seed in (0, 0, 1):
        shuffle("c/in", "c/out", seed=seed, filesystem=memory, overwrite=True)
        found = parquet_source("c/out", filesystem=memory)
        assert (found.n_rows, found.mark.seed) == (100, seed)


def test_destinations_that_cannot_be_replaced_are_refused(tmp_path, monkeypatch):
    source = numbered(tmp_path / "in", 100)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(NotADirectoryError, match=r"file' is a file; pass a directory"):
        shuffle(source, tmp_path / "file", overwrite=True)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    message = r"here' is a mount point or the current directory.*; pass a directory inside it"
    with pytest.raises(ValueError, match=message):
        shuffle(source, ".")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("os.path.ismount", lambda path: str(path).endswith("here"))
    with pytest.raises(ValueError, match=message):
        shuffle(source, tmp_path / "here")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "here", "in"]


def test_a_destination_that_is_a_link_is_followed(tmp_path):
    source = numbered(tmp_path / "in", 100)
    (tmp_path / "large" / "disk").mkdir(parents=True)
    (tmp_path / "out").symlink_to(tmp_path / "large" / "disk")
    shuffle(source, tmp_path / "out")
    assert (tmp_path / "out").is_symlink()
    assert sorted(rows_in_order(tmp_path / "large" / "disk")) == list(range(100))


def test_what_is_at_the_destination_is_replaced_only_if_asked(tmp_path):
    source = numbered(tmp_path / "in", 100)
    shuffle(source, tmp_path / "out", seed=1)
    before = digests(tmp_path / "out")
    with pytest.raises(FileExistsError, match="exists and is not empty; pass overwrite=True"):
        shuffle(source, tmp_path / "out", seed=2)
    assert digests(tmp_path / "out") == before
    shuffle(source, tmp_path / "out", seed=2, overwrite=True)
    assert parquet_source(tmp_path / "out").mark.seed == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]
