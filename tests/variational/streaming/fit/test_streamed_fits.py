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
"""Streamed fits against exact posteriors."""

import contextlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import pymc as pm

from pymc.variational.streaming import (
    EpochAverage,
    OrderWarning,
    StreamingDataset,
    check_fit,
    parquet_source,
    shuffle_buffer,
)

MODE = "NUMBA"
N_ROWS = 200_000
BATCH_SIZE = 1_000
COLUMNS = ["mid", "spread", "imbalance", "up"]


@pytest.fixture(scope="module")
def book() -> np.ndarray:
    """Return rows in order of time, whose label drifts more than its features explain."""
    rng = np.random.default_rng(20)
    time = np.linspace(-1, 1, N_ROWS)
    x = rng.normal(size=(N_ROWS, 3)).astype("float32")
    x[:, 0] += time
    logit = 0.2 + 0.4 * x[:, 0] - 0.3 * x[:, 1] + x[:, 2] + 1.5 * np.sin(3 * time)
    return np.column_stack([x, rng.random(N_ROWS) < 1 / (1 + np.exp(-logit))]).astype("float32")


@pytest.fixture(scope="module")
def exact(book) -> tuple[np.ndarray, np.ndarray]:
    """Return means and standard deviations of the posterior, by Newton on all rows."""
    design = np.column_stack([np.ones(N_ROWS), book[:, :3]]).astype(float)
    b = np.zeros(4)
    for _ in range(20):
        p = 1 / (1 + np.exp(-design @ b))
        gradient = design.T @ (book[:, 3] - p) - b / 3**2
        hessian = design.T @ (design * (p * (1 - p))[:, None]) + np.eye(4) / 3**2
        b = b + np.linalg.solve(hessian, gradient)
    return b, np.sqrt(np.diag(np.linalg.inv(hessian)))


def write(rows: np.ndarray, folder) -> str:
    for number, part in enumerate(np.array_split(rows, 3)):
        columns = {name: part[:, j] for j, name in enumerate(COLUMNS)}
        columns["up"] = columns["up"].astype("int8")
        pq.write_table(pa.table(columns), folder / f"{number}.parquet")
    return str(folder)


@pytest.fixture(scope="module")
def ordered(book, tmp_path_factory) -> str:
    return write(book, tmp_path_factory.mktemp("ordered"))


@pytest.fixture(scope="module")
def shuffled(book, tmp_path_factory) -> str:
    rows = np.random.default_rng(21).permutation(book)
    return write(rows, tmp_path_factory.mktemp("shuffled"))


def fit_folder(folder: str, n_steps: int, warned=contextlib.nullcontext()):
    """Fit rows of a folder through a buffer of a twentieth of them."""
    ds = StreamingDataset(
        shuffle_buffer(parquet_source(folder), buffer_size=10_000, batch_size=BATCH_SIZE, seed=0),
        batch_size=BATCH_SIZE,
        sample_shape=(4,),
        total_size="auto",
    )
    with pm.Model():
        b = pm.Normal("b", 0.0, 3.0, shape=4)
        buf = ds.as_tensor()
        logit = b[0] + b[1] * buf[:, 0] + b[2] * buf[:, 1] + b[3] * buf[:, 2]
        pm.Bernoulli("up", logit_p=logit, observed=buf[:, 3], total_size=ds.total_size)
        average = EpochAverage(ds)
        with warned:
            callback = ds.fit_callback()
        approx = pm.fit(
            n_steps,
            callbacks=[average, callback],
            obj_optimizer=pm.adam(learning_rate=0.02),
            progressbar=False,
            random_seed=1,
        )
    return ds, approx, average


def off(approx: pm.MeanField, exact: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Return by how many posterior standard deviations each mean is too high."""
    mean, sd = exact
    return (approx.params[0].get_value() - mean) / sd


@pytest.mark.slow
class TestOrderBook:
    def test_shuffled_rows_give_the_exact_posterior(self, shuffled, exact):
        """The averaged means came within 0.5 posterior sd at this seed."""
        ds, approx, average = fit_folder(shuffled, 8_000)
        last = off(approx, exact)
        assert np.max(np.abs(last)) < 15
        report = check_fit(approx, ds, progressbar=False)
        assert report.verdict == "last-iterate noise"
        np.testing.assert_allclose(report.z, last, rtol=0.1, atol=1)
        average.apply(approx)
        assert np.max(np.abs(off(approx, exact))) < 1

    def test_ordered_rows_go_wrong_in_the_same_buffer(self, ordered, exact):
        """If this fails, the test above has lost its teeth."""
        ds, approx, _ = fit_folder(ordered, 3_000, pytest.warns(OrderWarning))
        assert np.max(np.abs(off(approx, exact))) > 50
        assert check_fit(approx, ds, progressbar=False).verdict == "ordered rows"
