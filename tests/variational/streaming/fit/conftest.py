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

import pytest

import pymc as pm

from tests.variational.streaming.fit.exact import Regression, place, stream


@pytest.fixture(scope="module")
def regression() -> Regression:
    return Regression()


@pytest.fixture
def fit(regression):
    """Return a stream and a mean-field approximation at the optimum."""
    ds = stream(regression.rows)
    with regression.model(ds):
        approx = pm.MeanField()
    place(approx, regression.mean, regression.mean_field_sd)
    return ds, approx


@pytest.fixture
def full_rank_fit(regression):
    ds = stream(regression.rows)
    with regression.model(ds):
        approx = pm.FullRank()
    place(approx, regression.mean, regression.covariance)
    return ds, approx
