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

"""Reads from object stores that return every byte or fail, and are tried again within limits."""

import io
import logging
import re
import time

from collections.abc import Callable
from itertools import count
from typing import Any, TypeVar

__all__ = ["RemoteFile", "fsspec_of", "retried"]

logger = logging.getLogger(__name__)

_WAITS = (0.5, 1.0, 2.0, 4.0)
"""Seconds before each new attempt, besides the attempts that the filesystem makes by itself."""
_DEADLINE = 60.0
"""Seconds after the start of the first attempt until which a new one may start."""
_FINAL = FileNotFoundError, PermissionError, NotImplementedError
_EXPIRED = re.compile(r"expired.{0,9}(token|credential)|(token|credential).{0,19}expired", re.I)
_REFUSED = re.compile(r"HTTP status 40[013]\b")
"""What pyarrow says of an expired credential where it misses the text of the answer."""

T = TypeVar("T")


def retried(call: Callable[[], T]) -> T:
    """Return what *call* returns, after some attempts if need be.

    Any error of the last attempt becomes an OSError, because each fsspec filesystem has error
    types of its own.
    """
    deadline = time.monotonic() + _DEADLINE
    for attempt in count(1):
        try:
            return call()
        except Exception as err:
            text = str(err).strip() or type(err).__name__
            if _EXPIRED.search(text) and not isinstance(err, FileNotFoundError):
                raise PermissionError(f"{text}; renew the credential, which has expired") from err
            if isinstance(err, _FINAL):
                raise
            if attempt > len(_WAITS) or time.monotonic() > deadline:
                hint = "; renew the credential if it has expired" if _REFUSED.search(text) else ""
                raise OSError(f"{text}; gave up after {attempt} attempts{hint}") from err
            logger.warning(f"{text}; attempt {attempt + 1} follows in {_WAITS[attempt - 1]} s")
            time.sleep(_WAITS[attempt - 1])
    raise AssertionError


class RemoteFile(io.RawIOBase):
    """A file of *size* bytes whose reads return every byte asked for, or fail.

    A store's answer can be shorter than the range that was asked for.  Parquet readers take
    the answer for a whole page, and decode whatever the memory behind it held.  pyarrow's own S3
    filesystem does not say how many bytes came: there only page checksums help.
    """

    def __init__(self, fs: Any, path: str, size: int):
        self._fs = fs
        self._path = path
        self._size = size
        self._position = 0
        self._handle: Any = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + {0: 0, 1: self._position, 2: self._size}[whence]
        return self._position

    def read(self, size: int = -1) -> bytes:
        left = self._size - self._position
        length = max(0, left if size < 0 else min(size, left))
        data = retried(lambda: self._read_range(length)) if length else b""
        self._position += length
        return data

    def close(self) -> None:
        if self._handle is not None:
            self._handle.close()
        super().close()

    def _read_range(self, length: int) -> bytes:
        fsspec, start = fsspec_of(self._fs), self._position
        if fsspec is not None:  # its file objects read megabytes ahead, once more for each column
            data = fsspec.cat_file(self._path, start=start, end=start + length)
        else:
            self._handle = self._handle or self._fs.open_input_file(self._path)
            data = self._handle.read_at(length, start)
        if len(data) != length:
            raise OSError(f"got {len(data)} bytes where {length} were asked for")
        return data


def fsspec_of(fs: Any) -> Any:
    """Return the fsspec filesystem that *fs* wraps, or None."""
    return getattr(getattr(fs, "handler", None), "fs", None)
