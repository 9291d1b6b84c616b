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
"""Minibatches from a stream, in a shared variable that a model can observe."""

import weakref

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal

import numpy as np
import pytensor

from pytensor.compile.sharedvalue import SharedVariable
from pytensor.tensor.variable import TensorVariable

from pymc.variational._streaming.batches.prefetch import read_epochs
from pymc.variational._streaming.batches.rebatch import Batch, cast, rebatch
from pymc.variational._streaming.batches.window import ShuffleBuffer
from pymc.variational._streaming.callback import FitCallback, Offer
from pymc.variational._streaming.errors import StreamError, warn
from pymc.variational._streaming.order.check import OrderCheck
from pymc.variational._streaming.reader import BatchReader, Position, TotalSize
from pymc.variational._streaming.sources.arrays import as_source
from pymc.variational._streaming.sources.arrow import with_columns
from pymc.variational._streaming.sources.base import Source, match_shape
from pymc.variational._streaming.utils import positive_int

__all__ = ["StreamingDataset"]


class StreamingDataset:
    """A stream of minibatches that a model can observe.

    Parameters
    ----------
    source : Source, ndarray, callable or iterable
        A :func:`parquet_source`, an :func:`arrow_source`, a :func:`shuffle_buffer` over one of
        them, an array, or an iterable, a factory or an iterator of blocks, which are arrays of
        shape ``(rows, *sample_shape)`` or Arrow record batches.
    batch_size : int
        Rows of a minibatch.
    sample_shape : tuple of int, optional
        Shape of one row, e.g. ``(4,)`` for four columns. Default: learned from the source.
    total_size : int, "auto" or None, default "auto"
        Rows of the whole data set, which scale the likelihood. "auto" asks the source, or counts
        in one pass. An int is checked against the rows that are seen. None scales nothing.
    dtype : dtype, optional
        Type of the values of a minibatch. Default: ``pytensor.config.floatX``.
    cycle : bool, default True
        Start another epoch when the source ends. If False, the fit stops there.
    endless : bool, default False
        Whether the source never ends, as a generator of new rows. The *total_size*, which must be
        an int, then says how many rows the posterior stands for, and counts as an epoch.
    order_check : {"warn", "raise", "off"}, default "warn"
        What to do when windows of the stream differ more than random ones would, so that the
        posterior would be wrong: warn once with an :class:`OrderWarning`, or raise an
        :class:`OrderError`. A sample is checked before the first step, and the rows while they
        stream; see :func:`check_order`.
    prefetch : bool, default True
        Read ahead in a thread; the batches are the same either way. While its batches are used,
        all threads of the process are switched every 0.1 ms (``sys.setswitchinterval``).
    name : str, default "stream"
        Name of the shared variable.

    Raises
    ------
    ValueError, TypeError
        If an argument does not fit the source.
    StreamError
        While streaming: if a value is NaN, infinite or not exact in *dtype*, or not what the model
        needs (see :meth:`fit_callback`), the data changed, or a one-shot source ran out.

    Notes
    -----
    Every epoch uses every row exactly once: rows that do not fill its last batch open the first
    batch of the next epoch. The same source, seed and parameters give the same batches.

    Memory does not grow with the number of rows: two windows of a shuffle buffer in the source's
    own dtype, two blocks of the source, and one batch in *dtype*.

    While the stream is closed, as it is at first, the buffer has no rows. A likelihood with a
    ``total_size`` is NaN then, so that a fit without the callback fails at its first step.

    Examples
    --------
    >>> import numpy as np
    >>> import pymc as pm
    >>> ds = StreamingDataset(np.random.normal(size=(10_000, 1)), batch_size=500)
    >>> with pm.Model():
    ...     mu = pm.Normal("mu")
    ...     y = pm.Normal("y", mu, observed=ds.as_tensor()[:, 0], total_size=ds.total_size)
    ...     approx = pm.fit(1_000, callbacks=[ds.fit_callback()], progressbar=False)
    """

    def __init__(
        self,
        source: Any,
        *,
        batch_size: int,
        sample_shape: tuple[int, ...] | None = None,
        total_size: int | Literal["auto"] | None = "auto",
        dtype: Any = None,
        cycle: bool = True,
        endless: bool = False,
        order_check: Literal["warn", "raise", "off"] = "warn",
        prefetch: bool = True,
        name: str = "stream",
    ):
        self._source = as_source(source)
        self._batch_size = positive_int("batch_size", batch_size)
        if isinstance(self._source, ShuffleBuffer):
            self._source.require_batch(self._batch_size)
        self._sample_shape = match_shape(self._source, sample_shape)
        self._dtype = np.dtype(pytensor.config.floatX if dtype is None else dtype)
        if self._dtype.kind not in "iuf":
            raise TypeError(f"dtype={dtype!r} is not a number; pass an integer or float dtype")
        self._endless = endless
        self._total_size = TotalSize(total_size, self._source, endless=endless)
        self._order = OrderCheck(self._source, self._batch_size, self.total_size, order_check)
        self._reader = BatchReader(
            self._source,
            self._batch_size,
            self._sample_shape,
            self._dtype,
            total_size=self._total_size,
            order=self._order,
            cycle=cycle,
            prefetch=prefetch,
        )
        self._buffer = pytensor.shared(self._no_rows(), name, shape=(None, *self._sample_shape))
        self._buffer.tag.fit_callback = Offer(name, self._buffer.container, self)
        self._end: weakref.finalize | None = None
        """What closes the stream when the callback that drives it is gone, or Python ends."""
        self._replaced: np.ndarray | None = None
        """What the buffer holds again after ``rows()``."""

    @property
    def batch_size(self) -> int:
        """Rows of a minibatch."""
        return self._batch_size

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of one row."""
        return self._sample_shape

    @property
    def total_size(self) -> int | None:
        """Rows of the whole data set, for the ``total_size`` of observed variables."""
        return self._total_size.rows

    @property
    def columns(self) -> tuple[str, ...] | None:
        """Names of the columns, where the source has them."""
        self._source.probe()
        return self._source.columns

    @property
    def seed(self) -> int | None:
        """Seed of the source's shuffle, None where nothing is shuffled."""
        return self._source.seed

    @property
    def epoch(self) -> int:
        """Epoch of the first row of the current batch, from 0; at the end, the number of epochs."""
        if self._endless and self.total_size:
            return self.rows_seen // self.total_size
        return self._reader.position.epoch + self._reader.ended

    @property
    def rows_seen(self) -> int:
        """Rows of all batches before the current one."""
        return self._reader.position.rows_seen

    def as_tensor(self) -> SharedVariable:
        """Return the buffer that holds the current batch, ``(batch_size, *sample_shape)``."""
        return self._buffer

    @property
    def coords(self) -> dict[str, tuple[Any, ...]]:
        """Levels of the category columns, for ``pm.Model(coords=ds.coords)``.

        A null is "null", or "(null)" beside a string "null".
        """
        self._source.probe()
        coords = {}
        for name, levels in self._source.levels.items():
            null = "(null)" if "null" in levels else "null"
            coords[name] = tuple(null if level is None else level for level in levels)
        return coords

    def __getitem__(self, column: str | list[str]) -> TensorVariable:
        """Return a column of the current batch, shape (batch_size,), or a matrix of several."""
        columns = self.columns or ()
        names = list(column) if isinstance(column, list | tuple) else [column]
        missing = [name for name in names if name not in columns]
        if missing or not names:
            raise KeyError(
                f"{', '.join(map(repr, missing)) or '[]'} is not a column of the source, which "
                f"names {list(columns)}; slice ds.as_tensor() by position"
            )
        places = [columns.index(name) for name in names]
        if isinstance(column, str):
            return self._buffer[:, places[0]]
        # Neighbours are a slice, which is a view; columns one by one would be copied in each step.
        runs = np.split(places, np.flatnonzero(np.diff(places) != 1) + 1)
        slices = [self._buffer[:, run[0] : run[-1] + 1] for run in runs]
        return pytensor.tensor.concatenate(slices, axis=1)

    def index(self, column: str) -> TensorVariable:
        """Return the positions of a category column among its levels, int64, (batch_size,)."""
        if column not in self.coords:
            raise KeyError(
                f"{column!r} is not a category column; pass categories=[{column!r}] to the source"
            )
        return self[column].astype("int64")

    def __repr__(self) -> str:
        rows = self._source.describe(None if self._endless else self.total_size)
        return (
            f"<StreamingDataset {self._buffer.name!r}: batches of {self._batch_size:,} from "
            f"{rows}; epoch {self.epoch}, {self.rows_seen:,} rows seen>"
        )

    def __iter__(self) -> Iterator[np.ndarray]:
        """Yield the batches of one epoch, the last as short as it comes; the buffer stays."""
        return self._read_once(self._source, self._batch_size)

    def __array__(self, *args: Any, **kwargs: Any) -> np.ndarray:
        raise TypeError("a stream is no array; pass a slice of ds.as_tensor(), or ds[...] by name")

    def fit_callback(self) -> FitCallback:
        """Put the first batch in, and return the callback that puts in the next ones.

        Returns
        -------
        callable
            For ``pm.fit(callbacks=[...])``, as the last one, so that the others see the batch
            that the step used. It also serves :meth:`Inference.refine`, which repeats a batch if
            an interrupt came while the fit waited for the next one. A newer callback takes the
            stream over, as :meth:`advance` does, and calling the older one is an error. When the
            callback is no longer referenced, as after :func:`pymc.fit`, the stream is closed; the
            next callback goes on with the batch that no step has used.

        Raises
        ------
        StreamError
            If the model in whose context this is called uses the stream wrongly: no observed
            variable depends on it, or one has another ``total_size``, or its log-likelihood is
            not one independent term per row. Without a context, the first step finds it.
            From then on every row must be what the model needs: whole numbers where a column is
            cast to integers, indices within the axis that they index, observed values in the
            support of their distribution, and parameters that it gives within their bounds.
        """
        self._require_own_rows()
        callback = self._driver = FitCallback(self)
        callback.begin()
        return callback

    def advance(self) -> bool:
        """Put the next batch into the buffer, for loops of your own.

        A batch that a callback has put in, and that no step has used, counts as the next one.
        False means that the source has ended (``cycle=False``), and that the buffer has no rows.
        A call that opens the stream in the context of a model that observes it checks the model
        and its rows, as :meth:`fit_callback` does; a loop outside of one is not checked.
        """
        self._require_own_rows()
        is_driven, self._driver = self._driver is not None, None
        if self._reader.is_open:
            return is_driven or self._advance()
        return FitCallback(self).begin(must_observe=False)

    def rows(self, rows: Any) -> AbstractContextManager[None]:
        """Put rows of your own into the buffer for the length of a ``with`` block.

        This serves predictions and log-likelihoods after a fit. The stream does not move
        meanwhile, so that :meth:`advance` and :meth:`fit_callback` are refused, and afterwards
        the buffer holds what it held before.

        Parameters
        ----------
        rows : ndarray, Source or Arrow table
            Any number *n* of rows, which are held in memory: an array of shape
            ``(n, *sample_shape)``, or a table or data frame, which is read by the names of the
            stream's columns. They are checked as those of a batch are.

        Notes
        -----
        PyMC scales the likelihood of *n* rows to ``total_size``, so the result of
        :func:`pymc.compute_log_likelihood` must be multiplied by ``n / ds.total_size``.

        Examples
        --------
        >>> import numpy as np
        >>> ds = StreamingDataset(np.ones((1_000, 2)), batch_size=100)
        >>> with ds.rows(np.zeros((3, 2))):
        ...     ds.as_tensor().sum(axis=1).eval()
        array([0., 0., 0.])
        """
        self._require_own_rows()
        source = with_columns(rows, self._source)
        own = np.concatenate(list(self._read_once(source, self._batch_size)))
        self._reader.require(own)
        return self._replace(own)

    def state_dict(self) -> dict[str, Any]:
        """Return the position of the current batch, as plain JSON."""
        return {
            **self._reader.position._asdict(),
            "batch_size": self._batch_size,
            "dtype": str(self._dtype),
            "seed": self._source.seed,
            "fingerprint": self._source.fingerprint,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a position that :meth:`state_dict` of a dataset of the same making gave.

        The batch that was current then comes next, since no step may have used it yet.
        """
        for key, mine in self.state_dict().items():
            if key not in Position._fields and state[key] != mine:
                raise ValueError(
                    f"{key}={mine!r} where the state was saved with {state[key]!r}; "
                    "make the dataset as it was then, of the same rows, columns and levels"
                )
        self.close()
        self._reader.go_to(Position(*(state[key] for key in Position._fields)))

    def close(self) -> None:
        """End the thread, close the files, and leave no rows in the buffer, but keep the place."""
        if self._replaced is not None:
            self._replaced = self._no_rows()
        else:
            self._buffer.set_value(self._no_rows(), borrow=True)
        self._reader.stop()

    def __getstate__(self) -> dict[str, Any]:
        """Leave the thread and the open files behind; a copy goes on from the same batch."""
        return {**self.__dict__, "_end": None, "_replaced": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._buffer.tag.fit_callback.dataset = weakref.ref(self)

    def __copy__(self) -> "StreamingDataset":
        raise TypeError("a shallow copy would share the buffer; use copy.deepcopy")

    def __enter__(self) -> "StreamingDataset":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    @property
    def _driver(self) -> FitCallback | None:
        """The callback that drives the stream, if one does; the stream is closed when it is gone."""
        driver = self._end and self._end.peek()
        return driver[0] if driver else None

    @_driver.setter
    def _driver(self, callback: FitCallback | None) -> None:
        if self._end:
            self._end.detach()
        self._end = weakref.finalize(callback, _end_fit, weakref.ref(self)) if callback else None

    def _read_once(self, source: Source, n_rows: int) -> Iterator[np.ndarray]:
        """Yield one epoch of *source* in blocks of *n_rows*, the last as short as it comes."""
        items = rebatch(read_epochs(source, self._sample_shape, self._dtype, cycle=False), n_rows)
        return (cast(item.rows, self._dtype) for item in items if isinstance(item, Batch))

    def _no_rows(self) -> np.ndarray:
        return np.empty((0, *self._sample_shape), self._dtype)

    @contextmanager
    def _replace(self, rows: np.ndarray) -> Iterator[None]:
        self._require_own_rows()
        try:
            self._replaced = self._buffer.get_value(borrow=True)
            self._buffer.set_value(rows, borrow=True)
            yield
        finally:
            if self._replaced is not None:
                self._buffer.set_value(self._replaced, borrow=True)
                self._replaced = None

    def _require_own_rows(self) -> None:
        if self._replaced is not None:
            raise StreamError("the buffer holds other rows; leave the `with ds.rows(...)` first")

    def _advance(self, *, is_last: bool = False) -> bool:
        """Put the next batch in, and warn of the end of the source but after the *last* step."""
        self._require_own_rows()
        was_open = self._reader.is_open
        try:
            if not was_open:
                self._reader.open()
            batch = self._reader.next()
            if batch is not None and len(batch.rows) == self._batch_size:
                # set_value would take microseconds to check a type that is known here.
                self._buffer.container.storage[0] = cast(batch.rows, self._dtype)
                return True
        except KeyboardInterrupt:
            self._pause()
            raise
        except BaseException:
            self.close()
            raise
        self._pause()
        n_left = 0 if batch is None else len(batch.rows)
        if not is_last:
            warn(
                f"the source ended after {self.rows_seen // self._batch_size} batches of "
                f"{self._batch_size} rows, with {n_left} rows left over (cycle=False)"
            )
        if not was_open:
            self.close()
            raise StreamError(
                f"the source has no full batch of {self._batch_size} rows left; "
                "make the dataset anew to start over"
            )
        return False

    def _pause(self) -> None:
        """Stop, but keep the batch for a callback: ``Inference.refine`` steps before it calls."""
        if self._driver is None:
            self.close()
        else:
            self._reader.stop()


def _end_fit(dataset: "weakref.ref[StreamingDataset]") -> None:
    """Close a stream whose callback is gone, and tell what no step could tell any more."""
    if (ds := dataset()) is not None:
        ds.close()
        if not ds._endless:
            ds._order.tell_the_rest(ds.rows_seen)
