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
"""The experiment goes on where it was stopped, and its tables say what its numbers say."""

import json
import re
import shutil
import subprocess
import sys
import time

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest

from benchmarks.orderbook.experiment import PRIOR_SD, exact_posterior, in_process
from benchmarks.orderbook.fold import fold
from benchmarks.orderbook.generate import generate
from benchmarks.orderbook.reproduce import Steps, main
from benchmarks.orderbook.rows import _messages_for, write_rows
from benchmarks.orderbook.tables import COMMAND, make_tables
from benchmarks.pages import filled
from tests.orderbook.wire import read_rows

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/source/evidence.md"
NUMBERS = ROOT / "docs/source/results/reproduce.json"


class Kitchen:
    """Steps that note that they ran: a table, a shuffled one, and what is read from each."""

    def __init__(self, folder):
        self.folder = folder
        self.ran = []
        self.fails = None

    def run(self, *, n_steps=1, seed=0):
        self.ran.clear()
        steps, of = Steps(self.folder), {"seed": seed}
        with steps.product("case", "rows", of, lambda path: self.make("rows", path)) as rows:
            steps.record("case", "exact", of, lambda: self.cook("exact", rows()))
            with steps.product(
                "case", "shuffle", of, lambda path: self.make("shuffle", path, rows())
            ) as shuffled:
                fit = {**of, "steps": n_steps}
                steps.record("case", "fit", fit, lambda: self.cook("fit", shuffled()))
        return steps.records["case"]

    def make(self, kind, path, *needed):
        path.mkdir()
        return self.cook(kind, *needed)

    def cook(self, kind, *needed):
        assert all(path.exists() for path in needed)
        if self.fails == kind:
            raise KeyboardInterrupt
        self.ran.append(kind)
        return {"dish": kind}

    def interrupted(self, kind, **options):
        self.fails = kind
        with pytest.raises(KeyboardInterrupt):
            self.run(**options)
        self.fails = None
        return self.ran.copy()


@pytest.fixture
def kitchen(tmp_path):
    return Kitchen(tmp_path)


def test_finished_steps_are_not_taken_again(kitchen):
    first = kitchen.run()
    assert kitchen.ran == [*first] == ["rows", "exact", "shuffle", "fit"]
    assert kitchen.run() == first
    assert kitchen.ran == []


@pytest.mark.parametrize("fails", ["rows", "exact", "shuffle", "fit"])
def test_an_interrupted_run_goes_on_with_the_step_that_was_interrupted(kitchen, fails):
    before = kitchen.interrupted(fails)
    kitchen.run()
    assert [*before, *kitchen.ran] == ["rows", "exact", "shuffle", "fit"]
    assert not any((kitchen.folder / "tables").iterdir())


def test_changed_parameters_take_that_step_and_make_what_it_needs(kitchen):
    kitchen.run(n_steps=1)
    record = kitchen.run(n_steps=2)["fit"]
    assert record["parameters"] == {"seed": 0, "steps": 2}
    assert sorted(kitchen.ran) == ["fit", "rows", "shuffle"]
    kitchen.run(n_steps=2, seed=1)
    assert kitchen.ran == ["rows", "exact", "shuffle", "fit"]


def test_a_product_of_other_parameters_is_not_taken_for_the_one_needed(kitchen):
    kitchen.interrupted("exact", seed=1)
    kitchen.run(seed=0)
    assert kitchen.ran == ["rows", "exact", "shuffle", "fit"]


@pytest.mark.parametrize("n_rows", [5_000, 450_000], ids=["one window", "two windows"])
def test_rows_made_in_memory_are_those_of_generate_and_fold(tmp_path, n_rows):
    messages = tmp_path / "messages"
    n = _messages_for(n_rows)
    generate(messages, messages=n, seed=2, file_format="parquet", progressbar=False)
    fold(messages, tmp_path / "folded", progressbar=False)
    write_rows(tmp_path / "rows", rows=n_rows, seed=2)
    assert read_rows(tmp_path / "rows").equals(read_rows(tmp_path / "folded").slice(0, n_rows))


def test_files_end_at_the_cuts_and_a_table_begins_like_the_one_it_is_planned_as(tmp_path):
    write_rows(tmp_path / "whole", rows=30_000, seed=0, cuts=[7_000, 20_000])
    write_rows(tmp_path / "part", rows=9_000, seed=0, planned=30_000)
    files = sorted((tmp_path / "whole").iterdir())
    assert [pq.read_metadata(file).num_rows for file in files] == [7_000, 13_000, 10_000]
    assert read_rows(tmp_path / "part").equals(read_rows(tmp_path / "whole").slice(0, 9_000))


def test_bad_numbers_of_rows_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"cuts must lie between 1 and rows=10, got \[11\]"):
        write_rows(tmp_path / "rows", rows=10, seed=0, cuts=[11])
    with pytest.raises(ValueError, match="planned must be at least rows=10, got 9"):
        write_rows(tmp_path / "rows", rows=10, seed=0, planned=9)


def test_the_exact_posterior_has_no_gradient_and_the_curvature_of_all_rows(tmp_path):
    write_rows(tmp_path / "rows", rows=30_000, seed=0, cuts=[10_000])
    posterior = exact_posterior(tmp_path / "rows")
    rows = np.column_stack([c.to_numpy().astype(float) for c in read_rows(tmp_path / "rows")])
    x, up = np.column_stack([np.ones(len(rows)), rows[:, :-1]]), rows[:, -1]
    p = 1 / (1 + np.exp(-x @ posterior.mean))
    precision = x.T @ (x * (p * (1 - p))[:, None]) + np.eye(4) / PRIOR_SD**2
    gradient = x.T @ (up - p) - np.array(posterior.mean) / PRIOR_SD**2
    np.testing.assert_allclose(np.linalg.solve(precision, gradient), 0, atol=1e-9)
    np.testing.assert_allclose(posterior.sd, np.sqrt(np.diag(np.linalg.inv(precision))), rtol=1e-6)
    np.testing.assert_allclose(posterior.mean_field_sd, np.diag(precision) ** -0.5, rtol=1e-6)
    assert posterior.n_rows == 30_000


def test_a_killed_parent_leaves_no_process_behind():
    code = f"from time import sleep; from {in_process.__module__} import in_process\n"
    code += "if __name__ == '__main__': in_process(sleep, 300)"
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT) as parent:
        process = psutil.Process(parent.pid)
        children = wait_for(lambda: len(process.children()) > 1 and process.children())
        parent.kill()
    _, alive = psutil.wait_procs(children, timeout=60)
    assert not alive


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on_where_it_was_and_publishes(tmp_path):
    command = [sys.executable, "-m", "tests.orderbook.small_reproduce", str(tmp_path)]
    records = tmp_path / "records"
    with subprocess.Popen([*command, "30"], cwd=ROOT) as process:
        wait_for(lambda: (records / "0.02M-preshuffle.json").exists())
        process.kill()
    before = {file: file.stat().st_mtime_ns for file in records.glob("*.json")}
    assert len(before) >= 5
    subprocess.run([*command, "30"], cwd=ROOT, check=True)
    assert {file: file.stat().st_mtime_ns for file in before} == before
    assert not any((tmp_path / "tables").iterdir())

    published = json.loads((tmp_path / "results" / "reproduce.json").read_text())
    case = published["records"]["0.02M"]
    assert list(case) == ["rows", "exact", "preshuffle", "preshuffled"]
    assert not case["preshuffled"]["result"]["examination"]["order"]["ordered"]
    assert published["records"]["messages"]["fold"]["result"]["messages"] == 8_000
    assert str(tmp_path) not in json.dumps(published)
    for figure in ("means", "memory"):
        assert (tmp_path / "results" / f"reproduce_{figure}.png").stat().st_size > 10_000


def test_the_tables_of_the_page_are_those_of_its_numbers():
    page = PAGE.read_text()
    for name, table in make_tables(json.loads(NUMBERS.read_text())["records"]).items():
        assert filled(page, name, COMMAND, table) == page
    assert len(re.findall("written by `make reproduce`", page)) == 7


def test_what_cannot_work_is_refused_at_once(tmp_path, monkeypatch):
    options = ["--work", str(tmp_path / "work"), "--results", str(tmp_path / "results")]
    with pytest.raises(SystemExit, match="holds no Parquet files and no messages"):
        main([*options, "--captures", str(tmp_path)])
    with pytest.raises(SystemExit, match="sizes must lie between 1 and 121800000"):
        main([*options, "--sizes", "2e8"])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**9))
    with pytest.raises(SystemExit, match=r"must have 39 GB free, it has 1; pass --work on"):
        main(options)
    assert not (tmp_path / "results").exists()


def wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end
        time.sleep(0.02)
    return found
