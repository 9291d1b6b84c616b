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
"""Checks of 150,000 rows, of which 32,768 are held in memory for the curvature."""

from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from multiprocessing import get_context

import numpy as np
import pytensor
import pytest

from scipy.special import expit

import pymc as pm

from pymc.variational import streaming
from pymc.variational.streaming import StreamingDataset, shuffle_buffer
from tests.variational.streaming.fit.exact import place

check_fit = partial(streaming.check_fit, progressbar=False)


@pytest.fixture(scope="module")
def rare():
    """Return rows of a level that 1 of 3,000 rows has, and the posterior."""
    rng = np.random.default_rng(3)
    x = rng.normal(size=150_000)
    level = rng.random(len(x)) < 1 / 3_000
    design = np.column_stack([np.ones(len(x)), x, level])
    up = rng.random(len(x)) < expit(design @ [0.2, -0.5, 0.8])
    b = np.zeros(3)
    for _ in range(8):
        p = expit(design @ b)
        precision = design.T @ (design * (p * (1 - p))[:, None]) + np.eye(3) / 9
        b = b + np.linalg.solve(precision, design.T @ (up - p) - b / 9)
    return np.column_stack([x, level, up]), b, precision


def fit(rows):
    ds = StreamingDataset(
        shuffle_buffer(rows, buffer_size=10_000, batch_size=500, seed=0),
        batch_size=500,
        order_check="off",
    )
    buf = ds.as_tensor()
    with pm.Model():
        b = pm.Normal("b", 0, 3, shape=3)
        logit = b[0] + b[1] * buf[:, 0] + b[2] * buf[:, 1]
        pm.Bernoulli("up", logit_p=logit, observed=buf[:, 2], total_size=ds.total_size)
        approx = pm.MeanField()
    return ds, approx


def test_a_level_that_the_sample_has_few_rows_of(rare):
    rows, mode, precision = rare
    sd = np.diag(np.linalg.inv(precision)) ** 0.5
    ds, approx = fit(rows)
    place(approx, mode + np.array([0, 0.5, 0.5]) * sd, np.diag(precision) ** -0.5)
    report = check_fit(approx, ds)
    np.testing.assert_allclose(report.z, [0, 0.5, 0.5], atol=0.12)
    np.testing.assert_allclose(report.s, 0, atol=0.12)
    np.testing.assert_allclose(report.sd, sd, rtol=0.06)


def test_a_quick_look_has_an_error_that_covers_it(rare):
    """Of a tenth of the rows, by which the means are known to 3 posterior sd."""
    rows, mode, precision = rare
    ds, approx = fit(rows)
    place(approx, mode, np.diag(precision) ** -0.5)
    report = check_fit(approx, ds, rows=15_000)
    assert report.rows == 15_000
    assert 1.5 < report.z_error < 6
    assert np.abs(report.z).max() < 3 * report.z_error
    assert report.verdict == "unknown"
    assert "Check all rows" in str(report)
    whole = check_fit(approx, ds)
    assert abs(report.elbo - whole.elbo) < 3 * report.elbo_error


def set_mode(mode: str) -> None:
    pytensor.config.mode = mode


def test_workers_give_the_same_numbers(rare):
    ds, approx = fit(rare[0])
    expected = check_fit(approx, ds)
    processes = ProcessPoolExecutor(
        1, get_context("spawn"), initializer=set_mode, initargs=(pytensor.config.mode,)
    )
    with ThreadPoolExecutor(2) as threads, processes:
        for executor in (threads, processes):
            report = check_fit(approx, ds, executor=executor)
            np.testing.assert_array_equal(report.z, expected.z)
            assert (report.elbo, report.rows) == (expected.elbo, expected.rows)
