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
import os
import signal
import subprocess
import sys

from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
import pytest

from pymc.variational._streaming.errors import StreamError
from pymc.variational._streaming.preshuffle import passes, staging, tasks
from pymc.variational._streaming.preshuffle.command import preshuffle
from pymc.variational._streaming.preshuffle.staging import _LocalStaging
from tests.variational.streaming.preshuffle.preshuffled import cut_small, digests, rows_in_order

ROOT = Path(__file__).parents[4]
N_ROWS = 20_000
CLI = "import sys, tests; from pymc.variational._streaming.preshuffle.cli import main; sys.exit(main())"

local = pa.fs.LocalFileSystem()
remote = pa.fs.SubTreeFileSystem("/", local)
"""A filesystem that is not known to rename folders, as object stores do not."""
KINDS = pytest.mark.parametrize("filesystem", [local, remote], ids=["local", "remote"])


@pytest.fixture
def source(tmp_path, monkeypatch):
    cut_small(monkeypatch.setattr)
    folder = tmp_path / "in"
    folder.mkdir()
    for number, rows in enumerate(np.array_split(np.arange(N_ROWS), 3)):
        pq.write_table(pa.table({"row": rows}), folder / f"{number}.parquet", row_group_size=1000)
    return folder


@pytest.fixture
def expected(source, tmp_path):
    """Return what an undisturbed run makes."""
    shuffle(source)
    return digests(published(tmp_path))


def shuffle(source, **options):
    return preshuffle(
        source, source.parent / "out", **({"seed": 0, "progressbar": False} | options)
    )


def published(root):
    """Move a result away and return its new place."""
    return (root / "out").rename(root.parent / f"{root.name}-expected")


def is_clean(root):
    return sorted(os.listdir(root)) == ["in", "out"] and "_preshuffle" not in os.listdir(
        root / "out"
    )


class Inline(ThreadPoolExecutor):
    """Runs tasks one after the other where they are submitted, and counts them."""

    def __init__(self, fail_at=None, error=None):
        super().__init__(1)
        self.ran = 0
        self._fail_at, self._error = fail_at, error

    def submit(self, function, task):
        future = Future()
        try:
            if self.ran == self._fail_at:
                raise self._error
            future.set_result(function(task))
            self.ran += 1
        except Exception as err:
            future.set_exception(err)
        return future


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.parametrize("kind", ["local", "remote"])
def test_a_kill_at_any_moment_leaves_all_or_nothing_and_the_next_run_finishes(tmp_path, kind):
    command = [
        sys.executable,
        "-m",
        "tests.variational.streaming.preshuffle.killed",
        str(tmp_path),
        kind,
        "37",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[0]) > 50


@KINDS
@pytest.mark.parametrize("fail_at", [0, 3, 17, 25])
def test_tasks_that_were_done_are_not_done_again(source, tmp_path, expected, filesystem, fail_at):
    broken, rest = Inline(fail_at, OSError("[Errno 28] No space left on device")), Inline()
    with pytest.raises(StreamError, match=r"No space left.*run the same call again"):
        shuffle(source, executor=broken, filesystem=filesystem)
    report = shuffle(source, executor=rest, filesystem=filesystem)
    whole = Inline()
    shuffle(source, executor=whole, filesystem=filesystem, overwrite=True)
    assert broken.ran + rest.ran == whole.ran
    assert report.rows == N_ROWS
    assert digests(tmp_path / "out") == expected
    assert is_clean(tmp_path)


@KINDS
@pytest.mark.parametrize("change", [{"seed": 1}, {"memory_limit": "600MB"}, {"columns": ["row"]}])
def test_another_call_starts_over(source, tmp_path, filesystem, change, monkeypatch):
    with pytest.raises(StreamError):
        shuffle(source, executor=Inline(20, OSError("gone")), filesystem=filesystem)
    monkeypatch.setattr("pymc.variational._streaming.preshuffle.plan._LARGEST_BLOCK", 1 << 13)
    shuffle(source, filesystem=filesystem, **change)
    assert sorted(rows_in_order(tmp_path / "out")) == list(range(N_ROWS))
    assert is_clean(tmp_path)


def test_scatter_files_that_are_gone_are_written_again(source, tmp_path, expected):
    (tmp_path / "scratch").mkdir()
    with pytest.raises(StreamError):
        shuffle(source, executor=Inline(20, OSError("gone")), scratch=tmp_path / "scratch")
    for file in (tmp_path / "scratch").rglob("*.piles"):
        file.unlink()
    shuffle(source, scratch=tmp_path / "scratch")
    assert digests(tmp_path / "out") == expected
    assert not list((tmp_path / "scratch").iterdir())


@pytest.mark.parametrize("harm", [os.remove, lambda path: os.truncate(path, 0)])
def test_finished_files_that_are_gone_or_short_are_written_again(source, tmp_path, expected, harm):
    """As after a power cut."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_LocalStaging, "publish", lambda self, sizes: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            shuffle(source)
    harm(min((tmp_path / ".out.partial" / "files").iterdir()))
    for task in list((tmp_path / ".out.partial" / "tasks").iterdir())[::2]:
        task.write_bytes(bytes(task.stat().st_size))
    shuffle(source)
    assert digests(tmp_path / "out") == expected


def test_scratch_of_an_abandoned_run_is_removed(source, tmp_path):
    (tmp_path / "scratch").mkdir()
    with pytest.raises(StreamError):
        shuffle(source, executor=Inline(20, OSError("gone")), scratch=tmp_path / "scratch")
    shuffle(source)
    assert not list((tmp_path / "scratch").iterdir())


@KINDS
def test_a_full_disk_is_named_and_the_run_goes_on_when_there_is_room(
    source, tmp_path, expected, filesystem
):
    """A limit on the size of files fails writes as a full disk does, without one."""
    code = (
        "import resource, signal, sys\n"
        "from tests.variational.streaming.preshuffle.test_faults import *\n"
        "cut_small(setattr)\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))\n"
        "shuffle(Path(sys.argv[1]), filesystem=remote if sys.argv[2] == 'remote' else local)\n"
    )
    kind = "local" if filesystem is local else "remote"
    command = [sys.executable, "-c", code, str(source), kind]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert "StreamError: preshuffle stopped (OSError: " in done.stderr
    assert "File too large" in done.stderr
    shuffle(source, filesystem=filesystem)
    assert digests(tmp_path / "out") == expected
    assert is_clean(tmp_path)


def test_a_source_file_that_vanishes_is_named(source, tmp_path):
    def vanish(number):
        if number == 1:
            (source / "2.parquet").unlink()

    with pytest.raises(StreamError, match=r"2\.parquet: not a readable Parquet file"):
        shuffle(source, executor=Watched(vanish))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("change", ["rewritten", "added", "touched"])
def test_a_source_that_changes_between_the_passes_is_not_published(source, tmp_path, change):
    def meddle(number):
        if number == 20:
            if change == "touched":
                os.utime(source / "1.parquet", ns=(1, 1))
            name = "3.parquet" if change == "added" else "1.parquet"
            if change != "touched":
                pq.write_table(pa.table({"row": range(6667)}), source / name)

    with pytest.raises(StreamError, match="in' changed while it was being shuffled; nothing was"):
        shuffle(source, executor=Watched(meddle))
    assert not (tmp_path / "out").exists()
    shuffle(source)
    assert is_clean(tmp_path)


@KINDS
def test_flipped_bits_are_not_published(source, tmp_path, filesystem):
    """Scratch files have no checksums of their own; those of the rows tell."""

    def flip(number):
        row = np.int64(12_345).tobytes()
        piles = list(tmp_path.rglob("*.piles")) if list(tmp_path.rglob("*.catalog")) else []
        for file in piles:
            file.write_bytes(file.read_bytes().replace(row, b"\x00" + row[1:]))

    with pytest.raises(StreamError, match=r"were written, 20000 with .* were read.*check the disk"):
        shuffle(source, executor=Watched(flip), filesystem=filesystem)
    shuffle(source, filesystem=filesystem)
    assert sorted(rows_in_order(tmp_path / "out")) == list(range(N_ROWS))
    assert is_clean(tmp_path)


def test_a_result_that_someone_touched_is_not_published(source, tmp_path, monkeypatch):
    def truncate(task):
        result = tasks.gather(task)
        with open(task.path, "ab") as file:
            file.write(b"more")
        return result

    monkeypatch.setattr(passes, "gather", truncate)
    with pytest.raises(
        StreamError, match=r"has \d+ bytes, \d+ were written; another process touched it"
    ):
        shuffle(source)
    assert not (tmp_path / "out").exists()


def test_a_kill_just_after_publishing_does_not_bar_the_next_run(source, tmp_path, monkeypatch):
    shuffle(source)
    with monkeypatch.context() as patch:
        patch.setattr(staging.shutil, "rmtree", lambda *args, **kwargs: None)
        shuffle(source, seed=1, overwrite=True)
    assert os.listdir(tmp_path / ".out.partial" / "old")
    shuffle(source, seed=1, overwrite=True)
    assert is_clean(tmp_path)


def test_an_executor_that_dies_is_named_and_the_work_goes_on(source, tmp_path, expected):
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=die) as pool:
        with pytest.raises(StreamError, match=r"stopped \(BrokenProcessPool: .*same call again"):
            shuffle(source, executor=pool)
    shuffle(source)
    assert digests(tmp_path / "out") == expected
    assert is_clean(tmp_path)


def test_an_executor_that_was_shut_down_is_named(source):
    pool = ThreadPoolExecutor(1)
    pool.shutdown()
    with pytest.raises(StreamError, match=r"stopped \(RuntimeError: cannot schedule new futures"):
        shuffle(source, executor=pool)


def test_an_interrupt_stops_at_once_and_the_work_goes_on(source, tmp_path, expected):
    with pytest.raises(KeyboardInterrupt):
        shuffle(source, executor=Inline(5, KeyboardInterrupt()))
    shuffle(source)
    assert digests(tmp_path / "out") == expected


def test_a_second_run_in_the_same_process_is_refused(source, tmp_path):
    errors = []

    def second(number):
        if number == 3:
            with pytest.raises(StreamError) as caught:
                shuffle(source)
            errors.append(str(caught.value))

    shuffle(source, executor=Watched(second))
    assert "another preshuffle is writing it; wait until it is done" in errors[0]
    assert is_clean(tmp_path)


def test_a_second_run_in_another_process_is_refused(source, tmp_path):
    codes = []

    def second(number):
        if number == 3:
            command = [sys.executable, "-c", CLI, "preshuffle"]
            command += [str(source), str(tmp_path / "out"), "--seed", "0", "--quiet"]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            codes.append((done.returncode, done.stderr))

    shuffle(source, executor=Watched(second))
    assert codes[0][0] == 1
    assert "another preshuffle is writing it" in codes[0][1]
    assert is_clean(tmp_path)


def test_where_there_are_no_locks_the_newest_run_wins_and_the_older_one_says_so(source, tmp_path):
    """And what the newest writes is what it would have written alone."""

    def second(number):
        if number == 20:
            shuffle(source, filesystem=remote, seed=1)

    with pytest.raises(StreamError, match="another preshuffle took it over while this one was"):
        shuffle(source, executor=Watched(second), filesystem=remote)
    found = digests(tmp_path / "out")
    shuffle(source, filesystem=remote, seed=1, overwrite=True)
    assert digests(tmp_path / "out") == found


def test_the_source_is_never_written_to(source, tmp_path):
    before = digests(source), [p.stat().st_mtime_ns for p in sorted(source.iterdir())]
    for fail_at in (0, 20, None):
        try:
            shuffle(source, executor=Inline(fail_at, OSError("gone")))
        except StreamError:
            pass
    assert (digests(source), [p.stat().st_mtime_ns for p in sorted(source.iterdir())]) == before


class Watched(Inline):
    """Calls *watch* with the number of each task before it runs."""

    def __init__(self, watch):
        super().__init__()
        self._watch = watch
        self._seen = -1

    def submit(self, function, task):
        if self.ran > self._seen:
            self._seen = self.ran
            self._watch(self.ran)
        return super().submit(function, task)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
