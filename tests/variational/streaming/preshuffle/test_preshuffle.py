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
import datetime
import re

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest

from hypothesis import given, settings

from pymc.variational._streaming.preshuffle import cli, plan
from pymc.variational._streaming.utils import progress_bar
from pymc.variational.streaming import StreamError, StreamWarning, parquet_source, preshuffle
from tests.variational.streaming import strategies
from tests.variational.streaming.preshuffle.preshuffled import (
    cut_small,
    digests,
    every_type,
    numbered,
    rows_in_order,
    shuffle,
)

PAGE = Path(__file__).parents[4] / "docs" / "source" / "streaming" / "preshuffle.md"


@pytest.fixture
def small_tasks(monkeypatch):
    cut_small(monkeypatch.setattr)


def write(folder, table, **options):
    folder.mkdir(exist_ok=True)
    pq.write_table(table, folder / "a.parquet", **options)
    return folder


@settings(max_examples=15)
@given(layout=strategies.layouts)
def test_every_row_comes_out_once_whatever_the_layout(tmp_path_factory, layout):
    folder = tmp_path_factory.mktemp("layout")
    (folder / "in").mkdir()
    n_rows = strategies.write_layout(folder / "in", layout)
    with pytest.MonkeyPatch.context() as patch:
        cut_small(patch.setattr, block=256, files=3)
        report = shuffle(folder / "in", folder / "out")
    table = pq.read_table(folder / "out").sort_by("row")
    assert table.to_pydict() == strategies.table(n_rows).to_pydict()
    assert report.rows == n_rows


@pytest.mark.parametrize("n_rows", [1, 1500], ids=["empty partitions", "full partitions"])
@pytest.mark.usefixtures("small_tasks")
def test_all_types_values_and_metadata_are_kept(tmp_path, n_rows):
    table = every_type(n_rows)
    source = write(tmp_path / "in", table, row_group_size=700)
    expected = pq.read_table(source / "a.parquet")
    report = shuffle(source, tmp_path / "out")
    assert report.piles > 10
    files = sorted((tmp_path / "out").iterdir())
    found = pa.concat_tables([pq.read_table(file) for file in files]).sort_by("row")
    for name in expected.column_names:
        field = expected.schema.field(name)
        if name == "ordered":  # whose indices are int8
            field = field.with_type(pa.dictionary(pa.int32(), pa.string(), ordered=True))
        assert found.schema.field(name).equals(field, check_metadata=True)
        assert found[name].to_pylist() == expected[name].to_pylist(), name
    levels = [chunk.dictionary.to_pylist() for chunk in found["ordered"].chunks]
    assert levels == [["low", "mid", "high", "never"]] * len(levels)
    assert found.schema.metadata[b"origin"] == b"a test"


@pytest.mark.usefixtures("small_tasks")
def test_categories_of_several_files_may_be_more_than_their_types_of_index_can_count(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    frames = [
        pd.DataFrame({"word": pd.Categorical([f"{n}-{i}" for i in range(n)], ordered=True)})
        for n in (100, 101, 200)
    ]
    for frame in frames:
        frame.to_parquet(folder / f"{len(frame)}.parquet")
    shuffle(folder, tmp_path / "out")
    found = pa.concat_tables(map(pq.read_table, sorted((tmp_path / "out").iterdir())))
    assert found.schema.field("word").type == pa.dictionary(pa.int32(), pa.string(), ordered=True)
    words = [word for frame in frames for word in frame["word"].cat.categories]
    assert sorted(found["word"].to_pylist()) == sorted(words)
    assert list(found.to_pandas()["word"].cat.categories) == words


def test_timestamps_without_a_unit_keep_their_values(tmp_path):
    """Those after 2262 have no nanoseconds."""
    day = datetime.datetime(9999, 12, 31)
    table = pa.table({"row": [1], "end": pa.array([day]), "days": pa.array([[day]])})
    source = write(tmp_path / "in", table, use_deprecated_int96_timestamps=True)
    shuffle(source, tmp_path / "out")
    assert pq.read_table(tmp_path / "out").equals(table)


@pytest.mark.usefixtures("small_tasks")
def test_chosen_columns_are_kept_in_the_order_asked_for(tmp_path):
    source = write(tmp_path / "in", every_type(1000))
    shuffle(source, tmp_path / "out", columns=["struct", "row"])
    table = pq.read_table(tmp_path / "out")
    assert table.column_names == ["struct", "row"]
    assert sorted(table["row"].to_pylist()) == list(range(1000))


@pytest.mark.usefixtures("small_tasks")
def test_the_same_call_gives_the_same_bytes_and_another_seed_does_not(tmp_path):
    source = numbered(tmp_path / "in", 20_000)
    for name, seed in {"one": 1, "again": 1, "other": 2}.items():
        shuffle(source, tmp_path / name, seed=seed)
    assert digests(tmp_path / "one") == digests(tmp_path / "again")
    assert rows_in_order(tmp_path / "one") != rows_in_order(tmp_path / "other")


def test_partitions_that_turn_out_too_large_are_scattered_again(tmp_path, monkeypatch):
    """A sample of the first rows of a row group says nothing of how wide the others are."""
    cut_small(monkeypatch.setattr, block=1 << 12)
    widths = np.r_[np.ones(2000, int), np.full(2000, 200)]
    table = pa.table({"row": np.arange(4000), "text": ["x" * int(w) for w in widths]})
    source = write(tmp_path / "in", table, row_group_size=4000)
    report = shuffle(source, tmp_path / "out")
    assert table.nbytes / report.piles > 4 * (1 << 12)
    assert pq.read_table(tmp_path / "out").sort_by("row").equals(table)
    assert rows_in_order(tmp_path / "out") != list(range(4000))


def test_rows_wider_than_a_task_are_shuffled_one_by_one(tmp_path, monkeypatch):
    cut_small(monkeypatch.setattr, block=1 << 10)
    monkeypatch.setattr(
        "pymc.variational._streaming.preshuffle.plan._share", lambda *_: (1, 1 << 10)
    )
    table = pa.table({"row": range(50), "blob": [b"x" * 5000] * 50})
    shuffle(write(tmp_path / "in", table), tmp_path / "out")
    assert sorted(rows_in_order(tmp_path / "out")) == list(range(50))


def test_files_hold_several_partitions_and_do_not_change_the_order(tmp_path, monkeypatch):
    source = numbered(tmp_path / "in", 5000, n_files=3)
    for files, expected in ((16, 16), (4, 4), (3, 3), (1, 1)):
        cut_small(monkeypatch.setattr, files=files)
        report = shuffle(source, tmp_path / f"{files}")
        assert report.piles == 16
        assert len(list((tmp_path / f"{files}").glob("*.parquet"))) == expected
        assert rows_in_order(tmp_path / f"{files}") == rows_in_order(tmp_path / "16")


def test_row_groups_of_a_partition_are_even(tmp_path, monkeypatch):
    """A short last one would cost a reader as many calls as a long one."""
    cut_small(monkeypatch.setattr, tasks=1, block=1 << 20)
    source = numbered(tmp_path / "in", 1000)
    for limit, expected in ((1000, [1000]), (400, [334, 333, 333]), (1001, [1000])):
        monkeypatch.setattr(plan, "_ROW_GROUP_BYTES", 17 * limit)
        shuffle(source, tmp_path / "out", overwrite=True)
        (file,) = (tmp_path / "out").glob("*.parquet")
        metadata = pq.read_metadata(file)
        groups = [metadata.row_group(g).num_rows for g in range(metadata.num_row_groups)]
        assert groups == expected


def test_the_mark_says_what_was_shuffled(tmp_path, monkeypatch):
    cut_small(monkeypatch.setattr, files=4)
    source = numbered(tmp_path / "in", 5000, n_files=3)
    report = shuffle(source, tmp_path / "out", seed=7)
    mark = parquet_source(tmp_path / "out").mark
    assert (mark.seed, mark.n_rows, mark.source) == (7, 5000, str(source))
    assert mark.n_files == len(list((tmp_path / "out").iterdir())) == 4 < report.piles
    shuffle(tmp_path / "out", tmp_path / "again", seed=8)
    assert parquet_source(tmp_path / "again").mark.seed == 8


@pytest.mark.usefixtures("small_tasks")
def test_a_rewritten_file_is_not_marked(tmp_path):
    """Libraries copy metadata along with rows that they sort, filter or join."""
    shuffle(numbered(tmp_path / "in", 5000), tmp_path / "out")
    for file in (tmp_path / "out").iterdir():
        pq.write_table(pq.read_table(file).sort_by("row"), file)
    assert parquet_source(tmp_path / "out").mark is None


@pytest.mark.usefixtures("small_tasks")
def test_mixed_missing_doubled_and_unmarked_files_are_noticed(tmp_path):
    source = numbered(tmp_path / "in", 5000)
    for seed in (1, 2):
        shuffle(source, tmp_path / str(seed), seed=seed)
    one, two = (sorted((tmp_path / str(seed)).iterdir()) for seed in (1, 2))
    (tmp_path / "copy.parquet").write_bytes(one[0].read_bytes())
    for paths, message in (
        ([*one, *two], r"two shuffles \(seeds 2 and 1\), or to two parts"),
        (one[1:], f"1 of the {len(one)} files of its shuffle are missing"),
        ([*one, tmp_path / "copy.parquet"], "are the same file of a shuffle; remove one"),
        ([source / "0.parquet", *one], r"0.parquet: not shuffled with .*; preshuffle all rows"),
    ):
        with pytest.raises(StreamError, match=message):
            parquet_source(paths)


@pytest.mark.usefixtures("small_tasks")
def test_files_of_one_shuffle_that_are_missing_or_there_twice_are_not_shuffled_again(tmp_path):
    """Their rows would be lost, or used twice, and the mark of the result would hide that."""
    source = numbered(tmp_path / "in", 5000)
    for seed in (1, 2):
        shuffle(source, tmp_path / str(seed), seed=seed)
    files = sorted((tmp_path / "1").iterdir())
    (tmp_path / "copy.parquet").write_bytes(files[0].read_bytes())
    for paths, message in (
        (files[1:], "1 of the .* are missing; pass all of them, or partial=True to a source"),
        ([*files, tmp_path / "copy.parquet"], "are the same file of a shuffle; remove one"),
    ):
        with pytest.raises(StreamError, match=message):
            shuffle(paths, tmp_path / "out")
    part = parquet_source(files[1:], partial=True)
    assert shuffle(part, tmp_path / "part").rows == part.n_rows
    more = numbered(tmp_path / "more", 100)
    report = shuffle([tmp_path / "1", tmp_path / "2", more], tmp_path / "all")
    assert report.rows == 5000 + 5000 + 100


def test_a_copy_of_a_file_is_warned_of(tmp_path):
    source = numbered(tmp_path / "in", 100)
    (source / "copy.parquet").write_bytes((source / "0.parquet").read_bytes())
    with pytest.warns(StreamWarning, match=r"copy\.parquet looks like a copy of .*0\.parquet"):
        shuffle(source, tmp_path / "out")


@pytest.mark.usefixtures("small_tasks")
def test_pages_carry_checksums_that_are_verified(tmp_path):
    shuffle(numbered(tmp_path / "in", 5000), tmp_path / "out")
    file = min((tmp_path / "out").iterdir())
    data = bytearray(file.read_bytes())
    data[200] ^= 1
    file.write_bytes(data)
    with pytest.raises(OSError, match="CRC checksum"):
        pq.read_table(file, page_checksum_verification=True)


def test_the_report_is_short_and_right(tmp_path):
    report = shuffle(numbered(tmp_path / "in", 1000), tmp_path / "out")
    assert report.piles == 1
    assert report.bytes_written > sum(p.stat().st_size for p in (tmp_path / "out").iterdir())
    assert re.fullmatch(
        r".*/out: 1,000 rows shuffled in 1 partitions, 0.00 GB read, 0.00 GB written, "
        r"\d+\.\d s \([\d,]+ rows/s\), peak memory \d\.\d\d GB",
        str(report),
    )


@pytest.mark.parametrize(
    "options, message",
    [
        ({"seed": -1}, "seed=-1 must be a non-negative integer"),
        ({"seed": True}, "seed=True must be a non-negative integer"),
        ({"memory_limit": "much"}, "memory_limit='much' is not a size; pass bytes or a string"),
        ({"memory_limit": "1MB"}, r"memory_limit=1000000 is too small .*pass at least .*'\d+MB'"),
        ({"memory_limit": "1 MiB"}, "memory_limit=1048576 is too small"),
        ({"memory_limit": "1.5k"}, "memory_limit=1500 is too small"),
        ({"memory_limit": np.int64(7)}, "memory_limit=7 is too small"),
        ({"columns": ["rows"]}, r"has no column 'rows'; its columns are \['row', 'twice'\]"),
        ({"columns": ["row", "row"]}, "names a column twice"),
        ({"scratch": "s3://bucket/scratch"}, "scratch is a URI; pass a directory"),
        ({"compression": "zip"}, "compression='zip' is not available"),
        ({"columns": "row"}, "columns='row' is a string; pass a list of names"),
        ({"split": {"a": 0.5, "b": 0.4}}, "adds up to 0.9; pass fractions that add up to 1"),
        ({"split": {"a": 1.0, "b": 0.0}}, "'b' must be more than 0"),
        ({"split": {"a/b": 1.0}}, "'a/b' is not a name for a folder"),
        ({"split": {"_a": 1.0}}, "'_a' is not a name for a folder"),
        ({"split": {0: 0.5, 1: 0.5}}, "0 is not a name for a folder"),
        ({"split": {"a": 0.999, "b": 0.001}}, "leaves 'b' without rows, of 100"),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(value),
)
def test_wrong_arguments_are_refused_and_leave_nothing(tmp_path, options, message):
    source = numbered(tmp_path / "in", 100)
    with pytest.raises((TypeError, ValueError), match=message):
        shuffle(source, tmp_path / "out", **options)
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_no_row_is_lost_to_fractions_with_few_digits():
    split = dict.fromkeys("abc", 0.3333333333)
    parts = plan.cut_parts([10**10], split, row_bytes=1.0)
    assert sum(part.n_rows for part in parts) == 10**10


def test_the_smallest_limit_that_the_message_names_is_enough(tmp_path):
    source = numbered(tmp_path / "in", 100)
    with pytest.raises(ValueError) as caught:
        shuffle(source, tmp_path / "out", memory_limit=1)
    enough = re.search(r"memory_limit='(\d+MB)'", str(caught.value))[1]
    assert shuffle(source, tmp_path / "out", memory_limit=enough).rows == 100


def test_a_source_without_rows_is_refused(tmp_path):
    source = write(tmp_path / "in", pa.table({"x": pa.array([], "f8")}))
    with pytest.raises(ValueError, match="holds no rows; there is nothing to shuffle"):
        shuffle(source, tmp_path / "out")


def test_files_that_differ_in_columns_are_refused(tmp_path):
    source = write(tmp_path / "in", pa.table({"x": [1]}))
    pq.write_table(pa.table({"y": [1]}), source / "b.parquet")
    with pytest.raises(ValueError, match=r"b.parquet: has columns \['y'\] where .* has \['x'\]"):
        shuffle(source, tmp_path / "out")
    pq.write_table(pa.table({"x": ["a"]}), source / "b.parquet")
    with pytest.raises(ValueError, match=r"b.parquet: its columns differ from those of"):
        shuffle(source, tmp_path / "out")


@pytest.mark.usefixtures("small_tasks")
def test_nulls_among_lists_of_fixed_size_are_kept(tmp_path):
    lists = pa.array([[1, 2], None, [3, None]] * 500, pa.list_(pa.int8(), 2))
    table = pa.table({"row": range(1500), "pair": lists})
    try:
        source = write(tmp_path / "in", table)
    except pa.ArrowNotImplementedError as err:
        pytest.skip(f"pyarrow {pa.__version__}: {err}")
    shuffle(source, tmp_path / "out")
    assert pq.read_table(tmp_path / "out").sort_by("row").to_pydict() == table.to_pydict()


@pytest.mark.skipif(not hasattr(pa, "uuid"), reason="pyarrow 18")
def test_extension_types_inside_of_others(tmp_path):
    stored = pa.array([bytes([i] * 16) for i in range(100)], pa.binary(16))
    ids = pa.ExtensionArray.from_storage(pa.uuid(), stored)
    nested = pa.StructArray.from_arrays([ids], names=["id"])
    table = pa.table({"row": range(100), "nested": nested})
    shuffle(write(tmp_path / "in", table), tmp_path / "out")
    found = pq.read_table(tmp_path / "out").sort_by("row")
    assert found.to_pydict() == pq.read_table(tmp_path / "in").to_pydict()


def test_columns_that_only_folders_name_are_not_lost(tmp_path):
    (tmp_path / "in").mkdir()
    for day in (1, 2):
        write(tmp_path / "in" / f"day={day}", pa.table({"row": [day, 10 * day]}))
    lost = r"the values of \['day'\] are only in the names of folders; pass pyarrow.dataset"
    with pytest.raises(ValueError, match=lost):
        shuffle(tmp_path / "in", tmp_path / "out")
    with pytest.raises(ValueError, match="the values of 'day' are only in the names of folders"):
        parquet_source(tmp_path / "in", columns=["row", "day"])
    reader = pa.dataset.dataset(tmp_path / "in", partitioning="hive").scanner().to_reader()
    shuffle(reader, tmp_path / "whole")
    assert set(parquet_source(tmp_path / "whole").columns) == {"row", "day"}
    shuffle(tmp_path / "in", tmp_path / "out", columns=["row"])
    shuffle(tmp_path / "in" / "day=1", tmp_path / "one")
    assert rows_in_order(tmp_path / "one") in ([1, 10], [10, 1])


def test_a_column_that_is_there_twice_is_named(tmp_path):
    twice = pa.Table.from_arrays([pa.array([1, 2])] * 2, names=["row", "row"])
    with pytest.raises(ValueError, match="has more than one column 'row'"):
        shuffle(write(tmp_path / "in", twice), tmp_path / "out", columns=["row"])


def test_an_interrupt_of_the_command_is_one_line(monkeypatch, capsys):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "preshuffle", interrupted)
    assert cli.main(["preshuffle", "in", "out", "--seed", "0"]) == 130
    assert capsys.readouterr().err == ("interrupted; nothing unfinished was published\n")


def test_files_globs_and_lists_are_sources(tmp_path):
    source = numbered(tmp_path / "in", 100, n_files=4)
    for number, chosen in enumerate([f"{source}/[01].parquet", [source / "0.parquet"]]):
        shuffle(chosen, tmp_path / str(number))
    assert sorted(rows_in_order(tmp_path / "0")) == list(range(50))
    assert sorted(rows_in_order(tmp_path / "1")) == list(range(25))


def test_the_command_line_does_the_same(tmp_path, capsys):
    source = numbered(tmp_path / "in", 1000)
    shuffle(source, tmp_path / "one", seed=3)
    arguments = ["preshuffle", str(source), str(tmp_path / "two"), "--seed", "3", "--quiet"]
    assert cli.main(arguments) == 0
    assert "1,000 rows shuffled" in capsys.readouterr().out
    assert digests(tmp_path / "one") == digests(tmp_path / "two")
    assert cli.main(arguments) == 1
    assert "exists and is not empty; pass overwrite=True" in capsys.readouterr().err


def test_the_code_of_the_page_runs(tmp_path, monkeypatch, capsys):
    write(tmp_path / "raw", pa.table({"distance": np.arange(1000.0)}))
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    for code in blocks:
        if "distributed" not in code:
            exec(compile(code, PAGE.name, "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    assert "0 raw/" in lines
    assert "900 100" in lines
    assert "('distance',)" in lines
    assert any(line.startswith("499.5 288.8") for line in lines)
    command = re.search(r"\$ python -m pymc.variational.streaming (.*)", PAGE.read_text())[1]
    assert cli.main([*command.split(), "--overwrite"]) == 0


def test_the_progress_bar_shows_rows_per_second(tmp_path, capsys):
    preshuffle(numbered(tmp_path / "in", 1000), tmp_path / "out", seed=0)
    shown = capsys.readouterr().err
    assert "100%" in shown
    assert "rows/s" in shown


def test_a_progress_bar_keeps_to_a_line_and_gives_no_share_of_an_unknown_number(capsys):
    for description, total in [("Finding levels of carrier, origin", 3e12), ("Polishing", None)]:
        with progress_bar(description, total) as advance:
            for _ in range(3):
                advance(1e12)
    known, unknown = capsys.readouterr().err.splitlines()
    assert re.search(r"100% +[\d,]{10,} rows/s", known)
    assert "%" not in unknown


@pytest.mark.parametrize("split", ["train", "train=most"])
def test_a_split_that_cannot_be_read_is_named_by_its_option(split, capsys):
    with pytest.raises(SystemExit):
        cli.main(["preshuffle", "in", "out", "--seed", "0", "--split", split])
    assert f"argument --split: invalid split value: '{split}'" in capsys.readouterr().err
