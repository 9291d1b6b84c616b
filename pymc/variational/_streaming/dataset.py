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

import warnings
import weakref

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from numbers import Integral
from typing import Any, Literal

import numpy as np
import pytensor

from pytensor.compile.sharedvalue import SharedVariable
from pytensor.tensor.variable import TensorVariable

from pymc.model.core import Model
from pymc.variational._streaming.batches.rebatch import Batch, cast, read_epochs, rebatch
from pymc.variational._streaming.batches.window import ShuffleBuffer
from pymc.variational._streaming.errors import StreamError, StreamWarning
from pymc.variational._streaming.given import given_rows
from pymc.variational._streaming.guards import (
    WITHOUT_LOSS,
    blank,
    check_model,
    check_other_streams,
)
from pymc.variational._streaming.order.check import OrderCheck
from pymc.variational._streaming.reader import BatchReader, Position, TotalSize
from pymc.variational._streaming.sources.arrays import as_source
from pymc.variational._streaming.sources.base import Source, positive_int
from pymc.variational.approximations import Empirical
from pymc.variational.callbacks import Callback

__all__ = ["StreamingDataset"]


class StreamingDataset:
    """A stream of minibatches that a model can observe.

    Parameters
    ----------
    source : Source, ndarray, callable or iterable
        Where the rows come from: :func:`parquet_source`, :func:`arrow_source`, a
        :func:`shuffle_buffer` over one of them, an array or memory map, or a re-iterable, a
        factory or a one-shot iterator of blocks, each an array of shape
        ``(rows, *sample_shape)`` or an Arrow record batch.
    batch_size : int
        Rows of a minibatch.
    sample_shape : tuple of int, optional
        Shape of one row, e.g. ``(4,)`` for four columns. Default: learned from the source.
    total_size : int, "auto" or None, default "auto"
        Rows of the whole data set, which scale the likelihood. "auto" asks the source, or
        counts in one pass. An int is checked against the rows that are seen. None leaves the
        likelihood unscaled.
    dtype : dtype, optional
        Of the minibatch. Default: ``pytensor.config.floatX``.
    cycle : bool, default True
        Start another epoch when the source ends. If False, the fit stops there.
    order_check : {"warn", "raise", "off"}, default "warn"
        What to do when windows of the stream differ more than random ones would, so that the
        posterior would be wrong: warn with an :class:`OrderWarning`, once, or raise an
        :class:`OrderError`. A sample of the source is checked before the first step, and
        the rows while they stream; see :func:`check_order`.
    prefetch : bool, default True
        Read ahead in a thread; the batches are the same either way. While such a stream is open,
        all threads of the process are switched every 0.1 ms (``sys.setswitchinterval``).
    name : str, default "stream"
        Of the shared variable.

    Raises
    ------
    ValueError, TypeError
        If an argument does not fit the source.
    StreamError
        While streaming: if a value is NaN, infinite or not exact in *dtype*, the data
        changed, or a one-shot source ran out; the message names the place.
    OrderError
        While streaming, with ``order_check="raise"``.

    Notes
    -----
    *Guarantees.* Every epoch uses every row exactly once: rows that do not fill its last
    batch open the first batch of the next epoch. The same source, seed and parameters give
    the same batches, with or without prefetch.

    *Memory* does not grow with the number of rows: two windows of a shuffle buffer in the source's
    own dtype, two blocks of the source, and one batch in *dtype*.

    Until :meth:`fit_callback` or :meth:`advance` puts the first batch in, and again after
    the stream has been closed, the buffer holds NaN, so that a fit without the callback
    fails at once (integer buffers hold their type's smallest number instead, or the largest where
    there is no sign; and PyMC casts the observations of a discrete variable to integers, which
    have no NaN).

    Examples
    --------
    >>> import numpy as np
    >>> import pymc as pm
    >>> rng = np.random.default_rng(0)
    >>> rows = rng.normal(size=(10_000, 1))
    >>> ds = StreamingDataset(rows, batch_size=500)
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
        order_check: Literal["warn", "raise", "off"] = "warn",
        prefetch: bool = True,
        name: str = "stream",
    ):
        self._source = as_source(source)
        self._batch_size = positive_int("batch_size", batch_size)
        if isinstance(self._source, ShuffleBuffer) and self._source.batch_size != self._batch_size:
            raise ValueError(
                f"batch_size={batch_size} but the shuffle_buffer was made with "
                f"batch_size={self._source.batch_size}; pass the same to both"
            )
        self._sample_shape = _match_shape(self._source, sample_shape)
        self._dtype = _numeric_dtype(dtype)
        self._total_size = TotalSize(total_size, self._source)
        self._reader = BatchReader(
            self._source,
            self._batch_size,
            self._sample_shape,
            self._dtype,
            total_size=self._total_size,
            order=OrderCheck(self._source, self._batch_size, self.total_size, order_check),
            cycle=cycle,
            prefetch=prefetch,
        )
        self._buffer = pytensor.shared(self._blank(), name=name)
        self._buffer.tag.is_stream = True  # for who meets it in a model
        self._owner: object = None
        self._withheld: np.ndarray | None = None
        """What the buffer will hold when other rows leave it."""

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
        """Epoch that the first row of the current batch belongs to, from 0.

        Where the source has ended with no row left over, there is no such batch, and this is the
        number of whole epochs.
        """
        return self._reader.position.epoch + self._reader.ended

    @property
    def rows_seen(self) -> int:
        """Rows of all batches before the current one."""
        return self._reader.position.rows_seen

    def as_tensor(self) -> SharedVariable:
        """Return the buffer that holds the current batch, ``(batch_size, *sample_shape)``."""
        return self._buffer

    def __getitem__(self, column: str) -> TensorVariable:
        """Return the named column of the current batch, shape (batch_size,)."""
        if not isinstance(column, str):
            raise TypeError("ds[...] takes the name of a column; slice ds.as_tensor() by position")
        columns = self.columns
        if columns is None:
            raise KeyError(f"{column!r}: the source has no column names; slice as_tensor()")
        if column not in columns:
            raise KeyError(f"{column!r} is not a column of the source; it has {list(columns)}")
        return self._buffer[:, columns.index(column)]

    def __iter__(self) -> Iterator[np.ndarray]:
        """Yield the batches of one epoch, the last as short as it comes.

        The model's buffer and the state of the stream are left alone.
        """
        chunks = read_epochs(self._source, self._sample_shape, self._dtype, cycle=False)
        items = rebatch(chunks, self._batch_size)
        return (cast(item.rows, self._dtype) for item in items if isinstance(item, Batch))

    def fit_callback(self) -> Callback:
        """Put the first batch in, and return the callback that puts in the next ones.

        Returns
        -------
        Callback
            For ``pm.fit(callbacks=[...])``, as the last one, so that the others see the batch
            that the step used. It also serves :meth:`Inference.refine`; after an interrupt that
            came while a fit waited for the next batch, that begins with the last one once more.
            A newer callback takes the stream over, as :meth:`advance` does, and calling the older
            one is an error. When the callback is no longer referenced, which is when
            :func:`pymc.fit` returns or fails, the stream is closed; the next callback goes on with
            the batch that no step has used yet.

        Raises
        ------
        StreamError
            If the model in whose context this is called uses the stream wrongly: no observed
            variable depends on it, or one has another ``total_size``, or its log-likelihood is
            not one independent term per row. Without a context, this is found after the first
            step.
        """
        self._require_own_rows()
        self._owner = object()
        callback = _FitCallback(self, self._owner)
        try:
            if not self._reader.is_open:
                self._open()
            model = Model.get_context(error_if_none=False)
            if model is not None and (model.observed_RVs or model.potentials):
                callback.check(model)
        except BaseException:
            self.close()
            raise
        return callback

    def advance(self) -> bool:
        """Put the next batch into the buffer, for loops of your own.

        Returns
        -------
        bool
            False if the source has ended, which happens only with ``cycle=False``; the buffer
            then holds NaN.
        """
        self._require_own_rows()
        self._owner = None
        return self._advance()

    def rows(self, rows: Any) -> AbstractContextManager[None]:
        """Put rows of your own into the buffer for the length of a ``with`` block.

        For what follows a fit: predictions and log-likelihoods of rows of your choice.

        Parameters
        ----------
        rows : ndarray, Source or Arrow table
            Any number *n* of rows, all of which are held in memory: an array of shape
            ``(n, *sample_shape)``, or a table or data frame that speaks Arrow, which is read
            by the names of the stream's columns.

        Returns
        -------
        context manager
            Afterwards, also after an error, the buffer holds what it held before. The stream
            does not move meanwhile: :meth:`advance` and :meth:`fit_callback` are refused.

        Raises
        ------
        StreamError, ValueError, TypeError
            If the rows are not of the stream's shape and columns, or hold a value that would
            be refused in a batch.

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
        given = given_rows(rows, self.columns, self._sample_shape, self._dtype)
        return self._lend(given)

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
        """Go to a position that :meth:`state_dict` gave.

        The next :meth:`fit_callback` or :meth:`advance` puts the batch in that was current
        then, since no step may have used it yet.

        Parameters
        ----------
        state : dict
            Of a dataset that was made in the same way.

        Raises
        ------
        ValueError
            If the source, its seed or the batch size differ.
        """
        for key, mine in self.state_dict().items():
            if key not in Position._fields and state[key] != mine:
                raise ValueError(
                    f"{key}={mine!r} where the state was saved with {state[key]!r}; "
                    "make the dataset as it was then"
                )
        self.close()
        self._reader.go_to(Position(*(state[key] for key in Position._fields)))

    def close(self) -> None:
        """End the thread, close the files, and put NaN in the buffer.

        The position is kept: :meth:`fit_callback` or :meth:`advance` go on from there.
        """
        if self._withheld is not None:
            self._withheld = self._blank()
        else:
            self._buffer.set_value(self._blank(), borrow=True)
        self._reader.stop()

    def __getstate__(self) -> dict[str, Any]:
        """Leave the thread and the open files behind; a copy goes on from the same batch."""
        return {**self.__dict__, "_owner": None, "_withheld": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._buffer.set_value(self._blank(), borrow=True)

    def __copy__(self) -> "StreamingDataset":
        raise TypeError("a shallow copy would share the buffer; use copy.deepcopy")

    def __enter__(self) -> "StreamingDataset":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _blank(self) -> np.ndarray:
        shape = (self._batch_size, *self._sample_shape)
        return np.full(shape, blank(self._dtype), self._dtype)

    @contextmanager
    def _lend(self, rows: np.ndarray) -> Iterator[None]:
        self._require_own_rows()
        batch = self._buffer.get_value(borrow=True)
        try:
            self._withheld = batch
            self._buffer.set_value(rows, borrow=True)
            yield
        finally:
            if self._withheld is not None:
                self._buffer.set_value(self._withheld, borrow=True)
                self._withheld = None

    def _require_own_rows(self) -> None:
        if self._withheld is not None:
            raise StreamError("the buffer holds other rows; leave the `with ds.rows(...)` first")

    def _open(self) -> None:
        """Start reading at the position of the current batch, and put that batch in."""
        self._reader.open()
        if not self._put_next(used=False):
            self.close()
            raise StreamError(
                f"the source has no full batch of {self._batch_size} rows left; "
                "make the dataset anew to start over"
            )

    def _advance(self) -> bool:
        self._require_own_rows()
        if not self._reader.is_open:
            self._open()
            return True
        return self._put_next(used=True)

    def _put_next(self, *, used: bool) -> bool:
        """Put another batch in; *used* is whether a step has used the one that is there."""
        try:
            batch = self._reader.next(used=used)
            if batch is not None and len(batch.rows) == self._batch_size:
                # As set_value does, which takes microseconds to check a type that is known here.
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
        warnings.warn(
            f"the source ended after {self.rows_seen // self._batch_size} batches of "
            f"{self._batch_size} rows, with {n_left} rows left over (cycle=False)",
            StreamWarning,
            stacklevel=4,
        )
        return False

    def _pause(self) -> None:
        """Stop where PyMC takes a fit for complete: ``Inference.refine`` steps before it calls."""
        if self._owner is None:
            self.close()
        else:
            self._reader.stop()


class _FitCallback(Callback):
    """Put the next batch in after each step."""

    is_of_stream = True  # for who is handed it among others

    def __init__(self, dataset: StreamingDataset, token: object):
        self._dataset = dataset
        self._token = token
        self._checked: tuple[Any, ...] = ()
        self._approx: Any = None
        weakref.finalize(self, _release, weakref.ref(dataset), token)

    def check(self, model: Model) -> None:
        factors = (model, *model.basic_RVs, *model.potentials)
        if factors != self._checked:
            check_model(model, self._dataset.as_tensor(), self._dataset.total_size)
            self._checked = factors

    def __call__(self, approx: Any, losses: np.ndarray | None, i: int) -> None:
        if losses is None and not isinstance(approx, Empirical):
            raise StreamError(WITHOUT_LOSS)
        if self._dataset._owner is not self._token:
            raise StreamError(
                "advance() or a newer fit_callback() of this dataset has taken the stream over; "
                "use the newest callback, or a dataset for each fit"
            )
        if approx is not self._approx:
            self.check(approx.model)
            check_other_streams(approx.model, self._dataset.as_tensor())
            self._approx = approx
        if not self._dataset._advance():
            raise StopIteration(f"the stream ended at step {i}")


def _release(dataset: "weakref.ref[StreamingDataset]", token: object) -> None:
    """Close the stream of a callback that is gone, unless a newer one owns it."""
    owned = dataset()
    if owned is not None and owned._owner is token:
        owned.close()
        owned._reader.conclude()


def _match_shape(source: Source, sample_shape: tuple[int, ...] | None) -> tuple[int, ...]:
    if sample_shape is None:
        source.probe()
        assert source.sample_shape is not None
        return source.sample_shape
    if isinstance(sample_shape, Integral):
        raise TypeError(f"sample_shape={sample_shape} must be a tuple; pass ({sample_shape},)")
    shape = tuple(positive_int("sample_shape", n) for n in sample_shape)
    if source.sample_shape not in (None, shape):
        raise ValueError(
            f"sample_shape={shape} but a row of the source has shape {source.sample_shape}"
            + (f", columns {list(source.columns)}" if source.columns else "")
        )
    return shape


def _numeric_dtype(dtype: Any) -> np.dtype:
    chosen = np.dtype(pytensor.config.floatX if dtype is None else dtype)
    if chosen.kind not in "iuf":
        raise TypeError(f"dtype={dtype!r} is not a number; pass an integer or float dtype")
    return chosen
