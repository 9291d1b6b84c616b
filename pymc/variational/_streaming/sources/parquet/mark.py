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
"""The mark that tells a source that rows are shuffled: by which seed, and from what."""

import dataclasses
import json

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pymc.variational._streaming.errors import StreamError

if TYPE_CHECKING:
    import pyarrow.parquet

__all__ = ["MARK_KEY", "PreshuffleMark", "check_marks", "read_mark"]

MARK_KEY = b"pymc.preshuffle"
_VERSION = 2
_COMMON = "shuffle", "n_rows"
"""What all files of a shuffle agree on."""


@dataclass(frozen=True, slots=True)
class PreshuffleMark:
    """What a file that :func:`preshuffle` wrote knows of its shuffle."""

    shuffle: str
    """Identity of the shuffle: the same for all its files."""
    seed: int
    source: str
    """What was shuffled, for the eye."""
    fingerprint: str
    """Digest of the sizes and footers of the files that were shuffled, and of the columns."""
    n_rows: int
    """Of the whole shuffle."""
    n_files: int
    index: int
    """Place of this file among the files of the shuffle, from 0."""
    data_end: int = 0
    """Byte at which this file's last column ends.

    Libraries copy metadata along when they rewrite rows; the place tells that they did.
    """
    version: int = _VERSION

    def to_metadata(self) -> dict[bytes, bytes]:
        """Return the entry for the Parquet footer."""
        return {MARK_KEY: json.dumps(dataclasses.asdict(self)).encode()}


def read_mark(metadata: "pyarrow.parquet.FileMetaData") -> PreshuffleMark | None:
    """Read the mark in a file's footer; None if it has none, or has another file's.

    Raises
    ------
    StreamError
        If a newer version wrote the mark, in a form that this one does not know.
    """
    entry = (metadata.metadata or {}).get(MARK_KEY)
    if entry is None:
        return None
    values = json.loads(entry)
    if values["version"] > _VERSION:
        raise StreamError(
            f"pre-shuffle mark has version {values['version']}, this PyMC knows {_VERSION}; "
            "update PyMC"
        )
    mark = PreshuffleMark(**values)
    return mark if mark.data_end == _data_end(metadata) else None


def check_marks(marks: Mapping[str, PreshuffleMark | None]) -> PreshuffleMark | None:
    """Check that marked files are one whole shuffle, and nothing else.

    Parameters
    ----------
    marks : mapping of path to PreshuffleMark or None

    Returns
    -------
    PreshuffleMark or None
        The mark of the first file; None if no file is marked.

    Raises
    ------
    StreamError
        If files of two shuffles are mixed, a file of the shuffle is missing or there twice,
        or an unmarked file was added.
    """
    seen: dict[int, str] = {}
    first = next(((path, mark) for path, mark in marks.items() if mark is not None), None)
    if first is None:
        return None
    for path, mark in marks.items():
        _check_company(path, mark, *first)
        other = seen.setdefault(mark.index, path)  # type: ignore[union-attr]
        if other != path:
            raise StreamError(f"{path} and {other} are the same file of a shuffle; remove one")
    missing = first[1].n_files - len(seen)
    if missing:
        raise StreamError(
            f"{first[0]}: {missing} of the {first[1].n_files} files of its shuffle are missing; "
            "pass all of them, or run the same preshuffle(...) again to finish it"
        )
    return first[1]


def _check_company(
    path: str, mark: PreshuffleMark | None, first: str, expected: PreshuffleMark
) -> None:
    if mark is None:
        raise StreamError(
            f"{path}: not shuffled with {first}, which is one of {expected.n_files} pre-shuffled "
            "files; preshuffle all rows together, or remove it"
        )
    if any(getattr(mark, name) != getattr(expected, name) for name in _COMMON):
        raise StreamError(
            f"{path} and {first} belong to two shuffles (seeds {mark.seed} and "
            f"{expected.seed}); rows are exchangeable only within one; "
            "preshuffle all rows together"
        )


def _data_end(metadata: "pyarrow.parquet.FileMetaData") -> int:
    """Return the byte at which the last column of the last row group ends."""
    if not metadata.num_row_groups or not metadata.num_columns:
        return 4
    group = metadata.row_group(metadata.num_row_groups - 1)
    column = group.column(metadata.num_columns - 1)
    offsets = [column.data_page_offset, column.dictionary_page_offset or column.data_page_offset]
    return min(offsets) + column.total_compressed_size
