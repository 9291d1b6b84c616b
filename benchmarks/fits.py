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

from benchmarks.data import N_FEATURES, N_GROUPS
from benchmarks.orderbook.experiment import BATCH_SIZE, PRIOR_SD, build_model, logistic
from benchmarks.turns import Runner
from pymc.variational._streaming.batches.window import ShuffleBuffer
from pymc.variational.streaming import (
    StreamingDataset,
    arrow_source,
    parquet_source,
    shuffle_buffer,
)

__all__ = [
    "BUFFER_SIZE",
    "LIMIT",
    "MEMORY",
    "PEER",
    "STREAM",
    "Case",
    "fetch_dataloader",
    "hierarchical",
    "in_memory",
    "in_memory_columns",
    "load_dataloader",
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

BUFFER_SIZE = 1_000_000
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
    buffer_size: int = BUFFER_SIZE

    @property
    def window_steps(self) -> int:
        return -(-self.buffer_size // self.batch_size)

    @property
    def turn_steps(self) -> int:
        """Whole windows, since work that comes once in a window must not miss a turn."""
        return -(-FEWEST_STEPS // self.window_steps) * self.window_steps


def order_book(x: Any, up: Any, n_rows: int | None) -> None:
    logistic([*(x[:, j] for j in range(3)), up], n_rows)


def wide(x: Any, up: Any, n_rows: int | None) -> None:
    b = pm.Normal("b", 0.0, PRIOR_SD, shape=N_FEATURES)
    pm.Bernoulli("up", logit_p=x @ b, observed=up, total_size=n_rows)


def hierarchical(x: Any, y: Any, n_rows: int | None) -> None:
    """Let each group, whose number is the first column, have its own level."""
    spread = pm.HalfNormal("spread", 1.0)
    level = pm.Normal("level", pm.Normal("mean", 0.0, PRIOR_SD), spread, shape=N_GROUPS)
    mu = level[x[:, 0].astype("int32")] + pm.Normal("slope", 0.0, PRIOR_SD) * x[:, 1]
    pm.Normal("y", mu, pm.HalfNormal("noise", 1.0), observed=y, total_size=n_rows)


def open_rows(folder: Path) -> Any:
    """Return a source of the files in a folder."""
    return arrow_source(folder) if any(folder.glob("*.arrow")) else parquet_source(folder)


def on_one_batch(case: Case, backend: str | None = None) -> Runner:
    """Fit to a batch that never changes, the limit: nothing is read."""
    with pm.Model():
        batch = next(iter(open_rows(case.rows)))[: case.batch_size]
        buffer = _shared(batch)
        case.model(buffer[:, :-1], buffer[:, -1], open_rows(case.rows).n_rows)
        return _fitted(case, [], backend)


def on_ready_batches(case: Case, most: int | None = None) -> Runner:
    """Fit to at most so many batches that are in memory, in turn: nothing is read."""
    with pm.Model():
        rows = next(iter(open_rows(case.rows))).astype(pytensor.config.floatX)
        n_batches = len(rows) // case.batch_size
        batches = cycle(np.split(rows[: n_batches * case.batch_size], n_batches)[:most])
        buffer = _shared(next(batches))

        def put_next(approx: Any, losses: Any, i: int) -> None:
            buffer.set_value(next(batches), borrow=True)

        case.model(buffer[:, :-1], buffer[:, -1], open_rows(case.rows).n_rows)
        return _fitted(case, [put_next], None)


def on_stream(case: Case, backend: str | None = None) -> Runner:
    return _on_dataset(case, stream(case), backend)


def on_stream_of_array(case: Case) -> Runner:
    """Fit to a stream of rows that are in memory: nothing is read, shuffled or checked."""
    rows = next(filter(len, _buffer(case).blocks()))  # while the window fills, blocks are empty
    return _on_dataset(
        case, StreamingDataset(rows, batch_size=case.batch_size, order_check="off"), None
    )


def _on_dataset(case: Case, ds: StreamingDataset, backend: str | None) -> Runner:
    with pm.Model():
        buffer: Any = ds.as_tensor()
        case.model(buffer[:, :-1], buffer[:, -1], ds.total_size)
        return _fitted(case, [ds.fit_callback()], backend)


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


def in_memory(case: Case, backend: str | None = None) -> Runner:
    """Fit with ``pm.Minibatch`` to one matrix and the last column."""
    with pm.Model():
        rows = np.concatenate(list(open_rows(case.rows)))
        # Compiling takes long with large constants.
        x = pytensor.shared(rows[:, :-1].copy(), borrow=True)
        y = pytensor.shared(rows[:, -1].astype(pytensor.config.floatX), borrow=True)
        x_batch, y_batch = pm.Minibatch(x, y, batch_size=case.batch_size)
        case.model(x_batch, y_batch, len(rows))
        return _fitted(case, [], backend)


def in_memory_columns(case: Case, backend: str | None = None) -> Runner:
    """Fit with ``pm.Minibatch`` to one array for each column of the order book."""
    with pm.Model():
        build_model(case.rows, None, seed=0)
        return _fitted(case, [], backend)


def fetch_dataloader(folder: Path) -> Path:
    """Download the wheel without its dependencies, unless *folder* holds it."""
    if not [*folder.glob("pymc_extras-*.whl")]:
        command = "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"
        subprocess.run([sys.executable, *command, "--dest", folder, PEER_WHEEL], check=True)
    return next(folder.glob("pymc_extras-*.whl"))


def load_dataloader(wheel: Path) -> Any:
    """Import the one module, from the wheel; the package would import its dependencies."""
    spec = zipimport.zipimporter(f"{wheel}/pymc_extras/variational").find_spec("dataloader")
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def on_dataloader(case: Case) -> Runner:
    """Fit with the DataLoader of pymc-extras, a window a turn, since it is filled all at once.

    Its window is as many row groups as make up the buffer, so give it a table of which a whole
    number of row groups does. The wheel lies beside the table.
    """
    peer = load_dataloader(fetch_dataloader(case.rows.parent))
    loader = peer.DataLoader(
        peer.parquet_source(str(case.rows)),
        batch_size=case.batch_size,
        shuffle=True,
        buffer_size=case.buffer_size,
        seed=0,
    )
    batches = (batch for _ in count() for batch in loader)
    with pm.Model():
        buffer = _shared(next(batches))

        def put_next(approx: Any, losses: Any, i: int) -> None:
            buffer.set_value(next(batches).astype(buffer.dtype), borrow=True)

        case.model(buffer[:, :-1], buffer[:, -1], loader.total_size)
        return Runner(_fitted(case, [put_next], None).run, case.window_steps)


def stream(case: Case) -> StreamingDataset:
    return StreamingDataset(_buffer(case), batch_size=case.batch_size)


def _buffer(case: Case) -> ShuffleBuffer:
    return shuffle_buffer(
        open_rows(case.rows),
        buffer_size=case.buffer_size,
        batch_size=case.batch_size,
        seed=0,
    )


def _fitted(case: Case, callbacks: list, backend: str | None) -> Runner:
    """Compile a fit, and let it go on for more than a window."""
    logging.getLogger("pymc").setLevel(logging.WARNING)  # it would tell of every turn
    inference = pm.ADVI(random_seed=0)
    inference.fit(
        2 * case.window_steps,
        callbacks=callbacks,
        progressbar=False,
        backend=backend,
        obj_optimizer=pm.adam(learning_rate=LEARNING_RATE),
    )
    return Runner(partial(inference.refine, progressbar=False), case.turn_steps)


def _shared(batch: np.ndarray) -> Any:
    return pytensor.shared(batch.astype(pytensor.config.floatX), name="batch")
