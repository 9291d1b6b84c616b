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
"""The text of the pull request has the numbers of the pages and of the branch; its recipe works."""

import re

import numpy as np
import pytest

import pymc as pm

from pymc.variational.streaming import StreamingDataset, shuffle_buffer
from upstream.commits import COMMITS, ROOT, place_files, read

TEXT = (ROOT / "upstream" / "PULL_REQUEST.md").read_text()
PAGES = [(ROOT / "docs" / "source" / f"{name}.md").read_text() for name in ("evidence", "speed")]


def rows_of(text: str) -> list[list[str]]:
    lines = (line.strip("|").split("|") for line in text.splitlines() if line.startswith("|"))
    return [[cell.strip() for cell in line] for line in lines]


def test_the_tables_have_the_numbers_of_the_pages():
    there = [set(row) for page in PAGES for row in rows_of(page)]
    rows = rows_of(TEXT)
    assert len(rows) > 10
    assert [row for row in rows if not any(set(row) <= cells for cells in there)] == []


def test_the_size_is_that_of_the_branch_within_a_tenth():
    stated = re.search(
        r"(\d+) commits with ([\d,]+) lines of code, ([\d,]+) of tests and ([\d,]+) of pages", TEXT
    )
    count, *lines = (int(number.replace(",", "")) for number in stated.groups())
    placed = [path for path in place_files() if path.endswith((".py", ".md", ".rst"))]
    actual = [
        sum(len(read(path).splitlines()) for path in placed if path.startswith(folder))
        for folder in ("pymc/", "tests/", "docs/")
    ]
    assert count == len(COMMITS)
    np.testing.assert_allclose(lines, actual, rtol=0.1, atol=100)


def test_the_trainer_of_pymc_extras_is_fed_every_row():
    pytest.importorskip("pymc_extras.inference.advi")
    recipe = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)[1]
    rng = np.random.default_rng(0)
    x = rng.normal(size=2_030)
    y = rng.normal(0.5 * x, 1.0)
    rows = shuffle_buffer(np.column_stack([x, y]), buffer_size=1_000, batch_size=100, seed=0)
    names = {"np": np, "pm": pm, "ds": StreamingDataset(rows, batch_size=100)}
    exec(compile(recipe, "PULL_REQUEST.md", "exec"), names)
    assert names["trainer"].step == 2_000
    assert names["ds"].rows_seen == 2_000 * 100 - 100
    mean, sd = x @ y / (1 / 9 + x @ x), (1 / 9 + x @ x) ** -0.5
    assert abs(names["trainer"].state.params["b_loc"] - mean) < 4 * sd
