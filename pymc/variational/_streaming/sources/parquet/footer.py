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
"""The footer of a Parquet file: its bytes, and whether it agrees with itself and the file.

Parquet has no checksum for its footer.  pyarrow takes counts and places in it on trust, and ends
the process where a column's metadata contradict the schema; so they are read here first.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pymc.variational._streaming.sources.parquet.thrift import Struct, read_struct

__all__ = ["MAGIC", "check_footer", "read_footer"]

MAGIC = b"PAR1"
_TAIL = 1 << 16
"""Bytes read at once; most footers are smaller, and each read of an object store takes long."""
_REQUIRED, _OPTIONAL, _REPEATED = 0, 1, 2
_BYTE_ARRAY = 6


def read_footer(handle: Any, size: int) -> bytes:
    """Return the footer of an open file of *size* bytes, with the length and magic that end it."""
    tail = handle.read_at(min(size, _TAIL), max(0, size - _TAIL))
    if size < 12 or tail[-4:] != MAGIC:
        raise OSError("it does not end like a Parquet file; truncated, or another format")
    length = int.from_bytes(tail[-8:-4], "little") + 8
    if length + len(MAGIC) > size:
        raise OSError("its footer is longer than the file; truncated, or corrupt")
    return tail[-length:] if length <= len(tail) else handle.read_at(length, size - length)


def check_footer(footer: bytes, data_end: int) -> None:
    """Check that the counts, types and places in a footer agree.

    Parameters
    ----------
    footer : bytes
    data_end : int
        Byte of the file at which the footer begins.

    Raises
    ------
    OSError
        If a count contradicts another one, a column contradicts the schema, or columns share
        bytes or lie outside the file.
    """
    try:
        _check_structure(read_struct(footer), data_end)
    except (AttributeError, LookupError, StopIteration, TypeError, ValueError) as err:
        raise OSError(f"its footer has no valid structure ({err!r}); corrupt") from err


def _check_structure(file: Struct, data_end: int) -> None:
    leaves = _leaves(iter(file[2]))
    groups = [(group[3], [chunk[3] for chunk in group[1]]) for group in file[4]]
    n_rows = sum(rows for rows, _ in groups)
    if min((rows for rows, _ in groups), default=0) < 0 or n_rows != file[3]:
        raise OSError(f"its footer has {file[3]} rows, its row groups {n_rows}; corrupt")
    for number, (rows, columns) in enumerate(groups):
        pairs = zip(columns, leaves, strict=True)
        if not all(_agrees(column, leaf, rows) for column, leaf in pairs):
            raise OSError(f"its footer describes row group {number} against its schema; corrupt")
    _check_places([c for rows, columns in groups if rows for c in columns], data_end)


@dataclass(frozen=True, slots=True)
class _Leaf:
    """A column of the schema."""

    path: list[bytes]
    kind: int
    """Physical type."""
    definition: int
    repetition: int
    """Levels of nesting."""


def _leaves(elements: Iterator[Struct], above: _Leaf | None = None) -> list[_Leaf]:
    """Return the columns below the next node; the first node is the root, without a name."""
    node = next(elements)
    repetition = _REQUIRED if above is None else node.get(3, _REQUIRED)
    if repetition not in (_REQUIRED, _OPTIONAL, _REPEATED):
        raise ValueError(f"no repetition has number {repetition}")
    leaf = _Leaf(
        path=[] if above is None else [*above.path, node[4]],
        kind=node.get(1, -1),
        definition=(above.definition if above else 0) + (repetition != _REQUIRED),
        repetition=(above.repetition if above else 0) + (repetition == _REPEATED),
    )
    if above is not None and not node.get(5):
        return [leaf]
    return [below for _ in range(node.get(5, 0)) for below in _leaves(elements, leaf)]


def _agrees(column: Struct, leaf: _Leaf, rows: int) -> bool:
    """Whether the metadata of a column fit the schema and the number of rows."""
    sizes = column.get(16, {})
    return (
        column[1] == leaf.kind
        and column[3] == leaf.path
        and (leaf.repetition > 0 or column[5] == rows)
        and (leaf.kind == _BYTE_ARRAY or 1 not in sizes)
        and len(sizes.get(2, ())) in (0, leaf.repetition + 1)
        and len(sizes.get(3, ())) in (0, leaf.definition + 1)
    )


def _check_places(columns: list[Struct], data_end: int) -> None:
    """Raise unless each column has bytes of its own; those of empty row groups have no place."""
    free = len(MAGIC)
    for start, end in sorted(map(_extent, columns)):
        if not free <= start <= end <= data_end:
            raise OSError(
                f"its footer puts a column at bytes {start} to {end}, which are another "
                f"column's or not among the {data_end} bytes of data; corrupt"
            )
        free = end


def _extent(column: Struct) -> tuple[int, int]:
    """Return first and last byte of a column, by the rule that Arrow reads it with."""
    start = column[9]
    if 0 < column.get(11, 0) < start:
        start = column[11]
    return start, start + column[7]
