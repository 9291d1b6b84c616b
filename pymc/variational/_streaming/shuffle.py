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

import hashlib

from collections.abc import Generator, Iterator
from typing import Any

import numpy as np

from pymc.variational._streaming.batches import Chunk, rebatch
from pymc.variational._streaming.sources import Source, as_source, draw_seed, positive_int

__all__ = ["ShuffleBuffer", "shuffle_buffer"]

_GATHER_BYTES = 1 << 21
"""Of rows that are gathered from the window at a time.  Between calls a thread that reads ahead
waits for the interpreter, which a compiled step holds: few calls keep it ahead."""

_GATHER_SHARE = 8
"""No more than this part of a window, to keep what is read ahead small beside it."""


def shuffle_buffer(
    source: Any, *, buffer_size: int, batch_size: int, seed: int | None = None
) -> "ShuffleBuffer":
    """Shuffle a stream of rows within windows of bounded size.

    Consecutive windows of *buffer_size* rows are each permuted uniformly at random, another
    way each epoch.

    Parameters
    ----------
    source : Source, ndarray, callable or iterable
        Whatever :class:`StreamingDataset` accepts.
    buffer_size : int
        Rows of a window.
    batch_size : int
        Rows of the batches that iterating the buffer yields; the last one may be shorter.
    seed : int, optional
        Default: drawn once, and shown as ``.seed``.

    Returns
    -------
    ShuffleBuffer
        Re-iterable if *source* is; passes on its ``n_rows`` and ``columns``.

    Raises
    ------
    ValueError
        If a size is below 1 or a window does not hold a batch.

    Notes
    -----
    .. warning::

        Rows never leave their window. If the rows of *source* are sorted, by time for
        example, each window is a slice of that order, the gradients are biased, and the
        posterior is wrong. Shuffle such a table once with :func:`preshuffle`.

    At most two windows and one block of the source are in memory.

    The permutation of a window is drawn from
    ``SeedSequence(seed, spawn_key=(epoch, window))``.

    Examples
    --------
    >>> import numpy as np
    >>> rows = np.arange(10.0).reshape(-1, 1)
    >>> for batch in shuffle_buffer(rows, buffer_size=5, batch_size=4, seed=0):
    ...     print(batch.ravel())
    [1. 0. 2. 3.]
    [4. 6. 7. 5.]
    [8. 9.]
    """
    return ShuffleBuffer(as_source(source), buffer_size, batch_size, seed)


class ShuffleBuffer(Source):
    """See :func:`shuffle_buffer`."""

    def __init__(self, source: Source, buffer_size: int, batch_size: int, seed: int | None):
        self._source = source
        self.buffer_size = positive_int("buffer_size", buffer_size)
        self.batch_size = positive_int("batch_size", batch_size)
        if self.buffer_size < self.batch_size:
            raise ValueError(
                f"buffer_size={buffer_size} must be at least batch_size={batch_size}; "
                "a window of many batches shuffles better"
            )
        self.seed = draw_seed(seed)

    source = property(lambda self: self._source)
    n_rows = property(lambda self: self._source.n_rows)  # type: ignore[assignment]
    columns = property(lambda self: self._source.columns)  # type: ignore[assignment]
    sample_shape = property(lambda self: self._source.sample_shape)  # type: ignore[assignment]
    integral = property(lambda self: self._source.integral)  # type: ignore[assignment]
    checked = property(lambda self: self._source.checked)  # type: ignore[assignment]

    @property
    def fingerprint(self) -> str:  # type: ignore[override]
        parts = [self._source.fingerprint, self.seed, self.buffer_size]
        return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()

    def probe(self) -> None:
        self._source.probe()

    def count(self) -> int:
        return self._source.count()

    def __iter__(self) -> Iterator[np.ndarray]:
        chunks = (Chunk(0, 0, rows) for rows in self.blocks())
        return (batch.rows for batch in rebatch(chunks, self.batch_size))

    def blocks(self, epoch: int = 0, start: int = 0) -> Generator[np.ndarray]:
        window, skip = divmod(start, self.buffer_size)
        return self._shuffled(epoch, window, skip)

    def _shuffled(self, epoch: int, window: int, skip: int) -> Generator[np.ndarray]:
        """Emit one window while the next one fills, as many rows in as out."""
        size = self.buffer_size
        reader = _RowReader(self._source.blocks(epoch, window * size))
        current, following = reader.window(self._window_rows()), None
        step = min(_GATHER_BYTES // max(current[:1].nbytes, 1), size // _GATHER_SHARE)
        step = max(step - step % self.batch_size, self.batch_size)
        filled = reader.fill(current, 0, size)
        while filled:
            order = self._permutation(epoch, window, filled)
            if following is None:
                following = reader.window(self._window_rows())
            ahead = 0
            for first in range(skip, filled, step):
                ahead = reader.fill(following, ahead, min(ahead + step, size))
                yield current.take(order[first : first + step], axis=0)
            filled = reader.fill(following, ahead, size)
            current, following = following, current
            window, skip = window + 1, 0

    def _permutation(self, epoch: int, window: int, n: int) -> np.ndarray:
        sequence = np.random.SeedSequence(self.seed, spawn_key=(epoch, window))
        return np.random.default_rng(sequence).permutation(n)

    def _window_rows(self) -> int:
        return min(self.buffer_size, self.n_rows or self.buffer_size)


class _RowReader:
    """Hands out the rows of blocks, as many as asked for."""

    def __init__(self, blocks: Iterator[np.ndarray]):
        self._blocks = blocks
        self._rest = next(blocks, np.empty(0))

    def window(self, size: int) -> np.ndarray:
        """Return room for *size* rows of the kind that the blocks hold."""
        return np.empty((size, *self._rest.shape[1:]), self._rest.dtype)

    def fill(self, window: np.ndarray, start: int, stop: int) -> int:
        """Copy rows into window[start:stop]; return where the rows end."""
        while start < stop:
            if not len(self._rest):
                block = next(self._blocks, None)
                if block is None:
                    break
                self._rest = block
            rows = self._rest[: stop - start]
            window[start : start + len(rows)] = rows
            self._rest = self._rest[len(rows) :]
            start += len(rows)
        return start
