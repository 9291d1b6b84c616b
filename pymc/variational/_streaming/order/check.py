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

import numpy as np

from pytensor.compile.sharedvalue import SharedVariable

from pymc.model.core import Model
from pymc.variational._streaming.batches.rebatch import Chunk, EpochEnd
from pymc.variational._streaming.batches.window import ShuffleBuffer
from pymc.variational._streaming.errors import OrderError, OrderWarning, warn
from pymc.variational._streaming.guards import streams_of
from pymc.variational._streaming.likelihood import Factors
from pymc.variational._streaming.order.monitor import Monitor
from pymc.variational._streaming.order.preflight import preflight
from pymc.variational._streaming.order.report import OrderReport, Stream, report_one_window
from pymc.variational._streaming.order.statistic import Features, ModelScore, Statistic
from pymc.variational._streaming.sources.arrays import as_source
from pymc.variational._streaming.sources.base import Source
from pymc.variational._streaming.utils import positive_int

__all__ = ["OrderCheck", "OrderReport", "check_order"]

logger = logging.getLogger(__name__)

_USUAL_BATCH = 4_096
"""Number of rows in a window where neither a buffer nor its size is given."""


def check_order(
    source: Any, *, model: Model | None = None, buffer_size: int | None = None, seed: int = 0
) -> OrderReport:
    """Tell whether the windows that a stream emits differ more than random ones would.

    Parameters
    ----------
    source : Source, ndarray, callable or iterable
        Whatever :class:`StreamingDataset` accepts.
    model : Model, optional
        Model that observes a stream of these rows: windows are then compared by its score, the
        gradient of the log-likelihood in the unconstrained parameters, and columns that it does
        not read take no part. Default: windows are compared by columns, squares and products.
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
    ValueError
        If *model* observes no stream, or several, or one with other columns.

    Notes
    -----
    Parquet files and arrays are judged by a sample of up to 262,144 rows
    from at most 64 windows all over the table. Anything else is read once from end to end; a
    one-shot iterator is used up by that.

    The sample is cut into blocks, whose sums are compared by their ranks (van der Waerden's
    test, and counts of the extremes): all shuffled rows give these the same distribution. False
    alarms are below 1 in 10,000 tables. The score is compared near the initial point and at the
    optimum of some of the rows; of more than 64 parameters, 64 random sums are. Without a model,
    an order that changes nothing but higher moments is not seen; it can bias a posterior.

    References
    ----------
    Conover, W. J. (1999). Practical Nonparametric Statistics, 3rd edition, section 5.10. Wiley.

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
    check = OrderCheck(rows, min(window, _USUAL_BATCH), rows.n_rows, "warn")
    if model is not None:
        buffer = _stream_of(model)
        _require_columns(rows, buffer)
        check.use_model(Factors(model), buffer)
    stream = Stream(rows, window, rows.n_rows)
    report = preflight(stream, check.make_statistic, seed)
    if report is not None:
        return report
    monitor = Monitor(stream, check.make_statistic, whole=True)
    for block in ShuffleBuffer(rows, window, 1, seed).blocks():
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
        self._is_off = action == "off" or (rows.n_rows is not None and rows.n_rows <= window)
        """Whether there is nothing to compare, also because one window holds all rows."""
        self._told = False
        self._start_over()

    def _start_over(self) -> None:
        """Forget what was compared, and by which model."""
        self._variables: list[Any] = []
        """The model and its variables, if there is one."""
        self._model: ModelScore | None = None
        self._statistic: Statistic | None = None
        self._finding: OrderReport | None = None
        self._sampled = self._is_off or self._stream.source.shuffled
        self._sample: OrderReport | None = None
        """What the sample has shown, if one was taken."""
        self._monitor: Monitor | None = None
        self._told_the_rest = False
        self._watched = self._is_off
        """Whether the monitor has compared all of an epoch; others would count twice."""

    def knows(self, factors: Factors) -> bool:
        """Whether rows are compared by this model, which has not changed since, if they are."""
        known = map(id, self._variables)
        return self._is_off or list(map(id, _variables(factors.model))) == list(known)

    def use_model(self, factors: Factors, buffer: SharedVariable) -> None:
        """Compare rows by the score of a model that observes *buffer*, all anew.

        A model that cannot be used is refused by name when it is checked.
        """
        self._start_over()
        self._variables = _variables(factors.model)
        try:
            self._model = ModelScore(factors, buffer)
        except Exception as error:
            _log_fallback(error)

    def make_statistic(self, pilot: np.ndarray) -> Statistic:
        """Return what is compared: the score of the model, if one is known that any rows fit."""
        if self._statistic is None and self._model is not None:
            try:
                self._statistic = self._model.at(pilot, self._stream.n_rows or len(pilot))
            except Exception as error:
                self._model = None
                _log_fallback(error)
        return self._statistic or Features(pilot, self._stream.source.columns)

    def __getstate__(self) -> dict[str, Any]:
        compiled = dict.fromkeys(("_model", "_statistic", "_monitor"))
        return {**self.__dict__, **compiled, "_variables": []}

    def check_sample(self) -> None:
        """Sample the source, once, and raise or warn if its rows are in an order."""
        if not self._sampled:
            self._sampled = True
            self._sample = preflight(self._stream, self.make_statistic, 0)
            self._note(self._sample)
        if self._finding is not None:
            self.raise_or_warn(self._finding)

    def compare(self, item: Chunk | EpochEnd) -> OrderReport | None:
        """Compare the windows up to *item*, and return a report when order first shows."""
        monitor, epoch = self._monitor, item.epoch
        if self._finding is not None or self._watched or (monitor and epoch < monitor.epoch):
            return self._finding
        ends = isinstance(item, EpochEnd)
        start = item.n_rows if isinstance(item, EpochEnd) else item.offset
        if monitor is None or epoch > monitor.epoch or start > monitor.stop:
            monitor = Monitor(self._stream, self.make_statistic, start, epoch=epoch)
            self._monitor = monitor
        if isinstance(item, Chunk):
            monitor.add(item.offset, item.rows)
        self._watched = ends and monitor.start == 0
        self._note(monitor.compare(last=ends))
        return self._finding

    def _note(self, report: OrderReport | None) -> None:
        if report is not None and report.ordered:
            self._finding = report

    def raise_or_warn(self, report: OrderReport) -> None:
        """Raise the finding as an error or, once, warn of it."""
        told, self._told = self._told, True
        if self._action == "raise":
            raise OrderError(str(report))
        if not told:
            warn(str(report), OrderWarning)

    def tell_the_rest(self, rows_used: int) -> None:
        """At the end of a fit, tell what was found after the last step, and what is unknown."""
        monitor, watched = self._monitor, self._watched
        if self._finding is None and monitor is not None and not watched:
            self._note(monitor.compare(last=True))
        if self._finding is not None:
            if not self._told:
                self._told = True
                warn(f"{self._finding}; found when the last step had been made", OrderWarning)
        elif rows_used and not watched and not self._stream.source.shuffled:
            told, self._told_the_rest = self._told_the_rest, True
            if told:
                return
            user = "fit"
            if monitor is not None and monitor.epoch > 0:  # of a fit that was resumed
                user, rows_used = "check of the order", monitor.stop - monitor.start
            level, known = logging.WARNING, "was not compared"
            if self._sample is not None:
                level = logging.INFO
                known = f"is known from a sample of {self._sample.rows_read:,} rows only"
            logger.log(
                level,
                f"The {user} used {rows_used:,} rows, less than one epoch, and the order of the rows "
                f"beyond them {known}; if they may be in an order, run check_fit, which reads all "
                "rows, or fit one epoch at least",
            )


def _windows(source: Source, batch_size: int) -> tuple[Source, int]:
    """Return the source of the rows, and how many are shuffled together."""
    if isinstance(source, ShuffleBuffer):
        return source.source, source.buffer_size
    return source, batch_size


def _variables(model: Model) -> list[Any]:
    """Return what the density of a model depends on, but for data."""
    return [model, *model.basic_RVs]


def _log_fallback(error: Exception) -> None:
    """Tell that a model is not asked, and why."""
    reason = str(error).partition("\n")[0] or type(error).__name__
    logger.info(
        "The order of the rows is judged by their columns: the score of the model cannot be "
        f"evaluated ({reason})"
    )


def _require_columns(rows: Source, buffer: SharedVariable) -> None:
    """Refuse rows that have other columns than the stream in *buffer*."""
    reference = buffer.tag.fit_callback.dataset
    dataset = reference and reference()
    expected = (dataset and dataset.columns) or rows.columns, buffer.type.shape[1:]
    if (rows.columns or expected[0], rows.sample_shape) != expected:
        raise ValueError(
            f"source has rows of {rows.columns or rows.sample_shape} where the stream of the model "
            f"has {expected[0] or expected[1]}; pass the source of its StreamingDataset"
        )


def _stream_of(model: Model) -> SharedVariable:
    """Return the buffer of the stream that *model* observes."""
    shared = streams_of(model, model.basic_RVs)
    if len(shared) != 1:
        raise ValueError(
            f"the model observes {len(shared)} streams; pass one that observes the rows through "
            "StreamingDataset.as_tensor()"
        )
    return shared[0]
