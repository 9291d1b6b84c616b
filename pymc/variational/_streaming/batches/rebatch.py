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
"""Blocks of any length to batches of exactly one, across epochs."""

import math

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from pymc.variational._streaming.errors import StreamError
from pymc.variational._streaming.sources.base import Source, describe_value
from pymc.variational._streaming.sources.rows import exact_limit

__all__ = ["Batch", "Chunk", "EpochEnd", "cast", "rebatch", "require_exact", "require_shape"]

_PIECE_VALUES = 1 << 20
"""Values that are checked at a time."""


class Chunk(NamedTuple):
    """Consecutive rows of one epoch."""

    epoch: int
    offset: int
    """Position of the first row in its epoch."""
    rows: np.ndarray
    """shape (n, *sample_shape), in the source's own dtype; see ``Source.blocks``."""


class Batch(NamedTuple):
    """The rows of a minibatch, which can run across epochs."""

    epoch: int
    offset: int
    """Position of the first row in its epoch."""
    rows: np.ndarray
    end: tuple[int, int]
    """Epoch and position of what follows the rows."""


class EpochEnd(NamedTuple):
    """The end of an epoch."""

    epoch: int
    n_rows: int
    """Position of the row that would have followed."""


def rebatch(items: Iterable[Any], batch_size: int) -> Iterator[Any]:
    """Cut chunks into batches of *batch_size* rows that run across epochs.

    An item that is no chunk is passed on where it comes.  When the items end, so does this, with a
    batch of the rows that are left.
    """
    parts: list[Chunk] = []
    missing = batch_size
    for item in items:
        if not isinstance(item, Chunk):
            yield item
            continue
        epoch, offset, rows = item
        first = 0
        # The chunk's rows complete the batch that earlier chunks began, and fill batches of their
        # own, which are views.
        while first + missing <= len(rows):
            part = Chunk(epoch, offset + first, rows[first : first + missing])
            yield _join([*parts, part])
            first += missing
            parts, missing = [], batch_size
        # The others begin a batch, as a copy: the chunk may be overwritten before that is full.
        if first < len(rows):
            parts.append(Chunk(epoch, offset + first, rows[first:].copy()))
            missing -= len(rows) - first
    if parts:
        yield _join(parts)


def require_shape(block: np.ndarray, sample_shape: tuple[int, ...]) -> None:
    """Raise StreamError unless the rows of *block* have this shape."""
    if block.shape[1:] != sample_shape:
        raise StreamError(
            f"source yields rows of shape {block.shape[1:]}; "
            f"sample_shape={sample_shape} was expected"
        )


def cast(rows: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Copy rows, which are known to fit, to *dtype*."""
    with np.errstate(under="ignore"):
        return rows.astype(dtype)


def require_exact(
    rows: np.ndarray, dtype: np.dtype, source: Source, epoch: int, offset: int
) -> None:
    """Raise StreamError if a value overflows in *dtype*, or is an integer that rounds."""
    if _holds_all_of(dtype, rows.dtype):
        return
    step = max(1, _PIECE_VALUES // math.prod(rows.shape[1:]))
    for first in range(0, len(rows), step):
        piece = rows[first : first + step]
        with np.errstate(all="ignore"):
            bad = _inexact(piece, piece.astype(dtype), source.integral)
        if bad.any():
            place = np.argwhere(bad)[0]
            row = offset + first + int(place[0])
            where = source.locate(epoch, row, row + 1)
            raise StreamError(
                f"{describe_value(piece, place, row, source.columns, where)}, which {dtype} "
                "cannot hold exactly; repair the data or pass a wider dtype="
            )


def _join(parts: list[Chunk]) -> Batch:
    rows = parts[0].rows if len(parts) == 1 else np.concatenate([part.rows for part in parts])
    epoch, offset, last = parts[-1]
    return Batch(parts[0].epoch, parts[0].offset, rows, (epoch, offset + len(last)))


def _holds_all_of(dtype: np.dtype, other: np.dtype) -> bool:
    """Whether *dtype* holds all values of *other*; NumPy says so of float64 and int64 too."""
    wider = dtype.itemsize > other.itemsize and np.can_cast(other, dtype)
    return dtype == other or wider


def _inexact(rows: np.ndarray, out: np.ndarray, integral: tuple[bool, ...] | None) -> np.ndarray:
    """Mark the values of *rows* that did not survive the cast to *out*."""
    if out.dtype.kind != "f":
        return out != rows
    bad = ~np.isfinite(out)
    limit = exact_limit(out.dtype)
    if rows.dtype.kind in "iu" and rows.itemsize >= out.itemsize:
        bad |= (rows > limit) | (rows < -limit)
    elif integral is not None and rows.itemsize > out.itemsize:
        bad |= (np.abs(rows) > limit) & np.array(integral)
    return bad
