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
"""The shuffle of a window, compiled without the interpreter lock.

numba takes a second and a hundred megabytes to import, and PyTensor imports it with the first
compiled model, so import this module where it is used.
"""

from collections.abc import Callable

import numba
import numpy as np

__all__ = ["are_within", "insert_shuffled"]

_AHEAD = 128
"""Rows whose places are fetched into the cache together."""

_TILE = 256
"""Rows of which values are compared together, so that they stay in the cache for all columns."""


def compiled(function: Callable) -> Callable:
    """Compile a function when it is called, and keep it on disk where there is room for it."""
    try:
        return numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:  # neither this folder nor one of the user's can be written to
        return numba.njit(nogil=True)(function)


@compiled
def _number(key, k):
    """Return the k-th number of SplitMix64."""
    z = key + k * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@compiled
def insert_shuffled(window, n, rows, key):
    """Put *rows* at random places among the first *n* rows of a window, which move to the end.

    This is the inside-out form of the Fisher-Yates shuffle: if all orders of *n* rows were equally
    likely before, so are all orders of ``n + len(rows)`` rows afterwards.  The words of a row are
    unsigned integers of any width.

    The random numbers are those of SplitMix64 [1]_ for *key*: the k-th row that comes into a window
    uses number k.  A place among k is ``number * k >> 64`` [2]_, k below 2**32; it is uniform but
    for a share of k / 2**64, so a window of a million rows is within 1e-7 of uniform.

    References
    ----------
    .. [1] Steele, G. L., Lea, D., and Flood, C. H. (2014). Fast splittable pseudorandom number
       generators. Proceedings of OOPSLA 2014, 453-472.
    .. [2] Lemire, D. (2019). Fast random integer generation in an interval. ACM Transactions on
       Modeling and Computer Simulation 29(1), 3.
    """
    half, low = np.uint64(32), np.uint64(0xFFFFFFFF)
    # Indices are unsigned, since signed ones would be tested for counting from the end.
    places = np.empty(_AHEAD, np.uint64)
    zero, one = np.uint64(0), np.uint64(1)
    fetched = zero
    for first in range(0, len(rows), _AHEAD):
        new = rows[first : first + _AHEAD]
        before = np.uint64(n + first)
        # First pass: draw the place of each new row among the rows up to and with it.
        for i in range(len(new)):
            k = before + np.uint64(i + 1)
            number = _number(key, k)
            places[i] = ((number >> half) * k + ((number & low) * k >> half)) >> half
        # Second pass: read a word at each place.  No read waits for another, so the processor
        # fetches many rows from memory at once; in the third pass, each would be waited for.
        for i in range(len(new)):
            fetched ^= np.uint64(window[places[i], 0])
        # Third pass: move the row at each place to the end, and put the new row there.
        if rows.shape[1] == 2:  # such as four single floats, in half the time of the loop below
            for i in range(len(new)):
                end, row, place = before + np.uint64(i), np.uint64(i), places[i]
                window[end, zero], window[end, one] = window[place, zero], window[place, one]
                window[place, zero], window[place, one] = new[row, zero], new[row, one]
        else:
            for i in range(len(new)):
                end, row, place = before + np.uint64(i), np.uint64(i), places[i]
                for word in range(np.uint64(rows.shape[1])):
                    window[end, word] = window[place, word]
                    window[place, word] = new[row, word]
    return fetched  # or the compiler would leave the second pass out


@compiled
def are_within(rows, columns, lower, upper, whole):
    """Tell whether the values of these columns lie between *lower* and *upper* of each column.

    Those of columns that *whole* marks must be whole numbers, too.
    """
    values = np.empty(_TILE, rows.dtype)
    inside = True
    for first in range(0, len(rows), _TILE):
        tile = rows[first : first + _TILE]
        for i in range(len(columns)):
            column = np.uint64(columns[i])
            low, high = lower[column], upper[column]
            for row in range(len(tile)):
                values[row] = tile[row, column]
            # Of adjacent values, and without an early end, many are compared in one instruction.
            for row in range(len(tile)):
                value = np.float64(values[row])
                inside &= (value >= low) & (value <= high)
            if whole[column]:
                for row in range(len(tile)):
                    inside &= values[row] == np.floor(values[row])
        if not inside:
            return False
    return True
