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
"""Loops over columns that NumPy has no call for, compiled without the interpreter lock.

A thread that reads ahead gives the lock up in every call of NumPy or Arrow, and then waits for the
step that compiled code makes meanwhile.  One call for many rows keeps it ahead, and leaves the step
alone.

numba takes a second and a hundred megabytes to import, and PyTensor imports it with the first
compiled model, so import this module where it is used.
"""

from collections.abc import Callable
from typing import Any

import numba

from numba.core import cgutils, types
from numba.extending import intrinsic

__all__ = ["compiled", "interleave"]

_CACHED_VALUES = 1024
_LEAST_ROWS = 16
"""Values, and rows, of the tiles of rows in which columns are interleaved: a tile stays in the cache
until all of its columns are written."""


def compiled(**options: Any) -> Callable[[Callable], Callable]:
    """Compile a function when it is called, and keep it on disk where there is room for it."""

    def decorate(function: Callable) -> Callable:
        try:
            return numba.njit(nogil=True, cache=True, **options)(function)
        except RuntimeError:  # neither this folder nor one of the user's can be written to
            return numba.njit(nogil=True, **options)(function)

    return decorate


@intrinsic
def _as_pointer(typing_context, address):
    """Make a pointer of an integer, for which numba has no function of its own."""

    def cast(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), cast


@compiled()
def interleave(addresses, places, bounds, rows):
    """Copy columns of one type into *rows*, and tell whether all values are within bounds.

    Parameters
    ----------
    addresses : ndarray of int64, shape (n,)
        Address of the first value of each column, which has as many values as there are rows.
    places : ndarray of int64, shape (n,)
        Index of each column in a row.
    bounds : ndarray, shape (2,)
        Least and greatest value, in the type of the columns; NaN is outside of all bounds.
    rows : ndarray, shape (n_rows, n_columns)
        Array of a type that holds all values within the bounds.
    """
    low, high = bounds
    complete = True
    n_rows = max(_LEAST_ROWS, _CACHED_VALUES // rows.shape[1])
    for first in range(0, len(rows), n_rows):
        tile = rows[first : first + n_rows]
        for k in range(len(addresses)):
            column = numba.carray(_as_pointer(addresses[k]), len(rows), bounds.dtype)[first:]
            for i in range(len(tile)):
                tile[i, places[k]] = column[i]
            # In a loop of its own, the comparison of many values is one instruction.
            inside = True
            for i in range(len(tile)):
                inside &= (column[i] >= low) & (column[i] <= high)
            complete &= inside
    return complete
