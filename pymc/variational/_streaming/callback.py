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

from pymc.variational._streaming.contract import Contract
from pymc.variational._streaming.errors import StreamError, warn
from pymc.variational._streaming.guards import (
    WITHOUT_LOSS,
    check_model,
    infinite_row,
    other_batches,
    streams_of,
    warn_of_unmoved,
)
from pymc.variational._streaming.likelihood import Factors, is_of
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
        self._contract: Contract | None = None
        self._step: tuple[int, Any] = (0, None)
        self._run: tuple[Any, Any] = (None, None)
        """Approximation and losses of the current run, which is a call of ``fit`` or ``refine``."""
        self._others: dict[SharedVariable, np.ndarray] = {}
        """Batches of the other streams at the first step of the run, until they were looked at."""
        self._told = False
        """Whether an infinite loss of the run has been looked into."""

    def begin(self, *, must_observe: bool = True) -> bool:
        """Put a first batch in unless there is one, and check the model of the context.

        A model that does not observe the stream is an error, or else left alone. False means that
        the source has ended.
        """
        ds, factors, is_full = self.dataset, Factors.of_context(), True
        buffer = ds.as_tensor()
        if factors and not must_observe:
            observed = streams_of(factors.model, factors.model.observed_RVs)
            factors = factors if any(is_of(one, buffer) for one in observed) else None
        try:
            ds._reader.compare_by(factors, buffer)
            if not ds._reader.is_open:
                if factors or must_observe:
                    ds._reader.hold_to(None)  # the contract may be that of another model
                is_full = ds._advance()
            if factors and (factors.model.observed_RVs or factors.model.potentials):
                self.check(factors)
        except BaseException:
            ds.close()
            raise
        return is_full

    def check(self, factors: Factors) -> None:
        """Refuse a wrong model; one that has not changed since is not checked again."""
        model, ds = factors.model, self.dataset
        # Those that PyMC has frozen or replaced are no shared variables.
        data = (
            var.get_value(borrow=True) if isinstance(var, SharedVariable) else var
            for var in model.data_vars
        )
        variables = (model, *model.basic_RVs, *model.potentials, *data)
        if list(map(id, variables)) != list(map(id, self._checked)):
            place = ds._reader.position.offset
            self._contract = check_model(factors, ds.as_tensor(), ds.total_size, ds.columns, place)
            self._checked = variables
        ds._reader.hold_to(self._contract)

    def __call__(self, approx: Any, losses: np.ndarray | None, i: int) -> None:
        if losses is None and not isinstance(approx, Empirical):
            raise StreamError(WITHOUT_LOSS)
        if self.dataset._driver is not self:
            raise StreamError(
                "advance() or a newer fit_callback() of this dataset has taken the stream over; "
                "use the newest callback, or a dataset for each fit"
            )
        self._require_another_step(approx, losses, i)
        self._look_at_run(approx, losses)
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

    def _require_another_step(self, approx: Any, losses: np.ndarray | None, i: int) -> None:
        """Refuse a second call for a step: another run has other losses, which are kept until then."""
        mark = approx.params[0].get_value().sum() if losses is None else id(losses.base)
        if self._step == (i, mark) and (losses is None or losses.base is not None):
            raise StreamError(
                f"the callback was called twice for step {i}, so that each step would skip a batch; "
                "pass it to the fit once"
            )
        self._step = i, mark

    def _look_at_run(self, approx: Any, losses: np.ndarray | None) -> None:
        """Check the model at the first step of a run, and at the second whether all streams move."""
        base = None if losses is None else losses.base
        if approx is not self._run[0] or base is not self._run[1]:
            self.check(Factors(approx.model))
            self._others = other_batches(approx.model, self.dataset.as_tensor())
            self._run, self._told = (approx, base), False
        elif self._others:
            warn_of_unmoved(self._others)
            self._others = {}

    def __iter__(self) -> Any:
        raise TypeError("a fit takes a list; pass callbacks=[ds.fit_callback()]")


class _OfferedCallback(FitCallback):
    """Put the next batch in after a step, unless something else has put another one in.

    That is known from the rows that the stream has passed: a callback that was passed to the fit, even
    wrapped in another one, or a loop that calls ``advance()`` between the steps, changes it.
    """

    rows_seen: int | None = None
    """Number of rows before the batch that the next step uses; None if a loop has put that in."""

    def __call__(self, approx: Any, losses: np.ndarray | None, i: int) -> None:
        if self.dataset.rows_seen == self.rows_seen:
            self.dataset._driver = self
            super().__call__(approx, losses, i)
        self.rows_seen = self.dataset.rows_seen


class Offer:
    """Return the callback of a stream to a fit that finds this in the tag of the buffer.

    A copy of the buffer has a copy of this, which leaves it no rows, and refers to no dataset until
    the copy of the dataset sets its own, if that came with it.
    """

    def __init__(self, name: str, container: Any = None, dataset: Any = None):
        self._name, self._container = name, container
        self.dataset = None if dataset is None else weakref.ref(dataset)

    def __reduce__(self) -> tuple[Any, ...]:
        return Offer, (self._name,), self._container

    def __setstate__(self, container: Any) -> None:
        self._container = container
        container.storage[0] = container.storage[0][:0].copy()

    def __call__(self) -> Callback:
        dataset = None if self.dataset is None else self.dataset()
        if dataset is None:
            raise StreamError(
                f"the model depends on the stream {self._name!r}, whose StreamingDataset is gone; "
                "keep a reference to the dataset while the model is fitted, and pickle both "
                "together, as (model, dataset)"
            )
        dataset._require_own_rows()
        callback = _OfferedCallback(dataset)
        is_open, is_driven = dataset._reader.is_open, dataset._driver is not None
        # The callback that drives the stream may be among those of the fit, even wrapped.
        factors = Factors.of_context()
        is_known = factors is None or dataset._order.knows(factors)
        if not (is_open and is_driven and is_known):
            callback.begin()
        if not (is_open or is_driven):
            dataset._driver = callback
        if is_driven or not is_open:  # else a loop drives the stream, and goes on
            callback.rows_seen = dataset.rows_seen
        return callback
