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
"""The README's code runs on the merged PyMC as it stands, and without its callback."""

import re

from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import pymc as pm

README = Path(__file__).parents[1] / "README.md"
CALLBACK = ", callbacks=[ds.fit_callback()]"


def fit(code):
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    return [value.get_value() for value in names["approx"].params]


@pytest.fixture
def shuffled(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(100_000, 3)).astype("float32")
    up = (rng.random(len(x)) < 1 / (1 + np.exp(-x.sum(1)))).astype("int8")
    (tmp_path / "shuffled").mkdir()
    table = pa.table(dict(zip(("mid", "spread", "imbalance"), x.T), up=up))
    pq.write_table(table, tmp_path / "shuffled" / "rows.parquet")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pm, "fit", partial(pm.fit, random_seed=0, progressbar=False))


def test_the_same_posterior_comes_with_the_callback_and_without(shuffled):
    code = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)[0]
    assert code.count(CALLBACK) == 1
    with_callback = fit(code)
    without = fit(code.replace(CALLBACK, ""))
    np.testing.assert_array_equal(with_callback, without)
    assert np.isfinite(without).all()
