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
"""The files of the result: written out of sight, and published at once.

A local result is built in a hidden folder beside the destination, and one rename publishes it.
Other filesystems cannot rename folders.  There the files are uploaded when all are built, and the
first of each folder last: every file says how many there must be, so that a source refuses the
others until it is there.  Only then are old files deleted.
"""

import contextlib
import dataclasses
import os
import re
import shutil
import tempfile
import uuid

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from pymc.variational._streaming.errors import StreamError
from pymc.variational._streaming.preshuffle.plan import Part
from pymc.variational._streaming.sources.arrow import checksum, group_columns, to_metadata
from pymc.variational._streaming.sources.parquet.files import is_local, pa
from pymc.variational._streaming.sources.parquet.mark import PreshuffleMark
from pymc.variational._streaming.sources.summary import Summary
from pymc.variational._streaming.utils import digest

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["Workspace", "Writer", "flush", "open_workspace", "publish", "refuse_to_replace"]

_LATER_PART = re.compile(r"part-(?!0+-)\d{5,}-of-\d{5,}-\w+\.\w+")
"""Names of the files that are uploaded before the first of their folder."""
_REPLACED = "replaced"
"""Name of the folder that holds a destination's old contents while new ones take their place."""
_locked_here: dict[str, object] = {}
"""Folders locked by threads of this process, which file locks do not tell apart."""


@dataclass(frozen=True, slots=True)
class Writer:
    """Writes the files of the result."""

    schema: "pa.Schema"
    dictionaries: Mapping[str, "pa.Array"]
    """Values of the columns that are written as codes."""
    summary: Summary
    compression: str | None
    marks: Mapping[str, PreshuffleMark]
    """Mark of the first file in each folder."""

    format: str
    batch_rows: int
    """Rows of a record batch in a row-major file."""

    def name(self, part: Part) -> str:
        """Return the path of a file below the destination, which differs between shuffles."""
        mark = self.marks[part.folder]
        name = f"part-{part.index:05}-of-{mark.n_files:05}-{mark.shuffle[:8]}.{self.format}"
        return os.path.join(part.folder, name)

    def write(self, path: str, part: Part, batches: Iterable["pa.RecordBatch"]) -> int:
        """Write a file of the result, and return its number of rows."""
        write = self._write_parquet if self.format == "parquet" else self._write_rows
        return write(path, part, batches)

    def _write_parquet(self, path: str, part: Part, batches: Iterable["pa.RecordBatch"]) -> int:
        """Write a row group for each batch."""
        rows = 0
        with (
            pa.OSFile(path, "wb") as sink,
            pa.parquet.ParquetWriter(
                sink,
                self.schema,
                compression=self.compression,
                use_dictionary=list(self.dictionaries) or False,
                write_statistics=False,
                write_page_checksum=True,
            ) as writer,
        ):
            for batch in batches:
                writer.write_batch(self._encode(batch), batch.num_rows)
                rows += batch.num_rows
            mark = dataclasses.replace(
                self.marks[part.folder], index=part.index, data_end=sink.tell()
            )
            writer.add_key_value_metadata(mark.to_metadata() | self.summary.to_metadata())
        return rows

    def _write_rows(self, path: str, part: Part, batches: Iterable["pa.RecordBatch"]) -> int:
        """Write record batches of one size, with the columns of each dtype side by side."""
        groups = group_columns(self.schema)
        mark = dataclasses.replace(self.marks[part.folder], index=part.index)
        schema = pa.schema(
            [
                (dtype, pa.list_(pa.from_numpy_dtype(dtype), len(names)))
                for dtype, names in groups.items()
            ],
            to_metadata(self.schema, part.n_rows, self.batch_rows)
            | mark.to_metadata()
            | self.summary.to_metadata(),
        )
        options = pa.ipc.IpcWriteOptions(compression=self.compression)
        rows = 0
        with pa.OSFile(path, "wb") as sink, pa.ipc.new_file(sink, schema, options=options) as out:
            for number, piece in enumerate(_recut(batches, self.batch_rows)):
                arrays = [
                    np.stack([self._codes(name, piece[name]) for name in names], 1, dtype=dtype)
                    for dtype, names in groups.items()
                ]
                lists = [
                    pa.FixedSizeListArray.from_arrays(pa.array(array.reshape(-1)), array.shape[1])
                    for array in arrays
                ]
                batch = pa.RecordBatch.from_arrays(lists, schema=schema)
                out.write_batch(batch, custom_metadata=checksum(arrays, number))
                rows += batch.num_rows
        return rows

    def _encode(self, batch: "pa.RecordBatch") -> "pa.RecordBatch":
        """Make dictionaries of the columns that are written as codes."""
        columns = []
        for column, field in zip(batch.columns, self.schema):
            if field.name in self.dictionaries:
                column = pa.DictionaryArray.from_arrays(
                    self._codes(field.name, column), self.dictionaries[field.name]
                )
            columns.append(column)
        return pa.RecordBatch.from_arrays(columns, schema=self.schema)

    def _codes(self, name: str, column: "pa.Array") -> "pa.Array":
        """Return the codes of the values of a column, or the column where it has none."""
        if name not in self.dictionaries:
            return column
        return pa.compute.index_in(column, value_set=self.dictionaries[name])


def _recut(batches: Iterable["pa.RecordBatch"], n_rows: int) -> Iterator["pa.Table"]:
    """Yield the rows of *batches* in tables of *n_rows*; the last may be shorter."""
    held: list[pa.Table] = []
    for batch in batches:
        rows = pa.concat_tables([*held, pa.Table.from_batches([batch])])
        while len(rows) >= n_rows:
            yield rows.slice(0, n_rows)
            rows = rows.slice(n_rows)
        held = [rows]
    yield from (rows for rows in held if len(rows))


@dataclass(frozen=True, slots=True)
class Workspace:
    """A destination, and the local folders of the run that builds it."""

    fs: "pa.fs.FileSystem"
    destination: str
    overwrite: bool
    parts: str
    """Folder for the files of the result."""
    scratch: str
    """Folder for rows between the passes."""


@contextlib.contextmanager
def open_workspace(
    fs: "pa.fs.FileSystem",
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
        refuse_to_replace(fs, destination, overwrite=overwrite)
        os.mkdir(work.parts)
        os.mkdir(work.scratch)
        yield work


def publish(work: Workspace, files: Mapping[str, str]) -> None:
    """Make the contents of the destination these files, whose names may begin with a folder."""
    refuse_to_replace(work.fs, work.destination, overwrite=work.overwrite)
    (_rename if is_local(work.fs) else _upload)(work, files)


def _rename(work: Workspace, files: Mapping[str, str]) -> None:
    finished = f"{work.parts}.finished"
    for name, path in files.items():
        os.makedirs(os.path.dirname(f"{finished}/{name}"), exist_ok=True)
        os.rename(path, f"{finished}/{name}")
    for folder in {os.path.dirname(f"{finished}/{name}") for name in files} | {finished}:
        _flush_folder(folder)
    if os.path.lexists(work.destination):
        os.rename(work.destination, f"{os.path.dirname(work.parts)}/{_REPLACED}")
    os.rename(finished, work.destination)
    _flush_folder(os.path.dirname(work.destination))


def _upload(work: Workspace, files: Mapping[str, str]) -> None:
    """Upload the files beside old ones, which have other names, and then delete those."""
    pafs = pa.fs
    work.fs.create_dir(work.destination, recursive=True)
    old = {info.path.strip("/") for info in _list_files(work.fs, work.destination)}
    new = set()
    try:
        for name in sorted(files, key=lambda name: not _LATER_PART.search(name)):
            target = f"{work.destination}/{name}"
            work.fs.create_dir(os.path.dirname(target), recursive=True)
            new.add(target.strip("/"))
            pafs.copy_files(
                files[name],
                target,
                source_filesystem=pafs.LocalFileSystem(),
                destination_filesystem=work.fs,
                use_threads=False,
            )
    except BaseException:
        for path in new - old:
            with contextlib.suppress(Exception):
                work.fs.delete_file(path)
        raise
    for path in old - new:
        work.fs.delete_file(path)


def refuse_to_replace(fs: "pa.fs.FileSystem", destination: str, *, overwrite: bool) -> None:
    """Refuse a destination that no rename can replace, or whose contents are not to be replaced.

    The contents of an upload that was killed are replaced in any case.
    """
    if is_local(fs):
        destination = os.path.realpath(destination)
        _require_replaceable(destination)
        is_kept = os.path.isdir(destination) and bool(os.listdir(destination))
    else:
        found = _list_files(fs, destination)
        is_kept = not all(_LATER_PART.fullmatch(info.base_name) for info in found)
    if is_kept and not overwrite:
        raise FileExistsError(
            f"destination={destination!r} exists and is not empty; "
            "pass overwrite=True to replace it, or choose another"
        )


def _list_files(fs: "pa.fs.FileSystem", folder: str) -> list["pa.fs.FileInfo"]:
    selector = pa.fs.FileSelector(folder, allow_not_found=True, recursive=True)
    files = (info for info in fs.get_file_info(selector) if info.type == pa.fs.FileType.File)
    return [info for info in files if info.base_name]  # some stores list folders as empty objects


def _require_replaceable(destination: str) -> None:
    """Refuse what no rename can put a folder in the place of."""
    if os.path.lexists(destination) and not os.path.isdir(destination):
        raise NotADirectoryError(f"destination={destination!r} is a file; pass a directory")
    if os.path.ismount(destination) or destination == os.path.realpath(os.getcwd()):
        raise ValueError(
            f"destination={destination!r} is a mount point or the current directory, which cannot "
            "be replaced as a whole; pass a directory inside it"
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
    """Lock a folder until the end, or until the process dies, where the system has locks."""
    busy = StreamError(
        f"destination={destination!r}: another preshuffle is writing it; "
        "wait until it is done, or choose another destination"
    )
    ours = object()
    if _locked_here.setdefault(folder, ours) is not ours:
        raise busy
    with contextlib.ExitStack() as stack:
        stack.callback(_locked_here.pop, folder)
        if fcntl is not None:
            handle = stack.enter_context(open(f"{folder}/lock", "w"))
            try:
                # Unlike flock, this lock is not inherited by workers, which may live on.
                fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                raise busy from None
            except OSError:
                pass  # some shared filesystems have no locks
        yield


def flush(path: str) -> None:
    """Wait until a file is on the disk."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def _flush_folder(path: str) -> None:
    """Wait until the list of names in a folder is on the disk, where the system can tell."""
    with contextlib.suppress(OSError):  # Windows opens no folders, some mounts flush none
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
