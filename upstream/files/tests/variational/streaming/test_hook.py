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
"""A fit finds the streams of its model by itself."""

import gc
import subprocess
import sys
import weakref

import cloudpickle
import numpy as np
import pytest

import pymc as pm

from pymc.variational.streaming import StreamError, StreamingDataset

QUIET = {"progressbar": False}
QUICK = {**QUIET, "compile_kwargs": {"mode": "FAST_COMPILE"}}


def rows(seed=0):
    return np.random.default_rng(seed).normal(size=(60, 1))


@pytest.fixture
def ds():
    with StreamingDataset(rows(), batch_size=12) as ds:
        yield ds


def normal(ds, name="y"):
    mu = pm.Normal(f"mu_{name}")
    return pm.Normal(name, mu, observed=ds.as_tensor()[:, 0], total_size=ds.total_size)


def parameters(approx):
    return [value.get_value() for value in approx.params]


@pytest.mark.parametrize(
    "passed",
    [
        lambda ds: [],
        lambda ds: [ds.fit_callback()],
        lambda ds: [(lambda c: lambda *args: c(*args))(ds.fit_callback())],
    ],
    ids=["none", "the callback", "the callback in a function"],
)
def test_a_fit_is_the_same_however_the_stream_is_driven(passed):
    """The expected numbers are those of a loop of one's own."""
    with StreamingDataset(rows(), batch_size=12) as own, pm.Model():
        normal(own)
        inference = pm.ADVI(random_seed=0)
        own.advance()
        inference.fit(1, **QUICK)
        for _ in range(22):
            own.advance()
            inference.refine(1, progressbar=False)
        assert own.rows_seen == 22 * 12
    with StreamingDataset(rows(), batch_size=12) as ds, pm.Model():
        normal(ds)
        approx = pm.fit(23, callbacks=passed(ds), random_seed=0, **QUICK)
        assert ds.rows_seen == 23 * 12
    np.testing.assert_array_equal(parameters(approx), parameters(inference.approx))


def test_step_k_trains_on_batch_k_and_other_callbacks_see_it(ds):
    seen = []
    with pm.Model():
        normal(ds)
        pm.fit(7, callbacks=[lambda *_: seen.append(ds.as_tensor().get_value())], **QUICK)
    np.testing.assert_array_equal(seen, [*ds, *ds][:7])


def test_every_stream_of_a_model_is_found_and_no_other(ds):
    with (
        StreamingDataset(rows(1), batch_size=6, name="second") as second,
        StreamingDataset(rows(2), batch_size=6, name="other") as other,
        pm.Model(),
    ):
        normal(ds)
        normal(second, "z")
        pm.fit(4, callbacks=[ds.fit_callback()], **QUICK)
        assert (ds.rows_seen, second.rows_seen, other.rows_seen) == (4 * 12, 4 * 6, 0)


def test_a_wrong_model_is_refused_before_the_first_step(ds):
    with pm.Model():
        pm.Normal("y", pm.Normal("b"), observed=ds.as_tensor()[:, 0])
        with pytest.raises(StreamError, match="'y' depends on the stream but has no total_size"):
            pm.fit(1, **QUICK)


@pytest.mark.parametrize("advanced", [False, True])
def test_a_stream_that_replaces_data_is_refused(ds, advanced):
    """Its batch would be fitted as all rows."""
    if advanced:
        ds.advance()
    with pm.Model():
        data = pm.Data("data", np.zeros((12, 1)))
        pm.Normal("y", pm.Normal("b"), observed=data, total_size=60)
        with pytest.raises(StreamError, match="no observed variable of the model depends on"):
            pm.fit(1, more_replacements={data: ds.as_tensor()}, **QUICK)


def test_refine_and_further_fits_go_on_with_the_stream(ds):
    with pm.Model():
        normal(ds)
        inference = pm.ADVI()
        inference.fit(3, **QUICK)
        inference.refine(4, progressbar=False)
        assert ds.rows_seen == 7 * 12
        pm.fit(2, **QUICK)  # while the first inference is alive, and its callback
        assert ds.rows_seen == 9 * 12


def test_a_stream_is_closed_when_the_fit_returns(ds):
    with pm.Model():
        normal(ds)
        pm.fit(3, **QUICK)
    gc.collect()
    assert ds.as_tensor().get_value().shape == (0, 1)


def test_a_model_that_was_pickled_needs_its_dataset(ds):
    with pm.Model() as model:
        normal(ds)
    ds.advance()
    twin, other = cloudpickle.loads(cloudpickle.dumps((model, ds)))
    with twin:
        pm.fit(2, **QUICK)
    assert (ds.rows_seen, other.rows_seen) == (0, 2 * 12)
    with cloudpickle.loads(cloudpickle.dumps(model)):
        with pytest.raises(StreamError, match="'stream', whose StreamingDataset is gone; keep a"):
            pm.fit(1, **QUICK)


def test_no_dataset_is_kept_alive():
    ds = StreamingDataset(rows(), batch_size=12)
    gone = weakref.ref(ds)
    with pm.Model() as model:
        normal(ds)
        pm.fit(2, **QUICK)
    del ds
    gc.collect()
    assert gone() is None
    with model, pytest.raises(StreamError, match="whose StreamingDataset is gone"):
        pm.fit(1, **QUICK)


def test_fits_without_a_stream_import_nothing():
    code = (
        "import sys, pymc as pm\n"
        "with pm.Model():\n"
        "    pm.Normal('x')\n"
        "    pm.fit(1, progressbar=False, compile_kwargs={'mode': 'FAST_COMPILE'})\n"
        "assert 'pymc.variational.streaming' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
