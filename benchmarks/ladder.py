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
"""How fast the order-book model is fitted under PyMC's settings, and by NumPyro.

    python -m benchmarks.ladder --page docs/source/speed.md

Each fit has a process of its own, since settings hold for a process; all of them take turns, so
that any two lines of the table can be compared.  PyMC computes the loss in every step, as a stream
asks for.  NumPyro fits with SVI, AutoNormal and Adam, in float32, one jitted update for each batch
that comes from the host.  Needs ``jax`` and ``numpyro`` for their lines.
"""

from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import numpy as np

from benchmarks.data import Data
from benchmarks.fits import (
    LEARNING_RATE,
    LIMIT,
    PEER,
    STREAM,
    Case,
    in_memory_columns,
    on_dataloader,
    on_one_batch,
    on_stream,
    order_book,
    stream,
)
from benchmarks.orderbook.experiment import PRIOR_SD
from benchmarks.pages import markdown, measure
from benchmarks.turns import Lane, Runner, race, ratio

__all__ = ["ladder"]

COMMAND = "python -m benchmarks.ladder"
MEMORY = "in memory"
DEFAULT = "numba, float64 (default)"
SETTINGS = {
    DEFAULT: ("numba", "float64"),
    "numba, float32": ("numba", "float32"),
    "C, float32": ("c", "float32"),
    "JAX, float32": ("jax", "float32"),
    "NumPyro, float32": ("numpyro", "float32"),
}


def ladder(data: Data, turns: int) -> str:
    """Let all fits take turns, and return the table."""
    ordered = data.order_book()
    case, lanes = Case(data.shuffled(ordered), order_book), {}
    for setting, (backend, dtype) in SETTINGS.items():
        for way, make in _ways(setting).items():
            rows = replace(case, backend=backend, rows=ordered if way == PEER else case.rows)
            lanes[setting, way] = Lane(make, rows, flags=f"floatX={dtype}")
    race(lanes.values(), turns=turns)
    lines = []
    for (setting, way), lane in lanes.items():
        seconds, processor_seconds = lane.median("seconds"), lane.median("processor_seconds")
        ratios = (ratio(lane, lanes[each, LIMIT]) for each in (setting, DEFAULT))
        times = f"{1 / seconds:,.0f}", f"{1e3 * seconds:.3f}", f"{1e3 * processor_seconds:.3f}"
        lines.append([setting, way, *times, *ratios])
    heads = "setting | rows | steps/s | ms per step | CPU ms per step"
    return markdown(f"{heads} | speed / own limit | speed / default's limit", lines)


def _ways(setting: str) -> dict[str, Callable[[Case], Runner]]:
    """Return the fits of a setting, or none if its library is not installed."""
    backend, _ = SETTINGS[setting]
    if backend in ("jax", "numpyro") and find_spec(backend) is None:
        return {}
    if backend == "numpyro":
        return {LIMIT: numpyro_on_one_batch, STREAM: numpyro_on_stream, MEMORY: numpyro_in_memory}
    ways: dict[str, Callable[[Case], Runner]] = {LIMIT: on_one_batch, STREAM: on_stream}
    return ways | ({MEMORY: in_memory_columns, PEER: on_dataloader} if setting == DEFAULT else {})


def numpyro_on_one_batch(case: Case) -> Runner:
    batch = next(iter(case.source))[: case.batch_size].astype("float32")
    return _numpyro(case, lambda: batch)


def numpyro_on_stream(case: Case) -> Runner:
    """Take the batches from a stream, without a model of PyMC's."""
    ds = stream(case)

    def next_batch() -> np.ndarray:
        ds.advance()
        return ds.as_tensor().get_value(borrow=True)

    return _numpyro(case, next_batch)


def numpyro_in_memory(case: Case) -> Runner:
    """Draw rows at random from an array, as ``pm.Minibatch`` does."""
    rows = np.concatenate(list(case.source)).astype("float32")
    rng = np.random.default_rng(0)
    return _numpyro(case, lambda: rows.take(rng.integers(len(rows), size=case.batch_size), axis=0))


def _numpyro(case: Case, next_batch: Callable[[], np.ndarray]) -> Runner:
    """Compile a fit with SVI, and let it go on for more than a window."""
    import jax
    import numpyro

    from numpyro.distributions import Bernoulli, Normal
    from numpyro.infer import SVI, Trace_ELBO
    from numpyro.infer.autoguide import AutoNormal

    scale = case.source.n_rows / case.batch_size

    def model(batch: Any) -> None:
        b = numpyro.sample("b", Normal(0.0, PRIOR_SD).expand([4]).to_event(1))
        logits = b[0] + sum(b[j + 1] * batch[:, j] for j in range(3))
        with numpyro.plate("rows", case.batch_size), numpyro.handlers.scale(scale=scale):
            numpyro.sample("up", Bernoulli(logits=logits), obs=batch[:, 3])

    svi = SVI(model, AutoNormal(model), numpyro.optim.Adam(LEARNING_RATE), Trace_ELBO())
    update = jax.jit(svi.update)
    state = svi.init(jax.random.key(0), next_batch())

    def run(n_steps: int) -> None:
        nonlocal state
        for _ in range(n_steps):
            state, _loss = update(state, next_batch())
        jax.block_until_ready(state)

    run(2 * case.window_steps)
    return Runner(run, case.turn_steps)


if __name__ == "__main__":
    measure(COMMAND, {"ladder": ladder}, rows=20e6, turns=9)
