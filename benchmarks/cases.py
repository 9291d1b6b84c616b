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
"""Tables that benchmarks read, and fits of models to them on rows that come in different ways.

A table is written when it is first asked for.  A fit is compiled and has filled its windows when
it is returned.
"""

import logging
import subprocess
import sys

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from itertools import count, cycle
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytensor

import pymc as pm

from benchmarks.harness import Runner, published
from benchmarks.orderbook.experiment import BATCH_SIZE, PRIOR_SD, build_model, logistic
from pymc.variational.streaming import (
    StreamingDataset,
    arrow_source,
    parquet_source,
    preshuffle,
    shuffle_buffer,
)
from tests.variational.streaming.memory import forget_peak, peak_mb

WIDE = 64
ROWS_PER_FILE = 500_000
PEER_WHEEL = "pymc-extras==0.15.1"
LEARNING_RATE = 1e-3
FEWEST_STEPS = 2_000
SMALL_BUFFER = 100_000


class Data:
    """Tables in one folder, of *n_rows* unless another number is asked for."""

    def __init__(self, folder: Path, n_rows: int):
        self.folder = folder
        self.n_rows = n_rows

    def order_book(self, n_rows: int | None = None) -> Path:
        """Four columns in order of time."""
        n_rows = n_rows or self.n_rows
        return self._table(f"book-{n_rows}", partial(_write_book, n_rows))

    def wide(self, width: int = WIDE) -> Path:
        """Columns of float32, the last one 0 or 1; as many numbers as 64 of a tenth of the rows."""
        n_rows = self.n_rows // 10 * WIDE // width
        return self.of(f"wide-{width}-{n_rows}", n_rows, partial(_wide_columns, width=width))

    def of(self, name: str, n_rows: int, columns: Callable[..., dict]) -> Path:
        """Columns that a function makes of a random generator and the numbers of a file's rows."""
        return self._table(name, partial(_write_columns, n_rows, columns))

    def shuffled(self, table: Path, format: Literal["parquet", "arrow"] = "parquet") -> Path:
        """Give what ``preshuffle`` makes of a table."""
        # A page of each of 256 columns alone takes more than the default limit.
        options: dict[str, Any] = {"format": format, "memory_limit": "1GB", "progressbar": False}
        suffix = "" if format == "parquet" else f"-{format}"
        return self._table(
            f"{table.name}-shuffled{suffix}", partial(preshuffle, table, seed=0, **options)
        )

    def _table(self, name: str, write: Callable[[Path], object]) -> Path:
        if not (self.folder / name).exists():
            write(self.folder / name)
        return self.folder / name


def _write_book(n_rows: int, folder: Path) -> None:
    # The simulator takes seconds to import, and every benchmark is a process of its own.
    from benchmarks.orderbook.generate import write_rows

    write_rows(folder, rows=n_rows, seed=0)


def _write_columns(n_rows: int, columns: Callable[..., dict], folder: Path) -> None:
    rng = np.random.default_rng(0)
    with published(folder, overwrite=False) as (content, _):
        for first in range(0, n_rows, ROWS_PER_FILE):
            table = pa.table(columns(rng, np.arange(first, min(first + ROWS_PER_FILE, n_rows))))
            pq.write_table(table, content / f"part-{first:010}.parquet")


def _wide_columns(
    rng: np.random.Generator, numbers: np.ndarray, width: int
) -> dict[str, np.ndarray]:
    n = len(numbers)
    # The logit of a fit's first step has the same size for any width; else its density overflows.
    x = rng.normal(scale=(WIDE / width) ** 0.5, size=(width - 1, n)).astype("float32")
    up = rng.random(n) < 1 / (1 + np.exp(-x[:5].sum(axis=0)))
    return {**{f"x{j}": column for j, column in enumerate(x)}, "up": up.astype("float32")}


def order_book(x: Any, up: Any, n_rows: int | None) -> None:
    logistic([*(x[:, j] for j in range(3)), up], n_rows)


@dataclass(frozen=True, slots=True)
class Case:
    """A model, the rows it is fitted to, and how they are cut."""

    rows: Path
    """Directory of Parquet files, or of row-major Arrow files."""
    model: Callable[[Any, Any, int | None], object] = order_book
    """Build the model in context, given a batch's first columns, its last one, and the number of
    rows."""
    batch_size: int = BATCH_SIZE
    buffer_size: int = 1_000_000
    backend: str | None = None
    """Backend of ``pm.fit``."""

    @property
    def source(self) -> Any:
        return (arrow_source if any(self.rows.glob("*.arrow")) else parquet_source)(self.rows)

    @property
    def window_steps(self) -> int:
        return -(-self.buffer_size // self.batch_size)

    @property
    def turn_steps(self) -> int:
        """Whole windows, since work that comes once in a window must not miss a turn."""
        return -(-FEWEST_STEPS // self.window_steps) * self.window_steps

    def in_memory(self) -> np.ndarray:
        return np.concatenate(list(self.source))

    def observe(self, batch: Any, n_rows: int | None) -> None:
        self.model(batch[:, :-1], batch[:, -1], n_rows)


def wide(x: Any, up: Any, n_rows: int | None, width: int = WIDE) -> None:
    b = pm.Normal("b", 0.0, PRIOR_SD, shape=width - 1)
    pm.Bernoulli("up", logit_p=x @ b, observed=up, total_size=n_rows)


def on_one_batch(case: Case) -> Runner:
    """Fit to a batch that never changes, the limit: nothing is read."""
    with pm.Model():
        case.observe(_shared(next(iter(case.source))[: case.batch_size]), case.source.n_rows)
        return _fitted(case)


def on_ready_batches(case: Case) -> Runner:
    """Fit to batches that are in memory, in turn: nothing is read."""
    rows = next(iter(case.source)).astype(pytensor.config.floatX)
    n_batches = len(rows) // case.batch_size
    batches = cycle(np.split(rows[: n_batches * case.batch_size], n_batches))
    return _on_batches(case, lambda: next(batches), case.source.n_rows)


def _on_batches(case: Case, next_batch: Callable[[], np.ndarray], n_rows: int | None) -> Runner:
    """Fit to what a function returns for each step."""
    buffer = _shared(next_batch())

    def put_next(approx: Any, losses: Any, i: int) -> None:
        buffer.set_value(next_batch().astype(buffer.dtype, copy=False), borrow=True)

    with pm.Model():
        case.observe(buffer, n_rows)
        return _fitted(case, put_next)


def on_stream(case: Case, *, buffered: bool = True) -> Runner:
    ds = stream(case, buffered=buffered)
    with pm.Model():
        case.observe(ds.as_tensor(), ds.total_size)
        return _fitted(case, ds.fit_callback())


def on_changed_pytensor(make: Callable[[Case], Runner], case: Case, *, nogil: bool) -> Runner:
    """Fit with the changes to PyTensor of ``upstream/pytensor``."""
    from pytensor.link.numba.dispatch.basic import numba_njit
    from pytensor.link.numba.linker import NumbaLinker

    def jit_compile(self, function_and_key):
        names = ", ".join(f"argument_{i}" for i in range(len(self.fgraph.inputs)))
        made = {"function": function_and_key[0]}
        exec(f"def step({names}): return function({names})", made)
        return numba_njit(made["step"], final_function=True, cache=False, nogil=nogil)

    with patch.object(NumbaLinker, "jit_compile", jit_compile):
        return make(case)


def in_memory(case: Case) -> Runner:
    """Fit with ``pm.Minibatch`` to one matrix and the last column."""
    with pm.Model():
        rows = case.in_memory()
        # Compiling takes long with large constants.
        x = pytensor.shared(rows[:, :-1].copy(), borrow=True)
        y = pytensor.shared(rows[:, -1].astype(pytensor.config.floatX), borrow=True)
        x_batch, y_batch = pm.Minibatch(x, y, batch_size=case.batch_size)
        case.model(x_batch, y_batch, len(rows))
        return _fitted(case)


def in_memory_columns(case: Case) -> Runner:
    """Fit with ``pm.Minibatch`` to one array for each column of the order book."""
    with pm.Model():
        build_model(case.rows, None, seed=0)
        return _fitted(case)


def on_dataloader(case: Case) -> Runner:
    """Fit with the DataLoader of pymc-extras, a window a turn, since it is filled all at once.

    Its window is as many row groups as make up the buffer, so give it a table of which a whole
    number of row groups does.  The wheel is downloaded beside the table, unless it is there.
    """
    folder = case.rows.parent
    if not any(folder.glob("pymc_extras-*.whl")):
        command = "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"
        subprocess.run([sys.executable, *command, "--dest", folder, PEER_WHEEL], check=True)
    # The package would import its dependencies, which are not there.
    sys.path.insert(0, f"{next(folder.glob('pymc_extras-*.whl'))}/pymc_extras/variational")
    peer = import_module("dataloader")
    loader = peer.DataLoader(
        peer.parquet_source(str(case.rows)),
        batch_size=case.batch_size,
        shuffle=True,
        buffer_size=case.buffer_size,
        seed=0,
    )
    batches = (batch for _ in count() for batch in loader)
    run, _ = _on_batches(case, lambda: next(batches), loader.total_size)
    return run, case.window_steps


def stream(case: Case, *, buffered: bool = True) -> StreamingDataset:
    rows = case.source
    if buffered:
        rows = shuffle_buffer(rows, buffer_size=case.buffer_size, seed=0)
    return StreamingDataset(rows, batch_size=case.batch_size)


def peak_growth(make: Callable[[Case], Runner], case: Case, n_steps: int) -> float:
    """Return by how many MB the peak memory of this process grows in so many steps."""
    forget_peak()
    before = peak_mb()
    run, _ = make(case)
    run(n_steps)
    return peak_mb() - before


def _fitted(case: Case, *callbacks: Callable) -> Runner:
    """Compile a fit, and let it go on for more than a window."""
    logging.getLogger("pymc").setLevel(logging.WARNING)  # it would tell of every turn
    inference = pm.ADVI(random_seed=0)
    inference.fit(
        2 * case.window_steps,
        callbacks=[*callbacks],
        progressbar=False,
        backend=case.backend,
        obj_optimizer=pm.adam(learning_rate=LEARNING_RATE),
    )
    return partial(inference.refine, progressbar=False), case.turn_steps


def _shared(batch: np.ndarray) -> Any:
    return pytensor.shared(batch.astype(pytensor.config.floatX), name="batch")
