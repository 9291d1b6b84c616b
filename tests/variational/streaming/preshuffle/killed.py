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
"""Kill a shuffle at every moment, run it again, and check what is there in between and after.

``python -m tests.variational.streaming.preshuffle.killed FOLDER KIND EVERY`` kills at every
EVERY-th line of ``TRACED`` that the main thread executes, each time in a child process.  KIND is
"remote" for a filesystem that cannot rename folders, or "overwrite" for a local one where there are
other rows before.
"""

import os
import shutil
import signal
import sys

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq

from pymc.variational.streaming import StreamError, parquet_source, preshuffle
from tests.variational.streaming.preshuffle.preshuffled import cut_small, digests

N_ROWS = 2000
TRACED = "preshuffle/command.py", "preshuffle/write.py"


def main(folder: str, kind: str, every: str) -> None:
    cut_small(setattr, block=4096, tasks=4)
    root = Path(folder)
    write_source(root)
    filesystem = pa.fs.LocalFileSystem()
    if kind == "remote":
        filesystem = pa.fs.SubTreeFileSystem("/", filesystem)
    options = {"filesystem": filesystem, "scratch": root / "scratch", "progressbar": False}
    shuffle = partial(preshuffle, root / "in", root / "out", **options)
    before: dict[str, str] = {}
    if kind == "overwrite":
        shuffle = partial(shuffle, overwrite=True)
        assert in_child(partial(shuffle, seed=1)) == 0
        before = digests(root / "out")
        shutil.copytree(root / "out", root.parent / "before")
    shuffle = partial(shuffle, seed=0)
    assert in_child(shuffle) == 0
    expected = digests(root / "out")
    kills, finished = 0, 0
    while True:
        moment = kills * int(every)
        empty(root)
        if kind == "overwrite":
            shutil.copytree(root.parent / "before", root / "out")
        if in_child(partial(shuffle_until, shuffle, moment)) == 0:
            break
        finished += check_between(root, filesystem, (expected, before))
        in_child(partial(again, shuffle))
        require_only(expected, root, moment)
        kills += 1
    sys.stdout.write(f"{kills} kills, {finished} of them with a whole table\n")


def write_source(root: Path) -> None:
    (root / "in").mkdir()
    (root / "scratch").mkdir()
    words = pa.array([f"{k % 7}" for k in range(N_ROWS)]).dictionary_encode()
    table = pa.table({"row": np.arange(N_ROWS), "word": words})
    pq.write_table(table, root / "in" / "a.parquet", row_group_size=300)


def require_only(expected: dict[str, str], root: Path, moment: int) -> None:
    """Check that the result is there, and nothing that a killed run left."""
    assert digests(root / "out") == expected, f"other bytes after a kill at line {moment}"
    left = sorted(path.name for path in root.iterdir())
    assert left == ["in", "out", "scratch"], f"litter after a kill at line {moment}"
    assert not os.listdir(root / "scratch"), f"litter after a kill at line {moment}"


def in_child(function: Callable[[], None]) -> int:
    """Run *function* in a forked process, and return how that ended."""
    child = os.fork()
    if child == 0:
        try:
            function()
            os._exit(0)
        except BaseException as err:
            sys.stderr.write(f"{type(err).__name__}: {err}\n")
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL), status
    return status


def shuffle_until(shuffle: Callable[[], None], moment: int) -> None:
    """Die when the main thread is about to execute the line with this number."""
    left = [moment]

    def on_line(frame, event, arg):
        if event == "line":
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
        return on_line

    def on_call(frame, event, arg):
        return on_line if frame.f_code.co_filename.endswith(TRACED) else None

    sys.settrace(on_call)
    shuffle()
    sys.settrace(None)


def again(shuffle: Callable[[], None]) -> None:
    """Run the same call again; it may have been killed when the result was there already."""
    try:
        shuffle()
    except FileExistsError:
        pass


def check_between(root: Path, filesystem, whole: tuple[dict[str, str], ...]) -> bool:
    """Check that a source takes what is there for all or nothing; return whether for all."""
    try:
        parquet_source(root / "out", columns=["row"], filesystem=filesystem)
    except (FileNotFoundError, ValueError, StreamError):
        return False
    parts = {name: digest for name, digest in digests(root / "out").items() if name[0] == "p"}
    assert parts in whole, "an unfinished result was accepted"
    return True


def empty(root: Path) -> None:
    for path in root.iterdir():
        if path.name not in ("in", "scratch"):
            for file in sorted(path.rglob("*"), reverse=True):
                file.rmdir() if file.is_dir() else file.unlink()
            path.rmdir()


if __name__ == "__main__":
    main(*sys.argv[1:])
