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
"""Whether every row of a stream meets the conditions of a model."""

import threading

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pytensor.tensor as pt

from pytensor import function
from pytensor.graph.basic import Variable

from pymc.variational._streaming.errors import StreamError

__all__ = ["Condition", "Contract"]

_MOST_VALUES = 1 << 20
"""Values that are computed at most to learn which whole numbers a column may hold."""
_MOST_ROWS = 1 << 14
"""Rows of which the one that breaks a condition is looked for at a time."""
_TILE = 1 << 10
"""Rows of which conditions are computed together, so that the values stay in the cache."""

_computing = threading.Lock()
"""A function that is not compiled without the interpreter lock, or a box that grows, is of one thread."""


class Condition(NamedTuple):
    """Something that must not hold for a row."""

    bad: Any
    """Boolean variable of the rows, shape (n,)."""
    compute: Callable[[np.ndarray], np.ndarray]
    """Function from rows to whether each of them breaks the condition, shape (n,)."""
    columns: np.ndarray
    """Columns that it depends on, as numbers in the flattened row."""
    text: str
    """What follows the description of the value in a message."""
    is_support: bool
    is_convex: bool
    """Whether it holds between any two values for which it holds."""


class Box(NamedTuple):
    """An interval for the values of each column, in all of which some conditions hold."""

    conditions: list[Condition]
    columns: np.ndarray
    """Numbers of the columns that they depend on."""
    lower: np.ndarray
    upper: np.ndarray
    whole: np.ndarray
    """Whether the values of a column must be whole, each shape (n_columns,)."""


class Contract:
    """Conditions on the rows of a stream, which :meth:`check` holds them to.

    Rows are compared, by a compiled loop, with a box in which all conditions were found to hold,
    for whole numbers or for any.  A condition for which there is none, as on real values of two
    columns, is computed for each row.
    """

    def __init__(
        self, conditions: Sequence[Condition], rows: Variable, names: tuple[str, ...] | None
    ):
        self._conditions = conditions
        self._names, self._rows = names, rows
        self._dtype = np.dtype(rows.type.dtype)
        self._sample_shape = rows.type.shape[1:]
        self._computed: list[Condition] = []
        self._is_broken: Callable[[np.ndarray], bool] = lambda rows: False
        """Function from rows to whether one of them breaks a condition that is computed."""
        width = int(np.prod(self._sample_shape))
        self._box = _box_of(list(conditions), np.full(width, np.inf), np.full(width, -np.inf))

    def without_supports(self) -> "Contract":
        """Return the contract of rows whose observed values make no difference."""
        kept = [condition for condition in self._conditions if not condition.is_support]
        return Contract(kept, self._rows, self._names)

    def __reduce__(self) -> tuple[Any, ...]:
        """Leave what was compiled behind."""
        return Contract, (self._conditions, self._rows, self._names)

    def check(self, rows: np.ndarray, offset: int = 0) -> None:
        """Raise StreamError if a row breaks a condition; several threads may call this.

        Parameters
        ----------
        rows : ndarray, shape (n, *sample_shape)
        offset : int
            Position of the first row, for the message.
        """
        kind, size = rows.dtype.kind, rows.dtype.itemsize
        if not rows.dtype.isnative or (kind == "f" and size not in (4, 8)):  # unknown to numba
            rows = rows.astype(np.float64 if kind == "f" else f"{kind}{size}")
        flat = rows.reshape(len(rows), len(self._box.lower))  # of no rows, too
        if not self._is_in_box(flat) or self._is_broken(rows):
            with _computing:
                for first in range(0, len(rows), _MOST_ROWS):
                    self._look(rows[first : first + _MOST_ROWS], offset + first)

    def _is_in_box(self, flat: np.ndarray) -> bool:
        from pymc.variational._streaming.batches.compiled import are_within

        return not self._box.conditions or are_within(flat, *self._box[1:])

    def _look(self, rows: np.ndarray, offset: int) -> None:
        """Find the row that breaks a condition, or widen the box."""
        flat = rows.reshape(len(rows), -1)
        if not self._is_in_box(flat):
            self._require(self._box.conditions, flat, offset)
            self._widen_box(flat)
        if self._is_broken(rows):
            self._require(self._computed, flat, offset)

    def _require(self, conditions: Sequence[Condition], flat: np.ndarray, offset: int) -> None:
        for condition in conditions:
            bad = condition.compute(self._cast(flat))
            if bad.any():
                row = int(np.argmax(bad))
                where = self._describe(flat[row], condition.columns)
                raise StreamError(f"row {offset + row} of the stream holds {where}{condition.text}")

    def _cast(self, flat: np.ndarray) -> np.ndarray:
        with np.errstate(all="ignore"):
            return flat.reshape(len(flat), *self._sample_shape).astype(self._dtype, copy=False)

    def _describe(self, row: np.ndarray, columns: np.ndarray) -> str:
        names = self._names or [
            str(tuple(map(int, np.unravel_index(c, self._sample_shape)))) for c in range(len(row))
        ]
        show = repr if self._names else str
        return " and ".join(f"{row[c]} in column {show(names[c])}" for c in columns[:3])

    def _widen_box(self, flat: np.ndarray) -> None:
        """Widen the box to some rows, and compute from now on what does not hold all over it."""
        box = self._box
        whole = box.whole & (flat == np.floor(flat)).all(axis=0)
        low = np.minimum(box.lower, flat.min(axis=0))
        high = np.maximum(box.upper, flat.max(axis=0))
        margin = np.where(whole, np.maximum(16.0, high - low), 0.0)
        for one in box.conditions:
            margin[one.columns] *= len(one.columns) == 1
        lower, upper = low - margin, high + margin
        kept = []
        for one in box.conditions:
            at = one.columns
            found = self._holding(one, flat[:1], *(of[at] for of in (low, high, margin, whole)))
            if found is None:
                self._computed.append(one)
            else:
                kept.append(one)
                lower[at] = np.maximum(lower[at], found[0])
                upper[at] = np.minimum(upper[at], found[1])
        if self._computed and len(kept) < len(box.conditions):
            self._is_broken = _compiled(self._computed, self._rows)
        self._box = _box_of(kept, lower, upper)

    def _holding(self, one: Condition, row: np.ndarray, low, high, margin, whole) -> Any:
        """Return bounds, at most *margin* beyond *low* and *high*, within which a condition holds."""
        if not whole.all():
            return (low, high) if one.is_convex else None
        for beyond in (margin, 0 * margin):
            if np.prod(high - low + 2 * beyond + 1) * row.size > _MOST_VALUES:
                continue
            sides = [np.arange(a, b + 1) for a, b in zip(low - beyond, high + beyond)]
            grid = np.stack(np.meshgrid(*sides, indexing="ij"), axis=-1).reshape(-1, len(low))
            if self._dtype.kind in "iu":
                limits = np.iinfo(self._dtype)
                grid = grid[((grid >= limits.min) & (grid <= limits.max)).all(axis=1)]
            rows = np.repeat(row.astype("float64"), len(grid), axis=0)
            rows[:, one.columns] = grid
            try:
                bad = one.compute(self._cast(rows))
            except IndexError:  # a table that has no such entry
                continue
            below, above = (grid < low).all(axis=1), (grid > high).all(axis=1)
            if not bad[~(below | above)].any():
                lower = np.max([grid[0], *(grid[bad & below] + 1)], axis=0)
                return lower, np.min([grid[-1], *(grid[bad & above] - 1)], axis=0)
        return None


def _box_of(conditions: list[Condition], lower: np.ndarray, upper: np.ndarray) -> Box:
    """Return a box that is compared in the columns of some conditions, and in no others."""
    whole = np.zeros(len(lower), bool)
    for condition in conditions:
        whole[condition.columns] |= not condition.is_convex
    found = [condition.columns for condition in conditions]
    columns = np.unique(np.concatenate([np.zeros(0, np.int64), *found]))
    return Box(conditions, columns, lower, upper, whole)


def _compiled(conditions: Sequence[Condition], rows: Variable) -> Callable[[np.ndarray], bool]:
    """Compile whether a row breaks one of some conditions, without the interpreter lock."""
    import numba

    broken = pt.stack([one.bad.any() for one in conditions]).any()
    of_tile = function([rows], broken, mode="NUMBA", trust_input=True).vm.jit_fn
    dtype = np.dtype(rows.type.dtype)

    @numba.njit(nogil=True)
    def is_broken(rows):
        for first in range(0, len(rows), _TILE):
            if of_tile(rows[first : first + _TILE].astype(dtype))[0]:
                return True
        return False

    return is_broken
