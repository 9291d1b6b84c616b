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
"""Whether the rows are exchangeable: before they are streamed, and while they are."""

import logging

from typing import Any, Literal

from pymc.variational._streaming.batches.rebatch import Chunk, EpochEnd
from pymc.variational._streaming.batches.window import ShuffleBuffer
from pymc.variational._streaming.errors import OrderError, OrderWarning, warn
from pymc.variational._streaming.order.monitor import Monitor
from pymc.variational._streaming.order.preflight import preflight
from pymc.variational._streaming.order.report import OrderReport, Stream, report_one_window
from pymc.variational._streaming.sources.arrays import as_source
from pymc.variational._streaming.sources.base import Source
from pymc.variational._streaming.utils import positive_int

__all__ = ["OrderCheck", "OrderReport", "check_order"]

logger = logging.getLogger(__name__)

_USUAL_BATCH = 4_096
"""Number of rows in a window where neither a buffer nor its size is given."""


def check_order(source: Any, *, buffer_size: int | None = None, seed: int = 0) -> OrderReport:
    """Tell whether the windows that a stream emits differ more than random ones would.

    Parameters
    ----------
    source : Source, ndarray, callable or iterable
        Whatever :class:`StreamingDataset` accepts.
    buffer_size : int, optional
        Rows that are shuffled together. Default: those of the :func:`shuffle_buffer` that
        *source* is, else 4,096, a usual batch of rows that are not shuffled.
    seed : int, default 0
        Seed of the sample.

    Returns
    -------
    OrderReport
        Prints as a verdict; ``.ordered`` is the answer, and ``.plot()`` shows it.

    Raises
    ------
    StreamError
        If a value that is read is NaN or infinite; the message names its place.

    Notes
    -----
    Parquet files and arrays are judged by their footers, or by a sample of up to 131,072
    values (rows times columns) from each of at most 20 windows all over the table. Anything else
    is read once from end to end; a one-shot iterator is used up by that.

    Compared are the means of columns, squares and products over windows, by an analysis of
    variance. False alarms are below 1 in 10,000 tables of shuffled rows. An order that
    changes nothing but higher moments, or only within windows, is not seen; the former can
    bias a posterior.

    Examples
    --------
    >>> import numpy as np
    >>> time = np.linspace(0, 1, 100_000)
    >>> check_order(time.reshape(-1, 1), buffer_size=10_000).ordered
    True
    """
    rows, window = _windows(as_source(source), _USUAL_BATCH)
    if buffer_size is not None:
        window = positive_int("buffer_size", buffer_size)
    rows.probe()
    stream = Stream(rows, window, rows.n_rows)
    report = preflight(stream, seed)
    if report is not None:
        return report
    monitor = Monitor(stream)
    for block in rows.blocks():
        monitor.add(monitor.stop, block)
    return monitor.compare(last=True) or report_one_window(stream._replace(n_rows=monitor.stop))


class OrderCheck:
    """The order checks of one dataset: at most one warning, or an error each time.

    A window has *batch_size* rows where the source does not shuffle.
    """

    def __init__(
        self,
        source: Source,
        batch_size: int,
        n_rows: int | None,
        action: Literal["warn", "raise", "off"],
    ):
        if action not in ("warn", "raise", "off"):
            raise ValueError(
                f"order_check={action!r} is not a choice; pass 'warn', 'raise' or 'off'"
            )
        rows, window = _windows(source, batch_size)
        self._stream = Stream(rows, window, rows.n_rows or n_rows)
        self._action = action
        self._finding: OrderReport | None = None
        self._warned = False
        self._sampled = action == "off" or rows.shuffled
        self._monitor: Monitor | None = None
        self._epoch = -1
        """Epoch that the monitor compares."""
        self._watched = False
        """Whether the monitor has compared all of an epoch; others would count twice."""
        self._complete = self._sampled
        """Whether the comparisons covered all of the table."""

    def check_sample(self) -> None:
        """Sample the source, once, and raise or warn if its rows are in an order."""
        if not self._sampled:
            self._sampled = True
            report = preflight(self._stream, seed=0)
            self._complete = report is not None
            if report is not None and report.ordered:
                self._finding = report
        if self._finding is not None:
            self.raise_or_warn(self._finding)

    def compare(self, item: Chunk | EpochEnd) -> OrderReport | None:
        """Compare the windows up to *item*, and return a report when order first shows."""
        if self._action == "off" or self._finding is not None:
            return None
        if self._watched or item.epoch < self._epoch:
            return None
        ends = isinstance(item, EpochEnd)
        first = item.n_rows if isinstance(item, EpochEnd) else item.offset
        if item.epoch > self._epoch or self._monitor is None:
            self._epoch, self._monitor = item.epoch, Monitor(self._stream, first)
        if isinstance(item, Chunk):
            self._monitor.add(item.offset, item.rows)
        self._watched = ends and self._monitor.start == 0
        self._complete |= ends or self._monitor.start > 0
        report = self._monitor.compare(last=ends)
        if report is not None and report.ordered:
            self._finding = report
        return self._finding

    def raise_or_warn(self, report: OrderReport) -> None:
        """Raise the finding as an error or, once, warn of it."""
        if self._action == "raise":
            raise OrderError(str(report))
        if not self._warned:
            self._warned = True
            warn(str(report), OrderWarning)

    def warn_if_incomplete(self, rows_used: int) -> None:
        """Log a warning if a fit has ended before all rows were compared."""
        if rows_used and not self._complete and self._finding is None:
            self._complete = True
            logger.warning(
                f"The fit used {rows_used:,} rows, less than one epoch, and the order of the rows "
                "beyond them was not compared. If the rows may be in an order, run check_order or "
                "check_fit, or fit one epoch at least."
            )


def _windows(source: Source, batch_size: int) -> tuple[Source, int]:
    """Return the source of the rows, and how many are shuffled together."""
    if isinstance(source, ShuffleBuffer):
        return source.source, source.buffer_size
    return source, batch_size
