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
"""How fast streams, fits and ``preshuffle`` are, and what the checks of rows cost.

    python -m benchmarks.speed --page docs/source/speed.md
    python -m benchmarks.speed --only speed ladder

Each fit has a process of its own, is compiled first and runs long enough to fill its windows; then
the fits of a table take turns of some thousand steps.  The fit on one batch is the limit: it reads
nothing.  With ``--folder`` the data are kept.  Shuffling needs ``duckdb``.
"""

import os
import shutil
import statistics
import time
import warnings

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

import pymc as pm

from benchmarks import cases
from benchmarks.cases import Case, Data, order_book
from benchmarks.harness import Lane, Runner, in_process, markdown, measure, race, ratio
from benchmarks.orderbook.experiment import BATCH_SIZE, PRIOR_SD, parquet_files
from pymc.variational._streaming.likelihood import Factors
from pymc.variational._streaming.order.monitor import Monitor
from pymc.variational._streaming.order.report import Stream
from pymc.variational._streaming.order.statistic import ModelScore
from pymc.variational._streaming.sources.arrays import as_source
from pymc.variational.streaming import StreamingDataset, parquet_source, preshuffle

__all__ = ["COMMAND", "TABLES"]

COMMAND = "python -m benchmarks.speed"
LIMIT, STREAM = "one batch, again and again", "stream, preshuffled"
UNBUFFERED = f"{STREAM}, without a shuffle buffer"
READY = "batches that are in memory already"
ONE_THREAD = "one thread of BLAS"
MEMORY, PEER = "`pm.Minibatch`, in memory", "pymc-extras DataLoader, as it comes"
HEADS = "steps/s | ms per step | CPU ms per step | speed / limit | speed / `pm.Minibatch`"


def speed(data: Data, turns: int) -> str:
    """Measure the order-book model on PyMC's default settings."""
    ordered = Case(data.order_book())
    shuffled = Case(data.shuffled(ordered.rows))
    by_place = partial(cases.on_changed_pytensor, nogil=False)
    without_lock = partial(cases.on_changed_pytensor, nogil=True)
    lanes = {
        LIMIT: Lane(cases.on_one_batch, shuffled),
        READY: Lane(cases.on_ready_batches, shuffled),
        STREAM: Lane(cases.on_stream, shuffled),
        UNBUFFERED: Lane(partial(cases.on_stream, buffered=False), shuffled),
        "stream, as it comes (zstd, dictionaries)": Lane(cases.on_stream, ordered),
        MEMORY: Lane(cases.in_memory_columns, shuffled),
        PEER: Lane(cases.on_dataloader, ordered),
        f"{LIMIT}, PyTensor's arguments by place": Lane(by_place, cases.on_one_batch, shuffled),
        f"{STREAM}, PyTensor's arguments by place": Lane(by_place, cases.on_stream, shuffled),
        f"{STREAM}, and its step without the lock": Lane(without_lock, cases.on_stream, shuffled),
    }
    race(lanes.values(), turns=turns)
    return markdown(f"rows | {HEADS}", speeds(lanes))


def shapes(data: Data, turns: int) -> str:
    """Measure other models and tables, each beside its own limit."""
    book = data.shuffled(data.order_book())
    columns = Case(data.shuffled(data.wide()), cases.wide, buffer_size=cases.SMALL_BUFFER)
    rows, more_rows = (data.shuffled(data.wide(width), "arrow") for width in (64, 256))
    many = replace(columns, rows=more_rows, model=partial(cases.wide, width=256))
    models = {
        "64 columns": columns,
        '64 columns, format="arrow"': replace(columns, rows=rows),
        '256 columns, format="arrow"': many,
        f'256 columns, format="arrow", {ONE_THREAD}': many,
        "batches of 256": Case(book, batch_size=256),
    }
    lines = []
    for name, case in models.items():
        threads = 1 if ONE_THREAD in name else os.cpu_count()
        environment = {"OPENBLAS_NUM_THREADS": str(threads)}
        ways: dict[str, Any] = {
            LIMIT: cases.on_one_batch,
            READY: cases.on_ready_batches,
            STREAM: cases.on_stream,
            UNBUFFERED: partial(cases.on_stream, buffered=False),
            MEMORY: cases.in_memory,
        }
        lanes = {way: Lane(make, case, **environment) for way, make in ways.items()}
        race(lanes.values(), turns=turns)
        lines += [[name, *line] for line in speeds(lanes)]
    return markdown(f"model | rows | {HEADS}", lines)


def speeds(lanes: Mapping[str, Lane]) -> Iterator[list[str]]:
    """Yield the cells of each lane, with its speed over that of two of them."""
    for name, lane in lanes.items():
        yield [name, *rates(lane), *(ratio(lane, lanes[each]) for each in (LIMIT, MEMORY))]


def rates(lane: Lane) -> list[str]:
    seconds, processor_seconds = lane.median("seconds"), lane.median("processor_seconds")
    return [f"{1 / seconds:,.0f}", f"{1e3 * seconds:.3f}", f"{1e3 * processor_seconds:.3f}"]


def start(data: Data, turns: int) -> str:
    """Measure how long it takes to open a large table, and until the first batch is there."""
    lines, n_rows = [], 5 * data.n_rows
    book = data.order_book(n_rows)
    for name, rows in {"preshuffled": data.shuffled(book), "in order of time": book}.items():
        opened, first = np.median([in_process(first_batch, rows) for _ in range(turns)], axis=0)
        lines.append([name, len(parquet_files(rows)), f"{opened:.2f}", f"{first:.2f}"])
    return markdown(f"{n_rows / 1e6:g} million rows | files | open, s | first batch, s", lines)


def first_batch(rows: Path) -> tuple[float, float]:
    """Return the seconds until the dataset is made, and until ``fit_callback`` returns."""
    warnings.simplefilter("ignore")
    began = time.perf_counter()
    case = Case(rows)
    ds = cases.stream(case)
    opened = time.perf_counter()
    with pm.Model():
        case.observe(ds.as_tensor(), ds.total_size)
        built = time.perf_counter()
        callback = ds.fit_callback()
        return opened - began, time.perf_counter() - built


DEFAULT = "numba, float64 (default)"
SETTINGS = {
    DEFAULT: ("numba", "float64"),
    "numba, float32": ("numba", "float32"),
    "C, float32": ("c", "float32"),
    "JAX, float32": ("jax", "float32"),
    "NumPyro, float32": ("numpyro", "float32"),
}


def ladder(data: Data, turns: int) -> str:
    """Measure the order-book model under PyMC's settings, which hold for a process, and NumPyro."""
    case, lanes = Case(data.shuffled(data.order_book())), {}
    for setting, (backend, dtype) in SETTINGS.items():
        ways: dict[str, Any] = {LIMIT: cases.on_one_batch, STREAM: cases.on_stream}
        if backend == "numpyro":
            ways = {way: partial(on_numpyro, way) for way in (LIMIT, STREAM, "in memory")}
        if backend in ("numba", "c") or find_spec(backend):
            for way, make in ways.items():
                flags = {"PYTENSOR_FLAGS": f"floatX={dtype}"}
                lane = Lane(make, replace(case, backend=backend), **flags)
                lanes[setting, way] = lane
    race(lanes.values(), turns=turns)
    lines = []
    for (setting, way), lane in lanes.items():
        ratios = (ratio(lane, lanes[each, LIMIT]) for each in (setting, DEFAULT))
        lines.append([setting, way, *rates(lane), *ratios])
    heads = "setting | rows | steps/s | ms per step | CPU ms per step"
    return markdown(f"{heads} | speed / own limit | speed / default's limit", lines)


def on_numpyro(way: str, case: Case) -> Runner:
    """Fit with SVI, AutoNormal and Adam, one jitted update for each batch from the host."""
    import jax
    import numpyro

    from numpyro.distributions import Bernoulli, Normal
    from numpyro.infer import SVI, Trace_ELBO
    from numpyro.infer.autoguide import AutoNormal

    scale = case.source.n_rows / case.batch_size
    next_batch = batches(way, case)

    def model(batch: Any) -> None:
        b = numpyro.sample("b", Normal(0.0, PRIOR_SD).expand([4]).to_event(1))
        logits = b[0] + sum(b[j + 1] * batch[:, j] for j in range(3))
        with numpyro.plate("rows", case.batch_size), numpyro.handlers.scale(scale=scale):
            numpyro.sample("up", Bernoulli(logits=logits), obs=batch[:, 3])

    svi = SVI(model, AutoNormal(model), numpyro.optim.Adam(cases.LEARNING_RATE), Trace_ELBO())
    update = jax.jit(svi.update)
    state = svi.init(jax.random.key(0), next_batch())

    def run(n_steps: int) -> None:
        nonlocal state
        for _ in range(n_steps):
            state, _loss = update(state, next_batch())
        jax.block_until_ready(state)

    run(2 * case.window_steps)
    return run, case.turn_steps


def batches(way: str, case: Case) -> Callable[[], np.ndarray]:
    """Return what gives the next batch: the first again, that of a stream, or rows at random."""
    if way == STREAM:
        ds = cases.stream(case)
        buffer = ds.as_tensor()
        return lambda: (ds.advance(), buffer.get_value(borrow=True))[1]
    if way == LIMIT:
        batch = next(iter(case.source))[: case.batch_size].astype("float32")
        return lambda: batch
    rows, rng = case.in_memory().astype("float32"), np.random.default_rng(0)
    return lambda: rows.take(rng.integers(len(rows), size=case.batch_size), axis=0)


MEMORY_LIMIT = "512MB"


def shuffling(data: Data, turns: int) -> str:
    """Let ``preshuffle``, DuckDB under the same limits, and a plain copy take turns."""
    n_rows, target = data.n_rows * 4 // 5, data.folder / "result"
    book = data.order_book(n_rows)
    ways: dict[str, Callable[[Path, Path], object]] = {
        "preshuffle": partial(preshuffle, seed=0, memory_limit=MEMORY_LIMIT, progressbar=False),
        "DuckDB, ORDER BY random()": shuffle_duckdb,
        "plain copy": copy_plain,
    }
    seconds = np.empty((1 + turns, len(ways)))
    for turn in seconds:
        for i, shuffle in enumerate(ways.values()):
            turn[i] = _seconds(partial(shuffle, book, target))
            shutil.rmtree(target)
    lines = []
    for name, theirs in zip(ways, seconds[1:].T):  # the first turn warms up
        median, times = np.median(theirs), np.median(theirs / seconds[1:, 0])
        spread = f"{median:.2f} ({theirs.min():.2f} to {theirs.max():.2f})"
        lines.append([name, spread, f"{n_rows / median / 1e6:.1f}", f"{times:.2f}"])
    heads = "seconds, median (least to most) | million rows/s | time over preshuffle's"
    return markdown(f"{n_rows:,} rows | {heads}", lines)


def shuffle_duckdb(source: Path, target: Path) -> None:
    """Shuffle with as many threads as ``preshuffle`` has."""
    from duckdb import connect

    target.mkdir()
    limits = {"memory_limit": MEMORY_LIMIT, "threads": "2", "temp_directory": str(target)}
    with connect(config={**limits}) as connection:
        connection.execute("SET enable_progress_bar = false")
        connection.execute(
            f"COPY (SELECT * FROM '{source}/*.parquet' ORDER BY random()) "
            f"TO '{target}/all.parquet' (FORMAT parquet, COMPRESSION lz4_raw)"
        )


def copy_plain(source: Path, target: Path) -> None:
    """Read each file whole and write it with lz4 and without dictionaries, without any limit."""
    encoding = {"use_dictionary": False, "write_statistics": False, "write_page_checksum": True}
    target.mkdir()
    for file in sorted(source.iterdir()):
        pq.write_table(pq.read_table(file), target / file.name, compression="lz4", **encoding)


MANY_ROWS, WINDOW = 100_000_000, 1_000_000
REPEATS, STEPS, WARM_UP = 5, 400, 3


def checks(data: Data, turns: int) -> str:
    """Measure what the batch contract and the order check take of a step, on random rows."""
    lines, table = [], data.of("checks", WINDOW, _columns)
    rows = np.concatenate(list(parquet_source(table)))
    for name, model in MODELS.items():
        free, added = step_seconds(table, model, 2 * turns)
        watched = watch_seconds([rows] * 64, model, MANY_ROWS)
        both = (f"{each * 1e6:.1f} | {each / free:.1%}" for each in (added, watched))
        lines.append([name, f"{free * 1e3:.3f}", *both])
    heads = "model | step, ms | longer with the batch contract, µs | | order check, µs |"
    return markdown(heads, lines)


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


def step_seconds(table: Path, model: Callable, turns: int) -> tuple[float, float]:
    """Return the seconds of a step without the contract, and those that it adds.

    Both are medians over turns, the second of differences within a turn.
    """
    make = partial(StreamingDataset, batch_size=BATCH_SIZE, order_check="off")
    with make(parquet_source(table)) as unchecked, make(parquet_source(table)) as checked:
        steps = [_step(ds, model) for ds in (unchecked, checked)]
        unchecked._reader.hold_to(None)
        seconds = np.empty((WARM_UP + turns, 2))
        for turn in range(len(seconds)):
            for i in (turn % 2, 1 - turn % 2):  # each begins in every second turn
                seconds[turn, i] = _seconds(steps[i], STEPS)
    free, held = seconds[WARM_UP:].T
    return np.median(free), np.median(held - free)


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


MODELS: dict[str, Callable[[Any, int | None], None]] = {
    "logistic regression, four columns and a label": partial(logistic, label=4),
    "logistic regression, one event in a hundred rows": partial(logistic, label=5),
    "hierarchical Poisson regression, 100 groups": groups,
}


def _columns(rng: np.random.Generator, numbers: np.ndarray) -> dict[str, np.ndarray]:
    """Return three normal columns, a group, a label and a rare label."""
    n = len(numbers)
    labels = rng.random((2, n)) < [[0.5], [0.01]]
    columns = [*rng.normal(size=(3, n)), rng.integers(0, 100, n), *labels]
    return {name: column.astype("float32") for name, column in zip("abcdef", columns)}


TABLES: dict[str, Callable[[Data, int], str]] = {
    table.__name__: table for table in (speed, shapes, ladder, start, shuffling, checks)
}

if __name__ == "__main__":
    measure(COMMAND, TABLES, rows=20e6, turns=9)
