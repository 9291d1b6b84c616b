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
"""Batches one after the other, and how many rows there are of them."""

import logging
import threading

from collections.abc import Generator, Iterator
from typing import Any, Literal, NamedTuple

import numpy as np

from pymc.variational._streaming.batches.prefetch import Prefetcher, read_epochs
from pymc.variational._streaming.batches.rebatch import Batch, EpochEnd, rebatch
from pymc.variational._streaming.errors import StreamError, warn
from pymc.variational._streaming.order.check import OrderCheck
from pymc.variational._streaming.sources.base import Source
from pymc.variational._streaming.utils import positive_int

__all__ = ["BatchReader", "Position", "TotalSize"]

logger = logging.getLogger(__name__)


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
        Type that must hold the values; the batches have the source's own.
    total_size : TotalSize
        Number that the rows of each epoch are compared with.
    order : OrderCheck
        Check that is shown all rows.
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
        total_size: "TotalSize",
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
        self._items: Prefetcher | Generator[Any] | None = None
        self._batches: Iterator[Any] = iter(())
        self._thread: threading.Thread | None = None
        """The thread that has read last."""
        self.position = Position(0, 0, 0)
        self.ended = False
        """Whether there is no current batch, not even a short one, because the source has ended."""
        self._end = 0, 0
        """Epoch and position of the batch that follows."""

    @property
    def is_open(self) -> bool:
        return self._items is not None

    def go_to(self, position: Position) -> None:
        """Make the batch at *position* the current one; to be called before :meth:`open`."""
        self.position, self.ended = position, False

    def open(self) -> None:
        """Start reading at the position of the current batch, which comes next."""
        if self._thread is not None:
            self._thread.join()  # it may still be in a read that was interrupted
        self._order.check_sample()
        items = read_epochs(
            self._source,
            self._sample_shape,
            self._dtype,
            epoch=self.position.epoch,
            start=self.position.offset,
            cycle=self._cycle,
            compare=self._order.compare,
        )
        if self._prefetch:
            self._items = Prefetcher(items)
            self._thread = self._items.thread
        else:
            self._items = items
        self._batches = rebatch(self._items, self._batch_size)

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
        """Warn of what is not known of the rows, as a fit has ended."""
        self._order.warn_if_incomplete(self.position.rows_seen)

    def stop(self) -> None:
        """End the thread, and close the files."""
        opened = self._items
        self._items, self._batches = None, iter(())
        if opened is not None:
            opened.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_items": None, "_batches": iter(()), "_thread": None}

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


class TotalSize:
    """The rows of the whole data set: the declared number, compared with those that are seen.

    Parameters
    ----------
    declared : int, "auto" or None
        Number of rows.  "auto" asks the source, or counts in one pass; None leaves likelihoods
        unscaled, with a warning.
    source : Source

    Raises
    ------
    ValueError, TypeError
        If *declared* is no number of rows, or there is nothing to count.
    """

    def __init__(self, declared: int | Literal["auto"] | None, source: Source):
        self._source = source
        self._auto = isinstance(declared, str)
        self._warned = False
        self.rows = self._resolve(declared)
        """Number for the ``total_size`` of observed variables."""

    def check_epoch(self, n_rows: int) -> None:
        """Compare the rows of an epoch that has ended with those before, and the declared ones."""
        before = self.rows if self._auto else self._source.n_rows
        if before not in (None, n_rows):
            raise StreamError(
                f"the source gave {n_rows} rows in an epoch but {before} before; "
                "the data changed: make the dataset anew"
            )
        if before is None and self.rows not in (None, n_rows) and not self._warned:
            self._warned = True
            _warn(self.rows, n_rows)

    def check_part(self, n_rows: int) -> None:
        """Compare the rows of an epoch that goes on with the declared ones: it may never end."""
        if self._warned or self._auto or self.rows is None or n_rows <= self.rows:
            return
        if self._source.n_rows is None:  # else it was compared when the dataset was made
            self._warned = True
            warn(
                f"total_size={self.rows} but an epoch of the source has at least {n_rows} rows, so "
                'the likelihood is weighted wrongly; pass total_size="auto" or the number of rows, '
                "and a function whose blocks end after one epoch, since an endless one has no rows "
                "to count"
            )

    def _resolve(self, declared: int | str | None) -> int | None:
        known = self._source.n_rows
        if declared is None:
            warn(
                "total_size=None leaves the likelihood of one batch unscaled against the "
                'prior; pass total_size="auto" or the number of rows'
            )
            return None
        if isinstance(declared, str):
            if declared != "auto":
                raise ValueError(f'total_size={declared!r} is no number; pass an int or "auto"')
            return self._count() if known is None else known
        size = positive_int("total_size", declared)
        if known not in (None, size):
            _warn(size, known)
        return size

    def _count(self) -> int:
        logger.info('total_size="auto": the source does not know its rows; counting them')
        n_rows = self._source.count()
        if not n_rows:
            raise ValueError("source has no rows")
        logger.info(f"counted {n_rows:,} rows")
        return n_rows


def _warn(declared: int | None, found: int | None) -> None:
    warn(
        f"total_size={declared} but the source holds {found} rows, so the likelihood is "
        f'weighted wrongly; pass total_size={found} or "auto"'
    )
