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
"""Average a fit over whole epochs, in which the noise of its batches cancels."""

import warnings

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pymc.variational._streaming.errors import StreamError, StreamWarning
from pymc.variational._streaming.fit.bins import Bins, Moments, merged, stack, unstack
from pymc.variational._streaming.fit.gaussian import (
    gaussian_group,
    mean_variable,
    names,
    put,
    standard_deviations,
)
from pymc.variational.callbacks import Callback
from pymc.variational.opvi import Approximation, Group

if TYPE_CHECKING:
    from pymc.variational.streaming import StreamingDataset

__all__ = ["EpochAverage"]

_IMMATERIAL = 0.1
"""Standard deviations of the approximation that means may travel without a word."""

_MOSTLY_TRAVEL = 1.4
"""Distance between the halves of a path over its scatter: √3 on a straight line, 2 at most,
and about 0 for noise."""

_MIN_BINS = 4
"""Parts of a path that tell travel from noise."""


class EpochAverage(Callback):
    """Average the means of a fit over whole epochs of its stream.

    The last step of a fit leaves the noise of its last batches in the means. Over a whole
    epoch each row is used exactly once, so in an average over the steps of whole epochs the
    noise of the batches cancels, and does so better than among independent batches.

    Parameters
    ----------
    ds : StreamingDataset
        Whose epochs count; with several streams in one model, the one with the most rows.
    burn_in : float, default 0.5
        Part of the fit, from 0 to below 1, that is left out at its start.

    Raises
    ------
    TypeError
        If *ds* is not a StreamingDataset.
    ValueError
        If *burn_in* is not in [0, 1).

    Notes
    -----
    *Scales* are left as the last step left them: they converge more slowly than the means, so
    that an average lags behind, and what noise they have outlasts an epoch. To correct them,
    see :func:`check_fit`.

    *Place*: before or after ``ds.fit_callback()`` in the list of callbacks; before it with
    ``cycle=False``, since callbacks after it do not see the last step. It goes on through
    :meth:`Inference.refine`; another fit starts another average. An epoch counts as whole if
    the fit has made every step whose batch begins in it, so the first epoch of a resumed
    stream usually does not. In a :func:`resumable_fit` it goes on where it was.

    *Memory*: at most 70 vectors of the size of the means, whatever the number of steps.

    References
    ----------
    Polyak, B. T. & Juditsky, A. B. (1992). Acceleration of stochastic approximation by
    averaging. SIAM Journal on Control and Optimization 30, 838-855.

    Examples
    --------
    >>> import numpy as np
    >>> import pymc as pm
    >>> from pymc.variational.streaming import StreamingDataset
    >>> rows = np.random.default_rng(0).normal(1.0, 2.0, size=(10_000, 1))
    >>> ds = StreamingDataset(rows, batch_size=100)
    >>> average = EpochAverage(ds)
    >>> with pm.Model():
    ...     mu = pm.Normal("mu", 0, 10)
    ...     y = pm.Normal("y", mu, 2, observed=ds.as_tensor()[:, 0], total_size=ds.total_size)
    ...     approx = pm.fit(
    ...         2_000,
    ...         callbacks=[average, ds.fit_callback()],
    ...         obj_optimizer=pm.adam(learning_rate=0.05),
    ...         progressbar=False,
    ...     )
    >>> average.apply(approx)
    >>> average.epochs
    10
    """

    def __init__(self, ds: "StreamingDataset", *, burn_in: float = 0.5):
        if not hasattr(ds, "rows_seen"):
            raise TypeError(
                f"ds={type(ds).__name__}(...) is not a StreamingDataset; pass the one that is "
                "fitted"
            )
        if not 0 <= burn_in < 1:
            raise ValueError(f"burn_in must be at least 0 and below 1, got {burn_in}")
        self._ds = ds
        self._burn_in = burn_in
        self._here = _place_of(ds)
        self._follows: bool | None = None
        self._path: _Path | None = None
        self._names: tuple[str, ...] | None = None
        """Of the parameters, where a step has been seen since a resumed fit went on."""

    @property
    def epochs(self) -> int:
        """Whole epochs that :meth:`apply` averages."""
        return sum(part.n for part in self._kept_epochs())

    def __call__(self, approx: Approximation, losses: np.ndarray | None, i: int) -> None:
        mean = np.asarray(mean_variable(gaussian_group(approx)).get_value(borrow=True))
        place = self._place_of_step()
        if i == 1 or self._path is None:
            self._path = _Path(mean.size, self._ds.batch_size)
            self._names = names(gaussian_group(approx))
        self._path.go_to(place)
        self._path.add(mean)

    def apply(self, approx: Approximation) -> None:
        """Put the averages into *approx*.

        If less than one whole epoch followed the burn-in, the steps that did are averaged,
        with a warning. If the means still travel, so that an average would lag behind them,
        nothing is changed, with a warning.

        Parameters
        ----------
        approx : MeanField or FullRank
            What the fit returned.

        Raises
        ------
        StreamError
            If no step has been seen, or *approx* is not the one that was fitted.
        """
        if self._path is None:
            raise StreamError(
                "EpochAverage has seen no step; pass it to pm.fit(callbacks=[...]) and apply it "
                "after the fit"
            )
        group = gaussian_group(approx)
        steps = self._path.steps.after(self._burn_in, at_least=_MIN_BINS)
        if self._names not in (None, names(group)) or steps[0].mean.size != group.ddim:
            raise StreamError(
                "approx has other parameters than the average; apply it to the approximation "
                "that was fitted"
            )
        if _still_travels(group, steps):
            return
        kept = self._kept_epochs()
        if not kept:
            kept = self._path.steps.after(self._burn_in)
            _warn_of_part(self._ds, sum(part.n for part in kept))
        put(mean_variable(group), merged(kept).mean)

    def state_dict(self) -> dict[str, np.ndarray]:
        """Return what has been seen, as arrays by name, for :func:`resumable_fit`."""
        return {} if self._path is None else self._path.state()

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        """Go on from what :meth:`state_dict` gave, with a stream that goes on from there too."""
        self._path = _Path.of_state(state, self._ds.batch_size) if state else None
        self._here, self._follows = _place_of(self._ds), None

    def _place_of_step(self) -> "_Place":
        """Return the place of the batch that the step has used.

        If ``fit_callback`` is called before this one, the stream is one batch further. The
        first call tells, since the stream has then moved since this callback was made.
        """
        before, self._here = self._here, _place_of(self._ds)
        moved = self._here.rows_seen == before.rows_seen + self._ds.batch_size
        if self._follows is None:
            self._follows = moved
        return before if self._follows and moved else self._here

    def _kept_epochs(self) -> list[Moments]:
        """Return the whole epochs after the burn-in, or else the last of several."""
        if self._path is None:
            return []
        self._path.finish_epoch(_place_of(self._ds))
        epochs = self._path.epochs
        return epochs.after(self._burn_in) if epochs.n > 1 or not self._burn_in else []


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a batch begins."""

    epoch: int
    rows_seen: int


def _place_of(ds: "StreamingDataset") -> _Place:
    return _Place(ds.epoch, ds.rows_seen)


class _Path:
    """The means of a fit, by steps and by whole epochs."""

    def __init__(self, size: int, batch_size: int):
        self.steps = Bins(size)
        self.epochs = Bins(size)
        self._batch_size = batch_size
        self._next_rows = -1

    def state(self) -> dict[str, np.ndarray]:
        """Return the path so far, as arrays by name."""
        parts = {
            "steps": self.steps.state(),
            "epochs": self.epochs.state(),
            "open": stack([self._open], self.steps.size),
        }
        arrays = {f"{part} {name}": a for part, state in parts.items() for name, a in state.items()}
        return {"place": np.array([self._epoch, self._next_rows, self._whole]), **arrays}

    @classmethod
    def of_state(cls, state: Mapping[str, np.ndarray], batch_size: int) -> "_Path":
        """Go on from what :meth:`state` gave."""
        path = cls(state["open mean"].shape[1], batch_size)
        path._epoch, path._next_rows, whole = (int(value) for value in state["place"])
        path._whole = bool(whole)
        parts: dict[str, dict[str, np.ndarray]] = {"steps": {}, "epochs": {}, "open": {}}
        for key, array in state.items():
            part, _, name = key.partition(" ")
            if name:
                parts[part][name] = array
        path.steps, path.epochs = Bins.of_state(parts["steps"]), Bins.of_state(parts["epochs"])
        (path._open,) = unstack(parts["open"])
        return path

    def go_to(self, place: _Place) -> None:
        """Enter the step whose batch begins at *place*."""
        if place.rows_seen == self._next_rows:
            self.finish_epoch(place)
        else:
            self._open = Moments(self.steps.size)
            self._whole = place.rows_seen == 0
        self._epoch = place.epoch
        self._next_rows = place.rows_seen + self._batch_size

    def add(self, mean: np.ndarray) -> None:
        self.steps.add(mean)
        self._open.add(mean)

    def finish_epoch(self, place: _Place) -> None:
        """Take up the open epoch if *place* is one batch further and in another epoch."""
        if place.rows_seen == self._next_rows and self._open.n and place.epoch != self._epoch:
            if self._whole:
                self.epochs.add(self._open.mean)
            self._open, self._whole = Moments(self.steps.size), True


def _still_travels(group: Group, steps: list[Moments]) -> bool:
    """Warn if *steps* are more of a way to somewhere than noise around a place."""
    if len(steps) < _MIN_BINS:
        return False
    half = len(steps) // 2
    moved = np.abs(merged(steps[half:]).mean - merged(steps[:half]).mean)
    path = merged(steps)
    scatter = np.sqrt(path.squares / path.n)
    sd = standard_deviations(group)
    travel = np.where(moved > _MOSTLY_TRAVEL * scatter, moved / sd, 0)
    worst = int(np.argmax(travel))
    if travel[worst] <= _IMMATERIAL:
        return False
    warnings.warn(
        f"the means still travel: that of {names(group)[worst]} moved by {travel[worst]:.2g} sd "
        "of approx between the halves of the steps after the burn-in, more than the steps "
        "scatter, so an average would lag behind; approx is left as it is: run longer, or with "
        "a higher learning rate",
        StreamWarning,
        stacklevel=3,
    )
    return True


def _warn_of_part(ds: "StreamingDataset", n_steps: int) -> None:
    rows = n_steps * ds.batch_size
    part = f" ({rows / ds.total_size:.2f} epochs)" if ds.total_size else ""
    warnings.warn(
        f"less than one whole epoch followed the burn-in: the means are averaged over {n_steps} "
        f"steps{part}, in which the noise of the batches does not cancel; run longer to average "
        "whole epochs",
        StreamWarning,
        stacklevel=3,
    )
