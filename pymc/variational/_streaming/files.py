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
"""Parquet files on any filesystem: which there are, and whether they are still the same."""

import fnmatch
import hashlib
import os
import re

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from pymc.variational._streaming.errors import StreamError

if TYPE_CHECKING:
    import pyarrow.fs
    import pyarrow.parquet

__all__ = ["ParquetInput", "import_pyarrow", "inspect", "list_parquet", "read_batches", "resolve"]

_MAGIC = b"PAR1"
_WILDCARD = re.compile(r"[*?\[]")
_READ_BUFFER = 1 << 16
"""Bytes.  Without a read buffer, reading one column chunk holds all of it."""
_REMOTE_READ_BUFFER = 1 << 20
"""Bytes.  Each read from an object store is a request, which takes many milliseconds."""


@dataclass(frozen=True, slots=True)
class ParquetInput:
    """One Parquet file as it was when it was first seen."""

    path: str
    """Path inside the filesystem."""
    size: int
    """Bytes."""
    mtime_ns: int | None
    """Time of the last modification, where the filesystem knows it."""
    digest: str
    """Digest of the footer, which holds the schema, row counts and page offsets."""
    group_rows: tuple[int, ...]
    """Rows of each row group."""

    @property
    def n_rows(self) -> int:
        return sum(self.group_rows)


def import_pyarrow() -> Any:
    """Import pyarrow on first use, and say how to get it where it is missing."""
    try:
        import pyarrow
        import pyarrow.fs
        import pyarrow.parquet
    except ImportError as err:
        raise ImportError(
            "streaming from Parquet and Arrow needs pyarrow; "
            "install it with `pip install pyarrow` or `conda install -c conda-forge pyarrow`"
        ) from err
    return pyarrow


def resolve(path: str | os.PathLike, filesystem: Any = None) -> tuple["pyarrow.fs.FileSystem", str]:
    """Find the filesystem of *path*, and the path inside it.

    Parameters
    ----------
    path : str or PathLike
        A local path, or a URI that pyarrow or fsspec understands (``s3://bucket/key``).
    filesystem : pyarrow.fs.FileSystem or fsspec filesystem, optional
        Where *path* lives, if it is not a URI and not local.
    """
    fs = import_pyarrow().fs
    path = os.fspath(path)
    if filesystem is not None:
        if not isinstance(filesystem, fs.FileSystem):
            filesystem = fs.PyFileSystem(fs.FSSpecHandler(filesystem))
        return filesystem, path.rstrip("/") or "/"
    if "://" not in path:
        return fs.LocalFileSystem(), os.path.abspath(path)
    try:
        return fs.FileSystem.from_uri(path)
    except import_pyarrow().ArrowInvalid:
        return _resolve_with_fsspec(path)


def list_parquet(
    path: str | os.PathLike | Sequence[str | os.PathLike], filesystem: Any = None
) -> tuple["pyarrow.fs.FileSystem", list[str]]:
    """List the Parquet files of a directory, file, glob or list, sorted by name.

    A directory is searched recursively for ``*.parquet``; names that start with ``_`` or
    ``.`` are skipped.  A list keeps its own order.
    """
    if not isinstance(path, str | os.PathLike):
        listed = [list_parquet(p, filesystem) for p in path]
        if not listed:
            raise ValueError("path=[] names no file; pass at least one Parquet file")
        return listed[0][0], [file for _, files in listed for file in files]
    fs, inner = resolve(path, filesystem)
    files = _find(fs, inner)
    if not files:
        raise ValueError(f"path={os.fspath(path)!r} holds no Parquet file; expected *.parquet")
    return fs, files


def inspect(fs: "pyarrow.fs.FileSystem", path: str) -> tuple[ParquetInput, Any]:
    """Read the footer of *path*: what identifies the file, and its Parquet metadata."""
    pa = import_pyarrow()
    try:
        info = fs.get_file_info(path)
        footer = _read_footer(fs, path)
        metadata = pa.parquet.read_metadata(pa.BufferReader(_MAGIC + footer))
    except (OSError, pa.ArrowException) as err:
        raise StreamError(f"{path}: not a readable Parquet file ({_first_line(err)})") from err
    group_rows = tuple(metadata.row_group(g).num_rows for g in range(metadata.num_row_groups))
    digest = hashlib.blake2b(footer, digest_size=16).hexdigest()
    return ParquetInput(path, info.size, info.mtime_ns, digest, group_rows), metadata


def read_batches(
    fs: "pyarrow.fs.FileSystem",
    known: ParquetInput,
    *,
    columns: Sequence[str] | None = None,
    row_groups: Iterable[int] | None = None,
    batch_rows: int = 1 << 16,
) -> Iterator[tuple[int, int, "pyarrow.RecordBatch"]]:
    """Read a file that must not have changed since *known* was taken, in bounded memory.

    Reads are buffered and never ahead, so memory does not depend on the size of the file or
    of its row groups; page checksums are verified where the file has them.

    Yields
    ------
    row_group : int
    first_row : int
        Of the batch, inside its row group.
    batch : pyarrow.RecordBatch
        At most *batch_rows* rows, with the columns in the order asked for.

    Raises
    ------
    StreamError
        If the file changed, vanished, cannot be decoded, or is shorter than its footer says.
    """
    pa = import_pyarrow()
    local = isinstance(fs, pa.fs.LocalFileSystem)
    found, metadata = inspect(fs, known.path)
    if found != known:
        raise StreamError(
            f"{known.path}: changed since the source was made ({_difference(known, found)}); "
            "make the source anew"
        )
    try:
        with (
            fs.open_input_file(known.path) as handle,
            pa.parquet.ParquetFile(
                handle,
                metadata=metadata,
                pre_buffer=False,
                buffer_size=_READ_BUFFER if local else _REMOTE_READ_BUFFER,
                page_checksum_verification=True,
            ) as file,
        ):
            groups = range(metadata.num_row_groups) if row_groups is None else row_groups
            for group in groups:
                yield from _read_row_group(file, known, group, columns, batch_rows)
    except (OSError, pa.ArrowException) as err:
        raise StreamError(f"{known.path}: reading failed ({_first_line(err)})") from err


def _read_row_group(
    file: "pyarrow.parquet.ParquetFile",
    known: ParquetInput,
    group: int,
    columns: Sequence[str] | None,
    batch_rows: int,
) -> Iterator[tuple[int, int, "pyarrow.RecordBatch"]]:
    row = 0
    for batch in file.iter_batches(
        batch_rows, row_groups=[group], columns=columns, use_threads=False
    ):
        yield group, row, batch if columns is None else batch.select(columns)
        row += batch.num_rows
    if row != known.group_rows[group]:
        raise StreamError(
            f"{known.path}: row group {group} gave {row} rows, "
            f"its footer promises {known.group_rows[group]}"
        )


def _resolve_with_fsspec(uri: str) -> tuple["pyarrow.fs.FileSystem", str]:
    try:
        from fsspec.core import url_to_fs
    except ImportError as err:
        raise ImportError(
            f"path={uri!r} needs fsspec; install it with `pip install fsspec`"
        ) from err
    fs = import_pyarrow().fs
    filesystem, path = url_to_fs(uri)
    return fs.PyFileSystem(fs.FSSpecHandler(filesystem)), path


def _find(fs: "pyarrow.fs.FileSystem", inner: str) -> list[str]:
    """List the Parquet files that *inner*, a file, directory or glob, stands for."""
    pafs = import_pyarrow().fs
    info = fs.get_file_info(inner)
    if info.type == pafs.FileType.File:
        return [inner]
    if info.type == pafs.FileType.Directory:
        return _data_files(fs, inner)
    if not _WILDCARD.search(inner):
        raise FileNotFoundError(f"path={inner!r} does not exist")
    fixed = _WILDCARD.split(inner)[0].rpartition("/")[0]
    below = fs.get_file_info(pafs.FileSelector(fixed or "/", recursive=True, allow_not_found=True))
    parts = inner.split("/")
    matches = [i for i in below if _matches(i.path.split("/"), parts)]
    files = [i.path for i in matches if i.type == pafs.FileType.File]
    folders = [i.path for i in matches if i.type == pafs.FileType.Directory]
    return sorted(files + [f for folder in folders for f in _data_files(fs, folder)])


def _data_files(fs: "pyarrow.fs.FileSystem", folder: str) -> list[str]:
    selector = import_pyarrow().fs.FileSelector(folder, recursive=True)
    paths = [info.path for info in fs.get_file_info(selector)]
    inside = {path: path[len(folder) :].strip("/").split("/") for path in paths}
    return sorted(
        path
        for path, names in inside.items()
        if path.endswith(".parquet") and not any(name.startswith(("_", ".")) for name in names)
    )


def _matches(names: list[str], patterns: list[str]) -> bool:
    """Whether path components match a glob's, ``**`` standing for any number of them."""
    if not patterns or not names:
        return not names and all(pattern == "**" for pattern in patterns)
    if patterns[0] == "**":
        return _matches(names, patterns[1:]) or _matches(names[1:], patterns)
    return fnmatch.fnmatchcase(names[0], patterns[0]) and _matches(names[1:], patterns[1:])


def _read_footer(fs: "pyarrow.fs.FileSystem", path: str) -> bytes:
    """Return the footer of a Parquet file with the length and magic that end it."""
    with fs.open_input_file(path) as handle:
        size = handle.size()
        tail = handle.read_at(8, size - 8) if size >= 12 else b""
        if tail[4:] != _MAGIC:
            raise OSError("it does not end like a Parquet file; truncated, or another format")
        length = int.from_bytes(tail[:4], "little") + 8
        if length + len(_MAGIC) > size:
            raise OSError("its footer is longer than the file; truncated, or corrupt")
        return handle.read_at(length, size - length)


def _difference(known: ParquetInput, found: ParquetInput) -> str:
    names = [field.name for field in fields(known)]
    changed = [n for n in names if getattr(known, n) != getattr(found, n)]
    return ", ".join(changed).replace("mtime_ns", "mtime").replace("digest", "footer")


def _first_line(err: BaseException) -> str:
    return str(err).strip().partition("\n")[0] or type(err).__name__
