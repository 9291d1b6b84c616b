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
"""Batches that the loss of a fit tells apart, and small fits of them."""

import gc

import numpy as np
import pytest

import pymc as pm

from pymc.variational.streaming import StreamingDataset
from tests.variational.streaming.held import prefetch_threads

__all__ = [
    *("QUICK", "STANDING_STILL", "batches_used", "has_no_rows", "no_thread_is_left"),
    *("normal_model", "tell_tale"),
]

QUICK = {"compile_kwargs": {"mode": "FAST_COMPILE"}, "progressbar": False}
STANDING_STILL = {"obj_optimizer": pm.sgd(learning_rate=1e-30), **QUICK}


def tell_tale(n_batches: int, batch_size: int = 4) -> np.ndarray:
    """Return batches whose rows are all 1000 (k + 1), so that the loss tells the batch."""
    return np.repeat(1000.0 * np.arange(1, n_batches + 1), batch_size)[:, None]


def batches_used(losses: np.ndarray, batch_size: int = 4) -> list[int]:
    """Recover from the losses of `normal_model` which tell-tale batch each step used.

    PyMC divides the loss by the largest total_size / batch_size.
    """
    return (np.round(np.sqrt(2 * losses / batch_size) / 1000) - 1).astype(int).tolist()


def normal_model(ds: StreamingDataset, **kwargs) -> pm.Model:
    with pm.Model() as model:
        mu = pm.Normal("mu")
        kwargs = {"total_size": ds.total_size, **kwargs}
        pm.Normal("y", mu, 1, observed=ds.as_tensor()[:, 0], **kwargs)
    return model


def has_no_rows(ds: StreamingDataset) -> bool:
    return ds.as_tensor().get_value().shape == (0, *ds.sample_shape)


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    if prefetch_threads():  # of a stream that a cycle of references keeps, as a traceback does
        gc.collect()
    for thread in prefetch_threads():
        thread.join(30)  # closing does not wait while it compiles the loops of the order check
    assert not prefetch_threads()
