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

    python -m benchmarks.orderbook.experiment ROWS --buffer-size 100000

The model is a logistic regression of the last column on the others::

    logit P(up) = b0 + b1 * mid + b2 * spread + b3 * imbalance,  b ~ Normal(0, 3)

so its exact posterior is found by Newton's method on all rows, and an error can be told in
posterior standard deviations. Without ``--buffer-size`` the rows are held in memory and drawn by
``pm.Minibatch``.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
import time

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

__all__ = ["Fit", "Posterior", "exact_posterior", "fit_in_process", "parquet_files"]

PRIOR_SD = 3.0
BATCH_SIZE = 4096
LEARNING_RATE = 0.02
WARM_UP_STEPS = 500
TRACED_EVERY = 20


@dataclass(frozen=True, slots=True)
class Posterior:
    """The exact posterior of the coefficients."""

    names: tuple[str, ...]
    """"intercept" and the names of the feature columns."""
    mean: np.ndarray
    sd: np.ndarray
    n_rows: int
    """Rows of the table."""


@dataclass(frozen=True, slots=True)
class Fit:
    """One fit, and what it cost."""

    last: tuple[float, ...]
    """Posterior means of the last step."""
    averaged: tuple[float, ...]
    """Posterior means, averaged over the second half of the steps."""
    trace: tuple[tuple[float, ...], ...]
    """Posterior means every ``TRACED_EVERY`` steps."""
    steps_per_second: float
    """After ``WARM_UP_STEPS``."""
    peak_mb: float
    """Largest resident set of the process."""
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
            self.trace.append(tuple(mean))
        if i == WARM_UP_STEPS:
            self.started = time.perf_counter()

    def rate(self) -> float:
        """Return steps per second since the warm-up."""
        return (self.n_steps - WARM_UP_STEPS) / (time.perf_counter() - self.started)


def exact_posterior(rows: Path) -> Posterior:
    """Find the posterior by Newton's method, in one bounded pass over the rows per iteration."""
    files = parquet_files(rows)
    columns = pq.read_schema(files[0]).names
    b = np.zeros(len(columns))
    step = np.ones_like(b)
    while np.abs(step).max() > 1e-10:
        precision = np.eye(len(b)) / PRIOR_SD**2
        gradient = -b / PRIOR_SD**2
        n_rows = 0
        for block in _blocks(files):
            design = np.column_stack([np.ones(len(block)), block[:, :-1]])
            p = 1 / (1 + np.exp(-design @ b))
            gradient += design.T @ (block[:, -1] - p)
            precision += design.T @ (design * (p * (1 - p))[:, None])
            n_rows += len(block)
        step = np.linalg.solve(precision, gradient)
        b = b + step
    sd = np.sqrt(np.diag(np.linalg.inv(precision)))
    return Posterior(("intercept", *columns[:-1]), b, sd, n_rows)


def fit_in_process(rows: Path, *, buffer_size: int | None, n_steps: int, seed: int) -> Fit:
    """Fit in a process of its own, so that its memory can be told from that of others."""
    command = [sys.executable, "-m", __spec__.name, str(rows)]
    command += ["--steps", str(n_steps), "--seed", str(seed)]
    if buffer_size is not None:
        command += ["--buffer-size", str(buffer_size)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"the fit of {rows} failed; what it printed stands above")
    return Fit(**json.loads(done.stdout.splitlines()[-1]))


def parquet_files(rows: Path) -> list[Path]:
    """List the Parquet files of a table in order."""
    files = sorted(rows.rglob("*.parquet"))
    if not files:
        raise SystemExit(f"{rows} holds no Parquet files")
    return files


def fit(rows: Path, *, buffer_size: int | None, n_steps: int, seed: int) -> Fit:
    """Fit in this process."""
    import warnings

    import pymc as pm

    tail = Tail(n_steps)
    with warnings.catch_warnings(record=True) as caught, pm.Model():
        warnings.simplefilter("always")
        callbacks = _in_memory(rows) if buffer_size is None else _stream(rows, buffer_size, seed)
        approx = pm.fit(
            n_steps,
            method="advi",
            callbacks=[tail, *callbacks],
            obj_optimizer=pm.adam(learning_rate=LEARNING_RATE),
            random_seed=seed,
        )
        rate = tail.rate()
    return Fit(
        last=tuple(approx.params[0].get_value()),
        averaged=tuple(tail.total / tail.n_averaged),
        trace=tuple(tail.trace),
        steps_per_second=rate,
        peak_mb=_peak_mb(),
        warnings=tuple(str(w.message) for w in caught if "Stream" in str(w.category.__mro__)),
    )


def _stream(rows: Path, buffer_size: int, seed: int) -> list:
    from pymc.variational.streaming import StreamingDataset, parquet_source, shuffle_buffer

    ds = StreamingDataset(
        shuffle_buffer(
            parquet_source(rows), buffer_size=buffer_size, batch_size=BATCH_SIZE, seed=seed
        ),
        batch_size=BATCH_SIZE,
    )
    columns = pq.read_schema(parquet_files(rows)[0]).names
    _logistic([ds[name] for name in columns], ds.total_size)
    return [ds.fit_callback()]


def _in_memory(rows: Path) -> list:
    import pymc as pm

    table = np.concatenate(list(_blocks(parquet_files(rows))))
    features, up = table[:, :-1].T, table[:, -1].astype("int32")
    _logistic(pm.Minibatch(*features, up, batch_size=BATCH_SIZE), len(table))
    return []


def _logistic(columns: list, total_size: int | None) -> None:
    """Build the model in context; the last column is the label."""
    import pymc as pm

    b = pm.Normal("b", 0.0, PRIOR_SD, shape=len(columns))
    logit = b[0] + sum(b[j + 1] * x for j, x in enumerate(columns[:-1]))
    pm.Bernoulli("up", logit_p=logit, observed=columns[-1], total_size=total_size)


def _blocks(files: list[Path]) -> Iterator[np.ndarray]:
    for file in files:
        with pq.ParquetFile(file, pre_buffer=False, buffer_size=1 << 16) as parquet:
            for batch in parquet.iter_batches(use_threads=False):
                yield np.column_stack([column.to_numpy() for column in batch.columns]).astype(float)


def _peak_mb() -> float:
    status = Path("/proc/self/status")
    if not status.exists():
        return float("nan")
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def main(argv: list[str] | None = None) -> None:
    """Fit once, and print the result as JSON on the last line."""
    parser = argparse.ArgumentParser(description="Fit the order-book model to a table.")
    parser.add_argument("rows", type=Path, help="directory of Parquet files, last column 0 or 1")
    parser.add_argument("--buffer-size", type=int, help="rows; default: all rows in memory")
    parser.add_argument("--steps", type=int, default=6_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    result = fit(args.rows, buffer_size=args.buffer_size, n_steps=args.steps, seed=args.seed)
    sys.stdout.write(json.dumps(dataclasses.asdict(result)) + "\n")


if __name__ == "__main__":
    main()
