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
"""How fast streams, fits and ``preshuffle`` are, and what memory they take.

    python -m benchmarks.speed --page docs/source/speed.md
    python -m benchmarks.speed --only speed ladder

Each fit has a process of its own, is compiled first and runs long enough to fill its windows; then
the fits of a table take turns of some thousand steps.  The fit on one batch is the limit: it reads
nothing.  Processor time is that of all threads.  With ``--folder`` the data are kept, and found the
next time.  Libraries that are not installed are left out; the shuffling needs ``duckdb``.
"""

import os
import time
import warnings

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

import pymc as pm

from benchmarks import cases, costs
from benchmarks.cases import Case, Data
from benchmarks.harness import Lane, Runner, in_process, markdown, measure, race, ratio
from benchmarks.orderbook.experiment import PRIOR_SD, parquet_files

__all__ = ["COMMAND", "TABLES"]

COMMAND = "python -m benchmarks.speed"
LIMIT, STREAM = "one batch, again and again", "stream, preshuffled"
MEMORY, PEER = "`pm.Minibatch`, in memory", "pymc-extras DataLoader, as it comes"
HEADS = (
    "steps/s | ms per step | CPU ms per step | disk MB/s | speed / limit | speed / `pm.Minibatch`"
)


def speed(data: Data, turns: int) -> str:
    """Measure the order-book model on PyMC's default settings."""
    ordered = Case(data.order_book())
    shuffled = Case(data.shuffled(ordered.rows))
    by_place = partial(cases.on_changed_pytensor, nogil=False)
    without_lock = partial(cases.on_changed_pytensor, nogil=True)
    lanes = {
        LIMIT: Lane(cases.on_one_batch, shuffled),
        "four batches in turn, in the cache": Lane(cases.on_ready_batches, shuffled, 4),
        "batches that are in memory already": Lane(cases.on_ready_batches, shuffled),
        "stream of an array in memory": Lane(cases.on_stream_of_array, shuffled),
        STREAM: Lane(cases.on_stream, shuffled),
        "stream, as it comes (zstd, dictionaries)": Lane(cases.on_stream, ordered),
        MEMORY: Lane(cases.in_memory_columns, shuffled),
        f"{MEMORY}, features in one matrix": Lane(cases.in_memory, shuffled),
        PEER: Lane(cases.on_dataloader, ordered),
        f"{LIMIT}, PyTensor's arguments by place": Lane(by_place, cases.on_one_batch, shuffled),
        f"{STREAM}, PyTensor's arguments by place": Lane(by_place, cases.on_stream, shuffled),
        f"{STREAM}, and its step without the lock": Lane(without_lock, cases.on_stream, shuffled),
    }
    race(lanes.values(), turns=turns)
    return markdown(f"rows | {HEADS}", speeds(lanes))


def shapes(data: Data, turns: int) -> str:
    """Measure other models and tables, each beside its own limit."""
    book, groups = data.shuffled(data.order_book()), data.shuffled(data.groups())
    columns = Case(data.shuffled(data.wide()), cases.wide, buffer_size=cases.SMALL_BUFFER)
    many = partial(cases.wide, width=256)
    models = {
        "64 columns": columns,
        '64 columns, format="arrow"': replace(columns, rows=data.shuffled(data.wide(), "arrow")),
        '256 columns, format="arrow"': replace(
            columns, rows=data.shuffled(data.wide(256), "arrow"), model=many
        ),
        "batches of 256": Case(book, batch_size=256),
        f"hierarchical, {cases.N_GROUPS} groups": Case(groups, cases.hierarchical),
        "order book, cold page cache": Case(book),
    }
    lines = []
    for name, case in models.items():
        before = partial(forget_pages, parquet_files(case.rows)) if "cold" in name else None
        ways = {LIMIT: cases.on_one_batch, STREAM: cases.on_stream, MEMORY: cases.in_memory}
        lanes = {way: Lane(make, case) for way, make in ways.items()}
        race(lanes.values(), turns=turns, before=before)
        lines += [[name, *line] for line in speeds(lanes)]
    return markdown(f"model | rows | {HEADS}", lines)


def speeds(lanes: Mapping[str, Lane]) -> Iterator[list[str]]:
    """Yield the cells of each lane, with its speed over that of two of them."""
    for name, lane in lanes.items():
        disk = lane.median("disk_mb") / lane.median("seconds")
        yield [name, *rates(lane), f"{disk:.0f}", *(ratio(lane, lanes[x]) for x in (LIMIT, MEMORY))]


def rates(lane: Lane) -> list[str]:
    seconds, processor_seconds = lane.median("seconds"), lane.median("processor_seconds")
    return [f"{1 / seconds:,.0f}", f"{1e3 * seconds:.3f}", f"{1e3 * processor_seconds:.3f}"]


def memory(data: Data, turns: int) -> str:
    """Measure the peak memory of fits at two sizes, each against a fit that reads nothing."""
    lines = []
    for n_rows in (data.n_rows // 20, data.n_rows):
        case = Case(data.shuffled(data.order_book(n_rows)))
        ways = {LIMIT: cases.on_one_batch, STREAM: cases.on_stream, MEMORY: cases.in_memory_columns}
        # Whoever comes first compiles for the others, which takes memory.
        for _ in range(2):
            lanes = {way: Lane(make, case) for way, make in ways.items()}
            race(lanes.values(), turns=turns)
        limit = lanes[LIMIT].peak_mb
        for way, lane in lanes.items():
            lines.append([f"{n_rows:,}", way, f"{lane.peak_mb:.0f}", f"{lane.peak_mb - limit:.0f}"])
    return markdown("rows | fit | peak MB | above one batch", lines)


def start(data: Data, turns: int) -> str:
    """Measure how long it takes to open a large table, and until the first batch is there."""
    lines, n_rows = [], 5 * data.n_rows
    book = data.order_book(n_rows)
    for name, rows in {"preshuffled": data.shuffled(book), "in order of time": book}.items():
        for cache, before in {"warm": len, "cold": forget_pages}.items():
            seconds = []
            for _ in range(turns):
                before(parquet_files(rows))
                seconds.append(in_process(first_batch, rows))
            opened, first = np.median(seconds, axis=0)
            n_files = len(parquet_files(rows))
            lines.append([name, cache, n_files, f"{opened:.2f}", f"{first:.2f}"])
    heads = f"{n_rows / 1e6:g} million rows | page cache | files | open, s | first batch, s"
    return markdown(heads, lines)


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


def forget_pages(files: list[Path]) -> None:
    """Drop files from the page cache."""
    for file in files:
        handle = os.open(file, os.O_RDONLY)
        os.fsync(handle)  # pages that are not on the disk yet would stay
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


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
    ordered = data.order_book()
    case, lanes = Case(data.shuffled(ordered)), {}
    for setting, (backend, dtype) in SETTINGS.items():
        ways: dict[str, Callable[[Case], Runner]] = {
            LIMIT: cases.on_one_batch,
            STREAM: cases.on_stream,
        }
        if setting == DEFAULT:
            ways |= {"in memory": cases.in_memory_columns, PEER: cases.on_dataloader}
        if backend == "numpyro":
            ways = {way: partial(on_numpyro, way) for way in (LIMIT, STREAM, "in memory")}
        if backend in ("numba", "c") or find_spec(backend):
            for way, make in ways.items():
                rows = replace(case, backend=backend, rows=ordered if way == PEER else case.rows)
                lanes[setting, way] = Lane(make, rows, flags=f"floatX={dtype}")
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


TABLES: dict[str, Callable[[Data, int], str]] = {
    table.__name__: table
    for table in (
        speed,
        shapes,
        ladder,
        memory,
        costs.libraries,
        start,
        costs.shuffling,
        costs.order,
        costs.checks,
    )
}

if __name__ == "__main__":
    measure(COMMAND, TABLES, rows=20e6, turns=9)
