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
"""Fit the order-book model to one table in different ways, each in a process of its own.

>>> in_process(fit_model, Path("rows"), buffer_size=100_000, n_steps=6_000, seed=0)

The model is a logistic regression of the last column on the others::

    logit P(up) = b0 + b1 * mid + b2 * spread + b3 * imbalance,  b ~ Normal(0, 3)

so its exact posterior is found by Newton's method on all rows, and an error can be told in
posterior standard deviations. Without ``buffer_size`` the rows are held in memory and drawn by
``pm.Minibatch``.
"""

import logging
import os
import threading
import time
import warnings

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any, TypeVar

import numba
import numpy as np
import pyarrow.parquet as pq

from benchmarks.orderbook.columns import parquet_files
from tests.variational.streaming.memory import forget_peak, peak_mb

__all__ = [
    "BATCH_SIZE",
    "Examination",
    "Fit",
    "Posterior",
    "State",
    "build_model",
    "exact_posterior",
    "fit_model",
    "in_process",
    "logistic",
    "parquet_files",
    "peak_growth",
    "shuffle",
]

PRIOR_SD = 3.0
BATCH_SIZE = 4096
LEARNING_RATE = 0.02
WARM_UP_STEPS = 500
TRACED_EVERY = 20
WORKERS = 2

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Posterior:
    """The exact posterior of the coefficients."""

    names: tuple[str, ...]
    """"intercept" and the names of the feature columns."""
    mean: tuple[float, ...]
    sd: tuple[float, ...]
    mean_field_sd: tuple[float, ...]
    """Standard deviations of the best mean-field approximation, which knows no correlations."""
    n_rows: int
    """Rows of the table."""


@dataclass(frozen=True, slots=True)
class State:
    """An approximation, and what ``check_fit`` said of it, if it was asked."""

    mean: tuple[float, ...]
    sd: tuple[float, ...]
    verdict: str | None = None
    z: float | None = None
    """Posterior standard deviations by which the worst mean is off, as ``check_fit`` sees it."""
    seconds: float | None = None
    """Duration of the check."""


@dataclass(frozen=True, slots=True)
class Examination:
    """What the checks said of a streamed fit."""

    order: dict[str, Any]
    """What ``check_order`` said before the fit, and how many "seconds" it took."""
    epochs: int
    """Whole epochs that ``EpochAverage`` averaged; with 0, the steps of a part of one."""
    last: State
    """As the last step left it."""
    averaged: State
    """After ``EpochAverage.apply``."""
    corrected: State | None
    """After ``polish``; None if that refused."""
    refusal: str | None
    """Why ``polish`` refused."""
    said: tuple[str, ...]
    """The last report of ``check_fit``, and that of ``polish``."""


@dataclass(frozen=True, slots=True)
class Fit:
    """One fit, and what it cost."""

    last: tuple[float, ...]
    """Posterior means of the last step."""
    sd: tuple[float, ...]
    """Posterior standard deviations of the last step."""
    averaged: tuple[float, ...]
    """Posterior means, averaged over the second half of the steps."""
    trace: tuple[tuple[float, ...], ...]
    """Posterior means every ``TRACED_EVERY`` steps."""
    steps_per_second: float
    """After ``WARM_UP_STEPS``."""
    seconds: dict[str, float]
    """Duration of getting ready (reading, checking the order, the first batch) and of the fit."""
    peak_mb: float
    """Largest resident set of the process until the end of the fit."""
    examination: Examination | None
    warnings: tuple[str, ...]
    """What the stream warned of."""


class Tail:
    """Average the variational means over the second half of a fit, and keep a trace."""

    def __init__(self, n_steps: int):
        self.n_steps = n_steps
        self.n_averaged = 0
        self.total: Any = 0.0
        self.trace: list[tuple[float, ...]] = []
        self.started = 0.0

    def __call__(self, approx: Any, losses: Any, i: int) -> None:
        mean = approx.params[0].get_value()
        if 2 * i > self.n_steps:
            self.total, self.n_averaged = self.total + mean, self.n_averaged + 1
        if i % TRACED_EVERY == 0:
            self.trace.append(tuple(mean.tolist()))
        if i == WARM_UP_STEPS:
            self.started = time.perf_counter()

    def rate(self) -> float:
        """Return steps per second since the warm-up."""
        return (self.n_steps - WARM_UP_STEPS) / (time.perf_counter() - self.started)


def exact_posterior(rows: Path, columns: Sequence[str] | None = None) -> Posterior:
    """Find the posterior by Newton's method, in one bounded pass over the rows per iteration."""
    files = parquet_files(rows)
    columns = columns or pq.read_schema(files[0]).names
    b = np.zeros(len(columns))
    step = np.ones_like(b)
    while np.abs(step).max() > 1e-10:
        gradient, information = _derivatives(files, columns, b)
        precision = information + np.eye(len(b)) / PRIOR_SD**2
        if not np.isfinite(gradient).all():
            raise ValueError(f"{rows} must hold only finite numbers in {', '.join(columns)}")
        step = np.linalg.solve(precision, gradient - b / PRIOR_SD**2)
        b = b + step
    return Posterior(
        names=("intercept", *columns[:-1]),
        mean=tuple(b.tolist()),
        sd=tuple(np.sqrt(np.diag(np.linalg.inv(precision))).tolist()),
        mean_field_sd=tuple((1 / np.sqrt(np.diag(precision))).tolist()),
        n_rows=sum(pq.read_metadata(file).num_rows for file in files),
    )


def in_process(function: Callable[..., T], /, *args: Any, **options: Any) -> T:
    """Call *function* in a fresh process, so that its memory can be told from that of others."""
    spawn = get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, initializer=_end_with_parent) as pool:
        return pool.submit(function, *args, **options).result()


def peak_growth(function: Callable[..., object], *args: Any) -> float:
    """Return by how many MB the peak memory of a fresh process grows in a call."""
    return in_process(_growth, function, args)


def _growth(function: Callable[..., object], args: tuple) -> float:
    forget_peak()
    before = peak_mb()
    function(*args)
    return peak_mb() - before


def shuffle(
    rows: Path, destination: Path, *, seed: int, columns: Sequence[str] | None = None
) -> Any:
    """Shuffle a table on disk, and return the report of ``preshuffle``."""
    from pymc.variational.streaming import preshuffle

    return preshuffle(
        str(rows), str(destination), seed=seed, columns=columns, overwrite=True, progressbar=False
    )


def fit_model(
    rows: Path,
    *,
    buffer_size: int | None,
    n_steps: int,
    seed: int,
    columns: Sequence[str] | None = None,
    examine: bool = False,
    check_last: bool = True,
    progressbar: bool = True,
) -> Fit:
    """Fit in this process.

    Parameters
    ----------
    rows : Path
        Directory of Parquet files, whose last column is 0 or 1.
    buffer_size : int or None
        Rows; None holds all rows in memory.
    n_steps, seed : int
    columns : sequence of str, optional
        Features, then the label. Default: all columns.
    examine : bool
        Check the order of the rows before the fit, and the fit after it; only for streams.
    check_last : bool
        Check the fit also as the last step left it, not only when it is averaged.
    progressbar : bool
    """
    import pymc as pm

    from pymc.variational.streaming import EpochAverage

    if not progressbar:
        logging.getLogger("pymc").setLevel(logging.WARNING)
    tail = Tail(n_steps)
    with warnings.catch_warnings(record=True) as caught, pm.Model():
        warnings.simplefilter("always")
        began = time.perf_counter()
        ds = build_model(rows, buffer_size, seed, columns)
        order = _check_order(_buffer(rows, buffer_size, seed, columns)) if examine else {}
        average = EpochAverage(ds) if examine else None
        callbacks = [tail, *([average] if examine else [])]
        callbacks += [ds.fit_callback()] if ds is not None else []
        ready = time.perf_counter()
        approx = pm.fit(
            n_steps,
            method="advi",
            callbacks=callbacks,
            obj_optimizer=pm.adam(learning_rate=LEARNING_RATE),
            random_seed=seed,
            progressbar=progressbar,
        )
        rate, ended, state = tail.rate(), time.perf_counter(), _state(approx)
        return Fit(
            last=state.mean,
            sd=state.sd,
            averaged=tuple((tail.total / tail.n_averaged).tolist()),
            trace=tuple(tail.trace),
            steps_per_second=rate,
            seconds={"ready": ready - began, "fit": ended - ready},
            peak_mb=peak_mb(),
            examination=_examine(approx, ds, average, order, check_last) if examine else None,
            warnings=_of_stream(caught),
        )


def build_model(
    rows: Path, buffer_size: int | None, seed: int, columns: Sequence[str] | None = None
) -> Any:
    """Build the model in context; return the stream that it observes, if any."""
    from pymc.variational.streaming import StreamingDataset

    columns = columns or pq.read_schema(parquet_files(rows)[0]).names
    if buffer_size is None:
        _in_memory(rows, columns)
        return None
    buffer = _buffer(rows, buffer_size, seed, columns)
    ds = StreamingDataset(buffer, batch_size=BATCH_SIZE)
    logistic([ds[name] for name in columns], ds.total_size)
    return ds


def logistic(columns: list, total_size: int | None) -> None:
    """Build the model in context; the last column is the label."""
    import pymc as pm

    b = pm.Normal("b", 0.0, PRIOR_SD, shape=len(columns))
    logit = b[0] + sum(b[j + 1] * x for j, x in enumerate(columns[:-1]))
    pm.Bernoulli("up", logit_p=logit, observed=columns[-1], total_size=total_size)


def _end_with_parent() -> None:
    """Leave nothing running when the parent is killed: it would meet itself in the next run."""
    parent = parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _examine(
    approx: Any, ds: Any, average: Any, order: dict[str, Any], check_last: bool
) -> Examination:
    """Check *approx*, then improve it as its user would, and tell how it went."""
    from pymc.variational.streaming import StreamError, polish

    last = _checked(approx, ds)[0] if check_last else _state(approx)
    epochs = average.epochs
    average.apply(approx)
    averaged, *said = _checked(approx, ds)
    corrected = refusal = None
    try:
        said.append(str(polish(approx, ds, progressbar=False)))
        corrected = _state(approx)
    except StreamError as error:
        refusal = str(error)
    return Examination(order, epochs, last, averaged, corrected, refusal, tuple(said))


def _checked(approx: Any, ds: Any) -> tuple[State, str]:
    from pymc.variational.streaming import check_fit

    began = time.perf_counter()
    check = check_fit(approx, ds, progressbar=False)
    seconds, worst = time.perf_counter() - began, float(np.abs(check.z).max())
    return _state(approx, verdict=check.verdict, z=worst, seconds=seconds), str(check)


def _check_order(source: Any) -> dict[str, Any]:
    from pymc.variational.streaming import check_order

    began = time.perf_counter()
    report = check_order(source)
    seconds = time.perf_counter() - began
    said = {
        name: getattr(report, name) for name in ("ordered", "feature", "design_effect", "drift")
    }
    return {**said, "seconds": seconds}


def _state(approx: Any, **checked: Any) -> State:
    mean, sd = approx.mean.eval(), approx.std.eval()
    return State(tuple(mean.tolist()), tuple(sd.tolist()), **checked)


def _of_stream(caught: list[warnings.WarningMessage]) -> tuple[str, ...]:
    from pymc.variational.streaming import StreamWarning

    return tuple(str(w.message) for w in caught if issubclass(w.category, StreamWarning))


def _buffer(
    rows: Path, buffer_size: int | None, seed: int, columns: Sequence[str] | None = None
) -> Any:
    from pymc.variational.streaming import parquet_source, shuffle_buffer

    if buffer_size is None:
        raise ValueError("buffer_size must be given to examine a fit, got None")
    source = parquet_source(rows, columns=columns)
    return shuffle_buffer(source, buffer_size=buffer_size, batch_size=BATCH_SIZE, seed=seed)


def _in_memory(rows: Path, columns: Sequence[str]) -> None:
    """Build the model in context on all rows, in the types of the table."""
    import pymc as pm

    files = parquet_files(rows)
    *features, up = (
        np.concatenate([pq.read_table(file, columns=[name])[0].to_numpy() for file in files])
        for name in columns
    )
    # PyMC would cast smaller integers, and then refuse them as data.
    batch = pm.Minibatch(*features, up.astype("int32"), batch_size=BATCH_SIZE)
    logistic(batch, len(up))


def _derivatives(
    files: list[Path], columns: Sequence[str], b: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Sum gradient and information of the log-likelihood over the rows of all files."""

    def of_file(file: Path) -> tuple[np.ndarray, np.ndarray]:
        gradient, information = np.zeros(len(b)), np.zeros((len(b), len(b)))
        for block in _blocks(file, columns):
            _add_derivatives(block, b, gradient, information)
        return gradient, information

    with ThreadPoolExecutor(WORKERS) as pool:
        gradients, informations = zip(*pool.map(of_file, files))
    return np.sum(gradients, axis=0), np.sum(informations, axis=0)


def _blocks(file: Path, columns: Sequence[str]) -> Iterator[np.ndarray]:
    with pq.ParquetFile(file, pre_buffer=False, buffer_size=1 << 16) as parquet:
        for batch in parquet.iter_batches(columns=[*columns], use_threads=False):
            arrays = (batch[name].to_numpy(zero_copy_only=False) for name in columns)
            yield np.column_stack([*arrays]).astype(float)


@numba.njit(cache=True, nogil=True)
def _add_derivatives(rows, b, gradient, information):
    x = np.ones(len(b))
    for row in rows:
        x[1:] = row[:-1]
        logit = 0.0
        for i in range(len(b)):
            logit += b[i] * x[i]
        p = 1 / (1 + np.exp(-logit))
        for i in range(len(b)):
            gradient[i] += (row[-1] - p) * x[i]
            for j in range(len(b)):
                information[i, j] += p * (1 - p) * x[i] * x[j]
