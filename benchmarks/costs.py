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
"""What the parts of a stream cost: libraries that hand it rows, shuffling, and the checks of rows.

Each function returns a table of ``benchmarks.speed``.
"""

import os
import shutil
import statistics
import time

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

import pymc as pm

from benchmarks.cases import Data, epoch, order_book
from benchmarks.harness import markdown, peak_growth
from benchmarks.orderbook.experiment import BATCH_SIZE
from pymc.variational._streaming.likelihood import Factors
from pymc.variational._streaming.order.monitor import Monitor
from pymc.variational._streaming.order.report import Stream
from pymc.variational._streaming.order.statistic import ModelScore
from pymc.variational._streaming.sources.arrays import as_source
from pymc.variational.streaming import (
    StreamingDataset,
    arrow_source,
    check_order,
    parquet_source,
    preshuffle,
    shuffle_buffer,
)

__all__ = ["checks", "copy_plain", "libraries", "order", "shuffle_ours", "shuffling"]

QUERY = "SELECT mid, spread, imbalance, up FROM '*.parquet' WHERE spread > 0.01"


def duckdb(method: str = "sql", query: str = QUERY) -> Any:
    from duckdb import connect

    connection = connect(config={"memory_limit": "200MB"} if "ORDER BY" in query else {})
    return getattr(connection, method)(query).to_arrow_reader(65_536)


def polars(method: str, **options: Any) -> Any:
    import polars as pl

    return getattr(pl.scan_parquet("*.parquet").filter(pl.col("spread") > 0.01), method)(**options)


def dataset() -> Any:
    import pyarrow.dataset

    return pyarrow.dataset.dataset(".").to_batches()


def dask() -> Any:
    from dask.dataframe import read_parquet

    for part in read_parquet(".", split_row_groups=1).partitions:
        yield part.compute(scheduler="synchronous")


def ray() -> Any:
    from ray.data import read_parquet

    return read_parquet(".").iter_batches(batch_size=65_536, batch_format="pyarrow")


READERS: dict[str, Callable[[], Any]] = {
    "DuckDB, `connection.sql(...)`": duckdb,
    "DuckDB, `connection.execute(...)`": partial(duckdb, "execute"),
    "DuckDB, `ORDER BY` under a `memory_limit` of 200 MB": partial(
        duckdb, query=QUERY + " ORDER BY mid"
    ),
    "Polars, `collect_batches`": partial(polars, "collect_batches", chunk_size=65_536),
    'Polars, `collect(engine="streaming")`': partial(polars, "collect", engine="streaming"),
    "`pyarrow.dataset(...).to_batches()`": dataset,
    "Dask, by row groups": dask,
    "Ray Data": ray,
}


def libraries(data: Data, turns: int) -> str:
    """Measure by how much the peak grows while a library hands over all rows."""
    sizes = data.n_rows // 40, data.n_rows // 2, data.n_rows * 3 // 2
    read = partial(epoch, total_size=1, order_check="off")
    lines = []
    for name in READERS:
        books = (partial(library, name, data.order_book(size)) for size in sizes)
        with suppress(ModuleNotFoundError):
            lines.append([name, *(f"{peak_growth(read, book):.0f}" for book in books)])
    return markdown("| " + " | ".join(f"{size / 1e6:g} million rows" for size in sizes), lines)


def library(name: str, book: Path) -> Any:
    os.chdir(book)
    return arrow_source(READERS[name])


def shuffling(data: Data, turns: int) -> str:
    """Let ``preshuffle``, DuckDB under the same limits, and a plain copy take turns."""
    n_rows, target = data.n_rows * 4 // 5, data.folder / "result"
    book = data.order_book(n_rows)
    ways = {
        "preshuffle": shuffle_ours,
        "DuckDB, ORDER BY random()": shuffle_duckdb,
        "plain copy": copy_plain,
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(1 + turns):  # the first warms up
        for name, run in ways.items():
            seconds[name].append(_seconds(partial(run, book, target, "512MB")))
            shutil.rmtree(target)
    lines = []
    for name, theirs in seconds.items():
        ours, theirs = seconds["preshuffle"][1:], theirs[1:]
        median, times = map(statistics.median, (theirs, [b / a for a, b in zip(ours, theirs)]))
        spread = f"{median:.2f} ({min(theirs):.2f} to {max(theirs):.2f})"
        lines.append([name, spread, f"{n_rows / median / 1e6:.1f}", f"{times:.2f}"])
    heads = "seconds, median (least to most) | million rows/s | time over preshuffle's"
    return markdown(f"{n_rows:,} rows | {heads}", lines)


def shuffle_ours(source: Path, target: Path, memory_limit: str) -> None:
    preshuffle(source, target, seed=0, memory_limit=memory_limit, progressbar=False)


def shuffle_duckdb(source: Path, target: Path, memory_limit: str) -> None:
    """Shuffle with as many threads as ``preshuffle`` has."""
    from duckdb import connect

    target.mkdir()
    settings: dict[str, Any] = {
        "memory_limit": memory_limit,
        "threads": "2",
        "temp_directory": str(target),
    }
    with connect(config=settings) as connection:
        connection.execute("SET enable_progress_bar = false")
        connection.execute(
            f"COPY (SELECT * FROM '{source}/*.parquet' ORDER BY random()) "
            f"TO '{target}/all.parquet' (FORMAT parquet, COMPRESSION lz4_raw)"
        )


def copy_plain(source: Path, target: Path, memory_limit: str) -> None:
    """Read each file whole and write it with lz4 and without dictionaries, without any limit."""
    encoding = {"use_dictionary": False, "write_statistics": False, "write_page_checksum": True}
    target.mkdir()
    for file in sorted(source.iterdir()):
        pq.write_table(pq.read_table(file), target / file.name, compression="lz4", **encoding)


MANY_ROWS = 100_000_000
WINDOW = 1_000_000
REPEATS, STEPS, WARM_UP = 5, 400, 3


def order(data: Data, turns: int) -> str:
    """Measure the order check on order books in order of time, before a fit and while streaming."""
    lines = []
    for n_rows in (data.n_rows // 20, data.n_rows // 2, 5 * data.n_rows):
        source = parquet_source(data.order_book(n_rows))
        check = partial(check_order, source, buffer_size=WINDOW)
        seconds = statistics.median(_seconds(check) for _ in range(REPEATS))
        buffer = shuffle_buffer(source, buffer_size=WINDOW, batch_size=BATCH_SIZE, seed=0)
        windows = (window.copy() for window in buffer.blocks() if len(window))
        watched = watch_seconds([*islice(windows, 4)], partial(logistic, label=3), n_rows)
        lines.append([f"{n_rows:,}", f"{seconds:.2f}", f"{watched * 1e3:.3f}"])
    return markdown("rows | before the fit, s | while streaming, ms per 4,096 rows", lines)


def checks(data: Data, turns: int) -> str:
    """Measure what the batch contract and the order check take of a step, on random rows."""
    lines, table = [], data.of("checks", WINDOW, _columns)
    rows = np.concatenate(list(parquet_source(table)))
    for name, model in MODELS.items():
        free, held = step_seconds(table, model, 2 * turns)
        watched = watch_seconds([rows] * 64, model, MANY_ROWS)
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
        score = ModelScore(Factors(built), ds.as_tensor()).at(pilot, n_rows)
    assert score is not None
    seconds = []
    for _ in range(REPEATS):
        monitor = Monitor(Stream(as_source(pilot), WINDOW, n_rows), lambda pilot: score)
        began = time.thread_time()
        for number, window in enumerate(windows):
            monitor.add(number * WINDOW, window)
            monitor.compare()
        seconds.append(time.thread_time() - began)
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


def _seconds(function: Callable[[], object], n_calls: int = 1) -> float:
    began = time.perf_counter()
    for _ in range(n_calls):
        function()
    return (time.perf_counter() - began) / n_calls


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
