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
"""The exact shuffle of rows in memory: random piles, and a random order in each.

Giving every row a random pile, independently, and then permuting each pile, puts the piles one
after the other in a uniformly random permutation of all rows [1]_, [2]_.  Piles of a fixed size
would not: two neighbours would be kept apart too often.

References
----------
.. [1] Rao, C. R. (1961). Generation of random permutations of given number of elements using
   random sampling numbers. Sankhya A, 23, 305-307.
.. [2] Sandelius, M. (1962). A simple randomization procedure. Journal of the Royal Statistical
   Society B, 24, 472-481.
"""

import math

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from pymc.variational._streaming.sources.parquet.files import import_pyarrow

if TYPE_CHECKING:
    import pyarrow

__all__ = ["draw_labels", "generator", "group_rows", "permute_rows"]


def generator(seed: int, *place: int) -> np.random.Generator:
    """Make the generator that belongs to one *place* of the shuffle, whoever runs it."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=place))


def draw_labels(rng: np.random.Generator, n_rows: int, n_piles: int) -> np.ndarray:
    """Draw the pile of each row, uniform and independent of all others."""
    return rng.integers(0, n_piles, n_rows, dtype=np.uint16)


def group_rows(
    batch: "pyarrow.RecordBatch", labels: np.ndarray, n_piles: int
) -> tuple["pyarrow.RecordBatch", np.ndarray]:
    """Sort rows by label, keeping the order of those that share one.

    Returns
    -------
    batch : pyarrow.RecordBatch
    bounds : ndarray, shape (n_piles + 1,)
        The rows of pile ``p`` are ``bounds[p]`` to ``bounds[p + 1]``.
    """
    # Sorting labels and places as one number is faster than sorting places by label.
    bits = batch.num_rows.bit_length()
    kind = np.dtype(np.uint32 if bits + n_piles.bit_length() <= 32 else np.uint64).type
    keys = labels.astype(kind)
    keys <<= kind(bits)
    keys |= np.arange(batch.num_rows, dtype=kind)
    keys.sort()
    bounds = np.searchsorted(keys, np.arange(n_piles + 1, dtype=kind) << kind(bits))
    keys &= kind((1 << bits) - 1)
    return _take(batch, keys), bounds


def permute_rows(
    batch: "pyarrow.RecordBatch", rng: np.random.Generator, rows: int
) -> Iterator["pyarrow.RecordBatch"]:
    """Yield the rows in a uniformly random order, at most *rows* at a time, in even parts."""
    order = rng.permutation(batch.num_rows)
    n_parts = math.ceil(len(order) / rows)
    rows = math.ceil(len(order) / max(n_parts, 1)) or rows
    for first in range(0, len(order), rows):
        yield _take(batch, order[first : first + rows])


def _take(batch: "pyarrow.RecordBatch", order: np.ndarray) -> "pyarrow.RecordBatch":
    pa = import_pyarrow()
    places = pa.array(order)
    columns = [pa.compute.take(column, places, boundscheck=False) for column in batch.columns]
    return pa.RecordBatch.from_arrays(columns, schema=batch.schema)
