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
"""Fit the order-book model with NumPyro's SVI, one jitted update for each batch from the host.

>>> on_one_batch(Case(Path("shuffled"), order_book)).run(2_000)
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import numpyro

from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoNormal

from benchmarks.fits import LEARNING_RATE, Case, stream
from benchmarks.orderbook.experiment import PRIOR_SD
from benchmarks.turns import Runner
from pymc.variational.streaming import parquet_source

__all__ = ["in_memory", "on_one_batch", "on_stream"]


def on_one_batch(case: Case) -> Runner:
    batch = next(iter(parquet_source(case.rows)))[: case.batch_size].astype("float32")
    return _fitted(case, lambda: batch)


def on_stream(case: Case) -> Runner:
    """Take the batches from a stream, without a model of PyMC's."""
    ds = stream(case)

    def next_batch() -> np.ndarray:
        ds.advance()
        return ds.as_tensor().get_value(borrow=True)

    return _fitted(case, next_batch)


def in_memory(case: Case) -> Runner:
    """Draw rows at random from an array, as ``pm.Minibatch`` does."""
    rows = np.concatenate(list(parquet_source(case.rows))).astype("float32")
    rng = np.random.default_rng(0)
    return _fitted(case, lambda: rows.take(rng.integers(len(rows), size=case.batch_size), axis=0))


def _fitted(case: Case, next_batch: Callable[[], np.ndarray]) -> Runner:
    """Compile a fit, and let it go on for more than a window."""
    scale = (parquet_source(case.rows).n_rows or 0) / case.batch_size

    def model(batch: Any) -> None:
        prior = numpyro.distributions.Normal(0.0, PRIOR_SD).expand([4]).to_event(1)
        b = numpyro.sample("b", prior)
        logits = b[0] + sum(b[j + 1] * batch[:, j] for j in range(3))
        with numpyro.plate("rows", case.batch_size), numpyro.handlers.scale(scale=scale):
            numpyro.sample("up", numpyro.distributions.Bernoulli(logits=logits), obs=batch[:, 3])

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
