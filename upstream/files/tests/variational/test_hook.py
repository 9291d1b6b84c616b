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

from pymc.variational._streaming.hook import with_streams
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


def test_a_fit_is_the_same_with_the_callback_and_without(ds):
    fits = []
    for callbacks in (None, [], [ds.fit_callback()]):
        with StreamingDataset(rows(), batch_size=12) as ds, pm.Model():
            normal(ds)
            given = callbacks and [ds.fit_callback()]
            fits.append(pm.fit(23, callbacks=given, random_seed=0, **QUICK))
            assert ds.rows_seen == 23 * 12
    np.testing.assert_array_equal(parameters(fits[0]), parameters(fits[1]))
    np.testing.assert_array_equal(parameters(fits[0]), parameters(fits[2]))


def test_step_k_trains_on_batch_k_and_other_callbacks_see_it(ds):
    seen = []
    with pm.Model():
        normal(ds)
        pm.fit(7, callbacks=[lambda *_: seen.append(ds.as_tensor().get_value())], **QUICK)
    expected = [*ds, *ds][:7]
    np.testing.assert_array_equal(seen, expected)


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


USES = {
    "the observed value": lambda x, n: pm.Normal("y", pm.Normal("b"), observed=x, total_size=n),
    "a parameter of the likelihood": lambda x, n: pm.Normal(
        "y", pm.Normal("b") * x, observed=np.zeros(12), total_size=n
    ),
    "a Deterministic on the way": lambda x, n: pm.Normal(
        "y", pm.Deterministic("m", pm.Normal("b") * x), observed=np.ones(12), total_size=n
    ),
}


@pytest.mark.parametrize("build", USES.values(), ids=USES)
def test_a_stream_is_found_wherever_the_model_uses_it(ds, build):
    with pm.Model() as model:
        build(ds.as_tensor()[:, 0], ds.total_size)
    assert len(with_streams(model, [])) == 1


def test_a_stream_in_a_potential_is_found(ds):
    with pm.Model() as model:
        pm.Potential("y", pm.logp(pm.Normal.dist(pm.Normal("b")), ds.as_tensor()[:, 0]).sum())
    with pytest.warns(UserWarning, match="Potential 'y' depends on the stream"):
        assert len(with_streams(model, [])) == 1


def test_a_stream_that_only_a_deterministic_uses_is_left_alone(ds):
    with pm.Model():
        b = pm.Normal("b")
        pm.Deterministic("shifted", b + ds.as_tensor())
        pm.Normal("y", b, observed=np.zeros(3))
        pm.fit(2, **QUICK)
    assert np.isnan(ds.as_tensor().get_value()).all()


def test_a_wrong_model_is_refused_before_the_first_step(ds):
    with pm.Model():
        pm.Normal("y", pm.Normal("b"), observed=ds.as_tensor()[:, 0])
        with pytest.raises(StreamError, match="'y' depends on the stream but has no total_size"):
            pm.fit(1, **QUICK)


def test_a_discrete_observation_cannot_be_fitted_to_a_blank_batch():
    """PyMC casts it to integers, which have no NaN, so a fit without the stream went on."""
    counts = np.random.default_rng(0).poisson(4.0, size=(6_000, 1)).astype(float)
    with StreamingDataset(counts, batch_size=200) as ds, pm.Model():
        rate = pm.Gamma("rate", 1, 1)
        pm.Poisson("y", rate, observed=ds.as_tensor()[:, 0], total_size=ds.total_size)
        approx = pm.fit(2_000, obj_optimizer=pm.adam(learning_rate=0.02), random_seed=0, **QUIET)
    # The posterior sd is 0.03; the last iterate of Adam wanders by several of them.
    assert abs(np.exp(approx.mean.eval()).item() - counts.mean()) < 0.2


def test_refine_goes_on_with_the_stream(ds):
    with pm.Model():
        normal(ds)
        inference = pm.ADVI()
    inference.fit(3, **QUICK)
    inference.refine(4, progressbar=False)
    assert ds.rows_seen == 7 * 12


def test_a_callback_of_an_earlier_fit_does_not_count(ds):
    """It is alive, so the stream is open, but nobody calls it."""
    with pm.Model():
        normal(ds)
        earlier = ds.fit_callback()
        pm.fit(3, **QUICK)
    assert ds.rows_seen == 3 * 12
    del earlier


def test_a_stream_is_closed_when_the_fit_returns(ds):
    with pm.Model():
        normal(ds)
        pm.fit(3, **QUICK)
    gc.collect()
    assert np.isnan(ds.as_tensor().get_value()).all()


def test_a_transformed_model_keeps_its_stream(ds):
    with pm.Model() as model:
        normal(ds)
    with pm.do(model, {"mu_y": 0.5}) as fixed:
        pm.Normal("free")
        pm.fit(2, **QUICK)
    assert fixed is not model
    assert ds.rows_seen == 2 * 12


def test_a_copy_that_was_pickled_is_found(ds):
    with pm.Model() as model:
        normal(ds)
    twin, other = cloudpickle.loads(cloudpickle.dumps((model, ds)))
    with twin:
        pm.fit(2, **QUICK)
    assert (ds.rows_seen, other.rows_seen) == (0, 2 * 12)


def test_no_dataset_is_kept_alive():
    ds = StreamingDataset(rows(), batch_size=12)
    gone = weakref.ref(ds)
    with pm.Model():
        normal(ds)
        pm.fit(2, **QUICK)
    del ds
    gc.collect()
    assert gone() is None


def test_a_dataset_that_is_gone_is_missed():
    with pm.Model() as model:
        normal(StreamingDataset(rows(), batch_size=12))
    gc.collect()
    with model, pytest.raises(StreamError, match="whose StreamingDataset is gone; keep a ref"):
        pm.fit(1, **QUICK)


def test_models_without_a_stream_get_their_own_list_back(ds):
    callbacks = []
    with pm.Model() as model:
        pm.Normal("y", pm.Normal("b"), observed=np.zeros(3))
    assert with_streams(model, callbacks) is callbacks


def test_fits_without_a_stream_import_nothing():
    code = (
        "import sys, pymc as pm\n"
        "with pm.Model():\n"
        "    pm.Normal('x')\n"
        "    pm.fit(1, progressbar=False, compile_kwargs={'mode': 'FAST_COMPILE'})\n"
        "assert 'pymc.variational.streaming' not in sys.modules\n"
        "pm.variational.streaming.StreamingDataset\n"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
