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
"""The mark in a file's footer which says that its rows are shuffled, and from what."""

import dataclasses
import json

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pymc.variational._streaming.errors import StreamError

if TYPE_CHECKING:
    import pyarrow.parquet

__all__ = ["MARK_KEY", "PreshuffleMark", "check_marks", "chunk_extent", "parse_mark", "read_mark"]

MARK_KEY = b"pymc.preshuffle"
_VERSION = 2


@dataclass(frozen=True, slots=True)
class PreshuffleMark:
    """Facts about a shuffle, in each of the files that :func:`preshuffle` wrote."""

    shuffle: str
    """Identity of the shuffle: the same for all its files."""
    seed: int
    """Seed of the shuffle."""
    source: str
    """Path of the rows that were shuffled, for a person to read."""
    fingerprint: str
    """Digest of what was shuffled: the summary of the rows, and sizes and footers of files."""
    n_rows: int
    """Number of rows in all files of the shuffle."""
    n_files: int
    """Number of files of the shuffle."""
    index: int
    """Position of this file among the files of the shuffle, from 0."""
    data_end: int = 0
    """Byte at which the last column of this file ends.

    Libraries copy metadata along when they rewrite rows; then the column ends elsewhere.
    """
    version: int = _VERSION

    def to_metadata(self) -> dict[bytes, bytes]:
        """Return the key and the value for the metadata of the Parquet footer."""
        return {MARK_KEY: json.dumps(dataclasses.asdict(self)).encode()}


def read_mark(path: str, metadata: "pyarrow.parquet.FileMetaData") -> PreshuffleMark | None:
    """Read the mark in the footer of the file at *path*; None if it has none, or another file's."""
    mark = parse_mark(path, metadata.metadata)
    return mark if mark is not None and mark.data_end == _data_end(metadata) else None


def parse_mark(path: str, metadata: Mapping[bytes, bytes] | None) -> PreshuffleMark | None:
    """Read a mark in *metadata*; one that is corrupt or of another version is a StreamError."""
    entry = (metadata or {}).get(MARK_KEY)
    if entry is None:
        return None
    try:
        values = json.loads(entry)
        if values["version"] != _VERSION:
            raise ValueError(f"version {values['version']} is not {_VERSION}; update PyMC")
        return PreshuffleMark(**values)
    except (KeyError, TypeError, ValueError) as err:
        raise StreamError(f"{path}: its pre-shuffle mark cannot be read ({err})") from err


def check_marks(files: Iterable[Any], *, partial: bool = False) -> PreshuffleMark | None:
    """Return the first mark of *files*, which know ``path`` and ``mark``; None if none is marked.

    Files of two shuffles, a file that is missing (unless *partial*) or there twice, and an unmarked
    one among the others are a StreamError.
    """
    marks = {file.path: file.mark for file in files}
    marked = [(path, mark) for path, mark in marks.items() if mark is not None]
    if not marked:
        return None
    first, expected = marked[0]
    for path in marks.keys() - dict(marked).keys():
        raise StreamError(
            f"{path}: not shuffled with {first}, which is one of {expected.n_files} "
            "pre-shuffled files; preshuffle all rows together, or remove it"
        )
    paths: dict[int, str] = {}
    for path, mark in marked:
        if (mark.shuffle, mark.n_rows) != (expected.shuffle, expected.n_rows):
            raise StreamError(
                f"{path} and {first} belong to two shuffles (seeds {mark.seed} and "
                f"{expected.seed}), or to two parts of a split; pass one of them"
            )
        if paths.setdefault(mark.index, path) != path:
            raise StreamError(
                f"{path} and {paths[mark.index]} are the same file of a shuffle; remove one"
            )
    missing = expected.n_files - len(paths)
    if missing and not partial:
        raise StreamError(
            f"{first}: {missing} of the {expected.n_files} files of its shuffle are missing; "
            "pass all of them, or partial=True to a source if the others are left out on purpose"
        )
    return expected


def _data_end(metadata: "pyarrow.parquet.FileMetaData") -> int:
    """Return the byte at which the last column of the last row group ends."""
    if not metadata.num_row_groups:
        return 4
    group = metadata.row_group(metadata.num_row_groups - 1)
    return chunk_extent(group.column(group.num_columns - 1))[1] if group.num_columns else 4


def chunk_extent(chunk: Any) -> tuple[int, int]:
    """Return first and last byte of a column chunk, by the rule that Arrow reads it with."""
    start = chunk.data_page_offset
    if 0 < (chunk.dictionary_page_offset or 0) < start:
        start = chunk.dictionary_page_offset
    return start, start + chunk.total_compressed_size
