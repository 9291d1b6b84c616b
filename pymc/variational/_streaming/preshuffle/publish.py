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
first one last: every file says how many there must be, so that a source refuses the others until
it is there.
"""

import contextlib
import os
import re
import tempfile
import uuid

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pymc.variational._streaming.errors import StreamError
from pymc.variational._streaming.sources.parquet.files import import_pyarrow, is_local
from pymc.variational._streaming.sources.parquet.paths import resolve
from pymc.variational._streaming.utils import digest

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

if TYPE_CHECKING:
    import pyarrow.fs

__all__ = ["Workspace", "flush", "open_workspace", "publish"]

_PART = "part-{:05}-of-{:05}.parquet"
_LATER_PART = re.compile(r"part-(?!00000)\d{5,}-of-\d{5,}\.parquet")
"""Name of a file that is uploaded before the first one."""
_REPLACED = "replaced"
"""Name of the folder that holds a destination's old contents while new ones take their place."""
_locked_here: dict[str, object] = {}
"""Folders locked by threads of this process, which file locks do not tell apart."""


@dataclass(frozen=True, slots=True)
class Workspace:
    """A destination, and the folders of the run that builds it."""

    fs: "pyarrow.fs.FileSystem"
    destination: str
    overwrite: bool
    parts_fs: "pyarrow.fs.FileSystem"
    parts: str
    """Folder for the files of the result."""
    scratch_fs: "pyarrow.fs.FileSystem"
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
    """Make the folders of a run; delete them at its end, and those that a killed run left.

    Raises
    ------
    FileExistsError
        If there is something at the destination, and it must not be overwritten.
    StreamError
        If another run is building the same destination.
    """
    if is_local(fs):
        destination = os.path.realpath(destination)
        _require_replaceable(destination)
    scratch_fs, scratch_root = resolve(scratch or tempfile.gettempdir())
    folders = [(scratch_fs, f"{scratch_root}/preshuffle-{digest(destination)}")]
    if is_local(fs):
        beside = fs, "/.".join(os.path.split(destination)) + ".partial"
        folders = [beside, *folders] if scratch else [beside]
    with contextlib.ExitStack() as stack:
        for folder in folders:
            stack.enter_context(_own(*folder, destination))
        (parts_fs, parts), (scratch_fs, scratch_folder) = folders[0], folders[-1]
        # Workers may still run tasks of a run that was killed, which must not meet these.
        run = uuid.uuid4().hex
        work = Workspace(
            fs=fs,
            destination=destination,
            overwrite=overwrite,
            parts_fs=parts_fs,
            parts=f"{parts}/{run}",
            scratch_fs=scratch_fs,
            scratch=f"{scratch_folder}/{run}.scratch",
        )
        _refuse_to_replace(work)
        parts_fs.create_dir(work.parts)
        scratch_fs.create_dir(work.scratch)
        yield work


def publish(work: Workspace, paths: Sequence[str]) -> None:
    """Make finished files, in their order, the contents of the destination."""
    _refuse_to_replace(work)
    names = [_PART.format(index, len(paths)) for index in range(len(paths))]
    (_rename if is_local(work.fs) else _upload)(work, dict(zip(names, paths)))


def flush(path: str) -> None:
    """Wait until a local file, or the list of names in a folder, is on the disk."""
    if os.path.isdir(path) and os.name != "posix":
        return  # Windows cannot open folders.
    handle = os.open(path, os.O_RDONLY if os.path.isdir(path) else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _rename(work: Workspace, files: dict[str, str]) -> None:
    finished = f"{work.parts}.finished"
    os.mkdir(finished)
    for name, path in files.items():
        os.rename(path, f"{finished}/{name}")
    flush(finished)
    if os.path.lexists(work.destination):
        os.rename(work.destination, f"{os.path.dirname(work.parts)}/{_REPLACED}")
    os.rename(finished, work.destination)
    flush(os.path.dirname(work.destination))


def _upload(work: Workspace, files: dict[str, str]) -> None:
    work.fs.create_dir(work.destination, recursive=True)
    work.fs.delete_dir_contents(work.destination)
    try:
        for name, path in reversed(files.items()):
            import_pyarrow().fs.copy_files(
                path,
                f"{work.destination}/{name}",
                source_filesystem=work.parts_fs,
                destination_filesystem=work.fs,
                use_threads=False,
            )
    except BaseException:
        with contextlib.suppress(Exception):
            work.fs.delete_dir_contents(work.destination)
        raise


def _refuse_to_replace(work: Workspace) -> None:
    """Refuse a destination with contents other than those of an upload that was killed."""
    selector = import_pyarrow().fs.FileSelector(work.destination, allow_not_found=True)
    names = {info.base_name for info in work.fs.get_file_info(selector)} - {""}
    unfinished = not is_local(work.fs) and all(map(_LATER_PART.fullmatch, names))
    if names and not unfinished and not work.overwrite:
        raise FileExistsError(
            f"destination={work.destination!r} exists and is not empty; "
            "pass overwrite=True to replace it, or choose another"
        )


def _require_replaceable(destination: str) -> None:
    """Refuse what no rename can put a folder in the place of."""
    if os.path.lexists(destination) and not os.path.isdir(destination):
        raise NotADirectoryError(f"destination={destination!r} is a file; pass a directory")
    places = {"a mount point": os.path.ismount(destination)}
    places["the current directory"] = destination == os.path.realpath(os.getcwd())
    for place, is_here in places.items():
        if is_here:
            raise ValueError(
                f"destination={destination!r} is {place}, which cannot be replaced as a whole; "
                "pass a directory inside it"
            )


@contextlib.contextmanager
def _own(fs: "pyarrow.fs.FileSystem", folder: str, destination: str) -> Iterator[None]:
    """Make and lock a folder; empty it, also of what a killed run left, and delete it at the end."""
    fs.create_dir(folder, recursive=True)
    with _locked(folder, destination) if is_local(fs) else contextlib.nullcontext():
        try:
            _clear(fs, folder, destination)
            yield
        finally:
            _clear(fs, folder, destination)
            fs.delete_dir(folder)


def _clear(fs: "pyarrow.fs.FileSystem", folder: str, destination: str) -> None:
    """Delete all but the lock, and put back what was to be replaced, but was not."""
    pafs = import_pyarrow().fs
    if os.path.lexists(f"{folder}/{_REPLACED}") and not os.path.lexists(destination):
        os.rename(f"{folder}/{_REPLACED}", destination)
    for info in fs.get_file_info(pafs.FileSelector(folder, allow_not_found=True)):
        if info.type == pafs.FileType.Directory:
            fs.delete_dir(info.path)


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
