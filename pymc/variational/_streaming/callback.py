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

import weakref

from typing import Any

import numpy as np

from pymc.model.core import Model
from pymc.variational._streaming.errors import StreamError
from pymc.variational._streaming.guards import WITHOUT_LOSS, check_model, check_other_streams
from pymc.variational._streaming.reader import Position
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
        self._approx: Any = None
        self.token = object()
        weakref.finalize(self, _release, weakref.ref(dataset), self.token)

    def check(self, model: Model) -> None:
        """Refuse a wrong model; one that has not changed since is not checked again."""
        factors = (model, *model.basic_RVs, *model.potentials)
        if factors != self._checked:
            check_model(model, self.dataset.as_tensor(), self.dataset.total_size)
            self._checked = factors

    def __call__(self, approx: Any, losses: np.ndarray | None, i: int) -> None:
        if losses is None and not isinstance(approx, Empirical):
            raise StreamError(WITHOUT_LOSS)
        if self.dataset._owner is not self.token:
            raise StreamError(
                "advance() or a newer fit_callback() of this dataset has taken the stream over; "
                "use the newest callback, or a dataset for each fit"
            )
        if approx is not self._approx:
            self.check(approx.model)
            check_other_streams(approx.model)
            self._approx = approx
        if not self.dataset._advance():
            raise StopIteration(f"the stream ended at step {i}")


def _release(dataset: weakref.ref, token: object) -> None:
    """Close the stream of a callback that is gone, unless another one drives it."""
    driven = dataset()
    if driven is not None and driven._owner is token:
        driven.close()
        driven._owner = None
        driven._reader.conclude()


class Offer:
    """Return the callback of a stream to a fit that finds this in the tag of the buffer.

    A copy of the buffer has a copy of the offer, which refers to no dataset until :meth:`bind` is
    called by the copy of the dataset, if that came with it.
    """

    def __init__(self, name: str, dataset: Any = None):
        self._name = name
        self._dataset = None if dataset is None else weakref.ref(dataset)

    def bind(self, dataset: Any) -> None:
        self._dataset = weakref.ref(dataset)

    def __reduce__(self) -> tuple[Any, ...]:
        return Offer, (self._name,)

    def __call__(self) -> Callback:
        dataset = None if self._dataset is None else self._dataset()
        if dataset is None:
            raise StreamError(
                f"the model depends on the stream {self._name!r}, whose StreamingDataset is gone; "
                "keep a reference to the dataset while the model is fitted, and copy or pickle "
                "both together, as (model, dataset)"
            )
        dataset._require_own_rows()
        if dataset._owner is not None:
            # The callback that drives the stream may be among those of the fit, even wrapped.
            if not dataset._reader.is_open:
                dataset._open()
            return _OfferedCallback(FitCallback(dataset), dataset._reader.position)
        by_hand = dataset._reader.is_open
        callback = dataset.fit_callback()
        if by_hand:
            dataset._owner = None
        return _OfferedCallback(callback, None if by_hand else dataset._reader.position)


class _OfferedCallback(Callback):
    """Put the next batch in after a step, unless something else has put another one in.

    That is known from the position of the stream: a callback that was passed to the fit, even
    wrapped in another one, or a loop that calls ``advance()`` between the steps, changes it.
    """

    def __init__(self, callback: FitCallback, used: Position | None):
        self._callback = callback
        self._used = used
        """Position of the batch that the step before may have used, too."""

    def __call__(self, approx: Any, losses: np.ndarray | None, i: int) -> None:
        dataset = self._callback.dataset
        if dataset._reader.position == self._used:
            dataset._owner = self._callback.token
            self._callback(approx, losses, i)
        self._used = dataset._reader.position
