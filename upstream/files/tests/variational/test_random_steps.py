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
"""The steps of a fit are independent draws, with the loss and without."""

import numpy as np
import pytensor
import pytest

import pymc as pm

from pymc.pytensorf import compile

OPTIMIZER = pm.adam(learning_rate=0.01)
FAST = {"compile_kwargs": {"mode": "FAST_COMPILE"}}


@pytest.mark.parametrize("score", [True, False])
def test_a_prior_is_found(score):
    """With one draw repeated in every step, the sd became 22."""
    with pm.Model():
        pm.Normal("a", 3, 2)
        approx = pm.fit(
            4_000, score=score, random_seed=1, obj_optimizer=OPTIMIZER, progressbar=False
        )
    np.testing.assert_allclose(approx.mean.eval(), 3, atol=0.5)
    np.testing.assert_allclose(approx.std.eval(), 2, atol=0.5)


def test_the_loss_changes_no_number():
    fits = []
    for score in (True, False):
        with pm.Model():
            pm.Normal("a", 3, 2)
            fits.append(pm.fit(50, score=score, random_seed=1, progressbar=False, **FAST))
    for ours, theirs in zip(fits[0].params, fits[1].params):
        np.testing.assert_allclose(ours.get_value(), theirs.get_value(), rtol=1e-12)


def test_updates_draw_anew():
    total = pytensor.shared(0.0)
    step = compile([], [], updates={total: pm.Normal.dist()}, random_seed=0)
    values = []
    for _ in range(5):
        step()
        values.append(float(total.get_value()))
    assert len(set(values)) == 5
