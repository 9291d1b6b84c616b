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

The model is a logistic regression of the last column on the others::

    logit P(up) = b0 + b1 * mid + b2 * spread + b3 * imbalance,  b ~ Normal(0, 3)

so its exact posterior is found by Newton's method on all rows, and an error can be told in
posterior standard deviations. Without ``buffer_size`` the rows are held in memory and drawn by
``pm.Minibatch``.
"""

import logging
import time
import warnings

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from scipy.special import expit

import pymc as pm

from benchmarks.orderbook.columns import LARGEST, parquet_files
from tests.variational.streaming.memory import peak_mb

# isort: split
# The tests have put the checkout before an installed copy, unless that is to be used.
from pymc.variational.streaming import (
    EpochAverage,
    StreamError,
    StreamingDataset,
    StreamWarning,
    check_fit,
    check_order,
    parquet_source,
    polish,
    shuffle_buffer,
)

__all__ = ["Posterior", "build_model", "exact_posterior", "fit_model"]

PRIOR_SD = 3.0
BATCH_SIZE = 4096
LEARNING_RATE = 0.02
WARM_UP_STEPS = 500
TRACED_EVERY = 20


@dataclass(frozen=True, slots=True)
class Posterior:
    """The exact posterior of the coefficients."""

    names: tuple[str, ...]
    mean: tuple[float, ...]
    sd: tuple[float, ...]
    n_rows: int

    def errors(self, mean: Sequence[float]) -> np.ndarray:
        """Return how far a mean is from the exact one, in posterior standard deviations."""
        return np.subtract(mean, self.mean) / self.sd


class Tail:
    """Average the variational means over the second half of a fit, and keep a trace."""

    def __init__(self, n_steps: int) -> None:
        self.n_steps = n_steps
        self.n_averaged = 0
        self.total: Any = 0.0
        self.trace: list[list[float]] = []
        self.started = 0.0

    def __call__(self, approx: Any, losses: Any, i: int) -> None:
        mean = approx.params[0].get_value()
        if 2 * i > self.n_steps:
            self.total, self.n_averaged = self.total + mean, self.n_averaged + 1
        if i % TRACED_EVERY == 0:
            self.trace.append(mean.tolist())
        if i == WARM_UP_STEPS:
            self.started = time.perf_counter()


def exact_posterior(rows: Path, columns: Sequence[str] | None = None) -> Posterior:
    """Find the posterior by Newton's method, in one bounded pass over the rows per iteration."""
    files = parquet_files(rows)
    columns = [*(columns or pq.read_schema(files[0]).names)]
    b = np.zeros(len(columns))
    step = np.ones_like(b)
    while np.abs(step).max() > 1e-10:
        with ThreadPoolExecutor(2) as pool:
            sums = [*pool.map(partial(_derivatives, columns, b), files)]
        gradient, information = (sum(each) for each in zip(*sums))
        precision = information + np.eye(len(b)) / PRIOR_SD**2
        step = np.linalg.solve(precision, gradient - b / PRIOR_SD**2)
        b = b + step
    return Posterior(
        names=("intercept", *columns[:-1]),
        mean=tuple(b.tolist()),
        sd=tuple(np.sqrt(np.diag(np.linalg.inv(precision))).tolist()),
        n_rows=sum(pq.read_metadata(file).num_rows for file in files),
    )


def fit_model(
    rows: Path,
    *,
    buffer_size: int | None,
    n_steps: int,
    seed: int,
    columns: Sequence[str] | None = None,
    examine: bool = False,
    progressbar: bool = True,
) -> dict[str, Any]:
    """Fit in this process, and return the fit and what it cost, as JSON can hold it.

    Without a *buffer_size* in rows, these are held in memory. With *examine*, the order of a stream
    is checked before the fit, and the fit after it: as the last step left it, and averaged.

    In the result, ``last`` are the posterior means of the last step, ``averaged`` those averaged
    over the second half of the steps, and ``trace`` those of every 20th; ``steps_per_second`` is
    the rate after the first 500 steps, and ``peak_mb`` the peak memory until the end of the fit.
    """
    if not progressbar:
        logging.getLogger("pymc").setLevel(logging.WARNING)
    tail = Tail(n_steps)
    with warnings.catch_warnings(record=True) as caught, pm.Model():
        warnings.simplefilter("always")
        began = time.perf_counter()
        ds = build_model(rows, buffer_size, seed, columns)
        order = check_order(_buffer(rows, buffer_size, seed, columns)) if examine else None
        average = EpochAverage(ds) if examine else None
        callbacks = [tail, average, ds.fit_callback() if ds is not None else None]
        ready = time.perf_counter()
        approx = pm.fit(
            n_steps,
            method="advi",
            callbacks=[each for each in callbacks if each is not None],
            obj_optimizer=pm.adam(learning_rate=LEARNING_RATE),
            random_seed=seed,
            progressbar=progressbar,
        )
        ended, memory, last = time.perf_counter(), peak_mb(), approx.mean.eval().tolist()
        examination = _examine(approx, ds, average, order) if examine else None
    return {
        "last": last,
        "averaged": (tail.total / tail.n_averaged).tolist(),
        "trace": tail.trace,
        "steps_per_second": (n_steps - WARM_UP_STEPS) / (ended - tail.started),
        "seconds": {"ready": ready - began, "fit": ended - ready},
        "peak_mb": memory,
        "examination": examination,
        "warnings": [str(w.message) for w in caught if issubclass(w.category, StreamWarning)],
    }


def build_model(
    rows: Path, buffer_size: int | None, seed: int, columns: Sequence[str] | None = None
) -> Any:
    """Build the model in context; return the stream that it observes, if any."""
    files = parquet_files(rows)
    columns = columns or pq.read_schema(files[0]).names
    if buffer_size is not None:
        ds = StreamingDataset(_buffer(rows, buffer_size, seed, columns), batch_size=BATCH_SIZE)
        logistic([ds[name] for name in columns], ds.total_size)
        return ds
    *features, up = (
        np.concatenate([pq.read_table(file, columns=[name])[0].to_numpy() for file in files])
        for name in columns
    )
    # PyMC would cast smaller integers, and then refuse them as data.
    batch = pm.Minibatch(*features, up.astype("int32"), batch_size=BATCH_SIZE)
    logistic(batch, len(up))
    return None


def logistic(columns: list, total_size: int | None) -> None:
    """Build the model in context; the last column is the label."""
    b = pm.Normal("b", 0.0, PRIOR_SD, shape=len(columns))
    logit = b[0] + sum(b[j + 1] * x for j, x in enumerate(columns[:-1]))
    pm.Bernoulli("up", logit_p=logit, observed=columns[-1], total_size=total_size)


def _examine(approx: Any, ds: Any, average: Any, order: Any) -> dict[str, Any]:
    """Check *approx*, then improve it as its user would, and tell how it went.

    ``last``, ``averaged`` and ``corrected`` are its states after the last step, after
    ``EpochAverage.apply`` and after ``polish``, which is None if that refused; ``refusal`` is why.
    With no whole ``epochs`` averaged, these are steps of a part of one.
    """
    names = "ordered", "feature", "design_effect", "drift"
    found: dict[str, Any] = {"order": {name: getattr(order, name) for name in names}}
    found |= {"epochs": average.epochs, "corrected": None, "refusal": None}
    found["last"], _ = _checked(approx, ds)
    average.apply(approx)
    found["averaged"], *said = _checked(approx, ds)
    try:
        said.append(str(polish(approx, ds, progressbar=False)))
        found["corrected"] = {"mean": approx.mean.eval().tolist()}
    except StreamError as error:
        found["refusal"] = str(error)
    return found | {"said": said}


def _checked(approx: Any, ds: Any) -> tuple[dict[str, Any], str]:
    """Return means and what ``check_fit`` says of them, with the z of the worst, and its report."""
    began = time.perf_counter()
    check = check_fit(approx, ds, progressbar=False)
    seconds, worst = time.perf_counter() - began, float(np.abs(check.z).max())
    mean = approx.mean.eval().tolist()
    return {"mean": mean, "verdict": check.verdict, "z": worst, "seconds": seconds}, str(check)


def _buffer(rows: Path, buffer_size: Any, seed: int, columns: Sequence[str] | None) -> Any:
    source = parquet_source(rows, columns=columns)
    return shuffle_buffer(source, buffer_size=buffer_size, batch_size=BATCH_SIZE, seed=seed)


def _derivatives(columns: Sequence[str], b: np.ndarray, file: Path) -> tuple[Any, Any]:
    """Sum gradient and information of the log-likelihood over the rows of a file."""
    gradient, information = np.zeros(len(b)), np.zeros((len(b), len(b)))
    with pq.ParquetFile(file, pre_buffer=False, buffer_size=1 << 16) as parquet:
        for batch in parquet.iter_batches(columns=[*columns], use_threads=False):
            *features, up = (batch[name].to_numpy(zero_copy_only=False) for name in columns)
            x = np.column_stack([np.ones(len(up)), *features])
            if not (np.abs(x) <= LARGEST).all() or not ((up == 0) | (up == 1)).all():
                raise ValueError(
                    f"{file} must hold only finite numbers in {', '.join(columns)}, "
                    f"up to {LARGEST:g}, and only 0 and 1 in {columns[-1]}"
                )
            p = expit(x @ b)
            gradient += x.T @ (up - p)
            information += x.T @ (x * (p * (1 - p))[:, None])
    return gradient, information
