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
"""Batches one after the other, from a place that is kept."""

from collections.abc import Generator, Iterator
from typing import Any, NamedTuple

import numpy as np

from pymc.variational._streaming.batches.prefetch import Prefetcher
from pymc.variational._streaming.batches.rebatch import Batch, EpochEnd, read_epochs, rebatch
from pymc.variational._streaming.order.check import OrderCheck
from pymc.variational._streaming.sources.base import Source
from pymc.variational._streaming.total_size import TotalSize

__all__ = ["BatchReader", "Position"]


class Position(NamedTuple):
    """Where the current batch starts."""

    epoch: int
    offset: int
    rows_seen: int


class BatchReader:
    """Read batches, and know where the current one starts.

    A copy has no open files, and goes on from the same batch.

    Parameters
    ----------
    source : Source
    batch_size : int
    sample_shape : tuple of int
    dtype : dtype
        That must hold the values; the batches have the source's own.
    total_size : TotalSize
        Compared with the rows of each epoch.
    order : OrderCheck
        Sees all rows.
    cycle, prefetch : bool
        See ``StreamingDataset``.
    """

    def __init__(
        self,
        source: Source,
        batch_size: int,
        sample_shape: tuple[int, ...],
        dtype: np.dtype,
        *,
        total_size: TotalSize,
        order: OrderCheck,
        cycle: bool,
        prefetch: bool,
    ):
        self._source = source
        self._batch_size = batch_size
        self._sample_shape = sample_shape
        self._dtype = dtype
        self._total_size = total_size
        self._order = order
        self._cycle = cycle
        self._prefetch = prefetch
        self._chunks: Prefetcher | Generator[Any] | None = None
        self._batches: Iterator[Any] = iter(())
        self.position = Position(0, 0, 0)
        self.ended = False
        """Whether there is no current batch, not even a short one, because the source has ended."""
        self._end = 0, 0
        """Epoch and position of the batch that follows."""

    @property
    def is_open(self) -> bool:
        return self._chunks is not None

    def go_to(self, position: Position) -> None:
        """Make the batch at *position* the current one; to be called before :meth:`open`."""
        self.position, self.ended = position, False

    def open(self) -> None:
        """Start reading at the position of the current batch, which comes next."""
        self._order.check_sample()
        chunks = read_epochs(
            self._source,
            self._sample_shape,
            self._dtype,
            epoch=self.position.epoch,
            start=self.position.offset,
            cycle=self._cycle,
        )
        watched = self._order.watch(chunks)
        opened = Prefetcher(watched) if self._prefetch else watched
        self._batches = rebatch(opened, self._batch_size)
        self._chunks = opened

    def next(self, *, used: bool) -> Batch | None:
        """Move to the next batch; one that is not full, or None, ends the stream.

        Parameters
        ----------
        used : bool
            Whether a step has used the current batch, so that it need not come again.
        """
        rows_seen = self.position.rows_seen
        if used:
            rows_seen += self._batch_size
            self.position = Position(*self._end, rows_seen)
        batch = self._read()
        if batch is None:
            self.ended = True
            return None
        self.position = Position(batch.epoch, batch.offset, rows_seen)
        self._end, self.ended = batch.end, False
        return batch

    def conclude(self) -> None:
        """Tell what is not known of the rows, as a fit has ended."""
        self._order.warn_if_incomplete(self.position.rows_seen)

    def stop(self) -> None:
        """End the thread, and close the files."""
        opened = self._chunks
        self._chunks, self._batches = None, iter(())
        if opened is not None:
            opened.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_chunks": None, "_batches": iter(())}

    def _read(self) -> Batch | None:
        for item in self._batches:
            if isinstance(item, Batch):
                self._total_size.check_part(item.end[1])
                return item
            if isinstance(item, EpochEnd):
                self._total_size.check_epoch(item.n_rows)
            else:
                self._order.raise_or_warn(item)
        return None
