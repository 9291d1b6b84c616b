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
"""The callbacks that put batches into a model's buffer while it is fitted."""

import math
import weakref

from typing import Any

import numpy as np

from pytensor.compile.sharedvalue import SharedVariable

from pymc.variational._streaming.errors import StreamError, warn
from pymc.variational._streaming.guards import (
    WITHOUT_LOSS,
    check_model,
    check_other_streams,
    infinite_row,
)
from pymc.variational._streaming.likelihood import Factors
from pymc.variational.approximations import Empirical
from pymc.variational.callbacks import Callback

__all__ = ["FitCallback", "Offer"]


class FitCallback(Callback):
    """Put the next batch in after each step, as long as no other callback drives the stream.

    Parameters
    ----------
    dataset : StreamingDataset
    """

    is_of_stream = True

    def __init__(self, dataset: Any):
        self.dataset = dataset
        self._checked: tuple[Any, ...] = ()
        self._step: tuple[int, Any] = (0, None)
        self._approx: Any = None
        self._told = False
        """Whether an infinite loss has been looked into."""

    def check(self, factors: Factors) -> None:
        """Refuse a wrong model; one that has not changed since is not checked again."""
        model = factors.model
        # Those that PyMC has frozen or replaced are no shared variables.
        data = (
            var.get_value(borrow=True) if isinstance(var, SharedVariable) else var
            for var in model.data_vars
        )
        variables = (model, *model.basic_RVs, *model.potentials, *data)
        if list(map(id, variables)) != list(map(id, self._checked)):
            ds = self.dataset
            contract = check_model(factors, ds.as_tensor(), ds.total_size, ds.columns)
            ds._reader.hold_to(contract)
            self._checked = variables

    def __call__(self, approx: Any, losses: np.ndarray | None, i: int) -> None:
        if losses is None and not isinstance(approx, Empirical):
            raise StreamError(WITHOUT_LOSS)
        if self.dataset._driver is not self:
            raise StreamError(
                "advance() or a newer fit_callback() of this dataset has taken the stream over; "
                "use the newest callback, or a dataset for each fit"
            )
        if self._is_repeated(approx, losses, i):
            raise StreamError(
                f"the callback was called twice for step {i}, so that each step would skip a batch; "
                "pass it to the fit once"
            )
        if approx is not self._approx:
            self.check(Factors(approx.model))
            check_other_streams(approx.model)
            self._approx = approx
        if losses is not None and math.isinf(losses[-1]) and not self._told:
            self._told, ds = True, self.dataset
            buffer, place = ds.as_tensor(), ds._reader.position.offset
            batch = buffer.get_value(borrow=True)
            if found := infinite_row(Factors(approx.model), buffer, [batch], ds.columns, place):
                warn(f"the loss of step {i} is infinite: {found}")
        # PyMC shows the part of an array of all steps that has been filled.
        is_last = losses is not None and len(losses) == getattr(losses.base, "size", None)
        if not self.dataset._advance(is_last=is_last) and not is_last:
            raise StopIteration(f"the stream ended at step {i}")

    def __iter__(self) -> Any:
        raise TypeError("a fit takes a list; pass callbacks=[ds.fit_callback()]")

    def _is_repeated(self, approx: Any, losses: np.ndarray | None, i: int) -> bool:
        """Whether no step was made since the last call: another fit has other losses."""
        mark = approx.params[0].get_value().sum() if losses is None else id(losses.base)
        repeated = self._step == (i, mark) and (losses is None or losses.base is not None)
        self._losses, self._step = losses, (i, mark)
        return repeated


class _OfferedCallback(Callback):
    """Put the next batch in after a step, unless something else has put another one in.

    That is known from the rows that the stream has passed: a callback that was passed to the fit, even
    wrapped in another one, or a loop that calls ``advance()`` between the steps, changes it.

    Parameters
    ----------
    callback : FitCallback
    rows_seen : int or None
        Number of rows before the batch that the first step uses; None if a loop has put that in.
    """

    def __init__(self, callback: FitCallback, rows_seen: int | None):
        self._callback = callback
        self._rows_seen = rows_seen

    def __call__(self, approx: Any, losses: np.ndarray | None, i: int) -> None:
        dataset = self._callback.dataset
        if dataset.rows_seen == self._rows_seen:
            dataset._driver = self._callback
            self._callback(approx, losses, i)
        self._rows_seen = dataset.rows_seen


class Offer:
    """Return the callback of a stream to a fit that finds this in the tag of the buffer.

    A copy of the buffer has a copy of the offer, which refers to no dataset until the copy of the
    dataset sets its own, if that came with it.
    """

    def __init__(self, name: str, dataset: Any = None):
        self._name = name
        self.dataset = None if dataset is None else weakref.ref(dataset)

    def __reduce__(self) -> tuple[Any, ...]:
        return Offer, (self._name,)

    def __call__(self) -> Callback:
        dataset = None if self.dataset is None else self.dataset()
        if dataset is None:
            raise StreamError(
                f"the model depends on the stream {self._name!r}, whose StreamingDataset is gone; "
                "keep a reference to the dataset while the model is fitted, and copy or pickle "
                "both together, as (model, dataset)"
            )
        dataset._require_own_rows()
        is_open = dataset._reader.is_open
        if dataset._driver is not None:
            # The callback that drives the stream may be among those of the fit, even wrapped.
            if not is_open:
                dataset._advance()
            return _OfferedCallback(FitCallback(dataset), dataset.rows_seen)
        callback = dataset.fit_callback()
        if is_open:  # by a loop, which goes on
            dataset._driver = None
        return _OfferedCallback(callback, None if is_open else dataset.rows_seen)
