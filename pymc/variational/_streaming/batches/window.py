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
"""The bounded shuffle buffer."""

import math

from collections.abc import Generator, Iterator
from typing import Any

import numpy as np

from pymc.variational._streaming.batches.rebatch import Chunk, rebatch, require_shape
from pymc.variational._streaming.sources.arrays import as_source
from pymc.variational._streaming.sources.base import Source
from pymc.variational._streaming.utils import digest, draw_seed, positive_int

__all__ = ["ShuffleBuffer", "shuffle_buffer"]

_MOST_ROWS = 2**32 - 1
"""Rows of a window up to which ``insert_shuffled`` draws each place with the same probability."""


def shuffle_buffer(
    source: Any, *, buffer_size: int, batch_size: int | None = None, seed: int | None = None
) -> "ShuffleBuffer":
    """Shuffle a stream of rows within windows of bounded size.

    Consecutive windows of *buffer_size* rows are each permuted uniformly at random, another
    way each epoch.

    Parameters
    ----------
    source : Source, ndarray, callable or iterable
        Whatever :class:`StreamingDataset` accepts.
    buffer_size : int
        Number of rows in a window.
    batch_size : int, optional
        Number of rows in the batches that iterating the buffer yields; the last one may be shorter.
        Default: that of the :class:`StreamingDataset` around the buffer.
    seed : int, optional
        Seed of the permutations. Default: one is drawn once, and shown as ``.seed``.

    Returns
    -------
    ShuffleBuffer
        Re-iterable if *source* is; passes on its ``n_rows`` and ``columns``.

    Raises
    ------
    ValueError
        If a size is below 1, or a window does not hold a batch or holds 2**32 rows.

    Notes
    -----
    .. warning::

        Rows never leave their window. If the rows of *source* are sorted, by time for
        example, each window is a slice of that order, the gradients are biased, and the
        posterior is wrong. Shuffle such a table once with :func:`preshuffle`.

    At most two windows and one block of the source are in memory, in the source's own dtype.

    The order of a window depends on ``SeedSequence(seed, spawn_key=(epoch, window))`` alone, and is
    drawn while the window fills, by a loop that is compiled with numba (and kept on disk) on first
    use.

    Examples
    --------
    >>> import numpy as np
    >>> rows = np.arange(10.0).reshape(-1, 1)
    >>> for batch in shuffle_buffer(rows, buffer_size=5, batch_size=4, seed=0):
    ...     print(batch.ravel())
    [3. 0. 2. 4.]
    [1. 6. 8. 5.]
    [7. 9.]
    """
    return ShuffleBuffer(as_source(source), buffer_size, batch_size, seed)


class ShuffleBuffer(Source):
    """See :func:`shuffle_buffer`."""

    def __init__(self, source: Source, buffer_size: int, batch_size: int | None, seed: int | None):
        self.source = source
        self.buffer_size = positive_int("buffer_size", buffer_size)
        self.batch_size = None if batch_size is None else positive_int("batch_size", batch_size)
        self.require_batch(self.batch_size or 1)
        if self.buffer_size > _MOST_ROWS:
            raise ValueError(f"buffer_size={buffer_size} must be at most {_MOST_ROWS}")
        self.seed = draw_seed(seed)
        # numba takes most of a second to start: not when a fit waits for its first batch.
        _insert_shuffled(np.zeros((1, 1)), 0, np.zeros((1, 1)), np.uint64(0))

    levels = property(lambda self: self.source.levels)  # type: ignore[assignment]
    times = property(lambda self: self.source.times)  # type: ignore[assignment]
    n_rows = property(lambda self: self.source.n_rows)  # type: ignore[assignment]
    columns = property(lambda self: self.source.columns)  # type: ignore[assignment]
    sample_shape = property(lambda self: self.source.sample_shape)  # type: ignore[assignment]
    integral = property(lambda self: self.source.integral)  # type: ignore[assignment]

    @property
    def fingerprint(self) -> str:  # type: ignore[override]
        return digest(self.source.fingerprint, self.seed, self.buffer_size)

    def require_batch(self, batch_size: int) -> None:
        """Raise ValueError unless batches of this size are what was asked for, and fit a window."""
        if batch_size != (self.batch_size or batch_size):
            raise ValueError(
                f"batch_size={batch_size} but the shuffle_buffer was made with "
                f"batch_size={self.batch_size}; leave it out there"
            )
        if self.buffer_size < batch_size:
            raise ValueError(
                f"buffer_size={self.buffer_size} must be at least batch_size={batch_size}; "
                "a window of many batches shuffles better"
            )

    def probe(self) -> None:
        self.source.probe()

    def locate(self, epoch: int, start: int, stop: int) -> str:
        first = start - start % self.buffer_size
        return self.source.locate(epoch, first, first + self.buffer_size)

    def count(self) -> int:
        return self.source.count()

    def batches(self) -> Iterator[Any]:
        return self.source.batches()

    def __iter__(self) -> Iterator[np.ndarray]:
        if self.batch_size is None:
            raise ValueError("batch_size is not known; pass it to shuffle_buffer")
        # Copies, since windows are overwritten and batches are the caller's.
        chunks = (Chunk(0, 0, rows.copy()) for rows in self.blocks())
        return (batch.rows for batch in rebatch(chunks, self.batch_size))

    def blocks(
        self, epoch: int = 0, start: int = 0, *, block_rows: int | None = None
    ) -> Generator[np.ndarray]:
        number, skip = divmod(start, self.buffer_size)
        size = min(self.buffer_size, self.n_rows or self.buffer_size)
        # While the rows of one buffer are used, the other fills with those of the next window.
        buffers: list[np.ndarray] = []
        n = 0
        for rest in self.source.blocks(epoch, number * self.buffer_size):
            while len(rest):
                if not n:
                    sequence = np.random.SeedSequence(self.seed, spawn_key=(epoch, number))
                    key = sequence.generate_state(1, np.uint64)[0]
                if not buffers:
                    buffers = [np.empty((size, *rest.shape[1:]), rest.dtype) for _ in range(2)]
                new = rest[: size - n]
                _insert_shuffled(buffers[0], n, new, key)
                n, rest = n + len(new), rest[len(new) :]
                if n == size:
                    yield buffers[0][skip:]
                    buffers.reverse()
                    number, skip, n = number + 1, 0, 0
            rest = rest.copy()  # or its base, the block, would stay while the next one is read
            yield rest  # no rows, so that whoever reads ahead can stop before the window is full
        if n:
            yield buffers[0][skip:n]


def _insert_shuffled(window: np.ndarray, n: int, rows: np.ndarray, key: np.uint64) -> None:
    """Put rows at random places among the first *n* of a window."""
    from pymc.variational._streaming.batches.compiled import insert_shuffled

    require_shape(rows, window.shape[1:])
    rows = rows.astype(window.dtype, "C", casting="equiv", copy=False)
    insert_shuffled(_as_words(window), n, _as_words(rows), key)


def _as_words(rows: np.ndarray) -> np.ndarray:
    """View contiguous rows as unsigned integers, as few as the bytes of a row fit in."""
    n_bytes = rows.dtype.itemsize * math.prod(rows.shape[1:])
    word = next(size for size in (8, 4, 2, 1) if n_bytes % size == 0)
    return rows.reshape(len(rows), -1).view(f"u{word}")
