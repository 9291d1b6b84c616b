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
"""Parquet files on any filesystem, and whether they are still the same."""

import hashlib

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pymc.variational._streaming.errors import StreamError
from pymc.variational._streaming.sources.parquet.footer import MAGIC, check_footer, read_footer
from pymc.variational._streaming.sources.parquet.remote import RemoteFile, fsspec_of, retried

if TYPE_CHECKING:
    import pyarrow.fs
    import pyarrow.parquet

__all__ = [
    "ParquetInput",
    "import_pyarrow",
    "inspect",
    "is_local",
    "read_batches",
    "read_metadata",
]

_UNREADABLE = "not a readable Parquet file"
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

    def place(self, groups: Sequence[int], row: int) -> tuple[int, int]:
        """Return the row group of a row of *groups*, read one after the other, and its row there."""
        for group in groups:
            if row < self.group_rows[group]:
                return group, row
            row -= self.group_rows[group]
        raise IndexError(f"row groups {list(groups)} end {row} rows before")


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


def is_local(fs: "pyarrow.fs.FileSystem") -> bool:
    return isinstance(fs, import_pyarrow().fs.LocalFileSystem)


def inspect(fs: "pyarrow.fs.FileSystem", path: str) -> tuple[ParquetInput, Any]:
    """Read the footer of *path*: what identifies the file, and its Parquet metadata.

    Raises
    ------
    StreamError
        If the footer cannot be read, or contradicts itself or the size of the file.
    """
    with _open(fs, path) as opened, _blaming(path, _UNREADABLE):
        metadata = opened.parse()
        metadata.schema.to_arrow_schema()  # fails here, by name, or nowhere
        group_rows = tuple(metadata.row_group(g).num_rows for g in range(metadata.num_row_groups))
        check_footer(opened.footer, opened.size - len(opened.footer))
    return ParquetInput(path, *opened.identity, group_rows), metadata


def read_metadata(fs: "pyarrow.fs.FileSystem", known: ParquetInput) -> Any:
    """Read the Parquet metadata of a file that must not have changed since *known* was taken."""
    with _open(fs, known.path) as opened:
        _require_unchanged(known, opened)
        return opened.parse()


def read_batches(
    fs: "pyarrow.fs.FileSystem",
    known: ParquetInput,
    *,
    columns: Sequence[str] | None = None,
    row_groups: Sequence[int] | None = None,
    batch_rows: int,
) -> Iterator[tuple[int, "pyarrow.RecordBatch"]]:
    """Read a file that must not have changed since *known* was taken, in bounded memory.

    Reads are buffered and never ahead, so memory does not depend on the size of the file or
    of its row groups; page checksums are verified where the file has them.

    Yields
    ------
    first_row : int
        Of the batch, counted over the row groups that are read; see ``ParquetInput.place``.
    batch : pyarrow.RecordBatch
        At most *batch_rows* rows, with the columns in the order asked for.

    Raises
    ------
    StreamError
        If the file changed, vanished, cannot be decoded, or is shorter than its footer says.
    """
    with _open(fs, known.path) as opened, _blaming(known.path, "reading failed"):
        _require_unchanged(known, opened)
        groups = range(len(known.group_rows)) if row_groups is None else row_groups
        local = is_local(fs)
        with import_pyarrow().parquet.ParquetFile(
            opened.handle,
            # A second read is cheaper than a call more on a disk, and dearer on an object store.
            metadata=None if local else opened.parse(),
            pre_buffer=False,
            buffer_size=_READ_BUFFER if local else _REMOTE_READ_BUFFER,
            page_checksum_verification=True,
        ) as file:
            yield from _read_row_groups(file, known, groups, columns, batch_rows)
        last = _get_info(fs, known.path)
        if (last.size, _mtime_ns(fs, last)) != (known.size, known.mtime_ns):
            raise StreamError(f"{known.path}: changed while it was read; make the source anew")


def _read_row_groups(
    file: "pyarrow.parquet.ParquetFile",
    known: ParquetInput,
    groups: Sequence[int],
    columns: Sequence[str] | None,
    batch_rows: int,
) -> Iterator[tuple[int, "pyarrow.RecordBatch"]]:
    row, promised = 0, sum(known.group_rows[group] for group in groups)
    for batch in file.iter_batches(
        batch_rows, row_groups=list(groups), columns=columns, use_threads=False
    ):
        first, row = row, row + batch.num_rows
        if columns is not None and batch.schema.names != list(columns):
            batch = batch.select(columns)
        yield first, batch
        del batch  # while the next one is read
    if row != promised:
        raise StreamError(
            f"{known.path}: {len(groups)} row groups gave {row} rows, "
            f"its footer promises {promised}"
        )


@dataclass(frozen=True, slots=True)
class _Opened:
    """An open file."""

    handle: Any
    size: int
    mtime_ns: int | None
    footer: bytes

    @property
    def identity(self) -> tuple[int, int | None, str]:
        """Return size, time of modification, and digest."""
        return self.size, self.mtime_ns, hashlib.blake2b(self.footer, digest_size=16).hexdigest()

    def parse(self) -> Any:
        """Return the Parquet metadata in the footer."""
        pa = import_pyarrow()
        return pa.parquet.read_metadata(pa.BufferReader(MAGIC + self.footer))


@contextmanager
def _open(fs: "pyarrow.fs.FileSystem", path: str) -> Iterator[_Opened]:
    pa = import_pyarrow()
    with ExitStack() as stack:
        with _blaming(path, _UNREADABLE):
            info = _get_info(fs, path)
            if is_local(fs):
                handle = fs.open_input_file(path)
                size = handle.size()
            else:
                handle = pa.PythonFile(RemoteFile(fs, path, info.size), mode="r")
                size = info.size
            stack.enter_context(handle)
            footer = read_footer(handle, size)
            mtime_ns = _mtime_ns(fs, info)
        yield _Opened(handle, size, mtime_ns, footer)


@contextmanager
def _blaming(path: str, problem: str) -> Iterator[None]:
    """Turn what goes wrong with a file into an error that names it."""
    kinds = OSError, UnicodeDecodeError, import_pyarrow().ArrowException
    try:
        yield
    except kinds as err:
        raise StreamError(f"{path}: {problem} ({_first_line(err)})") from err


def _get_info(fs: "pyarrow.fs.FileSystem", path: str) -> "pyarrow.fs.FileInfo":
    """Ask the filesystem itself, not what fsspec remembers of it."""
    if is_local(fs):
        return fs.get_file_info(path)
    fsspec = fsspec_of(fs)
    if fsspec is not None:
        fsspec.invalidate_cache(path)
    info = retried(lambda: fs.get_file_info(path))
    if info.type != import_pyarrow().fs.FileType.File:
        raise FileNotFoundError(f"no such file: {path}")
    return info


def _mtime_ns(fs: "pyarrow.fs.FileSystem", info: "pyarrow.fs.FileInfo") -> int | None:
    """Return the time of the last modification; fsspec has a method for it."""
    fsspec = fsspec_of(fs)
    if fsspec is None or info.mtime_ns is not None:
        return info.mtime_ns
    try:
        return int(1e9 * retried(lambda: fsspec.modified(info.path)).timestamp())
    except (NotImplementedError, OSError):
        return None


def _require_unchanged(known: ParquetInput, opened: _Opened) -> None:
    names = ("size", "mtime", "footer")
    pairs = zip(names, (known.size, known.mtime_ns, known.digest), opened.identity)
    changed = [name for name, before, now in pairs if before != now]
    if changed:
        raise StreamError(
            f"{known.path}: changed since the source was made ({', '.join(changed)}); "
            "make the source anew"
        )


def _first_line(err: BaseException) -> str:
    return str(err).strip().partition("\n")[0] or type(err).__name__
