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
"""What the order check costs, before a fit and while the rows stream, and the batch contract.

    python -m benchmarks.order_speed --page docs/source/speed.md

The first table is of the order books, in order of time.  The second is of several models on random
rows: by how much the contract makes a step longer, of fits with and without it in turns, and the
processor time of the order check in the thread that reads; ``--only checks`` leaves out the first.
"""

import statistics
import time

from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

import pymc as pm

from benchmarks.data import Data, write_columns
from benchmarks.fits import order_book
from benchmarks.orderbook.experiment import BATCH_SIZE
from benchmarks.pages import markdown, measure
from pymc.variational._streaming.order.monitor import Monitor
from pymc.variational._streaming.order.report import Stream
from pymc.variational._streaming.order.statistic import ModelScore
from pymc.variational._streaming.sources.arrays import as_source
from pymc.variational.streaming import StreamingDataset, check_order, parquet_source, shuffle_buffer

COMMAND = "python -m benchmarks.order_speed"
MANY_ROWS = 100_000_000
WINDOW = 1_000_000
WATCHED_WINDOWS, MANY_WINDOWS = 4, 64
REPEATS, STEPS, WARM_UP = 5, 400, 3


def order_table(data: Data, turns: int) -> str:
    lines = []
    for n_rows in (data.n_rows // 100, data.n_rows // 10, data.n_rows):
        source = parquet_source(data.order_book(n_rows))
        seconds = [
            _seconds(partial(check_order, source, buffer_size=WINDOW), 1) for _ in range(REPEATS)
        ]
        buffer = shuffle_buffer(source, buffer_size=WINDOW, batch_size=BATCH_SIZE, seed=0)
        windows = (window.copy() for window in buffer.blocks() if len(window))
        few = list(islice(windows, WATCHED_WINDOWS))
        watched = watch_seconds(few, partial(logistic, label=3), n_rows)
        lines.append([f"{n_rows:,}", f"{statistics.median(seconds):.2f}", f"{watched * 1e3:.3f}"])
    return markdown("rows | before the fit, s | while streaming, ms per 4,096 rows", lines)


def checks_table(data: Data, turns: int) -> str:
    lines = []
    table = data.table("checks", partial(write_columns, WINDOW, _columns))
    rows = np.concatenate(list(parquet_source(table)))
    for name, model in MODELS.items():
        free, held = step_seconds(table, model, turns)
        watched = watch_seconds([rows] * MANY_WINDOWS, model, MANY_ROWS)
        both = (f"{each * 1e6:.1f} | {each / free:.1%}" for each in (held - free, watched))
        lines.append([name, f"{free * 1e3:.3f}", *both])
    return markdown(
        "model | step, ms | longer with the batch contract, µs | | order check, µs |", lines
    )


def watch_seconds(windows: Sequence[np.ndarray], model: Callable, n_rows: int) -> float:
    """Return the processor seconds of comparing the rows of a batch by the score of a model."""
    pilot = windows[0][:BATCH_SIZE]
    with StreamingDataset(pilot, batch_size=BATCH_SIZE, order_check="off") as ds:
        with pm.Model() as built:
            model(ds.as_tensor(), n_rows)
        score = ModelScore(built, ds.as_tensor()).at(pilot, n_rows)
    assert score is not None
    seconds = []
    for _ in range(REPEATS):
        monitor = Monitor(Stream(as_source(pilot), WINDOW, n_rows), lambda pilot: score)
        start = time.thread_time()
        for number, window in enumerate(windows):
            monitor.add(number * WINDOW, window)
            monitor.compare()
        seconds.append(time.thread_time() - start)
    return statistics.median(seconds) * BATCH_SIZE / sum(map(len, windows))


def step_seconds(table: Path, model: Callable, turns: int) -> np.ndarray:
    """Return the seconds of a step without and with the contract, as medians over turns."""
    streams = [
        StreamingDataset(parquet_source(table), batch_size=BATCH_SIZE, order_check="off")
        for _ in range(2)
    ]
    with streams[0], streams[1]:
        steps = [_step(ds, model) for ds in streams]
        streams[0]._reader.hold_to(None)
        seconds = np.empty((WARM_UP + turns, 2))
        for turn in range(len(seconds)):
            for i in (turn % 2, 1 - turn % 2):  # each begins in every second turn
                seconds[turn, i] = _seconds(steps[i], STEPS)
    return np.median(seconds[WARM_UP:], axis=0)


def _step(ds: StreamingDataset, model: Callable) -> Callable[[], None]:
    """Return what makes a step of a fit and puts the batch after it in place."""
    with pm.Model():
        model(ds.as_tensor(), ds.total_size)
        callback = ds.fit_callback()
        step = pm.ADVI().objective.step_function(score=True, obj_optimizer=pm.adam())

    def run(kept: Any = callback) -> None:
        step()
        ds._advance()

    return run


def _seconds(function: Callable[[], object], n_calls: int) -> float:
    start = time.perf_counter()
    for _ in range(n_calls):
        function()
    return (time.perf_counter() - start) / n_calls


def logistic(x: Any, n: int | None, label: int) -> None:
    order_book(x[:, :3], x[:, label], n)


def groups(x: Any, n: int | None) -> None:
    a, b = pm.Normal("a", 0, pm.HalfNormal("s"), shape=100), pm.Normal("b")
    rate = pm.math.exp(a[x[:, 3].astype("int64")] + b * x[:, 0])
    pm.Poisson("n", rate, observed=x[:, 4], total_size=n)


def cells(x: Any, n: int | None) -> None:
    a, b = pm.Normal("a", shape=200), pm.Normal("b")
    logit = a[(2 * x[:, 3] + x[:, 4]).astype("int64")] + b * x[:, 0]
    pm.Bernoulli("y", logit_p=logit, observed=x[:, 5], total_size=n)


def trials(x: Any, n: int | None) -> None:
    logit = pm.Normal("a") + pm.Normal("b") * x[:, 0]
    pm.Binomial("y", x[:, 3] + 1, logit_p=logit, observed=x[:, 6], total_size=n)


MODELS: dict[str, Callable[[Any, int | None], None]] = {
    "logistic regression, four columns and a label": partial(logistic, label=4),
    "logistic regression, one event in a hundred rows": partial(logistic, label=7),
    "hierarchical Poisson regression, 100 groups": groups,
    "logistic regression, an index of two columns": cells,
    "binomial regression, trials by row": trials,
}


def _columns(rng: np.random.Generator, numbers: np.ndarray) -> dict[str, np.ndarray]:
    """Return three normal columns, a group, two labels, a count up to the group's, a rare label."""
    n = len(numbers)
    x, number, labels = rng.normal(size=(3, n)), rng.integers(0, 100, n), rng.integers(0, 2, (2, n))
    columns = [*x, number, *labels, rng.integers(0, number + 2), rng.random(n) < 0.01]
    return {name: column.astype("float32") for name, column in zip("abcdefgh", columns)}


if __name__ == "__main__":
    measure(COMMAND, {"order": order_table, "checks": checks_table}, rows=MANY_ROWS, turns=20)
