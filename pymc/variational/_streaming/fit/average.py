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

import copy
import warnings

from collections.abc import Mapping

import numpy as np

from pymc.variational._streaming.dataset import StreamingDataset
from pymc.variational._streaming.errors import StreamError, StreamWarning
from pymc.variational._streaming.fit.bins import Bins, Moments
from pymc.variational._streaming.fit.gaussian import gaussian_group, mean, names, scale, set_mean
from pymc.variational._streaming.fit.streams import require_stream
from pymc.variational.callbacks import Callback
from pymc.variational.opvi import Approximation, Group

__all__ = ["EpochAverage"]

_MAX_TREND = 0.1
"""Standard deviations of the approximation by which means may move without a warning."""

_TREND_RATIO = 1.4
"""Distance between the halves of a path, in standard deviations of the path, from which on it is
a trend: the ratio is √3 on a straight line, 2 at most, and about 0 for noise."""

_MIN_BINS = 4
"""Parts of a path that tell a trend from noise."""


class EpochAverage(Callback):
    """Average the means of a fit over whole epochs of its stream.

    The last step of a fit leaves the noise of its last batches in the means. Over a whole
    epoch each row is used exactly once, so in an average over the steps of whole epochs the
    noise of the batches cancels, and does so better than among independent batches.

    Parameters
    ----------
    ds : StreamingDataset
        Stream whose epochs are averaged over; with several streams in one model, the one with
        the most rows.
    burn_in : float, default 0.5
        Fraction of the fit, from 0 to below 1, that is left out at its start.

    Notes
    -----
    The *scales* are left as the last step left them: they converge more slowly than the means,
    so that an average lags behind, and their noise outlasts an epoch. To correct them, see
    :func:`check_fit`.

    The callback may come before or after ``ds.fit_callback()`` in the list of callbacks; it must
    come before it with ``cycle=False``, since callbacks after it do not see the last step. It
    goes on through :meth:`Inference.refine` and in a :func:`resumable_fit`; another fit starts
    another average. An epoch counts as whole if the fit has made every step whose batch begins
    in it, so the first epoch of a resumed stream usually does not.

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

    def __init__(self, ds: StreamingDataset, *, burn_in: float = 0.5):
        require_stream(ds)
        if not 0 <= burn_in < 1:
            raise ValueError(f"burn_in must be at least 0 and below 1, got {burn_in}")
        self._ds = ds
        self._burn_in = burn_in
        self._position = self._position_of_stream()
        self._follows: bool | None = None
        """Whether ``fit_callback`` is called before this one; None before the first step."""
        self._path: _Path | None = None
        self._names: tuple[str, ...] | None = None
        """Names of the parameters, None before the first step, also of a resumed fit."""

    @property
    def epochs(self) -> int:
        """Number of whole epochs that :meth:`apply` averages."""
        kept = self._kept_epochs()
        return 0 if kept is None else int(kept.n.sum())

    def __call__(self, approx: Approximation, losses: np.ndarray | None, i: int) -> None:
        group = gaussian_group(approx)
        position = self._position_of_step()
        if self._path is None or i == 1:
            self._path = _Path(group.ddim, self._ds.batch_size)
        if self._names is None or i == 1:
            self._names = names(group)
        self._path.add(mean(group), *position)

    def apply(self, approx: Approximation) -> None:
        """Put the averages into *approx*.

        If less than one whole epoch followed the burn-in, the steps that did are averaged,
        with a warning. If the means still move in one direction, so that an average would lag
        behind them, nothing is changed, with a warning.

        Parameters
        ----------
        approx : MeanField or FullRank
            Approximation that the fit returned.

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
        if self._names not in (None, names(group)) or self._path.size != group.ddim:
            raise StreamError(
                "approx has other parameters than the average; apply it to the approximation "
                "that was fitted"
            )
        if _has_trend(group, self._path.steps.after(self._burn_in, at_least=_MIN_BINS)):
            return
        kept = self._kept_epochs()
        if kept is None:
            kept = self._path.steps.after(self._burn_in)
            _warn_of_part(self._ds, int(kept.n.sum()))
        set_mean(group, kept.merged().mean[0])

    def state_dict(self) -> dict[str, np.ndarray]:
        """Return what has been seen, as arrays by name, for :func:`resumable_fit`."""
        return {} if self._path is None else self._path.state_dict()

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        """Go on from what :meth:`state_dict` gave, with a stream that goes on from there too."""
        self._path = None
        if state:
            self._path = _Path(len(state["total"]), self._ds.batch_size)
            self._path.load_state_dict(state)
        self._position, self._follows = self._position_of_stream(), None

    def _position_of_stream(self) -> tuple[int, int]:
        """Return epoch and rows before the batch that is in the buffer."""
        return self._ds.epoch, self._ds.rows_seen

    def _position_of_step(self) -> tuple[int, int]:
        """Return epoch and rows before the batch that the step has used.

        If ``fit_callback`` is called before this callback, the stream is one batch further. That
        is so if the stream has moved since this callback was made when it is first called.
        """
        before, self._position = self._position, self._position_of_stream()
        moved = self._position[1] == before[1] + self._ds.batch_size
        if self._follows is None:
            self._follows = moved
        return before if self._follows and moved else self._position

    def _kept_epochs(self) -> Moments | None:
        """Return the whole epochs after the burn-in, or else the last of several."""
        if self._path is None:
            return None
        path = copy.deepcopy(self._path)
        path.end_epoch(*self._position_of_stream())
        n_epochs = path.epochs.n
        if not n_epochs or (n_epochs == 1 and self._burn_in):
            return None
        return path.epochs.after(self._burn_in)


class _Path:
    """The means of a fit, by steps and by whole epochs."""

    def __init__(self, size: int, batch_size: int):
        self.size = size
        self.steps = Bins(size)
        self.epochs = Bins(size)
        self._batch_size = batch_size
        self._epoch = 0
        """Epoch of the last step."""
        self._next_rows = -1
        """Rows before the batch of the next step, if none is left out."""
        self._total = np.zeros(size)
        """Sum of the means over the steps of the current epoch."""
        self._n = 0
        """Number of those steps."""
        self._whole = 0
        """1 if these are all steps of the epoch so far, else 0."""

    def add(self, mean: np.ndarray, epoch: int, rows_seen: int) -> None:
        """Add a step whose batch begins in *epoch*, after *rows_seen* rows."""
        if rows_seen == self._next_rows:
            self.end_epoch(epoch, rows_seen)
        else:
            self._begin_epoch(whole=int(rows_seen == 0))
        self._epoch, self._next_rows = epoch, rows_seen + self._batch_size
        self._total += mean
        self._n += 1
        self.steps.add(mean)

    def end_epoch(self, epoch: int, rows_seen: int) -> None:
        """End the current epoch if the next step's batch begins in another one."""
        if rows_seen == self._next_rows and epoch != self._epoch:
            if self._whole and self._n:
                self.epochs.add(self._total / self._n)
            self._begin_epoch(whole=1)

    def state_dict(self) -> dict[str, np.ndarray]:
        return {
            "numbers": np.array([self._epoch, self._next_rows, self._n, self._whole]),
            "total": self._total.copy(),
            **self.steps.state_dict("steps"),
            **self.epochs.state_dict("epochs"),
        }

    def load_state_dict(self, state: Mapping[str, np.ndarray]) -> None:
        self._epoch, self._next_rows, self._n, self._whole = map(int, state["numbers"])
        self._total = state["total"].copy()
        self.steps.load_state_dict(state, "steps")
        self.epochs.load_state_dict(state, "epochs")

    def _begin_epoch(self, *, whole: int) -> None:
        self._total, self._n, self._whole = np.zeros(self.size), 0, whole


def _has_trend(group: Group, steps: Moments) -> bool:
    """Warn if the means of *steps* move in one direction more than they scatter."""
    if len(steps.n) < _MIN_BINS:
        return False
    half = len(steps.n) // 2
    first, second = steps.part(0, half).merged(), steps.part(half, None).merged()
    path = steps.merged()
    moved = np.abs(second.mean - first.mean)[0]
    scatter = np.sqrt(path.squares[0] / path.n)
    factor = scale(group)
    sd = factor if factor.ndim == 1 else np.linalg.norm(factor, axis=1)
    trend = np.where(moved > _TREND_RATIO * scatter, moved / sd, 0)
    worst = int(np.argmax(trend))
    if trend[worst] <= _MAX_TREND:
        return False
    warnings.warn(
        f"the means still travel: that of {names(group)[worst]} moved by {trend[worst]:.2g} sd "
        "of approx between the halves of the steps after the burn-in, more than the steps "
        "scatter, so an average would lag behind; approx is left as it is: run longer, or with "
        "a higher learning rate",
        StreamWarning,
        stacklevel=3,
    )
    return True


def _warn_of_part(ds: StreamingDataset, n_steps: int) -> None:
    rows = n_steps * ds.batch_size
    part = f" ({rows / ds.total_size:.2f} epochs)" if ds.total_size else ""
    warnings.warn(
        f"less than one whole epoch followed the burn-in: the means are averaged over {n_steps} "
        f"steps{part}, in which the noise of the batches does not cancel; run longer to average "
        "whole epochs",
        StreamWarning,
        stacklevel=3,
    )
