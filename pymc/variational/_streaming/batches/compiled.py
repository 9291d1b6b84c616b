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
"""Loops that NumPy has no call for, compiled without the interpreter lock.

A thread that reads ahead gives the lock up in every call of NumPy or Arrow, and then waits for the
step that compiled code makes meanwhile.  One call for many rows keeps it ahead, and leaves the step
alone.

numba takes a second and a hundred megabytes to import, and PyTensor imports it with the first
compiled model, so import this module where it is used.
"""

from collections.abc import Callable
from typing import Any

import numba
import numpy as np

from numba.core import cgutils, types
from numba.extending import intrinsic

__all__ = [
    "PLAIN",
    "compiled",
    "insert_columns",
    "insert_shuffled",
    "interleave",
]

_AHEAD = 128
"""Rows that are fetched into the cache together; one after the other they would wait for memory."""
_TILE = 256
"""Rows that are interleaved, or whose features are computed and summed, while they are cached."""

PLAIN = "int8", "uint8", "int16", "uint16", "int32", "uint32", "float32", "float64"
"""Types of number that :func:`interleave` copies."""


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
    """Make an address of an integer, for which numba has no function of its own."""

    def cast(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), cast


@compiled()
def _copy(address, first, dtype, tile, j):
    """Copy a column, from row *first* on, to column *j* of *tile*; tell of values not finite."""
    column = numba.carray(_as_pointer(address), first + len(tile), dtype)[first:]
    for i in range(len(tile)):
        tile[i, j] = column[i]
    strange = False
    for i in range(len(tile)):
        strange |= column[i] - column[i] != 0
    return strange


@compiled()
def _all_set(address, first, n):
    """Tell whether *n* bits from bit *first* on are set; no bits at all, at address 0, are."""
    if address == 0 or n == 0:
        return True
    bits = numba.carray(_as_pointer(address), (first + n + 7) // 8, np.uint8)[first // 8 :]
    head, tail = 0xFF >> first % 8 << first % 8, 0xFF >> -(first + n) % 8
    if len(bits) == 1:
        return bits[0] & head & tail == head & tail
    if bits[0] & head != head or bits[-1] & tail != tail:
        return False
    unset = np.uint8(0)
    for i in range(1, len(bits) - 1):
        unset |= ~bits[i]
    return unset == 0


@compiled()
def interleave(places, kinds, start, rows):
    """Copy columns to *rows*, and tell whether all values are there and finite.

    Parameters
    ----------
    places : ndarray of int64, shape (n_columns, 3)
        Addresses of each column's values and of its validity bits [1]_ or 0, and which of them is
        the column's first one.
    kinds : ndarray of int64, shape (n_columns,)
        Place of each column's type in ``PLAIN``: one compiled loop serves any columns.
    start : int
        First row that is copied.
    rows : ndarray, shape (n_rows, n_columns)
        Of a dtype that can hold all values.

    References
    ----------
    .. [1] Apache Arrow. Arrow columnar format.
       https://arrow.apache.org/docs/format/Columnar.html
    """
    for j in range(len(kinds)):
        if not _all_set(places[j, 1], start + places[j, 2], len(rows)):
            return False
    strange = False
    for first in range(0, len(rows), _TILE):
        tile = rows[first : first + _TILE]
        for j in range(len(kinds)):
            kind, address = kinds[j], places[j, 0]
            at = start + first + places[j, 2]
            # A loop over the types, with numba's literal_unroll, would take twice as long.
            if kind == 0:
                strange |= _copy(address, at, np.int8, tile, j)
            elif kind == 1:
                strange |= _copy(address, at, np.uint8, tile, j)
            elif kind == 2:
                strange |= _copy(address, at, np.int16, tile, j)
            elif kind == 3:
                strange |= _copy(address, at, np.uint16, tile, j)
            elif kind == 4:
                strange |= _copy(address, at, np.int32, tile, j)
            elif kind == 5:
                strange |= _copy(address, at, np.uint32, tile, j)
            elif kind == 6:
                strange |= _copy(address, at, np.float32, tile, j)
            else:
                strange |= _copy(address, at, np.float64, tile, j)
    return not strange


@compiled()
def _number(key, k):
    """Return the k-th number of SplitMix64."""
    z = key + k * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@compiled()
def insert_shuffled(window, n, rows, key):
    """Put *rows* at random places among the first *n* rows of a window, which move to the end.

    This is the inside-out form of the Fisher-Yates shuffle: if all orders of *n* rows were equally
    likely before, so are all orders of ``n + len(rows)`` rows afterwards.

    Parameters
    ----------
    window : ndarray of unsigned int, shape (size, words)
        With room for the new rows.
    n : int
        Rows in it.
    rows : ndarray, shape (n_rows, words)
    key : uint64
        Of the random numbers, SplitMix64 [1]_: the k-th row that comes into a window uses number k.
        A place among k is ``number * k >> 64`` [2]_, k below 2**32; it is uniform but for a share
        of k / 2**64, so a window of a million rows is within 1e-7 of uniform.

    References
    ----------
    .. [1] Steele, G. L., Lea, D., and Flood, C. H. (2014). Fast splittable pseudorandom number
       generators. Proceedings of OOPSLA 2014, 453-472.
    .. [2] Lemire, D. (2019). Fast random integer generation in an interval. ACM Transactions on
       Modeling and Computer Simulation 29(1), 3.
    """
    half, low = np.uint64(32), np.uint64(0xFFFFFFFF)
    # Signed numbers would be tested as indices, since they can count from the end.
    places = np.empty(_AHEAD, np.uint64)
    zero, one = np.uint64(0), np.uint64(1)
    fetched = zero
    for first in range(0, len(rows), _AHEAD):
        some = min(_AHEAD, len(rows) - first)
        new = rows[first : first + some]
        at = np.uint64(n + first)
        for i in range(some):
            k = at + np.uint64(i + 1)
            number = _number(key, k)
            places[i] = ((number >> half) * k + ((number & low) * k >> half)) >> half
        for i in range(some):
            fetched ^= np.uint64(window[places[i], 0])
        if rows.shape[1] == 2:  # such as four single floats, in half the time of the loop below
            for i in range(some):
                end, row, place = at + np.uint64(i), np.uint64(i), places[i]
                window[end, zero], window[end, one] = window[place, zero], window[place, one]
                window[place, zero], window[place, one] = new[row, zero], new[row, one]
        else:
            for i in range(some):
                end, row, place = at + np.uint64(i), np.uint64(i), places[i]
                for word in range(np.uint64(rows.shape[1])):
                    window[end, word] = window[place, word]
                    window[place, word] = new[row, word]
    return fetched  # or the compiler would leave the fetching out


@compiled()
def insert_columns(window, n, key, places, kinds, start, stop, tile, tile_words):
    """Put rows *start* to *stop* of columns at random places among those of a window.

    Parameters
    ----------
    window, n, key
        See :func:`insert_shuffled`.
    places, kinds
        See :func:`interleave`.
    tile : ndarray, shape (size, n_columns)
        Room for some rows.
    tile_words : ndarray of unsigned int, shape (size, words)
        The same memory.

    Returns
    -------
    int
        First row that was not put in: *stop*, or one from which on some are missing or not finite.
    """
    for first in range(start, stop, len(tile)):
        some = min(len(tile), stop - first)
        if not interleave(places, kinds, first, tile[:some]):
            return first
        insert_shuffled(window, n + first - start, tile_words[:some], key)
    return stop
