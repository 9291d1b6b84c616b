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

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import batched
from typing import TYPE_CHECKING, Any

from pymc.variational._streaming.errors import StreamError, warn
from pymc.variational._streaming.sources.parquet.mark import (
    PreshuffleMark,
    chunk_extent,
    read_mark,
)
from pymc.variational._streaming.sources.parquet.remote import RemoteFile, fsspec_of, retried
from pymc.variational._streaming.utils import digest

__all__ = [
    "Inspected",
    "ParquetInput",
    "as_stream_error",
    "import_pyarrow",
    "inspect_all",
    "is_local",
    "is_unchanged",
    "open_parquet",
    "pa",
    "warn_of_copies",
    "watch",
]

_MAGIC = b"PAR1"
_ENCRYPTED_MAGIC = b"PARE"
_SIGNATURE = 28
"""Bytes that sign a footer which can be read, of a file whose columns cannot."""
_TAIL = 1 << 16
"""Bytes read at once; most footers are smaller, and each read of an object store takes long."""
_READ_BUFFER = 1 << 16
"""Bytes.  Without a read buffer, reading one column chunk holds all of it."""
_REMOTE_READ_BUFFER = 1 << 20
"""Bytes.  Each read from an object store is a request, which takes many milliseconds."""
_MAX_REQUESTS = 32
"""Files of an object store that are opened at once."""
_TIMES = {"coerce_int96_timestamp_unit": "us"}
"""INT96 timestamps are read in microseconds; in nanoseconds, those after 2262 would wrap around."""
_UNREADABLE = "not a readable Parquet file"
_ENCRYPTED = (
    "it is encrypted; pass arrow_source a function that returns "
    "ParquetFile(path, decryption_properties=...).iter_batches()"
)


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


class _Pyarrow:
    """The package, imported when it is used: arrays are streamed without it."""

    def __getattr__(self, name: str) -> Any:
        return getattr(import_pyarrow(), name)


if TYPE_CHECKING:
    import pyarrow as pa
else:
    pa = _Pyarrow()


Inspected = tuple["ParquetInput", "pa.Schema", "pa.parquet.FileMetaData"]
"""A file, and what its footer says."""
_Identity = tuple[int, int | None, str]
"""Size of a file, time of its last modification, and digest of its footer."""


@dataclass(slots=True)
class ParquetInput:
    """One Parquet file as it was when it was first opened."""

    path: str
    """Path inside the filesystem."""
    size: int
    """Size of the file in bytes."""
    mtime_ns: int | None
    """Time of the last modification, where the filesystem knows it."""
    digest: str
    """Digest of the footer, which holds the schema, row counts and page offsets."""
    part_rows: tuple[int, ...]
    """Number of rows of each row group."""
    mark: PreshuffleMark | None = None
    """The mark in the footer, where the file is still the one that it was written to."""
    checked: bool = field(default=False, compare=False)
    """Whether the footer is known not to contradict itself, which is checked on first use."""

    @property
    def n_rows(self) -> int:
        return sum(self.part_rows)

    def place(self, groups: Sequence[int], row: int) -> tuple[int, int]:
        """Return the row group of a row of *groups*, read one after the other, and its row there."""
        for group in groups:
            if row < self.part_rows[group]:
                break
            row -= self.part_rows[group]
        return group, row


def is_local(fs: "pa.fs.FileSystem") -> bool:
    return isinstance(fs, pa.fs.LocalFileSystem)


def _inspect(fs: "pa.fs.FileSystem", path: str) -> Inspected:
    """Read the footer of *path*; one that cannot be read is a StreamError."""
    with _open(fs, path) as (handle, footer, identity), as_stream_error(path, _UNREADABLE):
        metadata = _parse(footer)
        if len(footer) == metadata.serialized_size + 8 + _SIGNATURE:  # Arrow would abort later
            raise OSError(_ENCRYPTED)
        rows = tuple(metadata.row_group(g).num_rows for g in range(metadata.num_row_groups))
        if min(rows, default=0) < 0 or sum(rows) != metadata.num_rows:
            raise OSError("its footer and its row groups hold different numbers of rows; corrupt")
        file = ParquetInput(path, *identity, rows, read_mark(path, metadata))
        schema = pa.parquet.ParquetFile(handle, metadata=metadata, **_TIMES).schema_arrow
        return file, schema, metadata


def _parse(footer: bytes) -> "pa.parquet.FileMetaData":
    return pa.parquet.read_metadata(pa.BufferReader(_MAGIC + footer))


def inspect_all(fs: "pa.fs.FileSystem", paths: Sequence[str]) -> Iterator[Inspected]:
    """Inspect files in their order, several at a time where each takes the time of some requests."""
    fsspec = fsspec_of(fs)
    if is_local(fs) or not (fsspec is None or getattr(fsspec, "async_impl", False)):
        yield from map(partial(_inspect, fs), paths)
        return
    with ThreadPoolExecutor(_MAX_REQUESTS) as pool:
        for some in batched(paths, 8 * _MAX_REQUESTS):
            yield from pool.map(partial(_inspect, fs), some)


def _check_footer(file: ParquetInput, metadata: "pa.parquet.FileMetaData") -> None:
    """Raise StreamError if types, counts or offsets in a footer contradict each other.

    A footer has no checksum, and Arrow trusts it: a flipped bit there could give other rows.
    """
    leaves = [metadata.schema.column(j) for j in range(metadata.num_columns)]
    extents = []
    with as_stream_error(file.path, _UNREADABLE):
        for number, group in enumerate(map(metadata.row_group, range(metadata.num_row_groups))):
            chunks = [group.column(j) for j in range(group.num_columns)]
            agree = (_agree(chunk, leaf, group.num_rows) for chunk, leaf in zip(chunks, leaves))
            if len(chunks) != len(leaves) or not all(agree):
                raise OSError(
                    f"its footer describes row group {number} against its schema; corrupt"
                )
            if group.num_rows:  # the chunks of an empty row group need not have a place
                extents += [chunk_extent(chunk) for chunk in chunks]
        free, last = len(_MAGIC), file.size - metadata.serialized_size - 8
        for start, end in sorted(extents):
            if not free <= start <= end <= last:
                raise OSError(f"its footer puts a column at bytes {start} to {end}; corrupt")
            free = end


def warn_of_copies(fs: "pa.fs.FileSystem", files: Sequence[ParquetInput]) -> None:
    """Warn of the first file with the size, the footer and the sampled bytes of another one."""
    alike = defaultdict(list)
    for file in files:
        if file.n_rows:
            alike[file.size, file.digest].append(file.path)
    for paths in alike.values():
        known: dict[str, str] = {}
        for path in paths if len(paths) > 1 else ():
            first = known.setdefault(_sample(fs, path), path)
            if first is not path:
                warn(
                    f"{path} looks like a copy of {first}, so its rows are used twice; "
                    "remove one of them"
                )
                return


@contextmanager
def open_parquet(fs: "pa.fs.FileSystem", known: ParquetInput) -> Iterator["pa.parquet.ParquetFile"]:
    """Open a file that must not change from when *known* was taken until it is closed.

    Reads are buffered and never ahead, so memory does not depend on the size of the file or of its
    row groups.
    """
    path = known.path
    with _open(fs, path) as (handle, footer, found), as_stream_error(path, "reading failed"):
        if not _is_same(fs, known, found):
            raise StreamError(f"{path}: changed since the source was made; make the source anew")
        with (
            watch(path, lambda: is_unchanged(fs, known)),
            pa.parquet.ParquetFile(
                handle,
                # On a disk, Arrow's own reading of the footer costs less than parsing these bytes.
                metadata=None if is_local(fs) else _parse(footer),
                pre_buffer=False,
                buffer_size=_READ_BUFFER if is_local(fs) else _REMOTE_READ_BUFFER,
                page_checksum_verification=True,
                **_TIMES,
            ) as file,
        ):
            if not known.checked:
                _check_footer(known, file.metadata)
                known.checked = True
            yield file


def is_unchanged(fs: "pa.fs.FileSystem", known: ParquetInput) -> bool:
    """Whether a file is the known one still, which its footer tells where its time does not."""
    with as_stream_error(known.path, _UNREADABLE):
        if _size_and_mtime(fs, known.path) == (known.size, known.mtime_ns or -1):
            return True
    try:
        with _open(fs, known.path) as (_, _, found):
            return _is_same(fs, known, found)
    except StreamError:
        if is_local(fs):
            return False
        raise  # a store may be away for a while


def _is_same(fs: "pa.fs.FileSystem", known: ParquetInput, found: _Identity) -> bool:
    """Compare a file with the known one: on a disk, another time alone is no change.

    An object store gives another time only to another object.
    """
    size, mtime_ns, footer = found
    same = (size, footer) == (known.size, known.digest)
    return same and (is_local(fs) or mtime_ns == known.mtime_ns)


@contextmanager
def watch(path: str, is_same: Callable[[], bool]) -> Iterator[None]:
    """Name a file that changes meanwhile as changed, whatever error that causes."""
    fault = None
    try:
        yield
    except Exception as err:
        fault = err
    try:
        same = is_same()
    except Exception as err:  # nobody can tell
        raise fault or err
    if not same:
        raise StreamError(f"{path}: changed while it was read; make the source anew") from fault
    if fault is not None:
        raise fault


@contextmanager
def _open(fs: "pa.fs.FileSystem", path: str) -> Iterator[tuple[Any, bytes, _Identity]]:
    """Open a file to read, and read its footer, with the length and the magic bytes that end it."""
    with as_stream_error(path, _UNREADABLE):
        size, mtime_ns = _size_and_mtime(fs, path)
        if is_local(fs):
            handle = fs.open_input_file(path)
        else:
            handle = pa.PythonFile(RemoteFile(fs, path, size), mode="r")
    with handle:
        with as_stream_error(path, _UNREADABLE):
            footer = _read_footer(handle, size)
        yield handle, footer, (size, mtime_ns, digest(footer))


def _read_footer(handle: Any, size: int) -> bytes:
    tail = handle.read_at(min(size, _TAIL), max(0, size - _TAIL))
    if tail[-4:] == _ENCRYPTED_MAGIC:
        raise OSError(_ENCRYPTED)
    if size < 12 or tail[-4:] != _MAGIC:
        raise OSError("it does not end like a Parquet file; truncated, or another format")
    length = int.from_bytes(tail[-8:-4], "little") + 8
    if length + len(_MAGIC) > size:
        raise OSError("its footer is longer than the file; truncated, or corrupt")
    return tail[-length:] if length <= len(tail) else handle.read_at(length, size - length)


def _sample(fs: "pa.fs.FileSystem", path: str) -> str:
    """Return a digest of bytes from the start and the middle: equal footers can have other rows."""
    with _open(fs, path) as (handle, _, (size, *_)), as_stream_error(path, _UNREADABLE):
        return digest(*(handle.read_at(min(size - at, _TAIL), at) for at in (0, size // 2)))


def _agree(chunk: Any, leaf: Any, n_rows: int) -> bool:
    """Whether the metadata of a column chunk fit the schema and the number of rows."""
    types = chunk.path_in_schema == leaf.path and chunk.physical_type == leaf.physical_type
    return types and (leaf.max_repetition_level > 0 or chunk.num_values == n_rows)


@contextmanager
def as_stream_error(path: str, problem: str) -> Iterator[None]:
    """Turn an error of Arrow or of the filesystem into a StreamError that names the file."""
    kinds = OSError, UnicodeDecodeError, pa.ArrowException
    try:
        yield
    except kinds as err:
        first_line = str(err).strip().partition("\n")[0] or type(err).__name__
        raise StreamError(f"{path}: {problem} ({first_line})") from err


def _size_and_mtime(fs: "pa.fs.FileSystem", path: str) -> tuple[int, int | None]:
    """Ask the filesystem for the size of a file and the time of its last modification."""
    if is_local(fs):
        info = fs.get_file_info(path)
        return info.size, info.mtime_ns
    fsspec = fsspec_of(fs)
    if fsspec is not None:
        fsspec.invalidate_cache(path)
    info = retried(lambda: fs.get_file_info(path))
    if info.type != pa.fs.FileType.File:
        raise FileNotFoundError(f"no such file: {path}")
    if info.size is None:
        raise OSError("the filesystem does not tell its size; copy it to a disk")
    if fsspec is None or info.mtime_ns is not None:
        return info.size, info.mtime_ns
    try:  # fsspec has a method of its own for the time
        return info.size, int(1e9 * retried(lambda: fsspec.modified(path)).timestamp())
    except (NotImplementedError, OSError):
        return info.size, None
