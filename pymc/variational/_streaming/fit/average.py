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
"""Callbacks that follow the means of a fit: to average them, and to end it where they scatter."""

from typing import Any

import numpy as np

from pymc.variational._streaming.dataset import StreamingDataset
from pymc.variational._streaming.errors import StreamError, warn
from pymc.variational._streaming.fit.bins import Bins, Moments, merge
from pymc.variational._streaming.fit.gaussian import (
    as_streams,
    gaussian_group,
    marginal_sd,
    mean,
    names,
    scale,
    set_mean,
)
from pymc.variational._streaming.utils import positive_int
from pymc.variational.callbacks import Callback
from pymc.variational.opvi import Approximation, Group

__all__ = ["CheckNoiseFloor", "EpochAverage"]

_MAX_TREND = 0.1
"""Standard deviations of the approximation by which means may move without a warning."""

_TREND_RATIO = 1.4
"""Distance between the halves of a path, in standard deviations of the path, from which on it is
a trend: the ratio is √3 on a straight line, 2 at most, and about 0 for noise."""

_MIN_BINS = 4
"""Parts of a path that tell a trend from noise."""

_ARRIVAL = 5.0
"""Distance of the first part of a path from its second half, in standard deviations of the parts
there, from which on the path begins with a way to where it stays."""

_SETTLED = 0.2
"""Distance between the halves of what is kept, relative to the way that is left out, up to which
the way has ended."""

_QUANTILE = 0.9
"""Share of the means that must have arrived; :func:`polish` finds the slowest sooner."""


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

    Each step counts to the epoch that the stream is in when this callback is called, before or
    after ``ds.fit_callback()``; with ``cycle=False`` it must come before, since callbacks after
    that do not see the last step. It goes on through :meth:`Inference.refine` and in a
    :func:`resumable_fit`; another fit starts another average. An epoch is whole if the callback
    was first called no later than at its first batch and the stream has gone beyond it.

    Where the means arrive only after the burn-in, the way there is left out, too.

    *Memory*: at most 134 vectors of the size of the means, whatever the number of steps.

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
        [self._ds] = as_streams(ds)
        if not 0 <= burn_in < 1:
            raise ValueError(f"burn_in must be at least 0 and below 1, got {burn_in}")
        self._burn_in = burn_in
        self._names: tuple[str, ...] = ()
        """Names of the parameters, none of a resumed fit without a further step."""
        self._steps = Bins()
        self._epochs = Bins()
        """Averages over whole epochs, without the current one."""
        self._epoch = 0
        """Epoch of the last step."""
        self._whole = False
        """Whether the current epoch was seen from its beginning."""
        self._n = 0
        """Number of steps of the current epoch."""
        self._total = np.zeros(0)
        """Sum of the means over those steps."""

    @property
    def epochs(self) -> int:
        """Number of whole epochs after the burn-in, which :meth:`apply` averages if none travels."""
        return sum(part.n for part in self._kept_epochs(self._burn_in))

    def __call__(self, approx: Approximation, losses: np.ndarray | None, i: int) -> None:
        group = gaussian_group(approx)
        if i == 1 or not self._steps.parts:
            self._steps, self._epochs, self._names = Bins(), Bins(), ()
            self._begin_epoch(group.ddim, whole=self._ds.rows_seen == 0)
        elif self._ds.epoch != self._epoch:
            self._epochs = self._whole_epochs()
            self._begin_epoch(group.ddim, whole=True)
        self._names = self._names or names(group)
        self._steps.add(mean(group))
        self._total += mean(group)
        self._n += 1

    def apply(self, approx: Approximation) -> None:
        """Put the averages into *approx*.

        The way to where the means stay is left out, beyond the burn-in if need be. If less than
        one whole epoch is left, its steps are averaged, with a warning. If the means still move
        in one direction, so that an average would lag behind them, nothing is changed, with a
        warning.

        Parameters
        ----------
        approx : MeanField or FullRank
            Approximation that the fit returned.

        Raises
        ------
        StreamError
            If no step has been seen, or *approx* is not the one that was fitted.
        """
        if not self._steps.parts:
            raise StreamError(
                "EpochAverage has seen no step; pass it to pm.fit(callbacks=[...]) and apply it "
                "after the fit"
            )
        group = gaussian_group(approx)
        if self._names not in ((), names(group)) or len(self._total) != group.ddim:
            raise StreamError(
                "approx has other parameters than the average; apply it to the approximation "
                "that was fitted"
            )
        path, sd = self._steps.after(self._burn_in, at_least=_MIN_BINS), marginal_sd(scale(group))
        steps, way, away = _without_arrival(path, sd)
        if _warn_of_travel(group, steps, way, away, sd):
            return
        kept = self._kept_epochs(self._burn_in)
        if len(steps) < len(path):
            kept = self._kept_epochs(1 - sum(part.n for part in steps) / self._steps.n, last=False)
        else:
            steps = self._steps.after(self._burn_in)
        if not kept:
            kept = steps
            n_steps = sum(part.n for part in kept)
            warn(
                "less than one whole epoch followed the burn-in: the means are averaged over "
                f"{n_steps} steps, in which the noise of the batches does not cancel; call "
                "polish(approx, ds)"
            )
        set_mean(group, merge(kept).mean)

    def state_dict(self) -> dict[str, np.ndarray]:
        """Return what has been seen, as arrays by name, for :func:`resumable_fit`."""
        return {
            "numbers": np.array([self._epoch, self._whole, self._n]),
            "total": self._total.copy(),
            **self._steps.state_dict("steps"),
            **self._epochs.state_dict("epochs"),
        }

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        """Go on from what :meth:`state_dict` gave, with a stream that goes on from there too."""
        self._epoch, whole, self._n = map(int, state["numbers"])
        self._whole, self._total, self._names = bool(whole), state["total"].copy(), ()
        self._steps.load_state_dict(state, "steps")
        self._epochs.load_state_dict(state, "epochs")

    def _begin_epoch(self, size: int, *, whole: bool) -> None:
        self._epoch, self._whole = self._ds.epoch, whole
        self._n, self._total = 0, np.zeros(size)

    def _whole_epochs(self) -> Bins:
        """Return the whole epochs, with the current one if the stream has gone beyond it."""
        epochs = Bins(self._epochs.parts)
        if self._whole and self._ds.epoch != self._epoch:
            epochs.add(self._total / self._n)
        return epochs

    def _kept_epochs(self, fraction: float, *, last: bool = True) -> list[Moments]:
        """Return the whole epochs from *fraction* of all on, or else the *last* of several."""
        epochs = self._whole_epochs()
        if not epochs.n or (epochs.n == 1 and fraction):
            return []
        kept = epochs.after(fraction)
        begin = epochs.n - sum(part.n for part in kept)
        return kept if last or begin >= fraction * epochs.n - 1e-9 else []


class CheckNoiseFloor(Callback):
    """Callback that ends a fit when its means scatter more than they travel.

    With minibatches and a constant learning rate the means end up scattering around the optimum
    (Pflug 1990), and more steps bring them no nearer. :func:`polish` does, in a few passes. The
    scales take ten times the steps, and are not waited for: polish has them in closed form.

    Parameters
    ----------
    every : int, default 200
        Steps between two looks.

    Raises
    ------
    TypeError
        At the first step, if the approximation is not a mean-field or full-rank Gaussian.

    Notes
    -----
    Compared are the halves of the second half of all steps. A mean of the approximation has arrived
    if its averages over them differ by less than the steps scatter; 90 % must have. A steady drift
    differs by 1.7 times the scatter that it makes.

    *Memory*: 64 vectors of the means.

    References
    ----------
    Pflug, G. C. (1990). Non-asymptotic confidence bounds for stochastic approximation algorithms
    with constant step size. Monatshefte für Mathematik 110, 297-314.

    Examples
    --------
    >>> import numpy as np
    >>> import pymc as pm
    >>> from pymc.variational.streaming import CheckNoiseFloor, StreamingDataset, polish
    >>> rows = np.random.default_rng(0).normal(1.0, 2.0, size=(10_000, 1))
    >>> ds = StreamingDataset(rows, batch_size=100)
    >>> with pm.Model():
    ...     mu = pm.Normal("mu", 0, 10)
    ...     y = pm.Normal("y", mu, 2, observed=ds.as_tensor()[:, 0], total_size=ds.total_size)
    ...     approx = pm.fit(
    ...         10_000,
    ...         callbacks=[CheckNoiseFloor(), ds.fit_callback()],
    ...         obj_optimizer=pm.adam(learning_rate=0.05),
    ...         progressbar=False,
    ...     )
    >>> polish(approx, ds, progressbar=False).verdict
    'fine'
    """

    def __init__(self, every: int = 200):
        self._every = positive_int("every", every)
        self._steps = Bins()

    def __call__(self, approx: Any, losses: np.ndarray | None, i: int) -> None:
        if i == 1:
            self._steps = Bins()
        self._steps.add(mean(gaussian_group(approx)))
        if i % self._every or len(self._steps.parts) < 2 * _MIN_BINS:
            return
        parts = self._steps.after(0.5, at_least=_MIN_BINS)
        moved, scatter = _distance_of_halves(parts)
        if np.quantile(moved - scatter, _QUANTILE) <= 0:
            raise StopIteration(f"noise floor reached at {i}")


def _without_arrival(
    path: list[Moments], sd: np.ndarray
) -> tuple[list[Moments], np.ndarray, np.ndarray]:
    """Return a path without its arrival, how long that was, and which means still arrive.

    The length is infinite for means that stay from the beginning on. Too short a path is not cut
    further: a mean that is still arriving there lags behind in any average.
    """
    steps, arrives = path, np.zeros(len(sd), bool)
    while True:
        end = steps[len(steps) // 2 :]
        way = np.abs(steps[0].mean - merge(end).mean)
        scatter = np.std([part.mean for part in end], axis=0, ddof=1 if len(end) > 1 else 0)
        away = (way > _ARRIVAL * scatter) & (way > _MAX_TREND * sd)
        if len(steps) < 2 * _MIN_BINS or not away.any():
            break
        steps, arrives = steps[1:], arrives | away
    whole = np.where(arrives, np.abs(path[0].mean - merge(steps).mean), np.inf)
    return steps, whole, away & arrives


def _warn_of_travel(
    group: Group, steps: list[Moments], way: np.ndarray, away: np.ndarray, sd: np.ndarray
) -> bool:
    """Return whether means move from half to half of a path more than they scatter, and warn."""
    if len(steps) < _MIN_BINS:
        return False
    moved, scatter = _distance_of_halves(steps)
    trend = moved > np.minimum(_TREND_RATIO * scatter, _SETTLED * way)
    travels = away | (trend & (moved > _MAX_TREND * sd))
    if not travels.any():
        return False
    distance = np.where(travels, moved / sd, 0)
    worst = int(np.argmax(distance))
    warn(
        f"the means still travel: that of {names(group)[worst]} moved by {distance[worst]:.2g} sd "
        "of approx between the halves of the steps after the burn-in, more than the steps "
        "scatter, so an average would lag behind, and approx is left as it is; call "
        "polish(approx, ds)"
    )
    return True


def _distance_of_halves(path: list[Moments]) -> tuple[np.ndarray, np.ndarray]:
    """Return how far the means of the halves of a path are apart, and how much it scatters."""
    half, whole = len(path) // 2, merge(path)
    moved = np.abs(merge(path[half:]).mean - merge(path[:half]).mean)
    return moved, np.sqrt(whole.squares / whole.n)
