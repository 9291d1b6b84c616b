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
"""Which files a path stands for, on any filesystem."""

import fnmatch
import glob
import os
import re

from collections.abc import Iterable, Iterator, Sequence
from types import ModuleType
from typing import Any, NamedTuple

from pymc.variational._streaming.errors import warn
from pymc.variational._streaming.sources.base import shorten
from pymc.variational._streaming.sources.parquet.files import is_local, pa
from pymc.variational._streaming.sources.parquet.remote import fsspec_of

__all__ = ["Paths", "is_path", "list_ipc", "list_parquet", "resolve", "stands_for"]

Paths = str | os.PathLike | Sequence[str | os.PathLike]

_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
"""A scheme has two letters or more; one letter is a drive of Windows."""
_WILDCARD = re.compile(r"[*?\[]")
_HIDDEN = ("_", ".")
"""Files and folders whose names begin like this are no data, or no data yet."""
_TABLES = {
    "_delta_log": ("a Delta table", "deltalake.DeltaTable({!r}).to_pyarrow_table()"),
    ".hoodie": (
        "a Hudi table",
        "hudi.HudiTableBuilder.from_base_uri({!r}).build().read_snapshot()",
    ),
    "_spark_metadata": ("the output of a Spark stream", "spark.read.parquet({!r}).toArrow()"),
    "metadata": ("an Iceberg table", "catalog.load_table(name).scan().to_arrow_batch_reader()"),
}
"""Names of folders with a log which says what files of a table count, and who reads such a table."""
_ICEBERG_LOG = ".metadata.json"


class _Format(NamedTuple):
    """How the files of a format are told from others."""

    name: str
    suffixes: tuple[str, ...]
    """Ends of the names of files that are chosen from a folder."""
    endings: str
    """Ends of other names that a file could have, as part of a regular expression."""
    magic: bytes
    """First bytes of a file."""
    reader: str
    """Name of the function that reads such files."""


_PARQUET = _Format("Parquet", (".parquet",), "parquet|parq|pq", b"PAR1", "parquet_source")
_IPC = _Format(
    "Arrow IPC",
    (".arrow", ".feather", ".ipc"),
    "arrow|feather|ipc",
    b"ARROW1",
    "arrow_source",
)


def is_path(data: Any) -> bool:
    """Whether *data* is a path, or a list of paths or of nothing."""
    paths = data if isinstance(data, list | tuple) else [data]
    return all(isinstance(path, str | os.PathLike) for path in paths)


def resolve(path: str | os.PathLike, filesystem: Any = None) -> tuple["pa.fs.FileSystem", str]:
    """Return the filesystem of *path*, and the path inside it, as the filesystem spells it.

    Without *filesystem* (pyarrow's or fsspec's), the path is local or a URI (``s3://bucket/key``).
    """
    fs = pa.fs
    inner = os.fspath(path)
    if filesystem is None:
        if not _URI.match(inner):
            return fs.LocalFileSystem(), local_path(inner)
        try:
            return fs.FileSystem.from_uri(inner)
        except pa.ArrowInvalid:  # pyarrow does not know the scheme
            from fsspec.core import url_to_fs

            filesystem, inner = url_to_fs(inner)
    if not isinstance(filesystem, fs.FileSystem):
        filesystem = fs.PyFileSystem(fs.FSSpecHandler(filesystem))
    fsspec = fsspec_of(filesystem)
    if fsspec is not None:
        inner = fsspec._strip_protocol(inner)
    elif is_local(filesystem):
        return filesystem, local_path(inner)
    return filesystem, inner.rstrip("/") or "/"


def local_path(path: str, module: ModuleType = os.path) -> str:
    """Return the absolute path with slashes, by the rules of *module* (``ntpath`` for Windows)."""
    return module.abspath(module.expanduser(path)).replace(module.sep, "/")


def list_parquet(path: Paths, filesystem: Any = None) -> tuple["pa.fs.FileSystem", list[str]]:
    """List the Parquet files that a *path* of :func:`parquet_source` stands for."""
    return _list(_PARQUET, path, filesystem)


def list_ipc(path: Paths) -> list[str]:
    """List the local Arrow IPC files that a path of :func:`arrow_source` stands for."""
    for each in [path] if isinstance(path, str | os.PathLike) else path:
        scheme = _URI.match(os.fspath(each))
        if scheme and scheme[0] != "file://":
            raise ValueError(
                f"{each!r} is not local; pass a function that opens it, and returns a "
                "RecordBatchReader or record batches"
            )
    return _list(_IPC, path, None)[1]


def stands_for(fs: "pa.fs.FileSystem", path: str, file: str) -> bool:
    """Whether a Parquet file, were it there, would be one of those that *path* stands for."""
    found = fs.get_file_info(path).type
    return _selects(_pattern(path, found), file, _PARQUET.suffixes)


def _list(kind: _Format, path: Any, filesystem: Any) -> tuple["pa.fs.FileSystem", list[str]]:
    is_several = isinstance(path, Iterable) and not isinstance(path, str | os.PathLike)
    paths = list(path) if is_several else [path]
    if not paths:
        raise ValueError("path=[] names no file; pass at least one")
    if not is_path(paths):
        raise TypeError(
            f"path={type(path).__name__} is no path; pass the path of a file or a folder, or a "
            "list of paths"
        )
    resolved = [resolve(each, filesystem) for each in paths]
    fs = resolved[0][0]
    if not all(fs.equals(other) for other, _ in resolved):
        raise ValueError("path=[...] names more than one filesystem; pass files of one")
    files = [file for _, inner in resolved for file in _find(kind, fs, inner)]
    known: dict[str, str] = {}
    for file in files:
        real = os.path.normcase(os.path.realpath(file)) if is_local(fs) else file
        if real in known:
            raise ValueError(
                f"path names {real} more than once, as {known[real]!r} and {file!r}; "
                "name it once, or its rows are used twice"
            )
        known[real] = file
    return fs, files


def _find(kind: _Format, fs: "pa.fs.FileSystem", path: str) -> list[str]:
    """Return the files of one path, sorted."""
    types = pa.fs.FileType
    found = fs.get_file_info(path).type
    if found == types.File:
        for other in (_PARQUET, _IPC):
            if other is not kind and path.endswith(other.suffixes):
                raise ValueError(
                    f"path={path!r} has the name of {other.name}; pass it to {other.reader}"
                )
        return [path]
    if found == types.NotFound and not _WILDCARD.search(path):
        raise FileNotFoundError(f"path={path!r} does not exist")
    pattern = _pattern(path, found)
    fixed = path if found == types.Directory else fixed_folder(path)
    walk = _walk_local if is_local(fs) else _walk_remote
    files = list(walk(fs, fixed, pattern))
    selected = sorted(file for file in files if _selects(pattern, file, kind.suffixes))
    _refuse_tables(selected, files, is_local=is_local(fs))
    rest = sorted(set(files).difference(selected))
    inside = (file for file in rest if _selects(pattern, file, ("",)))
    missed = [f.removeprefix(f"{path}/") for f in inside if _resembles(fs, f, kind)]
    names = ", ".join(shorten(missed, 3))
    if not selected:
        others = f", but {names}; pass a list of the files to read" if missed else ""
        for other in (_PARQUET, _IPC):
            if not missed and any(file.endswith(other.suffixes) for file in rest):
                others = f", but {other.name} files; pass it to {other.reader}"
        raise ValueError(
            f"path={path!r} holds no file whose name ends in {' or '.join(kind.suffixes)}{others}"
        )
    if missed:
        warn(
            f"path={path!r} leaves out {names}, which may be {kind.name} too; "
            "pass a list of the files to read"
        )
    return selected


def fixed_folder(pattern: str) -> str:
    """Return the folder below which all files lie that a pattern can match."""
    return _WILDCARD.split(pattern)[0].rpartition("/")[0] + "/"


def _refuse_tables(selected: Iterable[str], files: Iterable[str], *, is_local: bool) -> None:
    """Raise ValueError if a file lies in a table whose log says which files hold rows.

    On a disk, the table can be above the folder whose *files* were listed.
    """
    folders = {file.rpartition("/")[0] for file in selected}
    folders |= {folder[:i] for folder in folders for i, c in enumerate(folder) if c == "/"}
    if is_local:
        places = (f"{glob.escape(folder)}/{log}/*" for folder in folders for log in _TABLES)
        files = (file for place in places for file in glob.iglob(place))
    for file in sorted(files):
        root, log, name = ["", "", *file.rsplit("/", 2)][-3:]
        if root in folders and log in _TABLES and (log != "metadata" or _ICEBERG_LOG in name):
            table, reader = _TABLES[log]
            raise ValueError(
                f"{root or '/'}: is {table}, and its log says which of its files count; "
                f"read it with arrow_source(lambda: {reader.format(root)})"
            )


def _resembles(fs: "pa.fs.FileSystem", file: str, kind: _Format) -> bool:
    """Whether a file looks like one of a format, by its name or, on a disk, its first bytes."""
    if re.search(rf"\.({kind.endings})(\.(gz|bz2|zst|xz|lz4|zip))?$", file, re.IGNORECASE):
        return True
    if not is_local(fs) or not os.path.isfile(file):
        return False
    with open(file, "rb") as opened:
        return opened.read(len(kind.magic)) == kind.magic


def _pattern(path: str, found: "pa.fs.FileType") -> list[str]:
    """Return the parts of a path; a path that exists is no pattern, whatever its name."""
    return _parts(path if found == pa.fs.FileType.NotFound else glob.escape(path))


def _parts(path: str) -> list[str]:
    return path.strip("/").split("/")


def _walk_local(fs: "pa.fs.FileSystem", folder: str, pattern: list[str]) -> Iterator[str]:
    """Yield all files, and links to nowhere: a link that the path selects is missing data."""

    def raise_unless_gone(err: OSError) -> None:
        if not isinstance(err, FileNotFoundError):
            raise err

    for root, folders, files in os.walk(folder, onerror=raise_unless_gone, followlinks=True):
        root = root.replace(os.sep, "/").rstrip("/")
        folders[:] = [name for name in folders if _may_hold(_parts(f"{root}/{name}"), pattern)]
        yield from (f"{root}/{name}" for name in files)


def _walk_remote(fs: "pa.fs.FileSystem", folder: str, pattern: list[str]) -> Iterator[str]:
    pafs = pa.fs
    selector = pafs.FileSelector(folder.rstrip("/") or "/", recursive=True, allow_not_found=True)
    return (info.path for info in fs.get_file_info(selector) if info.type == pafs.FileType.File)


def _may_hold(folder: list[str], pattern: list[str]) -> bool:
    """Whether a folder can hold files that a pattern selects."""
    for name, part in zip(folder, pattern):
        if part == "**":
            return True
        if not _matches_part(name, part):
            return False
    return not _any_hidden(folder[len(pattern) :])


def _selects(pattern: list[str], file: str, suffixes: tuple[str, ...]) -> bool:
    """Whether a pattern matches a file, or a folder that the file is in."""
    names = _parts(file)
    return _matches(names, pattern) or (
        file.endswith(suffixes)
        and any(
            _matches(names[:depth], pattern) and not _any_hidden(names[depth:])
            for depth in range(1, len(names))
        )
    )


def _matches(names: list[str], pattern: list[str]) -> bool:
    """Whether names match a glob, in which ``**`` stands for any number of them."""
    if not pattern or not names:
        return not names and all(part == "**" for part in pattern)
    if pattern[0] == "**":
        longer = not _any_hidden(names[:1]) and _matches(names[1:], pattern)
        return longer or _matches(names, pattern[1:])
    return _matches_part(names[0], pattern[0]) and _matches(names[1:], pattern[1:])


def _matches_part(name: str, part: str) -> bool:
    spelled_out = not _any_hidden([name]) or part.startswith(name[0])
    return spelled_out and fnmatch.fnmatchcase(name, part)


def _any_hidden(names: list[str]) -> bool:
    return any(name.startswith(_HIDDEN) for name in names)
