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
"""Where a result is built out of sight, and how it appears at once.

A local result is built in a hidden folder beside the destination, and one rename publishes it.
Other filesystems cannot rename folders.  There the files are uploaded when all are built, and the
first of each folder last: every file says how many there must be, so that a source refuses the
others until it is there.
"""

import contextlib
import os
import re
import shutil
import tempfile
import uuid

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pymc.variational._streaming.errors import StreamError
from pymc.variational._streaming.preshuffle.write import flush
from pymc.variational._streaming.sources.parquet.files import import_pyarrow, is_local
from pymc.variational._streaming.utils import digest

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

if TYPE_CHECKING:
    import pyarrow.fs

__all__ = ["Workspace", "open_workspace", "publish"]

_LATER_PART = re.compile(r"part-(?!0+-)\d{5,}-of-\d{5,}\.\w+")
"""Names of the files that are uploaded before the first of their folder."""
_REPLACED = "replaced"
"""Name of the folder that holds a destination's old contents while new ones take their place."""
_locked_here: dict[str, object] = {}
"""Folders locked by threads of this process, which file locks do not tell apart."""


@dataclass(frozen=True, slots=True)
class Workspace:
    """A destination, and the local folders of the run that builds it."""

    fs: "pyarrow.fs.FileSystem"
    destination: str
    overwrite: bool
    parts: str
    """Folder for the files of the result."""
    scratch: str
    """Folder for rows between the passes."""


@contextlib.contextmanager
def open_workspace(
    fs: "pyarrow.fs.FileSystem",
    destination: str,
    *,
    scratch: str | os.PathLike | None,
    overwrite: bool,
) -> Iterator[Workspace]:
    """Make the folders of a run; delete them at its end, and those that a killed run left."""
    if scratch and "://" in os.fspath(scratch):
        raise ValueError("scratch is a URI; pass a directory, which all workers reach")
    if is_local(fs):
        destination = os.path.realpath(destination)
        _require_replaceable(destination)
    elsewhere = os.path.abspath(scratch or tempfile.gettempdir())
    folders = [f"{elsewhere}/preshuffle-{digest(destination)}"]
    if is_local(fs):
        beside = "/.".join(os.path.split(destination)) + ".partial"
        folders = [beside, *folders] if scratch else [beside]
    with contextlib.ExitStack() as stack:
        for folder in folders:
            stack.enter_context(_own(folder, destination))
        # Workers may still run tasks of a run that was killed, which must not meet these.
        run = uuid.uuid4().hex
        work = Workspace(
            fs, destination, overwrite, f"{folders[0]}/{run}", f"{folders[-1]}/{run}.scratch"
        )
        _refuse_to_replace(work)
        os.mkdir(work.parts)
        os.mkdir(work.scratch)
        yield work


def publish(work: Workspace, files: Mapping[str, str]) -> None:
    """Make the contents of the destination these files, whose names may begin with a folder."""
    _refuse_to_replace(work)
    (_rename if is_local(work.fs) else _upload)(work, files)


def _rename(work: Workspace, files: Mapping[str, str]) -> None:
    finished = f"{work.parts}.finished"
    for name, path in files.items():
        os.makedirs(os.path.dirname(f"{finished}/{name}"), exist_ok=True)
        os.rename(path, f"{finished}/{name}")
    for folder in {os.path.dirname(f"{finished}/{name}") for name in files} | {finished}:
        flush(folder)
    if os.path.lexists(work.destination):
        os.rename(work.destination, f"{os.path.dirname(work.parts)}/{_REPLACED}")
    os.rename(finished, work.destination)
    flush(os.path.dirname(work.destination))


def _upload(work: Workspace, files: Mapping[str, str]) -> None:
    pafs = import_pyarrow().fs
    work.fs.create_dir(work.destination, recursive=True)
    work.fs.delete_dir_contents(work.destination)
    try:
        for name in sorted(files, key=lambda name: not _LATER_PART.search(name)):
            target = f"{work.destination}/{name}"
            work.fs.create_dir(os.path.dirname(target), recursive=True)
            pafs.copy_files(
                files[name],
                target,
                source_filesystem=pafs.LocalFileSystem(),
                destination_filesystem=work.fs,
                use_threads=False,
            )
    except BaseException:
        with contextlib.suppress(Exception):
            work.fs.delete_dir_contents(work.destination)
        raise


def _refuse_to_replace(work: Workspace) -> None:
    """Refuse a destination with contents other than those of an upload that was killed."""
    pafs, local = import_pyarrow().fs, is_local(work.fs)
    selector = pafs.FileSelector(work.destination, allow_not_found=True, recursive=not local)
    infos = [
        info
        for info in work.fs.get_file_info(selector)
        if local or (info.type == pafs.FileType.File and info.base_name)
    ]
    unfinished = not local and all(_LATER_PART.fullmatch(info.base_name) for info in infos)
    if infos and not unfinished and not work.overwrite:
        raise FileExistsError(
            f"destination={work.destination!r} exists and is not empty; "
            "pass overwrite=True to replace it, or choose another"
        )


def _require_replaceable(destination: str) -> None:
    """Refuse what no rename can put a folder in the place of."""
    if os.path.lexists(destination) and not os.path.isdir(destination):
        raise NotADirectoryError(f"destination={destination!r} is a file; pass a directory")
    is_mount = os.path.ismount(destination)
    if is_mount or destination == os.path.realpath(os.getcwd()):
        place = "a mount point" if is_mount else "the current directory"
        raise ValueError(
            f"destination={destination!r} is {place}, which cannot be replaced as a whole; "
            "pass a directory inside it"
        )


@contextlib.contextmanager
def _own(folder: str, destination: str) -> Iterator[None]:
    """Make and lock a folder; empty it, also of what a killed run left, and delete it at the end."""
    os.makedirs(folder, exist_ok=True)
    with _locked(folder, destination):
        try:
            _clear(folder, destination)
            yield
        finally:
            _clear(folder, destination)
            shutil.rmtree(folder)


def _clear(folder: str, destination: str) -> None:
    """Delete all but the lock, and put back what was to be replaced, but was not."""
    if os.path.lexists(f"{folder}/{_REPLACED}") and not os.path.lexists(destination):
        os.rename(f"{folder}/{_REPLACED}", destination)
    for entry in list(os.scandir(folder)):
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry)


@contextlib.contextmanager
def _locked(folder: str, destination: str) -> Iterator[None]:
    """Lock a folder until the end, or until the process dies."""
    busy = StreamError(
        f"destination={destination!r}: another preshuffle is writing it; "
        "wait until it is done, or choose another destination"
    )
    ours = object()
    if _locked_here.setdefault(folder, ours) is not ours:
        raise busy
    try:
        with open(f"{folder}/lock", "w") as handle:
            try:
                if fcntl is not None:
                    # Unlike flock, this lock is not inherited by workers, which may live on.
                    fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise busy from None
            yield
    finally:
        del _locked_here[folder]
