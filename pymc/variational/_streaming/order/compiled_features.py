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
"""Features of rows, computed and summed by compiled loops.

Import this module where it is used: numba takes a second to import.
"""

import numpy as np

from pymc.variational._streaming.batches.compiled import compiled

__all__ = ["evaluate_features", "sum_features"]

_TILE = 256
"""Rows whose features are computed and summed while they are cached."""


@compiled()
def evaluate_features(rows, at, out, centre, factor, limit, constant, projections, left, right):
    """Write the features of the rows *at* these places to *out*, shape (n_features, len(at)).

    See ``features.Features`` for the others.
    """
    n, d = len(at), len(centre)
    for j in range(d):
        for i in range(n):
            value = float(rows[at[i], j])
            if constant[j]:
                out[j, i] = 1.0 if value != centre[j] else 0.0
            else:
                out[j, i] = min(max((value - centre[j]) * factor[j], -limit[j]), limit[j])
    n_base = d + len(projections)
    for p in range(len(projections)):
        out[d + p] = 0.0
        for j in range(d):
            for i in range(n):
                out[d + p, i] += projections[p, j] * out[j, i]
    for q in range(len(left)):
        for i in range(n):
            out[n_base + q, i] = out[left[q], i] * out[right[q], i]


@compiled(fastmath={"reassoc", "contract"})
def sum_features(rows, offset, window, picks, features):
    """Sum features over some rows of each window.

    Parameters
    ----------
    rows : ndarray, shape (n, n_columns)
        Consecutive rows of a stream that is cut into windows.
    offset : int
        Place of the first one in the stream.
    window : int
        Rows of a window.
    picks : ndarray of int
        Which rows of a window are used, sorted.
    features : tuple
        What ``evaluate_features`` takes besides rows and places.

    Returns
    -------
    powers : ndarray, shape (4, n_features)
        Sums of the first four powers over all that are used.
    sums : ndarray, shape (n_windows, n_features)
        Of each window from that of the first row to that of the last one.
    sizes : ndarray of int, shape (n_windows,)
        Rows in these sums.
    """
    n_features = len(features[0]) + len(features[4]) + len(features[5])
    n_windows = (offset + len(rows) - 1) // window - offset // window + 1
    powers, sums = np.zeros((4, n_features)), np.zeros((n_windows, n_features))
    sizes = np.zeros(n_windows, np.int64)
    found, at = np.empty((n_features, _TILE)), np.empty(_TILE, np.int64)
    for w in range(n_windows):
        start = (offset // window + w) * window - offset
        low, high = np.searchsorted(picks, -start), np.searchsorted(picks, len(rows) - start)
        sizes[w] = high - low
        for first in range(low, high, _TILE):
            n = min(_TILE, high - first)
            for i in range(n):
                at[i] = picks[first + i] + start
            evaluate_features(rows, at[:n], found, *features)
            for f in range(n_features):
                one = two = three = four = 0.0
                for i in range(n):
                    value = found[f, i]
                    square = value * value
                    one += value
                    two += square
                    three += square * value
                    four += square * square
                sums[w, f] += one
                powers[0, f] += one
                powers[1, f] += two
                powers[2, f] += three
                powers[3, f] += four
    return powers, sums, sizes
