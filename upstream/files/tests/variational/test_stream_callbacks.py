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
import numpy as np
import pytensor
import pytest

import pymc as pm

from pymc.variational.stream_callbacks import add_stream_callbacks

ROWS = np.arange(12.0)


class Loader:
    """Stream batches of four rows through a shared variable."""

    def __init__(self):
        self.buffer = pytensor.shared(ROWS[:4], shape=(None,))
        self.buffer.tag.fit_callback = self.fit_callback
        self.n_steps = 0
        self.models = []

    def fit_callback(self):
        self.models.append(pm.modelcontext(None))
        return self

    def __call__(self, approx, losses, i):
        self.n_steps += 1
        first = 4 * self.n_steps % 12
        self.buffer.set_value(ROWS[first : first + 4])


@pytest.fixture
def loader():
    return Loader()


def normal(loader):
    with pm.Model() as model:
        pm.Normal("y", pm.Normal("mu"), observed=loader.buffer, total_size=12)
    return model


USES = {
    "the observed value": lambda x: pm.Normal("y", pm.Normal("b"), observed=x, total_size=12),
    "a parameter": lambda x: pm.Normal("y", pm.Normal("b") * x, observed=np.ones(4), total_size=12),
    "a Deterministic": lambda x: pm.Normal(
        "y", pm.Deterministic("m", pm.Normal("b") * x), observed=np.ones(4), total_size=12
    ),
    "a Potential": lambda x: pm.Potential("y", (pm.Normal("b") * x).sum()),
}


@pytest.mark.parametrize("build", USES.values(), ids=USES)
def test_a_stream_is_found_wherever_the_log_probability_uses_it(loader, build):
    with pm.Model() as model:
        build(loader.buffer)
    passed = [print]
    assert add_stream_callbacks(passed, model) == [print, loader]
    assert passed == [print]
    assert loader.models == [model]


def test_a_stream_in_more_replacements_is_found(loader):
    with pm.Model() as model:
        data = pm.Data("data", ROWS[:4])
        pm.Normal("y", pm.Normal("mu"), observed=data)
    assert add_stream_callbacks([], model, {data: 2 * loader.buffer, "other": 1.0}) == [loader]


def test_other_models_get_their_own_callbacks_back(loader):
    callbacks = []
    with pm.Model() as model:
        mu = pm.Normal("mu")
        pm.Deterministic("shifted", mu + loader.buffer)
        pm.Normal("y", mu, observed=pm.Data("data", ROWS))
    assert add_stream_callbacks(callbacks, model) is callbacks


def test_a_transformed_model_keeps_its_streams(loader):
    model = pm.do(normal(loader), {"mu": 0.5})
    assert add_stream_callbacks([], model) == [loader]


def test_each_stream_of_a_model_is_asked_once(loader):
    other = Loader()
    with normal(loader) as model:
        for name, stream in (("z", loader), ("u", other)):
            pm.Normal(name, model["mu"], observed=stream.buffer, total_size=12)
    assert sorted(map(id, add_stream_callbacks([], model))) == sorted(map(id, (loader, other)))


def test_an_error_of_the_stream_ends_the_fit_before_the_first_step(loader):
    def refuse():
        raise RuntimeError("the stream is gone")

    loader.buffer.tag.fit_callback = refuse
    with normal(loader), pytest.raises(RuntimeError, match="the stream is gone"):
        pm.fit(1, progressbar=False)


def test_fit_and_refine_call_the_callback_after_those_that_were_passed(loader):
    seen = []
    with normal(loader):
        inference = pm.ADVI()
    inference.fit(
        3,
        callbacks=[lambda *_: seen.append(loader.buffer.get_value()[0])],
        progressbar=False,
        compile_kwargs={"mode": "FAST_COMPILE"},
    )
    inference.refine(2, progressbar=False)
    assert seen == [0, 4, 8, 0, 4]
    assert loader.n_steps == 5
