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

__all__ = ["are_within", "draw_places", "scatter"]

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
def draw_places(n, key):
    """Draw a permutation of *n* places, by the Fisher-Yates shuffle.

    The random numbers are those of SplitMix64 [1]_ for *key*.  A place among k is ``number * k >>
    64`` [2]_, k below 2**32; it is uniform but for a share of k / 2**64, so the permutation of a
    million places is within 1e-7 of uniform.

    References
    ----------
    .. [1] Steele, G. L., Lea, D., and Flood, C. H. (2014). Fast splittable pseudorandom number
       generators. Proceedings of OOPSLA 2014, 453-472.
    .. [2] Lemire, D. (2019). Fast random integer generation in an interval. ACM Transactions on
       Modeling and Computer Simulation 29(1), 3.
    """
    half, low, one = np.uint64(32), np.uint64(0xFFFFFFFF), np.uint64(1)
    places = np.arange(n).astype(np.uint32)
    for i in range(n):
        # Indices are unsigned, since signed ones would be tested for counting from the end.
        k = np.uint64(n - i)
        number = _number(key, k)
        place = ((number >> half) * k + ((number & low) * k >> half)) >> half
        places[k - one], places[place] = places[place], places[k - one]
    return places


@compiled
def scatter(window, places, rows):
    """Put each row at its place in a window, as words, unsigned integers of any width."""
    for i in range(np.uint64(len(rows))):
        for word in range(np.uint64(rows.shape[1])):
            window[places[i], word] = rows[i, word]


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
