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
"""The demo refuses tables that it cannot fit before anything heavy is imported."""

import subprocess
import sys

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.orderbook.columns import choose, holds_messages
from benchmarks.orderbook.demo import demo
from benchmarks.orderbook.experiment import PRIOR_SD, exact_posterior

ROOT = Path(__file__).parents[2]


@pytest.fixture
def rows(tmp_path):
    rng, n = np.random.default_rng(0), 2_000
    columns = {
        "time": 1_786_410_000_000 + np.arange(n),
        "x": rng.normal(size=n).astype("float32"),
        "count": rng.integers(0, 9, n),
        "won": rng.random(n) < 0.4,
        "name": ["a"] * n,
        "gap": pa.array([None, *range(1, n)], pa.int16()),
    }
    (tmp_path / "deep").mkdir()
    pq.write_table(pa.table(columns), tmp_path / "deep" / "rows.parquet")
    return tmp_path


def test_chosen_columns_are_taken_in_their_order(rows):
    assert choose(rows, features=["count", "x"], label="won") == ("count", "x", "won")
    assert not holds_messages(rows)


def test_the_last_column_is_the_label_if_none_is_chosen(tmp_path):
    pq.write_table(pa.table({"x": [0.5, 1.5], "up": [0, 1]}), tmp_path / "a.parquet")
    assert choose(tmp_path, features=None, label="") == ("x", "up")


@pytest.mark.parametrize(
    ["features", "label", "message"],
    [
        (["time", "x"], "won", r"'time' \(int64\) reaches 1.8e\+12.*: FEATURES=\"x\""),
        (["name", "x", "gap"], "won", r"'name' is string.*'gap' holds nulls.*FEATURES=\"x\""),
        (["x"], "count", "'count' must hold only 0 and 1; choose it: LABEL=won"),
        (["x"], "name", "'name' must hold only 0 and 1"),
        (["y"], "won", "no column 'y'; it has time, x, count"),
        (["x", "won"], "won", "the label 'won' must not be a feature"),
    ],
)
def test_columns_that_cannot_be_fitted_are_refused(rows, features, label, message):
    with pytest.raises(ValueError, match=message):
        choose(rows, features=features, label=label)


def test_the_remedies_lead_to_columns_that_can_be_fitted(rows):
    with pytest.raises(ValueError, match="LABEL=won"):
        choose(rows, features=["x"], label="")
    with pytest.raises(ValueError, match='FEATURES="x,count"'):
        choose(rows, features=None, label="won")
    columns = choose(rows, features=["x", "count"], label="won")
    posterior = exact_posterior(rows, columns)
    assert posterior.names == ("intercept", "x", "count")
    assert posterior.n_rows == 2_000 and max(posterior.sd) < PRIOR_SD


def test_a_directory_with_nothing_to_read_is_refused_and_says_what_it_holds(tmp_path):
    with pytest.raises(FileNotFoundError, match="it holds no files"):
        demo(data=str(tmp_path))
    (tmp_path / "a.csv").touch()
    with pytest.raises(FileNotFoundError, match=r"no messages in .*; it holds 1 \.csv"):
        demo(data=str(tmp_path))
    with pytest.raises(ValueError, match="is not a directory"):
        demo(data=str(tmp_path / "nothing"))
    (tmp_path / "a.parquet").touch()
    with pytest.raises(ValueError, match=r"a\.parquet is not a Parquet file that can be read"):
        demo(data=str(tmp_path))
    pq.write_table(pa.table({"x": [0.5][:0], "up": [0][:0]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="holds no rows"):
        demo(data=str(tmp_path))


def test_files_of_other_columns_are_refused_and_permuted_ones_are_not(tmp_path):
    pq.write_table(pa.table({"x": [0.5, 1.5], "up": [0, 1]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"up": [0, 1], "x": [0.5, 1.5]}), tmp_path / "b.parquet")
    assert choose(tmp_path, features=None, label="") == ("x", "up")
    pq.write_table(pa.table({"up": [0, 1]}), tmp_path / "c.parquet")
    with pytest.raises(
        ValueError, match=r"c\.parquet must have the columns of .*a\.parquet, x, up"
    ):
        choose(tmp_path, features=None, label="")


def test_a_number_that_is_not_finite_is_refused_in_the_first_pass(tmp_path):
    pq.write_table(pa.table({"x": [0.5, np.nan], "up": [0, 1]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="must hold only finite numbers in x, up"):
        exact_posterior(tmp_path)


def test_a_refusal_imports_neither_pymc_nor_numba(rows):
    code = "import sys; from benchmarks.orderbook.demo import demo\n"
    code += f"try: demo({str(rows)!r}, label='won')\n"
    code += "except ValueError: sys.exit(len({'pymc', 'numba', 'duckdb'} & {*sys.modules}))"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
