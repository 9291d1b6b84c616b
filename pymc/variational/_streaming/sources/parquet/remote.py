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

"""Reads from object stores: whole or not at all, and tried again within limits."""

import io
import time

from collections.abc import Callable
from typing import Any, TypeVar

__all__ = ["RemoteFile", "fsspec_of", "retried"]

_WAITS = (0.5, 1.0, 2.0, 4.0)
"""Seconds before each new attempt, on top of what the filesystem tries by itself."""
_PATIENCE = 60.0
"""Seconds after the first attempt began in which a new one may begin."""
_FINAL = FileNotFoundError, PermissionError, NotImplementedError

T = TypeVar("T")


def retried(call: Callable[[], T]) -> T:
    """Return what *call* returns, after some attempts if need be.

    Raises
    ------
    OSError
        If every attempt failed: the last one's error, whatever its type was, because each
        fsspec filesystem has types of its own.
    """
    start = time.monotonic()
    for attempt in range(len(_WAITS) + 1):
        try:
            return call()
        except _FINAL:
            raise
        except Exception as err:
            late = time.monotonic() - start > _PATIENCE
            if late or attempt == len(_WAITS):
                text = str(err).strip() or type(err).__name__
                raise OSError(f"{text}; gave up after {attempt + 1} attempts") from err
            time.sleep(_WAITS[attempt])
    raise AssertionError


class RemoteFile(io.RawIOBase):
    """A file whose reads return every byte asked for, or fail.

    A store's answer can be shorter than the range that was asked for.  Parquet readers take
    what came for a whole page, and decode whatever memory held after it.  pyarrow's own S3
    filesystem does not tell how much came: there only page checksums help.

    Parameters
    ----------
    fs : pyarrow.fs.FileSystem
        Not a local one.
    path : str
        Inside *fs*.
    size : int
        Bytes.
    """

    def __init__(self, fs: Any, path: str, size: int):
        self._fs = fs
        self._path = path
        self._size = size
        self._place = 0
        self._handle: Any = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._place = offset + {0: 0, 1: self._place, 2: self._size}[whence]
        return self._place

    def read(self, size: int = -1) -> bytes:
        left = self._size - self._place
        length = max(0, left if size < 0 else min(size, left))
        data = retried(lambda: self._read_whole(length)) if length else b""
        self._place += length
        return data

    def close(self) -> None:
        if self._handle is not None:
            self._handle.close()
        super().close()

    def _read_whole(self, length: int) -> bytes:
        data = self._read_range(length)
        if len(data) != length:
            raise OSError(f"{len(data)} bytes came where {length} were asked for")
        return data

    def _read_range(self, length: int) -> bytes:
        fsspec = fsspec_of(self._fs)
        if fsspec is not None:  # its file objects read megabytes ahead, at each column anew
            return fsspec.cat_file(self._path, start=self._place, end=self._place + length)
        if self._handle is None:
            self._handle = self._fs.open_input_file(self._path)
        return self._handle.read_at(length, self._place)


def fsspec_of(fs: Any) -> Any:
    """Return the fsspec filesystem that *fs* wraps, or None."""
    return getattr(getattr(fs, "handler", None), "fs", None)
