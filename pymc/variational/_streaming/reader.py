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
import time

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Literal, NamedTuple

import numpy as np

from pytensor.compile.sharedvalue import SharedVariable

from pymc.variational._streaming.batches.prefetch import Prefetcher, read_epochs
from pymc.variational._streaming.batches.rebatch import Batch, Chunk, EpochEnd, rebatch
from pymc.variational._streaming.contract import Contract
from pymc.variational._streaming.errors import StreamError, warn
from pymc.variational._streaming.likelihood import Factors
from pymc.variational._streaming.order.check import OrderCheck
from pymc.variational._streaming.sources.base import Source
from pymc.variational._streaming.utils import EpochLog, positive_int

__all__ = ["BatchReader", "Position", "TotalSize"]

logger = logging.getLogger(__name__)


class Position(NamedTuple):
    """Where a batch starts."""

    epoch: int
    offset: int
    rows_seen: int
    """Number of rows in all batches before it."""


@dataclass(eq=False)
class BatchReader:
    """Read batches, and know where the current one starts.

    The batches have the source's own dtype, and values that *dtype* holds exactly.  A copy has no
    open files, and goes on from the same batch.
    """

    source: Source
    batch_size: int
    sample_shape: tuple[int, ...]
    dtype: np.dtype
    total_size: "TotalSize"
    order: OrderCheck
    cycle: bool
    prefetch: bool

    def __post_init__(self) -> None:
        self._examiner = _Examiner(self.source, self.order)
        self._items: Prefetcher | Generator[Any] | None = None
        self._batches: Iterator[Any] = iter(())
        self._log = EpochLog(logger)
        self._thread: threading.Thread | None = None
        """The thread that has read last."""
        self.position = self._next = Position(0, 0, 0)
        """Where the current batch starts, and where the one that comes next does."""
        self.ended = False
        """Whether there is no current batch, not even a short one, because the source has ended."""

    @property
    def is_open(self) -> bool:
        return self._items is not None

    def go_to(self, position: Position) -> None:
        """Make the batch at *position* the current one; to be called before :meth:`open`."""
        self.position, self.ended = position, False

    def compare_by(self, factors: Factors | None, buffer: SharedVariable) -> None:
        """Compare the rows from the current batch on by a model that is not known yet."""
        if factors is not None and not self.order.knows(factors):
            self.stop()
            self.order.use_model(factors, buffer)

    def open(self) -> None:
        """Start reading at the position of the current batch, which comes next."""
        if self._thread is not None:
            self._thread.join()  # it may still be in a read that was interrupted
        self.order.check_sample()
        self._next = self.position
        self._log = EpochLog(logger, self.position.offset)
        items = read_epochs(
            self.source,
            self.sample_shape,
            self.dtype,
            epoch=self.position.epoch,
            start=self.position.offset,
            cycle=self.cycle,
            examine=self._examiner,
        )
        self._items = items
        if self.prefetch:
            self._items = Prefetcher(items)
            self._thread = self._items.thread
        self._batches = rebatch(self._items, self.batch_size)

    def next(self) -> Batch | None:
        """Move to the next batch; one that is not full, or None, ends the stream."""
        if isinstance(self._items, Prefetcher):
            self._items.touch()
        self.position = self._next  # also if the read fails: a step has used the batch before
        start = time.perf_counter()
        batch = self._read()
        self._log.waited += time.perf_counter() - start
        self.ended = batch is None
        if batch is not None:
            self._examiner.require(batch)
            rows_seen = self.position.rows_seen
            self.position = Position(batch.epoch, batch.offset, rows_seen)
            self._next = Position(*batch.end, rows_seen + len(batch.rows))
        return batch

    def hold_to(self, contract: Contract | None) -> None:
        """Check that all rows from now on meet a contract."""
        if contract is not self._examiner.contract:
            self._examiner.met = None, (0, 0)  # rows may have been read without it
            self._examiner.contract = contract

    def require(self, rows: np.ndarray) -> None:
        """Raise StreamError if rows that are not of the stream break what the model needs."""
        if self._examiner.contract is not None:
            self._examiner.contract.without_supports().check(rows)

    def stop(self) -> None:
        """End the thread, and close the files."""
        opened = self._items
        self._items, self._batches = None, iter(())
        if opened is not None:
            opened.close()

    def __getstate__(self) -> dict[str, Any]:
        return {
            **self.__dict__,
            "_items": None,
            "_batches": iter(()),
            "_thread": None,
            "_examiner": _Examiner(self.source, self.order),
        }

    def _read(self) -> Batch | None:
        for item in self._batches:
            if isinstance(item, Batch):
                self.total_size.compare(item.end[1], whole=False)
                return item
            if isinstance(item, EpochEnd):
                self.total_size.compare(item.n_rows, whole=True)
                self._log.end_epoch(item.epoch, item.n_rows)
            else:
                self.order.raise_or_warn(item)
        return None


class _Examiner:
    """What looks at rows when they are read, in the thread that reads ahead.

    The thread must not refer to the reader, or that would never be collected.
    """

    def __init__(self, source: Source, order: OrderCheck):
        self.contract: Contract | None = None
        self._source, self._order = source, order
        self.met: tuple[Contract | None, tuple[int, int]] = None, (0, 0)
        """Which contract the rows meet, and from which place on."""

    def __call__(self, item: Chunk | EpochEnd) -> tuple[Any, ...]:
        contract = self.contract
        if contract is not None and isinstance(item, Chunk) and len(item.rows):
            self._check(contract, item)
            if self.met[0] is not contract:
                self.met = contract, (item.epoch, item.offset)
        found = self._order.compare(item)
        return (item,) if found is None else (found, item)

    def require(self, batch: Batch) -> None:
        """Check a batch whose rows were read before the contract was known."""
        contract, (met, place) = self.contract, self.met
        if contract is None:
            return
        if met is not contract or (batch.epoch, batch.offset) < place:
            self._check(contract, batch)
        contract.compile()

    def _check(self, contract: Contract, item: Chunk | Batch) -> None:
        contract.check(
            item.rows, item.offset, lambda row: self._source.locate(item.epoch, row, row + 1)
        )


class TotalSize:
    """The rows of the whole data set: the declared number, compared with those that are seen."""

    def __init__(
        self, declared: int | Literal["auto"] | None, source: Source, *, endless: bool = False
    ):
        self._known = source.n_rows
        """Number of rows that the source has, if it is known before an epoch ends."""
        self._warned = endless
        self.rows: int | None = None
        """Number for the ``total_size`` of observed variables."""
        if endless and (self._known is not None or not isinstance(declared, Integral)):
            held = (
                f"the source has {self._known} rows" if self._known else f"total_size={declared!r}"
            )
            raise ValueError(
                f"endless=True but {held}; pass the number of rows that the likelihood stands for "
                "as total_size, with a source that does not know its rows"
            )
        if declared is None:
            warn(
                "total_size=None leaves the likelihood of one batch unscaled against the "
                'prior; pass total_size="auto" or the number of rows'
            )
        elif isinstance(declared, str) and declared == "auto":
            self.rows = self._known = self._known or _count(source)
        else:
            self.rows = positive_int("total_size", declared)
            if self._known not in (None, self.rows):
                self._warn(f"{self._known} rows")

    def compare(self, n_rows: int, *, whole: bool) -> None:
        """Compare the rows of an epoch, or of the part that was read: an epoch may never end."""
        if self._known is not None:
            if whole and n_rows != self._known:
                raise StreamError(
                    f"the source gave {n_rows} rows in an epoch but {self._known} before; "
                    "the data changed: make the dataset anew"
                )
        elif self.rows is not None and not self._warned:
            if n_rows > self.rows or (whole and n_rows < self.rows):
                self._warn(f"{n_rows} rows" if whole else f"at least {n_rows} rows")

    def _warn(self, found: str) -> None:
        self._warned = True
        warn(
            f"total_size={self.rows} but the source holds {found}, so the likelihood is weighted "
            'wrongly; pass total_size="auto" or the number of rows in an epoch, or endless=True if '
            "the stream has no end"
        )


def _count(source: Source) -> int:
    logger.info('total_size="auto": the source does not know its rows; counting them')
    n_rows = source.count()
    if not n_rows:
        raise ValueError("source has no rows")
    logger.info(f"counted {n_rows:,} rows")
    return n_rows
