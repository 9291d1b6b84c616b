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
"""Fits of one model to one table, on rows that come in different ways.

>>> case = Case(Path("shuffled"), order_book)
>>> on_stream(case).run(2_000)

Each is compiled and has filled its windows when it is returned.
"""

import logging
import subprocess
import sys
import zipimport

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import module_from_spec
from itertools import count, cycle
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytensor

import pymc as pm

from benchmarks.data import N_GROUPS, WIDE
from benchmarks.orderbook.experiment import BATCH_SIZE, PRIOR_SD, build_model, logistic
from benchmarks.turns import Runner
from pymc.variational.streaming import (
    StreamingDataset,
    arrow_source,
    parquet_source,
    shuffle_buffer,
)

__all__ = [
    "LEARNING_RATE",
    "LIMIT",
    "MEMORY",
    "PEER",
    "STREAM",
    "Case",
    "hierarchical",
    "in_memory",
    "in_memory_columns",
    "on_changed_pytensor",
    "on_dataloader",
    "on_one_batch",
    "on_ready_batches",
    "on_stream",
    "on_stream_of_array",
    "order_book",
    "stream",
    "wide",
]

LIMIT = "one batch, again and again"
STREAM = "stream, preshuffled"
MEMORY = "`pm.Minibatch`, in memory"
PEER = "pymc-extras DataLoader, as it comes"
PEER_WHEEL = "pymc-extras==0.15.1"

LEARNING_RATE = 1e-3
FEWEST_STEPS = 2_000


@dataclass(frozen=True, slots=True)
class Case:
    """A model, the rows it is fitted to, and how they are cut."""

    rows: Path
    """Directory of Parquet files, or of row-major Arrow files."""
    model: Callable[[Any, Any, int | None], object]
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

    def observe(self, batch: Any, n_rows: int | None) -> None:
        self.model(batch[:, :-1], batch[:, -1], n_rows)


def order_book(x: Any, up: Any, n_rows: int | None) -> None:
    logistic([*(x[:, j] for j in range(3)), up], n_rows)


def wide(x: Any, up: Any, n_rows: int | None, width: int = WIDE) -> None:
    b = pm.Normal("b", 0.0, PRIOR_SD, shape=width - 1)
    pm.Bernoulli("up", logit_p=x @ b, observed=up, total_size=n_rows)


def hierarchical(x: Any, y: Any, n_rows: int | None) -> None:
    """Let each group, whose number is the first column, have its own level."""
    spread = pm.HalfNormal("spread", 1.0)
    level = pm.Normal("level", pm.Normal("mean", 0.0, PRIOR_SD), spread, shape=N_GROUPS)
    mu = level[x[:, 0].astype("int32")] + pm.Normal("slope", 0.0, PRIOR_SD) * x[:, 1]
    pm.Normal("y", mu, pm.HalfNormal("noise", 1.0), observed=y, total_size=n_rows)


def on_one_batch(case: Case) -> Runner:
    """Fit to a batch that never changes, the limit: nothing is read."""
    with pm.Model():
        case.observe(_shared(_first_rows(case)[: case.batch_size]), case.source.n_rows)
        return _fitted(case)


def on_ready_batches(case: Case, most: int | None = None) -> Runner:
    """Fit to at most so many batches that are in memory, in turn: nothing is read."""
    rows = _first_rows(case).astype(pytensor.config.floatX)
    n_batches = len(rows) // case.batch_size
    batches = cycle(np.split(rows[: n_batches * case.batch_size], n_batches)[:most])
    return _on_batches(case, lambda: next(batches), case.source.n_rows)


def _on_batches(case: Case, next_batch: Callable[[], np.ndarray], n_rows: int | None) -> Runner:
    """Fit to what a function returns for each step."""
    buffer = _shared(next_batch())

    def put_next(approx: Any, losses: Any, i: int) -> None:
        buffer.set_value(next_batch().astype(buffer.dtype, copy=False), borrow=True)

    with pm.Model():
        case.observe(buffer, n_rows)
        return _fitted(case, put_next)


def on_stream(case: Case) -> Runner:
    return _on_dataset(case, stream(case))


def on_stream_of_array(case: Case) -> Runner:
    """Fit to a stream of rows that are in memory: nothing is read, shuffled or checked."""
    rows = next(filter(len, _buffer(case).blocks()))  # while the window fills, blocks are empty
    ds = StreamingDataset(rows, batch_size=case.batch_size, order_check="off")
    return _on_dataset(case, ds)


def _on_dataset(case: Case, ds: StreamingDataset) -> Runner:
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
        rows = np.concatenate(list(case.source))
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
    number of row groups does.
    """
    peer = _load_dataloader(case.rows.parent)
    loader = peer.DataLoader(
        peer.parquet_source(str(case.rows)),
        batch_size=case.batch_size,
        shuffle=True,
        buffer_size=case.buffer_size,
        seed=0,
    )
    batches = (batch for _ in count() for batch in loader)
    fit = _on_batches(case, lambda: next(batches), loader.total_size)
    return Runner(fit.run, case.window_steps)


def _load_dataloader(folder: Path) -> Any:
    """Import the one module from the wheel, since the package would import its dependencies.

    The wheel is downloaded without these, unless *folder* holds it.
    """
    if not [*folder.glob("pymc_extras-*.whl")]:
        command = "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"
        subprocess.run([sys.executable, *command, "--dest", folder, PEER_WHEEL], check=True)
    wheel = next(folder.glob("pymc_extras-*.whl"))
    spec = zipimport.zipimporter(f"{wheel}/pymc_extras/variational").find_spec("dataloader")
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def stream(case: Case, **options: Any) -> StreamingDataset:
    return StreamingDataset(_buffer(case), batch_size=case.batch_size, **options)


def _buffer(case: Case) -> Any:
    cut = {"buffer_size": case.buffer_size, "batch_size": case.batch_size}
    return shuffle_buffer(case.source, **cut, seed=0)


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
    return Runner(partial(inference.refine, progressbar=False), case.turn_steps)


def _first_rows(case: Case) -> np.ndarray:
    return next(iter(case.source))


def _shared(batch: np.ndarray) -> Any:
    return pytensor.shared(batch.astype(pytensor.config.floatX), name="batch")
