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
"""What a shuffle leaves behind when something goes wrong: nothing, and the next run works."""

import errno
import os
import stat
import subprocess
import sys

from concurrent.futures import CancelledError, ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
import pytest

from pymc.variational._streaming.preshuffle import passes, write
from pymc.variational.streaming import StreamError, parquet_source, preshuffle
from tests.variational.streaming.preshuffle.preshuffled import (
    Inline,
    cut_small,
    digests,
    rows_in_order,
)

ROOT = Path(__file__).parents[4]
N_ROWS = 20_000

local = pa.fs.LocalFileSystem()
remote = pa.fs.SubTreeFileSystem("/", local)
"""A filesystem that is not known to rename folders, as object stores do not."""
KINDS = pytest.mark.parametrize("filesystem", [local, remote], ids=["local", "remote"])


@pytest.fixture
def source(tmp_path, monkeypatch):
    cut_small(monkeypatch.setattr)
    folder = tmp_path / "in"
    folder.mkdir()
    for number, rows in enumerate(np.split(np.arange(N_ROWS), 4)):
        pq.write_table(pa.table({"row": rows}), folder / f"{number}.parquet", row_group_size=1250)
    return folder


@pytest.fixture
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("scratch")


def shuffle(source, **options):
    return preshuffle(
        source, source.parent / "out", **({"seed": 0, "progressbar": False} | options)
    )


def fail_at(task, error):
    def fail(number):
        if number == task:
            raise error

    return Inline(fail)


def at(task, action):
    """Return an executor that calls *action* before a task; from 16 on they are of the 2nd pass."""
    return Inline(lambda number: action() if number == task else None)


def require_whole(root, names=("in", "out")):
    assert sorted(rows_in_order(root / "out")) == list(range(N_ROWS))
    assert sorted(os.listdir(root)) == sorted(names)
    assert all(name.startswith("part-") for name in os.listdir(root / "out"))


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.parametrize("kind", ["remote", "overwrite"])
def test_a_kill_at_any_moment_leaves_all_or_nothing_and_the_next_run_finishes(tmp_path, kind):
    module = "tests.variational.streaming.preshuffle.killed"
    command = [sys.executable, "-m", module, str(tmp_path), kind, "13"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[0]) > 20


@KINDS
@pytest.mark.parametrize("task", [3, 25])
def test_a_failure_leaves_nothing_and_the_next_run_works(
    source, tmp_path, scratch, filesystem, task
):
    broken = fail_at(task, OSError("[Errno 28] No space left on device"))
    with pytest.raises(StreamError, match=r"stopped \(OSError: .*No space left.*run it again"):
        shuffle(source, executor=broken, filesystem=filesystem, scratch=scratch)
    assert os.listdir(tmp_path) == ["in"]
    assert not os.listdir(scratch)
    shuffle(source, filesystem=filesystem, scratch=scratch)
    require_whole(tmp_path)
    assert not os.listdir(scratch)


@KINDS
@pytest.mark.parametrize("task", [3, 20])
def test_what_is_at_the_destination_stays_until_the_new_rows_are_complete(
    source, tmp_path, filesystem, task
):
    shuffle(source)
    before = digests(tmp_path / "out")
    for error in (OSError("gone"), KeyboardInterrupt()):
        with pytest.raises((StreamError, KeyboardInterrupt)):
            shuffle(
                source,
                seed=1,
                overwrite=True,
                filesystem=filesystem,
                executor=fail_at(task, error),
            )
        assert digests(tmp_path / "out") == before
    shuffle(source, seed=1, overwrite=True, filesystem=filesystem)
    assert digests(tmp_path / "out") != before
    require_whole(tmp_path)


@KINDS
def test_what_comes_to_the_destination_meanwhile_is_not_replaced(source, tmp_path, filesystem):
    def appear():
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine").touch()

    with pytest.raises(FileExistsError, match="exists and is not empty"):
        shuffle(source, executor=at(20, appear), filesystem=filesystem)
    assert os.listdir(tmp_path / "out") == ["mine"]
    assert sorted(os.listdir(tmp_path)) == ["in", "out"]


def fail_after(function, n_calls):
    """Return a function that raises OSError from the call after *n_calls* on."""
    calls = []

    def wrapped(*args, **kwargs):
        calls.append(args)
        if len(calls) == n_calls + 1:
            raise OSError("gone")
        return function(*args, **kwargs)

    return wrapped


def test_old_rows_are_put_back_if_new_ones_cannot_take_their_place(source, tmp_path, monkeypatch):
    shuffle(source)
    before = digests(tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(write.os, "rename", fail_after(os.rename, len(before) + 1))
        with pytest.raises(OSError, match="gone"):
            shuffle(source, seed=1, overwrite=True)
    assert digests(tmp_path / "out") == before
    require_whole(tmp_path)


def test_an_upload_that_fails_is_taken_back(source, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(pa.fs, "copy_files", fail_after(pa.fs.copy_files, 5))
        with pytest.raises(OSError, match="gone"):
            shuffle(source, filesystem=remote)
    assert os.listdir(tmp_path / "out") == []
    shuffle(source, filesystem=remote)
    require_whole(tmp_path)


@pytest.mark.parametrize("options", [{"seed": 1}, {"split": {"a": 0.5, "b": 0.5}}, {}])
def test_an_upload_that_fails_keeps_what_it_would_have_replaced(
    source, tmp_path, monkeypatch, options
):
    shuffle(source)
    before = digests(tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(pa.fs, "copy_files", fail_after(pa.fs.copy_files, 5))
        with pytest.raises(OSError, match="gone"):
            shuffle(source, filesystem=remote, overwrite=True, **options)
    assert digests(tmp_path / "out") == before
    shuffle(source, filesystem=remote, overwrite=True, **options)
    for folder in options.get("split", [""]):
        assert parquet_source(tmp_path / "out" / folder).mark.seed == options.get("seed", 0)
    assert set(before).isdisjoint(digests(tmp_path / "out")) == bool(options)


def test_a_full_disk_is_named_and_leaves_nothing(source, tmp_path):
    """A limit on the size of files fails writes as a full disk does, without one."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for filesystem in (local, remote):
        with pytest.raises(StreamError, match=r"stopped .OSError: .*File too large"):
            try:
                resource.setrlimit(resource.RLIMIT_FSIZE, (6000, before[1]))
                shuffle(source, filesystem=filesystem)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert os.listdir(tmp_path) == ["in"]


def test_files_are_on_the_disk_before_they_are_published(source, tmp_path, monkeypatch):
    flushed, rename = set(), os.rename

    def publish(old, new):
        if new == str(tmp_path / "out"):
            assert flushed.issuperset(file.stat().st_ino for file in Path(old).iterdir())
        rename(old, new)

    monkeypatch.setattr(write.os, "fsync", lambda handle: flushed.add(os.fstat(handle).st_ino))
    monkeypatch.setattr(write.os, "rename", publish)
    shuffle(source)
    require_whole(tmp_path)


def test_a_source_file_that_vanishes_is_named(source, tmp_path):
    with pytest.raises(StreamError, match=r"2\.parquet: not a readable Parquet file"):
        shuffle(source, executor=at(1, (source / "2.parquet").unlink))
    assert os.listdir(tmp_path) == ["in"]


@KINDS
@pytest.mark.parametrize("change", ["rewritten", "added"])
def test_a_source_that_changes_between_the_passes_is_not_published(
    source, tmp_path, change, filesystem
):
    def meddle():
        name = "4.parquet" if change == "added" else "1.parquet"
        pq.write_table(pa.table({"row": range(5000)}), source / name)

    with pytest.raises(StreamError, match="in' changed while it was being shuffled; nothing was"):
        shuffle(source, executor=at(20, meddle), filesystem=filesystem)
    assert os.listdir(tmp_path) == ["in"]


def test_another_time_alone_is_no_change_on_a_disk(source, tmp_path):
    def touch():
        os.utime(source / "1.parquet", ns=(1, 1))

    shuffle(source, executor=at(20, touch))
    require_whole(tmp_path)
    (tmp_path / "out").rename(tmp_path / "old")
    os.utime(source / "1.parquet")
    with pytest.raises(StreamError, match="in' changed while it was being shuffled"):
        shuffle(source, executor=at(20, touch), filesystem=remote)


@pytest.mark.parametrize("place", ["first message", "last message", "index", "end", "length"])
def test_damaged_scratch_files_are_not_published(source, tmp_path, scratch, place):
    def damage():
        for file in scratch.rglob("*.rows"):
            data = bytearray(file.read_bytes())
            start = int.from_bytes(data[-16:-8], "little")
            position = {"first message": 300, "last message": start - 10, "index": start + 1}
            data[position.get(place, -10)] ^= 1
            file.write_bytes(data[:-1000] if place == "length" else data)

    with pytest.raises(StreamError, match="nothing was published"):
        shuffle(source, executor=at(16, damage), scratch=scratch)
    assert os.listdir(tmp_path) == ["in"]
    shuffle(source, scratch=scratch)
    require_whole(tmp_path)


def test_a_wrong_number_of_rows_in_the_index_is_not_believed(source, tmp_path, scratch):
    """Rows would be taken from beyond the end of a partition."""

    def damage():
        for file in scratch.rglob("*.rows"):
            data = bytearray(file.read_bytes())
            data[int.from_bytes(data[-16:-8], "little") + 17] ^= 1
            file.write_bytes(data)

    shuffle(source, executor=at(16, damage), scratch=scratch)
    require_whole(tmp_path)


def test_rows_that_scratch_loses_are_missed(source, tmp_path, scratch):
    """An index of zeros has no messages, and so none whose checksum is wrong."""

    def lose():
        file = min(scratch.rglob("*.rows"))
        data = bytearray(file.read_bytes())
        start = int.from_bytes(data[-16:-8], "little")
        data[start:-16] = bytes(len(data) - start - 16)
        file.write_bytes(data)

    with pytest.raises(
        StreamError, match=r"has 20000 rows, 20000 were read, \d+ are in the result"
    ):
        shuffle(source, executor=at(16, lose), scratch=scratch)
    assert os.listdir(tmp_path) == ["in"]


def test_an_executor_that_dies_is_named(source, tmp_path):
    options = {"mp_context": get_context("spawn"), "initializer": os._exit, "initargs": (1,)}
    with ProcessPoolExecutor(1, **options) as pool:
        with pytest.raises(StreamError, match=r"stopped \(BrokenProcessPool: .*run it again"):
            shuffle(source, executor=pool)
    assert os.listdir(tmp_path) == ["in"]


def test_an_executor_that_was_shut_down_is_named(source):
    pool = ThreadPoolExecutor(1)
    pool.shutdown()
    with pytest.raises(StreamError, match=r"stopped \(RuntimeError: cannot schedule new futures"):
        shuffle(source, executor=pool)


def test_a_lost_scheduler_is_named(source, tmp_path):
    """Dask cancels the tasks of a scheduler that it cannot reach any more."""
    with pytest.raises(StreamError, match=r"stopped \(a task was cancelled, as when the scheduler"):
        shuffle(source, executor=fail_at(3, CancelledError()))
    assert os.listdir(tmp_path) == ["in"]


def test_a_second_run_of_this_process_is_refused(source, tmp_path):
    def run_another():
        with pytest.raises(StreamError, match="another preshuffle is writing it; wait until"):
            shuffle(source)

    shuffle(source, executor=at(3, run_another))
    require_whole(tmp_path)


def test_a_run_while_another_process_holds_the_destination_is_refused(source, tmp_path):
    pytest.importorskip("fcntl")
    (tmp_path / ".out.partial").mkdir()
    lock = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX)"
    command = [sys.executable, "-c", f"{lock}; print(flush=True); input()"]
    command.append(str(tmp_path / ".out.partial" / "lock"))
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, **pipes) as other:
        other.stdout.readline()
        with pytest.raises(StreamError, match="another preshuffle is writing it; wait until"):
            shuffle(source)
        other.communicate(b"\n")
    shuffle(source)
    require_whole(tmp_path)


def test_an_unfinished_upload_is_refused_by_a_source_and_replaced_by_the_next_run(source, tmp_path):
    shuffle(source)
    min((tmp_path / "out").iterdir()).unlink()
    with pytest.raises(StreamError, match="1 of the 16 files of its shuffle are missing"):
        parquet_source(tmp_path / "out")
    shuffle(source, filesystem=remote)
    require_whole(tmp_path)


def test_the_source_is_never_written_to(source):
    before = digests(source), [p.stat().st_mtime_ns for p in sorted(source.iterdir())]
    with pytest.raises(StreamError):
        shuffle(source, executor=fail_at(20, OSError("gone")))
    shuffle(source)
    assert (digests(source), [p.stat().st_mtime_ns for p in sorted(source.iterdir())]) == before


def in_batches():
    """Return record batches, of which an iterator would lose some in a run that fails."""
    return pa.table({"row": np.arange(N_ROWS)}).to_batches(max_chunksize=1000)


@pytest.mark.parametrize(
    "make", [iter, lambda rows: map(pa.record_batch, rows)], ids=["iter", "map"]
)
def test_an_iterator_keeps_its_rows_where_the_destination_is_refused(tmp_path, source, make):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    rows = make(in_batches())
    options = {"seed": 0, "progressbar": False}
    for wrong in ({}, {"overwrite": True, "memory_limit": "much"}, {"overwrite": True, "seed": -1}):
        with pytest.raises((FileExistsError, ValueError)):
            preshuffle(rows, tmp_path / "out", **(options | wrong))
    preshuffle(rows, tmp_path / "out", overwrite=True, **options)
    require_whole(tmp_path)


@pytest.mark.parametrize(
    "make",
    [
        lambda rows: (batch for batch in rows),
        lambda rows: pa.RecordBatchReader.from_batches(rows[0].schema, rows),
    ],
    ids=["generator", "reader"],
)
def test_an_iterator_that_a_failed_run_has_read_from_is_refused(
    tmp_path, source, monkeypatch, make
):
    rows = make(in_batches())
    options = {"seed": 0, "progressbar": False}
    with monkeypatch.context() as patch:
        patch.setattr(passes, "_write_block", fail_after(passes._write_block, 2))
        with pytest.raises(StreamError, match=r"gone.* with a new iterator if the source was one"):
            preshuffle(rows, tmp_path / "out", **options)
    with pytest.raises(StreamError, match="so that rows are missing; make a new one"):
        preshuffle(rows, tmp_path / "out", **options)
    preshuffle(make(in_batches()), tmp_path / "out", **options)
    require_whole(tmp_path)


def test_filesystems_without_locks_or_flushed_folders_are_written_to(source, tmp_path, monkeypatch):
    """As Lustre without its option, and many mounts of object stores."""

    def no_locks(*args):
        raise OSError(errno.ENOSYS, "Function not implemented")

    def files_only(handle, fsync=os.fsync):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(handle)

    pytest.importorskip("fcntl")
    monkeypatch.setattr(write.fcntl, "lockf", no_locks)
    monkeypatch.setattr(write.os, "fsync", files_only)
    shuffle(source)
    require_whole(tmp_path)


def test_without_locks_no_file_is_held_open_in_a_folder_that_is_deleted(
    source, tmp_path, monkeypatch
):
    """Windows deletes no file that is open."""
    found = []
    monkeypatch.setattr(write, "fcntl", None)
    shuffle(source, executor=at(3, lambda: found.extend(tmp_path.rglob("lock"))))
    assert not found
    require_whole(tmp_path)
