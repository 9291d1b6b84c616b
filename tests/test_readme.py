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
"""The README's code runs as it stands, and its table is the one that was generated."""

import re

from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import pymc as pm

from benchmarks.orderbook.experiment import exact_posterior

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def code_blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.slow
def test_the_code_finds_the_exact_posterior_and_the_check_improves_it(tmp_path, monkeypatch):
    """First with PyMC's default optimizer, then in fewer steps; the seeds are set here."""
    monkeypatch.setattr(pm, "fit", partial(pm.fit, random_seed=0))
    rng = np.random.default_rng(0)
    x = rng.normal(size=(100_000, 3)).astype("float32")
    logit = 0.3 + x @ [0.5, -0.4, 0.8]
    up = (rng.random(len(x)) < 1 / (1 + np.exp(-logit))).astype("int8")
    columns = dict(zip(("mid", "spread", "imbalance"), x.T), up=up)
    (tmp_path / "shuffled").mkdir()
    pq.write_table(pa.table(columns), tmp_path / "shuffled" / "rows.parquet")
    monkeypatch.chdir(tmp_path)
    fit, check = code_blocks("python")
    names: dict = {}
    exec(compile(fit, "README.md", "exec"), names)
    exact = exact_posterior(tmp_path / "shuffled")
    error = (names["approx"].mean.eval() - exact.mean) / exact.sd
    assert np.abs(error).max() < 1

    fewer_steps = check.replace("20_000,", "8_000,")
    assert fewer_steps != check
    exec(compile(fewer_steps, "README.md", "exec"), names)
    corrected = (names["approx"].mean.eval() - exact.mean) / exact.sd
    assert np.abs(corrected).max() < 0.2
    np.testing.assert_allclose(names["approx"].std.eval(), exact.sd, rtol=0.05)


def test_the_table_is_the_generated_one():
    table = README.split("<!-- demo: written by `make results` -->\n")[1]
    table = table.split("<!-- end of demo -->")[0]
    assert table == (ROOT / "docs/source/results/demo.md").read_text()
