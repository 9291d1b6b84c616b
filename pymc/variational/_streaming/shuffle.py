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
import math

from collections.abc import Generator, Iterator
from importlib import import_module
from typing import Any

import numpy as np

from pymc.variational._streaming.batches import Chunk, rebatch, require_shape
from pymc.variational._streaming.sources import Source, as_source, draw_seed, positive_int

__all__ = ["ShuffleBuffer", "shuffle_buffer"]

_PIECE_BYTES = 1 << 22
"""Of rows that are emitted at a time, about.  Between calls a thread that reads ahead waits for
the interpreter, which a compiled step holds: few calls keep it ahead."""

_MOST_ROWS = 2**32 - 1


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
        If a size is below 1, or a window does not hold a batch or holds 2**32 rows.

    Notes
    -----
    .. warning::

        Rows never leave their window. If the rows of *source* are sorted, by time for
        example, each window is a slice of that order, the gradients are biased, and the
        posterior is wrong. Shuffle such a table once with :func:`preshuffle`.

    At most two windows and one block of the source are in memory.

    The order of a window is drawn from ``SeedSequence(seed, spawn_key=(epoch, window))``, while
    the window fills, by a loop that is compiled with numba (and kept on disk) on first use.

    Examples
    --------
    >>> import numpy as np
    >>> rows = np.arange(10.0).reshape(-1, 1)
    >>> for batch in shuffle_buffer(rows, buffer_size=5, batch_size=4, seed=0):
    ...     print(batch.ravel())
    [0. 2. 1. 4.]
    [3. 8. 9. 6.]
    [5. 7.]
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
        if self.buffer_size > _MOST_ROWS:
            raise ValueError(f"buffer_size={buffer_size} must be at most {_MOST_ROWS}")
        self.seed = draw_seed(seed)
        # numba takes most of a second to import: not when a fit waits for its first batch.
        import_module("pymc.variational._streaming.compiled")

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
        pieces = self.epochs(epoch, start, cycle=False)
        return (rows.copy() for _, rows in pieces if rows is not None)

    def epochs(
        self, epoch: int, start: int, *, cycle: bool
    ) -> Generator[tuple[int, np.ndarray | None]]:
        number, skip = divmod(start, self.buffer_size)
        size = min(self.buffer_size, self.n_rows or self.buffer_size)
        rows = _Rows(self._source, epoch, number * self.buffer_size, cycle=cycle)
        current, following = (_Window(rows.room(size), self.seed) for _ in range(2))
        n_pieces = math.ceil(current.rows.nbytes / _PIECE_BYTES)
        step = math.ceil(size / n_pieces / self.batch_size) * self.batch_size
        current.begin(epoch, number)
        rows.fill(current, size)
        rows.require_success()
        while True:
            # One window is emitted while the next one fills, about as many rows in as out.
            following.begin(*current.place_after(epoch_ended=rows.ended()))
            for first in range(skip, current.filled, step):
                yield current.epoch, current.rows[first : min(first + step, current.filled)]
                rows.fill(following, min(first + step, size))
            rows.fill(following, size)
            if following.epoch > current.epoch:
                yield current.epoch, None
                if not cycle:
                    return
            rows.require_success()
            current, following, skip = following, current, 0


class _Window:
    """Room for rows, which are in random order at any time."""

    def __init__(self, room: np.ndarray, seed: int | None):
        self.rows = room
        self._words = _as_words(room)
        self._seed = seed

    def begin(self, epoch: int, number: int) -> None:
        """Forget all rows, to hold those of another window."""
        self.epoch, self._number = epoch, number
        self.filled = 0
        """Rows in it; what follows them has no meaning."""
        sequence = np.random.SeedSequence(self._seed, spawn_key=(epoch, number))
        self._bits = np.random.PCG64(sequence)

    def place_after(self, *, epoch_ended: bool) -> tuple[int, int]:
        """Return the epoch of the next window, and its number there."""
        return (self.epoch + 1, 0) if epoch_ended else (self.epoch, self._number + 1)

    def insert(self, rows: np.ndarray) -> None:
        from pymc.variational._streaming.compiled import insert_shuffled

        words = _as_words(np.ascontiguousarray(rows, self.rows.dtype))
        insert_shuffled(self._words, self.filled, words, self._bits.random_raw(len(rows)))
        self.filled += len(rows)


class _Rows:
    """Rows of a source, from which windows are filled, epoch after epoch.

    What goes wrong while rows are read ahead is raised by :meth:`require_success`, after the rows
    that came before it.
    """

    def __init__(self, source: Source, epoch: int, start: int, *, cycle: bool):
        self._source, self._cycle = source, cycle
        self._failure: Exception | None = None
        self._epoch = epoch
        self._blocks: Iterator[np.ndarray] | None = source.blocks(epoch, start)
        self._rest = next(self._blocks, np.empty(0))
        """Of the block that was read last."""
        self._sample_shape = self._rest.shape[1:]

    def room(self, size: int) -> np.ndarray:
        """Return room for *size* rows of the kind that the blocks hold."""
        return np.empty((size, *self._sample_shape), self._rest.dtype)

    def ended(self) -> bool:
        """Whether the epoch has no more rows."""
        return not (self._load() or self._failure)

    def fill(self, window: _Window, enough: int) -> None:
        """Insert whole blocks, until *enough* rows are in the window, it is full, or none are left.

        A block that begins in one window ends in the next.
        """
        if window.epoch > self._epoch and self._cycle:
            self._epoch, self._blocks = window.epoch, None
        while window.filled < enough and self._load():
            rows = self._rest[: len(window.rows) - window.filled]
            window.insert(rows)
            self._rest = self._rest[len(rows) :]

    def require_success(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _load(self) -> bool:
        """Have rows at hand, or return False."""
        if not len(self._rest) and self._failure is None:
            try:
                if self._blocks is None:
                    self._blocks = self._source.blocks(self._epoch)
                for self._rest in self._blocks:
                    require_shape(self._rest, self._sample_shape)
                    if len(self._rest):
                        break
            except Exception as err:
                self._failure = err
        return self._failure is None and len(self._rest) > 0


def _as_words(rows: np.ndarray) -> np.ndarray:
    """Return the bytes of contiguous rows as few unsigned integers each."""
    n_bytes = rows.dtype.itemsize * math.prod(rows.shape[1:])
    word = next(size for size in (8, 4, 2, 1) if n_bytes % size == 0)
    return rows.reshape(len(rows), -1).view(f"u{word}")
